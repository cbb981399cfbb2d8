//! A driver of virtio-mmio (virtio 1.2, 4.2.2) that does what it is told, right or wrong.

use core::sync::atomic::{Ordering, fence};

use super::cpu::{self, SECOND};
use super::memory::{fill, read16, read32, write16, write32, write64};

/// The first slot's registers, and the distance of slots.
pub(crate) const SLOTS: u64 = 0xd000_0000;
pub(crate) const SLOT_SIZE: u64 = 0x1000;

pub(crate) const DEVICE_ID: u64 = 0x08;
pub(crate) const FEATURES_SELECT: u64 = 0x14;
pub(crate) const FEATURES: u64 = 0x10;
pub(crate) const DRIVER_FEATURES: u64 = 0x20;
pub(crate) const DRIVER_FEATURES_SELECT: u64 = 0x24;
pub(crate) const QUEUE_SELECT: u64 = 0x30;
pub(crate) const QUEUE_SIZE_MAX: u64 = 0x34;
pub(crate) const QUEUE_SIZE: u64 = 0x38;
pub(crate) const QUEUE_READY: u64 = 0x44;
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
pub(crate) const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
pub(crate) const STATUS: u64 = 0x70;
pub(crate) const QUEUE_TABLE: u64 = 0x80;
pub(crate) const QUEUE_AVAILABLE: u64 = 0x90;
pub(crate) const QUEUE_USED: u64 = 0xa0;
pub(crate) const CONFIG: u64 = 0x100;

pub(crate) const ACKNOWLEDGE: u32 = 1;
pub(crate) const DRIVER: u32 = 2;
pub(crate) const DRIVER_OK: u32 = 4;
pub(crate) const FEATURES_OK: u32 = 8;
pub(crate) const NEEDS_RESET: u32 = 64;

/// Feature bits: indirect descriptors, event indices, version 1.
pub(crate) const INDIRECT_FEATURE: u64 = 1 << 28;
pub(crate) const EVENT_INDEX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Flags of a descriptor.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Entries of every ring: what the smallest device has.
pub(crate) const SIZE: u16 = 16;
/// Rings are at fixed places: above the program, below the buffers.
const RINGS: u64 = 0x100_0000;
const RINGS_OF_SLOT: u64 = 0x4_0000;
const RINGS_OF_QUEUE: u64 = 0x4000;
/// The most queues of a device that are set up.
pub(crate) const QUEUES: u32 = 8;
/// How long an answer may take.
pub(crate) const PATIENCE: u64 = 20 * SECOND;

/// A device.
#[derive(Clone, Copy)]
pub(crate) struct Device {
    pub(crate) slot: u8,
}

impl Device {
    pub(crate) fn register(self, offset: u64) -> u64 {
        SLOTS + SLOT_SIZE * u64::from(self.slot) + offset
    }

    pub(crate) fn read(self, offset: u64) -> u32 {
        read32(self.register(offset))
    }

    pub(crate) fn write(self, offset: u64, value: u32) {
        write32(self.register(offset), value);
    }

    pub(crate) fn write_long(self, offset: u64, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }

    pub(crate) fn needs_reset(self) -> bool {
        self.read(STATUS) & NEEDS_RESET != 0
    }

    /// Resets it and agrees on features, up to where queues are set up.
    pub(crate) fn begin(self, features: u64) {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let features = features | VERSION_1;
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Sets a queue up, at its places.
    pub(crate) fn set_up(self, index: u32) -> Queue {
        let queue = Queue::new(self, index);
        for ring in [queue.table(), queue.available(), queue.used()] {
            fill(ring, 0, 16 * u64::from(SIZE));
        }
        self.place(index, SIZE, queue.table(), queue.available(), queue.used());
        queue
    }

    /// Sets a queue up, at any places.
    pub(crate) fn place(self, index: u32, size: u16, table: u64, available: u64, used: u64) {
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, size.into());
        self.write_long(QUEUE_TABLE, table);
        self.write_long(QUEUE_AVAILABLE, available);
        self.write_long(QUEUE_USED, used);
        self.write(QUEUE_READY, 1);
    }

    /// Sets up all queues but one, so that something may be wrong with that.
    pub(crate) fn set_up_others(self, but: u32) {
        for index in (0..QUEUES).filter(|index| *index != but) {
            self.write(QUEUE_SELECT, index);
            if self.read(QUEUE_SIZE_MAX) != 0 {
                self.set_up(index);
            }
        }
    }

    pub(crate) fn go(self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Starts it with these features, and returns one of its queues.
    pub(crate) fn start(self, features: u64, queue: u32) -> Queue {
        self.begin(features);
        self.set_up_others(queue);
        let queue = self.set_up(queue);
        self.go();
        queue
    }
}

/// A queue of a device.
#[derive(Clone, Copy)]
pub(crate) struct Queue {
    pub(crate) device: Device,
    pub(crate) index: u32,
    /// How many chains were offered, and how many came back.
    pub(crate) offered: u16,
    returned: u16,
}

impl Queue {
    /// Returns a queue that was just set up.
    pub(crate) fn new(device: Device, index: u32) -> Self {
        Self {
            device,
            index,
            offered: 0,
            returned: 0,
        }
    }

    pub(crate) fn table(&self) -> u64 {
        RINGS + RINGS_OF_SLOT * u64::from(self.device.slot) + RINGS_OF_QUEUE * u64::from(self.index)
    }

    pub(crate) fn available(&self) -> u64 {
        self.table() + 0x1000
    }

    pub(crate) fn used(&self) -> u64 {
        self.table() + 0x2000
    }

    /// Returns where the descriptor is.
    pub(crate) fn descriptor(&self, at: u16) -> u64 {
        self.table() + 16 * u64::from(at)
    }

    /// Writes a descriptor.
    pub(crate) fn describe(&self, at: u16, address: u64, length: u32, flags: u16, next: u16) {
        describe(self.descriptor(at), address, length, flags, next);
    }

    /// Writes a chain of buffers from descriptor `at` on: address, length, whether the device writes.
    pub(crate) fn chain(&self, at: u16, buffers: &[(u64, u32, bool)]) {
        let last = buffers.len().wrapping_sub(1);
        for (index, (address, length, written)) in buffers.iter().enumerate() {
            let place = at + index as u16;
            let flags = if *written { WRITE } else { 0 } | if index < last { NEXT } else { 0 };
            self.describe(place, *address, *length, flags, place + 1);
        }
    }

    /// Offers a chain, without a notification.
    pub(crate) fn offer(&mut self, head: u16) {
        let entry = u64::from(self.offered % SIZE);
        write16(self.available() + 4 + 2 * entry, head);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.publish(self.offered);
    }

    /// Writes the index of the available ring.
    pub(crate) fn publish(&self, index: u16) {
        write16(self.available() + 2, index);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn kick(&self) {
        self.device.write(QUEUE_NOTIFY, self.index);
    }

    /// Takes a chain that came back: its head and the bytes written.
    pub(crate) fn take(&mut self) -> Option<(u32, u32)> {
        fence(Ordering::SeqCst);
        if read16(self.used() + 2) == self.returned {
            return None;
        }
        let entry = self.used() + 4 + 8 * u64::from(self.returned % SIZE);
        self.returned = self.returned.wrapping_add(1);
        Some((read32(entry), read32(entry + 4)))
    }

    /// Waits for a chain to come back. None: the device needs a reset, or says nothing.
    pub(crate) fn wait(&mut self) -> Option<(u32, u32)> {
        let mut answer = None;
        cpu::wait(PATIENCE, || {
            answer = self.take();
            answer.is_some() || self.device.needs_reset()
        });
        answer
    }

    /// Offers a chain and waits for it.
    pub(crate) fn ask(&mut self, head: u16) -> Option<(u32, u32)> {
        self.offer(head);
        self.kick();
        self.wait()
    }
}

/// Writes a descriptor anywhere.
pub(crate) fn describe(place: u64, address: u64, length: u32, flags: u16, next: u16) {
    write64(place, address);
    write32(place + 8, length);
    write16(place + 12, flags);
    write16(place + 14, next);
}
