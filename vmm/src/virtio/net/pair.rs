//! A pair of queues and its end of the cable: what moves frames.
//!
//! Each pair has a lock and a thread of its own, so that what one does no other waits for.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_S_LINK_UP,
};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::frame::{
    Delivery, Frame, MAX_DESCRIPTORS, MAX_FRAME, MIN_FRAME, ReadError, Reading, RxBuffers,
    RxOptions,
};
use super::header::{HEADER_SIZE, Header};
use super::tap::{Port, write_frame};
use crate::sync::lock;
use crate::virtio::buffers::{Buffers, total};
use crate::virtio::counters::Counters;
use crate::virtio::device::QueuePair;
use crate::virtio::device::{Activation, DeviceError, Progress};
use crate::virtio::queue::QueueRecord;

/// The queue of frames for the guest.
pub(super) const RX: usize = 0;
/// The queue of frames of the guest.
pub(super) const TX: usize = 1;
/// The token of the first pair's port.
const PORT: u32 = 0;
/// The token of its clock.
const CLOCK: u32 = 1;

/// Frames per turn of the event loop.
pub(super) const BUDGET: u32 = 128;

/// How long the guest may wait to be told that a lone frame was sent. It mostly finds out before that, as
/// it looks when a frame comes or the next one goes. One frame stops no sender: TCP has two under way,
/// other sockets buffers for more.
const LONE_DELAY: Duration = Duration::from_millis(4);
/// The most that is called a lone frame, bytes. What is larger may be memory that the sender waits for.
const LONE_FRAME: usize = 2048;

/// The size of the configuration space.
pub(super) const CONFIG: usize = 12;
/// Where in it the status is.
const STATUS: usize = 6;

/// A card's configuration and the state of its link, which its pairs share.
#[derive(Debug)]
pub(super) struct Link {
    config: [u8; CONFIG],
    /// The port has ended; nothing is read or written any more.
    down: AtomicBool,
}

impl Link {
    /// Creates a link that is up; the status is filled in here.
    pub fn new(config: [u8; CONFIG]) -> Self {
        Self {
            config,
            down: AtomicBool::new(false),
        }
    }

    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::SeqCst)
    }

    /// Returns the configuration as it is now.
    pub fn config(&self) -> Vec<u8> {
        let mut config = self.config.to_vec();
        if !self.is_down() {
            config[STATUS] = VIRTIO_NET_S_LINK_UP as u8;
        }
        config
    }

    /// Takes the link down. Tells whether it was up.
    pub fn end(&self) -> bool {
        !self.down.swap(true, Ordering::SeqCst)
    }
}

/// A receive queue and a transmit queue.
#[derive(Debug)]
pub(super) struct Pair<P> {
    /// Its position among the card's pairs.
    index: usize,
    port: P,
    frame: Frame,
    counters: Counters,
    /// The counters as of the last turn, for readers that can't wait for this one.
    counted: Arc<Mutex<Counters>>,
    active: Option<Activation>,
    /// Frames for the guest come out of its port. If not, they come out of another pair's.
    on: bool,
    watched: bool,
    link: Arc<Link>,
    /// The port is full and a frame of the guest waits.
    blocked: bool,
    /// The last turn of receiving was over before the port was empty.
    unfinished: bool,
    /// The guest has not been told of a lone frame that was sent, and the clock runs.
    notify_later: bool,
    clock: TimerFd,
}

impl<P: Port> Pair<P> {
    /// Creates a pair that is idle and on, as a port is that was just opened.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(index: usize, port: P, link: Arc<Link>) -> io::Result<Self> {
        Ok(Self {
            index,
            port,
            frame: Frame::default(),
            counters: Counters::default(),
            counted: Arc::default(),
            active: None,
            on: true,
            watched: false,
            link,
            blocked: false,
            unfinished: false,
            notify_later: false,
            clock: TimerFd::new()?,
        })
    }

    pub fn port(&self) -> &P {
        &self.port
    }

    /// Returns what it has counted up to its last turn, to be read without the pair's lock.
    pub fn counted(&self) -> Arc<Mutex<Counters>> {
        Arc::clone(&self.counted)
    }

    /// Returns what a snapshot keeps of its queues; none when idle.
    pub fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref())
    }

    /// Takes the pair into use, with its two queues.
    ///
    /// # Errors
    /// [`DeviceError`]; reset it then.
    pub fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        activation
            .watcher
            .add(self.clock.as_raw_fd(), self.token(CLOCK), events)
            .map_err(DeviceError::Watch)?;
        self.active = Some(activation);
        self.watch().map_err(DeviceError::Watch)
    }

    /// Makes the pair idle.
    pub fn reset(&mut self) {
        self.unwatch();
        if let Some(active) = self.active.take() {
            let _ = active.watcher.remove(self.clock.as_raw_fd());
        }
        self.frame.len = 0;
        self.blocked = false;
        self.unfinished = false;
        self.notify_later = false;
    }

    /// Turns the pair on or off. What is in its port when it is turned off is lost.
    ///
    /// # Errors
    /// What the port says; nothing changed then.
    pub fn switch(&mut self, on: bool) -> io::Result<()> {
        if self.on == on || self.link.is_down() {
            return Ok(());
        }
        self.unwatch();
        let switched = self.port.switch(on);
        if switched.is_ok() {
            self.on = on;
            self.frame.len = 0;
            self.unfinished = false;
        }
        self.watch()?;
        switched
    }

    fn watch(&mut self) -> io::Result<()> {
        if let Some(active) = &self.active
            && self.on
            && !self.link.is_down()
        {
            // Edge-triggered: it is read until it is empty or the guest has no buffers, and written
            // until it is full, so there is nothing to change from turn to turn.
            let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            let fd = self.port.file().as_raw_fd();
            active.watcher.add(fd, self.token(PORT), events)?;
            self.watched = true;
        }
        Ok(())
    }

    fn unwatch(&mut self) {
        if std::mem::take(&mut self.watched)
            && let Some(active) = &self.active
        {
            let _ = active.watcher.remove(self.port.file().as_raw_fd());
        }
    }

    /// Tells the guest that the link is down, unless another pair did.
    fn unplug(&mut self) {
        self.unwatch();
        self.blocked = false;
        if self.link.end()
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config(&self.link.config());
        }
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
            progress = self.more(RX);
        }
        Ok(progress)
    }

    /// Says that the turn goes on, to whoever knows all queues of the card.
    fn more(&self, queue: usize) -> Progress {
        Progress::More((2 * self.index + queue) as u16)
    }

    /// Returns the token of one of its descriptors.
    fn token(&self, descriptor: u32) -> u32 {
        2 * self.index as u32 + descriptor
    }

    /// Gives frames to the guest until there are none, it has no buffers, or the turn is over.
    fn receive(&mut self) -> Result<(), DeviceError> {
        let readable = self.on && !self.link.is_down();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let options = RxOptions {
            max_chains: if active.has(VIRTIO_NET_F_MRG_RXBUF) {
                usize::from(active.queues[RX].size())
            } else {
                1
            },
            checksums: active.has(VIRTIO_NET_F_GUEST_CSUM),
        };
        let (memory, queue) = (&active.memory, &mut active.queues[RX]);
        let frame = &mut self.frame;
        let mut room = RxBuffers::default();
        self.unfinished = true;
        let mut unplugged = false;
        let mut used = false;
        for _ in 0..BUDGET {
            if frame.len == 0 {
                if !readable || !room.fill(frame.expected, options, queue, memory)? {
                    self.unfinished = false;
                    break;
                }
                match frame.read(&self.port, &mut room, options, queue, memory) {
                    Ok(Reading::Buffered) => {}
                    Ok(Reading::Delivered(len)) => {
                        used = true;
                        self.counters.requests += 1;
                        self.counters.bytes_in += len as u64;
                        continue;
                    }
                    Ok(Reading::TooShort) => {
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
            match frame.deliver(options, queue, memory)? {
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
        let more = self.more(TX);
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let memory = &active.memory;
        let queue = &mut active.queues[TX];
        let mut buffers = Buffers::default();
        let mut progress = more;
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
                .and_then(|()| {
                    if self.link.is_down() {
                        return Err(ErrorKind::NotConnected.into());
                    }
                    send(&self.port, &mut buffers.readable, active.features)
                });
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
        if used && (queue.needs_interrupt(memory)? || self.notify_later) {
            let unseen = queue.unseen(memory)?;
            let lone = last <= LONE_FRAME && unseen == Some(1);
            self.notify_later = lone && self.clock.reset(LONE_DELAY, None).is_ok();
            if !self.notify_later && unseen != Some(0) {
                active.interrupt.signal_queue();
            }
        }
        Ok(progress)
    }

    /// Tells the guest of a lone frame that was sent some time ago, unless it knows.
    ///
    /// # Errors
    /// A broken ring.
    pub fn notify_of_lone_frame(&mut self) -> Result<(), DeviceError> {
        let notify_later = std::mem::take(&mut self.notify_later);
        if let Some(active) = self.active.as_ref().filter(|_| notify_later)
            && active.queues[TX].unseen(&active.memory)? != Some(0)
        {
            active.interrupt.signal_queue();
        }
        Ok(())
    }

    fn handle_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        if token == self.token(CLOCK) {
            self.notify_of_lone_frame()?;
        }
        // A late event finds it unwatched, or watched again, when there is no harm in a look.
        if token != self.token(PORT) || !self.watched {
            return Ok(Progress::Done);
        }
        let progress = self.turn(
            ready.contains(EventSet::IN),
            ready.contains(EventSet::OUT) && self.blocked,
        )?;
        if ready.intersects(EventSet::ERROR | EventSet::HANG_UP) && self.watched {
            self.unplug();
        }
        Ok(progress)
    }
}

impl<P: Port> QueuePair for Pair<P> {
    fn is_active(&self) -> bool {
        self.active.is_some()
    }

    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        let queue = usize::from(queue % 2);
        let progress = self.turn(queue == RX, queue == TX);
        *lock(&self.counted) = self.counters;
        progress
    }

    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        let progress = self.handle_event(token, ready);
        *lock(&self.counted) = self.counters;
        progress
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
