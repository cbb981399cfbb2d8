//! The little that remains of a PC: an IOAPIC, one serial port, and answers
//! that keep kernels from waiting for devices that are not there.

pub(crate) mod ioapic;
pub(crate) mod ports;
pub(crate) mod serial;
