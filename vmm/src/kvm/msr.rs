//! Model-specific registers as a kernel expects them at its entry.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::KvmError;

const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

const FAST_STRING: u64 = 1;
/// MTRRs enabled, memory is write-back unless said otherwise.
const WRITE_BACK: u64 = 1 << 11 | 6;

const AT_BOOT: [(u32, u64); 11] = [
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (STAR, 0),
    (CSTAR, 0),
    (KERNEL_GS_BASE, 0),
    (SYSCALL_MASK, 0),
    (LSTAR, 0),
    (IA32_TSC, 0),
    (IA32_MISC_ENABLE, FAST_STRING),
    (MTRR_DEFAULT_TYPE, WRITE_BACK),
];

/// Sets the registers. Those that this host's KVM refuses keep KVM's default: the guest finds out
/// by CPUID what it may use.
///
/// # Errors
/// [`KvmError::Call`] when the ioctl itself fails.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut entries = AT_BOOT
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .to_vec();
    while !entries.is_empty() {
        let Ok(msrs) = Msrs::from_entries(&entries) else {
            break;
        };
        // KVM stops at the first one that it refuses.
        let done = vcpu
            .set_msrs(&msrs)
            .map_err(KvmError::call("KVM_SET_MSRS"))?;
        if let Some(refused) = entries.get(done) {
            crate::log::note(&format!("KVM refuses MSR {:#x}", refused.index));
        }
        entries.drain(..(done + 1).min(entries.len()));
    }
    Ok(())
}
