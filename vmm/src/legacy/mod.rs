//! The little that remains of a PC: an IOAPIC, one serial port, and answers
//! that keep kernels from waiting for devices that are not there.

pub mod ioapic;
pub mod ports;
pub mod serial;
