//! The device: queues and configuration space.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::frame::{
    Delivery, Frame, MAX_DESCRIPTORS, MAX_FRAME, MIN_FRAME, ReadError, Reading, Room, Wishes,
};
use super::header::{HEADER_SIZE, Header};
use super::state::State;
use super::tap::{Port, Tap, offloads, write_frame};
use crate::virtio::buffers::{Buffers, total};
use crate::virtio::queue::QueueRecord;
use crate::virtio::{Activation, Counters, DeviceError, DeviceState, Kind, Progress, VirtioDevice};

/// The queue of frames for the guest.
pub(super) const RX: usize = 0;
/// The queue of frames of the guest.
pub(super) const TX: usize = 1;

const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Frames per turn of the event loop.
pub(super) const BUDGET: u32 = 128;
/// The least MTU that Linux accepts (`ETH_MIN_MTU`).
const MIN_MTU: u16 = 68;
/// The token of the port.
const PORT: u32 = 0;
/// The token of the clock.
const CLOCK: u32 = 1;
/// How long the guest may wait to be told that a lone frame was sent. It mostly finds out before that, as
/// it looks when a frame comes or the next one goes. One frame stops no sender: TCP has two under way,
/// other sockets buffers for more.
const LONE_PATIENCE: Duration = Duration::from_millis(4);
/// The most that is called a lone frame, bytes. What is larger may be memory that the sender waits for.
const LONE_FRAME: usize = 2048;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not the address of one card.
    #[error("MAC address {0:02x?} is not a unicast address")]
    Mac([u8; 6]),
    /// An MTU that the guest would not take.
    #[error("MTU {0} is below 68")]
    Mtu(u16),
    /// The host has no more descriptors.
    #[error("create clock")]
    Clock(#[source] io::Error),
}

/// A virtio-net device.
#[derive(Debug)]
pub struct Net<P = Tap> {
    mac: [u8; 6],
    mtu: Option<u16>,
    port: P,
    frame: Frame,
    counters: Counters,
    active: Option<Activation>,
    /// The port has ended; nothing is read or written any more.
    unplugged: bool,
    /// The port is full and a frame of the guest waits.
    blocked: bool,
    /// The last turn of receiving was over before the port was empty.
    unfinished: bool,
    /// The guest has not been told of a lone frame that was sent, and the clock runs.
    untold: bool,
    clock: TimerFd,
}

impl<P: Port> Net<P> {
    /// Creates a card with this address on a port; `mtu` is offered to the guest.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(port: P, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Mac(mac));
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        Ok(Self {
            mac,
            mtu,
            port,
            frame: Frame::default(),
            counters: Counters::default(),
            active: None,
            unplugged: false,
            blocked: false,
            unfinished: false,
            untold: false,
            clock: TimerFd::new().map_err(|error| NetError::Clock(error.into()))?,
        })
    }

    /// Creates the device from a snapshot.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn restore(state: &State, port: P) -> Result<Self, NetError> {
        Self::new(port, state.mac, state.mtu)
    }

    /// Moves frames in these directions, and for the guest if there are some left from before.
    fn turn(&mut self, receive: bool, transmit: bool) -> Result<Progress, DeviceError> {
        let mut progress = Progress::Done;
        if transmit {
            progress = self.transmit()?;
        }
        if receive || self.unfinished {
            self.receive()?;
        }
        // The turn for either queue goes on with both.
        if self.unfinished && progress == Progress::Done {
            progress = Progress::More(RX as u16);
        }
        Ok(progress)
    }

    /// Gives frames to the guest until there are none, it has no buffers, or the turn is over.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let wishes = Wishes {
            most: if active.has(VIRTIO_NET_F_MRG_RXBUF) {
                usize::from(active.queues[RX].size())
            } else {
                1
            },
            checksums: active.has(VIRTIO_NET_F_GUEST_CSUM),
        };
        let (memory, queue) = (&active.memory, &mut active.queues[RX]);
        let frame = &mut self.frame;
        let mut room = Room::default();
        self.unfinished = true;
        let mut unplugged = false;
        let mut used = false;
        for _ in 0..BUDGET {
            if frame.len == 0 {
                if self.unplugged || !room.fill(frame.expected, wishes, queue, memory)? {
                    self.unfinished = false;
                    break;
                }
                match frame.read(&self.port, &mut room, wishes, queue, memory) {
                    Ok(Reading::Kept) => {}
                    Ok(Reading::Delivered(len)) => {
                        used = true;
                        self.counters.requests += 1;
                        self.counters.bytes_in += len as u64;
                        continue;
                    }
                    Ok(Reading::Nonsense) => {
                        self.counters.errors += 1;
                        continue;
                    }
                    Err(ReadError::Ring(error)) => return Err(error.into()),
                    Err(ReadError::Port(error)) => {
                        unplugged = error.kind() != ErrorKind::WouldBlock;
                        self.unfinished = false;
                        break;
                    }
                }
            }
            match frame.deliver(wishes, queue, memory)? {
                Delivery::Done => {
                    used = true;
                    self.counters.requests += 1;
                    self.counters.bytes_in += (frame.len - HEADER_SIZE) as u64;
                    frame.len = 0;
                }
                Delivery::Impossible => {
                    self.counters.errors += 1;
                    frame.len = 0;
                }
                Delivery::NoBuffers => {
                    self.unfinished = false;
                    break;
                }
            }
        }
        room.give_back(queue);
        if used {
            active.notify(RX)?;
        }
        if unplugged {
            self.unplug();
        }
        Ok(())
    }

    /// Takes frames of the guest until there are none, the port is full, or the
    /// turn is over.
    fn transmit(&mut self) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let memory = &active.memory;
        let queue = &mut active.queues[TX];
        let mut buffers = Buffers::default();
        let mut progress = Progress::More(TX as u16);
        self.blocked = false;
        let mut used = false;
        let mut last = 0;
        queue.disable_notification(memory)?;
        for _ in 0..BUDGET {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let head = chain.head_index();
            let sent = buffers
                .refill(chain, memory, MAX_DESCRIPTORS)
                .map_err(io::Error::other)
                .and_then(|()| send(&self.port, &mut buffers.readable, active.features));
            match sent {
                Ok(len) => {
                    self.counters.bytes_out += len as u64;
                    last = len;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    queue.undo_pop();
                    self.blocked = true;
                    progress = Progress::Done;
                    break;
                }
                // The frame is lost, as on any network.
                Err(_) => self.counters.errors += 1,
            }
            self.counters.requests += 1;
            queue.push_used(memory, head, 0)?;
            used = true;
        }
        if used && (queue.needs_interrupt(memory)? || self.untold) {
            let lone = last <= LONE_FRAME && queue.unseen(memory)? == Some(1);
            self.untold = lone && self.clock.reset(LONE_PATIENCE, None).is_ok();
            if !self.untold && queue.unseen(memory)? != Some(0) {
                active.interrupt.signal_queue();
            }
        }
        Ok(progress)
    }

    /// Tells the guest of a lone frame that was sent some time ago, unless it knows.
    fn tell_of_lone_frame(&mut self) -> Result<(), DeviceError> {
        let untold = std::mem::take(&mut self.untold);
        if let Some(active) = self.active.as_ref().filter(|_| untold)
            && active.queues[TX].unseen(&active.memory)? != Some(0)
        {
            active.interrupt.signal_queue();
        }
        Ok(())
    }

    /// Tells the guest that the link is down.
    fn unplug(&mut self) {
        self.unplugged = true;
        self.blocked = false;
        if let Some(active) = &self.active {
            let _ = active.watcher.remove(self.port.file().as_raw_fd());
            active.interrupt.signal_config(&self.config());
        }
    }
}

/// Sends a frame of the guest, header and all; returns its length without header.
fn send(port: &impl Port, slices: &mut [VolatileSlice<'_>], features: u64) -> io::Result<usize> {
    let len = total(slices);
    if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
        return Err(ErrorKind::InvalidInput.into());
    }
    // The header is copied, so that what is checked is what is sent.
    let mut bytes = [0; HEADER_SIZE];
    let mut done = 0;
    for slice in slices.iter_mut() {
        let count = (HEADER_SIZE - done).min(slice.len());
        slice.copy_to(&mut bytes[done..done + count]);
        done += count;
        *slice = slice.offset(count).map_err(io::Error::other)?;
    }
    let header = Header::check(&bytes, len - HEADER_SIZE, features).map_err(io::Error::other)?;
    write_frame(port.file(), &header.encode(), slices)?;
    Ok(len - HEADER_SIZE)
}

impl<P: Port> VirtioDevice for Net<P> {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mut features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ]
        .iter()
        .fold(0, |all, feature| all | 1 << feature);
        if self.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        features
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[..6].copy_from_slice(&self.mac);
        if !self.unplugged {
            config[6] = VIRTIO_NET_S_LINK_UP as u8;
        }
        config[8] = 1;
        config[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.len() != QUEUE_SIZES.len() {
            return Err(DeviceError::Broken("net has two queues"));
        }
        if !self.unplugged {
            self.port
                .set_offloads(offloads(activation.features))
                .map_err(|_| DeviceError::Broken("tap refuses offloads"))?;
            // Edge-triggered: it is read until it is empty or the guest has no buffers, and written
            // until it is full, so there is nothing to change from turn to turn.
            let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            activation
                .watcher
                .add(self.port.file().as_raw_fd(), PORT, events)
                .map_err(DeviceError::Watch)?;
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            activation
                .watcher
                .add(self.clock.as_raw_fd(), CLOCK, events)
                .map_err(DeviceError::Watch)?;
        }
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take()
            && !self.unplugged
        {
            let _ = active.watcher.remove(self.port.file().as_raw_fd());
            let _ = active.watcher.remove(self.clock.as_raw_fd());
        }
        self.frame.len = 0;
        self.blocked = false;
        self.unfinished = false;
        self.untold = false;
    }

    fn queues(&self) -> Vec<QueueRecord> {
        self.active
            .as_ref()
            .map(Activation::records)
            .unwrap_or_default()
    }

    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        let queue = usize::from(queue);
        self.turn(queue == RX, queue == TX)
    }

    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        if token == CLOCK {
            self.tell_of_lone_frame()?;
        }
        if token != PORT || self.unplugged {
            return Ok(Progress::Done);
        }
        let progress = self.turn(
            ready.contains(EventSet::IN),
            ready.contains(EventSet::OUT) && self.blocked,
        )?;
        if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) && !self.unplugged {
            self.unplug();
        }
        Ok(progress)
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(State {
            mac: self.mac,
            mtu: self.mtu,
        })
    }
}
