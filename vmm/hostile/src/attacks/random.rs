//! Attacks at random: one for each device, determined by the seed.

use crate::attack::{Attack, BUFFERS, MEMORY_END, Must, NOWHERE, Outcome, Scene, TARGETS, attack};
use crate::machine::cpu;
use crate::machine::memory::{FILE_REGION, PLUGGABLE, write8, write16, write32};
use crate::machine::random::Random;
use crate::machine::virtio::{Device, INDIRECT, NEXT, QUEUES, Queue, SIZE, SLOTS, STATUS, WRITE};

macro_rules! at_random {
    ($name:ident, $text:literal, $targets:expr) => {
        pub(super) static $name: [Attack; 1] = [attack($text, Must::Any, |scene| {
            at_random(scene, &$targets)
        })];
    };
}

at_random!(RNG, "rng, at random", [0]);
at_random!(BLOCK, "block, at random", [1]);
at_random!(FIXED_BLOCK, "read-only block, at random", [2]);
at_random!(PMEM, "pmem, at random", [3]);
at_random!(NET, "net, at random", [4]);
at_random!(VSOCK, "vsock, at random", [5]);
at_random!(FS, "fs, at random", [6]);
at_random!(BALLOON, "balloon, at random", [7]);
at_random!(PLUGGED, "memory, at random", [8]);
at_random!(ALL, "all devices, at random", [0, 1, 2, 3, 4, 5, 6, 7, 8]);

fn at_random(scene: &mut Scene, targets: &[usize]) -> Outcome {
    let seed = targets.iter().fold(scene.seed, |sum, target| {
        sum * TARGETS.len() as u64 + *target as u64
    });
    let random = &Random::new(seed);
    // The steps are not counted in time, so that the seed alone determines what is done.
    for _ in 0..scene.steps {
        let target = targets[random.below(targets.len() as u64) as usize];
        let device = Device {
            slot: TARGETS[target].slot,
        };
        let mut queue = Queue::new(device, random.below(QUEUES.into()) as u32);
        match random.below(32) {
            0 => {
                let features = [0, 0, 1 << 28, 1 << 29, 1 << 29 | random.next() & 0xffff];
                device.start(random.one_of(&features), 0);
                (0..QUEUES).for_each(|index| describe_all(&Queue::new(device, index)));
            }
            1 => device.write(4 * random.below(0x44), random.next() as u32),
            2 => device.write(STATUS, random.below(256) as u32),
            3 => {
                let at = random.one_of(&[queue.available(), queue.used(), BUFFERS]);
                write8(at + random.below(0x1000), random.next() as u8);
            }
            4 => queue.publish(random.next() as u16),
            5..=12 => content(random),
            13..=22 => describe(random, &queue),
            _ => {
                let index = crate::machine::memory::read16(queue.available() + 2);
                queue.offered = index;
                (0..random.below(4))
                    .for_each(|_| queue.offer(random.below(u64::from(SIZE) + 1) as u16));
                queue.kick();
            }
        }
    }
    // Let the host see what there is.
    cpu::wait(cpu::SECOND / 100, || false);
    Outcome::Survived
}

/// Points all descriptors at a buffer, so that none is of this program.
fn describe_all(queue: &Queue) {
    (0..SIZE).for_each(|at| queue.describe(at, BUFFERS, 64, WRITE, 0));
}

/// Writes a descriptor that may be right.
fn describe(random: &Random, queue: &Queue) {
    let buffer = BUFFERS + (random.below(16) << 12);
    let address = random.one_of(&[
        buffer,
        buffer,
        buffer,
        buffer + random.below(4096),
        queue.table(),
        queue.used(),
        FILE_REGION,
        PLUGGABLE,
        MEMORY_END - 8,
        NOWHERE,
        SLOTS,
        random.next(),
    ]);
    let length = random.one_of(&[
        1,
        2,
        4,
        8,
        12,
        16,
        44,
        56,
        64,
        512,
        4096,
        0x1_0000,
        random.next() & 0xffff_ffff,
    ]);
    let flags = random.one_of(&[
        0,
        NEXT.into(),
        NEXT.into(),
        WRITE.into(),
        WRITE.into(),
        (NEXT | WRITE).into(),
        INDIRECT.into(),
        random.below(8),
    ]);
    let at = random.below(SIZE.into()) as u16;
    let next = if random.below(8) == 0 {
        random.next() as u16
    } else {
        at + 1
    };
    queue.describe(at, address, length as u32, flags as u16, next);
}

/// Writes what may be the beginning of a request.
fn content(random: &Random) {
    let at = BUFFERS + (random.below(16) << 12);
    for word in 0..12 {
        let value = random.one_of(&[0, 0, 1, 2, 3, 8, 56, 0xffff, random.next()]);
        write32(at + 4 * word, value as u32);
    }
    write16(at + 28, random.below(3) as u16);
}
