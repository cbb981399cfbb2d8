//! The guest's life: one group of attacks, as the command line says.

use crate::attack::{ALL, Scene, working};
use crate::attacks::GROUPS;
use crate::machine::{cpu, memory, second, serial};

/// Where the boot protocol puts the command line.
const CMDLINE: u64 = 0x2_0000;

/// Runs the group of attacks that the command line names.
pub fn run() -> ! {
    cpu::prepare();
    memory::map_high_memory();
    let number = |name| parameter(name).unwrap_or_default();
    let mut scene = Scene {
        seed: number(b"seed="),
        steps: number(b"steps="),
        second: second::start(),
    };
    if let Some(group) = GROUPS.get(number(b"group=") as usize) {
        for (left, attack) in (0..group.attacks.len()).rev().zip(group.attacks) {
            let outcome = (attack.run)(&mut scene);
            second::rest();
            cpu::disable_interrupts();
            serial::print(outcome as u8);
            let all = if left == 0 { ALL } else { 0 };
            working(group.looks_at | all)
                .to_le_bytes()
                .into_iter()
                .for_each(serial::print);
        }
    }
    loop {
        cpu::halt();
    }
}

/// Returns the number behind `name` on the command line.
fn parameter(name: &[u8]) -> Option<u64> {
    let byte = |at: u64| memory::read8(CMDLINE + at);
    let length = name.len() as u64;
    let start = (0..2000).find(|at| (0..length).all(|i| byte(at + i) == name[i as usize]))?;
    let digits = (start + length..).map(byte).take_while(u8::is_ascii_digit);
    Some(digits.fold(0u64, |sum, digit| {
        sum.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'))
    }))
}

/// The ground that a freestanding program stands on.
#[cfg(freestanding)]
mod ground {
    core::arch::global_asm!(
        ".section .text.start, \"ax\"",
        ".global _start",
        "_start:",
        "mov rax, cr0",
        "and eax, ~4",
        "or eax, 2",
        "mov cr0, rax",
        "mov rax, cr4",
        "or eax, 0x600",
        "mov cr4, rax",
        "lea rsp, [rip + first_stack_end]",
        "call guest_main",
        ".section .bss",
        ".align 16",
        ".skip 0x10000",
        "first_stack_end:",
        ".text",
    );

    #[unsafe(no_mangle)]
    extern "C" fn guest_main() -> ! {
        crate::guest::run()
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        crate::machine::serial::print(b'!');
        loop {
            crate::machine::cpu::halt();
        }
    }

    /// What the standard library's tables of frames refer to. Nothing unwinds.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(start: *mut u8, byte: i32, count: usize) -> *mut u8 {
        // SAFETY: the caller owns `count` bytes; the direction flag is clear.
        unsafe {
            core::arch::asm!("rep stosb", inout("rcx") count => _, inout("rdi") start => _, in("al") byte as u8);
        }
        start
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
        // SAFETY: the caller owns both ranges, which do not overlap; the direction flag is clear.
        unsafe {
            core::arch::asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _);
        }
        to
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
        for at in 0..count {
            // SAFETY: the caller owns `count` bytes of both.
            let (a, b) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }
}
