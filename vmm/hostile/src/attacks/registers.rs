//! Attacks on the registers of the slots.

use crate::attack::{
    A_WHILE, Attack, DISK, Outcome, REFUSED, RNG, SURVIVED, Scene, TARGETS, VSOCK, attack, buffer,
};
use crate::machine::memory::{read32, read64, write8, write16, write32, write64};
use crate::machine::random::Random;
use crate::machine::virtio::{
    ACKNOWLEDGE, CONFIG, DEVICE_ID, DRIVER, DRIVER_FEATURES, DRIVER_FEATURES_SELECT, DRIVER_OK,
    Device, FEATURES, FEATURES_OK, FEATURES_SELECT, INTERRUPT_ACKNOWLEDGE, QUEUE_AVAILABLE,
    QUEUE_NOTIFY, QUEUE_READY, QUEUE_SELECT, QUEUE_SIZE, QUEUE_SIZE_MAX, QUEUE_TABLE, QUEUE_USED,
    SLOT_SIZE, SLOTS, STATUS,
};
use crate::machine::{cpu, second};

pub(super) static ATTACKS: [Attack; 11] = [
    attack("queue registers after DRIVER_OK", REFUSED, |_| {
        let mut queue = RNG.start(0, 0);
        RNG.write(QUEUE_SELECT, 0);
        for register in [QUEUE_TABLE, QUEUE_AVAILABLE, QUEUE_USED] {
            RNG.write_long(register, buffer(11));
        }
        RNG.write(QUEUE_SIZE, 2);
        RNG.write(QUEUE_READY, 0);
        queue.chain(0, &[(buffer(0), 64, true)]);
        expect(queue.ask(0) == Some((0, 64)))
    }),
    attack(
        "features after FEATURES_OK, and ones that nobody offered",
        REFUSED,
        |_| {
            RNG.begin(0);
            RNG.write(DRIVER_FEATURES_SELECT, 0);
            RNG.write(DRIVER_FEATURES, u32::MAX);
            RNG.set_up(0);
            RNG.go();
            let live = RNG.read(STATUS) & DRIVER_OK != 0;
            RNG.begin(u64::MAX);
            RNG.go();
            let refused = RNG.read(STATUS) & (FEATURES_OK | DRIVER_OK) == 0;
            expect(live && refused)
        },
    ),
    attack("DRIVER_OK without the steps before", REFUSED, |_| {
        for status in [
            DRIVER_OK,
            DRIVER_OK | ACKNOWLEDGE,
            FEATURES_OK | DRIVER_OK,
            DRIVER,
            u32::MAX,
        ] {
            DISK.write(STATUS, 0);
            DISK.write(STATUS, status);
            if DISK.read(STATUS) & DRIVER_OK != 0 {
                return Outcome::Wrong;
            }
        }
        Outcome::Refused
    }),
    attack("accesses of every width at every place", REFUSED, |_| {
        for slot in 0..32 {
            let at = SLOTS + SLOT_SIZE * slot;
            for offset in 0..0x110 {
                write8(at + offset, 0xff);
                write16(at + offset, 0xffff);
                write64(at + offset, u64::MAX);
                core::hint::black_box(read64(at + offset));
            }
        }
        Outcome::Refused
    }),
    attack(
        "strings and locked accesses over the ends of slots and of RAM",
        SURVIVED,
        |_| {
            for (to, from) in [
                (SLOTS + SLOT_SIZE - 16, buffer(9)),
                (SLOTS + 32 * SLOT_SIZE - 16, buffer(9)),
                (buffer(9), SLOTS + 32 * SLOT_SIZE - 16),
                (SLOTS, SLOTS + SLOT_SIZE),
                (0xfec0_0ff0, SLOTS),
                (SLOTS - 16, buffer(9)),
            ] {
                cpu::copy_string(to, from, 32);
            }
            for offset in [DEVICE_ID, QUEUE_NOTIFY, STATUS, CONFIG, 0x71] {
                cpu::locked_add(RNG.register(offset), 1);
            }
            Outcome::Survived
        },
    ),
    attack("values that registers read as", REFUSED, |_| {
        let before = read32(RNG.register(DEVICE_ID));
        for offset in [0, 4, DEVICE_ID, FEATURES, QUEUE_SIZE_MAX, CONFIG, 0xfc] {
            write32(RNG.register(offset), 0x5555_5555);
        }
        expect(read32(RNG.register(DEVICE_ID)) == before)
    }),
    attack(
        "queues and halves of features that are not there",
        REFUSED,
        |_| {
            for select in [5, 31, 0x1_0000, u32::MAX] {
                VSOCK.begin(0);
                for register in [FEATURES_SELECT, DRIVER_FEATURES_SELECT, QUEUE_SELECT] {
                    VSOCK.write(register, select);
                }
                VSOCK.write(QUEUE_READY, 1);
                VSOCK.write(QUEUE_SIZE, u32::MAX);
                VSOCK.write(QUEUE_NOTIFY, select);
                if VSOCK.read(QUEUE_SIZE_MAX) != 0 || VSOCK.read(FEATURES) != 0 {
                    return Outcome::Wrong;
                }
            }
            Outcome::Refused
        },
    ),
    attack("registers of empty slots", REFUSED, |_| {
        let empty = Device { slot: 0 };
        empty.start(0, 0);
        let behind = Device { slot: 31 };
        behind.start(0, 0);
        expect(empty.read(DEVICE_ID) == 0 && behind.read(STATUS) == 0)
    }),
    attack("acknowledgements of every kind", SURVIVED, |_| {
        let random = &Random::new(1);
        for _ in 0..2000 {
            for target in &TARGETS {
                let device = Device { slot: target.slot };
                device.write(INTERRUPT_ACKNOWLEDGE, random.next() as u32 & 7);
            }
        }
        Outcome::Survived
    }),
    attack(
        "two processors that start and reset one device",
        SURVIVED,
        |scene| {
            contend(scene, |device| {
                device.start(0, 0);
            })
        },
    ),
    attack(
        "two processors that write one device's registers",
        SURVIVED,
        |scene| {
            let seed = scene.seed;
            contend(scene, |device| {
                let random = &Random::new(seed);
                for _ in 0..64 {
                    device.write(4 * random.below(0x44), random.next() as u32);
                }
            })
        },
    ),
];

fn expect(so: bool) -> Outcome {
    if so { Outcome::Refused } else { Outcome::Wrong }
}

fn contend(scene: &Scene, work: impl Fn(Device)) -> Outcome {
    if !scene.second {
        return Outcome::NotHere;
    }
    for target in &TARGETS {
        let device = Device { slot: target.slot };
        second::write_register(device.register(STATUS), 0, 0xf);
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            work(device);
        }
        second::rest();
    }
    Outcome::Survived
}
