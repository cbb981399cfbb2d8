//! The whole device, with a real Unix socket on one side and a driver that is
//! played here on the other.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::Vsock;
use super::connection::BUFFER_SIZE;
use super::device::{EVENT, RX, TX};
use super::muxer::{MAX_CONNECTIONS, MAX_RESETS};
use super::packet::{
    HEADER_SIZE, HOST_CID, Header, MAX_BODY, Op, RxBuffer, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND, TYPE_STREAM, TxPacket,
};
use crate::memory::Memory;
use crate::pluggable::Pluggable;
use crate::virtio::device::{Activation, Progress, VirtioDevice};
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::state::{DeviceState, VsockState};
use crate::virtio::test_driver::{
    self as driver, DriverQueue, Segment, memory, readable, writable,
};
use crate::virtio::watch::{Source, Watcher, decode};

const CID: u32 = 3;
const RX_MEMORY: u64 = 0x10_0000;
const RX_SIZE: usize = 4096;
const TX_MEMORY: u64 = 0x40_0000;
const TX_SIZE: u64 = 0x2_0000;
const PORT: u32 = 1024;

/// The guest, its driver and the event loop.
struct Guest {
    memory: Memory,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    device: Vsock,
    interrupt: Arc<CountingInterrupt>,
    epoll: Arc<Epoll>,
    directory: tempfile::TempDir,
    turns: usize,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::idle(|listener| Vsock::new(CID, listener).unwrap());
        guest.activate(true);
        guest.fill_rx();
        guest
    }

    fn idle(make: impl FnOnce(OwnedFd) -> Vsock) -> Self {
        let memory = memory(0x300_0000);
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        Self {
            rx: DriverQueue::new(&memory, 0, 256),
            tx: DriverQueue::new(&memory, DriverQueue::SPAN, 256),
            event: DriverQueue::new(&memory, 2 * DriverQueue::SPAN, 16),
            device: make(listener.into()),
            interrupt: Arc::default(),
            epoll: Arc::new(Epoll::new().unwrap()),
            directory,
            memory,
            turns: 0,
        }
    }

    fn activate(&mut self, event_idx: bool) {
        let queues = vec![
            self.rx.device_side(event_idx),
            self.tx.device_side(event_idx),
            self.event.device_side(event_idx),
        ];
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            features: 0,
            interrupt: Arc::clone(&self.interrupt) as _,
            watcher: Watcher::new([Arc::clone(&self.epoll)].into(), 0, 0),
        };
        self.device.activate(activation).unwrap();
    }

    /// Offers receive buffers until there are none left.
    fn fill_rx(&mut self) {
        while self.offer_rx(RX_SIZE).is_some() {}
        self.kick(RX);
    }

    fn offer_rx(&mut self, len: usize) -> Option<u16> {
        // The driver takes descriptors from the end of its free list.
        let head = self.rx.next_free()?;
        let address = RX_MEMORY + u64::from(head) * RX_SIZE as u64;
        self.rx.offer(&[writable(address, len)])
    }

    fn kick(&mut self, queue: usize) {
        driver::kick(&mut self.device, u16::try_from(queue).unwrap());
    }

    /// Lets the event loop work until nothing is ready. Returns the number of events.
    fn run(&mut self) -> usize {
        let mut count = 0;
        loop {
            let ready = driver::serve_ready(&mut self.device, &self.epoll).len();
            if ready == 0 {
                return count;
            }
            count += ready;
            self.turns += ready;
            assert!(self.turns < 1_000_000, "busy loop");
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Connects a client and lets the guest accept it.
    fn open(&mut self, alloc: u32) -> (UnixStream, Peer) {
        let mut client = self.connect();
        client.write_all(b"CONNECT 1024\n").unwrap();
        self.run();
        let (request, _) = self.receive().expect("a request");
        assert_eq!(request.op, Op::Request as u16);
        assert_eq!(request.dst_port, PORT);
        assert_eq!(request.buf_alloc, BUFFER_SIZE);
        let peer = Peer::new(&request, alloc);
        self.send(&peer.header(Op::Response), &[]);
        self.run();
        let answer = format!("OK {}\n", request.src_port);
        assert_eq!(read_now(&mut client), answer.as_bytes());
        (client, peer)
    }

    /// Takes the next packet out of the receive queue and offers the buffer again.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.take()?;
        self.offer_rx(RX_SIZE);
        if self.rx.wants_kick() {
            self.kick(RX);
        }
        Some(packet)
    }

    /// Takes the next packet and keeps the buffer.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.rx.used()?;
        let address = RX_MEMORY + u64::from(head) * RX_SIZE as u64;
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let header = Header::decode(bytes[..HEADER_SIZE].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_SIZE);
        assert_eq!(header.src_cid, HOST_CID);
        assert_eq!(header.dst_cid, u64::from(CID));
        Some((header, bytes.split_off(HEADER_SIZE)))
    }

    /// Sends a packet and waits until the device took it.
    fn send(&mut self, header: &Header, body: &[u8]) {
        let header = Header {
            len: body.len() as u32,
            ..*header
        };
        self.send_raw(&header.encode(), body);
    }

    fn send_raw(&mut self, header: &[u8], body: &[u8]) {
        let at = self.put_tx(header, body);
        self.tx
            .offer(&[
                readable(at, header.len()),
                readable(at + header.len() as u64, body.len()),
            ])
            .unwrap();
        self.kick(TX);
        while self.tx.used().is_some() {}
    }

    fn put_tx(&mut self, header: &[u8], body: &[u8]) -> u64 {
        let at = TX_MEMORY + u64::from(self.tx.next_free().unwrap()) * TX_SIZE;
        self.memory.write_slice(header, GuestAddress(at)).unwrap();
        self.memory
            .write_slice(body, GuestAddress(at + header.len() as u64))
            .unwrap();
        at
    }

    /// Leaves the device without receive buffers.
    fn use_up_rx(&mut self) {
        let stray = Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            ..Header::default()
        };
        for _ in 0..256 {
            self.send(&stray, &[]);
        }
        let mut count = 0;
        while self.take().is_some() {
            count += 1;
        }
        assert_eq!(count, 256);
    }

    fn errors(&self) -> u64 {
        self.device.counters().errors
    }
}

/// A socket of the guest.
#[derive(Debug, Clone)]
struct Peer {
    guest_port: u32,
    host_port: u32,
    alloc: u32,
    forwarded: u32,
    sent: u32,
    host_alloc: u32,
    host_forwarded: u32,
}

impl Peer {
    fn new(request: &Header, alloc: u32) -> Self {
        Self {
            guest_port: request.dst_port,
            host_port: request.src_port,
            alloc,
            forwarded: 0,
            sent: 0,
            host_alloc: request.buf_alloc,
            host_forwarded: request.fwd_cnt,
        }
    }

    fn header(&self, op: Op) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(Op::Shutdown)
        }
    }

    fn learn(&mut self, header: &Header) {
        self.host_alloc = header.buf_alloc;
        self.host_forwarded = header.fwd_cnt;
    }

    fn credit(&self) -> u32 {
        self.host_alloc - self.sent.wrapping_sub(self.host_forwarded)
    }
}

/// Reads what is there.
fn read_now(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 65536];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Tells whether the other side ended its direction.
fn at_end(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// Writes as much as fits; returns how much.
fn write_now(stream: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match stream.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    done
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 % 251) as u8).collect()
}

mod handshake {
    use super::*;

    #[test]
    fn an_accepted_client_gets_its_host_port_and_data_flows() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.header(Op::Data), b"from the guest");
        assert_eq!(read_now(&mut client), b"from the guest");
        client.write_all(b"from the host").unwrap();
        guest.run();
        let (header, body) = guest.receive().unwrap();
        assert_eq!(
            (header.op, body.as_slice()),
            (Op::Data as u16, &b"from the host"[..])
        );
        assert_eq!((header.src_port, header.dst_port), (peer.host_port, PORT));
        assert_eq!(header.fwd_cnt, 14);
    }

    #[test]
    fn bytes_after_the_connect_line_are_data() {
        let mut guest = Guest::new();
        let mut client = guest.connect();
        client.write_all(b"CONNECT 1024\nearly").unwrap();
        guest.run();
        let (request, _) = guest.receive().unwrap();
        assert!(
            guest.receive().is_none(),
            "no data before the guest accepts"
        );
        let peer = Peer::new(&request, 65536);
        guest.send(&peer.header(Op::Response), &[]);
        assert_eq!(guest.receive().unwrap().1, b"early");
    }

    #[test]
    fn a_refused_client_is_hung_up() {
        let mut guest = Guest::new();
        let mut client = guest.connect();
        client.write_all(b"CONNECT 9\n").unwrap();
        guest.run();
        let (request, _) = guest.receive().unwrap();
        guest.send(&Peer::new(&request, 0).header(Op::Reset), &[]);
        assert!(at_end(&mut client));
        assert!(guest.receive().is_none());
    }

    #[test]
    fn a_bad_line_is_hung_up() {
        for line in [
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "connect 1\n",
            "\n",
            "CONNECT 1 and then a lot of other text\n",
        ] {
            let mut guest = Guest::new();
            let mut client = guest.connect();
            client.write_all(line.as_bytes()).unwrap();
            guest.run();
            assert!(at_end(&mut client), "{line:?}");
            assert!(guest.receive().is_none(), "{line:?}");
        }
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let mut guest = Guest::new();
        let mut client = guest.connect();
        for byte in b"CONNECT 1024" {
            client.write_all(&[*byte]).unwrap();
            guest.run();
        }
        assert!(guest.receive().is_none());
        client.write_all(b"\n").unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().0.dst_port, 1024);
    }

    #[test]
    fn clients_wait_for_the_driver() {
        let mut guest = Guest::idle(|listener| Vsock::new(CID, listener).unwrap());
        let mut client = guest.connect();
        client.write_all(b"CONNECT 1024\n").unwrap();
        assert_eq!(guest.run(), 0);
        guest.activate(true);
        guest.fill_rx();
        guest.run();
        assert_eq!(guest.receive().unwrap().0.op, Op::Request as u16);
    }

    #[test]
    fn a_client_that_left_before_the_driver_came_makes_no_connection() {
        let mut guest = Guest::idle(|listener| Vsock::new(CID, listener).unwrap());
        let mut client = guest.connect();
        client.write_all(b"CONNECT 1024\n").unwrap();
        drop(client);
        guest.activate(true);
        guest.fill_rx();
        guest.run();
        assert!(guest.receive().is_none());
    }

    #[test]
    fn silent_clients_and_silent_guests_are_given_up() {
        let mut guest = Guest::new();
        let mut mute = guest.connect();
        let mut unanswered = guest.connect();
        unanswered.write_all(b"CONNECT 7\n").unwrap();
        guest.run();
        let (request, _) = guest.receive().unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(2500) {
            std::thread::sleep(Duration::from_millis(50));
            guest.run();
        }
        assert!(at_end(&mut mute));
        assert!(at_end(&mut unanswered));
        let (reset, _) = guest.receive().unwrap();
        assert_eq!(reset.op, Op::Reset as u16);
        assert_eq!(reset.src_port, request.src_port);
        assert_eq!(guest.run(), 0, "the timer is quiet again");
    }

    #[test]
    fn connections_of_the_guest_are_refused() {
        let mut guest = Guest::new();
        let request = Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: 6,
            kind: TYPE_STREAM,
            op: Op::Request as u16,
            ..Header::default()
        };
        guest.send(&request, &[]);
        let (reset, _) = guest.receive().unwrap();
        assert_eq!(reset, request.reset_reply());
    }

    #[test]
    fn a_port_can_say_how_much_memory_the_guest_wants() {
        let config = hull_proto_vmm::Pluggable {
            mib: 1024,
            port: 0x1000_0000,
        };
        let (_, pluggable) =
            Pluggable::new(&memory(0x20000), config, crate::memory::Backing::Own).unwrap();
        pluggable.bound(0, 1024);
        let mut guest = Guest::idle(|listener| {
            let vsock = Vsock::new(CID, listener).unwrap();
            vsock.hearing(Some(Arc::clone(&pluggable)))
        });
        guest.activate(true);
        guest.fill_rx();
        let request = Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: 0x1000_0000 + 200,
            kind: TYPE_STREAM,
            op: Op::Request as u16,
            ..Header::default()
        };
        guest.send(&request, &[]);
        let (reset, _) = guest.receive().unwrap();
        assert_eq!(reset, request.reset_reply(), "it is refused as any");
        assert_eq!(pluggable.requested(), 256 << 20);
        let other = Header {
            op: Op::Data as u16,
            dst_port: 0x1000_0000,
            ..request
        };
        guest.send(&other, &[]);
        assert_eq!(
            pluggable.requested(),
            256 << 20,
            "no connection is asked for"
        );
    }
}

mod ends {
    use super::*;

    #[test]
    fn the_guest_can_end_its_direction_alone() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.header(Op::Data), b"last words");
        guest.send(&peer.shutdown(SHUTDOWN_SEND), &[]);
        assert_eq!(read_now(&mut client), b"last words");
        assert!(at_end(&mut client));
        client.write_all(b"still talking").unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().1, b"still talking");
    }

    #[test]
    fn the_client_can_end_its_direction_alone() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        client.write_all(b"last words").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().1, b"last words");
        let (shutdown, _) = guest.receive().unwrap();
        assert_eq!(shutdown.op, Op::Shutdown as u16);
        assert_eq!(shutdown.flags, SHUTDOWN_SEND);
        guest.send(&peer.header(Op::Data), b"still talking");
        guest.run();
        assert_eq!(read_now(&mut client), b"still talking");
        guest.send(&peer.shutdown(SHUTDOWN_SEND), &[]);
        guest.run();
        assert!(at_end(&mut client));
    }

    #[test]
    fn both_directions_end_one_after_the_other() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.shutdown(SHUTDOWN_SEND), &[]);
        assert!(at_end(&mut client));
        client.write_all(b"reply").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().1, b"reply");
        let flags: Vec<u32> = std::iter::from_fn(|| guest.receive())
            .map(|(header, _)| header.flags)
            .collect();
        assert_eq!(
            flags.iter().fold(0, |all, some| all | some) & SHUTDOWN_SEND,
            SHUTDOWN_SEND
        );
        guest.send(&peer.header(Op::Reset), &[]);
        guest.run();
        assert!(guest.receive().is_none());
    }

    #[test]
    fn a_client_that_leaves_delivers_its_bytes_first() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        let bytes = pattern(20_000);
        client.write_all(&bytes).unwrap();
        drop(client);
        guest.run();
        let mut got = Vec::new();
        let mut flags = 0;
        while let Some((header, body)) = guest.receive() {
            got.extend(body);
            if header.op == Op::Shutdown as u16 {
                flags |= header.flags;
            }
        }
        assert_eq!(got, bytes);
        assert_eq!(flags, SHUTDOWN_BOTH);
        guest.send(&peer.header(Op::Reset), &[]);
        assert!(guest.receive().is_none());
    }

    #[test]
    fn a_guest_that_does_not_confirm_the_end_is_reset() {
        let mut guest = Guest::new();
        let (client, _) = guest.open(65536);
        drop(client);
        guest.run();
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, Op::Shutdown as u16);
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(2300) {
            std::thread::sleep(Duration::from_millis(50));
            guest.run();
        }
        assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
    }

    #[test]
    fn a_guest_that_closes_is_answered_with_a_reset() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.header(Op::Data), b"bye");
        guest.send(&peer.shutdown(SHUTDOWN_BOTH), &[]);
        assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
        assert_eq!(read_now(&mut client), b"bye");
        assert!(at_end(&mut client));
        assert!(client.write_all(b"x").is_err());
    }

    #[test]
    fn a_closed_guest_loses_no_byte_to_a_slow_reader() {
        let mut guest = Guest::new();
        let (mut client, mut peer) = guest.open(65536);
        let mut sent = Vec::new();
        // Beyond what the socket holds.
        loop {
            let chunk = pattern(4000);
            if peer.credit() < 4000 {
                break;
            }
            guest.send(&peer.header(Op::Data), &chunk);
            peer.sent += 4000;
            sent.extend(chunk);
            while let Some((header, _)) = guest.receive() {
                peer.learn(&header);
            }
        }
        guest.send(&peer.shutdown(SHUTDOWN_BOTH), &[]);
        assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
        let mut got = Vec::new();
        loop {
            let some = read_now(&mut client);
            if some.is_empty() {
                break;
            }
            got.extend(some);
            guest.run();
        }
        assert_eq!(got.len(), sent.len());
        assert_eq!(got, sent);
        assert!(at_end(&mut client));
    }

    #[test]
    fn a_guest_that_stops_receiving_breaks_the_clients_pipe() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.shutdown(SHUTDOWN_RECEIVE), &[]);
        guest.run();
        assert_eq!(
            client.write_all(b"x").unwrap_err().kind(),
            ErrorKind::BrokenPipe
        );
        guest.send(&peer.header(Op::Data), b"but it sends");
        assert_eq!(read_now(&mut client), b"but it sends");
    }

    #[test]
    fn a_reset_of_the_guest_hangs_up_the_client() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.header(Op::Reset), &[]);
        guest.run();
        assert!(at_end(&mut client));
        assert!(guest.receive().is_none(), "a reset is not answered");
    }

    #[test]
    fn a_driver_reset_hangs_up_everybody() {
        let mut guest = Guest::new();
        let (mut client, _) = guest.open(65536);
        guest.device.reset();
        assert!(guest.device.queues().is_empty());
        assert!(at_end(&mut client));
        assert_eq!(guest.run(), 0);
        assert_eq!(guest.device.on_kick(0).unwrap(), Progress::Done);
    }
}

mod credit {
    use super::*;

    #[test]
    fn the_guests_credit_is_not_exceeded() {
        let mut guest = Guest::new();
        let (mut client, mut peer) = guest.open(1000);
        client.write_all(&pattern(3000)).unwrap();
        guest.run();
        let mut got = Vec::new();
        let mut requests = 0;
        while let Some((header, body)) = guest.receive() {
            got.extend(body);
            requests += usize::from(header.op == Op::CreditRequest as u16);
        }
        assert_eq!(got.len(), 1000);
        assert_eq!(requests, 1, "the device asks for credit, once");
        assert_eq!(guest.run(), 0, "and waits without events");
        peer.forwarded = 600;
        guest.send(&peer.header(Op::CreditUpdate), &[]);
        while let Some((_, body)) = guest.receive() {
            got.extend(body);
        }
        assert_eq!(got.len(), 1600);
        peer.forwarded = 1600;
        peer.alloc = 65536;
        guest.send(&peer.header(Op::CreditUpdate), &[]);
        while let Some((_, body)) = guest.receive() {
            got.extend(body);
        }
        assert_eq!(got, pattern(3000));
    }

    #[test]
    fn a_guest_without_credit_is_told_when_the_client_reads() {
        let mut guest = Guest::new();
        let (mut client, mut peer) = guest.open(65536);
        let mut sent = 0usize;
        loop {
            while let Some((header, _)) = guest.receive() {
                assert_eq!(header.op, Op::CreditUpdate as u16);
                peer.learn(&header);
            }
            let count = peer.credit().min(8192);
            if count == 0 {
                break;
            }
            guest.send(&peer.header(Op::Data), &vec![7; count as usize]);
            peer.sent += count;
            sent += count as usize;
        }
        assert!(sent > BUFFER_SIZE as usize);
        assert_eq!(
            guest.run(),
            0,
            "a client that does not read causes no events"
        );
        let mut got = 0;
        loop {
            let some = read_now(&mut client).len();
            got += some;
            guest.run();
            if some == 0 {
                break;
            }
        }
        assert_eq!(got, sent);
        let (update, _) = guest.receive().unwrap();
        assert_eq!(update.op, Op::CreditUpdate as u16);
        while let Some((header, _)) = guest.receive() {
            peer.learn(&header);
        }
        peer.learn(&update);
        assert!(peer.credit() >= BUFFER_SIZE / 2);
    }

    #[test]
    fn a_credit_request_is_answered() {
        let mut guest = Guest::new();
        let (_client, peer) = guest.open(65536);
        guest.send(&peer.header(Op::CreditRequest), &[]);
        assert_eq!(guest.receive().unwrap().0.op, Op::CreditUpdate as u16);
        assert!(guest.receive().is_none());
    }

    #[test]
    fn a_guest_that_ignores_credit_is_reset() {
        let mut guest = Guest::new();
        let (_client, peer) = guest.open(65536);
        for _ in 0..40 {
            guest.send(&peer.header(Op::Data), &vec![0; MAX_BODY]);
        }
        let ops: Vec<u16> = std::iter::from_fn(|| guest.receive())
            .map(|(header, _)| header.op)
            .collect();
        assert!(ops.contains(&(Op::Reset as u16)));
    }

    #[test]
    fn a_guest_that_claims_to_have_read_what_was_never_sent_gets_nothing() {
        let mut guest = Guest::new();
        let (mut client, mut peer) = guest.open(65536);
        peer.forwarded = 1;
        guest.send(&peer.header(Op::CreditUpdate), &[]);
        client.write_all(b"data").unwrap();
        guest.run();
        let (header, _) = guest.receive().unwrap();
        assert_eq!(header.op, Op::CreditRequest as u16);
        assert!(guest.receive().is_none());
    }
}

mod many {
    use super::*;

    #[test]
    fn connections_take_turns() {
        let mut guest = Guest::new();
        let mut open: Vec<_> = (0..8).map(|_| guest.open(1 << 20)).collect();
        guest.use_up_rx();
        for (client, _) in &mut open {
            write_now(client, &pattern(100_000));
        }
        guest.run();
        assert!(guest.take().is_none());
        guest.fill_rx();
        let mut order = Vec::new();
        while let Some((header, _)) = guest.take() {
            order.push(header.src_port);
        }
        let last_round = &order[order.len() - 8..];
        let ports: std::collections::HashSet<_> = last_round.iter().collect();
        assert_eq!(ports.len(), 8, "{order:?}");
    }

    #[test]
    fn one_client_too_many_is_hung_up() {
        raise_file_limit();
        let mut guest = Guest::new();
        let mut clients = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            clients.push(guest.connect());
            guest.run();
        }
        let mut extra = guest.connect();
        guest.run();
        assert!(at_end(&mut extra));
        clients.pop();
        guest.run();
        let mut another = guest.connect();
        another.write_all(b"CONNECT 5\n").unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().0.dst_port, 5);
    }

    fn raise_file_limit() {
        use rustix::process::{Resource, Rlimit, setrlimit};

        let limit = Some(8192);
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        );
    }

    #[test]
    fn answers_to_strays_are_bounded_and_resume() {
        let mut guest = Guest::new();
        guest.use_up_rx();
        // The answers pile up to their limit.
        for _ in 0..MAX_RESETS {
            guest.send(&stray(2), &[]);
        }
        let at = guest.put_tx(&stray(3).encode(), &[]);
        guest.tx.offer(&[readable(at, HEADER_SIZE)]).unwrap();
        guest.kick(TX);
        assert!(guest.tx.used().is_none(), "the device stops listening");
        let mut answers = 0;
        guest.fill_rx();
        while guest.take().is_some() {
            answers += 1;
        }
        guest.fill_rx();
        assert!(guest.tx.used().is_some(), "and goes on when there is room");
        while guest.take().is_some() {
            answers += 1;
        }
        assert_eq!(answers, MAX_RESETS + 1);
    }

    fn stray(port: u32) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: port,
            dst_port: 77,
            kind: TYPE_STREAM,
            op: Op::Data as u16,
            ..Header::default()
        }
    }
}

mod hostile {
    use super::*;

    #[test]
    fn a_length_beyond_the_chain_resets_the_connection() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        for len in [6, u32::MAX, MAX_BODY as u32 + 1] {
            let header = Header {
                len,
                ..peer.header(Op::Data)
            };
            guest.send_raw(&header.encode(), b"hello");
        }
        assert_eq!(guest.errors(), 3);
        assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
        guest.run();
        assert!(at_end(&mut client));
    }

    #[test]
    fn bytes_beyond_the_length_are_not_data() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        let header = Header {
            len: 4,
            ..peer.header(Op::Data)
        };
        guest.send_raw(&header.encode(), b"truegarbage");
        assert_eq!(read_now(&mut client), b"true");
    }

    #[test]
    fn packets_of_and_for_others_are_dropped() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        for (src_cid, dst_cid) in [(4, 2), (3, 1), (2, 3), (u64::MAX, 2), (3 + (1 << 32), 2)] {
            let header = Header {
                src_cid,
                dst_cid,
                ..peer.header(Op::Data)
            };
            guest.send(&header, b"x");
        }
        assert_eq!(guest.errors(), 5);
        assert!(guest.receive().is_none());
        assert!(read_now(&mut client).is_empty());
    }

    #[test]
    fn what_is_out_of_turn_resets_the_connection() {
        let wrong: [fn(&Peer) -> Header; 6] = [
            |peer| peer.header(Op::Request),
            |peer| peer.header(Op::Response),
            |peer| Header {
                op: 99,
                ..peer.header(Op::Data)
            },
            |peer| Header {
                op: 0,
                ..peer.header(Op::Data)
            },
            |peer| Header {
                kind: 2,
                ..peer.header(Op::Data)
            },
            |peer| Header {
                kind: 0,
                ..peer.header(Op::CreditUpdate)
            },
        ];
        for make in wrong {
            let mut guest = Guest::new();
            let (mut client, peer) = guest.open(65536);
            guest.send(&make(&peer), &[]);
            assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
            guest.run();
            assert!(at_end(&mut client));
        }
    }

    #[test]
    fn data_after_the_end_of_data_resets_the_connection() {
        let mut guest = Guest::new();
        let (_client, peer) = guest.open(65536);
        guest.send(&peer.shutdown(SHUTDOWN_SEND), &[]);
        guest.send(&peer.header(Op::Data), b"more");
        assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
    }

    #[test]
    fn data_for_a_connection_that_is_over_is_answered_with_a_reset() {
        let mut guest = Guest::new();
        let (_client, peer) = guest.open(65536);
        guest.send(&peer.shutdown(SHUTDOWN_BOTH), &[]);
        assert_eq!(guest.receive().unwrap().0.op, Op::Reset as u16);
        guest.send(&peer.header(Op::Data), b"late");
        assert_eq!(
            guest.receive().unwrap().0,
            peer.header(Op::Data).reset_reply()
        );
    }

    #[test]
    fn another_guest_port_is_another_connection() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        let other = Header {
            src_port: PORT + 1,
            ..peer.header(Op::Reset)
        };
        guest.send(&other, &[]);
        guest.send(&peer.header(Op::Data), b"alive");
        assert_eq!(read_now(&mut client), b"alive");
    }

    #[test]
    fn empty_data_and_empty_shutdown_do_nothing() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.send(&peer.header(Op::Data), &[]);
        guest.send(&peer.shutdown(0), &[]);
        guest.send(&peer.shutdown(!SHUTDOWN_BOTH), &[]);
        guest.send(&peer.header(Op::Data), b"alive");
        assert_eq!(read_now(&mut client), b"alive");
        assert!(guest.receive().is_none());
    }

    #[test]
    fn chains_that_are_no_packets_are_returned() {
        let mut guest = Guest::new();
        let beyond = 0x1000_0000_0000;
        let chains: [&[Segment]; 6] = [
            &[readable(TX_MEMORY, HEADER_SIZE - 1)],
            &[readable(TX_MEMORY, 0)],
            &[readable(beyond, HEADER_SIZE)],
            &[readable(u64::MAX - 8, HEADER_SIZE)],
            &[writable(TX_MEMORY, HEADER_SIZE)],
            &[readable(TX_MEMORY, HEADER_SIZE), writable(TX_MEMORY, 100)],
        ];
        for chain in chains {
            guest.tx.offer(chain).unwrap();
        }
        guest.tx.offer_loop(readable(TX_MEMORY, 1)).unwrap();
        let many: Vec<Segment> = (0..200).map(|_| readable(TX_MEMORY, 1)).collect();
        guest.tx.offer_indirect(TX_MEMORY + 0x1000, &many).unwrap();
        guest.kick(TX);
        let mut returned = 0;
        while guest.tx.used().is_some() {
            returned += 1;
        }
        assert_eq!(returned, 8);
        assert_eq!(guest.errors(), 8);
        assert!(guest.receive().is_none());
    }

    #[test]
    fn receive_buffers_without_room_are_returned_empty() {
        let mut guest = Guest::idle(|listener| Vsock::new(CID, listener).unwrap());
        guest.activate(true);
        guest.rx.offer(&[writable(RX_MEMORY, HEADER_SIZE)]).unwrap();
        guest.rx.offer(&[readable(RX_MEMORY, 4096)]).unwrap();
        guest.rx.offer(&[writable(0x1000_0000_0000, 4096)]).unwrap();
        guest.offer_rx(RX_SIZE).unwrap();
        let mut client = guest.connect();
        client.write_all(b"CONNECT 1\n").unwrap();
        guest.run();
        for _ in 0..3 {
            assert_eq!(guest.rx.used().unwrap().1, 0);
        }
        assert_eq!(guest.take().unwrap().0.op, Op::Request as u16);
        assert_eq!(guest.errors(), 3);
    }

    #[test]
    fn any_split_of_a_packet_is_a_packet() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        let header = Header {
            len: 5,
            ..peer.header(Op::Data)
        };
        for cut in 1..HEADER_SIZE + 5 {
            let at = guest.put_tx(&header.encode(), b"hello");
            guest
                .tx
                .offer(&[
                    readable(at, cut),
                    readable(at, 0),
                    readable(at + cut as u64, HEADER_SIZE + 5 - cut),
                ])
                .unwrap();
            guest.kick(TX);
            guest.tx.used().unwrap();
            assert_eq!(read_now(&mut client), b"hello", "cut at {cut}");
        }
        // One descriptor, in an indirect table.
        let at = guest.put_tx(&header.encode(), b"hello");
        guest
            .tx
            .offer_indirect(at + 0x1000, &[readable(at, HEADER_SIZE + 5)])
            .unwrap();
        guest.kick(TX);
        assert_eq!(read_now(&mut client), b"hello");
    }

    #[test]
    fn a_split_receive_buffer_is_filled_in_order() {
        let mut guest = Guest::new();
        let (mut client, _) = guest.open(65536);
        guest.use_up_rx();
        let at = RX_MEMORY;
        let pieces = [
            writable(at, 10),
            writable(at + 10, HEADER_SIZE),
            writable(at + 10 + HEADER_SIZE as u64, 100),
        ];
        guest.rx.offer(&pieces).unwrap();
        client.write_all(&pattern(100)).unwrap();
        guest.run();
        let (_, len) = guest.rx.used().unwrap();
        let mut bytes = vec![0; len as usize];
        guest
            .memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        assert_eq!(&bytes[HEADER_SIZE..], pattern(100));
    }

    #[test]
    fn a_ring_that_runs_ahead_breaks_the_device() {
        let mut guest = Guest::new();
        let avail = DriverQueue::SPAN + 0x4000;
        guest
            .memory
            .write_obj(1000u16, GuestAddress(avail + 2))
            .unwrap();
        assert!(guest.device.on_kick(TX as u16).is_err());
    }
}

mod device {
    use super::*;

    #[test]
    fn the_configuration_is_the_cid() {
        let guest = Guest::new();
        assert_eq!(guest.device.config(), 3u64.to_le_bytes());
    }

    #[test]
    fn only_a_guests_cid_is_taken() {
        for cid in [0, 1, 2, u32::MAX] {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("s")).unwrap();
            assert!(Vsock::new(cid, listener.into()).is_err());
        }
    }

    #[test]
    fn a_restored_guest_hears_that_its_connections_are_gone() {
        let mut guest = Guest::new();
        let (_client, first) = guest.open(65536);
        let DeviceState::Vsock(state) = guest.device.state() else {
            panic!("another device's state");
        };
        let json = serde_json::to_string(&state).unwrap();
        let state: VsockState = serde_json::from_str(&json).unwrap();
        for early in [true, false] {
            let mut clone = Guest::idle(|listener| Vsock::restore(&state, listener).unwrap());
            if early {
                clone.event.offer(&[writable(0x30_0000, 8)]).unwrap();
            }
            clone
                .memory
                .write_obj(u32::MAX, GuestAddress(0x30_0000))
                .unwrap();
            clone.activate(true);
            if !early {
                clone.event.offer(&[writable(0x30_0000, 8)]).unwrap();
                clone.kick(EVENT);
            }
            assert_eq!(clone.event.used().unwrap().1, 4);
            let event: u32 = clone.memory.read_obj(GuestAddress(0x30_0000)).unwrap();
            assert_eq!(event, 0);
            assert_eq!(clone.interrupt.queue.load(Ordering::SeqCst), 1);
            // What it gets before it has dropped its connections, it would drop too.
            clone.fill_rx();
            let mut waiting = clone.connect();
            waiting.write_all(b"CONNECT 1024\n").unwrap();
            clone.run();
            clone.kick(EVENT);
            assert!(clone.rx.used().is_none(), "it has not dropped them");
            clone.event.offer(&[writable(0x30_0000, 8)]).unwrap();
            clone.kick(EVENT);
            assert!(clone.event.used().is_none(), "once");
            assert_eq!(clone.receive().unwrap().0.op, Op::Request as u16);
            let (_client, second) = clone.open(65536);
            assert_ne!(first.host_port, second.host_port);
        }
    }

    #[test]
    fn interrupts_come_only_when_the_driver_wants_them() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(65536);
        guest.rx.set_used_event(u16::MAX - 1);
        guest.tx.set_used_event(u16::MAX - 1);
        let before = guest.interrupt.queue.load(Ordering::SeqCst);
        guest.send(&peer.header(Op::Data), b"quiet");
        client.write_all(b"quiet").unwrap();
        guest.run();
        assert!(guest.receive().is_some());
        assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), before);
        let seen = guest.rx.seen();
        guest.rx.set_used_event(seen);
        client.write_all(b"loud").unwrap();
        guest.run();
        assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), before + 1);
    }

    #[test]
    fn a_driver_without_event_indices_is_interrupted_only_for_something() {
        let mut guest = Guest::idle(|listener| Vsock::new(CID, listener).unwrap());
        guest.activate(false);
        guest.kick(TX);
        let _client = guest.connect();
        guest.run();
        assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), 0);
        guest.send(&Header::default(), &[]);
        assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_flood_of_the_guest_leaves_room_for_the_host() {
        let mut guest = Guest::new();
        let (mut client, peer) = guest.open(1 << 20);
        let at = guest.put_tx(&peer.header(Op::CreditUpdate).encode(), &[]);
        while guest.tx.offer(&[readable(at, HEADER_SIZE)]).is_some() {}
        client.write_all(b"urgent").unwrap();
        // One turn of the loop: the socket is ready, and the queue is full.
        let mut events = [EpollEvent::default(); 4];
        assert_eq!(guest.epoll.wait(0, &mut events).unwrap(), 1);
        let (_, _, Source::Device(token)) = decode(events[0].data()) else {
            panic!("a kick");
        };
        let progress = guest.device.on_event(token, events[0].event_set()).unwrap();
        assert_eq!(progress, Progress::More(TX as u16));
        assert_eq!(guest.receive().unwrap().1, b"urgent");
    }

    #[test]
    fn a_guest_without_buffers_causes_no_events_and_goes_on_later() {
        for event_idx in [true, false] {
            let mut guest = Guest::idle(|listener| Vsock::new(CID, listener).unwrap());
            guest.activate(event_idx);
            let mut client = guest.connect();
            client.write_all(b"CONNECT 1024\n").unwrap();
            guest.run();
            assert_eq!(guest.run(), 0);
            guest.offer_rx(RX_SIZE).unwrap();
            assert!(!event_idx || guest.rx.wants_kick());
            guest.kick(RX);
            let (request, _) = guest.take().unwrap();
            guest.send(&Peer::new(&request, 1 << 20).header(Op::Response), &[]);
            client.write_all(&pattern(10_000)).unwrap();
            guest.run();
            assert_eq!(guest.run(), 0);
            let mut got = Vec::new();
            while got.len() < 10_000 {
                guest.offer_rx(RX_SIZE).unwrap();
                guest.kick(RX);
                got.extend(guest.take().unwrap().1);
            }
            assert_eq!(got, pattern(10_000));
        }
    }

    #[test]
    fn a_reset_that_waits_for_buffers_causes_no_events() {
        let mut guest = Guest::new();
        let (_client, peer) = guest.open(1 << 20);
        guest.use_up_rx();
        guest.send(&peer.header(Op::Request), &[]);
        guest.run();
        assert_eq!(guest.run(), 0);
        guest.offer_rx(RX_SIZE).unwrap();
        guest.kick(RX);
        assert_eq!(guest.take().unwrap().0.op, Op::Reset as u16);
    }

    #[test]
    fn work_is_done_in_turns() {
        let mut guest = Guest::new();
        let (_client, peer) = guest.open(1 << 20);
        let mut turns = 0;
        // More packets than one turn moves, through a queue of 256.
        let at = guest.put_tx(&peer.header(Op::CreditUpdate).encode(), &[]);
        while guest.tx.offer(&[readable(at, HEADER_SIZE)]).is_some() {}
        let mut progress = guest.device.on_kick(TX as u16).unwrap();
        while let Progress::More(queue) = progress {
            turns += 1;
            progress = guest.device.on_kick(queue).unwrap();
        }
        assert_eq!(turns, 1);
        assert_eq!(guest.device.counters().requests, 2 + 256);
    }
}

mod streams {
    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        ClientWrites(usize),
        ClientReads(usize),
        GuestSends(usize),
        GuestReads(usize),
        GuestTakesPackets(usize),
        GuestOffersBuffers(usize),
        EventLoop,
        ClientEnds,
        GuestEnds,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1usize..70_000).prop_map(Step::ClientWrites),
            8 => (1usize..70_000).prop_map(Step::ClientReads),
            8 => (1usize..70_000).prop_map(Step::GuestSends),
            8 => (1usize..70_000).prop_map(Step::GuestReads),
            8 => (1usize..64).prop_map(Step::GuestTakesPackets),
            8 => (1usize..64).prop_map(Step::GuestOffersBuffers),
            8 => Just(Step::EventLoop),
            1 => Just(Step::ClientEnds),
            1 => Just(Step::GuestEnds),
        ]
    }

    /// One stream, with what each side wrote and read.
    struct World {
        guest: Guest,
        client: UnixStream,
        peer: Peer,
        client_wrote: Vec<u8>,
        client_read: Vec<u8>,
        guest_sent: Vec<u8>,
        guest_got: Vec<u8>,
        /// Bytes that the guest's program did not read yet.
        unread: u32,
        client_ended: bool,
        guest_ended: bool,
        guest_saw_end: bool,
    }

    impl World {
        fn new(alloc: u32) -> Self {
            let mut guest = Guest::new();
            let (client, peer) = guest.open(alloc);
            Self {
                guest,
                client,
                peer,
                client_wrote: Vec::new(),
                client_read: Vec::new(),
                guest_sent: Vec::new(),
                guest_got: Vec::new(),
                unread: 0,
                client_ended: false,
                guest_ended: false,
                guest_saw_end: false,
            }
        }

        fn step(&mut self, step: &Step) {
            match *step {
                Step::ClientWrites(count) if !self.client_ended => {
                    let from = self.client_wrote.len();
                    let bytes: Vec<u8> = (from..from + count).map(|at| (at % 253) as u8).collect();
                    let done = write_now(&mut self.client, &bytes);
                    self.client_wrote.extend(&bytes[..done]);
                }
                Step::ClientReads(count) => {
                    let mut bytes = vec![0; count];
                    if let Ok(count) = self.client.read(&mut bytes) {
                        self.client_read.extend(&bytes[..count]);
                    }
                }
                Step::GuestSends(count) if !self.guest_ended => {
                    let count = count.min(self.peer.credit() as usize).min(MAX_BODY);
                    let from = self.guest_sent.len();
                    let bytes: Vec<u8> = (from..from + count).map(|at| (at % 241) as u8).collect();
                    self.guest.send(&self.peer.header(Op::Data), &bytes);
                    self.peer.sent = self.peer.sent.wrapping_add(count as u32);
                    self.guest_sent.extend(bytes);
                }
                Step::GuestReads(count) => {
                    let count = self.unread.min(count as u32);
                    self.unread -= count;
                    self.peer.forwarded = self.peer.forwarded.wrapping_add(count);
                    self.guest.send(&self.peer.header(Op::CreditUpdate), &[]);
                }
                Step::GuestTakesPackets(count) => {
                    for _ in 0..count {
                        let Some((header, body)) = self.guest.take() else {
                            break;
                        };
                        self.learn(&header, &body);
                    }
                }
                Step::GuestOffersBuffers(count) => {
                    for _ in 0..count {
                        self.guest.offer_rx(RX_SIZE);
                    }
                    self.guest.kick(RX);
                }
                Step::EventLoop => {
                    self.guest.run();
                }
                Step::ClientEnds if !self.client_ended => {
                    self.client.shutdown(Shutdown::Write).unwrap();
                    self.client_ended = true;
                }
                Step::GuestEnds if !self.guest_ended => {
                    self.guest.send(&self.peer.shutdown(SHUTDOWN_SEND), &[]);
                    self.guest_ended = true;
                }
                _ => {}
            }
        }

        fn learn(&mut self, header: &Header, body: &[u8]) {
            self.peer.learn(header);
            assert!(!self.guest_saw_end || body.is_empty(), "data after the end");
            self.guest_got.extend(body);
            self.unread += body.len() as u32;
            assert!(self.unread <= self.peer.alloc, "credit exceeded");
            match Op::from_raw(header.op) {
                Some(Op::Data | Op::CreditUpdate) => {}
                Some(Op::CreditRequest) => {
                    self.guest.send(&self.peer.header(Op::CreditUpdate), &[]);
                }
                Some(Op::Shutdown) => {
                    assert_ne!(header.flags & SHUTDOWN_SEND, 0);
                    assert!(self.client_ended);
                    self.guest_saw_end = true;
                }
                other => panic!("{other:?}"),
            }
        }

        /// Lets everybody do everything until nothing moves.
        fn settle(&mut self) {
            loop {
                let before = (self.client_read.len(), self.guest_got.len());
                for step in [
                    Step::EventLoop,
                    Step::GuestOffersBuffers(256),
                    Step::GuestTakesPackets(256),
                    Step::GuestReads(1 << 30),
                    Step::ClientReads(1 << 20),
                    Step::EventLoop,
                ] {
                    self.step(&step);
                }
                if before == (self.client_read.len(), self.guest_got.len()) {
                    return;
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn both_streams_arrive_whole_and_in_order(
            alloc in prop_oneof![300u32..5000, 60_000u32..300_000],
            steps in prop::collection::vec(step(), 1..120),
        ) {
            let mut world = World::new(alloc);
            for step in &steps {
                world.step(step);
            }
            world.step(&Step::ClientEnds);
            world.settle();
            world.step(&Step::GuestEnds);
            world.settle();
            prop_assert!(world.guest_got == world.client_wrote);
            prop_assert!(world.client_read == world.guest_sent);
            prop_assert!(world.guest_saw_end);
            prop_assert!(at_end(&mut world.client));
            prop_assert_eq!(world.guest.errors(), 0);
        }

        #[test]
        fn no_packet_breaks_the_device(
            packets in prop::collection::vec(
                (any::<[u8; HEADER_SIZE]>(), any::<bool>(), any::<bool>(), 0u16..10, 0usize..200),
                1..60,
            ),
        ) {
            let mut guest = Guest::new();
            let (mut client, peer) = guest.open(65536);
            for (bytes, addressed, typed, op, len) in packets {
                let mut header = Header::decode(&bytes);
                if addressed {
                    let right = peer.header(Op::Data);
                    header = Header {
                        src_cid: right.src_cid,
                        dst_cid: right.dst_cid,
                        src_port: right.src_port,
                        dst_port: right.dst_port,
                        op,
                        ..header
                    };
                }
                if typed {
                    header.kind = TYPE_STREAM;
                    header.len = len as u32;
                }
                guest.send_raw(&header.encode(), &vec![1; len]);
                let _ = client.write(b"noise");
                guest.run();
                while guest.receive().is_some() {}
            }
            // Whatever happened, the next connection works.
            let (mut client, peer) = guest.open(65536);
            guest.send(&peer.header(Op::Data), b"fine");
            prop_assert_eq!(read_now(&mut client), b"fine");
        }
    }
}

/// What a header says and what its chain has, at all edges.
#[test]
fn a_packet_has_as_many_bytes_as_its_header_says_at_each_edge() {
    let memory = memory(0x4_0000);
    let lengths = [
        0,
        1,
        43,
        44,
        45,
        46,
        44 + MAX_BODY - 1,
        44 + MAX_BODY,
        44 + MAX_BODY + 1,
    ];
    let said = [
        0,
        1,
        2,
        MAX_BODY - 1,
        MAX_BODY,
        MAX_BODY + 1,
        0x7fff_ffff,
        0xffff_ffff,
    ];
    for length in lengths {
        for announced in said {
            let header = Header {
                len: announced as u32,
                ..Header::default()
            };
            memory
                .write_slice(&header.encode(), GuestAddress(0x1_0000))
                .unwrap();
            let mut queue = DriverQueue::new(&memory, 0, 16);
            let mut device = queue.device_side(false);
            queue.offer(&[readable(0x1_0000, length)]).unwrap();
            let chain = device.pop(&memory).unwrap().unwrap();
            let packet = TxPacket::parse(&memory, chain);
            let Some(present) = length.checked_sub(HEADER_SIZE) else {
                assert!(packet.is_err());
                continue;
            };
            let packet = packet.unwrap();
            let good = announced <= present && announced <= MAX_BODY;
            assert_eq!(packet.malformed.is_none(), good, "{announced} of {present}");
            assert_eq!(packet.body.len(), announced.min(present));
        }
        let mut queue = DriverQueue::new(&memory, 0, 16);
        let mut device = queue.device_side(false);
        queue.offer(&[writable(0x1_0000, length)]).unwrap();
        let chain = device.pop(&memory).unwrap().unwrap();
        let room = RxBuffer::parse(&memory, chain).map(|buffer| buffer.body.len());
        let wanted = length.checked_sub(HEADER_SIZE).filter(|room| *room > 0);
        assert_eq!(room.ok(), wanted.map(|room| room.min(MAX_BODY)));
    }
}
