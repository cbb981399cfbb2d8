//! What an attack is, what must come of it, and how the guest sees that devices still work.

use crate::machine::cpu::{self, SECOND};
use crate::machine::memory::{FILE_REGION, PLUGGABLE, fill, put, read16, read32, write32, write64};
use crate::machine::virtio::{DEVICE_ID, Device, PATIENCE, Queue, SLOT_SIZE, SLOTS};

/// What came of an attack, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// The device answered with an error, or took no notice; it works without a reset.
    Refused = b'R',
    /// The device asked for a reset.
    NeedsReset = b'N',
    /// Anything may be: the attack has more than one end.
    Survived = b'S',
    /// The attack needs what this host does not have.
    NotHere = b'-',
    /// Not what should be.
    Wrong = b'W',
}

/// What must come of an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Must {
    /// This outcome.
    Be(Outcome),
    /// The guest's end, as the VMM reports a shutdown.
    Shutdown,
    /// The guest's end, by a shutdown or by KVM's inability to go on: hosts differ.
    End,
    /// The guest's end, reported as its kernel's panic.
    Panic,
    /// The guest stands still, and the VMM doesn't.
    Hang,
    /// [`Outcome::Survived`], or as with [`Must::End`], or the guest is lost: it may have devices write to itself.
    Any,
}

/// What attacks share.
#[derive(Debug)]
pub struct Scene {
    /// Determines what attacks at random do.
    pub seed: u64,
    /// How many steps an attack at random has.
    pub steps: u64,
    /// Whether there is a second processor.
    pub second: bool,
}

/// An attack.
#[derive(Debug)]
pub struct Attack {
    /// What is done.
    pub name: &'static str,
    /// What must come of it.
    pub must: Must,
    /// Does it, in the guest.
    pub run: fn(&mut Scene) -> Outcome,
}

/// Attacks that are made one after another in one VM.
#[derive(Debug)]
pub struct Group {
    /// What is attacked.
    pub name: &'static str,
    /// The devices, a bit of [`TARGETS`] each, that are looked at after each attack. All are after the last.
    pub looks_at: u16,
    /// The attacks.
    pub attacks: &'static [Attack],
}

/// Shortens the tables.
pub(crate) const fn attack(
    name: &'static str,
    must: Must,
    run: fn(&mut Scene) -> Outcome,
) -> Attack {
    Attack { name, must, run }
}

pub(crate) const fn group(name: &'static str, looks_at: u16, attacks: &'static [Attack]) -> Group {
    Group {
        name,
        looks_at,
        attacks,
    }
}

pub(crate) const REFUSED: Must = Must::Be(Outcome::Refused);
pub(crate) const RESET: Must = Must::Be(Outcome::NeedsReset);
pub(crate) const SURVIVED: Must = Must::Be(Outcome::Survived);

/// The devices that are there, in the order of their bits.
pub static TARGETS: [Target; 9] = [
    Target {
        name: "rng",
        slot: RNG.slot,
        id: 4,
        works: rng_works,
    },
    Target {
        name: "block",
        slot: DISK.slot,
        id: 2,
        works: disk_works,
    },
    Target {
        name: "read-only block",
        slot: FIXED_DISK.slot,
        id: 2,
        works: fixed_disk_works,
    },
    Target {
        name: "pmem",
        slot: PMEM.slot,
        id: 27,
        works: pmem_works,
    },
    Target {
        name: "net",
        slot: NET.slot,
        id: 1,
        works: net_works,
    },
    Target {
        name: "vsock",
        slot: VSOCK.slot,
        id: 19,
        works: vsock_works,
    },
    Target {
        name: "fs",
        slot: FS.slot,
        id: 26,
        works: fs_works,
    },
    Target {
        name: "balloon",
        slot: BALLOON.slot,
        id: 5,
        works: balloon_works,
    },
    Target {
        name: "memory",
        slot: PLUGGED.slot,
        id: 24,
        works: plugged_works,
    },
];

/// The bits of all of them.
pub const ALL: u16 = (1 << TARGETS.len()) - 1;

/// A device, and a request that tells whether it works.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Its slot.
    pub slot: u8,
    id: u32,
    works: fn() -> bool,
}

pub(crate) const RNG: Device = Device { slot: 1 };
pub(crate) const DISK: Device = Device { slot: 2 };
pub(crate) const FIXED_DISK: Device = Device { slot: 3 };
pub(crate) const PMEM: Device = Device { slot: 4 };
pub(crate) const NET: Device = Device { slot: 5 };
pub(crate) const VSOCK: Device = Device { slot: 6 };
pub(crate) const FS: Device = Device { slot: 7 };
pub(crate) const BALLOON: Device = Device { slot: 8 };
pub(crate) const PLUGGED: Device = Device { slot: 9 };

/// The first of the slots in which the host attaches and detaches while the guest is at it, and their number.
pub const CHANGING_SLOTS: u8 = 10;
/// See [`CHANGING_SLOTS`].
pub const CHANGING_SLOTS_COUNT: u8 = 3;
/// The guest's context id.
pub const CID: u32 = 3;
pub use crate::machine::memory::PLUGGABLE_MIB;
/// How much of that the host allows, in MiB.
pub const ALLOWED_MIB: u64 = 128;
/// The port by which the guest says how much of it it wants.
pub const WISHES: u32 = 0x1000_0000;
/// What disks and files are filled with, 4 bytes at a time.
pub const PATTERN: u32 = u32::from_le_bytes(*b"Hull");
/// Sectors of the disk that the guest may write to.
pub const DISK_SECTORS: u64 = 2048;

/// A page of buffers for each use.
pub(crate) const BUFFERS: u64 = 0x180_0000;
pub(crate) const fn buffer(number: u64) -> u64 {
    BUFFERS + number * 0x2_0000
}
/// The end of the guest's memory.
pub(crate) const MEMORY_END: u64 = 0x200_0000;
/// The registers of the disk.
pub(crate) const SLOT_REGISTERS: u64 = SLOTS + 2 * SLOT_SIZE;
/// Nothing is there.
pub(crate) const NOWHERE: u64 = 0x4000_0000;

/// Returns which of the devices work that these bits name, each after a reset. The others are taken to.
pub(crate) fn working(looks_at: u16) -> u16 {
    let works = |bit: &usize| {
        let target = &TARGETS[*bit];
        let device = Device { slot: target.slot };
        let looks = looks_at & 1 << bit != 0;
        !looks || device.read(DEVICE_ID) == target.id && (target.works)()
    };
    (0..TARGETS.len()).filter(works).map(|bit| 1 << bit).sum()
}

pub(crate) fn rng_works() -> bool {
    let mut queue = RNG.start(0, 0);
    queue.chain(0, &[(buffer(0), 64, true)]);
    queue.ask(0) == Some((0, 64))
}

/// Makes the request of a disk at descriptors 0 to 2: header, data, status.
pub(crate) fn disk_request(queue: &Queue, kind: u32, sector: u64, data: u64, length: u32) {
    write32(buffer(1), kind);
    write32(buffer(1) + 4, 0);
    write32(buffer(1) + 8, sector as u32);
    write32(buffer(1) + 12, (sector >> 32) as u32);
    fill(status(), 0xff, 1);
    queue.chain(
        0,
        &[
            (buffer(1), 16, false),
            (data, length, kind == 0),
            (status(), 1, true),
        ],
    );
}

/// Where a disk's answer is.
pub(crate) const fn status() -> u64 {
    buffer(1) + 64
}

pub(crate) fn reads_pattern(disk: Device) -> bool {
    let mut queue = disk.start(0, 0);
    fill(buffer(2), 0, 512);
    // The last sector, which no attack may write to.
    disk_request(&queue, 0, DISK_SECTORS - 1, buffer(2), 512);
    let answer = queue.ask(0);
    answer == Some((0, 513)) && read32(status()) as u8 == 0 && read32(buffer(2)) == PATTERN
}

pub(crate) fn disk_works() -> bool {
    reads_pattern(DISK)
}

pub(crate) fn fixed_disk_works() -> bool {
    reads_pattern(FIXED_DISK)
}

pub(crate) fn pmem_works() -> bool {
    let mut queue = PMEM.start(0, 0);
    write32(buffer(3), 0);
    write32(buffer(3) + 8, u32::MAX);
    queue.chain(0, &[(buffer(3), 4, false), (buffer(3) + 8, 4, true)]);
    let answer = queue.ask(0);
    answer == Some((0, 4)) && read32(buffer(3) + 8) == 0 && read32(FILE_REGION) == PATTERN
}

/// Makes a frame that nobody answers, behind an empty virtio header.
pub(crate) fn frame(at: u64) -> u32 {
    fill(at, 0, 12 + 60);
    put(at + 12, &[0xff; 6]);
    put(at + 18, &[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    12 + 60
}

/// Starts the card. One whose offloads were changed too often can be started again after a while.
pub(crate) fn start_net(features: u64, index: u32) -> Queue {
    let mut queue = NET.start(features, index);
    cpu::wait(PATIENCE, || {
        let refused = NET.needs_reset();
        if refused {
            cpu::wait(SECOND / 10, || false);
            queue = NET.start(features, index);
        }
        !refused
    });
    queue
}

pub(crate) fn net_works() -> bool {
    let mut queue = start_net(0, 1);
    queue.chain(0, &[(buffer(4), frame(buffer(4)), false)]);
    queue.ask(0).is_some()
}

/// Writes the header of a vsock packet.
pub(crate) fn vsock_header(at: u64, port: u32, peer: u32, op: u16, length: u32) {
    vsock_header_with(at, port, peer, op, length, 0x1_0000, 0);
}

pub(crate) fn vsock_header_with(
    at: u64,
    port: u32,
    peer: u32,
    op: u16,
    length: u32,
    room: u32,
    taken: u32,
) {
    for (index, word) in [
        CID,
        0,
        2,
        0,
        port,
        peer,
        length,
        u32::from(op) << 16 | 1,
        0,
        room,
        taken,
    ]
    .into_iter()
    .enumerate()
    {
        write32(at + 4 * index as u64, word);
    }
}

pub(crate) fn vsock_works() -> bool {
    let mut sent = VSOCK.start(0, 1);
    let mut received = Queue::new(VSOCK, 0);
    for at in 0..8u16 {
        received.chain(at, &[(buffer(6) + 0x1000 * u64::from(at), 0x1000, true)]);
        received.offer(at);
    }
    received.kick();
    // To a port that nobody listens on.
    vsock_header(buffer(5), 1000, 77, 1, 0);
    sent.chain(0, &[(buffer(5), 44, false)]);
    if sent.ask(0).is_none() {
        return false;
    }
    while let Some((head, length)) = received.wait() {
        let at = buffer(6) + 0x1000 * u64::from(head);
        if length == 44 && read32(at + 28) >> 16 == 3 && read32(at + 16) == 77 {
            return true;
        }
    }
    false
}

/// Makes a FUSE request (GETATTR of the root) with room for an answer, at descriptors 0 and 1.
pub(crate) fn fuse_request(queue: &Queue, unique: u32) {
    fill(buffer(7), 0, 64);
    write32(buffer(7), 56);
    write32(buffer(7) + 4, 3);
    write32(buffer(7) + 8, unique);
    write32(buffer(7) + 16, 1);
    fill(buffer(8), 0, 128);
    queue.chain(0, &[(buffer(7), 56, false), (buffer(8), 128, true)]);
}

pub(crate) fn fs_works() -> bool {
    let mut queue = FS.start(0, 1);
    fuse_request(&queue, 0x77);
    queue.ask(0).is_some_and(|(_, length)| length >= 16) && read32(buffer(8) + 8) == 0x77
}

/// VIRTIO_BALLOON_F_REPORTING, and the queue that is there with it.
pub(crate) const REPORTING: u64 = 1 << 5;
pub(crate) const REPORTS: u32 = 2;

pub(crate) fn balloon_works() -> bool {
    let mut queue = BALLOON.start(REPORTING, REPORTS);
    write32(buffer(12), PATTERN);
    queue.chain(0, &[(buffer(12), 4096, true)]);
    queue.ask(0) == Some((0, 0)) && read32(buffer(12)) == 0
}

/// Makes a request of virtio-mem at descriptors 0 and 1.
pub(crate) fn plug_request(queue: &Queue, kind: u16, address: u64, count: u16) {
    write64(buffer(13), kind.into());
    write64(buffer(13) + 8, address);
    write64(buffer(13) + 16, count.into());
    fill(buffer(14), 0xff, 10);
    queue.chain(0, &[(buffer(13), 24, false), (buffer(14), 10, true)]);
}

pub(crate) fn plugged_works() -> bool {
    let mut queue = PLUGGED.start(0, 0);
    plug_request(&queue, 3, PLUGGABLE, 1);
    queue.ask(0) == Some((0, 10)) && read16(buffer(14)) == 0
}

/// Returns what came of a request that must be refused: an answer without a byte but, at most, `allowed`.
pub(crate) fn refused(queue: &mut Queue, head: u16, allowed: u32) -> Outcome {
    match queue.ask(head) {
        Some((_, length)) if length <= allowed => Outcome::Refused,
        Some(_) => Outcome::Wrong,
        None => given_up(queue.device),
    }
}

/// Returns what came of a device that did not answer.
pub(crate) fn given_up(device: Device) -> Outcome {
    if device.needs_reset() {
        Outcome::NeedsReset
    } else {
        Outcome::Wrong
    }
}

/// How long attacks are kept up that have no end of their own.
pub(crate) const A_WHILE: u64 = SECOND / 10;
