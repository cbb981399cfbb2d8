//! The control queue: the driver says how many pairs of queues it uses (virtio 1.2, 5.1.6.5).

use std::ops::ControlFlow;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ,
    VIRTIO_NET_OK,
};
use vm_memory::VolatileSlice;

use crate::virtio::buffers::{Buffers, total};
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Progress};
use crate::virtio::queue::QueueRecord;

/// Commands per turn.
const BUDGET: usize = 16;
/// The most descriptors of a command. Linux uses three.
const MAX_DESCRIPTORS: usize = 8;
/// Class and command, and a number of pairs, in little endian.
const VQ_PAIRS_SET_SIZE: usize = 4;

/// The control queue of a card.
#[derive(Debug, Default)]
pub(super) struct Control {
    /// The queue, while the driver has set it up.
    active: Option<Activation>,
    /// Its position among the card's queues.
    index: u16,
    counters: Counters,
}

impl Control {
    /// Takes the control queue into use.
    pub fn activate(&mut self, activation: Activation, index: u16) {
        self.active = Some(activation);
        self.index = index;
    }

    /// Tells whether `queue` is the control queue.
    pub fn has(&self, queue: u16) -> bool {
        self.active.is_some() && self.index == queue
    }

    /// Makes the control queue idle.
    pub fn reset(&mut self) {
        self.active = None;
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Returns what a snapshot keeps of its queue; none when idle.
    pub fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref())
    }

    /// Answers commands. `use_pairs` is given the number of pairs that the driver wants to use, and
    /// tells whether it may.
    ///
    /// # Errors
    /// A broken ring.
    pub fn turn(
        &mut self,
        mut use_pairs: impl FnMut(u16) -> bool,
    ) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let counters = &mut self.counters;
        let multiqueue = active.has(VIRTIO_NET_F_MQ);
        let progress = active.serve(BUDGET, |chain, memory| {
            counters.requests += 1;
            let buffers = Buffers::collect(chain, memory, MAX_DESCRIPTORS);
            // A command without room for the answer is none.
            let answered = buffers.ok().and_then(|buffers| {
                let room = buffers.writable.iter().find(|slice| !slice.is_empty())?;
                let wanted = pairs_wanted(&buffers.readable).filter(|_| multiqueue);
                let done = wanted.is_some_and(&mut use_pairs);
                let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
                room.copy_from(&[answer as u8]);
                Some(done)
            });
            counters.errors += u64::from(answered != Some(true));
            ControlFlow::Continue(answered.map_or(0, |_| 1))
        })?;
        Ok(match progress {
            Progress::Done => Progress::Done,
            Progress::More(_) => Progress::More(self.index),
        })
    }
}

/// Reads the one command that there is (5.1.6.5.6).
fn pairs_wanted(command: &[VolatileSlice<'_>]) -> Option<u16> {
    if total(command) != VQ_PAIRS_SET_SIZE {
        return None;
    }
    let mut bytes = [0; VQ_PAIRS_SET_SIZE];
    let mut rest = &mut bytes[..];
    for slice in command {
        let (here, later) = rest.split_at_mut(rest.len().min(slice.len()));
        slice.copy_to(here);
        rest = later;
    }
    let [class, command, low, high] = bytes;
    let known = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    let is_known = (u32::from(class), u32::from(command)) == known;
    is_known.then(|| u16::from_le_bytes([low, high]))
}
