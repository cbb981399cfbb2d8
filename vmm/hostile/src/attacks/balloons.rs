//! Attacks on virtio-balloon, which takes the pages that the guest says are free.

use crate::attack::{
    A_WHILE, Attack, BALLOON, DISK, MEMORY_END, NOWHERE, Outcome, PATTERN, REFUSED, REPORTING,
    REPORTS, SURVIVED, attack, buffer, disk_request, given_up, refused,
};
use crate::machine::memory::{FILE_REGION, PLUGGABLE, fill, read32, write32};
use crate::machine::virtio::{INDIRECT, INDIRECT_FEATURE, NEXT, SLOTS, WRITE, describe};
use crate::machine::{cpu, second};

const PAGE: u64 = 4096;
/// Pages that no attack may lose.
const KEPT: u64 = 4;

/// Fills the pages at `buffer(15)`.
fn fill_kept() {
    (0..KEPT).for_each(|page| {
        write32(buffer(15) + page * PAGE, PATTERN);
        write32(buffer(15) + (page + 1) * PAGE - 4, PATTERN);
    });
}

/// Returns the outcome, unless the pages or the file are no more what they were.
fn kept(outcome: Outcome) -> Outcome {
    let mut pages = (0..KEPT).map(|page| buffer(15) + page * PAGE);
    let is_kept = pages.all(|page| read32(page) == PATTERN && read32(page + PAGE - 4) == PATTERN);
    if is_kept && read32(FILE_REGION) == PATTERN {
        outcome
    } else {
        Outcome::Wrong
    }
}

/// Reports each of these chains, which must be refused.
fn report<const COUNT: usize>(chains: &[[(u64, u32, bool); COUNT]]) -> Outcome {
    fill_kept();
    for chain in chains {
        let mut queue = BALLOON.start(REPORTING, REPORTS);
        queue.chain(0, chain);
        let outcome = refused(&mut queue, 0, 0);
        if outcome != Outcome::Refused {
            return outcome;
        }
    }
    kept(Outcome::Refused)
}

pub(super) static ATTACKS: [Attack; 8] = [
    attack("pages put into the balloon, and taken out", REFUSED, |_| {
        fill_kept();
        // Page numbers, of pages that are there and of some that are not.
        let pages = [buffer(15), buffer(15) + PAGE, FILE_REGION, u64::MAX];
        for (at, page) in (0..).zip(pages) {
            write32(buffer(9) + 4 * at, (page / PAGE) as u32);
        }
        for queue in [0, 1] {
            let mut queue = BALLOON.start(REPORTING, queue);
            queue.chain(0, &[(buffer(9), 16, false)]);
            let outcome = refused(&mut queue, 0, 0);
            if outcome != Outcome::Refused {
                return outcome;
            }
        }
        kept(Outcome::Refused)
    }),
    attack(
        "reports of what is no memory of the guest's",
        REFUSED,
        |_| {
            report(
                &[
                    (NOWHERE, PAGE as u32),
                    (SLOTS, PAGE as u32),
                    (0xfec0_0000, PAGE as u32),
                    (0xfee0_0000, PAGE as u32),
                    (FILE_REGION, PAGE as u32),
                    (FILE_REGION, 2 << 20),
                    (MEMORY_END - PAGE, 2 * PAGE as u32),
                    (PLUGGABLE - PAGE, 2 * PAGE as u32),
                    (buffer(15), 0xffff_f000),
                    (u64::MAX - PAGE + 1, PAGE as u32),
                ]
                .map(|(at, length)| [(at, length, true)]),
            )
        },
    ),
    attack("reports of parts of pages", REFUSED, |_| {
        let page = PAGE as u32;
        report(
            &[
                (buffer(15) + 1, page - 1),
                (buffer(15) + 1, page),
                (buffer(15), page - 1),
                (buffer(15) + PAGE - 4, 8),
                (buffer(15) + 512, 3 * page),
            ]
            .map(|(at, length)| [(at, length, true)]),
        )
    }),
    attack("reports of pages to read", REFUSED, |_| {
        report(&[[
            (buffer(15), PAGE as u32, false),
            (buffer(15) + PAGE, PAGE as u32, true),
        ]])
    }),
    attack("a report of more ranges than Linux has", REFUSED, |_| {
        fill_kept();
        let mut queue = BALLOON.start(REPORTING | INDIRECT_FEATURE, REPORTS);
        let (table, ranges) = (buffer(10), 64u16);
        for at in 0..ranges {
            let flags = WRITE | if at + 1 < ranges { NEXT } else { 0 };
            // The pages that must be kept are behind the 32nd.
            let page = if at < 60 { buffer(9) } else { buffer(15) };
            let page = page + u64::from(at % 4) * PAGE;
            describe(table + 16 * u64::from(at), page, PAGE as u32, flags, at + 1);
        }
        queue.describe(0, table, 16 * u32::from(ranges), INDIRECT, 0);
        kept(refused(&mut queue, 0, 0))
    }),
    attack("reports where the queue is not agreed on", REFUSED, |_| {
        fill_kept();
        let mut queue = BALLOON.start(0, REPORTS);
        queue.chain(0, &[(buffer(15), PAGE as u32, true)]);
        queue.offer(0);
        queue.kick();
        cpu::wait(A_WHILE / 10, || queue.take().is_some());
        kept(Outcome::Refused)
    }),
    attack("reports of pages that are written to", SURVIVED, |scene| {
        if scene.second {
            second::flip(buffer(9), 1, u64::MAX);
        }
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            let mut disk = DISK.start(0, 0);
            disk_request(&disk, 0, 0, buffer(9), PAGE as u32);
            disk.offer(0);
            disk.kick();
            let mut queue = BALLOON.start(REPORTING, REPORTS);
            queue.chain(0, &[(buffer(9), 0x2_0000, true)]);
            if queue.ask(0).is_none() || disk.wait().is_none() {
                return given_up(BALLOON);
            }
        }
        second::rest();
        Outcome::Survived
    }),
    attack("reports of what the device works with", SURVIVED, |_| {
        let queue = BALLOON.start(REPORTING, REPORTS);
        for ring in [queue.table(), queue.available(), queue.used()] {
            let mut queue = BALLOON.start(REPORTING, REPORTS);
            queue.describe(0, buffer(9), PAGE as u32, WRITE | NEXT, 1);
            queue.describe(1, ring, PAGE as u32, WRITE | NEXT, 2);
            queue.describe(2, buffer(9), PAGE as u32, WRITE, 0);
            queue.offer(0);
            queue.kick();
            cpu::wait(A_WHILE / 10, || queue.device.needs_reset());
            fill(ring, 0, 64);
        }
        Outcome::Survived
    }),
];
