//! How a device has its file descriptors watched by the event loop.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The source of an event of a device epoll set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The guest notified this queue.
    Kick(u16),
    /// The device watches a descriptor under this token.
    Device(u32),
}

/// Registers descriptors on behalf of the device in one slot.
///
/// Each attached device has its own generation, so that events of a device that was taken out are
/// told apart from those of its successor. The queue pairs of a device ([`super::device::QueuePair`]) take turns
/// at the sets that there are; all else is watched through the first.
#[derive(Debug, Clone)]
pub struct Watcher {
    sets: Arc<[Arc<Epoll>]>,
    pair: usize,
    slot: u8,
    generation: u16,
}

const KICK: u64 = 1 << 63;

impl Watcher {
    /// Creates the watcher of the device with this generation in `slot`. There is at least one set.
    #[must_use]
    pub fn new(sets: Arc<[Arc<Epoll>]>, slot: u8, generation: u16) -> Self {
        Self {
            sets,
            pair: 0,
            slot,
            generation,
        }
    }

    /// Returns the watcher of a queue pair of the device.
    #[must_use]
    pub fn for_pair(&self, pair: usize) -> Self {
        Self {
            pair,
            ..self.clone()
        }
    }

    /// Creates a watcher on an epoll set of its own, for tests.
    ///
    /// # Errors
    /// When the system has no more descriptors.
    #[cfg(any(test, fuzzing))]
    pub fn detached() -> io::Result<Self> {
        Ok(Self::new([Arc::new(Epoll::new()?)].into(), 0, 0))
    }

    /// Starts watching `fd` (level-triggered unless `events` says otherwise).
    ///
    /// # Errors
    /// `EEXIST` when it is watched already, or what epoll says.
    pub fn add(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, Source::Device(token), events)
    }

    /// Changes the token or the events of a watched `fd`.
    ///
    /// # Errors
    /// `ENOENT` when it is not watched, or what epoll says.
    pub fn modify(&self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, Source::Device(token), events)
    }

    /// Stops watching `fd`. Do this before closing it.
    ///
    /// # Errors
    /// `ENOENT` when it is not watched, or what epoll says.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.control(
            ControlOperation::Delete,
            fd,
            Source::Device(0),
            EventSet::empty(),
        )
    }

    /// Watches the notification descriptor of a queue; for the slot. Each notification is one
    /// event (edge-triggered), so nobody has to read the descriptor.
    ///
    /// # Errors
    /// What epoll says.
    pub(crate) fn add_kick(&self, fd: RawFd, queue: u16) -> io::Result<()> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.control(ControlOperation::Add, fd, Source::Kick(queue), events)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        source: Source,
        events: EventSet,
    ) -> io::Result<()> {
        let data = encode(self.slot, self.generation, source);
        let set = &self.sets[self.pair % self.sets.len()];
        set.ctl(operation, fd, EpollEvent::new(events, data))
    }
}

fn encode(slot: u8, generation: u16, source: Source) -> u64 {
    let (kick, low) = match source {
        Source::Kick(queue) => (KICK, u32::from(queue)),
        Source::Device(token) => (0, token),
    };
    kick | u64::from(generation) << 40 | u64::from(slot) << 32 | u64::from(low)
}

/// Returns the slot, the generation and the source of an event.
#[must_use]
pub fn decode(data: u64) -> (u8, u16, Source) {
    let [a, b, c, d, slot, low, high, _] = data.to_le_bytes();
    let source = if data & KICK == 0 {
        Source::Device(u32::from_le_bytes([a, b, c, d]))
    } else {
        Source::Kick(u16::from_le_bytes([a, b]))
    };
    (slot, u16::from_le_bytes([low, high]), source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_says_whose_it_is() {
        for (slot, generation, source) in [
            (0, 0, Source::Kick(0)),
            (31, 0xffff, Source::Kick(7)),
            (255, 0x1234, Source::Device(u32::MAX)),
        ] {
            assert_eq!(
                decode(encode(slot, generation, source)),
                (slot, generation, source)
            );
        }
    }
}
