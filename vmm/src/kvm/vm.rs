//! The virtual machine: memory slots, interrupt chip, MSIs and ioeventfds.

use std::io;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_READONLY, kvm_clock_data, kvm_enable_cap, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::KvmError;
use crate::file_regions::MemorySlots;
use crate::layout::{IOAPIC_PINS, KVM_TSS, SLOT_BASE};
use crate::legacy::ioapic::{Message, MessageSink};
use crate::memory;
use crate::memory::Memory;
use crate::slots::Doorbells;
use crate::virtio::registers::Registers;

/// KVM's slot of registers follows those of RAM, of which there are two at most, and of pluggable memory.
const REGISTERS: u32 = 3;
const FIRST_FILE_REGION: u32 = REGISTERS + 1;

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
}

impl Vm {
    /// Creates a machine whose RAM and pluggable memory are `memory`, with KVM's local APICs and a place for our IOAPIC.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn new(kvm: &Kvm, memory: &Memory) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
        for (slot, (guest, host, length)) in (0..).zip(memory::regions(memory)) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: guest,
                memory_size: length,
                userspace_addr: host,
            };
            // SAFETY: the range is a mapping of `memory`, whose regions don't overlap. vCPUs keep
            // a clone of `memory` as long as they may run, so it outlives the slot's use.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        // Needed on Intel processors without unrestricted guest; refused where it has no meaning.
        if let Err(error) = usize::try_from(KVM_TSS).map(|address| fd.set_tss_address(address)) {
            crate::log::note(&format!("KVM_SET_TSS_ADDR: {error}"));
        }
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        cap.args[0] = u64::from(IOAPIC_PINS);
        fd.enable_cap(&cap)
            .map_err(KvmError::call("KVM_CAP_SPLIT_IRQCHIP"))?;
        Ok(Self { fd })
    }

    /// Lets the guest read the registers of its slots without an exit. Its writes remain exits.
    ///
    /// # Safety
    /// `registers` stays as long as vCPUs may run.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub unsafe fn show_registers(&self, registers: &Registers) -> Result<(), KvmError> {
        let (host, length) = registers.place();
        // SAFETY: the caller keeps the range mapped.
        unsafe { self.map_read_only(REGISTERS, SLOT_BASE, host, length) }
            .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Makes `length` bytes at `host` the guest's at `guest`; what it writes is an exit.
    ///
    /// # Safety
    /// The bytes stay mapped as long as the slot is there.
    unsafe fn map_read_only(
        &self,
        slot: u32,
        guest: u64,
        host: u64,
        length: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: guest,
            memory_size: length,
            userspace_addr: host,
        };
        // SAFETY: the caller keeps the range mapped.
        unsafe { self.fd.set_user_memory_region(region) }
    }

    /// Returns the guest's time since it started, in nanoseconds.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn clock(&self) -> Result<u64, KvmError> {
        let clock = self.fd.get_clock();
        Ok(clock.map_err(KvmError::call("KVM_GET_CLOCK"))?.clock)
    }

    /// Has the guest's time go on from here, whatever passed meanwhile.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        self.fd
            .set_clock(&clock)
            .map_err(KvmError::call("KVM_SET_CLOCK"))
    }

    /// Creates a vCPU. Its id is its local APIC's.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(id))
            .map_err(KvmError::call("KVM_CREATE_VCPU"))
    }
}

impl MemorySlots for Vm {
    unsafe fn map(&self, number: u32, guest: u64, host: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller keeps the range mapped.
        Ok(unsafe { self.map_read_only(FIRST_FILE_REGION + number, guest, host, length) }?)
    }

    fn unmap(&self, number: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: FIRST_FILE_REGION + number,
            ..Default::default()
        };
        // SAFETY: a size of 0 takes the slot out; no memory is given.
        Ok(unsafe { self.fd.set_user_memory_region(region) }?)
    }
}

impl MessageSink for Vm {
    fn send(&self, message: Message) {
        let msi = kvm_msi {
            address_lo: message.address,
            data: message.data,
            ..Default::default()
        };
        // Fails when the guest named a CPU that isn't there; real hardware loses it as well.
        if let Err(error) = self.fd.signal_msi(msi) {
            crate::log::note(&format!("KVM_SIGNAL_MSI: {error}"));
        }
    }
}

impl Doorbells for Vm {
    fn connect(&self, kick: &EventFd, address: u64, value: u32) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.fd.register_ioevent(kick, &address, value)?)
    }

    fn disconnect(&self, kick: &EventFd, address: u64, value: u32) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.fd.unregister_ioevent(kick, &address, value)?)
    }
}
