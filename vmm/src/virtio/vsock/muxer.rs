//! All connections, and whose turn it is.
//!
//! Connections that have something for the guest stand in a queue and get a
//! packet each, in turn. Everything here is bounded: connections by
//! [`MAX_CONNECTIONS`], the queue by the connections, answers to packets that
//! belong to none by [`MAX_RESETS`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, HostEvents};
use super::packet::{Fragments, HOST_CID, Header, Op, TxPacket};
use crate::pluggable::Pluggable;
use crate::virtio::watch::Watcher;

/// The most connections at a time.
pub const MAX_CONNECTIONS: usize = 1023;
/// The most answers to packets of no connection that wait for the guest's buffers.
pub const MAX_RESETS: usize = 256;

/// Host ports are counted up from here and wrap around within 30 bits, far from
/// the tokens of the device's other descriptors.
const FIRST_PORT: u32 = 1 << 30;

#[derive(Debug)]
struct Entry {
    connection: Connection,
    /// It stands in [`Muxer::ready`].
    queued: bool,
    /// Its socket is watched for room.
    watched_for_room: bool,
}

/// The connections of a device.
#[derive(Debug)]
pub struct Muxer {
    cid: u64,
    last_port: u32,
    watcher: Watcher,
    pluggable: Option<Arc<Pluggable>>,
    connections: HashMap<u32, Entry>,
    /// Host ports of the connections that have a packet for the guest.
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    /// No deadline is earlier than this.
    deadline: Option<Instant>,
}

impl Muxer {
    /// Creates a muxer for a guest. `last_port` is the last host port that was used.
    #[must_use]
    pub fn new(
        cid: u32,
        last_port: u32,
        watcher: Watcher,
        pluggable: Option<Arc<Pluggable>>,
    ) -> Self {
        Self {
            cid: u64::from(cid),
            last_port,
            watcher,
            pluggable,
            connections: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadline: None,
        }
    }

    /// Returns the last host port that was used.
    #[must_use]
    pub fn last_port(&self) -> u32 {
        self.last_port
    }

    /// Returns when [`Muxer::expire`] is due; it may find nothing to do then.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes a new client. One too many is hung up.
    ///
    /// # Errors
    /// When its socket can't be watched; the client is hung up too.
    pub fn accept(&mut self, stream: UnixStream, now: Instant) -> io::Result<()> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::Error::from(io::ErrorKind::QuotaExceeded));
        }
        stream.set_nonblocking(true)?;
        let port = self.next_port();
        let connection = Connection::new(stream, self.cid, port, now);
        self.watcher.add(connection.fd(), port, events(false))?;
        self.connections.insert(
            port,
            Entry {
                connection,
                queued: false,
                watched_for_room: false,
            },
        );
        self.last_port = port;
        self.update(port);
        Ok(())
    }

    /// Acts on an event of a client's socket. Ports of no connection are ignored:
    /// the event may be older than the connection's end.
    pub fn on_host_event(&mut self, port: u32, ready: EventSet, now: Instant) {
        let Some(entry) = self.connections.get_mut(&port) else {
            return;
        };
        let hung_up = ready.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let events = HostEvents {
            readable: ready.intersects(EventSet::IN | EventSet::READ_HANG_UP),
            hung_up,
        };
        entry.connection.on_host_events(events, now);
        self.update(port);
    }

    /// Tells whether another packet of the guest can be answered.
    #[must_use]
    pub fn can_receive(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Acts on a packet of the guest. False: it was malformed or not ours.
    pub fn receive(&mut self, packet: &TxPacket<'_>) -> bool {
        let header = &packet.header;
        if header.dst_cid != HOST_CID || header.src_cid != self.cid {
            return false;
        }
        let port = header.dst_port;
        let owner = self.connections.get_mut(&port).filter(|entry| {
            entry.connection.is_known_to_guest() && entry.connection.guest_port() == header.src_port
        });
        if let Some(entry) = owner {
            if packet.malformed.is_some() {
                entry.connection.abort();
            } else {
                entry.connection.on_guest_packet(header, &packet.body);
            }
            self.update(port);
        } else if header.op != Op::Reset as u16 && self.can_receive() {
            // Nobody listens on the host, so a REQUEST ends here too. Its port may be what it is about.
            if header.op == Op::Request as u16
                && let Some(pluggable) = &self.pluggable
            {
                pluggable.hear(port);
            }
            self.resets.push_back(header.reset_reply());
        }
        packet.malformed.is_none()
    }

    /// Tells whether [`Muxer::next_packet`] has something to try.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Makes the next packet for the guest, with data in `body`.
    pub fn next_packet(&mut self, body: &mut Fragments<'_>, now: Instant) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(port) = self.ready.pop_front() {
            let Some(entry) = self.connections.get_mut(&port) else {
                continue;
            };
            entry.queued = false;
            let header = entry.connection.next_packet(body, now);
            self.update(port);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Ends what took too long.
    pub fn expire(&mut self, now: Instant) {
        let due: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, entry)| entry.connection.deadline().is_some_and(|at| at <= now))
            .map(|(port, _)| *port)
            .collect();
        for port in due {
            if let Some(entry) = self.connections.get_mut(&port) {
                entry.connection.expire();
            }
            self.update(port);
        }
        self.deadline = self
            .connections
            .values()
            .filter_map(|entry| entry.connection.deadline())
            .min();
    }

    /// Brings everything about a connection in line with what just happened to it.
    fn update(&mut self, port: u32) {
        let Some(entry) = self.connections.get_mut(&port) else {
            return;
        };
        let room = entry.connection.wants_write();
        if room != entry.watched_for_room && !entry.connection.is_over() {
            entry.watched_for_room = room;
            let fd = entry.connection.fd();
            if self.watcher.modify(fd, port, events(room)).is_err() {
                entry.connection.abort();
            }
        }
        if entry.connection.is_over() {
            let _ = self.watcher.remove(entry.connection.fd());
            self.connections.remove(&port);
            return;
        }
        if entry.connection.has_packet() && !entry.queued {
            entry.queued = true;
            self.ready.push_back(port);
        }
        if let Some(deadline) = entry.connection.deadline() {
            let earliest = self.deadline.map_or(deadline, |at| at.min(deadline));
            self.deadline = Some(earliest);
        }
    }

    fn next_port(&self) -> u32 {
        let mut port = self.last_port;
        loop {
            port = FIRST_PORT | (port.wrapping_add(1) & (FIRST_PORT - 1));
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }
}

/// Edge-triggered, so that a client that can't be served now wakes nobody.
fn events(room: bool) -> EventSet {
    let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room { always | EventSet::OUT } else { always }
}
