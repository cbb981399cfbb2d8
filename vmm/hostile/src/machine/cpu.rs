//! The processor: ports, model-specific registers, interrupts, time.

use core::arch::asm;

use super::memory::{write16, write32, write64};

/// Interrupt table, in low memory that nothing else uses.
const INTERRUPT_TABLE: u64 = 0x2000;
/// The boot protocol's code segment.
const CODE: u64 = 0x10;
/// About a second of the time-stamp counter, on any host.
pub(crate) const SECOND: u64 = 3_000_000_000;

/// Loads an interrupt table: `rdmsr`, `wrmsr` and calls of the hypervisor are skipped when they fault,
/// interrupts are acknowledged.
pub(crate) fn prepare() {
    #[cfg(freestanding)]
    {
        unsafe extern "C" {
            fn fault();
            fn fault_with_code();
            fn interrupt();
        }
        for vector in 32..256 {
            set_gate(vector, interrupt as *const () as u64);
        }
        set_gate(6, fault as *const () as u64);
        set_gate(13, fault_with_code as *const () as u64);
    }
    load_interrupt_table(256 * 16 - 1);
}

/// Points the processor at the interrupt table; a `limit` of 0 makes each fault a triple one.
pub(crate) fn load_interrupt_table(limit: u16) {
    let pointer = INTERRUPT_TABLE + 0x1800;
    write16(pointer, limit);
    write64(pointer + 2, INTERRUPT_TABLE);
    // SAFETY: the table is at that address as long as the machine is there.
    unsafe { asm!("lidt [{}]", in(reg) pointer) }
}

#[cfg_attr(
    not(freestanding),
    expect(dead_code, reason = "only the guest has handlers")
)]
fn set_gate(vector: u64, handler: u64) {
    let gate = INTERRUPT_TABLE + vector * 16;
    // A 64-bit interrupt gate (AMD APM volume 2, 4.8.4).
    write64(
        gate,
        (handler & 0xffff) | CODE << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48,
    );
    write64(gate + 8, handler >> 32);
}

#[cfg(freestanding)]
core::arch::global_asm!(
    ".global fault, fault_with_code, interrupt",
    "fault_with_code:",
    "add rsp, 8",
    "add qword ptr [rsp], 2",
    "iretq",
    "fault:",
    "add qword ptr [rsp], 3",
    "iretq",
    "interrupt:",
    "push rax",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
);

macro_rules! port {
    ($in:ident, $out:ident, $type:ty, $register:tt) => {
        pub(crate) fn $in(port: u16) -> $type {
            let value;
            // SAFETY: a port access changes no memory of Rust's.
            unsafe { asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port) }
            value
        }

        pub(crate) fn $out(port: u16, value: $type) {
            // SAFETY: a port access changes no memory of Rust's.
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value) }
        }
    };
}

port!(in8, out8, u8, "al");
port!(in16, out16, u16, "ax");
port!(in32, out32, u32, "eax");

/// Sends bytes to a port by one instruction.
pub(crate) fn out_string(port: u16, from: u64, count: u64) {
    // SAFETY: memory is only read.
    unsafe { asm!("rep outsb", in("dx") port, inout("rsi") from => _, inout("rcx") count => _) }
}

/// Reads from a port by one instruction.
pub(crate) fn in_string(port: u16, to: u64, count: u64) {
    // SAFETY: callers name buffers that are no objects of Rust's.
    unsafe { asm!("rep insb", in("dx") port, inout("rdi") to => _, inout("rcx") count => _) }
}

/// Copies memory by one instruction, from and to anywhere.
pub(crate) fn copy_string(to: u64, from: u64, count: u64) {
    // SAFETY: callers name devices and buffers, which are no objects of Rust's.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _)
    }
}

/// Adds to memory, locked.
pub(crate) fn locked_add(address: u64, value: u32) {
    // SAFETY: callers name devices, which are no objects of Rust's.
    unsafe { asm!("lock add dword ptr [{}], {:e}", in(reg) address, in(reg) value) }
}

/// Reads a model-specific register; 0 if it is refused.
pub(crate) fn read_msr(register: u32) -> u64 {
    let (mut low, mut high) = (0u32, 0u32);
    // SAFETY: reads a register, or is skipped by the fault handler.
    unsafe { asm!("rdmsr", in("ecx") register, inout("eax") low, inout("edx") high) }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register, if it is not refused.
pub(crate) fn write_msr(register: u32, value: u64) {
    // SAFETY: callers leave alone what this program runs by.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32)
    }
}

/// Executes CPUID.
pub(crate) fn cpuid(leaf: u32, index: u32) -> u32 {
    core::arch::x86_64::__cpuid_count(leaf, index).eax
}

/// Calls the hypervisor, with the instruction that the processor has for it.
pub(crate) fn hypercall(number: u64, argument: u64) {
    // The middle of the vendor's name: "enti" of "AuthenticAMD", "ineI" of "GenuineIntel".
    let is_amd = core::arch::x86_64::__cpuid(0).edx == u32::from_le_bytes(*b"enti");
    macro_rules! call {
        ($instruction:literal) => {
            // SAFETY: KVM's calls change no memory of this program but what callers name.
            unsafe {
                asm!(
                    "push rbx", "mov rbx, {argument}", $instruction, "pop rbx",
                    argument = in(reg) argument, inout("rax") number => _,
                    in("rcx") argument, in("rdx") argument, in("rsi") argument
                );
            }
        };
    }
    if is_amd {
        call!("vmmcall")
    } else {
        call!("vmcall")
    }
}

pub(crate) fn disable_interrupts() {
    // SAFETY: only interrupts are affected.
    unsafe { asm!("cli") }
}

/// Lets interrupts in that wait.
pub(crate) fn take_interrupts() {
    // SAFETY: the table has a handler for each.
    unsafe { asm!("sti", "nop", "nop", "cli") }
}

/// Stands still for good.
pub(crate) fn halt() {
    // SAFETY: interrupts stay off.
    unsafe { asm!("cli", "hlt") }
}

pub(crate) fn pause() {
    core::hint::spin_loop();
}

/// Jumps to an address.
pub(crate) fn jump(address: u64) -> ! {
    // SAFETY: callers mean not to come back.
    unsafe { asm!("jmp {}", in(reg) address, options(noreturn)) }
}

/// Uses page tables at an address, and the memory that they map.
pub(crate) fn set_page_tables(address: u64) {
    // SAFETY: callers mean not to come back.
    unsafe { asm!("mov cr3, {}", "nop", in(reg) address) }
}

/// Pushes to a stack that ends at an address, then falls.
pub(crate) fn use_stack(end: u64) -> ! {
    // SAFETY: callers mean not to come back.
    unsafe { asm!("mov rsp, {}", "push rax", "call rsp", "ud2", in(reg) end, options(noreturn)) }
}

/// An instruction that is none.
pub(crate) fn undefined() {
    // SAFETY: it faults.
    unsafe { asm!("ud2") }
}

/// Returns the time-stamp counter.
pub(crate) fn time() -> u64 {
    // SAFETY: every processor in 64-bit mode has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits until something is so. False: it took too long.
pub(crate) fn wait(limit: u64, mut done: impl FnMut() -> bool) -> bool {
    let start = time();
    while !done() {
        if time().wrapping_sub(start) > limit {
            return done();
        }
        pause();
    }
    true
}

/// Writes a register of the local APIC.
pub(crate) fn write_apic(register: u64, value: u32) {
    write32(0xfee0_0000 + register, value);
}

/// Sends an interprocessor interrupt.
pub(crate) fn send_interrupt(to: u32, command: u32) {
    write_apic(0x310, to << 24);
    write_apic(0x300, command);
}
