//! Attacks on the rings that all devices have, at each queue of each device.

use crate::attack::{
    A_WHILE, Attack, BALLOON, FS, NET, NOWHERE, Outcome, PLUGGED, PMEM, REFUSED, REPORTING,
    REPORTS, RESET, RNG, SURVIVED, Scene, VSOCK,
};
use crate::attack::{DISK, MEMORY_END, attack, buffer, given_up};
use crate::machine::memory::{FILE_REGION, fill, write16, write32};
use crate::machine::virtio::{
    Device, EVENT_INDEX, INDIRECT, INDIRECT_FEATURE, NEXT, Queue, SIZE, SLOTS, STATUS, WRITE,
    describe,
};
use crate::machine::{cpu, second};

/// A queue that is attacked.
#[derive(Clone, Copy)]
struct Victim {
    device: Device,
    queue: u32,
    /// Features that make the queue be there.
    features: u64,
    /// Whether the device takes chains as they come. If not, they wait for what the host sends.
    takes: bool,
}

impl Victim {
    fn start(self) -> Queue {
        self.device
            .start(self.features | INDIRECT_FEATURE, self.queue)
    }

    /// Offers the chain at descriptor 0, which is malformed.
    fn offer(self, queue: &mut Queue) -> Outcome {
        queue.offer(0);
        queue.kick();
        self.result(queue)
    }

    /// Returns what came of a malformed chain.
    fn result(self, queue: &mut Queue) -> Outcome {
        if !self.takes {
            cpu::wait(A_WHILE / 10, || false);
            return if self.device.needs_reset() {
                Outcome::NeedsReset
            } else {
                Outcome::Refused
            };
        }
        match queue.wait() {
            Some(_) => Outcome::Refused,
            None => given_up(self.device),
        }
    }

    /// Sets the queue up at these places.
    fn places(self, size: u16, table: u64, available: u64, used: u64) -> Outcome {
        self.device.begin(self.features);
        self.device.set_up_others(self.queue);
        self.device.place(self.queue, size, table, available, used);
        self.device.go();
        given_up(self.device)
    }
}

fn flawed(victim: Victim, flaw: impl Fn(&Queue)) -> Outcome {
    let mut queue = victim.start();
    flaw(&queue);
    victim.offer(&mut queue)
}

fn every_address(victim: Victim, length: u32, flags: u16) -> Outcome {
    let addresses = [
        NOWHERE,
        MEMORY_END - 8,
        SLOTS,
        0xfec0_0000,
        0xfee0_0000,
        FILE_REGION - 8,
        FILE_REGION + (64 << 30) - 8,
        1 << 46,
        u64::MAX - 8,
        u64::MAX,
    ];
    for address in addresses {
        let outcome = flawed(victim, |queue| queue.describe(0, address, length, flags, 0));
        if outcome != Outcome::Refused {
            return outcome;
        }
    }
    Outcome::Refused
}

fn indirect(victim: Victim, length: u32, table: u64, fill_in: impl Fn(u64)) -> Outcome {
    flawed(victim, |queue| {
        fill_in(table);
        queue.describe(0, table, length, INDIRECT, 0);
    })
}

/// Changes 8 bytes while the device reads them.
fn race(scene: &Scene, victim: Victim, offset: u64, one: u64, other: u64) -> Outcome {
    if !scene.second {
        return Outcome::NotHere;
    }
    let mut queue = victim.start();
    queue.describe(0, buffer(9), 4096, WRITE | NEXT, 1);
    queue.describe(1, buffer(9) + 4096, 4096, WRITE, 0);
    second::flip(queue.descriptor(0) + offset, one, other);
    let start = cpu::time();
    while cpu::time().wrapping_sub(start) < A_WHILE && !victim.device.needs_reset() {
        for _ in 0..8 {
            queue.offer(0);
        }
        queue.kick();
        while queue.take().is_some() {}
    }
    second::rest();
    Outcome::Survived
}

fn lengths_and_flags(length: u32, flags: u16, next: u16) -> u64 {
    u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48
}

macro_rules! rings {
    ($name:ident, $device:expr, $queue:expr, $features:expr, $takes:literal) => {
        pub(super) static $name: [Attack; 29] = {
            const VICTIM: Victim = Victim {
                device: $device,
                queue: $queue,
                features: $features,
                takes: $takes,
            };
            [
                attack("a descriptor that is its own next", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        queue.describe(0, buffer(9), 16, WRITE | NEXT, 0)
                    })
                }),
                attack("a loop of all descriptors", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        (0..SIZE)
                            .for_each(|at| queue.describe(at, buffer(9), 1, NEXT, (at + 1) % SIZE));
                    })
                }),
                attack("a next descriptor behind the table", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        queue.describe(0, buffer(9), 16, NEXT, u16::MAX)
                    })
                }),
                attack("buffers to read outside of memory", REFUSED, |_| {
                    every_address(VICTIM, 4096, 0)
                }),
                attack("buffers to write outside of memory", REFUSED, |_| {
                    every_address(VICTIM, 4096, WRITE)
                }),
                attack("a buffer to write in read-only memory", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        queue.describe(0, FILE_REGION, 4096, WRITE, 0)
                    })
                }),
                attack("a buffer of 4 GiB to read", REFUSED, |_| {
                    flawed(VICTIM, |queue| queue.describe(0, buffer(9), u32::MAX, 0, 0))
                }),
                attack("a buffer of 4 GiB to write", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        queue.describe(0, buffer(9), u32::MAX, WRITE, 0)
                    })
                }),
                attack("a buffer of no length", REFUSED, |_| {
                    flawed(VICTIM, |queue| queue.describe(0, buffer(9), 0, 0, 0))
                }),
                attack("a buffer to read behind one to write", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        queue.describe(0, buffer(9), 8, WRITE | NEXT, 1);
                        queue.describe(1, buffer(9), 8, 0, 0);
                    })
                }),
                attack("a chain of all memory, over and over", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        (0..SIZE).for_each(|at| {
                            let flags = if at + 1 < SIZE { NEXT } else { 0 };
                            queue.describe(at, 0, MEMORY_END as u32, flags, at + 1);
                        });
                    })
                }),
                attack("an indirect table of odd length", REFUSED, |_| {
                    indirect(VICTIM, 17, buffer(10), |at| {
                        describe(at, buffer(9), 8, 0, 0)
                    })
                }),
                attack("an indirect table of no length", REFUSED, |_| {
                    indirect(VICTIM, 0, buffer(10), |_| ())
                }),
                attack("an indirect table of 4 GiB", REFUSED, |_| {
                    indirect(VICTIM, 0xffff_fff0, buffer(10), |at| {
                        describe(at, buffer(9), 8, NEXT, 0)
                    })
                }),
                attack("an indirect table outside of memory", REFUSED, |_| {
                    indirect(VICTIM, 32, NOWHERE, |_| ())
                }),
                attack("an indirect table in an indirect table", REFUSED, |_| {
                    indirect(VICTIM, 16, buffer(10), |at| {
                        describe(at, at, 16, INDIRECT, 0)
                    })
                }),
                attack("an indirect table that is a loop", REFUSED, |_| {
                    indirect(VICTIM, 32, buffer(10), |at| {
                        describe(at, buffer(9), 8, NEXT, 1);
                        describe(at + 16, buffer(9), 8, NEXT, 0);
                    })
                }),
                attack("an indirect descriptor with a next one", REFUSED, |_| {
                    flawed(VICTIM, |queue| {
                        describe(buffer(10), buffer(9), 8, 0, 0);
                        queue.describe(0, buffer(10), 16, INDIRECT | NEXT, 0);
                    })
                }),
                attack("more chains than the ring has", RESET, |_| {
                    let queue = VICTIM.start();
                    queue.publish(SIZE * 3);
                    queue.kick();
                    cpu::wait(crate::attack::A_WHILE * 30, || VICTIM.device.needs_reset());
                    if VICTIM.takes {
                        given_up(VICTIM.device)
                    } else {
                        Outcome::NeedsReset
                    }
                }),
                attack("a head behind the table", SURVIVED, |_| {
                    let mut queue = VICTIM.start();
                    queue.offer(u16::MAX);
                    queue.kick();
                    cpu::wait(A_WHILE / 10, || VICTIM.device.needs_reset());
                    Outcome::Survived
                }),
                attack(
                    "rings that the device's own writes change",
                    SURVIVED,
                    |_| {
                        let mut queue = VICTIM.start();
                        queue.describe(0, queue.table(), 0x4000, WRITE, 0);
                        queue.offer(0);
                        queue.kick();
                        cpu::wait(A_WHILE / 10, || VICTIM.device.needs_reset());
                        Outcome::Survived
                    },
                ),
                attack(
                    "rings outside of memory, in read-only memory, or askew",
                    RESET,
                    |_| {
                        let at = buffer(10);
                        let bad = [
                            NOWHERE,
                            MEMORY_END - 16,
                            SLOTS,
                            u64::MAX - 15,
                            u64::MAX,
                            at + 1,
                        ];
                        for place in bad {
                            for places in [
                                (place, at, at + 0x1000),
                                (at, place, at + 0x1000),
                                (at, at + 0x1000, place),
                            ] {
                                let outcome = VICTIM.places(SIZE, places.0, places.1, places.2);
                                if outcome != Outcome::NeedsReset {
                                    return outcome;
                                }
                            }
                        }
                        VICTIM.places(SIZE, at, at + 0x1000, FILE_REGION)
                    },
                ),
                attack("rings of sizes that can't be", RESET, |_| {
                    let at = buffer(10);
                    for size in [0, 3, 65, 0x8000, u16::MAX] {
                        let outcome = VICTIM.places(size, at, at + 0x1000, at + 0x2000);
                        if outcome != Outcome::NeedsReset {
                            return outcome;
                        }
                    }
                    Outcome::NeedsReset
                }),
                attack(
                    "addresses that change while they are read",
                    SURVIVED,
                    |scene| race(scene, VICTIM, 0, buffer(9), NOWHERE),
                ),
                attack(
                    "addresses that become read-only while they are read",
                    SURVIVED,
                    |scene| race(scene, VICTIM, 0, buffer(9), FILE_REGION),
                ),
                attack(
                    "lengths, flags and nexts that change while they are read",
                    SURVIVED,
                    |scene| {
                        let one = lengths_and_flags(8, WRITE | NEXT, 1);
                        race(
                            scene,
                            VICTIM,
                            8,
                            one,
                            lengths_and_flags(u32::MAX, NEXT | INDIRECT, 0),
                        )
                    },
                ),
                attack(
                    "an index that changes while it is read",
                    SURVIVED,
                    |scene| {
                        if !scene.second {
                            return Outcome::NotHere;
                        }
                        let queue = VICTIM.start();
                        queue.describe(0, buffer(9), 64, WRITE, 0);
                        // Flags, index, and the first two heads.
                        second::flip(queue.available(), 1 << 16, 0xfff0_0040_0000);
                        let start = cpu::time();
                        while cpu::time().wrapping_sub(start) < A_WHILE
                            && !VICTIM.device.needs_reset()
                        {
                            queue.kick();
                        }
                        second::rest();
                        Outcome::Survived
                    },
                ),
                attack("a storm of notifications", SURVIVED, |_| {
                    let queue = VICTIM
                        .device
                        .start(VICTIM.features | EVENT_INDEX, VICTIM.queue);
                    write16(queue.used() + 4 + 8 * u64::from(SIZE), u16::MAX);
                    let start = cpu::time();
                    while cpu::time().wrapping_sub(start) < A_WHILE {
                        (0..64).for_each(|_| queue.kick());
                    }
                    Outcome::Survived
                }),
                attack("resets in the midst of requests", SURVIVED, |scene| {
                    let start = cpu::time();
                    if scene.second {
                        second::write_register(VICTIM.device.register(STATUS), 0, 1);
                    }
                    fill(buffer(9), 0, 64);
                    write32(buffer(9), 56);
                    while cpu::time().wrapping_sub(start) < A_WHILE {
                        let mut queue = VICTIM.start();
                        (0..SIZE / 2).for_each(|at| {
                            queue.chain(
                                at * 2,
                                &[(buffer(9), 4096, false), (buffer(9), 4096, true)],
                            );
                            queue.offer(at * 2);
                        });
                        queue.kick();
                    }
                    second::rest();
                    Outcome::Survived
                }),
            ]
        };
    };
}

/// Features of a card that make its control queue be there: VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ.
const CONTROL: u64 = 1 << 17 | 1 << 22;

rings!(RNG_RINGS, RNG, 0, 0, true);
rings!(BLOCK, DISK, 0, 0, true);
rings!(PMEM_RINGS, PMEM, 0, 0, true);
rings!(NET_RECEIVE, NET, 0, 0, false);
rings!(NET_TRANSMIT, NET, 1, 0, true);
rings!(NET_CONTROL, NET, 4, CONTROL, true);
rings!(VSOCK_RECEIVE, VSOCK, 0, 0, false);
rings!(VSOCK_TRANSMIT, VSOCK, 1, 0, true);
rings!(VSOCK_EVENT, VSOCK, 2, 0, false);
rings!(FS_URGENT, FS, 0, 0, true);
rings!(FS_REQUESTS, FS, 1, 0, true);
rings!(BALLOON_INFLATE, BALLOON, 0, 0, true);
rings!(BALLOON_REPORTS, BALLOON, REPORTS, REPORTING, true);
rings!(PLUGGED_RINGS, PLUGGED, 0, 0, true);
