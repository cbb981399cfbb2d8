//! The whole device: a driver that is played here on one side, on the other a
//! packet socket that stands for the tap, or a real tap where one can be made.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::frame::{MAX_FRAME, MIN_FRAME};
use super::header::HEADER_SIZE;
use super::pair::{BUDGET, RX, TX};
use super::tap::{Port, TapError, offloads};
use super::{Net, NetError, Tap};
use crate::memory::Memory;
use crate::virtio::device::{Activation, DeviceError, Progress, VirtioDevice};
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::state::{DeviceState, NetState};
use crate::virtio::test_driver::{
    self as driver, DriverQueue, Segment, memory, readable, writable,
};
use crate::virtio::watch::{Source, Watcher};

mod multiqueue;
mod plugged;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RX_MEMORY: u64 = 0x10_0000;
const TX_MEMORY: u64 = 0x200_0000;
const SPACING: u64 = 0x1_1000;
const MERGING: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A packet socket in place of the tap.
#[derive(Debug)]
struct Cable {
    file: File,
    offloads: Arc<AtomicU32>,
    /// How many times those were set.
    changes: Arc<AtomicU32>,
    on: Arc<AtomicBool>,
}

impl Port for Cable {
    fn file(&self) -> &File {
        &self.file
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        self.offloads.store(offloads, Ordering::SeqCst);
        self.changes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn switch(&self, on: bool) -> io::Result<()> {
        assert_ne!(self.on.swap(on, Ordering::SeqCst), on);
        Ok(())
    }
}

fn cable() -> (Cable, File) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (ours, far) = (File::from(pair.0), File::from(pair.1));
    let offloads = Arc::default();
    (
        Cable {
            file: ours,
            offloads,
            changes: Arc::default(),
            on: Arc::new(AtomicBool::new(true)),
        },
        far,
    )
}

/// The guest, its driver, the event loop and the far end of the cable.
struct Guest<P> {
    memory: Memory,
    rx: DriverQueue,
    tx: DriverQueue,
    device: Net<P>,
    interrupt: Arc<CountingInterrupt>,
    epoll: Arc<Epoll>,
    turns: usize,
}

impl<P: Port + 'static> Guest<P> {
    fn new(port: P, features: u64) -> Self {
        let memory = memory(0x400_0000);
        let mut guest = Self {
            rx: DriverQueue::new(&memory, 0, 256),
            tx: DriverQueue::new(&memory, DriverQueue::SPAN, 256),
            device: Net::new(vec![port], MAC, Some(1450)).unwrap(),
            interrupt: Arc::default(),
            epoll: Arc::new(Epoll::new().unwrap()),
            memory,
            turns: 0,
        };
        guest.activate(features);
        guest
    }

    fn activate(&mut self, features: u64) {
        self.try_activate(features).unwrap();
    }

    fn try_activate(&mut self, features: u64) -> Result<(), DeviceError> {
        let activation = Activation {
            memory: self.memory.clone(),
            queues: vec![self.rx.device_side(true), self.tx.device_side(true)],
            features,
            interrupt: Arc::clone(&self.interrupt) as _,
            watcher: Watcher::new([Arc::clone(&self.epoll)].into(), 0, 0),
        };
        self.device.activate(activation)
    }

    fn kick(&mut self, queue: usize) {
        driver::kick(&mut self.device, queue as u16);
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
            assert!(self.turns < 100_000, "busy loop");
        }
    }

    /// Offers a receive buffer; notifies the device if it wants to know.
    fn offer(&mut self, len: usize) -> Option<()> {
        let at = RX_MEMORY + u64::from(self.rx.next_free()?) * SPACING % 0x1f0_0000;
        self.rx.offer(&[writable(at, len)])?;
        if self.rx.wants_kick() {
            self.kick(RX);
        }
        Some(())
    }

    /// Takes a frame out of the receive queue; returns it with the number of its buffers.
    fn receive(&mut self) -> Option<(Vec<u8>, usize)> {
        let mut bytes = self.buffer()?;
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            let more = self.buffer().expect("all buffers of a frame");
            bytes.extend(more);
        }
        Some((bytes, count.into()))
    }

    fn buffer(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.rx.used()?;
        let mut bytes = vec![0; len as usize];
        let at = RX_MEMORY + u64::from(head) * SPACING % 0x1f0_0000;
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        Some(bytes)
    }

    fn offer_tx(&mut self, bytes: &[u8], cut: usize) -> Option<()> {
        let at = TX_MEMORY + u64::from(self.tx.next_free()?) * SPACING % 0x1f0_0000;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let pieces = [
            readable(at, cut),
            readable(at + cut as u64, bytes.len() - cut),
        ];
        self.tx.offer(&pieces)?;
        Some(())
    }

    /// Sends a frame, cut in two, and waits until the device took it.
    fn send(&mut self, bytes: &[u8], cut: usize) {
        self.offer_tx(bytes, cut).unwrap();
        self.kick(TX);
        self.tx.used().expect("the chain comes back");
    }

    fn errors(&self) -> u64 {
        self.device.counters().errors
    }
}

fn frame(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend((0..len - HEADER_SIZE).map(|at| (at * 7 % 251) as u8));
    bytes
}

/// The frame as it must arrive in `buffers` buffers.
fn arrived(mut bytes: Vec<u8>, buffers: u16) -> Vec<u8> {
    bytes[10..12].copy_from_slice(&buffers.to_le_bytes());
    bytes
}

fn read_frame(far: &mut File) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 17];
    match far.read(&mut bytes) {
        Ok(count) => {
            bytes.truncate(count);
            Some(bytes)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

mod transmit {
    use super::*;

    #[test]
    fn frames_of_the_guest_arrive_unchanged_however_they_are_cut() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        for cut in [1, 11, 12, 13, 26] {
            guest.send(&frame(100), cut);
            assert_eq!(read_frame(&mut far).unwrap(), frame(100));
        }
        for len in [MIN_FRAME, 1526, MAX_FRAME] {
            guest.send(&frame(len), 12);
            assert_eq!(read_frame(&mut far).unwrap(), frame(len));
        }
        assert_eq!(guest.errors(), 0);
        let counters = guest.device.counters();
        assert_eq!(counters.requests, 8);
        assert_eq!(
            counters.bytes_out as usize,
            5 * 88 + MIN_FRAME + 1526 + MAX_FRAME - 36
        );
    }

    #[test]
    fn frames_of_wrong_length_are_dropped() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        for len in [2, HEADER_SIZE, MIN_FRAME - 1, MAX_FRAME + 1] {
            guest.send(&vec![0; len], 1);
        }
        assert_eq!(guest.errors(), 4);
        assert!(read_frame(&mut far).is_none());
    }

    #[test]
    fn chains_that_are_no_frames_come_back() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        let chains: [&[Segment]; 5] = [
            &[readable(0x1000_0000_0000, 100)],
            &[readable(u64::MAX - 10, 100)],
            &[writable(TX_MEMORY, 100)],
            &[writable(TX_MEMORY, 100), readable(TX_MEMORY, 100)],
            &[readable(TX_MEMORY, 0)],
        ];
        for chain in chains {
            guest.tx.offer(chain).unwrap();
        }
        guest.tx.offer_loop(readable(TX_MEMORY, 10)).unwrap();
        let many: Vec<Segment> = (0..200).map(|_| readable(TX_MEMORY, 10)).collect();
        guest.tx.offer_indirect(TX_MEMORY + 0x1000, &many).unwrap();
        guest.kick(TX);
        for _ in 0..7 {
            guest.tx.used().unwrap();
        }
        assert_eq!(guest.errors(), 7);
        assert!(read_frame(&mut far).is_none());
    }

    #[test]
    fn bad_headers_are_dropped() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING | 1 << VIRTIO_NET_F_CSUM);
        let headers: [[u8; 10]; 3] = [
            // Segmentation that was not negotiated, nonsense, a checksum outside.
            [1, 1, 54, 0, 0, 5, 34, 0, 16, 0],
            [0, 77, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 87, 0, 0, 0],
        ];
        for header in headers {
            let mut bytes = frame(100);
            bytes[..10].copy_from_slice(&header);
            guest.send(&bytes, 12);
        }
        assert_eq!(guest.errors(), 3);
        assert!(read_frame(&mut far).is_none());
        let mut good = frame(100);
        good[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
        guest.send(&good, 12);
        assert_eq!(read_frame(&mut far).unwrap(), good);
    }

    #[test]
    fn a_full_cable_delays_frames_without_events() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        let mut offered = 0;
        while guest.offer_tx(&frame(2000 + offered), 12).is_some() {
            offered += 1;
        }
        guest.kick(TX);
        let mut returned = 0;
        while guest.tx.used().is_some() {
            returned += 1;
        }
        assert!(returned < offered, "the cable holds them all");
        assert_eq!(guest.run(), 0);
        let mut got = 0;
        while let Some(bytes) = read_frame(&mut far) {
            assert_eq!(bytes, frame(2000 + got));
            got += 1;
            guest.run();
        }
        assert_eq!(got, offered);
        assert_eq!(guest.errors(), 0);
        assert_eq!(guest.run(), 0, "and nobody waits for room any more");
    }

    /// Waits until the clock of a lone frame ran out.
    fn wait_for_clock(guest: &mut Guest<Cable>) {
        let start = Instant::now();
        while guest.run() == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "no clock");
        }
    }

    #[test]
    fn the_driver_is_told_of_a_lone_frame_later_or_finds_out_by_itself() {
        let (cable, _far) = cable();
        let mut guest = Guest::new(cable, 0);
        guest.run();
        let told = |guest: &Guest<Cable>| guest.interrupt.queue.load(Ordering::SeqCst);
        guest.tx.set_used_event(0);
        guest.send(&frame(100), 12);
        assert_eq!(told(&guest), 0);
        wait_for_clock(&mut guest);
        assert_eq!(told(&guest), 1);
        guest.tx.set_used_event(1);
        guest.send(&frame(100), 12);
        // It looks by itself, and asks for the next.
        guest.tx.set_used_event(2);
        wait_for_clock(&mut guest);
        assert_eq!(told(&guest), 1);
        assert_eq!(guest.run(), 0);
        // A clock does not go on in a snapshot.
        guest.send(&frame(100), 12);
        assert_eq!(told(&guest), 1);
        assert!(guest.device.drain());
        assert_eq!(told(&guest), 2);
    }

    #[test]
    fn the_driver_is_told_of_more_or_larger_frames_at_once() {
        let (cable, _far) = cable();
        let mut guest = Guest::new(cable, 0);
        let told = |guest: &Guest<Cable>| guest.interrupt.queue.load(Ordering::SeqCst);
        guest.tx.set_used_event(0);
        guest.send(&frame(3000), 12);
        assert_eq!(told(&guest), 1);
        guest.tx.set_used_event(1);
        guest.offer_tx(&frame(100), 12).unwrap();
        guest.send(&frame(100), 12);
        assert_eq!(told(&guest), 2);
        // One by one, without a look in between.
        guest.tx.set_used_event(3);
        guest.send(&frame(100), 12);
        assert_eq!(told(&guest), 2);
        guest.send(&frame(100), 12);
        assert_eq!(told(&guest), 3);
        // It wants to hear of none for now.
        guest.tx.set_used_event(900);
        guest.send(&frame(3000), 12);
        assert_eq!(told(&guest), 3);
        // After a reset nothing is left to tell.
        guest.tx.set_used_event(6);
        guest.send(&frame(100), 12);
        guest.device.reset();
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!((guest.run(), told(&guest)), (0, 3));
    }

    #[test]
    fn work_is_done_in_turns() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        let at = TX_MEMORY;
        let mut offered = 0;
        while guest.tx.offer(&[readable(at, 60)]).is_some() {
            offered += 1;
        }
        assert_eq!(
            guest.device.on_kick(TX as u16).unwrap(),
            Progress::More(TX as u16)
        );
        let mut got = 0;
        while read_frame(&mut far).is_some() {
            got += 1;
        }
        assert_eq!(got, BUDGET);
        guest.kick(TX);
        while read_frame(&mut far).is_some() {
            got += 1;
        }
        assert_eq!(got, offered);
    }

    #[test]
    fn a_flood_of_what_is_no_frame_is_met_in_turns_too() {
        let (cable, _far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        let mut offered = 0;
        while guest.tx.offer(&[readable(TX_MEMORY, 4)]).is_some() {
            offered += 1;
        }
        assert!(offered > BUDGET);
        let turn = guest.device.on_kick(TX as u16).unwrap();
        assert_eq!(turn, Progress::More(TX as u16));
        assert_eq!(guest.errors(), u64::from(BUDGET));
    }
}

mod receive {
    use super::*;

    #[test]
    fn a_frame_fills_as_many_buffers_as_it_needs() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        for _ in 0..40 {
            guest.offer(2000).unwrap();
        }
        for (len, buffers) in [(100, 1), (2000, 1), (2001, 2), (MAX_FRAME, 33)] {
            far.write_all(&frame(len)).unwrap();
            guest.run();
            let (bytes, count) = guest.receive().unwrap();
            assert_eq!(count, buffers);
            assert_eq!(bytes, arrived(frame(len), buffers as u16));
        }
        assert!(guest.receive().is_none());
        assert_eq!(guest.errors(), 0);
    }

    #[test]
    fn a_driver_that_polls_never_finds_part_of_a_frame() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        let stop = Arc::new(AtomicBool::new(false));
        let index = {
            let (memory, stop) = (guest.memory.clone(), Arc::clone(&stop));
            let index = GuestAddress(guest.rx.used_index());
            move || {
                let mut seen = std::collections::BTreeSet::new();
                while !stop.load(Ordering::SeqCst) {
                    let index: u16 = memory.load(index, Ordering::Acquire).unwrap();
                    seen.insert(index);
                }
                seen
            }
        };
        let poller = std::thread::spawn(index);
        for _ in 0..2000 {
            for _ in 0..8 {
                guest.offer(100).unwrap();
            }
            far.write_all(&frame(800)).unwrap();
            guest.run();
            assert_eq!(guest.receive().unwrap().0, arrived(frame(800), 8));
        }
        stop.store(true, Ordering::SeqCst);
        let seen = poller.join().unwrap();
        assert!(seen.iter().all(|index| index % 8 == 0), "{seen:?}");
    }

    /// Offers a chain of pieces of these sizes with 7 bytes between them; returns where they are.
    fn offer_pieces(guest: &mut Guest<Cable>, at: u64, sizes: &[usize]) -> Vec<Segment> {
        let mut at = at;
        let pieces: Vec<Segment> = sizes
            .iter()
            .map(|size| {
                let piece = writable(at, *size);
                at += *size as u64 + 7;
                piece
            })
            .collect();
        guest.rx.offer(&pieces).unwrap();
        pieces
    }

    /// Returns what is in the pieces, and zeroes them.
    fn take_pieces(guest: &Guest<Cable>, pieces: &[Segment]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in pieces {
            let mut part = vec![0; piece.len as usize];
            let at = GuestAddress(piece.address);
            guest.memory.read_slice(&mut part, at).unwrap();
            guest.memory.write_slice(&vec![0; part.len()], at).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    #[test]
    fn frames_go_into_pieces_of_any_size_and_nowhere_else() {
        let sizes: [&[usize]; 5] = [
            &[3000],
            &[12, 2000, 1000],
            &[1; 60],
            &[5, 6, 1, 7, 3000],
            &[10, 1, 2, 1200],
        ];
        for first in sizes {
            for second in sizes {
                for len in [MIN_FRAME, 60, 61, 100, 1300, 1600] {
                    let (cable, mut far) = cable();
                    let mut guest = Guest::new(cable, MERGING);
                    let mut pieces = offer_pieces(&mut guest, RX_MEMORY, first);
                    pieces.extend(offer_pieces(&mut guest, RX_MEMORY + 0x8000, second));
                    let room: usize = pieces.iter().map(|piece| piece.len as usize).sum();
                    far.write_all(&frame(len)).unwrap();
                    guest.run();
                    if room < len {
                        assert!(guest.rx.used().is_none());
                        continue;
                    }
                    let in_first = len.min(first.iter().sum());
                    let mut expected = vec![(0, in_first as u32)];
                    if in_first < len {
                        expected.push((first.len() as u16, (len - in_first) as u32));
                    }
                    let used: Vec<_> = std::iter::from_fn(|| guest.rx.used()).collect();
                    assert_eq!(used, expected, "{first:?} {second:?} {len}");
                    let mut bytes = take_pieces(&guest, &pieces);
                    let rest = bytes.split_off(len);
                    assert_eq!(bytes, arrived(frame(len), expected.len() as u16));
                    // A frame that found less room than it needs was read in two parts, of which
                    // the first is in the guest's buffers.
                    assert!(rest.iter().all(|byte| *byte == 0));
                    let mut between = vec![0; 0x1_0000];
                    let at = GuestAddress(RX_MEMORY);
                    guest.memory.read_slice(&mut between, at).unwrap();
                    assert!(between.iter().all(|byte| *byte == 0));
                }
            }
        }
    }

    #[test]
    fn chains_that_no_frame_took_stay_with_the_driver() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        for _ in 0..100 {
            guest.offer(1500).unwrap();
        }
        let next = |guest: &Guest<Cable>| guest.device.queues()[RX].next_avail;
        // The first makes the device expect more of its size.
        for (len, taken) in [(40_000, 27), (100, 28), (3000, 30), (100, 31)] {
            far.write_all(&frame(len)).unwrap();
            guest.run();
            assert_eq!(guest.receive().unwrap().0.len(), len);
            assert_eq!(next(&guest), taken);
        }
    }

    #[test]
    fn work_is_done_in_turns() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        while guest.offer(100).is_some() {}
        for _ in 0..BUDGET + 20 {
            far.write_all(&frame(100)).unwrap();
        }
        let received = |guest: &mut Guest<Cable>| std::iter::from_fn(|| guest.receive()).count();
        let more = guest.device.on_event(0, EventSet::IN).unwrap();
        assert_eq!(more, Progress::More(RX as u16));
        assert_eq!(received(&mut guest), BUDGET as usize);
        // The turn for the other queue goes on with this one, so no event need tell of it.
        while guest.tx.offer(&[readable(TX_MEMORY, 60)]).is_some() {}
        let more = guest.device.on_kick(TX as u16).unwrap();
        assert_eq!(more, Progress::More(TX as u16));
        assert_eq!(received(&mut guest), 20);
        guest.kick(TX);
        assert_eq!(guest.errors(), 0);
    }

    #[test]
    fn without_merging_a_frame_needs_one_buffer() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, 0);
        for _ in 0..4 {
            guest.offer(1526).unwrap();
        }
        far.write_all(&frame(1527)).unwrap();
        far.write_all(&frame(1526)).unwrap();
        guest.run();
        let (bytes, count) = guest.receive().unwrap();
        assert_eq!((bytes, count), (arrived(frame(1526), 1), 1));
        assert_eq!(guest.errors(), 1, "the longer frame is lost");
    }

    #[test]
    fn a_starved_device_is_quiet_and_recovers() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        far.write_all(&frame(5000)).unwrap();
        far.write_all(&frame(100)).unwrap();
        assert_eq!(guest.run(), 1);
        assert_eq!(guest.run(), 0);
        // One by one: each buffer that does not suffice makes the device ask for the next.
        for _ in 0..2 {
            guest.offer(2000).unwrap();
            assert!(guest.receive().is_none());
            assert_eq!(guest.run(), 0);
        }
        guest.offer(2000).unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().0, arrived(frame(5000), 3));
        assert!(guest.receive().is_none());
        guest.offer(2000).unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().0, arrived(frame(100), 1));
        assert_eq!(guest.errors(), 0);
    }

    #[test]
    fn a_frame_that_no_queue_can_take_is_dropped() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        while guest.offer(100).is_some() {}
        far.write_all(&frame(256 * 100 + 1)).unwrap();
        far.write_all(&frame(256 * 100)).unwrap();
        guest.run();
        assert_eq!(guest.errors(), 1);
        let (bytes, count) = guest.receive().unwrap();
        assert_eq!(count, 256);
        assert_eq!(bytes, arrived(frame(256 * 100), 256));
    }

    #[test]
    fn useless_buffers_come_back_empty_and_cost_no_frame() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        guest.offer(1000).unwrap();
        guest.rx.offer(&[writable(0x1000_0000_0000, 100)]).unwrap();
        guest.rx.offer(&[readable(RX_MEMORY, 100)]).unwrap();
        guest.rx.offer(&[writable(RX_MEMORY, 0)]).unwrap();
        guest.rx.offer_loop(writable(RX_MEMORY, 100)).unwrap();
        guest.offer(1000).unwrap();
        far.write_all(&frame(1500)).unwrap();
        guest.run();
        for _ in 0..4 {
            assert_eq!(guest.rx.used().unwrap().1, 0);
        }
        assert_eq!(guest.receive().unwrap().0, arrived(frame(1500), 2));
    }

    #[test]
    fn what_is_no_frame_is_dropped() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        guest.offer(2000).unwrap();
        far.write_all(&frame(MIN_FRAME - 1)).unwrap();
        far.write_all(&frame(MIN_FRAME)).unwrap();
        guest.run();
        assert_eq!(guest.errors(), 1);
        assert_eq!(guest.receive().unwrap().0, arrived(frame(MIN_FRAME), 1));
    }

    #[test]
    fn flags_reach_only_a_driver_that_knows_them() {
        for (features, flags) in [(0, 0), (1 << VIRTIO_NET_F_GUEST_CSUM, 3)] {
            let (cable, mut far) = cable();
            let mut guest = Guest::new(cable, MERGING | features);
            guest.offer(2000).unwrap();
            let mut bytes = frame(100);
            bytes[0] = 3;
            far.write_all(&bytes).unwrap();
            guest.run();
            assert_eq!(guest.receive().unwrap().0[0], flags);
        }
    }

    #[test]
    fn interrupts_come_only_when_the_driver_wants_them() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        for _ in 0..10 {
            guest.offer(2000).unwrap();
        }
        guest.rx.set_used_event(2);
        for (sent, interrupts) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
            far.write_all(&frame(100)).unwrap();
            guest.run();
            let count = guest.interrupt.queue.load(Ordering::SeqCst);
            assert_eq!(count, interrupts, "after {sent}");
        }
        // A burst is one interrupt.
        guest.rx.set_used_event(4);
        for _ in 0..3 {
            far.write_all(&frame(100)).unwrap();
        }
        guest.run();
        assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn an_unplugged_cable_is_told_once() {
        let (cable, far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        guest.offer(2000).unwrap();
        assert_eq!(guest.device.config()[6..8], [1, 0]);
        drop(far);
        guest.run();
        assert_eq!(guest.run(), 0);
        assert_eq!(guest.device.config()[6..8], [0, 0]);
        assert_eq!(guest.interrupt.config.load(Ordering::SeqCst), 1);
        guest.send(&frame(100), 12);
        assert_eq!(guest.errors(), 1);
        guest.device.reset();
        guest.rx = DriverQueue::new(&guest.memory, 0, 256);
        guest.tx = DriverQueue::new(&guest.memory, DriverQueue::SPAN, 256);
        assert!(guest.device.queues().is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn frames_arrive_whole_and_in_order(
            steps in prop::collection::vec(
                prop_oneof![
                    (MIN_FRAME..9000usize).prop_map(Ok),
                    (1usize..4096).prop_map(Err),
                ],
                1..150,
            ),
        ) {
            let (cable, mut far) = cable();
            let mut guest = Guest::new(cable, MERGING);
            let mut sent = std::collections::VecDeque::new();
            for step in steps {
                match step {
                    Ok(len) => {
                        if far.write(&frame(len)).is_ok() {
                            sent.push_back(len);
                        }
                    }
                    Err(len) => {
                        guest.offer(len.max(HEADER_SIZE));
                    }
                }
                guest.run();
                while let Some((bytes, count)) = guest.receive() {
                    let len = sent.pop_front().unwrap();
                    prop_assert!(bytes == arrived(frame(len), count as u16));
                }
            }
            while !sent.is_empty() {
                guest.offer(4096).unwrap();
                guest.run();
                while let Some((bytes, count)) = guest.receive() {
                    let len = sent.pop_front().unwrap();
                    prop_assert!(bytes == arrived(frame(len), count as u16));
                }
            }
            prop_assert_eq!(guest.errors(), 0);
        }
    }
}

mod device {
    use super::*;

    #[test]
    fn the_configuration_tells_mac_link_and_mtu() {
        let (cable, _far) = cable();
        let guest = Guest::new(cable, 0);
        let config = guest.device.config();
        assert_eq!(config[..8], [2, 0, 0, 0, 0, 1, 1, 0]);
        assert_eq!(config[10..], [0xaa, 5]);
        let mtu = 1 << VIRTIO_NET_F_MTU;
        assert_ne!(guest.device.features() & mtu, 0);
        let (cable, _far) = super::cable();
        let without = Net::new(vec![cable], MAC, None).unwrap();
        assert_eq!(without.features() & mtu, 0);
    }

    #[test]
    fn impossible_addresses_and_mtus_are_refused() {
        for mac in [[0; 6], [0xff; 6], [1, 0, 0, 0, 0, 1]] {
            let (cable, _far) = cable();
            assert!(matches!(
                Net::new(vec![cable], mac, None),
                Err(NetError::Mac(_))
            ));
        }
        let (cable, _far) = cable();
        assert!(matches!(
            Net::new(vec![cable], MAC, Some(67)),
            Err(NetError::Mtu(67))
        ));
    }

    #[test]
    fn the_port_does_what_was_negotiated_and_is_consistent() {
        let bit = |feature: u32| 1u64 << feature;
        let cases = [
            (0, 0),
            (bit(VIRTIO_NET_F_GUEST_TSO4), 0),
            (bit(VIRTIO_NET_F_GUEST_CSUM), libc::TUN_F_CSUM),
            (
                bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_ECN),
                libc::TUN_F_CSUM,
            ),
            (
                bit(VIRTIO_NET_F_GUEST_CSUM)
                    | bit(VIRTIO_NET_F_GUEST_TSO4)
                    | bit(VIRTIO_NET_F_GUEST_TSO6)
                    | bit(VIRTIO_NET_F_GUEST_ECN),
                libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN,
            ),
        ];
        for (features, expected) in cases {
            assert_eq!(offloads(features), expected);
            let (cable, _far) = cable();
            let seen = Arc::clone(&cable.offloads);
            let _guest = Guest::new(cable, features);
            assert_eq!(seen.load(Ordering::SeqCst), expected);
        }
    }

    #[test]
    fn a_driver_that_starts_over_changes_the_tap_now_and_then_only() {
        let checksums = 1 << VIRTIO_NET_F_GUEST_CSUM;
        let (cable, mut far) = cable();
        let changes = Arc::clone(&cable.changes);
        let mut guest = Guest::new(cable, checksums);
        for _ in 0..100 {
            guest.device.reset();
            guest.activate(checksums | MERGING);
        }
        assert_eq!(
            changes.load(Ordering::SeqCst),
            1,
            "they stay what they were"
        );

        let start = Instant::now();
        let begun = (0..100).filter(|round| {
            guest.device.reset();
            guest.try_activate(checksums * (round % 2)).is_ok()
        });
        let begun = begun.count();
        let allowed = 8 + start.elapsed().as_secs() as u32;
        let made = changes.load(Ordering::SeqCst);
        assert!((8..=allowed).contains(&made), "{made} of {allowed}");
        // What is refused is idle, and no change for the worse.
        assert!(begun < 60, "{begun}");
        while guest.try_activate(checksums).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(100));
        }
        guest.offer(2000).unwrap();
        far.write_all(&frame(100)).unwrap();
        guest.run();
        assert!(guest.receive().is_some());
    }

    #[test]
    fn a_reset_device_starts_over() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        // One buffer is not enough: the device keeps the frame.
        guest.offer(2000).unwrap();
        far.write_all(&frame(3000)).unwrap();
        guest.run();
        guest.device.reset();
        assert_eq!(guest.run(), 0);
        assert_eq!(guest.device.on_kick(RX as u16).unwrap(), Progress::Done);
        assert_eq!(guest.device.on_kick(TX as u16).unwrap(), Progress::Done);
        assert_eq!(
            guest.device.on_event(0, EventSet::IN).unwrap(),
            Progress::Done
        );
        guest.rx = DriverQueue::new(&guest.memory, 0, 256);
        guest.tx = DriverQueue::new(&guest.memory, DriverQueue::SPAN, 256);
        for ring in [0x4002, 0x6002, 0xc002, 0xe002] {
            guest.memory.write_obj(0u16, GuestAddress(ring)).unwrap();
        }
        guest.activate(MERGING);
        guest.offer(2000).unwrap();
        far.write_all(&frame(500)).unwrap();
        guest.run();
        assert_eq!(guest.receive().unwrap().0, arrived(frame(500), 1));
    }

    #[test]
    fn the_state_makes_the_same_card() {
        let (cable, _far) = cable();
        let guest = Guest::new(cable, MERGING);
        let DeviceState::Net(state) = guest.device.state() else {
            panic!("another device's state");
        };
        let json = serde_json::to_string(&state).unwrap();
        let state: NetState = serde_json::from_str(&json).unwrap();
        let (cable, _far) = super::cable();
        let again = Net::restore(&state, vec![cable]).unwrap();
        assert_eq!(again.state(), guest.device.state());
        assert_eq!(again.features(), guest.device.features());
    }

    #[test]
    fn a_ring_that_runs_ahead_breaks_the_device() {
        let (cable, mut far) = cable();
        let mut guest = Guest::new(cable, MERGING);
        for queue in [0, DriverQueue::SPAN] {
            guest
                .memory
                .write_obj(1000u16, GuestAddress(queue + 0x4002))
                .unwrap();
        }
        assert!(guest.device.on_kick(TX as u16).is_err());
        far.write_all(&frame(100)).unwrap();
        assert!(guest.device.on_event(0, EventSet::IN).is_err());
    }

    #[test]
    fn a_file_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Tap::new(file.into()), Err(TapError::Query(_))));
    }
}

/// With a real tap in a network namespace of its own. Without the right to make
/// one these tests say so and do nothing.
mod tap {
    use std::os::fd::AsRawFd;

    use super::*;

    const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

    /// Runs `test` in a network namespace of its own.
    pub(super) fn with_namespace(test: impl FnOnce() + Send + 'static) {
        let run = move || {
            // SAFETY: unshare takes no memory; only this thread changes its namespace.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                eprintln!("skipped: no right to make a network namespace");
                return;
            }
            test();
        };
        std::thread::spawn(run).join().unwrap();
    }

    /// Runs `test` with a tap and a packet socket on the same interface.
    fn with_tap(test: fn(OwnedFd, File)) {
        with_namespace(move || match open_tap("tap0", FLAGS) {
            Ok((tap, socket)) => test(tap, socket),
            Err(error) => eprintln!("skipped: no tap: {error}"),
        });
    }

    pub(super) fn open_tap(name: &str, flags: libc::c_int) -> io::Result<(OwnedFd, File)> {
        let tun = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: ifreq is plain old data, for which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        ioctl(&tun, libc::TUNSETIFF, &mut request)?;
        let socket = File::from(rustix::net::socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            Some(rustix::net::eth::ALL),
        )?);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)?;
        ioctl(&socket, libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: sockaddr_ll is plain old data, for which all zeroes is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: SIOCGIFINDEX filled in the index.
        address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
        // SAFETY: the address and its length belong together and outlive the call.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((tun.into(), socket))
    }

    /// Returns what the kernel says of a tap's queue (`TUNGETIFF`).
    pub(super) fn interface_flags(queue: &File) -> i32 {
        // SAFETY: ifreq is plain old data, for which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ioctl(queue, libc::TUNGETIFF, &mut request).unwrap();
        // SAFETY: TUNGETIFF filled in the flags; any bits are a short.
        i32::from(unsafe { request.ifr_ifru.ifru_flags })
    }

    fn ioctl(file: &File, request: libc::Ioctl, argument: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the requests used here take an ifreq, which outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut *argument) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// An Ethernet frame of a private type, so that the kernel's own traffic is told apart.
    pub(super) fn ethernet(len: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; 12];
        bytes.extend([0x88, 0xb5]);
        bytes.extend((14..len).map(|at| at as u8));
        bytes
    }

    pub(super) fn ours(bytes: &[u8]) -> bool {
        bytes.get(12..14) == Some(&[0x88, 0xb5])
    }

    #[test]
    fn frames_pass_both_ways() {
        with_tap(|tap, mut socket| {
            let mut guest = Guest::new(Tap::new(tap).unwrap(), MERGING);
            while guest.offer(1600).is_some() {}
            let mut bytes = vec![0; HEADER_SIZE];
            bytes.extend(ethernet(200));
            guest.send(&bytes, 12);
            let seen = std::iter::from_fn(|| read_frame(&mut socket)).find(|it| ours(it));
            assert_eq!(seen.unwrap(), ethernet(200));
            socket.write_all(&ethernet(300)).unwrap();
            guest.run();
            let got = std::iter::from_fn(|| guest.receive()).find(|(it, _)| ours(&it[12..]));
            assert_eq!(got.unwrap().0[12..], ethernet(300));
            assert_eq!(guest.run(), 0);
        });
    }

    #[test]
    fn the_tap_takes_all_offloads() {
        with_tap(|tap, mut socket| {
            let (cable, _far) = cable();
            let all = Net::new(vec![cable], MAC, None).unwrap().features();
            let mut guest = Guest::new(Tap::new(tap).unwrap(), all);
            // A TCP segment of IPv4 that the tap must take as one frame.
            let mut bytes = vec![1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
            let mut packet = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
            packet.extend([
                0x45, 0, 0x10, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
            packet.extend([
                0, 80, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
            ]);
            packet.resize(14 + 0x1000, 7);
            bytes.extend(&packet);
            guest.send(&bytes, 12);
            assert_eq!(guest.errors(), 0);
            let whole =
                std::iter::from_fn(|| read_frame(&mut socket)).any(|it| it.len() == packet.len());
            assert!(whole);
        });
    }

    #[test]
    fn a_tap_with_other_flags_is_refused() {
        with_tap(|_tap, _socket| {
            let (tap, _socket) = open_tap("tap1", libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
            assert!(matches!(Tap::new(tap), Err(TapError::Flags(_))));
        });
    }
}
