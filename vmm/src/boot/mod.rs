//! Booting Linux: an ELF kernel through the 64-bit boot protocol, without ACPI.

pub(crate) mod cmdline;
pub(crate) mod kernel;
pub(crate) mod mptable;
pub(crate) mod params;
