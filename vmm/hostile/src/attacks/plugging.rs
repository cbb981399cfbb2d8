//! Attacks on virtio-mem. The host allows half of the pluggable memory; the guest says what it wants of that.

use crate::attack::{
    A_WHILE, ALLOWED_MIB, Attack, DISK, MEMORY_END, Outcome, PLUGGABLE_MIB, PLUGGED, REFUSED,
    SURVIVED, VSOCK, WISHES, attack, buffer, disk_request, given_up, plug_request, refused,
    vsock_header,
};
use crate::machine::memory::{FILE_REGION, PLUGGABLE, read16, read32, read64, write32, write64};
use crate::machine::random::Random;
use crate::machine::virtio::{CONFIG, PATIENCE, Queue, SIZE};
use crate::machine::{cpu, second};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const END: u64 = PLUGGABLE + PLUGGABLE_MIB * MIB;
/// Blocks that there are, and that are allowed.
const BLOCKS: u16 = (PLUGGABLE_MIB * MIB / BLOCK) as u16;
const ALLOWED: u16 = (ALLOWED_MIB * MIB / BLOCK) as u16;

/// Requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Answers; the last is ours: the device said nothing.
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
const NOTHING: u16 = u16::MAX;

/// Wishes that a device takes whose answers nobody takes; one more than its queue of them holds is too many.
const UNANSWERED: u32 = 250;

/// Makes a request, and returns the answer.
fn ask(queue: &mut Queue, kind: u16, address: u64, count: u16) -> u16 {
    plug_request(queue, kind, address, count);
    match queue.ask(0) {
        Some((0, 10)) => read16(buffer(14)),
        _ => NOTHING,
    }
}

/// How much is plugged and how much is requested, in bytes, as the device says.
fn sizes() -> (u64, u64) {
    let long = |at| u64::from(PLUGGED.read(at)) | u64::from(PLUGGED.read(at + 4)) << 32;
    (long(CONFIG + 40), long(CONFIG + 48))
}

fn send_wish(sent: &mut Queue, mib: u32) -> bool {
    vsock_header(buffer(5), 1000, WISHES + mib, 1, 0);
    sent.chain(0, &[(buffer(5), 44, false)]);
    sent.ask(0).is_some()
}

/// Says how much is wanted, in MiB. False: the device does not ask for as much.
fn want(mib: u32, requested_mib: u64) -> bool {
    send_wish(&mut VSOCK.start(0, 1), mib)
        && cpu::wait(PATIENCE, || sizes().1 == requested_mib * MIB)
}

/// Starts the device with nothing plugged, and as much wanted as is allowed.
fn start() -> Queue {
    let mut queue = PLUGGED.start(0, 0);
    ask(&mut queue, UNPLUG_ALL, 0, 0);
    want(ALLOWED_MIB as u32, ALLOWED_MIB);
    queue
}

fn outcome(is_right: bool) -> Outcome {
    if is_right {
        Outcome::Refused
    } else {
        Outcome::Wrong
    }
}

/// Returns whether what the device says can be.
fn is_sane() -> bool {
    let (plugged, requested) = sizes();
    plugged.is_multiple_of(BLOCK) && plugged <= ALLOWED_MIB * MIB && requested <= ALLOWED_MIB * MIB
}

pub(super) static ATTACKS: [Attack; 10] = [
    attack("more memory than is allowed or wanted", REFUSED, |_| {
        let mut queue = start();
        let is_right = ask(&mut queue, PLUG, PLUGGABLE, ALLOWED + 1) == NACK
            && ask(&mut queue, PLUG, PLUGGABLE, ALLOWED) == ACK
            && ask(&mut queue, PLUG, END - BLOCK, 1) == NACK
            && want(0xff_ffff, ALLOWED_MIB)
            && ask(&mut queue, PLUG, END - BLOCK, 1) == NACK
            && want(0, 0)
            && ask(&mut queue, UNPLUG, PLUGGABLE, 1) == ACK
            && ask(&mut queue, PLUG, PLUGGABLE, 1) == NACK
            && ask(&mut queue, UNPLUG_ALL, 0, 0) == ACK;
        outcome(is_right && sizes().0 == 0)
    }),
    attack("blocks that are none", REFUSED, |_| {
        let mut queue = start();
        let addresses = [
            0,
            MEMORY_END - BLOCK,
            PLUGGABLE - BLOCK,
            PLUGGABLE + 1,
            PLUGGABLE + 4096,
            PLUGGABLE + MIB,
            END,
            FILE_REGION,
            1 << 46,
            u64::MAX - BLOCK + 1,
            u64::MAX,
        ];
        for kind in [PLUG, UNPLUG, STATE] {
            let mut all = addresses
                .iter()
                .flat_map(|address| [1, 2, u16::MAX].map(|count| (*address, count)))
                .chain([0, BLOCKS + 1, u16::MAX].map(|count| (PLUGGABLE, count)))
                .chain([(END - BLOCK, 2)]);
            if !all.all(|(address, count)| ask(&mut queue, kind, address, count) == ERROR) {
                return Outcome::Wrong;
            }
        }
        outcome(sizes().0 == 0)
    }),
    attack("blocks plugged twice, and unplugged twice", REFUSED, |_| {
        let mut queue = start();
        let at = |block: u64| PLUGGABLE + block * BLOCK;
        let is_right = ask(&mut queue, PLUG, at(1), 2) == ACK
            && ask(&mut queue, PLUG, at(1), 2) == ERROR
            && ask(&mut queue, PLUG, at(0), 2) == ERROR
            && ask(&mut queue, PLUG, at(2), 2) == ERROR
            && ask(&mut queue, UNPLUG, at(0), 2) == ERROR
            && ask(&mut queue, UNPLUG, at(0), 1) == ERROR
            && ask(&mut queue, UNPLUG, at(0), BLOCKS) == ERROR
            && sizes().0 == 2 * BLOCK
            && ask(&mut queue, UNPLUG, at(1), 2) == ACK
            && ask(&mut queue, UNPLUG, at(1), 2) == ERROR;
        outcome(is_right && sizes().0 == 0)
    }),
    attack("requests that are none", REFUSED, |_| {
        let mut queue = start();
        let mut kinds = [4, 0xff, 0x100, 0x8000, u16::MAX].into_iter();
        outcome(kinds.all(|kind| ask(&mut queue, kind, PLUGGABLE, 1) == ERROR))
    }),
    attack("requests of the wrong form", REFUSED, |_| {
        let (request, answer) = (buffer(13), buffer(14));
        let forms: [&[(u64, u32, bool)]; 6] = [
            &[(request, 23, false), (answer, 10, true)],
            &[(request, 24, false), (answer, 9, true)],
            &[(request, 24, false)],
            &[(answer, 10, true)],
            &[
                (request, 12, false),
                (request + 12, 12, false),
                (answer, 10, true),
            ],
            &[(request, 24, false), (answer, 10, true), (answer, 10, true)],
        ];
        start();
        for form in forms {
            let mut queue = PLUGGED.start(0, 0);
            plug_request(&queue, PLUG, PLUGGABLE, 1);
            queue.chain(0, form);
            let outcome = refused(&mut queue, 0, 0);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        outcome(sizes().0 == 0)
    }),
    attack(
        "requests that change while they are read",
        SURVIVED,
        |scene| {
            if !scene.second {
                return Outcome::NotHere;
            }
            let random = &Random::new(scene.seed);
            let mut queue = start();
            for (offset, one, other) in [
                (0, PLUG.into(), UNPLUG_ALL.into()),
                (8, PLUGGABLE, END),
                (16, 1, u64::from(u16::MAX)),
                (16, ALLOWED.into(), u64::from(ALLOWED) + 1),
            ] {
                plug_request(&queue, PLUG, PLUGGABLE, 1);
                second::flip(buffer(13) + offset, one, other);
                let start = cpu::time();
                while cpu::time().wrapping_sub(start) < A_WHILE / 4 {
                    // What the other processor does not write.
                    if offset != 0 {
                        write64(buffer(13), random.one_of(&[PLUG.into(), UNPLUG.into()]));
                    }
                    if queue.ask(0).is_none() {
                        return given_up(PLUGGED);
                    }
                    if !is_sane() {
                        return Outcome::Wrong;
                    }
                }
                second::rest();
            }
            Outcome::Survived
        },
    ),
    attack(
        "memory that goes while devices write to it",
        SURVIVED,
        |_| {
            let mut queue = start();
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < A_WHILE {
                ask(&mut queue, PLUG, PLUGGABLE, 1);
                let mut disk = DISK.start(0, 0);
                disk_request(&disk, 0, 0, PLUGGABLE, BLOCK as u32 / 2);
                disk.offer(0);
                disk.kick();
                if ask(&mut queue, UNPLUG, PLUGGABLE, 1) != ACK || disk.wait().is_none() {
                    return Outcome::Wrong;
                }
            }
            Outcome::Survived
        },
    ),
    attack("memory that was never plugged", SURVIVED, |_| {
        let mut queue = start();
        for at in [PLUGGABLE, PLUGGABLE + 7 * BLOCK, END - 8] {
            write64(at, u64::MAX);
            core::hint::black_box(read64(at));
        }
        let mut disk = DISK.start(0, 0);
        disk_request(&disk, 0, 0, END - 512, 512);
        if disk.ask(0).is_none() {
            return given_up(DISK);
        }
        // All of it is the host's again.
        if ask(&mut queue, UNPLUG_ALL, 0, 0) != ACK || read32(END - 512) != 0 {
            return Outcome::Wrong;
        }
        Outcome::Survived
    }),
    attack("rings in memory that goes", SURVIVED, |_| {
        start();
        let rings = [PLUGGABLE, PLUGGABLE + 0x1000, PLUGGABLE + 0x2000];
        PLUGGED.begin(0);
        PLUGGED.place(0, SIZE, rings[0], rings[1], rings[2]);
        PLUGGED.go();
        let queue = Queue::new(PLUGGED, 0);
        plug_request(&queue, UNPLUG_ALL, 0, 0);
        cpu::copy_string(rings[0], queue.table(), 32);
        // Head 0, offered many times: the ring is gone after the first.
        write32(rings[1], u32::from(SIZE) << 16);
        queue.kick();
        cpu::wait(A_WHILE, || PLUGGED.needs_reset());
        Outcome::Survived
    }),
    attack("wishes without end", SURVIVED, |scene| {
        let random = &Random::new(scene.seed);
        let start = cpu::time();
        let mut sent = VSOCK.start(0, 1);
        for number in 1.. {
            if cpu::time().wrapping_sub(start) >= A_WHILE {
                break;
            }
            // It takes nothing more from a guest that does not take what it answers.
            if number % UNANSWERED == 0 {
                sent = VSOCK.start(0, 1);
            }
            if !send_wish(&mut sent, random.next() as u32 & 0xff_ffff) {
                return given_up(VSOCK);
            }
            if !is_sane() {
                return Outcome::Wrong;
            }
        }
        Outcome::Survived
    }),
];
