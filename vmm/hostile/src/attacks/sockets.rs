//! Attacks on virtio-vsock. A client of the host connects to port 1024 all the time, and reads nothing.

use crate::attack::vsock_header_with;
use crate::attack::{
    A_WHILE, Attack, CID, Outcome, REFUSED, SURVIVED, Scene, VSOCK, attack, buffer, given_up,
    vsock_header,
};
use crate::machine::memory::{read32, write16, write32};
use crate::machine::random::Random;
use crate::machine::virtio::{Queue, SIZE};
use crate::machine::{cpu, second};

/// Operations.
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// The port that clients connect to.
const PORT: u32 = 1024;

struct Sockets {
    sent: Queue,
    received: Queue,
}

impl Sockets {
    /// Starts the device, with room for packets.
    fn start() -> Self {
        let sent = VSOCK.start(0, 1);
        let mut received = Queue::new(VSOCK, 0);
        for at in 0..SIZE {
            received.chain(at, &[(room(at.into()), 0x800, true)]);
            received.offer(at);
        }
        received.kick();
        Self { sent, received }
    }

    /// Sends a packet that is at `buffer(5)`.
    fn send(&mut self, length: u32) -> bool {
        self.sent.chain(0, &[(buffer(5), length, false)]);
        self.sent.ask(0).is_some()
    }

    /// Takes a packet, if there is one, and gives its room back; returns operation and ports.
    fn take(&mut self) -> Option<(u32, u32, u32)> {
        let (head, _) = self.received.take()?;
        let at = room(head.into());
        let packet = (read32(at + 28) >> 16, read32(at + 16), read32(at + 20));
        self.received.offer(head as u16);
        self.received.kick();
        Some(packet)
    }

    /// Accepts a client; returns its port.
    fn accept(&mut self) -> Option<u32> {
        let mut found = None;
        cpu::wait(20 * cpu::SECOND, || {
            while let Some((op, port, _)) = self.take() {
                if op == u32::from(REQUEST) {
                    found = Some(port);
                }
            }
            found.is_some()
        });
        let port = found?;
        vsock_header(buffer(5), PORT, port, RESPONSE, 0);
        self.send(44).then_some(port)
    }
}

fn room(at: u64) -> u64 {
    buffer(14) + 0x800 * at
}

/// Sends a packet, and says whether it came back.
fn packet(sockets: &mut Sockets, length: u32) -> Outcome {
    if sockets.send(length) {
        Outcome::Refused
    } else {
        given_up(VSOCK)
    }
}

/// Accepts a client and sends it packets for a while.
fn abuse(mut packets: impl FnMut(u32, u32) -> u32) -> Outcome {
    let mut sockets = Sockets::start();
    let Some(port) = sockets.accept() else {
        return Outcome::Wrong;
    };
    let start = cpu::time();
    let mut round = 0;
    while cpu::time().wrapping_sub(start) < A_WHILE && !VSOCK.needs_reset() {
        let length = packets(port, round);
        sockets.send(length);
        while sockets.take().is_some() {}
        round += 1;
    }
    Outcome::Survived
}

pub(super) static ATTACKS: [Attack; 13] = [
    attack("packets of others, to others", REFUSED, |_| {
        let mut sockets = Sockets::start();
        for (from, to) in [
            (0, 2),
            (2, 2),
            (4, 2),
            (CID, 0),
            (CID, 1),
            (CID, CID),
            (u32::MAX, u32::MAX),
        ] {
            vsock_header(buffer(5), 1000, 1, REQUEST, 0);
            write32(buffer(5), from);
            write32(buffer(5) + 8, to);
            if packet(&mut sockets, 44) != Outcome::Refused {
                return given_up(VSOCK);
            }
        }
        cpu::wait(A_WHILE / 10, || false);
        while let Some((op, _, to)) = sockets.take() {
            if op != u32::from(REQUEST) && to == 1000 {
                return Outcome::Wrong;
            }
        }
        Outcome::Refused
    }),
    attack(
        "every operation and type, on connections that are none",
        REFUSED,
        |_| {
            let mut sockets = Sockets::start();
            for op in (0..10).chain([u16::MAX]) {
                for kind in [0, 1, 2, 3, u16::MAX] {
                    vsock_header(buffer(5), 1000, 1 << 30, op, 0);
                    write16(buffer(5) + 28, kind);
                    if packet(&mut sockets, 44) != Outcome::Refused {
                        return given_up(VSOCK);
                    }
                    while sockets.take().is_some() {}
                }
            }
            Outcome::Refused
        },
    ),
    attack("lengths that lie", REFUSED, |_| {
        let mut sockets = Sockets::start();
        for (length, announced) in [
            (43, 0),
            (1, 0),
            (44, 1),
            (44, u32::MAX),
            (100, 57),
            (131_000, 130_000),
        ] {
            vsock_header(buffer(5), 1000, 1, DATA, announced);
            if packet(&mut sockets, length) != Outcome::Refused {
                return given_up(VSOCK);
            }
        }
        Outcome::Refused
    }),
    attack(
        "a flood of connections without room for the answers",
        SURVIVED,
        |_| {
            let mut sent = VSOCK.start(0, 1);
            vsock_header(buffer(5), 1000, 1, REQUEST, 0);
            (0..SIZE).for_each(|at| sent.chain(at, &[(buffer(5), 44, false)]));
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < A_WHILE {
                while sent.take().is_some() {}
                (0..SIZE).for_each(|at| sent.offer(at));
                sent.kick();
                if VSOCK.needs_reset() {
                    return Outcome::NeedsReset;
                }
                // What was not taken is not offered again.
                if !cpu::wait(A_WHILE / 10, || sent.take().is_some()) {
                    break;
                }
                while cpu::wait(A_WHILE / 100, || sent.take().is_some()) {}
                VSOCK.start(0, 1);
                sent = Queue::new(VSOCK, 1);
                (0..SIZE).for_each(|at| sent.chain(at, &[(buffer(5), 44, false)]));
            }
            Outcome::Survived
        },
    ),
    attack("a flood of connections", SURVIVED, |_| {
        let mut sockets = Sockets::start();
        let start = cpu::time();
        let mut port = 0;
        while cpu::time().wrapping_sub(start) < A_WHILE {
            vsock_header(buffer(5), port, port.wrapping_mul(7), REQUEST, 0);
            sockets.send(44);
            while sockets.take().is_some() {}
            port += 1;
        }
        Outcome::Survived
    }),
    attack("more than a client's credit", SURVIVED, |_| {
        abuse(|port, _| {
            vsock_header(buffer(5), PORT, port, DATA, 0x1_0000);
            44 + 0x1_0000
        })
    }),
    attack("credit that lies", SURVIVED, |scene| {
        let random = &Random::new(scene.seed);
        abuse(|port, round| {
            let op = [CREDIT, CREDIT_REQUEST, DATA][round as usize % 3];
            let numbers = [0, 1, 0xffff, 0x8000_0000, u64::from(u32::MAX)];
            let (room, taken) = (
                random.one_of(&numbers) as u32,
                random.one_of(&numbers) as u32,
            );
            vsock_header_with(buffer(5), PORT, port, op, 0, room, taken);
            44
        })
    }),
    attack("requests for credit without end", SURVIVED, |_| {
        abuse(|port, _| {
            vsock_header(buffer(5), PORT, port, CREDIT_REQUEST, 0);
            44
        })
    }),
    attack(
        "answers and requests on a connection that is there",
        SURVIVED,
        |_| {
            abuse(|port, round| {
                let op = if round % 2 == 0 { RESPONSE } else { REQUEST };
                vsock_header(buffer(5), PORT, port, op, 0);
                44
            })
        },
    ),
    attack(
        "shutdowns of every kind, and data after them",
        SURVIVED,
        |_| {
            abuse(|port, round| {
                let op = if round % 3 == 2 { DATA } else { SHUTDOWN };
                vsock_header(buffer(5), PORT, port, op, 0);
                write32(buffer(5) + 32, round);
                44
            })
        },
    ),
    attack("a reset at each accept", SURVIVED, |_| {
        let mut sockets = Sockets::start();
        for _ in 0..5 {
            let Some(port) = sockets.accept() else {
                return Outcome::Wrong;
            };
            vsock_header(buffer(5), PORT, port, RESET, 0);
            sockets.send(44);
        }
        Outcome::Survived
    }),
    attack(
        "a reset of the device with clients connected",
        SURVIVED,
        |_| {
            for _ in 0..5 {
                if Sockets::start().accept().is_none() {
                    return Outcome::Wrong;
                }
            }
            Outcome::Survived
        },
    ),
    attack(
        "headers that change while they are read",
        SURVIVED,
        |scene: &mut Scene| {
            if !scene.second {
                return Outcome::NotHere;
            }
            let mut sockets = Sockets::start();
            vsock_header(buffer(5), 1000, 1, DATA, 0);
            second::flip(
                buffer(5) + 24,
                1 << 32 | 8,
                (5 << 16 | 1) << 32 | u64::from(u32::MAX),
            );
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < A_WHILE && !VSOCK.needs_reset() {
                sockets.send(52);
                while sockets.take().is_some() {}
            }
            Outcome::Survived
        },
    ),
];
