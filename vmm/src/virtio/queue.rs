//! A virtqueue as devices use it: every failure is a value, nothing is only logged.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{Memory, is_writable};

/// A descriptor chain in guest memory.
pub type Chain<'m> = DescriptorChain<&'m Memory>;

/// The guest broke a ring.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Registers that make no queue.
    #[error(
        "set up virtqueue: size {size}, descriptors {descriptors:#x}, avail {avail:#x}, used {used:#x}"
    )]
    Registers {
        /// Entries.
        size: u16,
        /// Guest address of the descriptor table.
        descriptors: u64,
        /// Guest address of the available ring.
        avail: u64,
        /// Guest address of the used ring.
        used: u64,
    },
    /// The available index ran ahead, or a ring is out of guest memory.
    #[error("read or write virtqueue ring")]
    Ring(#[source] virtio_queue::Error),
}

/// A queue's registers and positions, as saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRecord {
    /// Largest size.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// Whether the driver enabled it.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to fill.
    pub next_used: u16,
    /// Whether notifications are limited by event indices.
    pub event_idx: bool,
}

/// A split virtqueue (virtio 1.2, section 2.7).
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// The used index when the driver was last considered for an interrupt.
    signalled_used: u16,
}

impl VirtQueue {
    /// Builds a queue from registers, which are the guest's and not trusted.
    ///
    /// # Errors
    /// [`QueueError::Registers`] unless size, alignment and place in memory are right.
    pub fn new(record: &QueueRecord, memory: &Memory) -> Result<Self, QueueError> {
        let refused = || QueueError::Registers {
            size: record.size,
            descriptors: record.descriptors,
            avail: record.avail,
            used: record.used,
        };
        let state = QueueState {
            max_size: record.max_size,
            next_avail: record.next_avail,
            next_used: record.next_used,
            event_idx_enabled: record.event_idx,
            size: record.size,
            ready: record.ready,
            desc_table: record.descriptors,
            avail_ring: record.avail,
            used_ring: record.used,
        };
        let queue = Queue::try_from(state).map_err(|_| refused())?;
        // Its own checks don't know of memory that is not to be written.
        if !queue.is_valid(memory) || !is_writable(memory, GuestAddress(record.used)) {
            return Err(refused());
        }
        Ok(Self {
            queue,
            signalled_used: record.next_used,
        })
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn pop<'m>(&mut self, memory: &'m Memory) -> Result<Option<Chain<'m>>, QueueError> {
        Ok(self.queue.iter(memory).map_err(QueueError::Ring)?.next())
    }

    /// Puts the chain that was taken last back.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver, with `length` bytes written to it.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn push_used(&mut self, memory: &Memory, head: u16, length: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(memory, head, length)
            .map_err(QueueError::Ring)
    }

    /// Returns chains that the driver must see at once or not at all, each with the number of bytes
    /// written to it: it may poll the ring at any time.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn push_used_together(
        &mut self,
        memory: &Memory,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((&(last, last_length), others)) = chains.split_last() else {
            return Ok(());
        };
        let mut next = self.queue.next_used();
        for &(head, length) in others {
            if head >= self.queue.size() {
                let error = virtio_queue::Error::InvalidDescriptorIndex;
                return Err(QueueError::Ring(error));
            }
            // Flags and index, then entries of 8 bytes; all inside guest memory, see is_valid.
            let index = next.checked_rem(self.queue.size()).unwrap_or_default();
            let entry = u64::from(index).wrapping_mul(8).wrapping_add(4);
            let element = u64::from(length) << 32 | u64::from(head);
            memory
                .write_obj(
                    element.to_le(),
                    GuestAddress(self.queue.used_ring().wrapping_add(entry)),
                )
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
            next = next.wrapping_add(1);
        }
        // The index that publishes the last one publishes all.
        self.queue.set_next_used(next);
        self.push_used(memory, last, last_length)
    }

    /// Asks the driver not to notify. A hint.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn disable_notification(&mut self, memory: &Memory) -> Result<(), QueueError> {
        self.queue
            .disable_notification(memory)
            .map_err(QueueError::Ring)
    }

    /// Asks the driver to notify again. True: chains came meanwhile, look once more.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn enable_notification(&mut self, memory: &Memory) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(memory)
            .map_err(QueueError::Ring)
    }

    /// Tells whether the driver wants an interrupt for what was added since the last call.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn needs_interrupt(&mut self, memory: &Memory) -> Result<bool, QueueError> {
        let old = std::mem::replace(&mut self.signalled_used, self.queue.next_used());
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        let new = self.signalled_used;
        let beyond = new.wrapping_sub(self.used_event(memory)?);
        Ok(beyond.wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Returns how many chains were returned from `used_event` on, that one included; 0 if it is not
    /// reached yet. None: event indices were not negotiated.
    ///
    /// # Errors
    /// [`QueueError::Ring`]: the device needs a reset.
    pub fn unseen(&self, memory: &Memory) -> Result<Option<u16>, QueueError> {
        if !self.queue.event_idx_enabled() {
            return Ok(None);
        }
        let beyond = self
            .queue
            .next_used()
            .wrapping_sub(self.used_event(memory)?);
        // An event index that the used ring has not reached yet is far behind.
        Ok(Some(if beyond > self.size() { 0 } else { beyond }))
    }

    /// Returns `used_event`: the entry of the used ring that the driver wants an interrupt for.
    fn used_event(&self, memory: &Memory) -> Result<u16, QueueError> {
        // The driver writes its event index, then reads the used index; here it is the reverse.
        fence(Ordering::SeqCst);
        // After flags, index and entries of 2 bytes (virtio 1.2, 2.7.10); see is_valid.
        let offset = u64::from(self.queue.size()).wrapping_mul(2).wrapping_add(4);
        let event = memory
            .read_obj(GuestAddress(self.queue.avail_ring().wrapping_add(offset)))
            .map(u16::from_le)
            .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        Ok(event)
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Returns what a snapshot keeps of the queue.
    #[must_use]
    pub fn record(&self) -> QueueRecord {
        let state = self.queue.state();
        QueueRecord {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            avail: state.avail_ring,
            used: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
        }
    }
}

#[cfg(any(test, fuzzing))]
#[path = "queue/fuzz.rs"]
pub(crate) mod fuzz;

#[cfg(test)]
#[path = "queue/tests.rs"]
mod tests;
