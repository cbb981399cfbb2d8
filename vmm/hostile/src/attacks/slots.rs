//! Attacks on slots whose devices come and go: the host attaches and detaches in a few of them all the time.

use crate::attack::{
    A_WHILE, Attack, CHANGING_SLOTS, CHANGING_SLOTS_COUNT, Outcome, SURVIVED, attack, buffer,
};
use crate::machine::memory::{FILE_REGION, read64};
use crate::machine::random::Random;
use crate::machine::virtio::{Device, QUEUE_NOTIFY, SIZE, STATUS};
use crate::machine::{cpu, second};

fn devices() -> impl Iterator<Item = Device> {
    (CHANGING_SLOTS..CHANGING_SLOTS + CHANGING_SLOTS_COUNT).map(|slot| Device { slot })
}

pub(super) static ATTACKS: [Attack; 4] = [
    attack("requests while devices come and go", SURVIVED, |_| {
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < 3 * A_WHILE {
            for device in devices() {
                let mut queue = device.start(0, 0);
                queue.chain(0, &[(buffer(9), 4096, false), (buffer(9), 4096, true)]);
                (0..SIZE).for_each(|_| queue.offer(0));
                queue.kick();
            }
        }
        Outcome::Survived
    }),
    attack(
        "random registers while devices come and go",
        SURVIVED,
        |scene| {
            let random = &Random::new(scene.seed);
            if scene.second {
                let first = Device {
                    slot: CHANGING_SLOTS,
                };
                second::write_register(first.register(QUEUE_NOTIFY), 0, 1);
            }
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < 3 * A_WHILE {
                for device in devices() {
                    device.write(4 * random.below(0x40), random.next() as u32 & 0xff);
                }
            }
            Outcome::Survived
        },
    ),
    attack(
        "resets by another processor while devices come and go",
        SURVIVED,
        |scene| {
            if !scene.second {
                return Outcome::NotHere;
            }
            for device in devices() {
                second::write_register(device.register(STATUS), 0, 1);
                let start = cpu::time();
                while cpu::time().wrapping_sub(start) < A_WHILE {
                    let mut queue = device.start(0, 0);
                    queue.chain(0, &[(buffer(9), 4096, true)]);
                    queue.offer(0);
                    queue.kick();
                }
                second::rest();
            }
            Outcome::Survived
        },
    ),
    attack(
        "files that come and go while they are read",
        SURVIVED,
        |_| {
            let start = cpu::time();
            while cpu::time().wrapping_sub(start) < 3 * A_WHILE {
                // File regions are 128 MiB apart.
                for region in 0..4 {
                    core::hint::black_box(read64(FILE_REGION + (region << 27)));
                }
            }
            Outcome::Survived
        },
    ),
];
