//! The device: queues and configuration space.

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::header::{HEADER_SIZE, Header, NUM_BUFFERS};
use super::state::State;
use super::tap::{Port, Tap, offloads, write_frame};
use crate::virtio::buffers::{Buffers, total};
use crate::virtio::{Activation, Counters, DeviceError, DeviceState, Kind, Progress, VirtioDevice};

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

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not the address of one card.
    #[error("MAC address {0:02x?} is not a unicast address")]
    Mac([u8; 6]),
    /// An MTU that the guest would not take.
    #[error("MTU {0} is below 68")]
    Mtu(u16),
}

/// The frame that was read last.
#[derive(Debug)]
struct Frame {
    bytes: Vec<u8>,
    /// Bytes of it that wait for buffers; 0: none.
    len: usize,
}

/// What is to be done about a frame for the guest.
enum Delivery {
    Done,
    /// The guest must offer more buffers first.
    NoBuffers,
    /// No buffers that the guest can offer will do.
    Impossible,
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
    /// The frame waits for buffers.
    starved: bool,
    /// The port is full and a frame of the guest waits.
    blocked: bool,
    /// What the port is watched for.
    watched: EventSet,
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
            frame: Frame {
                bytes: Vec::new(),
                len: 0,
            },
            counters: Counters::default(),
            active: None,
            unplugged: false,
            starved: false,
            blocked: false,
            watched: EventSet::empty(),
        })
    }

    /// Creates the device from a snapshot.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn restore(state: &State, port: P) -> Result<Self, NetError> {
        Self::new(port, state.mac, state.mtu)
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        if !self.unplugged {
            config[6] = VIRTIO_NET_S_LINK_UP as u8;
        }
        config[8] = 1;
        config[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        config
    }

    /// Gives frames to the guest until there are none, it has no buffers, or the
    /// turn is over. The port stays ready in the last case, so the loop comes back.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        self.starved = false;
        let mut unplugged = self.unplugged;
        let mut used = false;
        for _ in 0..BUDGET {
            if self.frame.len == 0 && !unplugged {
                match self.frame.read(&self.port) {
                    Ok(true) => {}
                    Ok(false) => {
                        self.counters.errors += 1;
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => unplugged = true,
                }
            }
            if self.frame.len == 0 {
                break;
            }
            match self.frame.deliver(active)? {
                Delivery::Done => {
                    used = true;
                    self.counters.requests += 1;
                    self.counters.bytes_in += (self.frame.len - HEADER_SIZE) as u64;
                    self.frame.len = 0;
                }
                Delivery::Impossible => {
                    self.counters.errors += 1;
                    self.frame.len = 0;
                }
                Delivery::NoBuffers => {
                    self.starved = true;
                    break;
                }
            }
        }
        if used {
            active.notify(RX)?;
        }
        if unplugged {
            self.unplug();
        }
        self.watch()
    }

    /// Takes frames of the guest until there are none, the port is full, or the
    /// turn is over.
    fn transmit(&mut self) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let memory = &active.memory;
        let queue = &mut active.queues[TX];
        let mut progress = Progress::More(TX as u16);
        self.blocked = false;
        let mut used = false;
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
            let buffers = Buffers::collect(chain, memory, MAX_DESCRIPTORS).ok();
            let slices = buffers.map(|it| it.readable).unwrap_or_default();
            let len = total(&slices);
            match send(&self.port, slices, active.features) {
                Ok(()) => self.counters.bytes_out += (len - HEADER_SIZE) as u64,
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
        if used {
            active.notify(TX)?;
        }
        self.watch()?;
        Ok(progress)
    }

    /// Watches the port for just what can be used now.
    fn watch(&mut self) -> Result<(), DeviceError> {
        let Some(active) = self.active.as_ref().filter(|_| !self.unplugged) else {
            return Ok(());
        };
        let mut wanted = EventSet::empty();
        if !self.starved {
            wanted |= EventSet::IN;
        }
        if self.blocked {
            wanted |= EventSet::OUT;
        }
        if wanted != self.watched {
            active
                .watcher
                .modify(self.port.file().as_raw_fd(), PORT, wanted)
                .map_err(DeviceError::Watch)?;
            self.watched = wanted;
        }
        Ok(())
    }

    /// Tells the guest that the link is down.
    fn unplug(&mut self) {
        self.unplugged = true;
        self.blocked = false;
        if let Some(active) = &self.active {
            let _ = active.watcher.remove(self.port.file().as_raw_fd());
            active.interrupt.signal_config();
        }
    }
}

impl Frame {
    /// Reads the next frame. False: it was no frame.
    fn read(&mut self, port: &impl Port) -> io::Result<bool> {
        self.bytes.resize(MAX_FRAME, 0);
        let count = loop {
            match port.file().read(&mut self.bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                result => break result?,
            }
        };
        if count < MIN_FRAME {
            return Ok(false);
        }
        self.len = count;
        Ok(true)
    }

    /// Copies the frame to the guest, in as many buffers as it takes when the
    /// driver merges buffers, else in one.
    fn deliver(&mut self, active: &mut Activation) -> Result<Delivery, DeviceError> {
        let most = if active.has(VIRTIO_NET_F_MRG_RXBUF) {
            usize::from(active.queues[RX].size())
        } else {
            1
        };
        let checksums = active.has(VIRTIO_NET_F_GUEST_CSUM);
        let memory = &active.memory;
        let queue = &mut active.queues[RX];
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
        self.bytes[NUM_BUFFERS..HEADER_SIZE].copy_from_slice(&count.to_le_bytes());
        if !checksums {
            // A driver that knows no checksum offload must see no flags (5.1.6.4.1).
            self.bytes[0] = 0;
        }
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

/// Sends a frame of the guest, header and all.
fn send(port: &impl Port, mut slices: Vec<VolatileSlice<'_>>, features: u64) -> io::Result<()> {
    let len = total(&slices);
    if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
        return Err(ErrorKind::InvalidInput.into());
    }
    // The header is copied, so that what is checked is what is sent.
    let mut bytes = [0; HEADER_SIZE];
    let mut done = 0;
    for slice in &mut slices {
        let count = (HEADER_SIZE - done).min(slice.len());
        slice.copy_to(&mut bytes[done..done + count]);
        done += count;
        *slice = slice.offset(count).map_err(io::Error::other)?;
    }
    let header = Header::check(&bytes, len - HEADER_SIZE, features).map_err(io::Error::other)?;
    write_frame(port.file(), &header.encode(), &slices)
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

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(start..).unwrap_or_default();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = rest.get(at).copied().unwrap_or_default();
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.len() != QUEUE_SIZES.len() {
            return Err(DeviceError::Broken("net has two queues"));
        }
        if !self.unplugged {
            self.port
                .set_offloads(offloads(activation.features))
                .map_err(|_| DeviceError::Broken("tap refuses offloads"))?;
            activation
                .watcher
                .add(self.port.file().as_raw_fd(), PORT, EventSet::IN)
                .map_err(DeviceError::Watch)?;
            self.watched = EventSet::IN;
        }
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take()
            && !self.unplugged
        {
            let _ = active.watcher.remove(self.port.file().as_raw_fd());
        }
        self.frame.len = 0;
        self.starved = false;
        self.blocked = false;
    }

    fn active(&self) -> Option<&Activation> {
        self.active.as_ref()
    }

    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        match usize::from(queue) {
            TX => self.transmit(),
            RX if self.starved => self.receive().map(|()| Progress::Done),
            _ => Ok(Progress::Done),
        }
    }

    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        if token != PORT || self.unplugged {
            return Ok(Progress::Done);
        }
        if ready.contains(EventSet::IN) {
            self.receive()?;
        }
        if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) && !self.unplugged {
            // This would be reported for ever.
            self.unplug();
        }
        if ready.contains(EventSet::OUT) {
            return self.transmit();
        }
        Ok(Progress::Done)
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
