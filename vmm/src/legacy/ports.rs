//! I/O ports. All ones where nothing is, which is how kernels find out.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use vm_superio::Trigger;

use super::serial::Com1;
use crate::layout::COM1;

const COM1_LAST: u16 = COM1 + 7;
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
const CMOS_DATA: u16 = 0x71;
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;

/// The effect of a write to a port on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    None,
    /// A reset.
    Reset,
}

/// Reads from a port. `data` may hold several units of a string instruction.
pub fn read<T: Trigger>(com1: &Com1<T>, port: u16, data: &mut [u8]) {
    match port {
        COM1..=COM1_LAST => data.fill_with(|| com1.read(port.wrapping_sub(COM1) as u8)),
        // A real-time clock whose time can be read at once: an "update in progress" that never ends
        // costs Linux's driver two seconds. Whatever register was selected, bit 7 is clear.
        CMOS_DATA => data.fill(0),
        _ => data.fill(0xff),
    }
}

/// Writes to a port.
pub fn write<T: Trigger>(com1: &Com1<T>, port: u16, data: &[u8]) -> Effect {
    match (port, data) {
        (COM1..=COM1_LAST, _) => {
            for byte in data {
                com1.write(port.wrapping_sub(COM1) as u8, *byte);
            }
        }
        (KEYBOARD_COMMAND, [KEYBOARD_RESET]) => return Effect::Reset,
        (RESET_CONTROL, [value]) if value & RESET_CPU != 0 => return Effect::Reset,
        _ => {}
    }
    Effect::None
}

#[cfg(any(test, fuzzing))]
#[path = "ports/fuzz.rs"]
pub(crate) mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Trigger for Nothing {
        type E = ();
        fn trigger(&self) -> Result<(), ()> {
            Ok(())
        }
    }

    #[test]
    fn absent_ports_read_as_all_ones_at_any_width() {
        let com1 = Com1::new(Nothing, None);
        for port in [0x20, 0x21, 0x40, 0x60, 0x61, 0x64, 0xcf8, 0xffff] {
            for width in [1, 2, 4, 4096] {
                let mut data = vec![0; width];
                read(&com1, port, &mut data);
                assert!(data.iter().all(|byte| *byte == 0xff));
                assert_eq!(write(&com1, port, &vec![0; width]), Effect::None);
            }
        }
    }

    #[test]
    fn the_clock_is_never_busy() {
        let com1 = Com1::new(Nothing, None);
        write(&com1, 0x70, &[0x0a]);
        let mut data = [0xff];
        read(&com1, CMOS_DATA, &mut data);
        assert_eq!(data[0] & 0x80, 0);
    }

    #[test]
    fn both_ways_to_reset_a_pc_work() {
        let com1 = Com1::new(Nothing, None);
        assert_eq!(
            write(&com1, KEYBOARD_COMMAND, &[KEYBOARD_RESET]),
            Effect::Reset
        );
        assert_eq!(write(&com1, RESET_CONTROL, &[6]), Effect::Reset);
        assert_eq!(write(&com1, RESET_CONTROL, &[2]), Effect::None);
    }
}
