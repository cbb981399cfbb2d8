//! Attacks that the guest does not survive.

use crate::attack::{Attack, Must, NOWHERE, Outcome, SLOT_REGISTERS, attack, buffer};
use crate::machine::memory::FILE_REGION;
use crate::machine::virtio::STATUS;
use crate::machine::{cpu, second, serial};

const fn one(
    name: &'static str,
    must: Must,
    run: fn(&mut crate::attack::Scene) -> Outcome,
) -> [Attack; 1] {
    [attack(name, must, run)]
}

pub(super) static TRIPLE_FAULT: [Attack; 1] = one("a triple fault", Must::Shutdown, |_| {
    cpu::load_interrupt_table(0);
    cpu::undefined();
    Outcome::Wrong
});

pub(super) static KEYBOARD_RESET: [Attack; 1] = one(
    "a reset by the keyboard's controller",
    Must::Shutdown,
    |_| {
        cpu::out8(0x64, 0xfe);
        Outcome::Wrong
    },
);

pub(super) static RESET_PORT: [Attack; 1] = one("a reset by its port", Must::Shutdown, |_| {
    cpu::out8(0xcf9, 6);
    Outcome::Wrong
});

pub(super) static RUN_REGISTERS: [Attack; 1] =
    one("running the registers of a slot", Must::End, |_| {
        cpu::load_interrupt_table(0);
        cpu::jump(SLOT_REGISTERS)
    });

pub(super) static RUN_NOTHING: [Attack; 1] = one("running what is not there", Must::End, |_| {
    cpu::load_interrupt_table(0);
    cpu::jump(0xe000_0000)
});

pub(super) static PAGE_TABLES_IN_REGISTERS: [Attack; 1] =
    one("page tables in the registers of a slot", Must::End, |_| {
        cpu::load_interrupt_table(0);
        cpu::set_page_tables(SLOT_REGISTERS);
        Outcome::Wrong
    });

pub(super) static PAGE_TABLES_NOWHERE: [Attack; 1] =
    one("page tables where nothing is", Must::End, |_| {
        cpu::load_interrupt_table(0);
        cpu::set_page_tables(NOWHERE);
        Outcome::Wrong
    });

pub(super) static STACK_IN_FILES: [Attack; 1] =
    one("a stack in read-only memory", Must::Any, |_| {
        cpu::load_interrupt_table(0);
        cpu::use_stack(FILE_REGION + 4096)
    });

pub(super) static HALT_WITHOUT_INTERRUPTS: [Attack; 1] =
    one("a halt without interrupts", Must::Hang, |_| {
        serial::print(b'H');
        loop {
            cpu::halt();
        }
    });

pub(super) static SPIN_WITHOUT_INTERRUPTS: [Attack; 1] =
    one("an endless loop on all processors", Must::Hang, |scene| {
        if scene.second {
            second::flip(buffer(9), 0, 1);
        }
        serial::print(b'H');
        loop {
            cpu::pause();
        }
    });

pub(super) static RESET_IN_A_RESET: [Attack; 1] = one(
    "the machine's reset while a disk is busy",
    Must::Shutdown,
    |_| {
        let mut queue = crate::attack::DISK.start(0, 0);
        crate::attack::disk_request(&queue, 1, 0, buffer(12), 512 << 10);
        (0..64).for_each(|_| queue.offer(0));
        queue.kick();
        crate::attack::DISK.write(STATUS, 0);
        cpu::out8(0x64, 0xfe);
        Outcome::Wrong
    },
);

pub(super) static OTHER_PROCESSOR_RESETS: [Attack; 1] = one(
    "a processor sent where nothing is, and a reset",
    Must::Shutdown,
    |scene| {
        if scene.second {
            second::lose();
            cpu::send_interrupt(1, 0x4500);
        }
        cpu::send_interrupt(1, 0x46a0);
        cpu::wait(cpu::SECOND / 10, || false);
        cpu::out8(0x64, 0xfe);
        Outcome::Wrong
    },
);

pub(super) static FALSE_PANIC: [Attack; 1] =
    one("a panic's message without an end", Must::Panic, |_| {
        b"Kernel panic - not syncing: "
            .iter()
            .for_each(|byte| serial::print(*byte));
        (0..1000u32).for_each(|at| serial::print(if at % 3 == 0 { 0x1b } else { 0xff }));
        serial::print(b'\n');
        cpu::out8(0x64, 0xfe);
        Outcome::Wrong
    });
