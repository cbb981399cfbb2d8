//! Attacks on virtio-fs. The host's file server checks that what it gets is packets of FUSE.

use crate::attack::refused;
use crate::attack::{
    A_WHILE, Attack, FS, NOWHERE, Outcome, REFUSED, SURVIVED, Scene, attack, buffer, fuse_request,
    given_up,
};
use crate::machine::memory::{FILE_REGION, read32, write32};
use crate::machine::random::Random;
use crate::machine::virtio::{NEXT, Queue, SIZE, WRITE};
use crate::machine::{cpu, second};

/// Operations.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Bytes of an answer without contents.
const HEADER: u32 = 16;

fn start() -> Queue {
    let queue = FS.start(0, 1);
    fuse_request(&queue, 1);
    queue
}

pub(super) static ATTACKS: [Attack; 10] = [
    attack("lengths that lie", REFUSED, |_| {
        for length in [0, 1, 39, 40, 55, 57, 0x1_0000, u32::MAX] {
            let mut queue = start();
            write32(buffer(7), length);
            let outcome = refused(&mut queue, 0, HEADER);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        Outcome::Refused
    }),
    attack("requests without a header", REFUSED, |_| {
        for length in [1, 8, 16, 39] {
            let mut queue = start();
            write32(buffer(7), length);
            queue.chain(0, &[(buffer(7), length, false), (buffer(8), 128, true)]);
            let outcome = refused(&mut queue, 0, HEADER);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        Outcome::Refused
    }),
    attack("a request that is larger than any", REFUSED, |_| {
        let mut queue = start();
        write32(buffer(7), 15 << 20);
        (0..15).for_each(|at| queue.describe(at, 0x100_0000, 1 << 20, NEXT, at + 1));
        queue.describe(15, buffer(8), 128, WRITE, 0);
        refused(&mut queue, 0, HEADER)
    }),
    attack("no room for an answer", REFUSED, |_| {
        for room in [&[][..], &[(buffer(8), 15, true)]] {
            let mut queue = start();
            let request = [(buffer(7), 56, false)];
            queue.chain(0, &request);
            if let [room] = room {
                queue.chain(0, &[request[0], *room]);
            }
            let outcome = refused(&mut queue, 0, 0);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        Outcome::Refused
    }),
    attack("room in read-only memory, or nowhere", REFUSED, |_| {
        for room in [FILE_REGION, NOWHERE, u64::MAX - 64] {
            let mut queue = start();
            queue.chain(0, &[(buffer(7), 56, false), (room, 128, true)]);
            let outcome = refused(&mut queue, 0, 0);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        Outcome::Refused
    }),
    attack(
        "forgets and interrupts, with and without room",
        REFUSED,
        |_| {
            for kind in [FORGET, BATCH_FORGET, INTERRUPT] {
                for index in 0..2 {
                    let mut queue = FS.start(0, index);
                    fuse_request(&queue, 9);
                    write32(buffer(7) + 4, kind);
                    let outcome = refused(&mut queue, 0, 0);
                    queue.chain(0, &[(buffer(7), 56, false)]);
                    if outcome != Outcome::Refused || refused(&mut queue, 0, 0) != Outcome::Refused
                    {
                        return Outcome::Wrong;
                    }
                }
            }
            Outcome::Refused
        },
    ),
    attack("one request many times over", REFUSED, |_| {
        let mut queue = start();
        for _ in 0..10 {
            (0..SIZE).for_each(|_| queue.offer(0));
            queue.kick();
            for _ in 0..SIZE {
                if queue.wait().is_none() {
                    return given_up(FS);
                }
            }
        }
        if read32(buffer(8) + 8) == 1 {
            Outcome::Refused
        } else {
            Outcome::Wrong
        }
    }),
    attack("operations at random", SURVIVED, |scene| {
        let random = &Random::new(scene.seed);
        let mut queue = start();
        for _ in 0..500 {
            (0..14).for_each(|word| write32(buffer(7) + 4 * word, random.next() as u32));
            write32(
                buffer(7),
                random.one_of(&[40, 56, 56, 56, random.next() & 0xff]) as u32,
            );
            write32(buffer(7) + 4, random.below(64) as u32);
            if queue.ask(0).is_none() {
                return given_up(FS);
            }
        }
        Outcome::Survived
    }),
    attack(
        "headers that change while they are read",
        SURVIVED,
        |scene: &mut Scene| {
            if !scene.second {
                return Outcome::NotHere;
            }
            let mut queue = start();
            second::flip(buffer(7), 3 << 32 | 56, u64::from(FORGET) << 32 | 0xffff);
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < A_WHILE {
                if queue.ask(0).is_none() {
                    return given_up(FS);
                }
            }
            Outcome::Survived
        },
    ),
    attack("resets while the server has requests", SURVIVED, |_| {
        let start_time = cpu::time();
        while cpu::time().wrapping_sub(start_time) < A_WHILE {
            let mut queue = start();
            (0..SIZE).for_each(|_| queue.offer(0));
            queue.kick();
        }
        Outcome::Survived
    }),
];
