//! Booting Linux: an ELF kernel through the 64-bit boot protocol, without ACPI.

pub mod cmdline;
pub mod kernel;
pub mod mptable;
pub mod params;
