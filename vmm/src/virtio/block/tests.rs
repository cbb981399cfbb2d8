use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::extent::FileExtent;
use crate::memory::Memory;
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::test_driver::{
    self as driver, DriverQueue, Segment, memory, readable, writable,
};
use crate::virtio::watch::Watcher;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const MEMORY: usize = 0x40_0000;
const HEADERS: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STATUS: u64 = 0x1f000;
/// What a status byte is before the device writes it.
const UNTOUCHED: u8 = 0xaa;
const SECTORS: u64 = 64;

struct Guest {
    memory: Memory,
    queue: DriverQueue,
    block: Block,
    interrupt: Arc<CountingInterrupt>,
    file: Arc<File>,
}

fn disk_file() -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    for sector in 0..SECTORS {
        file.write_all_at(&[sector as u8; SECTOR as usize], sector * SECTOR)
            .unwrap();
    }
    Arc::new(file)
}

fn guest(readonly: bool) -> Guest {
    let file = disk_file();
    // Two pieces in reverse order, so that the disk starts with sector 32 of the file.
    let half = SECTORS / 2 * SECTOR;
    let pieces = [half, 0].map(|offset| FileExtent {
        file: Arc::clone(&file),
        offset,
        length: half,
    });
    let disk = Disk::new(pieces.to_vec(), readonly).unwrap();
    let block = Block::new(disk, "disk-0".into()).unwrap();
    let memory = memory(MEMORY);
    let queue = DriverQueue::new(&memory, 0, QUEUE_SIZE);
    let mut guest = Guest {
        memory,
        queue,
        block,
        interrupt: Arc::default(),
        file,
    };
    guest.activate(false);
    guest
}

impl Guest {
    fn activate(&mut self, event_idx: bool) {
        self.block
            .activate(Activation {
                memory: self.memory.clone(),
                queues: vec![self.queue.device_side(event_idx)],
                features: self.block.features(),
                interrupt: Arc::clone(&self.interrupt) as _,
                watcher: Watcher::detached().unwrap(),
            })
            .unwrap();
    }

    fn header(&self, kind: u32, sector: u64) -> Segment {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory
            .write_slice(&header, GuestAddress(HEADERS))
            .unwrap();
        readable(HEADERS, 16)
    }

    fn status(&self) -> Segment {
        self.memory
            .write_obj(UNTOUCHED, GuestAddress(STATUS))
            .unwrap();
        writable(STATUS, 1)
    }

    /// Has the device do a request; returns the status byte and the length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, data: &[Segment]) -> (u8, u32) {
        let pieces = [&[self.header(kind, sector)], data, &[self.status()]].concat();
        self.queue.offer(&pieces).unwrap();
        driver::kick(&mut self.block, 0);
        let (_, length) = self.queue.used().unwrap();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), length)
    }

    fn data(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(DATA + offset))
            .unwrap();
        bytes
    }

    fn segment(&self, index: u64, sector: u64, count: u32, flags: u32) {
        let bytes = [
            sector.to_le_bytes().as_slice(),
            &count.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat();
        self.memory
            .write_slice(&bytes, GuestAddress(DATA + index * 16))
            .unwrap();
    }
}

#[test]
fn reads_cross_extents_and_descriptors() {
    let mut guest = guest(true);
    // Disk sectors 31 and 32 are file sectors 63 and 0.
    let data = [writable(DATA, 100), writable(DATA + 100, 924)];
    assert_eq!(guest.request(IN, 31, &data), (0, 1025));
    assert_eq!(guest.data(0, 1024), *[[63u8; 512], [0; 512]].as_flattened());
    assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), 1);
    assert_eq!(guest.block.counters().bytes_in, 1024);
}

#[test]
fn writes_reach_the_file() {
    let mut guest = guest(false);
    guest
        .memory
        .write_slice(&[0xcc; 1024], GuestAddress(DATA))
        .unwrap();
    assert_eq!(guest.request(OUT, 31, &[readable(DATA, 1024)]), (0, 1));
    let mut sector = [0; 512];
    for position in [63, 0] {
        guest
            .file
            .read_exact_at(&mut sector, position * SECTOR)
            .unwrap();
        assert_eq!(sector, [0xcc; 512]);
    }
    guest.file.read_exact_at(&mut sector, SECTOR).unwrap();
    assert_eq!(sector, [1; 512]);
    assert_eq!(guest.request(FLUSH, 0, &[]), (0, 1));
}

#[test]
fn a_readonly_disk_is_never_written() {
    let mut guest = guest(true);
    assert_ne!(guest.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    guest.segment(0, 0, 8, 0);
    for (kind, length) in [(OUT, 512), (DISCARD, 16), (WRITE_ZEROES, 16)] {
        assert_eq!(
            guest.request(kind, 0, &[readable(DATA, length)]).0,
            Status::IoError as u8
        );
    }
    assert_eq!(guest.request(FLUSH, 0, &[]).0, 0);
    let mut sector = [0; 512];
    guest.file.read_exact_at(&mut sector, 32 * SECTOR).unwrap();
    assert_eq!(sector, [32; 512]);
}

#[test]
fn ranges_off_the_disk_are_refused() {
    let mut guest = guest(false);
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
    ] {
        for (kind, piece) in [(IN, writable(DATA, length)), (OUT, readable(DATA, length))] {
            assert_eq!(
                guest.request(kind, sector, &[piece]),
                (Status::IoError as u8, 1)
            );
        }
    }
    // Not whole sectors.
    assert_eq!(
        guest.request(IN, 0, &[writable(DATA, 511)]).0,
        Status::IoError as u8
    );
    assert_eq!(
        guest.request(OUT, 0, &[readable(DATA, 513)]).0,
        Status::IoError as u8
    );
    // Nothing at all, at the very end, is fine.
    assert_eq!(guest.request(IN, SECTORS, &[]), (0, 1));
}

#[test]
fn the_serial_number_is_cut_to_the_buffer() {
    let mut guest = guest(true);
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 20)]), (0, 21));
    assert_eq!(guest.data(0, 20), b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 4)]), (0, 5));
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 300)]), (0, 21));
    assert!(
        Block::new(
            Disk::new(
                vec![FileExtent {
                    file: disk_file(),
                    offset: 0,
                    length: 512
                }],
                true
            )
            .unwrap(),
            "x".repeat(21)
        )
        .is_err()
    );
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeros() {
    let mut guest = guest(false);
    guest.segment(0, 0, 8, 0);
    guest.segment(1, 30, 4, 0);
    assert_eq!(guest.request(DISCARD, 0, &[readable(DATA, 32)]), (0, 1));
    guest.segment(0, 16, 8, 1);
    assert_eq!(
        guest.request(WRITE_ZEROES, 0, &[readable(DATA, 16)]),
        (0, 1)
    );
    assert_eq!(guest.request(IN, 0, &[writable(DATA, 64 * 512)]).0, 0);
    let disk = guest.data(0, 64 * 512);
    for (sector, bytes) in (0u8..).zip(disk.as_chunks::<512>().0) {
        let zeroed = matches!(sector, 0..8 | 30..34 | 16..24);
        assert_eq!(
            bytes[0],
            if zeroed { 0 } else { (sector + 32) % 64 },
            "sector {sector}"
        );
    }
}

#[test]
fn segments_that_are_not_valid_change_nothing() {
    let mut guest = guest(false);
    let unsupported = Status::Unsupported as u8;
    let error = Status::IoError as u8;
    for (kind, count, flags, length, status) in [
        (DISCARD, 8, 1, 16, unsupported),
        (WRITE_ZEROES, 8, 2, 16, unsupported),
        (DISCARD, 65, 0, 16, error),
        (DISCARD, u32::MAX, 0, 16, error),
        (DISCARD, 8, 0, 0, error),
        (DISCARD, 8, 0, 15, error),
        (DISCARD, 8, 0, 17 * 16, error),
    ] {
        guest.segment(0, 0, count, flags);
        let data: &[Segment] = if length == 0 {
            &[]
        } else {
            &[readable(DATA, length)]
        };
        assert_eq!(guest.request(kind, 0, data).0, status);
    }
    guest.request(IN, 0, &[writable(DATA, 512)]);
    assert_eq!(guest.data(0, 512), [32; 512]);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut guest = guest(false);
    for kind in [2, 3, 5, 14, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[]), (Status::Unsupported as u8, 1));
    }
}

#[test]
fn what_takes_the_host_long_is_a_turn_of_its_own() {
    for kind in [FLUSH, DISCARD] {
        let mut guest = guest(false);
        guest.segment(0, 8, 8, 0);
        let header = guest.header(kind, 0);
        for _ in 0..3 {
            let data = if kind == FLUSH { 0 } else { 16 };
            let pieces = [header, readable(DATA, data), guest.status()];
            guest.queue.offer(&pieces).unwrap();
        }
        for _ in 0..3 {
            assert_eq!(guest.block.on_kick(0).unwrap(), Progress::More(0));
            assert!(guest.queue.used().is_some());
            assert!(guest.queue.used().is_none());
        }
        assert_eq!(guest.block.on_kick(0).unwrap(), Progress::Done);
        assert_eq!(guest.block.counters().errors, 0);
    }
}

#[test]
fn chains_without_room_for_an_answer_are_returned_empty() {
    let mut guest = guest(false);
    let header = guest.header(IN, 0);
    for pieces in [
        vec![header],
        vec![header, readable(DATA, 512)],
        vec![header, writable(DATA, 0)],
        vec![writable(DATA, 512), header],
        vec![header, writable((1 << 40) + 8, 512)],
        vec![header, writable(MEMORY as u64 - 1, 2)],
    ] {
        guest.queue.offer(&pieces).unwrap();
        guest.block.on_kick(0).unwrap();
        assert_eq!(guest.queue.used().unwrap().1, 0, "{pieces:?}");
    }
    guest.queue.offer_loop(header);
    guest.block.on_kick(0).unwrap();
    assert_eq!(guest.queue.used().unwrap().1, 0);
    assert_eq!(guest.block.counters().errors, 7);
}

#[test]
fn a_short_header_is_answered_with_an_error() {
    let mut guest = guest(false);
    let status = guest.status();
    guest.queue.offer(&[readable(HEADERS, 15), status]).unwrap();
    guest.block.on_kick(0).unwrap();
    assert_eq!(
        guest.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(),
        Status::IoError as u8
    );
}

#[test]
fn the_header_may_be_scattered_and_the_status_may_follow_data() {
    let mut guest = guest(true);
    guest.header(IN, 1);
    guest
        .memory
        .write_obj(UNTOUCHED, GuestAddress(DATA + 512))
        .unwrap();
    let pieces = [
        readable(HEADERS, 3),
        readable(HEADERS + 3, 13),
        writable(DATA, 513),
    ];
    guest.queue.offer(&pieces).unwrap();
    guest.block.on_kick(0).unwrap();
    assert_eq!(guest.queue.used().unwrap().1, 513);
    assert_eq!(guest.data(511, 2), [33, 0]);
}

#[test]
fn indirect_descriptors_work() {
    let mut guest = guest(true);
    let pieces = [guest.header(IN, 0), writable(DATA, 512), guest.status()];
    guest.queue.offer_indirect(0x30_0000, &pieces).unwrap();
    guest.block.on_kick(0).unwrap();
    assert_eq!(guest.queue.used().unwrap().1, 513);
    assert_eq!(guest.data(0, 512), [32; 512]);
}

#[test]
fn a_request_larger_than_offered_is_refused() {
    let mut guest = guest(true);
    // 4 MiB of guest memory, again and again: more than the limit, less than a chain may have.
    let mut pieces = vec![guest.header(IN, 0)];
    pieces.extend([writable(0, MEMORY); 100]);
    pieces.push(guest.status());
    guest.queue.offer(&pieces).unwrap();
    guest.block.on_kick(0).unwrap();
    assert_eq!(guest.queue.used().unwrap().1, 1);
    assert_eq!(
        guest.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(),
        Status::IoError as u8
    );
}

#[test]
fn a_long_queue_is_served_in_turns() {
    let mut guest = guest(true);
    let count = QUEUE_SIZE / 3;
    let header = guest.header(IN, 0);
    for _ in 0..count {
        guest
            .queue
            .offer(&[header, writable(DATA, 64 * 512), writable(STATUS, 1)])
            .unwrap();
    }
    let mut turns = 1;
    while guest.block.on_kick(0).unwrap() == Progress::More(0) {
        turns += 1;
    }
    assert_eq!(turns, 1);
    assert_eq!(
        (0..).map_while(|_| guest.queue.used()).count(),
        usize::from(count)
    );
    for _ in 0..QUEUE_SIZE {
        guest.queue.offer(&[header]).unwrap();
    }
    assert_eq!(guest.block.on_kick(0).unwrap(), Progress::More(0));
    assert_eq!(
        (0..).map_while(|_| guest.queue.used()).count(),
        BUDGET_REQUESTS
    );
    while guest.block.on_kick(0).unwrap() == Progress::More(0) {}
    assert_eq!(
        (0..).map_while(|_| guest.queue.used()).count(),
        usize::from(QUEUE_SIZE) - BUDGET_REQUESTS
    );
}

#[test]
fn event_indices_spare_interrupts() {
    let mut guest = guest(true);
    guest.block.reset();
    guest.activate(true);
    guest.queue.set_used_event(1);
    guest.request(IN, 0, &[writable(DATA, 512)]);
    assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), 0);
    guest.request(IN, 0, &[writable(DATA, 512)]);
    assert_eq!(guest.interrupt.queue.load(Ordering::SeqCst), 1);
    assert!(guest.queue.offer(&[guest.header(IN, 0)]).is_some() && guest.queue.wants_kick());
}

#[test]
fn a_ring_that_runs_ahead_breaks_the_device() {
    let mut guest = guest(true);
    let avail = guest.queue.device_side(false).record().avail;
    guest
        .memory
        .write_obj(QUEUE_SIZE + 1, GuestAddress(avail + 2))
        .unwrap();
    assert!(matches!(guest.block.on_kick(0), Err(DeviceError::Queue(_))));
}

#[test]
fn the_device_comes_back_with_its_disk_only() {
    let mut guest = guest(false);
    guest.request(IN, 0, &[writable(DATA, 512)]);
    let json = serde_json::to_string(&guest.block.state()).unwrap();
    let DeviceState::Block(state) = serde_json::from_str(&json).unwrap() else {
        panic!("{json}")
    };
    let disk = |length, readonly| {
        Disk::new(
            vec![FileExtent {
                file: disk_file(),
                offset: 0,
                length,
            }],
            readonly,
        )
        .unwrap()
    };
    let restored = Block::restore(&state, disk(SECTORS * SECTOR, false)).unwrap();
    assert_eq!(restored.state(), guest.block.state());
    assert!(matches!(
        Block::restore(&state, disk(SECTOR, false)),
        Err(BlockError::Mismatch)
    ));
    assert!(matches!(
        Block::restore(&state, disk(SECTORS * SECTOR, true)),
        Err(BlockError::Mismatch)
    ));
}

#[test]
fn the_configuration_has_capacity_and_limits() {
    let guest = guest(false);
    let config = guest.block.config();
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], MAX_SEGMENTS.to_le_bytes());
}

proptest! {
    /// Whatever is in the descriptors, the device answers or returns every chain and stays usable.
    #[test]
    fn no_chain_breaks_the_device(
        kind in prop::sample::select(vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77]),
        sector in prop::sample::select(vec![0, 1, 63, 64, u64::MAX]),
        pieces in prop::collection::vec(
            (prop::sample::select(vec![HEADERS, DATA, MEMORY as u64 - 8, 1 << 40]), prop::sample::select(vec![0usize, 1, 16, 512, 4096]), any::<bool>()),
            0..6,
        ),
    ) {
        let mut guest = guest(false);
        let mut chain = vec![guest.header(kind, sector)];
        chain.extend(pieces.iter().map(|(address, len, write)| {
            if *write { writable(*address, *len) } else { readable(*address, *len) }
        }));
        guest.queue.offer(&chain).unwrap();
        driver::kick(&mut guest.block, 0);
        prop_assert!(guest.queue.used().is_some());
        prop_assert_eq!(guest.request(IN, 5, &[writable(DATA, 512)]).0, 0);
    }
}

/// Sectors and lengths at all edges, against numbers that can't overflow.
#[test]
fn a_range_is_on_the_disk_or_refused_at_each_edge() {
    let limits = Limits {
        sectors: 8,
        data: 6 * SECTOR,
        segments: 2,
        segment_sectors: 5,
    };
    let edges = [
        0,
        1,
        7,
        8,
        9,
        u64::MAX / SECTOR,
        u64::MAX / SECTOR + 1,
        1 << 63,
        u64::MAX,
    ];
    let mut memory = vec![0_u8; 0x2000];
    for sector in edges {
        for length in [
            0,
            1,
            511,
            512,
            513,
            1024,
            5 * 512,
            6 * 512 - 1,
            6 * 512,
            6 * 512 + 1,
            7 * 512,
        ] {
            for kind in [IN, OUT] {
                memory[..16].fill(0);
                memory[..4].copy_from_slice(&kind.to_le_bytes());
                memory[8..16].copy_from_slice(&sector.to_le_bytes());
                let all = VolatileSlice::from(memory.as_mut_slice());
                let slice = |at, length| all.subslice(at, length).unwrap();
                let (header, status) = (slice(0, 16), slice(0x1fff, 1));
                let data = slice(0x100, length);
                let mut buffers = Buffers {
                    readable: vec![header],
                    writable: vec![],
                };
                (if kind == IN {
                    &mut buffers.writable
                } else {
                    &mut buffers.readable
                })
                .push(data);
                buffers.writable.push(status);
                let action = Request::parse(buffers, &limits).unwrap().action;
                let end = u128::from(sector) * 512 + length as u128;
                let good = length % 512 == 0 && length <= 6 * 512 && end <= 8 * 512;
                let start = match action {
                    Action::Read(start, _) | Action::Write(start, _) => Some(start),
                    _ => None,
                };
                let wanted = good.then(|| sector.wrapping_mul(512));
                assert_eq!(start, wanted, "{length} bytes at {sector}");
            }
        }
        for count in [0, 1, 4, 5, 6, 8, 9, u32::MAX] {
            memory[..16].fill(0);
            memory[..4].copy_from_slice(&DISCARD.to_le_bytes());
            memory[16..24].copy_from_slice(&sector.to_le_bytes());
            memory[24..28].copy_from_slice(&count.to_le_bytes());
            memory[28..32].fill(0);
            let all = VolatileSlice::from(memory.as_mut_slice());
            let buffers = Buffers {
                readable: vec![all.subslice(0, 32).unwrap()],
                writable: vec![all.subslice(0x1fff, 1).unwrap()],
            };
            let action = Request::parse(buffers, &limits).unwrap().action;
            let good = count <= 5 && u128::from(sector) + u128::from(count) <= 8;
            assert_eq!(
                matches!(action, Action::Punch(_)),
                good,
                "{count} sectors at {sector}"
            );
        }
    }
}
