//! virtio-pmem (virtio 1.2, section 5.19): a region of read-only files as persistent memory.
//!
//! The guest reads without the device. Its only request is a flush, and nothing is ever to be flushed.
//! What the guest writes is lost: KVM takes it for an access to a device, and there is none.

use std::ops::ControlFlow;

use vm_memory::Bytes;

use super::buffers::Buffers;
use super::queue::QueueRecord;
use crate::file_regions::FileRegion;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::state::{DeviceState, PmemState};

const QUEUE_SIZE: u16 = 16;
/// Descriptors of a request; two are enough.
const MAX_SEGMENTS: usize = 4;
/// Requests handled before others have their turn.
const BUDGET: usize = 32;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`
const FLUSH: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_OK`
const OK: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_EIO`
const FAILED: u32 = 1;

/// The region is not that of the saved state.
#[derive(Debug, thiserror::Error)]
#[error("region does not match its saved state")]
pub struct Mismatch;

/// The device.
#[derive(Debug)]
pub struct Pmem {
    region: FileRegion,
    active: Option<Activation>,
    counters: Counters,
}

impl Pmem {
    /// Creates an idle device.
    #[must_use]
    pub fn new(region: FileRegion) -> Self {
        Self {
            region,
            active: None,
            counters: Counters::default(),
        }
    }

    /// Creates an idle device from what was saved and the same region.
    ///
    /// # Errors
    /// [`Mismatch`]
    pub fn restore(state: &PmemState, region: FileRegion) -> Result<Self, Mismatch> {
        if (state.start, state.length) != (region.start(), region.length()) {
            return Err(Mismatch);
        }
        let mut pmem = Self::new(region);
        pmem.counters = state.counters;
        Ok(pmem)
    }
}

impl VirtioDevice for Pmem {
    fn kind(&self) -> Kind {
        Kind::Pmem
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        [self.region.start(), self.region.length()]
            .map(u64::to_le_bytes)
            .concat()
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
            let answer = Buffers::collect(chain, memory, MAX_SEGMENTS)
                .ok()
                .and_then(|buffers| answer(&buffers));
            if answer != Some(OK) {
                counters.errors += 1;
            }
            counters.requests += 1;
            ControlFlow::Continue(answer.map_or(0, |_| size_of::<u32>() as u32))
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Pmem(PmemState {
            start: self.region.start(),
            length: self.region.length(),
            counters: self.counters,
        })
    }
}

/// Answers a request; none if it is malformed. Request and response are one descriptor each, as Linux has them.
fn answer(buffers: &Buffers<'_>) -> Option<u32> {
    let ([request], [response]) = (&*buffers.readable, &*buffers.writable) else {
        return None;
    };
    if request.len() != size_of::<u32>() || response.len() < size_of::<u32>() {
        return None;
    }
    let kind = request.read_obj::<u32>(0).ok()?;
    let answer = if u32::from_le(kind) == FLUSH {
        OK
    } else {
        FAILED
    };
    response.write_obj(answer.to_le(), 0).ok()?;
    Some(answer)
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
