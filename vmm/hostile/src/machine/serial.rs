//! The serial port, on which the host listens.

use super::cpu;

const COM1: u16 = 0x3f8;

/// Prints a byte.
pub(crate) fn print(byte: u8) {
    cpu::out8(COM1, byte);
}
