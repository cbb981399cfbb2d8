//! What a virtio device is to the rest of the VMM.
//!
//! A device sits in a slot, behind that slot's mutex, so one thread is in it at a time:
//!
//! - The event loop calls [`VirtioDevice::on_kick`] when the guest notified a queue,
//!   [`VirtioDevice::on_event`] when a file descriptor that the device watches is ready, and
//!   [`VirtioDevice::drain`]. All I/O is done there and none of it blocks. (Disks, which block, are
//!   called by a thread of their own: [`crate::service`].)
//! - A vCPU that writes a transport register calls [`VirtioDevice::activate`] (`DRIVER_OK`),
//!   [`VirtioDevice::reset`] (status 0). These do no I/O.
//!
//! A device of several queues may consist of [`QueuePair`]s, each with a mutex of its own, which threads of
//! their own serve without the device's. The device locks them for all else that it does.
//!
//! ```text
//!            activate (DRIVER_OK)
//!   idle ──────────────────────────▶ active ── on_kick / on_event …
//!     ▲                                │
//!     └── reset (status 0, detach, or a DeviceError: the guest sees NEEDS_RESET)
//! ```
//!
//! Everything that a device must remember over a snapshot is in its [`DeviceState`] and its queues;
//! host resources (fds) are given to its constructor again on restore.

use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use vmm_sys_util::epoll::EventSet;

use super::interrupt::Interrupt;
use super::queue::{Chain, QueueError, QueueRecord, VirtQueue};
use super::watch::Watcher;
use crate::memory::Memory;
use crate::virtio::counters::Counters;
use crate::virtio::state::DeviceState;

/// Kinds of virtio device (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Network card.
    Net,
    /// Block device.
    Block,
    /// Entropy source.
    Rng,
    /// Socket device.
    Vsock,
    /// File system.
    Fs,
    /// Persistent memory.
    Pmem,
    /// Memory that comes and goes.
    Memory,
    /// Free pages.
    Balloon,
}

impl Kind {
    /// Returns the virtio device id.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Memory => 24,
            Self::Fs => 26,
            Self::Pmem => 27,
        }
    }

    /// Returns the name used in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Rng => "rng",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Pmem => "pmem",
            Self::Memory => "memory",
            Self::Balloon => "balloon",
        }
    }
}

/// The parts of a device that exist from `DRIVER_OK` to the reset.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The queues, in order; all are ready and their registers are frozen.
    pub queues: Vec<VirtQueue>,
    /// The features that the driver accepted (a subset of those offered).
    pub features: u64,
    /// Raises the device's interrupts.
    pub interrupt: Arc<dyn Interrupt>,
    /// Where the device registers its file descriptors.
    pub watcher: Watcher,
}

impl Activation {
    /// Returns what a snapshot keeps of the queues of what may be active.
    #[must_use]
    pub fn records(active: Option<&Self>) -> Vec<QueueRecord> {
        let queues = active.into_iter().flat_map(|active| &active.queues);
        queues.map(VirtQueue::record).collect()
    }

    /// Tells whether the driver accepted the feature with this bit number.
    #[must_use]
    pub fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// Interrupts the guest for `queue` if it wants to know of what was added to the used ring.
    ///
    /// # Errors
    /// [`QueueError`] when the ring is out of guest memory.
    pub fn notify(&mut self, queue: usize) -> Result<(), QueueError> {
        if let Some(ring) = self.queues.get_mut(queue)
            && ring.needs_interrupt(&self.memory)?
        {
            self.interrupt.signal_queue();
        }
        Ok(())
    }

    /// Takes a turn of a device with one queue: gives it chains until there are none, `budget` are
    /// served, or it breaks. It returns the number of bytes that it wrote to a chain.
    ///
    /// # Errors
    /// [`DeviceError`] when the device has another number of queues, or the ring is broken.
    pub fn serve(
        &mut self,
        budget: usize,
        handle: impl for<'m> FnMut(Chain<'m>, &'m Memory) -> ControlFlow<u32, u32>,
    ) -> Result<Progress, DeviceError> {
        if self.queues.len() != 1 {
            return Err(DeviceError::Broken("device has one queue"));
        }
        self.serve_queue(0, budget, handle)
    }

    /// As [`Activation::serve`], with one queue of several; nothing is to be done with one that is not there.
    ///
    /// # Errors
    /// [`DeviceError`] when the ring is broken.
    pub fn serve_queue(
        &mut self,
        number: u16,
        budget: usize,
        mut handle: impl for<'m> FnMut(Chain<'m>, &'m Memory) -> ControlFlow<u32, u32>,
    ) -> Result<Progress, DeviceError> {
        let Some(queue) = self.queues.get_mut(usize::from(number)) else {
            return Ok(Progress::Done);
        };
        let mut progress = Progress::More(number);
        let mut served = 0;
        while served < budget {
            let Some(chain) = queue.pop(&self.memory)? else {
                if queue.enable_notification(&self.memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            served += 1;
            let head = chain.head_index();
            let flow = handle(chain, &self.memory);
            let (ControlFlow::Continue(written) | ControlFlow::Break(written)) = flow;
            queue.push_used(&self.memory, head, written)?;
            if flow.is_break() {
                break;
            }
        }
        if served > 0 {
            self.notify(number.into())?;
        }
        Ok(progress)
    }
}

/// Whether a device did all the work it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left to do.
    Done,
    /// The device used up its share of the event loop; the loop calls
    /// [`VirtioDevice::on_kick`] for this queue again after the others had their turn.
    More(u16),
}

/// The guest broke the device: it needs a reset. Malformed requests that the device can answer
/// with an error are not of this kind.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A ring is not what it should be.
    #[error("use virtqueue")]
    Queue(#[from] QueueError),
    /// The device could not watch its file descriptors.
    #[error("watch device file descriptor")]
    Watch(#[source] std::io::Error),
    /// Any other reason, in words.
    #[error("{0}")]
    Broken(&'static str),
}

/// A queue pair, for its device and the slot.
pub type SharedQueuePair = Arc<Mutex<dyn QueuePair>>;

/// A part of a device that is served on its own: queues 2*i* and 2*i* + 1, and the descriptors that
/// are watched with these tokens, for pair *i*. [`VirtioDevice`] says what the methods do. Its lock comes
/// after the device's.
pub trait QueuePair: Debug + Send {
    /// Tells whether it has its queues. If not, its events are the device's.
    fn is_active(&self) -> bool;

    /// See [`VirtioDevice::on_kick`].
    ///
    /// # Errors
    /// A [`DeviceError`]: the loop resets the whole device and tells the guest.
    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError>;

    /// See [`VirtioDevice::on_event`].
    ///
    /// # Errors
    /// As for [`QueuePair::on_kick`].
    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError>;
}

/// Returns the queue pair that a queue or a token belongs to, if the device has so many.
#[must_use]
pub fn pair_of(number: u32) -> usize {
    (number / 2) as usize
}

/// A virtio device.
pub trait VirtioDevice: Debug + Send {
    /// Returns what kind of device this is.
    fn kind(&self) -> Kind;

    /// Returns the largest size of each queue: powers of two. Their number is fixed.
    fn queue_sizes(&self) -> &[u16];

    /// Returns how many of the queues, from the first on, a driver has to set up that accepted these
    /// features.
    fn queues_for(&self, features: u64) -> usize {
        let _ = features;
        self.queue_sizes().len()
    }

    /// Returns the parts that are served without the device's lock: always the same.
    fn queue_pairs(&self) -> Vec<SharedQueuePair> {
        Vec::new()
    }

    /// Returns the features of the device's own kind that it offers. The transport adds
    /// `VERSION_1`, `INDIRECT_DESC` and `EVENT_IDX`.
    fn features(&self) -> u64;

    /// Returns the device configuration, which no driver can write. What is beyond its end reads as
    /// zero. It changes with [`Interrupt::signal_config`] and [`Interrupt::show_config`] only.
    fn config(&self) -> Vec<u8>;

    /// Takes the device into use. Called on an idle device only; the queues are valid.
    ///
    /// # Errors
    /// A [`DeviceError`] leaves the device idle and the guest sees `NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Makes the device idle: forgets the driver's features, stops watching, drops the
    /// [`Activation`]. After it returns the device touches no guest memory. Works in any state.
    fn reset(&mut self);

    /// Returns what a snapshot keeps of the queues that it was activated with; none when idle.
    fn queues(&self) -> Vec<QueueRecord>;

    /// Handles a notification of `queue`. May be called when there is nothing in it, or when idle.
    ///
    /// # Errors
    /// A [`DeviceError`]: the loop resets the device and tells the guest.
    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError>;

    /// Handles readiness of a descriptor that was watched with `token`. A late event for a
    /// descriptor that is no longer watched must do no harm.
    ///
    /// # Errors
    /// As for [`VirtioDevice::on_kick`].
    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        let _ = (token, ready);
        Ok(Progress::Done)
    }

    /// Completes everything that is in flight, so that guest memory, the host's files and
    /// [`VirtioDevice::state`] agree. Neither `on_kick` nor `on_event` follow until the VM resumes. False:
    /// something is in flight all the same, which a snapshot would lose.
    fn drain(&mut self) -> bool {
        true
    }

    /// Returns the counters.
    fn counters(&self) -> Counters;

    /// Returns the state to save; the device has been drained.
    fn state(&self) -> DeviceState;
}
