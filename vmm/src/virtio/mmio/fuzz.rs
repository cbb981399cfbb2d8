//! Writes of a driver to the registers of a device, against the states that there are.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::fuzz::guest::number;
use crate::virtio::registers::Registers;
use crate::virtio::rng::Rng;
use crate::virtio::test_driver::memory;

const STEPS: usize = 300;
const RAM: usize = 0x8000;

#[derive(Debug)]
struct NoLine;

impl Line for NoLine {
    fn raise(&self) {}
}

/// Writes to registers, and a device that gives up now and then.
pub(crate) fn registers(input: &[u8]) {
    // An input that ends is at its end.
    let _ = steps(&mut Unstructured::new(input));
}

fn steps(input: &mut Unstructured<'_>) -> Result<()> {
    let page = Registers::new().expect("registers").page(3);
    clear(&page);
    let line = Arc::new(NoLine);
    let (page, mut transport) = fresh(page, line);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let before = page.get(STATUS);
        let mut value = 0;
        let mut offset = STATUS;
        match input.int_in_range(0..=15)? {
            0..=3 => {
                // The next step of a driver that does it right.
                value = match before & !(NEEDS_RESET | FAILED) {
                    0 => ACKNOWLEDGE,
                    1 => ACKNOWLEDGE | DRIVER,
                    3 => ACKNOWLEDGE | DRIVER | FEATURES_OK,
                    status => status | DRIVER_OK,
                };
                transport.write(offset, &value.to_le_bytes());
            }
            4 | 5 => {
                // The features that a driver needs.
                offset = DRIVER_FEATURES;
                value = if input.arbitrary()? {
                    1
                } else {
                    input.arbitrary()?
                };
                transport.write(DRIVER_FEATURES_SELECT, &1_u32.to_le_bytes());
                transport.write(offset, &value.to_le_bytes());
            }
            6 => {
                // A queue in memory.
                offset = QUEUE_READY;
                for (register, place) in [
                    (QUEUE_DESCRIPTORS_LOW, 0x1000_u32),
                    (QUEUE_DRIVER_LOW, 0x2000),
                    (QUEUE_DEVICE_LOW, 0x3000),
                    (QUEUE_READY, 1),
                ] {
                    transport.write(register, &place.to_le_bytes());
                }
            }
            7 => {
                // As the event loop does when a device breaks.
                offset = QUEUE_NOTIFY;
                lock(transport.device()).reset();
                transport.interrupt().needs_reset();
            }
            8 => {
                // What another process would make of its state.
                let state = transport.state();
                let json = serde_json::to_vec(&state).expect("a state is JSON");
                let saved: State = serde_json::from_slice(&json).expect("and is read again");
                assert_eq!(saved, state);
                let new = Registers::new().expect("registers").page(3);
                clear(&new);
                let restored = fresh(new, Arc::new(NoLine)).1.restore(&saved);
                assert_eq!(restored.expect("its own state fits").state(), state);
                continue;
            }
            9 => {
                offset = input.int_in_range(0..=SLOT_SIZE - 1)?;
                let bytes: [u8; 8] = input.arbitrary()?;
                transport.write(offset, &bytes[..input.int_in_range(0..=8)?]);
                // Whatever it was, the rules below hold for what is one write.
                if offset == STATUS {
                    continue;
                }
            }
            _ => {
                let edges = [u64::from(u32::MAX), 0x1000, 32, 64, 0xffff, 0x1_0000];
                offset = u64::from(input.int_in_range(0..=0x47_u8)?) * 4;
                value = number(input, &edges)? as u32;
                transport.write(offset, &value.to_le_bytes());
            }
        }
        check(&page, &transport, before, offset, value);
    }
    let _ = transport.shut_down();
    assert_eq!((page.get(DEVICE_ID), page.get(STATUS)), (0, 0));
    Ok(())
}

fn fresh(page: Page, line: Arc<dyn Line>) -> (Page, Transport) {
    let kick = EventFd::new(libc::EFD_NONBLOCK).expect("a descriptor");
    let watcher = Watcher::detached().expect("a set");
    let transport = Transport::new(
        Box::new(Rng::new()),
        memory(RAM),
        page.clone(),
        line,
        vec![kick],
        watcher,
    );
    (page, transport)
}

/// What holds after each write.
fn check(page: &Page, transport: &Transport, before: u32, offset: u64, value: u32) {
    let fixed = [REGISTER_MAGIC, REGISTER_VERSION, DEVICE_ID, VENDOR_ID].map(|at| page.get(at));
    assert_eq!(fixed, [MAGIC, VERSION, Kind::Rng.id(), VENDOR]);
    let status = page.get(STATUS);
    let steps = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    let given = steps.map(|bit| status & bit != 0);
    assert!(
        given.is_sorted_by(|a, b| a >= b),
        "status {status:#x} skips a step"
    );
    if offset != STATUS || value != 0 {
        assert_eq!(
            before & !status,
            0,
            "a bit of {before:#x} went, {status:#x} is left"
        );
    } else {
        assert_eq!(status, 0, "a reset");
    }
    let in_use = !lock(transport.device()).queues().is_empty();
    let live = status & DRIVER_OK != 0;
    assert!(
        live || !in_use,
        "a device is in use before its driver says so"
    );
    assert!(
        !live || in_use || status & NEEDS_RESET != 0,
        "a device is not in use"
    );
    if in_use {
        let queue = transport.queues[0];
        assert!(queue.ready && queue.size.is_power_of_two() && queue.size <= queue.max_size);
        assert_eq!(transport.driver_features & !transport.features, 0);
    }
}
