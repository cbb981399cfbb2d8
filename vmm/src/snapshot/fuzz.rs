//! Bytes that are given for a state, and parts of a machine that are made of it.

use std::sync::Arc;

use vm_superio::Trigger;
use vmm_sys_util::epoll::Epoll;

use super::*;
use crate::epolls::Epolls;
use crate::layout::IOAPIC_PINS;
use crate::legacy::ioapic::Ioapic;
use crate::legacy::serial::Com1;
use crate::slots::Slots;
use crate::virtio::rng::Rng;
use crate::virtio::test_driver::{Nothing, memory};

/// A label that the kept inputs have, in short.
pub(super) const LABEL: &str = "l";

/// Whatever is taken for a state is one: it can be written again, and is then read as the same. The
/// checksum is made right, or no input would come past it.
pub(crate) fn state(input: &[u8]) {
    assert!(decode(input, LABEL).is_err() || input.starts_with(&MAGIC));
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(BUILD.as_bytes());
    bytes.extend(crc32fast::hash(input).to_le_bytes());
    bytes.extend(input);
    if let Ok(state) = decode(&bytes, LABEL) {
        let written = encode(&state, LABEL).expect("a state is bytes");
        let again = decode(&written, LABEL).expect("and is read again");
        assert_eq!(encode(&again, LABEL).expect("it is one, too"), written);
        build(&state);
    }
}

struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = ();

    fn trigger(&self) -> Result<(), ()> {
        Ok(())
    }
}

/// Puts a device behind the registers of each slot, whatever it was, and lets it work.
fn build(state: &MachineState) {
    let ioapic = Arc::new(Ioapic::restore(Nothing, state.ioapic.clone()));
    (0..=IOAPIC_PINS).for_each(|pin| ioapic.raise(pin));
    if let Ok(com1) = Com1::restore(&state.com1, NoInterrupt, None) {
        for register in 0..8 {
            let _ = com1.read(register);
        }
    }
    let epolls = Epolls::new(Arc::new(Epoll::new().expect("a set")), 1).expect("sets");
    let slots = Slots::new(&ioapic, memory(0x1_0000), epolls).expect("slots");
    for (slot, saved) in &state.slots {
        let attached = slots.attach_saved(*slot, Box::new(Rng::new()), saved, &Nothing);
        if attached.is_ok()
            && let Some(attached) = slots.find(*slot, 1)
        {
            let _ = crate::sync::lock(&attached.device).on_kick(0);
        }
    }
    assert!(slots.drain());
    drop(slots.states());
}
