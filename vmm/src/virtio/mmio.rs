//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2), of one attached device.
//!
//! vCPU threads come here with writes of registers. The registers belong to them; the device is behind
//! its own mutex, taken for activation and reset only. The guest reads registers as memory, a [`Page`],
//! where each write leaves what can be read from then on, so that no read is an exit.
//!
//! ```text
//! 0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK     queue registers are frozen from here
//! ▲                                                │         until the reset
//! └────────────────── write 0 ◀────────────────────┘         (NEEDS_RESET: the device gave up)
//! ```
//! A bit is only ever added, in this order; what does not fit is ignored.
//!
//! An interrupt costs the guest a read of `InterruptStatus`, which is no exit, and a write of
//! `InterruptACK`, which KVM swallows unless a change of the configuration is acknowledged. So the
//! bit for used buffers stays once it was set (the specification has the write clear it): drivers look
//! at all rings at each interrupt, and every interrupt is one of its own, because lines are
//! edge-triggered.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use error_reporter::Report;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::queue::{QueueRecord, VirtQueue};
use super::registers::Page;
use super::watch::Watcher;
use crate::layout::SLOT_SIZE;
use crate::log;
use crate::memory::Memory;
use crate::sync::{lock, lock_briefly};
use crate::virtio::device::DeviceError;
use crate::virtio::device::{Activation, Kind, SharedQueuePair, VirtioDevice};
use crate::virtio::state::DeviceState;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "HULL"
const VENDOR: u32 = 0x4c4c_5548;

const REGISTER_MAGIC: u64 = 0x00;
const REGISTER_VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
/// Where the driver notifies; ioeventfds sit here.
pub const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
/// Where the driver acknowledges interrupts.
pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x80;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x84;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DRIVER_HIGH: u64 = 0x94;
const QUEUE_DEVICE_LOW: u64 = 0xa0;
const QUEUE_DEVICE_HIGH: u64 = 0xa4;
/// Length and base of a shared memory region, two registers each.
const SHARED_MEMORY: [u64; 4] = [0xb0, 0xb4, 0xb8, 0xbc];
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// Used buffers. To acknowledge this alone means nothing.
pub const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// What every device offers.
const TRANSPORT_FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device that the event loop and the vCPUs share.
pub type SharedDevice = Arc<Mutex<Box<dyn VirtioDevice>>>;

/// A slot's interrupt line.
pub trait Line: std::fmt::Debug + Send + Sync {
    /// Signals an interrupt.
    fn raise(&self);
}

/// The part of the registers that a device changes.
#[derive(Debug)]
pub struct MmioInterrupt {
    page: Page,
    needs_reset: AtomicBool,
    raised: AtomicU64,
    line: Arc<dyn Line>,
}

impl MmioInterrupt {
    fn new(page: Page, line: Arc<dyn Line>) -> Self {
        Self {
            page,
            needs_reset: AtomicBool::new(false),
            raised: AtomicU64::new(0),
            line,
        }
    }

    fn signal(&self, bit: u32) {
        // The status comes first: a handler that is running must either see it or run again.
        self.page.update(INTERRUPT_STATUS, |status| status | bit);
        self.raised.fetch_add(1, Ordering::Relaxed);
        self.line.raise();
    }

    /// Takes the acknowledgement of a change of the configuration. A change that follows is seen, too:
    /// a driver reads the configuration after it acknowledged.
    fn acknowledge(&self, value: u32) {
        self.page
            .update(INTERRUPT_STATUS, |old| old & !(value & INTERRUPT_CONFIG));
    }

    /// Tells the driver that the device is of no use until it is reset.
    pub fn needs_reset(&self) {
        // In this order, see [`Transport::publish`].
        self.needs_reset.store(true, Ordering::SeqCst);
        self.page.update(STATUS, |status| status | NEEDS_RESET);
        self.signal(INTERRUPT_CONFIG);
    }

    /// Returns how often an interrupt was raised.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_queue(&self) {
        self.signal(INTERRUPT_QUEUE);
    }

    fn signal_config(&self, config: &[u8]) {
        self.show_config(config);
        self.signal(INTERRUPT_CONFIG);
    }

    fn show_config(&self, config: &[u8]) {
        self.page.fill(CONFIG, config);
        self.page
            .update(CONFIG_GENERATION, |old| old.wrapping_add(1));
    }
}

/// The registers, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Device status.
    pub status: u32,
    /// Whether the device gave up.
    pub needs_reset: bool,
    /// Interrupts that the driver may not have seen.
    pub interrupt: u32,
    /// Configuration generation.
    pub generation: u32,
    /// Selected half of the device's features.
    pub device_features_select: u32,
    /// Selected half of the driver's features.
    pub driver_features_select: u32,
    /// Features that the driver wrote.
    pub driver_features: u64,
    /// Selected queue.
    pub queue_select: u32,
    /// The queues.
    pub queues: Vec<QueueRecord>,
    /// The device.
    pub device: DeviceState,
}

/// Why a device does not come back from a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is of another device.
    #[error("saved state has {saved} queues, the device {actual}")]
    Queues {
        /// In the state.
        saved: usize,
        /// Of the device.
        actual: usize,
    },
    /// The state has features that the device does not offer.
    #[error("saved state has features {0:#x} that the device does not offer")]
    Features(u64),
    /// The state's status has bits that exclude each other.
    #[error("saved device status {0:#x} is impossible")]
    Status(u32),
    /// The device does not start.
    #[error("activate restored device")]
    Activate(#[source] DeviceError),
}

/// A device and its registers.
#[derive(Debug)]
pub struct Transport {
    device: SharedDevice,
    pairs: Arc<[SharedQueuePair]>,
    kind: Kind,
    features: u64,
    interrupt: Arc<MmioInterrupt>,
    page: Page,
    kicks: Vec<EventFd>,
    memory: Memory,
    watcher: Watcher,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRecord>,
}

impl Transport {
    /// Puts registers in front of a device that is idle. `page` is that of an empty slot, `kicks` has
    /// one descriptor per queue.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        page: Page,
        line: Arc<dyn Line>,
        kicks: Vec<EventFd>,
        watcher: Watcher,
    ) -> Self {
        let queues = fresh_queues(device.queue_sizes());
        page.fill(CONFIG, &device.config());
        page.set(VENDOR_ID, VENDOR);
        // There is no shared memory region.
        for offset in SHARED_MEMORY {
            page.set(offset, u32::MAX);
        }
        let new = Self {
            kind: device.kind(),
            features: device.features() | TRANSPORT_FEATURES,
            pairs: device.queue_pairs().into(),
            device: Arc::new(Mutex::new(device)),
            interrupt: Arc::new(MmioInterrupt::new(page.clone(), line)),
            page,
            kicks,
            memory,
            watcher,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
        };
        new.publish();
        new.page.set(DEVICE_ID, new.kind.id());
        new
    }

    /// Puts saved registers in front of a device that was made from the same saved state.
    ///
    /// # Errors
    /// [`RestoreError`] when the state can't have come from this device.
    pub fn restore(mut self, state: &State) -> Result<Self, RestoreError> {
        if state.queues.len() != self.queues.len() {
            return Err(RestoreError::Queues {
                saved: state.queues.len(),
                actual: self.queues.len(),
            });
        }
        let accepted = state.status & FEATURES_OK != 0;
        let unknown = state.driver_features & !self.features;
        if accepted && unknown != 0 {
            return Err(RestoreError::Features(unknown));
        }
        if state.status & DRIVER_OK != 0 && !accepted {
            return Err(RestoreError::Status(state.status));
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            *queue = QueueRecord {
                max_size: queue.max_size,
                ..*saved
            };
        }
        self.page.set(CONFIG_GENERATION, state.generation);
        self.interrupt
            .needs_reset
            .store(state.needs_reset, Ordering::SeqCst);
        if self.status & DRIVER_OK != 0 && !state.needs_reset {
            self.activate().map_err(RestoreError::Activate)?;
            // Notifications that the old process had not handled yet are not known here.
            for kick in &self.kicks {
                let _ = kick.write(1);
            }
        }
        if state.interrupt != 0 {
            self.interrupt.signal(state.interrupt);
        }
        self.publish();
        Ok(self)
    }

    /// Returns what is to be saved. The device has been drained.
    #[must_use]
    pub fn state(&self) -> State {
        let device = lock(&self.device);
        let mut queues = self.queues.clone();
        for (queue, now) in queues.iter_mut().zip(device.queues()) {
            *queue = now;
        }
        State {
            status: self.status,
            needs_reset: self.interrupt.needs_reset.load(Ordering::SeqCst),
            interrupt: self.page.get(INTERRUPT_STATUS),
            generation: self.page.get(CONFIG_GENERATION),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues,
            device: device.state(),
        }
    }

    /// Returns the device.
    #[must_use]
    pub fn device(&self) -> &SharedDevice {
        &self.device
    }

    /// Returns the queue pairs of the device.
    #[must_use]
    pub fn queue_pairs(&self) -> &Arc<[SharedQueuePair]> {
        &self.pairs
    }

    /// Returns what kind of device this is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the device's interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &Arc<MmioInterrupt> {
        &self.interrupt
    }

    /// Returns the notification descriptors, by queue.
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Makes the device idle and the slot empty, before the device is taken out. False: the device is
    /// busy, and nothing was done.
    #[must_use]
    pub fn shut_down(&mut self) -> bool {
        let device = Arc::clone(&self.device);
        let Some(mut device) = lock_briefly(&device) else {
            return false;
        };
        self.reset_with(&mut **device);
        clear(&self.page);
        true
    }

    /// Handles a write at `offset` from the start of the slot.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let (true, Ok(value)) = (offset.is_multiple_of(4), data.try_into()) {
            self.write_register(offset, u32::from_le_bytes(value));
            self.publish();
        }
    }

    /// Makes readable what depends on what the driver wrote.
    fn publish(&self) {
        let features = match self.device_features_select {
            0 => self.features as u32,
            1 => (self.features >> 32) as u32,
            _ => 0,
        };
        let queue = self.queues.get(self.queue_select as usize);
        let (max_size, ready) = queue.map_or((0, false), |queue| (queue.max_size, queue.ready));
        self.page.set(DEVICE_FEATURES, features);
        self.page.set(QUEUE_SIZE_MAX, max_size.into());
        self.page.set(QUEUE_READY, ready.into());
        self.page.set(STATUS, self.status);
        // A device that gives up meanwhile has set the flag before it sets the bit.
        if self.interrupt.needs_reset.load(Ordering::SeqCst) {
            self.page.update(STATUS, |status| status | NEEDS_RESET);
        }
    }

    fn read_status(&self) -> u32 {
        let needs_reset = self.interrupt.needs_reset.load(Ordering::SeqCst);
        self.status | if needs_reset { NEEDS_RESET } else { 0 }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SELECT => self.device_features_select = value,
            DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            DRIVER_FEATURES => self.write_features(value),
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_NOTIFY => self.notify(value),
            INTERRUPT_ACKNOWLEDGE => self.interrupt.acknowledge(value),
            STATUS => self.write_status(value),
            QUEUE_READY => self.write_ready(value),
            QUEUE_SIZE..=QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return;
        }
        let features = self.driver_features;
        self.driver_features = match self.driver_features_select {
            0 => features & !0xffff_ffff | u64::from(value),
            1 => features & 0xffff_ffff | u64::from(value) << 32,
            // A bit that the device can't have offered.
            _ => features,
        };
    }

    /// Tells whether the queues may be set up: features are agreed on, the device isn't live.
    fn queues_open(&self) -> bool {
        self.read_status() & (FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED) == FEATURES_OK
    }

    fn write_ready(&mut self, value: u32) {
        if !self.queues_open() {
            return;
        }
        if let Some(queue) = self.queues.get_mut(self.queue_select as usize) {
            queue.ready = value & 1 == 1;
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        if !self.queues_open() {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        if queue.ready {
            return;
        }
        let low = |register: &mut u64| *register = *register & !0xffff_ffff | u64::from(value);
        let high =
            |register: &mut u64| *register = *register & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            // A size that is none makes the queue invalid, which shows at DRIVER_OK.
            QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            QUEUE_DESCRIPTORS_LOW => low(&mut queue.descriptors),
            QUEUE_DESCRIPTORS_HIGH => high(&mut queue.descriptors),
            QUEUE_DRIVER_LOW => low(&mut queue.avail),
            QUEUE_DRIVER_HIGH => high(&mut queue.avail),
            QUEUE_DEVICE_LOW => low(&mut queue.used),
            QUEUE_DEVICE_HIGH => high(&mut queue.used),
            _ => {}
        }
    }

    /// Notifications come here only if KVM did not take them.
    fn notify(&self, queue: u32) {
        if let Some(kick) = self.kicks.get(queue as usize) {
            let _ = kick.write(1);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let value = value & !NEEDS_RESET;
        if self.status & !value != 0 {
            log::note(&format!(
                "driver clears status bits: {:#x} to {value:#x}",
                self.status
            ));
            return;
        }
        for (bit, after) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, DRIVER),
            (DRIVER_OK, FEATURES_OK),
        ] {
            if value & !self.status & bit == 0 || self.status & FAILED != 0 {
                continue;
            }
            if self.status & after != after {
                log::note(&format!(
                    "driver skips a step: status {:#x} to {value:#x}",
                    self.status
                ));
                return;
            }
            match bit {
                // The driver reads the bit again to find out.
                FEATURES_OK if !self.features_acceptable() => {}
                DRIVER_OK => {
                    self.status |= DRIVER_OK;
                    if let Err(error) = self.activate() {
                        log::note(&format!(
                            "{} device: {}",
                            self.kind.name(),
                            Report::new(&error)
                        ));
                        self.interrupt.needs_reset();
                    }
                }
                _ => self.status |= bit,
            }
        }
        self.status |= value & FAILED;
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.features == 0 && self.driver_features & VERSION_1 != 0
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        let mut device = lock(&self.device);
        let count = device.queues_for(self.driver_features);
        let mut queues = Vec::with_capacity(count);
        for queue in self.queues.iter_mut().take(count) {
            queue.event_idx = self.driver_features & EVENT_IDX != 0;
            queues.push(VirtQueue::new(queue, &self.memory)?);
        }
        device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.driver_features,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            watcher: self.watcher.clone(),
        })
    }

    fn reset(&mut self) {
        let device = Arc::clone(&self.device);
        let mut device = lock(&device);
        self.reset_with(&mut **device);
    }

    fn reset_with(&mut self, device: &mut dyn VirtioDevice) {
        device.reset();
        self.queues = fresh_queues(device.queue_sizes());
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.interrupt.needs_reset.store(false, Ordering::SeqCst);
        self.page.set(INTERRUPT_STATUS, 0);
    }
}

fn fresh_queues(sizes: &[u16]) -> Vec<QueueRecord> {
    sizes
        .iter()
        .map(|size| QueueRecord {
            max_size: *size,
            size: *size,
            ..Default::default()
        })
        .collect()
}

/// Makes the registers those of a slot without a device. Drivers go away quietly when the device id is
/// 0 (virtio 1.2, section 4.2.2.2).
pub fn clear(page: &Page) {
    page.set(REGISTER_MAGIC, MAGIC);
    page.set(REGISTER_VERSION, VERSION);
    page.fill(DEVICE_ID, &[0; (SLOT_SIZE - DEVICE_ID) as usize]);
}

#[cfg(any(test, fuzzing))]
#[path = "mmio/fuzz.rs"]
pub(crate) mod fuzz;
#[cfg(test)]
#[path = "mmio/tests.rs"]
mod tests;
