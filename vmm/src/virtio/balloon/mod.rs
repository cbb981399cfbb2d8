//! virtio-balloon (virtio 1.2, section 5.5), for one thing: the guest tells which pages are free ("free page
//! reporting", 5.5.6.7), and the host gets them. It takes none that are not: the balloon stays empty.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use std::ops::ControlFlow;

use vm_memory::GuestAddress;

use super::queue::{Chain, QueueRecord};
use crate::memory::{self, Backing, Memory};
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::state::{BalloonState, DeviceState};

/// The queues to inflate and deflate have to be there.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
/// Free pages. Without statistics and hints the queues have no gaps between them.
const REPORTING: usize = 2;
/// Requests handled before others have their turn.
const BUDGET: usize = 16;
/// Ranges of a request; Linux has as many.
const MAX_RANGES: usize = 32;

/// `VIRTIO_BALLOON_F_REPORTING`
const F_REPORTING: u64 = 1 << 5;

/// A device.
#[derive(Debug)]
pub struct Balloon {
    backing: Backing,
    counters: Counters,
    active: Option<Activation>,
}

impl Balloon {
    /// Creates an idle device of a guest whose RAM is as `backing` says.
    #[must_use]
    pub fn new(backing: Backing) -> Self {
        Self {
            backing,
            counters: Counters::default(),
            active: None,
        }
    }

    /// As [`Balloon::new`], from what was saved.
    #[must_use]
    pub fn restore(state: &BalloonState, backing: Backing) -> Self {
        Self {
            counters: state.counters,
            ..Self::new(backing)
        }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queues_for(&self, features: u64) -> usize {
        if features & F_REPORTING == 0 {
            REPORTING
        } else {
            QUEUE_SIZES.len()
        }
    }

    fn features(&self) -> u64 {
        F_REPORTING
    }

    /// Pages that are to be in the balloon, and that are: none.
    fn config(&self) -> Vec<u8> {
        vec![0; 16]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref())
    }

    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let (counters, backing) = (&mut self.counters, self.backing);
        counters.notifications = counters.notifications.wrapping_add(1);
        active.serve_queue(queue, BUDGET, |chain, memory| {
            counters.requests = counters.requests.wrapping_add(1);
            let freed = if usize::from(queue) == REPORTING {
                take(chain, memory, backing)
            } else {
                None
            };
            match freed {
                Some(bytes) => counters.bytes_in = counters.bytes_in.wrapping_add(bytes),
                None => counters.errors = counters.errors.wrapping_add(1),
            }
            ControlFlow::Continue(0)
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            counters: self.counters,
        })
    }
}

/// Takes the pages that a chain names; returns how many bytes that are. None: there is something else in it.
/// What a guest names and uses all the same, it loses.
fn take(chain: Chain<'_>, memory: &Memory, backing: Backing) -> Option<u64> {
    let mut bytes = 0u64;
    for (count, range) in chain.enumerate() {
        if count == MAX_RANGES || !range.is_write_only() {
            return None;
        }
        let (start, length) = (GuestAddress(range.addr().0), u64::from(range.len()));
        memory::give_back(memory, backing, start, length).ok()?;
        bytes = bytes.saturating_add(length);
    }
    Some(bytes)
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
