//! The second processor, which changes memory while the first one uses it.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::cpu;
use super::memory::{put, write16, write32, write64};

/// Where it starts, in real mode.
const TRAMPOLINE: u64 = 0x6000;
/// Its entry to 64-bit mode.
const LONG_ENTRY: u64 = TRAMPOLINE + 0x80;
const TABLE_POINTER: u64 = TRAMPOLINE + 0x100;
/// End of its stack.
const STACK: u64 = 0x6000;

/// From real mode straight to 64-bit mode, by the first processor's tables.
const CODE: [u8; 56] = [
    0xfa, // cli
    0x31, 0xc0, 0x8e, 0xd8, // ds = 0
    0x0f, 0x01, 0x16, 0x00, 0x61, // lgdt [TABLE_POINTER]
    0x66, 0xb8, 0x20, 0x06, 0, 0, 0x0f, 0x22, 0xe0, // cr4: PAE, SSE
    0x66, 0xb8, 0x00, 0x90, 0, 0, 0x0f, 0x22, 0xd8, // cr3 = 0x9000
    0x66, 0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32, // rdmsr EFER
    0x66, 0x0d, 0x00, 0x01, 0, 0, 0x0f, 0x30, // LME, wrmsr
    0x66, 0xb8, 0x13, 0, 0, 0x80, 0x0f, 0x22, 0xc0, // cr0: PE, MP, PG
    0xea, 0x80, // jmp 0x10:LONG_ENTRY, continued below
    0x60, // …
];
const CODE_END: [u8; 2] = [0x10, 0x00];

/// What it is to do.
const REST: u32 = 0;
const FLIP: u32 = 1;
const WRITE: u32 = 2;
static ORDER: AtomicU32 = AtomicU32::new(REST);
/// What it does.
static ALIVE: AtomicU32 = AtomicU32::new(0);
static RESTS: AtomicU32 = AtomicU32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static VALUES: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Starts it. False: there is none.
pub(crate) fn start() -> bool {
    put(TRAMPOLINE, &CODE);
    put(TRAMPOLINE + CODE.len() as u64, &CODE_END);
    write16(TABLE_POINTER, 39);
    write32(TABLE_POINTER + 2, 0x500);
    // mov esp, STACK; mov eax, main; call rax
    write8_and_32(LONG_ENTRY, 0xbc, STACK as u32);
    write8_and_32(LONG_ENTRY + 5, 0xb8, main as *const () as usize as u32);
    put(LONG_ENTRY + 10, &[0xff, 0xd0]);
    // The APIC is enabled, by its spurious vector.
    cpu::write_apic(0xf0, 0x1ff);
    ALIVE.store(0, Ordering::SeqCst);
    ORDER.store(REST, Ordering::SeqCst);
    cpu::send_interrupt(1, 0x4500);
    cpu::wait(cpu::SECOND / 200, || false);
    cpu::send_interrupt(1, 0x4600 | (TRAMPOLINE >> 12) as u32);
    cpu::wait(5 * cpu::SECOND, || ALIVE.load(Ordering::SeqCst) == 1)
}

fn write8_and_32(address: u64, byte: u8, value: u32) {
    put(address, &[byte]);
    put(address + 1, &value.to_le_bytes());
}

extern "C" fn main() -> ! {
    cpu::load_interrupt_table(256 * 16 - 1);
    ALIVE.store(1, Ordering::SeqCst);
    loop {
        match ORDER.load(Ordering::SeqCst) {
            FLIP => {
                let at = ADDRESS.load(Ordering::SeqCst);
                VALUES
                    .iter()
                    .for_each(|value| write64(at, value.load(Ordering::SeqCst)));
            }
            WRITE => {
                let at = ADDRESS.load(Ordering::SeqCst);
                VALUES
                    .iter()
                    .for_each(|value| write32(at, value.load(Ordering::SeqCst) as u32));
            }
            _ => {
                RESTS.fetch_add(1, Ordering::SeqCst);
                cpu::pause();
            }
        }
    }
}

/// Has it write the two values to 8 bytes of memory, in turn and without end.
pub(crate) fn flip(address: u64, one: u64, other: u64) {
    order(FLIP, address, one, other);
}

/// Has it write the two values to a register, in turn and without end.
pub(crate) fn write_register(address: u64, one: u32, other: u32) {
    order(WRITE, address, one.into(), other.into());
}

fn order(order: u32, address: u64, one: u64, other: u64) {
    ADDRESS.store(address, Ordering::SeqCst);
    VALUES[0].store(one, Ordering::SeqCst);
    VALUES[1].store(other, Ordering::SeqCst);
    ORDER.store(order, Ordering::SeqCst);
}

/// Has it do nothing; returns when it does. Without one there is nothing to wait for.
pub(crate) fn rest() {
    ORDER.store(REST, Ordering::SeqCst);
    if ALIVE.load(Ordering::SeqCst) == 0 {
        return;
    }
    let before = RESTS.load(Ordering::SeqCst);
    cpu::wait(5 * cpu::SECOND, || {
        RESTS.load(Ordering::SeqCst) > before.wrapping_add(1)
    });
}

/// Forgets it: it was sent elsewhere.
pub(crate) fn lose() {
    ALIVE.store(0, Ordering::SeqCst);
}
