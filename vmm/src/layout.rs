//! Where everything is in the guest's physical address space.
//!
//! ```text
//! 0            RAM: page tables, zero page, command line, MPTable below 1 MiB; kernel above
//! 0xd000_0000  virtio-mmio slots, 4 KiB each
//! 0xfec0_0000  IOAPIC
//! 0xfee0_0000  local APICs (KVM's)
//! 4 GiB        the rest of RAM, then pluggable memory (crate::pluggable);
//!              then, 128 MiB apart, file regions (crate::file_regions)
//! ```

use hull_proto_vmm::SLOTS;

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// The boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack that the kernel starts with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Root page table; the lower ones follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// `setup_data` entries of the boot protocol.
pub const SETUP_DATA: u64 = 0x1_0000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// End of the low memory that the guest may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Multiprocessor table, in what is the BIOS area on a PC.
pub const MPTABLE: u64 = 0xf_0000;
/// End of the place for the multiprocessor table.
pub const MPTABLE_END: u64 = 0x10_0000;
/// Start of the memory above 1 MiB, where the kernel goes.
pub const HIGH_RAM: u64 = 0x10_0000;

/// Start of the address space that is not RAM; ends at 4 GiB.
pub const MMIO_GAP: u64 = 0xd000_0000;
/// First address above 4 GiB.
pub const FOUR_GIB: u64 = 1 << 32;

/// First virtio-mmio slot.
pub const SLOT_BASE: u64 = MMIO_GAP;
/// Distance of two slots.
pub const SLOT_SIZE: u64 = 0x1000;
/// First address after the slots.
pub const SLOT_END: u64 = SLOT_BASE + SLOT_SIZE * SLOTS as u64;

/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// First address after the IOAPIC's registers.
pub const IOAPIC_END: u64 = IOAPIC + 0x1000;
/// Pins of the IOAPIC.
pub const IOAPIC_PINS: u8 = 24;
/// The local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Where KVM keeps three pages that it needs on some Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// First port of COM1.
pub const COM1: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_PIN: u8 = 4;
/// Interrupt line of slot 0; the others share the lines up to the last one.
const FIRST_SLOT_PIN: u8 = 5;

/// Returns the address of a slot's registers.
#[must_use]
pub fn slot_address(slot: u8) -> u64 {
    SLOT_BASE + SLOT_SIZE * u64::from(slot)
}

/// Returns the IOAPIC pin of a slot. It is shared when there are more slots than pins.
#[must_use]
pub fn slot_pin(slot: u8) -> u8 {
    FIRST_SLOT_PIN + slot % (IOAPIC_PINS - FIRST_SLOT_PIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_shared_from_the_twentieth_slot_on() {
        assert_eq!(slot_pin(0), 5);
        assert_eq!(slot_pin(18), 23);
        assert_eq!(slot_pin(19), 5);
        assert_eq!(slot_pin(31), 17);
    }
}
