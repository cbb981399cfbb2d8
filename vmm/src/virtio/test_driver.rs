//! The driver's side of a split virtqueue, and what else stands around devices, for their tests.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::HashMap;
use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{QueueRecord, VirtQueue};
use super::watch::{Source, decode};
use crate::legacy::ioapic::{Message, MessageSink};
use crate::memory::Memory;
use crate::slots::Doorbells;
use crate::virtio::device::{Progress, VirtioDevice};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A segment of memory in a chain.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Guest address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes to it.
    pub writable: bool,
}

/// Makes a segment that the device reads.
pub fn readable(address: u64, len: usize) -> Segment {
    Segment {
        address,
        len: u32::try_from(len).unwrap(),
        writable: false,
    }
}

/// Makes a segment that the device writes.
pub fn writable(address: u64, len: usize) -> Segment {
    Segment {
        address,
        len: u32::try_from(len).unwrap(),
        writable: true,
    }
}

/// Makes guest memory of `len` bytes at address 0.
pub fn memory(len: usize) -> Memory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap()
}

/// Stands for a KVM that takes messages and doorbells, and does nothing with them.
#[derive(Debug)]
pub struct Nothing;

impl MessageSink for Nothing {
    fn send(&self, _: Message) {}
}

impl Doorbells for Nothing {
    fn connect(&self, _: &EventFd, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _: &EventFd, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
}

/// Notifies a device of a queue, and gives it the turns that it asks for.
pub fn kick(device: &mut dyn VirtioDevice, queue: u16) {
    let progress = device.on_kick(queue).unwrap();
    finish(device, progress);
}

/// Has a device handle what its descriptors are ready for now; returns their tokens.
pub fn serve_ready(device: &mut dyn VirtioDevice, epoll: &Epoll) -> Vec<u32> {
    let mut events = [EpollEvent::default(); 64];
    let ready = epoll.wait(0, &mut events).unwrap();
    events[..ready]
        .iter()
        .map(|event| {
            let (_, _, Source::Device(token)) = decode(event.data()) else {
                panic!("a kick");
            };
            let progress = device.on_event(token, event.event_set()).unwrap();
            finish(device, progress);
            token
        })
        .collect()
}

fn finish(device: &mut dyn VirtioDevice, mut progress: Progress) {
    while let Progress::More(queue) = progress {
        progress = device.on_kick(queue).unwrap();
    }
}

/// A virtqueue as its driver sees it.
#[derive(Debug)]
pub struct DriverQueue {
    memory: Memory,
    base: u64,
    size: u16,
    added: u16,
    seen: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl DriverQueue {
    /// The memory that a queue takes up, in bytes.
    pub const SPAN: u64 = 0x8000;

    /// Lays out an empty queue at `base`.
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base,
            size,
            added: 0,
            seen: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    fn avail(&self) -> u64 {
        self.base + 0x4000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x6000
    }

    fn store(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn load(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Makes the device's side of it.
    pub fn device_side(&self, event_idx: bool) -> VirtQueue {
        let record = QueueRecord {
            max_size: self.size,
            size: self.size,
            ready: true,
            descriptors: self.base,
            avail: self.avail(),
            used: self.used_ring(),
            next_avail: 0,
            next_used: 0,
            event_idx,
        };
        VirtQueue::new(&record, &self.memory).unwrap()
    }

    /// Returns the head that the next chain will have.
    pub fn next_free(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Returns how many chains have been taken back, modulo 2¹⁶.
    pub fn seen(&self) -> u16 {
        self.seen
    }

    /// Adds a chain; returns its head, or none when there are too few descriptors.
    pub fn offer(&mut self, segments: &[Segment]) -> Option<u16> {
        if self.free.len() < segments.len() {
            return None;
        }
        let ids: Vec<u16> = segments.iter().map(|_| self.free.pop().unwrap()).collect();
        for (at, segment) in segments.iter().enumerate() {
            let next = ids.get(at + 1).copied();
            self.describe(self.base, ids[at], *segment, 0, next);
        }
        let head = ids[0];
        self.chains.insert(head, ids);
        self.publish(head);
        Some(head)
    }

    /// Adds a chain whose descriptors are in an indirect table at `table`.
    pub fn offer_indirect(&mut self, table: u64, segments: &[Segment]) -> Option<u16> {
        let head = self.free.pop()?;
        for (at, segment) in segments.iter().enumerate() {
            let at = u16::try_from(at).unwrap();
            let next = (usize::from(at) + 1 < segments.len()).then_some(at + 1);
            self.describe(table, at, *segment, 0, next);
        }
        let table = readable(table, segments.len() * 16);
        self.describe(self.base, head, table, INDIRECT, None);
        self.chains.insert(head, vec![head]);
        self.publish(head);
        Some(head)
    }

    /// Adds a chain that points at itself.
    pub fn offer_loop(&mut self, segment: Segment) -> Option<u16> {
        let head = self.free.pop()?;
        self.describe(self.base, head, segment, 0, Some(head));
        self.chains.insert(head, vec![head]);
        self.publish(head);
        Some(head)
    }

    fn describe(&self, table: u64, id: u16, segment: Segment, flags: u16, next: Option<u16>) {
        let at = table + 16 * u64::from(id);
        let write = if segment.writable { WRITE } else { 0 };
        let more = if next.is_some() { NEXT } else { 0 };
        self.memory
            .write_obj(segment.address, GuestAddress(at))
            .unwrap();
        self.memory
            .write_obj(segment.len, GuestAddress(at + 8))
            .unwrap();
        self.store(at + 12, flags | write | more);
        self.store(at + 14, next.unwrap_or_default());
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.added % self.size);
        self.store(self.avail() + 4 + 2 * slot, head);
        self.added = self.added.wrapping_add(1);
        self.store(self.avail() + 2, self.added);
    }

    /// Returns the address of the used ring's index.
    pub fn used_index(&self) -> u64 {
        self.used_ring() + 2
    }

    /// Takes the next chain that the device returned: its head and length.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.load(self.used_ring() + 2) == self.seen {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.seen % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        self.free
            .extend(self.chains.remove(&head).expect("a chain that was offered"));
        Some((head, len))
    }

    /// Asks for an interrupt when this many chains in all have been returned
    /// beyond (`EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.store(self.avail() + 4 + 2 * u64::from(self.size), index);
    }

    /// Tells whether the device wants to be notified of the chain added last (`EVENT_IDX`).
    pub fn wants_kick(&self) -> bool {
        let event = self.load(self.used_ring() + 4 + 8 * u64::from(self.size));
        event == self.added.wrapping_sub(1)
    }
}
