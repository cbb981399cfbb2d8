//! The device: queues and configuration space.

use std::collections::VecDeque;
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

use super::header::{HEADER_SIZE, Header, NUM_BUFFERS};
use super::state::State;
use super::tap::{Port, Tap, offloads, read_frame, write_frame};
use crate::virtio::buffers::{Buffers, total};
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::{
    Activation, Counters, DeviceError, DeviceState, Kind, Memory, Progress, VirtioDevice,
};

/// The queue of frames for the guest.
pub(super) const RX: usize = 0;
/// The queue of frames of the guest.
pub(super) const TX: usize = 1;

const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Frames per turn of the event loop.
pub(super) const BUDGET: u32 = 128;
/// A header and the largest frame that segmentation makes (virtio 1.2, 5.1.6.3.1).
pub(super) const MAX_FRAME: usize = 65562;
/// A header and an Ethernet header.
pub(super) const MIN_FRAME: usize = HEADER_SIZE + 14;
/// The least MTU that Linux accepts (`ETH_MIN_MTU`).
const MIN_MTU: u16 = 68;
/// The most descriptors of a frame. Linux uses at most 2 + `MAX_SKB_FRAGS` (45).
const MAX_DESCRIPTORS: usize = 64;
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

/// The frame that was read last.
#[derive(Debug, Default)]
struct Frame {
    /// Its header, and what of it is not in buffers of the guest.
    bytes: Vec<u8>,
    /// Bytes of it, all in `bytes`, that wait for buffers; 0: none.
    len: usize,
    /// How long the next one may be, from those before.
    expected: usize,
}

/// What became of reading a frame.
enum Reading {
    /// It is in the guest's buffers, which were returned; its length without header.
    Delivered(usize),
    /// It waits in the [`Frame`] for more buffers than there was room in.
    Kept,
    /// It was no frame.
    Nonsense,
}

/// What is to be done about a frame for the guest.
enum Delivery {
    Done,
    /// The guest must offer more buffers first.
    NoBuffers,
    /// No buffers that the guest can offer will do.
    Impossible,
}

/// What the driver of the receive queue asked for.
#[derive(Debug, Clone, Copy)]
struct Wishes {
    /// The most chains that a frame may take.
    most: usize,
    /// It knows the flags of checksums.
    checksums: bool,
}

/// A chain of the receive queue.
#[derive(Debug)]
struct Place {
    head: u16,
    slices: usize,
    len: usize,
}

/// Chains that were taken from the receive queue to read frames into. What is left of them at the
/// end of a turn goes back.
#[derive(Debug, Default)]
struct Room<'m> {
    places: VecDeque<Place>,
    /// The memory of all places, in order.
    slices: VecDeque<VolatileSlice<'m>>,
    len: usize,
    /// The chains of the frame that was read last, with the number of bytes in each.
    used: Vec<(u16, u32)>,
    /// Reused for each chain.
    buffers: Buffers<'m>,
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

/// Why no frame was read.
enum ReadError {
    Port(io::Error),
    Ring(QueueError),
}

impl<'m> Room<'m> {
    /// Takes chains until there is room for `wanted` bytes, or no chain is left. False: the guest
    /// has none at all, and will notify. A chain of no use stays where it is, and so do those after
    /// it: [`Frame::deliver`] sees to them, without any room here.
    fn fill(
        &mut self,
        wanted: usize,
        wishes: Wishes,
        queue: &mut VirtQueue,
        memory: &'m Memory,
    ) -> Result<bool, QueueError> {
        while self.places.is_empty() || (self.len < wanted && self.places.len() < wishes.most) {
            let Some(chain) = queue.pop(memory)? else {
                if self.places.is_empty() && queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(!self.places.is_empty());
            };
            let head = chain.head_index();
            let proper = self.buffers.refill(chain, memory, MAX_DESCRIPTORS).is_ok();
            let len = total(&self.buffers.writable);
            if !proper || !self.buffers.readable.is_empty() || len == 0 {
                queue.undo_pop();
                break;
            }
            self.places.push_back(Place {
                head,
                slices: self.buffers.writable.len(),
                len,
            });
            self.slices.extend(self.buffers.writable.drain(..));
            self.len += len;
        }
        Ok(true)
    }

    /// Returns the memory after the first `skip` bytes.
    fn after(&self, skip: usize) -> Vec<VolatileSlice<'m>> {
        let mut skip = skip;
        let mut rest = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            let now = skip.min(slice.len());
            skip -= now;
            rest.extend(slice.offset(now).ok().filter(|it| !it.is_empty()));
        }
        rest
    }

    /// Takes away the first places, as many as a frame of `len` bytes fills, into `used`. Returns
    /// the number of their slices.
    fn use_up(&mut self, len: usize) -> usize {
        self.used.clear();
        let (mut left, mut slices) = (len, 0);
        while left > 0
            && let Some(place) = self.places.pop_front()
        {
            let here = left.min(place.len);
            left -= here;
            self.len -= place.len;
            slices += place.slices;
            self.used.push((place.head, here as u32));
        }
        slices
    }

    /// Forgets the first slices, and writes the header to their start.
    fn finish(&mut self, slices: usize, mut header: &[u8]) {
        for slice in self.slices.drain(..slices) {
            let (now, later) = header.split_at(header.len().min(slice.len()));
            slice.copy_from(now);
            header = later;
        }
    }

    /// Puts all chains back.
    fn give_back(&mut self, queue: &mut VirtQueue) {
        for _ in 0..self.places.len() {
            queue.undo_pop();
        }
        *self = Self::default();
    }
}

impl Frame {
    /// Reads the next frame, into `room` if it is large enough.
    fn read<'m>(
        &mut self,
        port: &impl Port,
        room: &mut Room<'m>,
        wishes: Wishes,
        queue: &mut VirtQueue,
        memory: &'m Memory,
    ) -> Result<Reading, ReadError> {
        self.bytes.resize(MAX_FRAME, 0);
        let (header, rest) = self.bytes.split_at_mut(HEADER_SIZE);
        let inside = room.len.clamp(HEADER_SIZE, MAX_FRAME) - HEADER_SIZE;
        let body = room.after(HEADER_SIZE);
        let count =
            read_frame(port.file(), header, &body, &mut rest[inside..]).map_err(ReadError::Port)?;
        if count == 0 {
            return Err(ReadError::Port(ErrorKind::UnexpectedEof.into()));
        }
        if count < MIN_FRAME {
            return Ok(Reading::Nonsense);
        }
        self.expected = count.max(self.expected / 2);
        if count > room.len {
            // What is in the guest's buffers joins the rest; whether the guest has changed it
            // meanwhile is the guest's affair.
            let mut at = 0;
            for slice in &body {
                let len = slice.len().min(inside - at);
                slice.copy_to(&mut rest[at..at + len]);
                at += len;
            }
            room.give_back(queue);
            self.len = count;
            return Ok(Reading::Kept);
        }
        let slices = room.use_up(count);
        self.set_header(room.used.len() as u16, wishes);
        room.finish(slices, &self.bytes[..HEADER_SIZE]);
        queue
            .push_used_together(memory, &room.used)
            .map_err(ReadError::Ring)?;
        Ok(Reading::Delivered(count - HEADER_SIZE))
    }

    /// Fills in what the tap does not know: the number of buffers that the frame takes.
    fn set_header(&mut self, buffers: u16, wishes: Wishes) {
        self.bytes[NUM_BUFFERS..HEADER_SIZE].copy_from_slice(&buffers.to_le_bytes());
        if !wishes.checksums {
            // A driver that knows no checksum offload must see no flags (5.1.6.4.1).
            self.bytes[0] = 0;
        }
    }

    /// Copies the frame to the guest, in as many buffers as it takes when the
    /// driver merges buffers, else in one.
    fn deliver(
        &mut self,
        wishes: Wishes,
        queue: &mut VirtQueue,
        memory: &Memory,
    ) -> Result<Delivery, QueueError> {
        let most = wishes.most;
        let mut taken: Vec<(u16, Vec<VolatileSlice<'_>>)> = Vec::with_capacity(1);
        let mut useless = 0;
        let mut room = 0;
        while room < self.len {
            let chain = match queue.pop(memory)? {
                Some(chain) if taken.len() < most => chain,
                Some(_) => {
                    // Go back over this chain and all those that do not suffice.
                    for _ in 0..=taken.len() {
                        queue.undo_pop();
                    }
                    return Ok(Delivery::Impossible);
                }
                // Notifications count from what was taken, so this precedes the undoing.
                None if queue.enable_notification(memory)? => continue,
                None => {
                    for _ in 0..taken.len() {
                        queue.undo_pop();
                    }
                    let impossible = taken.len() == most;
                    return Ok(if impossible {
                        Delivery::Impossible
                    } else {
                        Delivery::NoBuffers
                    });
                }
            };
            let head = chain.head_index();
            // A chain that can't be used counts as one without room.
            let slices = Buffers::collect(chain, memory, MAX_DESCRIPTORS)
                .ok()
                .filter(|it| it.readable.is_empty())
                .map(|it| it.writable)
                .unwrap_or_default();
            let here = total(&slices);
            useless += usize::from(here == 0);
            room += here;
            taken.push((head, slices));
        }
        let count = (taken.len() - useless) as u16;
        self.set_header(count, wishes);
        // The buffers of a frame follow one another in the used ring, and a driver that polls
        // it must find all of them as soon as it finds the first (5.1.6.4).
        taken.sort_by_key(|(_, slices)| total(slices) > 0);
        let mut rest = &self.bytes[..self.len];
        let mut used = Vec::with_capacity(taken.len());
        for (head, slices) in &taken {
            let before = rest.len();
            for slice in slices {
                let (now, later) = rest.split_at(rest.len().min(slice.len()));
                slice.copy_from(now);
                rest = later;
            }
            used.push((*head, (before - rest.len()) as u32));
        }
        queue.push_used_together(memory, &used)?;
        Ok(Delivery::Done)
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

    fn active(&self) -> Option<&Activation> {
        self.active.as_ref()
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
