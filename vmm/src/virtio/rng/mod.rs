//! virtio-rng (virtio 1.2, section 5.4): the host's `getrandom` for the guest.

use std::io;
use std::ops::ControlFlow;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::VolatileSlice;

use super::buffers::Buffers;
use super::queue::QueueRecord;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::state::{DeviceState, RngState};

const QUEUE_SIZE: u16 = 32;
/// The most that one request gets; the driver asks again.
const MAX_BYTES: usize = 4096;
/// Requests handled before others have their turn.
const BUDGET: usize = 32;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    active: Option<Activation>,
    counters: Counters,
}

impl Rng {
    /// Creates an idle device.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an idle device from what was saved.
    #[must_use]
    pub fn restore(state: &RngState) -> Self {
        Self {
            active: None,
            counters: state.counters,
        }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
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

    fn on_kick(&mut self, _queue: u16) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let counters = &mut self.counters;
        counters.notifications += 1;
        active.serve(BUDGET, |chain, memory| {
            let filled = match Buffers::collect(chain, memory, usize::from(QUEUE_SIZE)) {
                Ok(buffers) => fill(&buffers.writable),
                Err(_) => 0,
            };
            if filled == 0 {
                counters.errors += 1;
            }
            counters.requests += 1;
            counters.bytes_in += u64::from(filled);
            ControlFlow::Continue(filled)
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Rng(RngState {
            counters: self.counters,
        })
    }
}

/// Fills the slices with random bytes, up to [`MAX_BYTES`]; returns how many.
fn fill(slices: &[VolatileSlice<'_>]) -> u32 {
    let mut random = [0u8; MAX_BYTES];
    let mut filled = 0;
    for slice in slices {
        let wanted = slice.len().min(MAX_BYTES - filled);
        let Some(bytes) = random.get_mut(..wanted) else {
            break;
        };
        if random_bytes(bytes).is_err() {
            break;
        }
        slice.copy_from(bytes);
        filled += wanted;
    }
    filled as u32
}

/// Fills `bytes` from the host kernel's random number generator.
///
/// # Errors
/// What `getrandom` says; never on a host whose generator is seeded.
pub fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        done += getrandom(rest, GetRandomFlags::empty())?;
    }
    Ok(())
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
