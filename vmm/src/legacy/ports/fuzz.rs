//! Accesses to I/O ports, of any width.

use arbitrary::{Result, Unstructured};
use vm_superio::Trigger;

use super::*;
use crate::fuzz::guest::some_bytes;

const STEPS: usize = 300;

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = ();

    fn trigger(&self) -> std::result::Result<(), ()> {
        Ok(())
    }
}

/// Accesses to ports: nothing but the two ways to reset has an effect, and what a kernel says is bounded.
pub(crate) fn accesses(input: &[u8]) {
    // An input that ends is at its end.
    let _ = steps(&mut Unstructured::new(input));
}

fn steps(input: &mut Unstructured<'_>) -> Result<()> {
    let com1 = Com1::new(NoInterrupt, None);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let port = match input.int_in_range(0..=3)? {
            0 => input.arbitrary()?,
            1 => COM1 + input.int_in_range(0..=7)?,
            2 => COM1,
            _ => *input.choose(&[KEYBOARD_COMMAND, CMOS_DATA, RESET_CONTROL])?,
        };
        if input.arbitrary()? {
            let mut data = vec![0xaa; input.int_in_range(0..=64)?];
            read(&com1, port, &mut data);
            let is_nothing = !(COM1..=COM1_LAST).contains(&port) && port != CMOS_DATA;
            assert!(!is_nothing || data.iter().all(|byte| *byte == 0xff));
        } else {
            let data = some_bytes(input, 64)?;
            let effect = write(&com1, port, data);
            let may_reset = data.len() == 1 && [KEYBOARD_COMMAND, RESET_CONTROL].contains(&port);
            assert!(effect == Effect::None || may_reset);
        }
    }
    assert!(
        com1.panic_message()
            .is_none_or(|message| message.len() <= 600)
    );
    Ok(())
}
