//! Devices that come and go behind slots, while a driver writes to their registers.

use arbitrary::{Result, Unstructured};
use vmm_sys_util::epoll::Epoll;

use super::*;
use crate::fuzz::guest::number;
use crate::virtio::rng::Rng;
use crate::virtio::test_driver::{Nothing, memory};

const STEPS: usize = 200;

/// Attaches, detaches, registers, events: a slot has a device exactly while the daemon put one there.
pub(crate) fn slots(input: &[u8]) {
    // An input that ends is at its end.
    let _ = steps(&mut Unstructured::new(input));
}

fn steps(input: &mut Unstructured<'_>) -> Result<()> {
    let epolls = Epolls::new(Arc::new(Epoll::new().expect("a set")), 1).expect("sets");
    let ioapic = Arc::new(Ioapic::new(Nothing));
    let slots = Slots::new(&ioapic, memory(0x1_0000), epolls).expect("slots");
    // Generations are counted from 1.
    let mut generations = [0_u16; SLOTS as usize];
    let mut taken = [false; SLOTS as usize];
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let slot = match input.int_in_range(0..=3)? {
            0 => input.arbitrary()?,
            _ => input.int_in_range(0..=2)?,
        };
        let place = usize::from(slot);
        let is_taken = taken.get(place).copied();
        match input.int_in_range(0..=7)? {
            0 => {
                let attached = slots.attach(slot, Box::new(Rng::new()), &Nothing);
                assert_eq!(attached.is_ok(), is_taken == Some(false));
                if attached.is_ok() {
                    taken[place] = true;
                    generations[place] += 1;
                }
            }
            1 => {
                let detached = slots.detach(slot, &Nothing);
                assert_eq!(detached.is_ok(), is_taken == Some(true));
                if detached.is_ok() {
                    taken[place] = false;
                }
            }
            2 => {
                let generation = input.int_in_range(0..=4)?;
                let is_there = is_taken == Some(true) && generation == generations[place];
                assert_eq!(slots.find(slot, generation).is_some(), is_there);
                slots.fail(slot, generation);
            }
            3 => slots.kick(slot, input.arbitrary()?),
            4 => assert_eq!(
                slots.metrics().len(),
                taken.iter().filter(|it| **it).count()
            ),
            _ => {
                let edges = [
                    SLOT_BASE,
                    SLOT_BASE - 1,
                    u64::MAX,
                    SLOT_BASE + SLOT_SIZE * 32,
                ];
                let address = match input.int_in_range(0..=7)? {
                    0 => number(input, &edges)?,
                    _ => {
                        let register = u64::from(input.int_in_range(0..=0x47_u8)?) * 4;
                        (SLOT_BASE + SLOT_SIZE * u64::from(slot)) + register
                    }
                };
                let value = number(input, &[3, 11, 15])? as u32;
                slots.write(address, &value.to_le_bytes()[..input.int_in_range(3..=4)?]);
            }
        }
    }
    slots.drain();
    Ok(())
}
