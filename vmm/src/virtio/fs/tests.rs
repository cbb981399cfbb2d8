use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hull_proto_vmm::fs::{MAX_DATA, MAX_PACKET};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::device::{HIPRIO, REQUESTS};
use super::request::{IN_HEADER, OUT_HEADER};
use super::*;
use crate::file_regions::tests::{extent, pages, regions};
use crate::memory::Memory;
use crate::virtio::device::{Activation, Progress, VirtioDevice};
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::state::DeviceState;
use crate::virtio::test_driver::{DriverQueue, Segment, memory, readable, writable};
use crate::virtio::watch::Watcher;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
/// Where requests are written, and where answers go.
const OUT: u64 = 0x20000;
const IN: u64 = 0x80000;
const MEMORY: usize = 0x200_000;

/// A device with its driver and its server.
struct Bench {
    memory: Memory,
    device: Fs,
    queues: [DriverQueue; 2],
    interrupt: Arc<CountingInterrupt>,
    server: Option<OwnedFd>,
}

fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

impl Bench {
    fn new() -> Self {
        let memory = memory(MEMORY);
        let (ours, theirs) = pair(SocketType::SEQPACKET);
        let device = Fs::new("hull", ours).unwrap();
        let queues = [
            DriverQueue::new(&memory, 0, 128),
            DriverQueue::new(&memory, DriverQueue::SPAN, 128),
        ];
        let mut bench = Self {
            memory,
            device,
            queues,
            interrupt: Arc::default(),
            server: Some(theirs),
        };
        bench.activate();
        bench
    }

    fn activate(&mut self) {
        let queues = [0, 1].map(|at| {
            self.queues[at] = DriverQueue::new(&self.memory, at as u64 * DriverQueue::SPAN, 128);
            self.memory
                .write_slice(
                    &vec![0; DriverQueue::SPAN as usize],
                    GuestAddress(at as u64 * DriverQueue::SPAN),
                )
                .unwrap();
            self.queues[at].device_side(false)
        });
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                queues: queues.into(),
                features: 0,
                interrupt: Arc::clone(&self.interrupt) as _,
                watcher: Watcher::detached().unwrap(),
            })
            .unwrap();
    }

    /// Writes a request of this length; its position in memory is by its `unique`.
    fn write(&self, opcode: u32, unique: u64, length: usize) -> Segment {
        let mut header = vec![0; IN_HEADER];
        header[..4].copy_from_slice(&(length as u32).to_le_bytes());
        header[4..8].copy_from_slice(&opcode.to_le_bytes());
        header[8..16].copy_from_slice(&unique.to_le_bytes());
        let at = OUT + unique * 0x100;
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        readable(at, length)
    }

    /// Puts a request with 64 bytes of room for its answer into the queue.
    fn ask(&mut self, unique: u64) -> u16 {
        let request = self.write(LOOKUP, unique, 50);
        let room = [
            writable(IN + unique * 0x100, 16),
            writable(IN + unique * 0x100 + 16, 48),
        ];
        self.queues[1]
            .offer(&[request, room[0], room[1]])
            .expect("room in the queue")
    }

    fn kick(&mut self) {
        while let Progress::More(_) = self.device.on_kick(REQUESTS).unwrap() {}
    }

    fn event(&mut self) {
        self.device.on_event(0, EventSet::IN).unwrap();
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; MAX_PACKET];
        let server = self.server.as_ref().unwrap();
        let (_, length) = recv(server, &mut packet[..], RecvFlags::DONTWAIT).ok()?;
        packet.truncate(length);
        Some(packet)
    }

    fn send(&self, packet: &[u8]) {
        let server = self.server.as_ref().unwrap();
        let sent = send(server, packet, SendFlags::DONTWAIT);
        assert_eq!(sent, Ok(packet.len()));
    }

    fn reply(&self, unique: u64, body: &[u8]) {
        self.send(&reply(unique, body));
    }

    /// The answer to a request: error and `unique`.
    fn answer(&self, unique: u64) -> (i32, u64) {
        let at = IN + unique * 0x100;
        (
            self.memory.read_obj(GuestAddress(at + 4)).unwrap(),
            self.memory.read_obj(GuestAddress(at + 8)).unwrap(),
        )
    }
}

fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    let mut packet = ((OUT_HEADER + body.len()) as u32).to_le_bytes().to_vec();
    packet.extend_from_slice(&0u32.to_le_bytes());
    packet.extend_from_slice(&unique.to_le_bytes());
    packet.extend_from_slice(body);
    packet
}

fn name_of(packet: &[u8]) -> u64 {
    request::unique(packet)
}

#[test]
fn the_configuration_tells_the_tag_and_one_request_queue() {
    let bench = Bench::new();
    let config = bench.device.config();
    assert_eq!(&config[..5], b"hull\0");
    assert_eq!(&config[36..40], &[1, 0, 0, 0]);
    assert_eq!(bench.device.queue_sizes().len(), 2);
}

#[test]
fn only_a_seqpacket_socket_and_a_proper_tag_make_a_device() {
    let (stream, _peer) = pair(SocketType::STREAM);
    assert!(matches!(Fs::new("hull", stream), Err(FsError::Socket(_))));
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let (packet, _peer) = pair(SocketType::SEQPACKET);
        assert!(matches!(Fs::new(tag, packet), Err(FsError::Tag(_))));
    }
    let (packet, _peer) = pair(SocketType::SEQPACKET);
    Fs::new(&"x".repeat(36), packet).unwrap();
}

#[test]
fn requests_are_answered_in_any_order() {
    let mut bench = Bench::new();
    let heads = [3, 4, 5].map(|unique| bench.ask(unique));
    bench.kick();
    let packets: Vec<_> = std::iter::from_fn(|| bench.receive()).collect();
    assert_eq!(packets.len(), 3);
    assert!(packets.iter().all(|packet| packet.len() == 50));
    assert_eq!(bench.queues[1].used(), None);
    for at in [2, 0, 1] {
        bench.reply(name_of(&packets[at]), b"0123456789abcdefXYZ");
        bench.event();
        assert_eq!(bench.queues[1].used(), Some((heads[at], 35)));
        // The guest finds its own name of the request.
        let unique = at as u64 + 3;
        assert_eq!(bench.answer(unique), (0, unique));
    }
    let mut tail = [0; 3];
    bench
        .memory
        .read_slice(&mut tail, GuestAddress(IN + 0x300 + 32))
        .unwrap();
    assert_eq!(&tail, b"XYZ");
    assert_eq!(bench.interrupt.queue.load(Ordering::SeqCst), 3);
    assert_eq!(bench.device.counters().requests, 3);
    assert_eq!(bench.device.counters().errors, 0);
}

#[test]
fn what_has_no_answer_is_complete_at_once() {
    let mut bench = Bench::new();
    for (queue, opcode) in [(0, FORGET), (1, FORGET), (0, INTERRUPT)] {
        let request = bench.write(opcode, 7, 48);
        let head = bench.queues[queue].offer(&[request]).unwrap();
        bench.device.on_kick(queue as u16).unwrap();
        assert_eq!(bench.queues[queue].used(), Some((head, 0)));
        // Interrupts end here.
        assert_eq!(bench.receive().is_some(), opcode == FORGET);
    }
    assert_eq!(bench.device.counters().errors, 0);
    assert_eq!(bench.device.on_kick(HIPRIO).unwrap(), Progress::Done);
}

#[test]
fn requests_with_one_name_are_told_apart() {
    let mut bench = Bench::new();
    let first = bench.ask(9);
    let second = bench.ask(9);
    bench.kick();
    let names = [bench.receive().unwrap(), bench.receive().unwrap()].map(|p| name_of(&p));
    assert_ne!(names[0], names[1]);
    bench.reply(names[1], &[]);
    bench.event();
    assert_eq!(bench.queues[1].used(), Some((second, 16)));
    bench.reply(names[0], &[]);
    bench.event();
    assert_eq!(bench.queues[1].used(), Some((first, 16)));
}

#[test]
fn malformed_requests_fail_and_reach_nobody() {
    let mut bench = Bench::new();
    let room = writable(IN, 64);
    let good = bench.write(LOOKUP, 1, 50);
    // A length that lies, no header, no room, nothing readable, wrong order.
    let lie = readable(bench.write(LOOKUP, 0, 60).address, 50);
    let cases: [&[Segment]; 5] = [
        &[lie, room],
        &[readable(good.address, 39), room],
        &[good],
        &[room],
        &[room, good],
    ];
    for case in cases {
        bench.queues[1].offer(case).unwrap();
    }
    // Out of memory, endless, too large.
    bench.queues[1]
        .offer(&[readable(1 << 40, 50), room])
        .unwrap();
    bench.queues[1].offer_loop(good).unwrap();
    bench.queues[1]
        .offer(&[readable(OUT, MAX_PACKET), readable(OUT, 1), room])
        .unwrap();
    bench.kick();
    let mut answered = 0;
    for _ in 0..8 {
        let (_, used) = bench.queues[1].used().unwrap();
        answered += u32::from(used == 16);
    }
    assert_eq!(answered, 3, "those with room and readable bytes get EIO");
    assert_eq!(bench.answer(0).0, -libc::EIO);
    assert_eq!(bench.device.counters().errors, 8);
    assert_eq!(bench.receive(), None);
}

#[test]
fn replies_that_are_none_become_an_error_or_nothing() {
    let mut bench = Bench::new();
    for unique in 1..4 {
        bench.ask(unique);
    }
    bench.kick();
    let names: Vec<_> = std::iter::from_fn(|| bench.receive())
        .map(|packet| name_of(&packet))
        .collect();
    // Too much for the room, a wrong length, too much for anybody.
    bench.reply(names[0], &[0; 49]);
    let mut lie = reply(names[1], &[]);
    lie[0] = 17;
    bench.send(&lie);
    bench.send(&reply(names[2], &vec![0; MAX_PACKET]));
    bench.event();
    for unique in 1..4 {
        assert_eq!(bench.queues[1].used().unwrap().1, 16);
        assert_eq!(bench.answer(unique), (-libc::EIO, unique));
    }
    // Of nobody, twice, and too short to say whose.
    bench.reply(names[0], &[]);
    bench.reply(u64::MAX, &[]);
    bench.send(&[1, 2, 3]);
    bench.event();
    assert_eq!(bench.queues[1].used(), None);
    assert_eq!(bench.device.counters().errors, 6);
}

#[test]
fn room_outside_of_memory_is_not_written() {
    let mut bench = Bench::new();
    let request = bench.write(LOOKUP, 1, 50);
    let head = bench.queues[1]
        .offer(&[request, writable(MEMORY as u64 - 8, 64)])
        .unwrap();
    bench.kick();
    let name = name_of(&bench.receive().unwrap());
    bench.reply(name, &[0; 16]);
    bench.event();
    assert_eq!(bench.queues[1].used(), Some((head, 0)));
    assert_eq!(bench.device.counters().errors, 1);
}

#[test]
fn room_in_a_file_region_is_refused() {
    let mut bench = Bench::new();
    let (_, regions, memory) = regions(&bench.memory);
    bench.device.reset();
    bench.memory = memory;
    bench.activate();
    let region = regions.map(&[extent(&pages(&[1]), 0, 1)]).unwrap();
    let request = bench.write(LOOKUP, 1, 50);
    let head = bench.queues[1]
        .offer(&[request, writable(region.start(), 64)])
        .unwrap();
    bench.kick();
    assert_eq!(bench.queues[1].used(), Some((head, 0)));
    assert_eq!(bench.device.counters().errors, 1);
}

#[test]
fn requests_wait_for_a_socket_that_is_full() {
    let mut bench = Bench::new();
    let data = MAX_DATA;
    let mut offered = 0;
    while offered < 120 {
        let request = bench.write(LOOKUP, 1, IN_HEADER + data);
        let room = writable(IN, 16);
        if bench.queues[1].offer(&[request, room]).is_none() {
            break;
        }
        offered += 1;
    }
    let mut served = 0;
    let mut rounds = 0;
    while served < offered {
        rounds += 1;
        bench.kick();
        let before = served;
        while let Some(packet) = bench.receive() {
            assert_eq!(packet.len(), IN_HEADER + data);
            bench.reply(name_of(&packet), &[]);
            served += 1;
        }
        assert!(served > before, "nothing moves after {served} requests");
        bench
            .device
            .on_event(0, EventSet::IN | EventSet::OUT)
            .unwrap();
    }
    assert!(rounds > 1, "the socket was never full");
    while !bench.device.queues().is_empty() && bench.queues[1].seen() < offered {
        bench.event();
        while bench.queues[1].used().is_some() {}
    }
    assert_eq!(bench.device.counters().errors, 0);
}

#[test]
fn without_its_server_everything_fails_and_the_device_lives() {
    let mut bench = Bench::new();
    bench.ask(1);
    bench.kick();
    bench.server = None;
    bench.event();
    assert_eq!(bench.queues[1].used().unwrap().1, 16);
    assert_eq!(bench.answer(1), (-libc::EIO, 1));
    bench.ask(2);
    bench.kick();
    assert_eq!(bench.answer(2), (-libc::EIO, 2));
    assert_eq!(bench.queues[1].used().unwrap().1, 16);
    let forget = bench.write(FORGET, 3, 48);
    let head = bench.queues[0].offer(&[forget]).unwrap();
    bench.device.on_kick(HIPRIO).unwrap();
    assert_eq!(bench.queues[0].used(), Some((head, 0)));
    bench.device.reset();
    bench.activate();
    bench.ask(4);
    bench.kick();
    assert_eq!(bench.answer(4), (-libc::EIO, 4));
}

#[test]
fn a_server_that_is_gone_is_noticed_by_the_next_request_too() {
    let mut bench = Bench::new();
    bench.server = None;
    bench.ask(1);
    bench.kick();
    assert_eq!(bench.answer(1), (-libc::EIO, 1));
}

#[test]
fn an_answer_from_before_a_reset_belongs_to_nobody() {
    let mut bench = Bench::new();
    bench.ask(1);
    bench.kick();
    let old = name_of(&bench.receive().unwrap());
    bench.device.reset();
    bench.device.reset();
    bench.kick();
    bench.event();
    bench.activate();
    bench.ask(1);
    bench.kick();
    bench.reply(old, &[]);
    bench.event();
    assert_eq!(bench.queues[1].used(), None);
    let new = name_of(&bench.receive().unwrap());
    assert_ne!(old, new);
    bench.reply(new, &[]);
    bench.event();
    assert_eq!(bench.queues[1].used().unwrap().1, 16);
}

#[test]
fn a_pause_waits_for_answers() {
    let mut bench = Bench::new();
    bench.ask(1);
    bench.kick();
    let name = name_of(&bench.receive().unwrap());
    let server = bench.server.take().unwrap();
    let thread = std::thread::spawn(move || {
        let packet = reply(name, &[]);
        let sent = send(&server, &packet, SendFlags::DONTWAIT);
        assert_eq!(sent, Ok(16));
        server
    });
    bench.device.drain();
    assert_eq!(bench.queues[1].used().unwrap().1, 16);
    drop(thread.join().unwrap());
}

#[test]
fn tag_and_counters_survive_a_snapshot() {
    let mut bench = Bench::new();
    let request = bench.write(FORGET, 7, 48);
    bench.queues[0].offer(&[request]).unwrap();
    bench.device.on_kick(HIPRIO).unwrap();
    let json = serde_json::to_string(&bench.device.state()).unwrap();
    let DeviceState::Fs(state) = serde_json::from_str(&json).unwrap() else {
        panic!("{json}")
    };
    let (socket, _peer) = pair(SocketType::SEQPACKET);
    let restored = Fs::restore(&state, socket).unwrap();
    assert_eq!(restored.counters(), bench.device.counters());
    assert_eq!(restored.state(), bench.device.state());
}

#[test]
fn neither_queue_waits_for_a_kick_that_does_not_come() {
    let mut bench = Bench::new();
    for _ in 0..100 {
        let forget = bench.write(FORGET, 3, 48);
        bench.queues[0].offer(&[forget]).unwrap();
    }
    let head = bench.ask(1);
    // One notification of either queue leads to all that is there.
    let mut progress = bench.device.on_kick(HIPRIO).unwrap();
    while let Progress::More(queue) = progress {
        while bench.receive().is_some() {}
        progress = bench.device.on_kick(queue).unwrap();
    }
    while bench.queues[0].used().is_some() {}
    assert_eq!(bench.queues[0].seen(), 100);
    bench.server = None;
    bench.event();
    assert_eq!(bench.queues[1].used(), Some((head, 16)));
}

/// What a request's header says of its length and what its chain has, at all edges.
#[test]
fn a_request_is_as_long_as_its_header_says_at_each_edge() {
    let memory = memory(MEMORY);
    for length in [
        0,
        1,
        39,
        40,
        41,
        4096,
        MAX_PACKET - 1,
        MAX_PACKET,
        MAX_PACKET + 1,
    ] {
        let near = [length.wrapping_sub(1), length, length + 1].map(|said| said as u32);
        for said in [[0, 39, 40].as_slice(), &near, &[1 << 31, u32::MAX]].concat() {
            for room in [0, 15, 16, 17] {
                memory.write_obj(said, GuestAddress(OUT)).unwrap();
                memory.write_obj(LOOKUP, GuestAddress(OUT + 4)).unwrap();
                let mut queue = DriverQueue::new(&memory, 0, 16);
                let mut device = queue.device_side(false);
                queue
                    .offer(&[readable(OUT, length), writable(IN, room)])
                    .unwrap();
                let chain = device.pop(&memory).unwrap().unwrap();
                let read = request::Request::read(chain, &memory, 16);
                let whole = (IN_HEADER..=MAX_PACKET).contains(&length) && said as usize == length;
                let is_good = read.is_ok_and(|request| request.packet.len() == length);
                assert_eq!(
                    is_good,
                    whole && room >= OUT_HEADER,
                    "{said} of {length}, {room}"
                );
            }
        }
    }
}
