//! The device: queues, configuration space and the listening socket.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::muxer::Muxer;
use super::packet::{RxBuffer, TxPacket};
use crate::pluggable::Pluggable;
use crate::virtio::buffers::Buffers;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::queue::QueueRecord;
use crate::virtio::state::{DeviceState, VsockState};

/// The receive queue: packets for the guest.
pub(super) const RX: usize = 0;
/// The transmit queue: packets of the guest.
pub(super) const TX: usize = 1;
/// The event queue: news for the guest's driver.
pub(super) const EVENT: usize = 2;

/// The event `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7), as it is in memory.
const EVENT_TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Packets per direction and turn of the event loop.
const BUDGET: u32 = 256;
/// New clients per turn of the event loop.
const ACCEPTS: u32 = 16;
/// How long no client is taken after the host ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Tokens; those of connections are their ports, which are above.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A context id that belongs to no guest (0, 1, 2 and the wildcard).
    #[error("context id {0} is not a guest's")]
    Cid(u32),
    /// The listening socket can't be used.
    #[error("prepare vsock listener")]
    Listener(#[source] io::Error),
    /// No timer.
    #[error("create vsock timer")]
    Timer(#[source] io::Error),
}

/// The state between activation and reset.
#[derive(Debug)]
struct Active {
    activation: Activation,
    muxer: Muxer,
}

/// A virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    cid: u32,
    last_port: u32,
    listener: UnixListener,
    timer: TimerFd,
    /// When the timer fires.
    armed: Option<Instant>,
    /// When the listener is watched again.
    accept_again: Option<Instant>,
    /// The guest must hear that its connections are gone.
    reset_owed: bool,
    /// It has heard, and may be about to drop its connections. It gets no packet until it has: it would drop
    /// a new connection with the others.
    reset_pending: bool,
    counters: Counters,
    /// Hears what the guest wants of it.
    pluggable: Option<Arc<Pluggable>>,
    active: Option<Active>,
}

impl Vsock {
    /// Creates the device of the guest `cid`, with a listening Unix stream socket.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn new(cid: u32, listener: OwnedFd) -> Result<Self, VsockError> {
        if cid <= 2 || cid == u32::MAX {
            return Err(VsockError::Cid(cid));
        }
        let listener = UnixListener::from(listener);
        listener
            .set_nonblocking(true)
            .map_err(VsockError::Listener)?;
        let timer = TimerFd::new().map_err(|error| VsockError::Timer(error.into()))?;
        Ok(Self {
            cid,
            last_port: 0,
            listener,
            timer,
            armed: None,
            accept_again: None,
            reset_owed: false,
            reset_pending: false,
            counters: Counters::default(),
            pluggable: None,
            active: None,
        })
    }

    /// Creates the device from a snapshot. Once active, it tells the guest that
    /// all its connections are gone.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn restore(state: &VsockState, listener: OwnedFd) -> Result<Self, VsockError> {
        let mut device = Self::new(state.cid, listener)?;
        device.last_port = state.last_port;
        device.reset_owed = true;
        Ok(device)
    }

    /// Has the guest say by this device how much it wants of `pluggable`.
    #[must_use]
    pub fn hearing(self, pluggable: Option<Arc<Pluggable>>) -> Self {
        Self { pluggable, ..self }
    }

    /// Takes waiting clients.
    fn accept(&mut self, now: Instant) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        for _ in 0..ACCEPTS {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if active.muxer.accept(stream, now).is_err() {
                        self.counters.errors += 1;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // No descriptors or memory: the socket stays ready, so look away for a while.
                    self.counters.errors += 1;
                    self.accept_again = Some(now + ACCEPT_PAUSE);
                    active
                        .activation
                        .watcher
                        .modify(self.listener.as_raw_fd(), LISTENER, EventSet::empty())
                        .map_err(DeviceError::Watch)?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Ends what took too long, and takes clients again after a pause.
    fn on_timer(&mut self, now: Instant) -> Result<(), DeviceError> {
        // The timer is armed again below if anything is left to wait for.
        self.armed = None;
        self.timer
            .clear()
            .map_err(|error| DeviceError::Watch(error.into()))?;
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        active.muxer.expire(now);
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            active
                .activation
                .watcher
                .modify(self.listener.as_raw_fd(), LISTENER, EventSet::IN)
                .map_err(DeviceError::Watch)?;
        }
        Ok(())
    }

    /// Makes the timer fire at the next deadline.
    fn arm_timer(&mut self, now: Instant) -> Result<(), DeviceError> {
        let deadline = self.active.as_ref().and_then(|it| it.muxer.deadline());
        let next = [deadline, self.accept_again].into_iter().flatten().min();
        let Some(next) = next.filter(|next| self.armed.is_none_or(|armed| *next < armed)) else {
            return Ok(());
        };
        // A timer set to zero would never fire.
        let wait = next.duration_since(now).max(Duration::from_millis(1));
        self.timer
            .reset(wait, None)
            .map_err(|error| DeviceError::Watch(error.into()))?;
        self.armed = Some(next);
        Ok(())
    }

    /// Moves packets both ways until nothing moves or the turn is over.
    fn pump(&mut self, now: Instant) -> Result<Progress, DeviceError> {
        let mut progress = Progress::Done;
        if let Some(active) = &mut self.active {
            let [mut sent, mut received] = [0; 2];
            loop {
                let before = (sent, received);
                active.transmit(&mut sent, &mut self.counters)?;
                if !self.reset_owed && !self.reset_pending {
                    active.receive(&mut received, &mut self.counters, now)?;
                }
                if sent == BUDGET || received == BUDGET {
                    progress = Progress::More(TX as u16);
                    break;
                }
                if before == (sent, received) {
                    break;
                }
            }
            if received > 0 {
                active.activation.notify(RX)?;
            }
            if sent > 0 {
                active.activation.notify(TX)?;
            }
            self.last_port = active.muxer.last_port();
        }
        self.arm_timer(now)?;
        Ok(progress)
    }

    /// Tells the driver that all connections are gone, if that is due and it offers a buffer to do so. It
    /// gets its other buffers back unused: it has acted on the event when it offers some again.
    fn send_reset(&mut self) -> Result<(), DeviceError> {
        let Some(Active { activation, .. }) = self.active.as_mut().filter(|_| self.reset_owed)
        else {
            return Ok(());
        };
        let queue = &mut activation.queues[EVENT];
        let mut returned = false;
        for _ in 0..QUEUE_SIZES[EVENT] {
            let Some(chain) = queue.pop(&activation.memory)? else {
                // As long as it has not heard, its first buffer is news.
                if queue.enable_notification(&activation.memory)? && self.reset_owed {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let buffers = Buffers::collect(chain, &activation.memory, 1);
            let room = buffers.ok().map(|it| it.writable).unwrap_or_default();
            let event = EVENT_TRANSPORT_RESET;
            let used = match room.first() {
                Some(_) if !self.reset_owed => 0,
                Some(slice) if slice.len() >= event.len() => {
                    slice.copy_from(&event);
                    self.reset_owed = false;
                    self.reset_pending = true;
                    event.len() as u32
                }
                _ => {
                    self.counters.errors += 1;
                    0
                }
            };
            queue.push_used(&activation.memory, head, used)?;
            self.counters.requests += 1;
            returned = true;
        }
        if returned {
            activation.notify(EVENT)?;
        }
        self.see_reset()
    }

    /// Finds out whether the driver has acted on the event.
    fn see_reset(&mut self) -> Result<(), DeviceError> {
        if let Some(Active { activation, .. }) = &mut self.active
            && self.reset_pending
            && activation.queues[EVENT].enable_notification(&activation.memory)?
        {
            self.reset_pending = false;
        }
        Ok(())
    }
}

impl Active {
    /// Takes packets of the guest until `done` is the turn's share.
    fn transmit(&mut self, done: &mut u32, counters: &mut Counters) -> Result<(), DeviceError> {
        let memory = &self.activation.memory;
        let queue = &mut self.activation.queues[TX];
        queue.disable_notification(memory)?;
        // When no more answers can be kept, the guest's next receive buffer leads back here.
        while *done < BUDGET && self.muxer.can_receive() {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            *done += 1;
            let head = chain.head_index();
            let good = match TxPacket::parse(memory, chain) {
                Ok(packet) => {
                    counters.bytes_out += packet.body.len() as u64;
                    self.muxer.receive(&packet)
                }
                Err(_) => false,
            };
            counters.errors += u64::from(!good);
            counters.requests += 1;
            queue.push_used(memory, head, 0)?;
        }
        Ok(())
    }

    /// Gives packets to the guest, as long as it has buffers, until `done` is the turn's share.
    fn receive(
        &mut self,
        done: &mut u32,
        counters: &mut Counters,
        now: Instant,
    ) -> Result<(), DeviceError> {
        let memory = &self.activation.memory;
        let queue = &mut self.activation.queues[RX];
        while *done < BUDGET && self.muxer.has_packet() {
            let Some(chain) = queue.pop(memory)? else {
                // Only now new buffers are news.
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let used = match RxBuffer::parse(memory, chain) {
                Ok(mut buffer) => {
                    let Some(header) = self.muxer.next_packet(&mut buffer.body, now) else {
                        queue.undo_pop();
                        break;
                    };
                    counters.bytes_in += u64::from(header.len);
                    buffer.finish(&header)
                }
                Err(_) => {
                    counters.errors += 1;
                    0
                }
            };
            *done += 1;
            counters.requests += 1;
            queue.push_used(memory, head, used)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// No feature of its own: without any, a vsock device has streams only.
    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if activation.queues.len() != QUEUE_SIZES.len() {
            return Err(DeviceError::Broken("vsock has three queues"));
        }
        let watcher = activation.watcher.clone();
        watcher
            .add(self.timer.as_raw_fd(), TIMER, EventSet::IN)
            .and_then(|()| watcher.add(self.listener.as_raw_fd(), LISTENER, EventSet::IN))
            .map_err(|error| {
                let _ = watcher.remove(self.timer.as_raw_fd());
                DeviceError::Watch(error)
            })?;
        self.active = Some(Active {
            activation,
            muxer: Muxer::new(self.cid, self.last_port, watcher, self.pluggable.clone()),
        });
        self.send_reset().inspect_err(|_| self.reset())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            let watcher = &active.activation.watcher;
            let _ = watcher.remove(self.timer.as_raw_fd());
            let _ = watcher.remove(self.listener.as_raw_fd());
        }
        let _ = self.timer.clear();
        self.armed = None;
        self.accept_again = None;
        // A driver that starts over has no connections to forget.
        self.reset_owed = false;
        self.reset_pending = false;
    }

    fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref().map(|active| &active.activation))
    }

    fn on_kick(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        if usize::from(queue) == EVENT {
            self.send_reset()?;
            self.see_reset()?;
        }
        self.pump(Instant::now())
    }

    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        let now = Instant::now();
        match token {
            LISTENER => self.accept(now)?,
            TIMER => self.on_timer(now)?,
            port => {
                if let Some(active) = &mut self.active {
                    active.muxer.on_host_event(port, ready, now);
                }
            }
        }
        self.pump(now)
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            cid: self.cid,
            last_port: self.last_port,
        })
    }
}
