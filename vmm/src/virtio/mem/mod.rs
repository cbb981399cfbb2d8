//! virtio-mem (virtio 1.2, section 5.15): memory that the guest plugs and unplugs, as much as is requested.
//!
//! The device keeps which blocks are plugged, and answers requests; what is requested is
//! [`Pluggable::requested`]. A block is a huge page, which is also the least that Linux adds or removes.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use hull_proto_vmm::PLUG_STEP_MIB;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use super::buffers::Buffers;
use super::queue::QueueRecord;
use crate::log;
use crate::pluggable::Pluggable;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::state::{DeviceState, MemoryState};

const QUEUE_SIZE: u16 = 64;
/// Requests handled before others have their turn.
const BUDGET: usize = 16;
/// A request and its response, as Linux has them.
const MAX_SEGMENTS: usize = 2;
/// Bytes of a block.
const BLOCK: u64 = PLUG_STEP_MIB << 20;
/// The device's own descriptor.
const CHANGED: u32 = 0;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver is not to touch what is not plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// Bytes of `struct virtio_mem_req` and `struct virtio_mem_resp`.
const REQUEST: usize = 24;
const RESPONSE: usize = 10;

/// A device.
#[derive(Debug)]
pub struct Mem {
    memory: Arc<Pluggable>,
    blocks: Blocks,
    counters: Counters,
    active: Option<Activation>,
}

/// Which blocks the guest has.
#[derive(Debug)]
struct Blocks {
    memory: Arc<Pluggable>,
    plugged: Vec<bool>,
    /// How many of them are.
    count: u64,
    /// How much the guest is to have, in bytes, as it can read.
    requested: u64,
}

/// Pluggable memory that has a device already.
#[derive(Debug, thiserror::Error)]
#[error("the VM has no pluggable memory, or a device for it")]
pub struct Taken;

/// Why there is no device as it was saved.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is no memory for it.
    #[error(transparent)]
    Taken(#[from] Taken),
    /// The memory is another one than the saved state's.
    #[error("pluggable memory does not match its saved state")]
    Mismatch,
}

/// Returns which parts of the memory these blocks are, in bytes from its start.
#[must_use]
pub fn parts(plugged: &[bool]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut start = 0_u64;
    for run in plugged.chunk_by(PartialEq::eq) {
        let end = start.saturating_add((run.len() as u64).saturating_mul(BLOCK));
        if run.first() == Some(&true) {
            parts.push(start..end);
        }
        start = end;
    }
    parts
}

impl Mem {
    /// Creates an idle device with nothing plugged.
    ///
    /// # Errors
    /// [`Taken`]
    pub fn new(memory: &Arc<Pluggable>) -> Result<Self, Taken> {
        if !memory.take() {
            return Err(Taken);
        }
        Ok(Self::of(memory))
    }

    /// Creates an idle device from what was saved, with the memory of that.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn restore(state: &MemoryState, memory: &Arc<Pluggable>) -> Result<Self, RestoreError> {
        if !memory.take() {
            return Err(Taken.into());
        }
        memory.take_over(state.bounds);
        let mut device = Self::of(memory);
        let blocks = &mut device.blocks;
        if state.plugged.len() != blocks.plugged.len()
            || state.requested > memory.length()
            || !state.requested.is_multiple_of(BLOCK)
        {
            return Err(RestoreError::Mismatch);
        }
        blocks.plugged.clone_from(&state.plugged);
        blocks.count = state.plugged.iter().filter(|plugged| **plugged).count() as u64;
        blocks.requested = state.requested;
        memory.note(blocks.bytes());
        device.counters = state.counters;
        Ok(device)
    }

    /// A device with nothing plugged.
    fn of(memory: &Arc<Pluggable>) -> Self {
        let count = memory.length().checked_div(BLOCK).unwrap_or_default();
        let blocks = Blocks {
            memory: Arc::clone(memory),
            plugged: vec![false; usize::try_from(count).unwrap_or_default()],
            count: 0,
            requested: memory.requested(),
        };
        Self {
            memory: Arc::clone(memory),
            blocks,
            counters: Counters::default(),
            active: None,
        }
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> Kind {
        Kind::Memory
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn config(&self) -> Vec<u8> {
        self.blocks.config()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let watcher = activation.watcher.clone();
        watcher
            .add(self.memory.changed(), CHANGED, EventSet::IN)
            .map_err(DeviceError::Watch)?;
        self.active = Some(activation);
        Ok(())
    }

    /// What is plugged stays plugged: a driver that starts over unplugs it, or knows of it.
    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            let _ = active.watcher.remove(self.memory.changed());
        }
    }

    fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref())
    }

    fn on_kick(&mut self, _queue: u16) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let (counters, blocks) = (&mut self.counters, &mut self.blocks);
        counters.notifications = counters.notifications.wrapping_add(1);
        let interrupt = Arc::clone(&active.interrupt);
        active.serve(BUDGET, |chain, memory| {
            let before = blocks.count;
            let answer = Buffers::collect(chain, memory, MAX_SEGMENTS)
                .ok()
                .and_then(|buffers| answer(&buffers, blocks));
            // Before the answer is seen.
            if blocks.count != before {
                interrupt.show_config(&blocks.config());
            }
            counters.requests = counters.requests.wrapping_add(1);
            if !matches!(answer, Some(ACK)) {
                counters.errors = counters.errors.wrapping_add(1);
            }
            ControlFlow::Continue(answer.map_or(0, |_| RESPONSE as u32))
        })
    }

    fn on_event(&mut self, _token: u32, _ready: EventSet) -> Result<Progress, DeviceError> {
        if let Some(active) = &self.active {
            let requested = self.memory.requested();
            if requested != self.blocks.requested {
                self.blocks.requested = requested;
                active.interrupt.signal_config(&self.blocks.config());
            }
        }
        Ok(Progress::Done)
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Memory(MemoryState {
            plugged: self.blocks.plugged.clone(),
            requested: self.blocks.requested,
            bounds: self.memory.bounds(),
            counters: self.counters,
        })
    }
}

impl Blocks {
    /// Returns `struct virtio_mem_config`.
    fn config(&self) -> Vec<u8> {
        let (start, length) = (self.memory.start(), self.memory.length());
        // Block size, memory node, address, size, usable size, plugged size, requested size.
        let fields = [
            BLOCK,
            0,
            start,
            length,
            length,
            self.bytes(),
            self.requested,
        ];
        fields.map(u64::to_le_bytes).concat()
    }

    fn bytes(&self) -> u64 {
        self.count.saturating_mul(BLOCK)
    }

    /// Returns which blocks a request means; none if there are no such blocks.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.memory.start())?;
        if count == 0 || !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let first = usize::try_from(offset.checked_div(BLOCK)?).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    /// Returns whether all of these blocks are plugged, or none; none: some are.
    fn are(&self, range: &Range<usize>) -> Option<bool> {
        let blocks = self.plugged.get(range.clone())?;
        let first = *blocks.first()?;
        blocks.iter().all(|block| *block == first).then_some(first)
    }

    fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in self.plugged.get_mut(range).into_iter().flatten() {
            if *block != plugged {
                *block = plugged;
                self.count = if plugged {
                    self.count.saturating_add(1)
                } else {
                    self.count.saturating_sub(1)
                };
            }
        }
        self.memory.note(self.bytes());
    }

    fn plug(&mut self, address: u64, count: u16) -> u16 {
        let Some(range) = self.range(address, count) else {
            return ERROR;
        };
        if self.are(&range) != Some(false) {
            return ERROR;
        }
        let more = u64::from(count).saturating_mul(BLOCK);
        if self.bytes().saturating_add(more) > self.requested {
            return NACK;
        }
        self.set(range, true);
        ACK
    }

    fn unplug(&mut self, address: u64, count: u16) -> u16 {
        let Some(range) = self.range(address, count) else {
            return ERROR;
        };
        if self.are(&range) != Some(true) {
            return ERROR;
        }
        self.take_back(range)
    }

    fn take_back(&mut self, range: Range<usize>) -> u16 {
        let offset = (range.start as u64).saturating_mul(BLOCK);
        let length = (range.len() as u64).saturating_mul(BLOCK);
        if let Err(error) = self.memory.give_back(offset, length) {
            log::note(&format!("give memory back to the host: {error}"));
            return BUSY;
        }
        self.set(range, false);
        ACK
    }

    /// Returns the answer to a question for the state of blocks, and the state.
    fn state(&self, address: u64, count: u16) -> (u16, u16) {
        let Some(range) = self.range(address, count) else {
            return (ERROR, 0);
        };
        match self.are(&range) {
            Some(true) => (ACK, PLUGGED),
            Some(false) => (ACK, UNPLUGGED),
            None => (ACK, MIXED),
        }
    }
}

/// Answers a request; returns how, or none if it is malformed.
fn answer(buffers: &Buffers<'_>, blocks: &mut Blocks) -> Option<u16> {
    let ([request], [response]) = (&*buffers.readable, &*buffers.writable) else {
        return None;
    };
    if request.len() < REQUEST || response.len() < RESPONSE {
        return None;
    }
    // Type, padding, address, number of blocks, padding. Read once: the guest may change it.
    let [kind, address, count] = request.read_obj::<[u64; 3]>(0).ok()?.map(u64::from_le);
    let (kind, count) = (kind as u16, count as u16);
    let (answer, state) = match kind {
        PLUG => (blocks.plug(address, count), 0),
        UNPLUG => (blocks.unplug(address, count), 0),
        UNPLUG_ALL => (blocks.take_back(0..blocks.plugged.len()), 0),
        STATE => blocks.state(address, count),
        _ => (ERROR, 0),
    };
    let words = [answer, 0, 0, 0, state].map(u16::to_le);
    response.write_obj(words, 0).ok()?;
    Some(answer)
}

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
