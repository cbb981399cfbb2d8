//! Attacks on virtio-net.

use crate::attack::{
    A_WHILE, Attack, NET, Outcome, REFUSED, SURVIVED, Scene, attack, buffer, frame, given_up,
    start_net,
};
use crate::machine::memory::{fill, read8, write8, write16, write32};
use crate::machine::random::Random;
use crate::machine::virtio::{NEXT, Queue, SIZE, WRITE};
use crate::machine::{cpu, second};

/// VIRTIO_NET_F_CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG_RXBUF, STATUS, CTRL_VQ, MQ: where
/// the card offers them.
const OFFLOADS: u64 = 1 | 2 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
const MERGEABLE: u64 = 1 << 15;
const CONTROL: u64 = 1 << 17 | 1 << 22;

/// Writes a frame's header.
fn header(flags: u8, kind: u8, headers: u16, size: u16, start: u16, offset: u16) {
    write8(buffer(4), flags);
    write8(buffer(4) + 1, kind);
    for (index, value) in [headers, size, start, offset].into_iter().enumerate() {
        write16(buffer(4) + 2 + 2 * index as u64, value);
    }
}

fn send(queue: &mut Queue, length: u32) -> Outcome {
    queue.chain(0, &[(buffer(4), length, false)]);
    match queue.ask(0) {
        Some(_) => Outcome::Refused,
        None => given_up(NET),
    }
}

/// Gives a command to the control queue; returns the answer.
fn command(queue: &mut Queue, class: u8, command: u8, data: u32, length: u32) -> Option<u8> {
    write8(buffer(13), class);
    write8(buffer(13) + 1, command);
    write32(buffer(13) + 8, data);
    write8(buffer(13) + 16, 0xee);
    queue.chain(
        0,
        &[
            (buffer(13), 2, false),
            (buffer(13) + 8, length, false),
            (buffer(13) + 16, 1, true),
        ],
    );
    queue.ask(0).map(|_| read8(buffer(13) + 16))
}

pub(super) static ATTACKS: [Attack; 10] = [
    attack(
        "frames of every length, from none to 128 KiB",
        REFUSED,
        |_| {
            let mut queue = start_net(0, 1);
            frame(buffer(4));
            for length in [
                1, 2, 11, 12, 13, 25, 26, 1526, 1527, 9000, 65_535, 65_547, 65_548, 131_072,
            ] {
                if send(&mut queue, length) != Outcome::Refused {
                    return given_up(NET);
                }
            }
            Outcome::Refused
        },
    ),
    attack("headers that lie", REFUSED, |_| {
        let mut queue = start_net(OFFLOADS, 1);
        let length = frame(buffer(4));
        for flags in [0, 1, 2, 3, 0xff] {
            for kind in [0, 1, 3, 4, 5, 0x80, 0x81, 0xff] {
                for value in [0, 1, 59, 60, 61, u16::MAX] {
                    header(flags, kind, value, value, value, value);
                    if send(&mut queue, length) != Outcome::Refused {
                        return given_up(NET);
                    }
                }
            }
        }
        Outcome::Refused
    }),
    attack(
        "segments that cost the host more than they are worth",
        REFUSED,
        |_| {
            let mut queue = start_net(OFFLOADS, 1);
            frame(buffer(4));
            for size in [0, 1, 8, u16::MAX] {
                for kind in [1, 4] {
                    header(1, kind, 54, size, 34, 16);
                    if send(&mut queue, 65_000) != Outcome::Refused {
                        return given_up(NET);
                    }
                }
            }
            Outcome::Refused
        },
    ),
    attack("a frame of a byte a descriptor", REFUSED, |_| {
        let mut queue = start_net(0, 1);
        frame(buffer(4));
        for at in 0..SIZE {
            let flags = if at + 1 < SIZE { NEXT } else { 0 };
            queue.describe(at, buffer(4) + u64::from(at), 1, flags, at + 1);
        }
        if queue.ask(0).is_some() {
            Outcome::Refused
        } else {
            given_up(NET)
        }
    }),
    attack(
        "headers that change while they are read",
        SURVIVED,
        |scene: &mut Scene| {
            if !scene.second {
                return Outcome::NotHere;
            }
            let mut queue = start_net(OFFLOADS, 1);
            let length = frame(buffer(4));
            second::flip(buffer(4), 0, 0xffff_ffff_ffff_0101);
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < A_WHILE {
                if send(&mut queue, length) != Outcome::Refused {
                    break;
                }
            }
            Outcome::Survived
        },
    ),
    attack("a flood of frames", SURVIVED, |_| {
        let mut queue = start_net(0, 1);
        let length = frame(buffer(4));
        (0..SIZE).for_each(|at| queue.chain(at, &[(buffer(4), length, false)]));
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            (0..SIZE).for_each(|at| queue.offer(at));
            queue.kick();
            for _ in 0..SIZE {
                if queue.wait().is_none() {
                    return given_up(NET);
                }
            }
        }
        Outcome::Survived
    }),
    attack(
        "buffers for frames that are too small, or none",
        SURVIVED,
        |_| {
            for features in [0, MERGEABLE] {
                let mut queue = start_net(features, 0);
                for at in 0..SIZE {
                    queue.describe(at, buffer(9), u32::from(at % 13), WRITE, 0);
                    queue.offer(at);
                }
                queue.kick();
                cpu::wait(A_WHILE / 3, || NET.needs_reset());
            }
            Outcome::Survived
        },
    ),
    attack("random frames", REFUSED, |scene| {
        let mut queue = start_net(OFFLOADS, 1);
        let random = &Random::new(scene.seed);
        fill(buffer(4), 0x45, 2048);
        for _ in 0..500 {
            (0..10).for_each(|at| write8(buffer(4) + at, random.next() as u8));
            if send(&mut queue, random.below(2048) as u32 + 1) != Outcome::Refused {
                return given_up(NET);
            }
        }
        Outcome::Refused
    }),
    attack("commands that are none", REFUSED, |_| {
        let mut queue = start_net(CONTROL, 4);
        for (class, number, data, length) in [
            (0, 0, 1, 1),
            (1, 0, 0, 4),
            (2, 0, 0, 4),
            (4, 1, 1, 2),
            (4, 0, 0, 2),
            (4, 0, 9, 2),
            (4, 0, 0xffff, 2),
            (4, 0, 1, 1),
            (4, 0, 1, 8),
            (0xff, 0xff, 0, 4),
        ] {
            match command(&mut queue, class, number, data, length) {
                Some(1) => {}
                Some(_) => return Outcome::Wrong,
                None => return given_up(NET),
            }
        }
        Outcome::Refused
    }),
    // What is asked for takes a lock of the host's, so a card that is asked without end gives up.
    attack(
        "pairs of queues switched on and off without end",
        SURVIVED,
        |_| {
            let mut queue = start_net(CONTROL, 4);
            for round in 0..2000 {
                if command(&mut queue, 4, 0, 1 + round % 2, 2).is_none() {
                    break;
                }
            }
            Outcome::Survived
        },
    ),
];
