//! Attacks on virtio-blk.

use crate::attack::{
    A_WHILE, Attack, DISK, DISK_SECTORS, FIXED_DISK, NOWHERE, Outcome, REFUSED, SURVIVED, Scene,
    attack,
};
use crate::attack::{buffer, disk_request, given_up, status};
use crate::machine::memory::{FILE_REGION, read8, write32, write64};
use crate::machine::virtio::{Device, NEXT, SIZE, WRITE};
use crate::machine::{cpu, second};

/// Kinds of requests.
const READ: u32 = 0;
const WRITE_DATA: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Asks for something that must be answered with an error.
fn error(disk: Device, kind: u32, sector: u64, data: u64, length: u32) -> Outcome {
    let mut queue = disk.start(0, 0);
    disk_request(&queue, kind, sector, data, length);
    match queue.ask(0) {
        Some(_) if matches!(read8(status()), 1 | 2) => Outcome::Refused,
        Some(_) => Outcome::Wrong,
        None => given_up(disk),
    }
}

fn all(outcomes: impl IntoIterator<Item = Outcome>) -> Outcome {
    let bad = outcomes
        .into_iter()
        .find(|outcome| *outcome != Outcome::Refused);
    bad.unwrap_or(Outcome::Refused)
}

/// Asks for a hole or zeros in these sectors.
fn punch(disk: Device, kind: u32, sector: u64, count: u32, flags: u32) -> Outcome {
    write64(buffer(2), sector);
    write32(buffer(2) + 8, count);
    write32(buffer(2) + 12, flags);
    error(disk, kind, 0, buffer(2), 16)
}

/// Changes a request while it is made, over and over.
fn race(scene: &Scene, disk: Device, changing: u64, one: u64, other: u64) -> Outcome {
    if !scene.second {
        return Outcome::NotHere;
    }
    let mut queue = disk.start(0, 0);
    disk_request(&queue, READ, 0, buffer(2), 512);
    // A buffer to read: what is a write, if anything.
    queue.describe(1, buffer(2), 512, NEXT, 2);
    second::flip(changing, one, other);
    let start = cpu::time();
    while cpu::time().wrapping_sub(start) < A_WHILE && !disk.needs_reset() {
        queue.ask(0);
    }
    second::rest();
    Outcome::Survived
}

pub(super) static ATTACKS: [Attack; 14] = [
    attack("sectors behind the end", REFUSED, |_| {
        let sectors = [
            DISK_SECTORS,
            DISK_SECTORS + 1,
            u64::MAX / 512,
            1 << 55,
            u64::MAX,
        ];
        let kinds = [READ, WRITE_DATA];
        all(kinds
            .into_iter()
            .flat_map(|kind| sectors.map(|at| error(DISK, kind, at, buffer(2), 512))))
    }),
    attack("data that goes over the end", REFUSED, |_| {
        all([READ, WRITE_DATA].map(|kind| error(DISK, kind, DISK_SECTORS - 1, buffer(2), 1024)))
    }),
    attack("data that is no sectors", REFUSED, |_| {
        all([1, 511, 513].map(|length| error(DISK, WRITE_DATA, 0, buffer(2), length)))
    }),
    attack("writes to a read-only disk", REFUSED, |_| {
        all([
            error(FIXED_DISK, WRITE_DATA, 0, buffer(2), 512),
            punch(FIXED_DISK, DISCARD, 0, 8, 0),
            punch(FIXED_DISK, WRITE_ZEROES, 0, 8, 0),
        ])
    }),
    attack("kinds of requests that are none", REFUSED, |_| {
        all([2, 3, 5, 7, 9, 10, 12, 14, 0x8000_0001, u32::MAX]
            .map(|kind| error(DISK, kind, 0, buffer(2), 512)))
    }),
    attack(
        "holes behind the end, too long, or with flags",
        REFUSED,
        |_| {
            all([
                punch(DISK, DISCARD, DISK_SECTORS, 1, 0),
                punch(DISK, DISCARD, u64::MAX, 1, 0),
                punch(DISK, DISCARD, u64::MAX / 512, u32::MAX, 0),
                punch(DISK, WRITE_ZEROES, 1, u32::MAX, 0),
                punch(DISK, DISCARD, 0, 8, 1),
                punch(DISK, WRITE_ZEROES, 0, 8, u32::MAX),
                error(DISK, DISCARD, 0, buffer(2), 0),
                error(DISK, DISCARD, 0, buffer(2), 17),
                error(DISK, WRITE_ZEROES, 0, buffer(2), 16 * 17),
                error(DISK, DISCARD, 0, buffer(2), 1 << 20),
            ])
        },
    ),
    attack("no place for an answer", REFUSED, |_| {
        let mut queue = DISK.start(0, 0);
        disk_request(&queue, WRITE_DATA, 0, buffer(2), 512);
        queue.describe(1, buffer(2), 512, 0, 0);
        match queue.ask(0) {
            Some((_, 0)) => Outcome::Refused,
            Some(_) => Outcome::Wrong,
            None => given_up(DISK),
        }
    }),
    attack("a header that is too short", REFUSED, |_| {
        let mut queue = DISK.start(0, 0);
        disk_request(&queue, FLUSH, 0, buffer(2), 0);
        queue.chain(0, &[(buffer(1), 15, false), (status(), 1, true)]);
        match queue.ask(0) {
            Some(_) if read8(status()) == 1 => Outcome::Refused,
            _ => Outcome::Wrong,
        }
    }),
    attack(
        "a header in bytes, and an answer in the header",
        SURVIVED,
        |_| {
            let mut queue = DISK.start(0, 0);
            disk_request(&queue, WRITE_DATA, 0, buffer(2), 512);
            for at in 0..13u16 {
                queue.describe(at, buffer(1) + u64::from(at), 1, NEXT, at + 1);
            }
            queue.describe(13, buffer(1) + 13, 3, NEXT, 14);
            queue.describe(14, buffer(2), 512, NEXT, 15);
            queue.describe(15, buffer(1), 1, WRITE, 0);
            if queue.ask(0).is_none() {
                given_up(DISK)
            } else {
                Outcome::Survived
            }
        },
    ),
    attack("data to read-only memory, or to nowhere", REFUSED, |_| {
        for data in [FILE_REGION, NOWHERE, u64::MAX - 511] {
            let mut queue = DISK.start(0, 0);
            disk_request(&queue, READ, 0, data, 512);
            if queue.ask(0) != Some((0, 0)) {
                return Outcome::Wrong;
            }
        }
        Outcome::Refused
    }),
    attack(
        "a sector that changes while it is read",
        SURVIVED,
        |scene| race(scene, DISK, buffer(1) + 8, 0, u64::MAX / 512),
    ),
    attack(
        "a read that becomes a write, of a read-only disk",
        SURVIVED,
        |scene| race(scene, FIXED_DISK, buffer(1), READ.into(), WRITE_DATA.into()),
    ),
    attack("flushes and holes without end", SURVIVED, |_| {
        let mut queue = DISK.start(0, 0);
        write64(buffer(2), 0);
        write64(buffer(2) + 8, 8);
        disk_request(&queue, DISCARD, 0, buffer(2), 16);
        queue.chain(3, &[(buffer(1) + 128, 16, false), (status(), 1, true)]);
        write32(buffer(1) + 128, FLUSH);
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            for at in 0..SIZE {
                queue.offer(at % 2 * 3);
            }
            queue.kick();
            for _ in 0..SIZE {
                queue.wait();
            }
        }
        Outcome::Survived
    }),
    attack("a reset in the midst of large writes", SURVIVED, |_| {
        for _ in 0..20 {
            let mut queue = DISK.start(0, 0);
            disk_request(&queue, WRITE_DATA, 0, buffer(12), 512 << 10);
            (0..SIZE).for_each(|_| queue.offer(0));
            queue.kick();
        }
        Outcome::Survived
    }),
];
