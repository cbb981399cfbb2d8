//! Attacks on virtio-pmem and its read-only memory.

use crate::attack::{
    Attack, DISK, Outcome, PATTERN, PMEM, REFUSED, RNG, SURVIVED, attack, buffer, disk_request,
    refused,
};
use crate::machine::cpu;
use crate::machine::memory::{FILE_REGION, read32, read64, write8, write32, write64};

/// Bytes of the file, and of the region that it is in.
const FILE: u64 = 8192;
const REGION: u64 = 2 << 20;

fn unchanged() -> Outcome {
    let mut words = (0..FILE / 4).map(|word| read32(FILE_REGION + 4 * word));
    if words.all(|word| word == PATTERN) {
        Outcome::Refused
    } else {
        Outcome::Wrong
    }
}

pub(super) static ATTACKS: [Attack; 6] = [
    attack("writes to read-only memory", REFUSED, |_| {
        for at in [0, 1, 4095, FILE - 8, REGION - 8] {
            write8(FILE_REGION + at, 0);
            write64(FILE_REGION + at, 0);
            cpu::locked_add(FILE_REGION + at, 1);
        }
        cpu::copy_string(FILE_REGION + 100, buffer(9), 64);
        unchanged()
    }),
    attack("devices that are to write to it", REFUSED, |_| {
        for address in [FILE_REGION, FILE_REGION + FILE - 512, FILE_REGION + REGION] {
            let mut random = RNG.start(0, 0);
            random.chain(0, &[(address, 512, true)]);
            random.ask(0);
            let mut disk = DISK.start(0, 0);
            disk_request(&disk, 0, 0, address, 512);
            disk.ask(0);
        }
        unchanged()
    }),
    attack("what is behind it", REFUSED, |_| {
        let zeros = read64(FILE_REGION + FILE) == 0 && read64(FILE_REGION + REGION - 8) == 0;
        let nothing = [REGION, REGION + 4096, 128 << 20, 512 << 20]
            .into_iter()
            .all(|at| read64(FILE_REGION + at) == u64::MAX);
        if zeros && nothing {
            Outcome::Refused
        } else {
            Outcome::Wrong
        }
    }),
    attack("what devices read behind it", SURVIVED, |_| {
        let mut disk = DISK.start(0, 0);
        for at in [FILE - 256, REGION - 256, REGION, (64 << 30) - 512] {
            disk_request(&disk, 1, 0, FILE_REGION + at, 512);
            if disk.ask(0).is_none() {
                return crate::attack::given_up(DISK);
            }
        }
        Outcome::Survived
    }),
    attack("requests that are no flushes", REFUSED, |_| {
        for kind in [1, 0x100, u32::MAX] {
            let mut queue = PMEM.start(0, 0);
            write32(buffer(3), kind);
            write32(buffer(3) + 8, 0);
            queue.chain(0, &[(buffer(3), 4, false), (buffer(3) + 8, 4, true)]);
            if queue.ask(0).is_none() || read32(buffer(3) + 8) == 0 {
                return Outcome::Wrong;
            }
        }
        Outcome::Refused
    }),
    attack("requests of the wrong form", REFUSED, |_| {
        let (request, answer) = (buffer(3), buffer(3) + 8);
        let forms: [&[(u64, u32, bool)]; 5] = [
            &[(request, 3, false), (answer, 4, true)],
            &[(request, 5, false), (answer, 4, true)],
            &[(request, 4, false), (answer, 3, true)],
            &[
                (request, 2, false),
                (request + 2, 2, false),
                (answer, 4, true),
            ],
            &[(request, 4, false)],
        ];
        for form in forms {
            let mut queue = PMEM.start(0, 0);
            queue.chain(0, form);
            let outcome = refused(&mut queue, 0, 0);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        Outcome::Refused
    }),
];
