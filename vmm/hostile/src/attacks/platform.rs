//! Attacks on what is no virtio device: IOAPIC, local APICs, ports, model-specific registers, processors.

use crate::attack::{
    A_WHILE, Attack, Must, NOWHERE, Outcome, REFUSED, RNG, SURVIVED, Scene, attack, buffer,
};
use crate::machine::memory::{
    FILE_REGION, read8, read16, read32, read64, write8, write16, write32, write64,
};
use crate::machine::random::Random;
use crate::machine::virtio::Queue;
use crate::machine::{cpu, second};

const IOAPIC: u64 = 0xfec0_0000;
const WINDOW: u64 = 0x10;
const COM1: u16 = 0x3f8;
/// Model-specific registers of KVM (Documentation/virt/kvm/x86/msr.rst): wall clock, system time, page faults that
/// wait, stolen time, ends of interrupts.
const KVM_REGISTERS: [u32; 9] = [
    0x11,
    0x12,
    0x4b56_4d00,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
    0x4b56_4d06,
    0x4b56_4d07,
];
/// The base address of the local APIC.
const APIC_BASE: u32 = 0x1b;

fn ioapic(register: u8, value: u32) {
    write32(IOAPIC, register.into());
    write32(IOAPIC + WINDOW, value);
}

/// Sets entry `pin` of the redirection table.
fn route(pin: u8, entry: u64) {
    ioapic(0x11 + 2 * pin, (entry >> 32) as u32);
    ioapic(0x10 + 2 * pin, entry as u32);
}

/// A device that raises its interrupt when it is told to.
struct Bell(Queue);

impl Bell {
    fn new() -> Self {
        let queue = RNG.start(0, 0);
        queue.chain(0, &[(buffer(0), 8, true)]);
        Self(queue)
    }

    fn ring(&mut self) {
        self.0.ask(0);
    }
}

/// Masks all pins again.
fn mask() {
    (0..24).for_each(|pin| route(pin, 1 << 16));
}

pub(super) static ATTACKS: [Attack; 15] = [
    attack("registers of the IOAPIC that are none", REFUSED, |_| {
        for register in 0..=255 {
            ioapic(register, u32::MAX);
            write32(IOAPIC, register.into());
            core::hint::black_box(read32(IOAPIC + WINDOW));
        }
        mask();
        write32(IOAPIC, 1);
        if read32(IOAPIC + WINDOW) & 0xff == 0x11 {
            Outcome::Refused
        } else {
            Outcome::Wrong
        }
    }),
    attack("accesses of every width to the IOAPIC", SURVIVED, |_| {
        for offset in (0..0x40).chain(0xff0..0x1000) {
            write8(IOAPIC + offset, 0xff);
            write16(IOAPIC + offset, 0xffff);
            write64(IOAPIC + offset, u64::MAX);
            core::hint::black_box((
                read8(IOAPIC + offset),
                read16(IOAPIC + offset),
                read64(IOAPIC + offset),
            ));
        }
        mask();
        Outcome::Survived
    }),
    attack(
        "interrupts of every kind, vector and destination",
        SURVIVED,
        |_| {
            let mut bell = Bell::new();
            for mode in [0, 1, 7] {
                for vector in [0, 2, 8, 15, 16, 0x41, 0xff] {
                    for target in [0u64, 1, 2, 0x7f, 0xff] {
                        for logical in [0, 1 << 11, 1 << 15] {
                            route(6, target << 56 | logical | mode << 8 | vector);
                            bell.ring();
                        }
                    }
                }
            }
            cpu::take_interrupts();
            mask();
            Outcome::Survived
        },
    ),
    attack("a storm of interrupts", SURVIVED, |_| {
        let mut bell = Bell::new();
        route(6, 0x41);
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            bell.ring();
            cpu::take_interrupts();
        }
        mask();
        Outcome::Survived
    }),
    attack(
        "masking and unmasking without end",
        SURVIVED,
        |scene: &mut Scene| {
            let start = cpu::time();
            if scene.second {
                second::write_register(IOAPIC, 0x1c, 0x1d);
            }
            while cpu::time().wrapping_sub(start) < A_WHILE {
                route(6, 1 << 16 | 0x41);
                route(6, 0x41);
            }
            second::rest();
            mask();
            Outcome::Survived
        },
    ),
    attack("every register of the local APIC", SURVIVED, |_| {
        for register in (0..0x400).step_by(16) {
            // The command register has attacks of its own.
            if register != 0x300 {
                cpu::write_apic(register, u32::MAX);
                core::hint::black_box(read32(0xfee0_0000 + register));
            }
        }
        // Its timer at full speed, and an end of interrupts.
        cpu::write_apic(0x3e0, 0xb);
        cpu::write_apic(0x320, 0x2_0041);
        cpu::write_apic(0x380, 1);
        cpu::wait(A_WHILE / 10, || false);
        cpu::take_interrupts();
        cpu::write_apic(0x320, 0x1_0000);
        cpu::write_apic(0xf0, 0x1ff);
        cpu::write_apic(0x80, 0);
        Outcome::Survived
    }),
    attack("messages to itself without end", SURVIVED, |_| {
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            for command in [0x4_0041, 0x4_00ff, 0x4041, 0x8_0841] {
                cpu::send_interrupt(0, command);
            }
            cpu::take_interrupts();
        }
        Outcome::Survived
    }),
    attack("every port, of every width", SURVIVED, |_| {
        for port in (0..=0xffff_u16).filter(|port| port % 257 == 0 || *port < 0x200) {
            // Those that reset the machine, the serial port, and where an access may reach one of them.
            if (0x61..=0x64).contains(&port)
                || (0xcf6..=0xcf9).contains(&port)
                || (0x3f5..0x400).contains(&port)
            {
                continue;
            }
            core::hint::black_box((cpu::in8(port), cpu::in16(port), cpu::in32(port)));
            cpu::out8(port, 0xff);
            cpu::out16(port, 0xffff);
            cpu::out32(port, u32::MAX);
        }
        Outcome::Survived
    }),
    attack(
        "registers of the serial port, and strings of bytes",
        SURVIVED,
        |_| {
            for register in 1..8 {
                for value in [0, 0x0f, 0x80, 0xff] {
                    cpu::out8(COM1 + register, value);
                    core::hint::black_box((cpu::in8(COM1 + register), cpu::in32(COM1 + register)));
                }
                cpu::in_string(COM1 + register, buffer(9), 5000);
                cpu::out_string(COM1 + register, buffer(9), 5000);
                cpu::out16(COM1 + register, 0x1bff);
            }
            cpu::in_string(0x71, buffer(9), 5000);
            // Its divisor is not selected, its interrupts and loop are off.
            (1..=4).for_each(|register| cpu::out8(COM1 + register, 0));
            cpu::out8(COM1 + 3, 0);
            Outcome::Survived
        },
    ),
    attack("leaves of CPUID that are none", SURVIVED, |_| {
        for base in [0, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xffff_ff00] {
            for leaf in 0..0x40 {
                for index in [0, 1, u32::MAX] {
                    core::hint::black_box(cpu::cpuid(base + leaf, index));
                }
            }
        }
        Outcome::Survived
    }),
    attack("model-specific registers, read", SURVIVED, |_| {
        let ranges = [
            0..0x900,
            0x4000_0000..0x4000_0100,
            0x4b56_4d00..0x4b56_4d10,
            0xc000_0080..0xc000_0110,
        ];
        for register in ranges
            .into_iter()
            .flatten()
            .chain([0xc001_0000, 0xc001_0015, u32::MAX])
        {
            core::hint::black_box(cpu::read_msr(register));
        }
        Outcome::Survived
    }),
    attack("model-specific registers, written", SURVIVED, |_| {
        // Not those that this program runs by: the APIC's base, EFER, segments.
        let harmless = [
            0x10, 0x3b, 0x40, 0x79, 0x8b, 0x174, 0x175, 0x176, 0x186, 0x1a0, 0x1d9, 0x200, 0x277,
            0x2ff,
        ];
        for register in
            harmless
                .into_iter()
                .chain([0x345, 0x38f, 0x48, 0x49, 0x6e0, 0x830, 0xda0, 0x4000_0000])
        {
            let before = cpu::read_msr(register);
            for value in [0, 1, 1 << 63, 0x0606_0606_0606_0606, u64::MAX] {
                cpu::write_msr(register, value);
            }
            cpu::write_msr(register, before);
        }
        Outcome::Survived
    }),
    attack(
        "clocks and the like of KVM, outside of memory",
        SURVIVED,
        |_| {
            for register in KVM_REGISTERS {
                for address in [
                    NOWHERE,
                    FILE_REGION,
                    0x200_0000 - 4,
                    0xd000_0000,
                    !0x3f,
                    buffer(9),
                ] {
                    for flags in [1, 7, 0x3f] {
                        cpu::write_msr(register, address | flags);
                        core::hint::black_box(cpu::cpuid(1, 0));
                    }
                }
                cpu::write_msr(register, 0);
            }
            Outcome::Survived
        },
    ),
    attack("a local APIC over slots and RAM", SURVIVED, |_| {
        let mut bell = Bell::new();
        let before = cpu::read_msr(APIC_BASE);
        for base in [0xd000_1000, buffer(9), IOAPIC, FILE_REGION] {
            cpu::write_msr(APIC_BASE, base | (before & 0xfff));
            core::hint::black_box(read32(base));
            bell.ring();
        }
        cpu::write_msr(APIC_BASE, before);
        Outcome::Survived
    }),
    attack("random platform", SURVIVED, |scene| {
        let mut bell = Bell::new();
        let random = &Random::new(scene.seed);
        for _ in 0..scene.steps {
            match random.below(4) {
                0 => write32(
                    IOAPIC + random.one_of(&[0, 0x10, 0x20, 0x40]),
                    random.next() as u32,
                ),
                1 => ioapic(random.below(0x40) as u8, random.next() as u32 & !0x700),
                2 => cpu::out8(COM1 + 1 + random.below(7) as u16, random.next() as u8),
                _ => bell.ring(),
            }
        }
        mask();
        (1..=4).for_each(|register| cpu::out8(COM1 + register, 0));
        Outcome::Survived
    }),
];

pub(super) static CALLS: [Attack; 1] = [attack("calls of the hypervisor", Must::Any, |_| {
    for number in 0..16 {
        for argument in [0, 1, NOWHERE, FILE_REGION, u64::MAX] {
            // The fifth kicks, the ninth takes two addresses: both get any.
            cpu::hypercall(number, argument);
        }
    }
    Outcome::Survived
})];

pub(super) static PROCESSORS: [Attack; 3] = [
    attack("processors that are not there", SURVIVED, |_| {
        for target in 2..255 {
            for command in [0x4500, 0x4600, 0x4606, 0x4041, 0x4400, 0x4200] {
                cpu::send_interrupt(target, command);
            }
        }
        Outcome::Survived
    }),
    attack("a storm of INIT and SIPI", SURVIVED, |scene: &mut Scene| {
        if !scene.second {
            return Outcome::NotHere;
        }
        second::lose();
        let start = cpu::time();
        while cpu::time().wrapping_sub(start) < A_WHILE {
            cpu::send_interrupt(1, 0x4500);
            // Where there is no program, too.
            cpu::send_interrupt(1, 0x4606);
            cpu::send_interrupt(1, 0x4600);
        }
        scene.second = second::start();
        if scene.second {
            Outcome::Survived
        } else {
            Outcome::Wrong
        }
    }),
    attack(
        "NMI, SMI and reserved messages",
        SURVIVED,
        |scene: &mut Scene| {
            if !scene.second {
                return Outcome::NotHere;
            }
            second::lose();
            cpu::send_interrupt(1, 0x4500);
            for command in [0x4200, 0x4300, 0x4700, 0x4100, 0x4400] {
                cpu::send_interrupt(1, command);
            }
            scene.second = second::start();
            if scene.second {
                Outcome::Survived
            } else {
                Outcome::Wrong
            }
        },
    ),
];
