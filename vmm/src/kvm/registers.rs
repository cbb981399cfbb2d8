//! The first vCPU's registers, descriptor table and page tables for Linux's 64-bit entry
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::KvmError;
use crate::layout::{BOOT_STACK, GDT, PAGE_TABLES, ZERO_PAGE};
use crate::memory::Memory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PRESENT_WRITABLE: u64 = 3;
const HUGE_PAGE: u64 = 1 << 7;
/// How much is mapped one to one: all below 4 GiB, so that small test guests reach devices too.
const MAPPED_GIB: u64 = 4;

/// The boot protocol's selectors: code 0x10, data 0x18.
const DESCRIPTORS: [u64; 5] = [0, 0, CODE.0, DATA.0, TASK.0];
const CODE: Descriptor = Descriptor(0x00af_9b00_0000_ffff);
const DATA: Descriptor = Descriptor(0x00cf_9300_0000_ffff);
const TASK: Descriptor = Descriptor(0x008f_8b00_0000_ffff);

/// A segment descriptor (Intel SDM volume 3, 3.4.5) with base 0.
#[derive(Clone, Copy)]
struct Descriptor(u64);

impl Descriptor {
    /// Returns what the processor keeps of the descriptor at `index` of the table.
    fn segment(self, index: u16) -> kvm_segment {
        let bit = |shift: u32| u8::from(self.0 >> shift & 1 == 1);
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: index * 8,
            type_: (self.0 >> 40 & 0xf) as u8,
            present: bit(47),
            dpl: (self.0 >> 45 & 3) as u8,
            db: bit(54),
            s: bit(44),
            l: bit(53),
            g: bit(55),
            ..Default::default()
        }
    }
}

/// Writes descriptor table and page tables to guest memory.
///
/// # Errors
/// When guest memory is too small for them.
pub fn write_tables(memory: &Memory) -> Result<(), GuestMemoryError> {
    for (index, descriptor) in (0..).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(GDT + index * 8))?;
    }
    let directories = PAGE_TABLES + 0x2000;
    memory.write_obj(
        (PAGE_TABLES + 0x1000) | PRESENT_WRITABLE,
        GuestAddress(PAGE_TABLES),
    )?;
    for gib in 0..MAPPED_GIB {
        let directory = directories + gib * 0x1000;
        memory.write_obj(
            directory | PRESENT_WRITABLE,
            GuestAddress(PAGE_TABLES + 0x1000 + gib * 8),
        )?;
        let mut entries = [0u8; 4096];
        for (index, entry) in (0..).zip(entries.as_chunks_mut::<8>().0) {
            let page = gib << 30 | index << 21;
            *entry = (page | PRESENT_WRITABLE | HUGE_PAGE).to_le_bytes();
        }
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// Sets the registers of the vCPU that enters the kernel at `entry`.
///
/// # Errors
/// [`KvmError::Call`]
pub fn set_boot_registers(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut special = vcpu.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
    let data = DATA.segment(3);
    special.cs = CODE.segment(2);
    special.ds = data;
    special.es = data;
    special.fs = data;
    special.gs = data;
    special.ss = data;
    special.tr = TASK.segment(4);
    special.gdt.base = GDT;
    special.gdt.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
    special.idt.base = 0;
    special.idt.limit = 0;
    special.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    special.cr3 = PAGE_TABLES;
    special.cr4 = CR4_PAE;
    special.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&special)
        .map_err(KvmError::call("KVM_SET_SREGS"))?;

    let general = kvm_regs {
        rflags: 2,
        rip: entry,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rsi: ZERO_PAGE,
        ..Default::default()
    };
    vcpu.set_regs(&general)
        .map_err(KvmError::call("KVM_SET_REGS"))
}

/// Sets the floating-point unit to its state after a reset.
///
/// # Errors
/// [`KvmError::Call`]
pub fn set_fpu(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(KvmError::call("KVM_SET_FPU"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_64_bit_and_data_is_writable() {
        let code = CODE.segment(2);
        assert_eq!(
            (code.selector, code.l, code.db, code.type_, code.present),
            (0x10, 1, 0, 0xb, 1)
        );
        let data = DATA.segment(3);
        assert_eq!(
            (data.selector, data.l, data.db, data.type_, data.s),
            (0x18, 0, 1, 3, 1)
        );
        assert_eq!(TASK.segment(4).type_, 0xb);
    }

    #[test]
    fn the_first_four_gib_are_mapped_one_to_one() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory).unwrap();
        let walk = |address: u64| {
            let next = |table: u64, shift: u32| {
                let place = GuestAddress((table & !0xfff) + (address >> shift & 511) * 8);
                memory.read_obj::<u64>(place).unwrap()
            };
            let entry = next(next(next(PAGE_TABLES, 39), 30), 21);
            assert_eq!(entry & 0xfff, PRESENT_WRITABLE | HUGE_PAGE);
            (entry & !0x1f_ffff) | address & 0x1f_ffff
        };
        for address in [0, 0x10_0000, 0xd000_1234, 0xffff_ffff] {
            assert_eq!(walk(address), address);
        }
    }
}
