//! The device: two queues, and a socket to the server.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hull_proto_vmm::fs::MAX_PACKET;
use vmm_sys_util::epoll::EventSet;

use super::request::{Handling, Request, Room, unique};
use super::socket::{Outcome, Socket};
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::queue::QueueRecord;
use crate::virtio::state::{DeviceState, FsState};

/// The hiprio queue: requests without an answer.
pub(super) const HIPRIO: u16 = 0;
/// The one request queue.
pub(super) const REQUESTS: u16 = 1;
const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: [u16; 2] = [QUEUE_SIZE; 2];
/// Bytes of `tag` in the configuration space; `num_request_queues` follows.
const TAG: usize = 36;
const CONFIG: usize = TAG + 4;
/// Requests, or replies, in a turn of the event loop.
const BUDGET: u32 = 32;
/// Requests that wait for an answer at a time, of both queues: a driver that follows the
/// specification has no descriptors for more.
const MAX_PENDING: usize = 2 * QUEUE_SIZE as usize;
/// How long a VM that is to be paused waits for answers.
const DRAIN: Duration = Duration::from_secs(5);

/// The socket's token.
const SOCKET: u32 = 0;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit, or is none.
    #[error("tag {0:?} is not 1 to {TAG} bytes without NUL")]
    Tag(String),
    /// The socket can't be used.
    #[error("prepare socket of the file server")]
    Socket(#[source] io::Error),
}

/// A request at the server.
#[derive(Debug)]
struct Pending {
    queue: u16,
    head: u16,
    room: Room,
}

/// The state between activation and reset.
#[derive(Debug)]
struct Active {
    activation: Activation,
    pending: HashMap<u64, Pending>,
    /// The socket took no more; the queues wait until it does.
    blocked: bool,
}

/// A virtio-fs device.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    /// None: the server is gone.
    socket: Option<Socket>,
    /// The `unique` of the next request, never used twice: an answer that comes after a reset
    /// belongs to nobody.
    next: u64,
    buffer: Vec<u8>,
    counters: Counters,
    active: Option<Active>,
}

impl Fs {
    /// Creates the device with a seqpacket socket to its server.
    ///
    /// # Errors
    /// [`FsError`]
    pub fn new(tag: &str, socket: OwnedFd) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        Ok(Self {
            tag: tag.to_owned(),
            socket: Some(Socket::new(socket).map_err(FsError::Socket)?),
            next: 1,
            buffer: Vec::new(),
            counters: Counters::default(),
            active: None,
        })
    }

    /// Creates the device from what was saved, with a socket to a server that knows nothing of
    /// what the guest had open.
    ///
    /// # Errors
    /// [`FsError`]
    pub fn restore(state: &FsState, socket: OwnedFd) -> Result<Self, FsError> {
        let mut device = Self::new(&state.tag, socket)?;
        device.counters = state.counters;
        Ok(device)
    }

    /// Takes requests of both queues: what made one wait may have made the other, too.
    fn submit_all(&mut self) -> Result<Progress, DeviceError> {
        let hiprio = self.submit(HIPRIO)?;
        let requests = self.submit(REQUESTS)?;
        Ok(if hiprio == Progress::Done {
            requests
        } else {
            hiprio
        })
    }

    /// Takes requests of a queue.
    fn submit(&mut self, queue: u16) -> Result<Progress, DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let memory = active.activation.memory.clone();
        let Some(ring) = active.activation.queues.get_mut(usize::from(queue)) else {
            return Err(DeviceError::Broken("fs has two queues"));
        };
        let mut completed = false;
        let mut progress = Progress::More(queue);
        for _ in 0..BUDGET {
            if active.blocked || active.pending.len() >= MAX_PENDING {
                // An event of the socket leads back here.
                progress = Progress::Done;
                break;
            }
            let Some(chain) = ring.pop(&memory)? else {
                if ring.enable_notification(&memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let head = chain.head_index();
            let mut request = match Request::read(chain, &memory, usize::from(QUEUE_SIZE)) {
                Ok(request) => request,
                Err((_, room)) => {
                    self.counters.errors += 1;
                    self.counters.requests += 1;
                    ring.push_used(&memory, head, room.refuse(&memory, libc::EIO))?;
                    completed = true;
                    continue;
                }
            };
            request.set_unique(self.next);
            let sent = match (&self.socket, request.handling) {
                (_, Handling::Dropped) => Outcome::Done(0),
                (Some(socket), _) => socket.send(&request.packet),
                (None, _) => Outcome::Closed,
            };
            match sent {
                Outcome::Done(length) => {
                    self.counters.bytes_out += length as u64;
                    if request.handling == Handling::Answered {
                        let pending = Pending {
                            queue,
                            head,
                            room: request.room,
                        };
                        active.pending.insert(self.next, pending);
                    } else {
                        self.counters.requests += 1;
                        ring.push_used(&memory, head, 0)?;
                        completed = true;
                    }
                    self.next += 1;
                }
                Outcome::WouldBlock => {
                    ring.undo_pop();
                    active.blocked = true;
                    if let Some(socket) = &self.socket {
                        let events = EventSet::IN | EventSet::OUT;
                        let watcher = &active.activation.watcher;
                        watcher
                            .modify(socket.fd(), SOCKET, events)
                            .map_err(DeviceError::Watch)?;
                    }
                }
                Outcome::TooLarge | Outcome::Closed => {
                    self.counters.errors += 1;
                    self.counters.requests += 1;
                    ring.push_used(&memory, head, request.room.refuse(&memory, libc::EIO))?;
                    completed = true;
                }
            }
        }
        if completed {
            active.activation.notify(usize::from(queue))?;
        }
        Ok(progress)
    }

    /// Takes replies of the server. True: there may be more.
    fn complete(&mut self) -> Result<bool, DeviceError> {
        let (Some(active), Some(socket)) = (&mut self.active, &self.socket) else {
            return Ok(false);
        };
        self.buffer.resize(MAX_PACKET, 0);
        let mut completed = [false; QUEUE_SIZES.len()];
        let mut more = true;
        let mut gone = false;
        for _ in 0..BUDGET {
            let (length, known) = match socket.receive(&mut self.buffer) {
                Outcome::Done(length) => (length, length),
                // The beginning of the packet is there, and so is whose it is.
                Outcome::TooLarge => (0, MAX_PACKET),
                Outcome::WouldBlock => {
                    more = false;
                    break;
                }
                Outcome::Closed => {
                    gone = true;
                    more = false;
                    break;
                }
            };
            let name = unique(self.buffer.get(..known).unwrap_or_default());
            let Some(pending) = active.pending.remove(&name) else {
                self.counters.errors += 1;
                continue;
            };
            let memory = &active.activation.memory;
            let reply = self.buffer.get_mut(..length).unwrap_or_default();
            let used = match pending.room.answer(memory, reply) {
                Ok(used) => used,
                Err(_) => {
                    self.counters.errors += 1;
                    pending.room.refuse(memory, libc::EIO)
                }
            };
            self.counters.bytes_in += u64::from(used);
            self.counters.requests += 1;
            put_back(&mut active.activation, &pending, used, &mut completed)?;
        }
        for (queue, completed) in completed.into_iter().enumerate() {
            if completed {
                active.activation.notify(queue)?;
            }
        }
        if gone {
            self.server_gone()?;
        }
        Ok(more)
    }

    /// Fails what waits for the server. What comes later fails at once.
    fn server_gone(&mut self) -> Result<(), DeviceError> {
        let socket = self.socket.take();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        crate::log::note("the file server is gone");
        if let Some(socket) = &socket {
            let _ = active.activation.watcher.remove(socket.fd());
        }
        active.blocked = false;
        let mut completed = [false; QUEUE_SIZES.len()];
        for (_, pending) in active.pending.drain() {
            self.counters.errors += 1;
            self.counters.requests += 1;
            let used = pending.room.refuse(&active.activation.memory, libc::EIO);
            put_back(&mut active.activation, &pending, used, &mut completed)?;
        }
        for (queue, completed) in completed.into_iter().enumerate() {
            if completed {
                active.activation.notify(queue)?;
            }
        }
        Ok(())
    }
}

fn put_back(
    activation: &mut Activation,
    pending: &Pending,
    used: u32,
    completed: &mut [bool],
) -> Result<(), DeviceError> {
    let queue = usize::from(pending.queue);
    if let Some(ring) = activation.queues.get_mut(queue) {
        ring.push_used(&activation.memory, pending.head, used)?;
    }
    if let Some(completed) = completed.get_mut(queue) {
        *completed = true;
    }
    Ok(())
}

impl VirtioDevice for Fs {
    fn kind(&self) -> Kind {
        Kind::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// No notification queue, no DAX window: the server says nothing by itself and shares no
    /// memory.
    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        config
            .iter_mut()
            .zip(self.tag.bytes())
            .for_each(|(place, byte)| *place = byte);
        config[TAG..].copy_from_slice(&1u32.to_le_bytes());
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if let Some(socket) = &self.socket {
            activation
                .watcher
                .add(socket.fd(), SOCKET, EventSet::IN)
                .map_err(DeviceError::Watch)?;
        }
        self.active = Some(Active {
            activation,
            pending: HashMap::new(),
            blocked: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        if let (Some(active), Some(socket)) = (self.active.take(), &self.socket) {
            let _ = active.activation.watcher.remove(socket.fd());
        }
    }

    fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref().map(|active| &active.activation))
    }

    fn on_kick(&mut self, _queue: u16) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        self.submit_all()
    }

    fn on_event(&mut self, token: u32, ready: EventSet) -> Result<Progress, DeviceError> {
        if token != SOCKET || self.active.is_none() {
            return Ok(Progress::Done);
        }
        // The socket stays ready as long as there are more.
        self.complete()?;
        if let (Some(active), Some(socket)) = (&mut self.active, &self.socket)
            && active.blocked
            && ready.contains(EventSet::OUT)
        {
            active.blocked = false;
            active
                .activation
                .watcher
                .modify(socket.fd(), SOCKET, EventSet::IN)
                .map_err(DeviceError::Watch)?;
        }
        // Replies and a writable socket make way for requests that wait.
        self.submit_all()
    }

    /// Waits for answers, for a while: a server whose own file system hangs must not hold up the
    /// pause for ever. What is not answered by then stays at the server.
    fn drain(&mut self) -> bool {
        let end = Instant::now() + DRAIN;
        while self.active.as_ref().is_some_and(|a| !a.pending.is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            let ready = self.socket.as_ref().is_some_and(|socket| socket.wait(left));
            if !ready || self.complete().is_err() {
                return false;
            }
        }
        true
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Fs(FsState {
            tag: self.tag.clone(),
            counters: self.counters,
        })
    }
}
