//! The virtio-mmio slots: devices come and go at run time behind fixed addresses and lines.
//!
//! A slot is empty or holds a [`Transport`]. vCPUs lock a slot for a register access; the event loop
//! locks it to attach and detach, and otherwise only to find the device, which it uses without
//! holding the slot. Lock order: slot, device, queue pair of a device, IOAPIC.
//!
//! A vCPU that resets a disk has the slot until the disk is done with what it does, and a host's file
//! system may take its time. The event loop must not wait for that, because the daemon waits for the
//! event loop: it gives up ([`SlotError::Busy`]), or tells what it knew before.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use hull_proto_vmm::{DeviceMetrics, SLOTS};
use vm_memory::mmap::MmapRegionError;
use vmm_sys_util::eventfd::EventFd;

use crate::epolls::Epolls;
use crate::layout::{SLOT_BASE, SLOT_SIZE, slot_address, slot_pin};
use crate::legacy::ioapic::{Ioapic, MessageSink};
use crate::memory::Memory;
use crate::sync::{lock, lock_briefly, try_lock};
use crate::virtio::counters::Counters;
use crate::virtio::device::{Kind, VirtioDevice};
use crate::virtio::device::{SharedQueuePair, pair_of};
use crate::virtio::mmio::{
    self, INTERRUPT_ACKNOWLEDGE, INTERRUPT_QUEUE, Line, QUEUE_NOTIFY, RestoreError, SharedDevice,
    Transport,
};
use crate::virtio::registers::Registers;
use crate::virtio::watch::Watcher;

/// Makes guest notifications reach descriptors without an exit to user space.
pub trait Doorbells {
    /// Has writes of `value` (4 bytes) to `address` signalled to `kick`.
    ///
    /// # Errors
    /// What KVM says.
    fn connect(&self, kick: &EventFd, address: u64, value: u32) -> io::Result<()>;

    /// Undoes [`Doorbells::connect`].
    ///
    /// # Errors
    /// What KVM says.
    fn disconnect(&self, kick: &EventFd, address: u64, value: u32) -> io::Result<()>;
}

/// Why a device was not attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is no slot of this number.
    #[error("slot {0} does not exist, there are {SLOTS}")]
    NoSuchSlot(u8),
    /// The slot has a device.
    #[error("slot {0} is taken")]
    Taken(u8),
    /// The slot has no device.
    #[error("slot {0} is empty")]
    Empty(u8),
    /// The slot, or its device, is in use.
    #[error("slot {0} is busy")]
    Busy(u8),
    /// The host has no more descriptors or doorbells.
    #[error("connect device in slot {slot}")]
    Connect {
        /// The slot.
        slot: u8,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was saved of the device does not fit it.
    #[error("restore device in slot {slot}")]
    Restore {
        /// The slot.
        slot: u8,
        /// Why.
        #[source]
        source: RestoreError,
    },
}

/// The wire from a slot to the IOAPIC.
#[derive(Debug)]
struct SlotLine<S> {
    ioapic: Arc<Ioapic<S>>,
    slot: u8,
}

impl<S: MessageSink> Line for SlotLine<S> {
    fn raise(&self) {
        self.ioapic.raise(slot_pin(self.slot));
    }
}

#[derive(Debug)]
struct Slot {
    line: Arc<dyn Line>,
    /// Counts the devices that were here, so that events of an old one are not taken for a new one's.
    generation: u16,
    transport: Option<Transport>,
    /// The doorbell that swallows acknowledgements of used buffers while there is a device; nobody reads
    /// it.
    acknowledgements: Option<EventFd>,
}

/// A slot, and the metrics that are read without its lock.
#[derive(Debug)]
struct SlotEntry {
    slot: Mutex<Slot>,
    /// The device's metrics as of the last time that it could be asked; none without a device. Only the
    /// event loop takes this lock.
    last_metrics: Mutex<Option<DeviceMetrics>>,
}

/// A device as the event loop uses it.
#[derive(Debug, Clone)]
pub struct Attached {
    /// The device.
    pub device: SharedDevice,
    /// Its queue pairs.
    pub pairs: Arc<[SharedQueuePair]>,
}

/// All slots of a VM.
#[derive(Debug)]
pub struct Slots {
    slots: Vec<SlotEntry>,
    registers: Registers,
    memory: Memory,
    epolls: Epolls,
}

impl Slots {
    /// Creates empty slots whose devices are watched through `epolls`.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new<S: MessageSink + 'static>(
        ioapic: &Arc<Ioapic<S>>,
        memory: Memory,
        epolls: Epolls,
    ) -> Result<Self, MmapRegionError> {
        let registers = Registers::new()?;
        let slots = (0..SLOTS)
            .map(|slot| {
                let line = Arc::new(SlotLine {
                    ioapic: Arc::clone(ioapic),
                    slot,
                });
                mmio::clear(&registers.page(slot));
                SlotEntry {
                    slot: Mutex::new(Slot {
                        line,
                        generation: 0,
                        transport: None,
                        acknowledgements: None,
                    }),
                    last_metrics: Mutex::default(),
                }
            })
            .collect();
        Ok(Self {
            slots,
            registers,
            memory,
            epolls,
        })
    }

    /// Returns what the guest reads, with the first slot first.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Puts a device behind an empty slot.
    ///
    /// # Errors
    /// [`SlotError`]; the slot stays as it was.
    pub fn attach(
        &self,
        slot: u8,
        device: Box<dyn VirtioDevice>,
        doorbells: &dyn Doorbells,
    ) -> Result<(), SlotError> {
        self.place(slot, device, None, doorbells)
    }

    /// Puts a device that was made from a saved state behind an empty slot, with its registers as they were.
    ///
    /// # Errors
    /// [`SlotError`]; the slot is of no more use.
    pub fn attach_saved(
        &self,
        slot: u8,
        device: Box<dyn VirtioDevice>,
        state: &mmio::State,
        doorbells: &dyn Doorbells,
    ) -> Result<(), SlotError> {
        self.place(slot, device, Some(state), doorbells)
    }

    fn place(
        &self,
        slot: u8,
        device: Box<dyn VirtioDevice>,
        saved: Option<&mmio::State>,
        doorbells: &dyn Doorbells,
    ) -> Result<(), SlotError> {
        let at = self.entry(slot)?;
        let mut place = lock_briefly(&at.slot).ok_or(SlotError::Busy(slot))?;
        if place.transport.is_some() {
            return Err(SlotError::Taken(slot));
        }
        place.generation = place.generation.wrapping_add(1);
        let sets = match device.kind() {
            Kind::Block => &self.epolls.disks,
            Kind::Net => &self.epolls.network,
            Kind::Rng | Kind::Vsock | Kind::Fs | Kind::Pmem | Kind::Memory | Kind::Balloon => {
                &self.epolls.others
            }
        };
        let watcher = Watcher::new(Arc::clone(sets), slot, place.generation);
        let mut kicks = Vec::new();
        let connected = (0..device.queue_sizes().len())
            .try_for_each(|queue| {
                let queue = queue as u16;
                let kick = doorbell()?;
                doorbells.connect(&kick, slot_address(slot) + QUEUE_NOTIFY, queue.into())?;
                let fd = kick.as_raw_fd();
                kicks.push(kick);
                watcher.for_pair(pair_of(queue.into())).add_kick(fd, queue)
            })
            .and_then(|()| {
                let all = doorbell()?;
                let address = slot_address(slot) + INTERRUPT_ACKNOWLEDGE;
                doorbells.connect(&all, address, INTERRUPT_QUEUE)?;
                Ok(all)
            });
        match connected {
            Ok(all) => place.acknowledgements = Some(all),
            Err(source) => {
                disconnect(slot, &kicks, None, doorbells);
                return Err(SlotError::Connect { slot, source });
            }
        }
        let line = Arc::clone(&place.line);
        let mut transport = Transport::new(
            device,
            self.memory.clone(),
            self.registers.page(slot),
            line,
            kicks,
            watcher,
        );
        if let Some(state) = saved {
            transport = transport
                .restore(state)
                .map_err(|source| SlotError::Restore { slot, source })?;
        }
        *lock(&at.last_metrics) = Some(metrics_of(slot, &transport, Counters::default()));
        place.transport = Some(transport);
        Ok(())
    }

    /// Takes the device out of a slot. Its queues are not touched any more when this returns.
    ///
    /// # Errors
    /// [`SlotError::NoSuchSlot`], [`SlotError::Empty`]; [`SlotError::Busy`]: try again.
    pub fn detach(&self, slot: u8, doorbells: &dyn Doorbells) -> Result<(), SlotError> {
        let at = self.entry(slot)?;
        let mut place = lock_briefly(&at.slot).ok_or(SlotError::Busy(slot))?;
        let mut transport = place.transport.take().ok_or(SlotError::Empty(slot))?;
        if !transport.shut_down() {
            place.transport = Some(transport);
            return Err(SlotError::Busy(slot));
        }
        *lock(&at.last_metrics) = None;
        let acknowledgements = place.acknowledgements.take();
        disconnect(
            slot,
            transport.kicks(),
            acknowledgements.as_ref(),
            doorbells,
        );
        Ok(())
    }

    /// Returns the device that an event of this generation is for.
    #[must_use]
    pub fn find(&self, slot: u8, generation: u16) -> Option<Attached> {
        let place = self.lock(slot).ok()?;
        let transport = place
            .transport
            .as_ref()
            .filter(|_| place.generation == generation)?;
        Some(Attached {
            device: Arc::clone(transport.device()),
            pairs: Arc::clone(transport.queue_pairs()),
        })
    }

    /// Resets the device that an event of this generation was for, and tells its driver that it needs a
    /// reset. A device that was detached since is left alone, and so is its successor, which has the same
    /// registers.
    pub fn fail(&self, slot: u8, generation: u16) {
        let Ok(place) = self.lock(slot) else {
            return;
        };
        let there = place.transport.as_ref();
        if let Some(transport) = there.filter(|_| place.generation == generation) {
            // A driver that has reset it meanwhile has to do so once more.
            lock(transport.device()).reset();
            transport.interrupt().needs_reset();
        }
    }

    /// Signals a queue's notification descriptor as if the guest had.
    pub fn kick(&self, slot: u8, queue: u16) {
        if let Ok(place) = self.lock(slot)
            && let Some(transport) = &place.transport
            && let Some(kick) = transport.kicks().get(usize::from(queue))
        {
            let _ = kick.write(1);
        }
    }

    /// Completes all I/O of all devices. False: a device waits for something.
    pub fn drain(&self) -> bool {
        let mut done = true;
        for place in &self.slots {
            if let Some(transport) = &lock(&place.slot).transport {
                done &= lock(transport.device()).drain();
            }
        }
        done
    }

    /// Returns what a snapshot keeps of the devices, by slot. They have been drained.
    #[must_use]
    pub fn states(&self) -> Vec<(u8, mmio::State)> {
        let state = |(slot, place): (u8, &SlotEntry)| {
            let transport = &lock(&place.slot).transport;
            Some((slot, transport.as_ref()?.state()))
        };
        (0..SLOTS).zip(&self.slots).filter_map(state).collect()
    }

    /// Returns the counters of the devices that are attached. Of one that is busy, the last ones do.
    #[must_use]
    pub fn metrics(&self) -> Vec<DeviceMetrics> {
        (0..SLOTS)
            .zip(&self.slots)
            .filter_map(|(slot, place)| {
                let mut last = lock(&place.last_metrics);
                if let Some(place) = try_lock(&place.slot)
                    && let Some(transport) = &place.transport
                    && let Some(device) = try_lock(transport.device())
                {
                    *last = Some(metrics_of(slot, transport, device.counters()));
                }
                last.clone()
            })
            .collect()
    }

    /// Handles a write to guest-physical `address`, which is inside of the slots.
    pub fn write(&self, address: u64, data: &[u8]) {
        let Some(offset) = address.checked_sub(SLOT_BASE) else {
            return;
        };
        let slot = usize::try_from(offset / SLOT_SIZE).unwrap_or(usize::MAX);
        if let Some(place) = self.slots.get(slot)
            && let Some(transport) = &mut lock(&place.slot).transport
        {
            transport.write(offset % SLOT_SIZE, data);
        }
    }

    fn lock(&self, slot: u8) -> Result<std::sync::MutexGuard<'_, Slot>, SlotError> {
        Ok(lock(&self.entry(slot)?.slot))
    }

    fn entry(&self, slot: u8) -> Result<&SlotEntry, SlotError> {
        let place = self.slots.get(usize::from(slot));
        place.ok_or(SlotError::NoSuchSlot(slot))
    }
}

fn metrics_of(slot: u8, transport: &Transport, counters: Counters) -> DeviceMetrics {
    DeviceMetrics {
        slot,
        kind: transport.kind().name().to_owned(),
        notifications: counters.notifications,
        requests: counters.requests,
        bytes_out: counters.bytes_out,
        bytes_in: counters.bytes_in,
        interrupts: transport.interrupt().raised(),
        errors: counters.errors,
    }
}

fn doorbell() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn disconnect(
    slot: u8,
    kicks: &[EventFd],
    acknowledgements: Option<&EventFd>,
    doorbells: &dyn Doorbells,
) {
    let kicks = (0..)
        .zip(kicks)
        .map(|(queue, kick)| (kick, QUEUE_NOTIFY, queue));
    let rest = acknowledgements.map(|all| (all, INTERRUPT_ACKNOWLEDGE, INTERRUPT_QUEUE));
    for (bell, register, value) in kicks.chain(rest) {
        if let Err(error) = doorbells.disconnect(bell, slot_address(slot) + register, value) {
            crate::log::note(&format!(
                "disconnect doorbell at {register:#x} of slot {slot}: {error}"
            ));
        }
    }
}

#[cfg(any(test, fuzzing))]
#[path = "slots/fuzz.rs"]
pub(crate) mod fuzz;
#[cfg(test)]
#[path = "slots/tests.rs"]
mod tests;
