//! The device: its pairs of queues, the control queue and the configuration space.

use std::sync::{Arc, Mutex};
use std::time::Instant;
use std::{io, iter};

use hull_proto_vmm::MAX_QUEUE_PAIRS;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::epoll::EventSet;

use super::control::Control;
use super::pair::{CONFIG, Link, Pair};
use super::rate_limit::RateLimit;
use super::tap::{Port, Tap, Unplugged, offloads};
use crate::log;
use crate::sync::lock;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::device::{QueuePair, SharedQueuePair, pair_of};
use crate::virtio::queue::QueueRecord;
use crate::virtio::state::{DeviceState, NetState};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The least MTU that Linux accepts (`ETH_MIN_MTU`).
const MIN_MTU: u16 = 68;
/// The features that a driver needs to use more than one pair (5.1.3.1).
const MULTIQUEUE: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not the address of one card.
    #[error("MAC address {0:02x?} is not a unicast address")]
    Mac([u8; 6]),
    /// An MTU that the guest would not take.
    #[error("MTU {0} is below 68")]
    Mtu(u16),
    /// No queues, or too many.
    #[error("a card has 1 to {MAX_QUEUE_PAIRS} pairs of queues, not {0}")]
    Pairs(usize),
    /// The host has no more descriptors.
    #[error("create clock")]
    Clock(#[source] io::Error),
    /// The port's queues can't be used apart.
    #[error("turn off a queue of the port")]
    Switch(#[source] io::Error),
}

/// A virtio-net device.
#[derive(Debug)]
pub struct Net<P = Tap> {
    mac: [u8; 6],
    mtu: Option<u16>,
    link: Arc<Link>,
    queue_sizes: Vec<u16>,
    /// In the order of their queues. Those that the driver does not use are off.
    pairs: Vec<Arc<Mutex<Pair<P>>>>,
    /// The counters of each pair, which are read without waiting for the pair.
    counted: Vec<Arc<Mutex<Counters>>>,
    control: Control,
    /// How many pairs a driver uses once it is there: one, until it says how many.
    used_pairs: u16,
    /// Which frames may come out of the cable (`TUN_F_*`); none: not known.
    offloads: Option<u32>,
    changes: RateLimit,
}

impl Net<Unplugged> {
    /// Creates the device from a snapshot, without a cable: its link is down.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn unplugged(state: &NetState) -> Result<Self, NetError> {
        let count = usize::from(state.pairs);
        if !(1..=MAX_QUEUE_PAIRS).contains(&count) {
            return Err(NetError::Pairs(count));
        }
        let ports: io::Result<Vec<_>> = (0..count).map(|_| Unplugged::new()).collect();
        let net = Self::restore(state, ports.map_err(NetError::Clock)?)?;
        net.link.end();
        Ok(net)
    }
}

impl<P: Port> Net<P> {
    /// Creates a card with this address on a cable that has these ports, one for each pair of queues;
    /// `mtu` is offered to the guest.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(ports: Vec<P>, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Mac(mac));
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let count = ports.len();
        if !(1..=MAX_QUEUE_PAIRS).contains(&count) {
            return Err(NetError::Pairs(count));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * count];
        if count > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let mut config = [0; CONFIG];
        config[..6].copy_from_slice(&mac);
        config[8] = count as u8;
        config[10..].copy_from_slice(&mtu.unwrap_or_default().to_le_bytes());
        let link = Arc::new(Link::new(config));
        let mut pairs = Vec::with_capacity(count);
        let mut counted = Vec::with_capacity(count);
        for (index, port) in ports.into_iter().enumerate() {
            let pair = Pair::new(index, port, Arc::clone(&link));
            let mut pair = pair.map_err(NetError::Clock)?;
            pair.switch(index == 0).map_err(NetError::Switch)?;
            counted.push(pair.counted());
            pairs.push(Arc::new(Mutex::new(pair)));
        }
        Ok(Self {
            mac,
            mtu,
            link,
            queue_sizes,
            pairs,
            counted,
            control: Control::default(),
            used_pairs: 1,
            offloads: None,
            changes: RateLimit::new(Instant::now()),
        })
    }

    /// Creates the device from a snapshot.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn restore(state: &NetState, ports: Vec<P>) -> Result<Self, NetError> {
        let used_pairs = state.used_pairs;
        Ok(Self {
            used_pairs,
            ..Self::new(ports, state.mac, state.mtu)?
        })
    }

    /// Returns how many pairs and how many control queues a driver has that accepted `features`.
    fn queues_by_kind(&self, features: u64) -> (usize, usize) {
        let pairs = if features & MULTIQUEUE == MULTIQUEUE {
            self.pairs.len()
        } else {
            1
        };
        let has_control = features & (1 << VIRTIO_NET_F_CTRL_VQ) != 0;
        (pairs, usize::from(has_control))
    }

    /// Returns the pair of a queue or token, if there is one.
    fn pair(&self, index: usize) -> Option<&Mutex<Pair<P>>> {
        self.pairs.get(index).map(AsRef::as_ref)
    }

    /// Has only such frames come out of the cable (`TUN_F_*`), if others may now.
    fn set_offloads(&mut self, wanted: u32) -> Result<(), DeviceError> {
        let Some(first) = self.pairs.first() else {
            return Ok(());
        };
        if self.offloads == Some(wanted) || self.link.is_down() {
            return Ok(());
        }
        if !self.changes.take(Instant::now()) {
            return Err(DeviceError::Broken("net changes its offloads too often"));
        }
        self.offloads = None;
        lock(first)
            .port()
            .set_offloads(wanted)
            .map_err(|_| DeviceError::Broken("tap refuses offloads"))?;
        self.offloads = Some(wanted);
        Ok(())
    }

    fn begin(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            watcher,
        } = activation;
        let (pairs, controls) = self.queues_by_kind(features);
        if queues.len() != 2 * pairs + controls {
            return Err(DeviceError::Broken("net has other queues"));
        }
        let mut queues = queues.into_iter();
        let mut part = |count, pair| Activation {
            memory: memory.clone(),
            queues: queues.by_ref().take(count).collect(),
            features,
            interrupt: Arc::clone(&interrupt),
            watcher: watcher.for_pair(pair),
        };
        self.set_offloads(offloads(features))?;
        for (index, pair) in self.pairs.iter().enumerate().take(pairs) {
            lock(pair).activate(part(2, index))?;
        }
        if controls > 0 {
            self.control.activate(part(1, 0), 2 * pairs as u16);
        }
        // More than one only after a restore.
        let used = self.used_pairs;
        if !(1..=pairs).contains(&used.into()) || !use_pairs(&self.pairs, used) {
            return Err(DeviceError::Broken("net can't use so many pairs"));
        }
        Ok(())
    }
}

/// Turns the first pairs on and all others off. Tells whether that was possible.
fn use_pairs<P: Port>(pairs: &[Arc<Mutex<Pair<P>>>], count: u16) -> bool {
    let wanted = iter::repeat_n(true, count.into()).chain(iter::repeat(false));
    for (pair, on) in pairs.iter().zip(wanted) {
        if let Err(error) = lock(pair).switch(on) {
            log::note(&format!("use {count} pairs of queues: {error}"));
            return false;
        }
    }
    true
}

impl<P: Port + 'static> VirtioDevice for Net<P> {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queues_for(&self, features: u64) -> usize {
        let (pairs, controls) = self.queues_by_kind(features);
        2 * pairs + controls
    }

    fn queue_pairs(&self) -> Vec<SharedQueuePair> {
        let shared = |pair: &Arc<Mutex<Pair<P>>>| Arc::clone(pair) as SharedQueuePair;
        self.pairs.iter().map(shared).collect()
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
        if self.pairs.len() > 1 {
            features |= MULTIQUEUE;
        }
        features
    }

    fn config(&self) -> Vec<u8> {
        self.link.config()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let begun = self.begin(activation);
        if begun.is_err() {
            self.reset();
        }
        begun
    }

    fn reset(&mut self) {
        for pair in &self.pairs {
            lock(pair).reset();
        }
        self.control.reset();
        self.used_pairs = 1;
        use_pairs(&self.pairs, 1);
    }

    fn queues(&self) -> Vec<QueueRecord> {
        let pairs = self.pairs.iter().flat_map(|pair| lock(pair).queues());
        pairs.chain(self.control.queues()).collect()
    }

    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        if !self.control.has(queue) {
            return match self.pair(pair_of(queue.into())) {
                Some(pair) => lock(pair).on_kick(queue),
                None => Ok(Progress::Done),
            };
        }
        let (pairs, used, changes) = (&self.pairs, &mut self.used_pairs, &mut self.changes);
        self.control.turn(|count| {
            if count == *used {
                return true;
            }
            if !(1..=pairs.len()).contains(&count.into()) || !changes.take(Instant::now()) {
                return false;
            }
            let done = use_pairs(pairs, count);
            if done {
                *used = count;
            } else {
                use_pairs(pairs, *used);
            }
            done
        })
    }

    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        match self.pair(pair_of(token)) {
            Some(pair) => lock(pair).on_event(token, ready),
            None => Ok(Progress::Done),
        }
    }

    /// Tells the guest now what it would be told later.
    fn drain(&mut self) -> bool {
        let mut pairs = self.pairs.iter();
        pairs.all(|pair| lock(pair).notify_of_lone_frame().is_ok())
    }

    fn counters(&self) -> Counters {
        let pairs = self.counted.iter().map(|counted| *lock(counted));
        pairs.chain(iter::once(self.control.counters())).sum()
    }

    fn state(&self) -> DeviceState {
        DeviceState::Net(NetState {
            mac: self.mac,
            mtu: self.mtu,
            pairs: self.pairs.len() as u16,
            used_pairs: self.used_pairs,
        })
    }
}
