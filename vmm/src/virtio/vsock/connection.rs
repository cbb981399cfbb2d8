//! One stream between a Unix socket client on the host and a port of the guest.
//!
//! ```text
//!  accept ─▶ Handshake ─"CONNECT n"─▶ Dialing ─REQUEST sent─▶ Requested ─RESPONSE─▶ Open
//!               │                        │                       │                   │
//!   2 s, EOF,   │             2 s, EOF   │     RESET from guest  │      RESET from guest
//!   bad line    ▼                        ▼                       ▼                   ▼
//!              Over ◀────────────────────┴───────────────────────┘   ┌──────────▶ Flushing
//!               ▲                                                    │               │
//!               └────────── all data of the guest written, or client gone ◀──────────┘
//!                                                                    │
//!  2 s, EOF (Requested), guest misbehaves, SHUTDOWN of both ─▶ Aborting ─RESET sent──┘
//! ```
//!
//! Each direction ends by itself. A client that shuts down writing makes a
//! SHUTDOWN with the SEND flag after its last byte; a guest's SHUTDOWN with SEND
//! shuts down the socket for writing after the guest's last byte. A client that
//! is gone adds RECEIVE at once. When both flags went to the guest it has 2 s to
//! answer with RESET.
//!
//! Nothing here blocks or polls. Readiness is edge-triggered: `readable` stays
//! set until a read says `WouldBlock`, so a client that waits for credit or for
//! buffers of the guest causes no events meanwhile.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::packet::{
    Fragments, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// How many bytes of the guest are kept for a client that does not read.
pub const BUFFER_SIZE: u32 = 64 * 1024;
/// How long a handshake, a connect or an orderly end may take.
pub const TIMEOUT: Duration = Duration::from_secs(2);

/// The guest hears of free buffer space when this much came free.
const UPDATE_STEP: u32 = BUFFER_SIZE / 4;
/// `CONNECT 4294967295\n` and some room.
const MAX_LINE: usize = 32;
/// A drained buffer above this capacity is given back.
const IDLE_CAPACITY: usize = 4096;

/// Where a connection is in its life; see the module's diagram.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Handshake(Vec<u8>),
    Dialing,
    Requested,
    Open,
    Aborting,
    Flushing,
    Over,
}

/// What epoll reported for the client's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostEvents {
    /// Bytes, or the end of them, may be there.
    pub readable: bool,
    /// The client is gone or both directions are shut down.
    pub hung_up: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    guest_cid: u64,
    host_port: u32,
    guest_port: u32,
    phase: Phase,
    deadline: Option<Instant>,

    /// A read may bring bytes or the end.
    readable: bool,
    /// The client will send no more.
    client_eof: bool,
    /// The client will receive no more.
    client_gone: bool,

    /// Bytes of the guest that the client did not take yet.
    buffer: VecDeque<u8>,
    /// Bytes that left the buffer, as the guest counts them.
    forwarded: Wrapping<u32>,
    /// The last value of `forwarded` that went to the guest.
    advertised: Wrapping<u32>,
    /// The guest asked for our credit.
    update_asked: bool,
    /// SHUTDOWN flags received.
    guest_shutdown: u32,
    /// The socket was shut down for writing.
    write_closed: bool,
    /// It was shut down for both. Each time is an event, also of one that is shut down already.
    hung_up: bool,

    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    /// The guest's buffer size.
    peer_alloc: u32,
    /// What left the guest's buffer.
    peer_forwarded: Wrapping<u32>,
    /// The guest knows that we wait for its credit.
    credit_asked: bool,
    /// SHUTDOWN flags sent.
    shutdown_sent: u32,
}

impl Connection {
    /// Takes over a client's socket, which must be non-blocking.
    #[must_use]
    pub fn new(stream: UnixStream, guest_cid: u64, host_port: u32, now: Instant) -> Self {
        Self {
            stream,
            guest_cid,
            host_port,
            guest_port: 0,
            phase: Phase::Handshake(Vec::new()),
            deadline: Some(now + TIMEOUT),
            readable: false,
            client_eof: false,
            client_gone: false,
            buffer: VecDeque::new(),
            forwarded: Wrapping(0),
            advertised: Wrapping(0),
            update_asked: false,
            guest_shutdown: 0,
            write_closed: false,
            hung_up: false,
            sent: Wrapping(0),
            peer_alloc: 0,
            peer_forwarded: Wrapping(0),
            credit_asked: false,
            shutdown_sent: 0,
        }
    }

    /// Returns the guest's port; 0 until the client named it.
    #[must_use]
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// Returns when [`Connection::expire`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Tells whether the connection can be dropped.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Tells whether packets of the guest still belong to this connection.
    #[must_use]
    pub fn is_known_to_guest(&self) -> bool {
        matches!(self.phase, Phase::Requested | Phase::Open | Phase::Aborting)
    }

    /// Tells whether [`Connection::next_packet`] has something to try.
    #[must_use]
    pub fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Dialing | Phase::Aborting => true,
            Phase::Open => {
                self.shutdown_owed() != 0
                    || self.update_due()
                    || (self.may_read() && (self.credit() > 0 || !self.credit_asked))
            }
            Phase::Handshake(_) | Phase::Requested | Phase::Flushing | Phase::Over => false,
        }
    }

    /// Acts on news about the client's socket.
    pub fn on_host_events(&mut self, events: HostEvents, now: Instant) {
        self.readable |= events.readable || events.hung_up;
        match self.phase {
            Phase::Handshake(_) => {
                self.read_line(now);
                if events.hung_up {
                    self.end();
                }
            }
            Phase::Dialing if events.hung_up => self.end(),
            Phase::Requested if events.hung_up => self.abort(),
            Phase::Dialing | Phase::Requested | Phase::Over => {}
            Phase::Open | Phase::Aborting | Phase::Flushing => {
                if events.hung_up {
                    self.lose_client();
                }
                self.flush();
            }
        }
    }

    /// Acts on a packet of the guest, whose addresses are this connection's.
    pub fn on_guest_packet(&mut self, header: &Header, body: &Fragments<'_>) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        let op = Op::from_raw(header.op).filter(|_| header.kind == TYPE_STREAM);
        match (&self.phase, op) {
            (Phase::Aborting, Some(Op::Reset)) => {
                // The guest is through with it: our own RESET would meet nobody.
                self.phase = Phase::Flushing;
                self.flush();
            }
            (Phase::Aborting, _) => {}
            (Phase::Requested, Some(Op::Reset)) => self.end(),
            (Phase::Requested, Some(Op::Response)) => self.open(),
            (Phase::Open, Some(Op::Reset)) => {
                self.phase = Phase::Flushing;
                self.deadline = None;
                self.flush();
            }
            (Phase::Open, Some(Op::Data)) if self.guest_shutdown & SHUTDOWN_SEND == 0 => {
                self.receive(body);
            }
            (Phase::Open, Some(Op::Shutdown)) => self.on_guest_shutdown(header.flags),
            (Phase::Open, Some(Op::CreditUpdate)) => {}
            (Phase::Open, Some(Op::CreditRequest)) => self.update_asked = true,
            _ => self.abort(),
        }
    }

    /// Makes the next packet for the guest, with data in `body`. None: there is
    /// nothing to say after all.
    pub fn next_packet(&mut self, body: &mut Fragments<'_>, now: Instant) -> Option<Header> {
        match self.phase {
            Phase::Dialing => {
                self.phase = Phase::Requested;
                Some(self.header(Op::Request))
            }
            Phase::Aborting => {
                self.phase = Phase::Flushing;
                let header = self.header(Op::Reset);
                self.flush();
                Some(header)
            }
            Phase::Open => {
                if let Some(header) = self.read_data(body) {
                    return Some(header);
                }
                let owed = self.shutdown_owed();
                if owed != 0 {
                    self.shutdown_sent |= owed;
                    if self.shutdown_sent == SHUTDOWN_BOTH {
                        self.deadline = Some(now + TIMEOUT);
                    }
                    let flags = self.shutdown_sent;
                    return Some(Header {
                        flags,
                        ..self.header(Op::Shutdown)
                    });
                }
                if self.may_read() && self.credit() == 0 && !self.credit_asked {
                    self.credit_asked = true;
                    return Some(self.header(Op::CreditRequest));
                }
                self.update_due().then(|| self.header(Op::CreditUpdate))
            }
            Phase::Handshake(_) | Phase::Requested | Phase::Flushing | Phase::Over => None,
        }
    }

    /// Acts on the passing of the deadline.
    pub fn expire(&mut self) {
        self.deadline = None;
        match self.phase {
            Phase::Handshake(_) | Phase::Dialing => self.end(),
            Phase::Requested | Phase::Open => self.abort(),
            Phase::Aborting | Phase::Flushing | Phase::Over => {}
        }
    }

    /// Tells whether events about room in the socket matter.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Returns the client's socket, for watching it.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Ends the connection with a RESET, after the client got what the guest sent.
    pub fn abort(&mut self) {
        self.phase = Phase::Aborting;
        self.deadline = None;
        self.flush();
    }

    /// Reads the client's `CONNECT <port>\n` byte by byte: what follows is data.
    fn read_line(&mut self, now: Instant) {
        let Phase::Handshake(line) = &mut self.phase else {
            return;
        };
        let mut byte = [0];
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) if line.len() < MAX_LINE => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return;
                }
                _ => return self.end(),
            }
        }
        match parse_connect(line) {
            Some(port) => {
                self.guest_port = port;
                self.phase = Phase::Dialing;
                self.deadline = Some(now + TIMEOUT);
            }
            None => self.end(),
        }
    }

    fn open(&mut self) {
        // Nothing was written before, so the socket's buffer has room for it.
        let answer = format!("OK {}\n", self.host_port);
        match self.stream.write(answer.as_bytes()) {
            Ok(count) if count == answer.len() => {
                self.phase = Phase::Open;
                self.deadline = None;
            }
            _ => self.abort(),
        }
    }

    /// Passes data on to the client; what it does not take is kept.
    fn receive(&mut self, body: &Fragments<'_>) {
        if body.len() > BUFFER_SIZE as usize - self.buffer.len() {
            // The guest ignores our credit.
            return self.abort();
        }
        if self.client_gone {
            self.forwarded += Wrapping(body.len() as u32);
            return;
        }
        let mut taken = 0;
        if self.buffer.is_empty() {
            match body.drain_to(&mut self.stream) {
                Ok(count) => taken = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.lose_client();
                    taken = body.len();
                }
            }
            self.forwarded += Wrapping(taken as u32);
        }
        if taken < body.len() {
            self.buffer.reserve(body.len() - taken);
            body.copy_after(taken, |bytes| self.buffer.extend(bytes));
        }
    }

    fn on_guest_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            return self.abort();
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // The client's writes fail from now on. That it may be gone changes nothing.
            let _ = self.stream.shutdown(Shutdown::Read);
            self.client_eof = true;
        }
        self.flush();
    }

    /// Writes what is kept for the client, and ends what can end then.
    fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match self.stream.write(front) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.forwarded += Wrapping(count as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.lose_client(),
            }
        }
        if self.buffer.capacity() > IDLE_CAPACITY {
            self.buffer = VecDeque::new();
        }
        match self.phase {
            Phase::Open if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_closed => {
                self.write_closed = true;
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            // The RESET may have to wait for the guest; the client need not.
            Phase::Aborting if !self.hung_up => {
                self.hung_up = true;
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            Phase::Flushing => self.end(),
            _ => {}
        }
    }

    fn end(&mut self) {
        self.phase = Phase::Over;
        self.deadline = None;
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn lose_client(&mut self) {
        self.client_gone = true;
        self.forwarded += Wrapping(self.buffer.len() as u32);
        self.buffer = VecDeque::new();
    }

    /// Reads data of the client into a packet, as far as the guest's credit goes.
    fn read_data(&mut self, body: &mut Fragments<'_>) -> Option<Header> {
        let credit = self.credit();
        if !self.may_read() || credit == 0 || body.is_empty() {
            return None;
        }
        match body.fill_from(&mut self.stream, credit as usize) {
            Ok(0) => self.client_eof = true,
            Ok(count) => {
                let count = count as u32;
                self.sent += Wrapping(count);
                return Some(Header {
                    len: count,
                    ..self.header(Op::Data)
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.client_eof = true;
                self.lose_client();
            }
        }
        None
    }

    fn may_read(&self) -> bool {
        self.readable && !self.client_eof
    }

    /// Returns how many bytes the guest can take. A guest that claims to have
    /// forwarded what was never sent gets nothing.
    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.peer_forwarded).0;
        self.peer_alloc.saturating_sub(in_flight)
    }

    fn shutdown_owed(&self) -> u32 {
        let send = if self.client_eof { SHUTDOWN_SEND } else { 0 };
        // A guest that ended its direction needs no word that nobody receives,
        // but the flags of both directions are what ends the connection.
        let matters = self.client_eof || self.guest_shutdown & SHUTDOWN_SEND == 0;
        let receive = if self.client_gone && matters {
            SHUTDOWN_RECEIVE
        } else {
            0
        };
        (send | receive) & !self.shutdown_sent
    }

    fn update_due(&self) -> bool {
        let unknown = (self.forwarded - self.advertised).0;
        self.update_asked || (unknown >= UPDATE_STEP && self.guest_shutdown & SHUTDOWN_SEND == 0)
    }

    /// Makes a header; each carries our credit.
    fn header(&mut self, op: Op) -> Header {
        self.advertised = self.forwarded;
        self.update_asked = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: BUFFER_SIZE,
            fwd_cnt: self.forwarded.0,
        }
    }
}

fn parse_connect(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    port.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Connection {
        let (stream, _) = UnixStream::pair().unwrap();
        Connection::new(stream, 3, 1, Instant::now())
    }

    /// Numbers near where 32 bits end or change their sign.
    fn positions() -> impl Iterator<Item = u64> {
        [0, 1 << 31, 1 << 32, 1 << 33]
            .into_iter()
            .flat_map(|edge: u64| edge.saturating_sub(3)..edge + 3)
    }

    /// Counters of 32 bits, against some that count without end.
    #[test]
    fn the_credit_is_what_the_guest_has_room_for_at_each_edge() {
        let mut connection = connection();
        for sent in positions() {
            for in_flight in positions().filter(|count| *count < 1 << 32 && *count <= sent) {
                for room in positions().filter(|count| *count < 1 << 32) {
                    connection.sent = Wrapping(sent as u32);
                    connection.peer_forwarded = Wrapping((sent - in_flight) as u32);
                    connection.peer_alloc = room as u32;
                    let wanted = room.saturating_sub(in_flight);
                    let credit = u64::from(connection.credit());
                    assert_eq!(credit, wanted, "{in_flight} of {sent} in {room}");
                }
            }
            // It has read what was never sent.
            for ahead in 1..3 {
                connection.peer_forwarded = Wrapping((sent + ahead) as u32);
                connection.peer_alloc = BUFFER_SIZE;
                assert_eq!(connection.credit(), 0);
            }
        }
    }

    #[test]
    fn the_guest_hears_of_a_quarter_that_came_free_at_each_edge() {
        let mut connection = connection();
        let step = u64::from(UPDATE_STEP);
        for forwarded in positions() {
            for unknown in [0, 1, step - 1, step, step + 1, u64::from(BUFFER_SIZE)] {
                let Some(advertised) = forwarded.checked_sub(unknown) else {
                    continue;
                };
                connection.forwarded = Wrapping(forwarded as u32);
                connection.advertised = Wrapping(advertised as u32);
                assert_eq!(connection.update_due(), unknown >= step);
                connection.guest_shutdown = SHUTDOWN_SEND;
                assert!(!connection.update_due(), "nothing comes any more");
                connection.guest_shutdown = 0;
                let header = connection.header(Op::CreditUpdate);
                assert_eq!(header.fwd_cnt, forwarded as u32);
                assert!(!connection.update_due(), "it was told");
            }
        }
    }
}
