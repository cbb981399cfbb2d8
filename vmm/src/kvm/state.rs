//! What a snapshot keeps of a vCPU, in the order that KVM needs.

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::KvmError;

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Memory types of ranges, which KVM keeps and does not list: variable ones, fixed ones, the default.
const MEMORY_TYPES: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c,
    0x20d, 0x20e, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e,
    0x26f, 0x2ff,
];

/// Numbers of the model-specific registers that a snapshot keeps.
#[derive(Debug)]
pub struct MsrList(Vec<u32>);

impl MsrList {
    /// Asks KVM which it has.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let list = kvm.get_msr_index_list();
        let list = list.map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
        let mut numbers = [list.as_slice(), &MEMORY_TYPES].concat();
        // The timer's deadline is a time of the counter, which is to be there first.
        numbers.sort_unstable_by_key(|number| (*number == IA32_TSC_DEADLINE, *number));
        numbers.dedup();
        Ok(Self(numbers))
    }
}

/// A vCPU that stands still.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// Whether it runs, is halted, or waits to be woken for the first time.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub general: kvm_regs,
    /// Segments, control registers, the local APIC's base.
    pub special: kvm_sregs,
    /// Floating point and vectors.
    pub xsave: kvm_xsave,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers: number, value.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions and interrupts on their way.
    pub events: kvm_vcpu_events,
}

/// Why a vCPU does not come back.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This host has no such register, or not with this value.
    #[error("this host's KVM does not take {value:#x} for the model-specific register {number:#x}")]
    Msr {
        /// The register.
        number: u32,
        /// Its saved value.
        value: u64,
    },
}

impl VcpuState {
    /// Reads the state of a vCPU that is not in the guest.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn of(vcpu: &VcpuFd, msrs: &MsrList) -> Result<Self, KvmError> {
        // First, because KVM completes what the local APIC has received.
        let mp_state = vcpu.get_mp_state();
        Ok(Self {
            mp_state: mp_state.map_err(KvmError::call("KVM_GET_MP_STATE"))?,
            general: vcpu.get_regs().map_err(KvmError::call("KVM_GET_REGS"))?,
            special: vcpu.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?,
            // It fails where the state is larger, which takes features that no guest is told of.
            xsave: vcpu.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?,
            debug: vcpu
                .get_debug_regs()
                .map_err(KvmError::call("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(KvmError::call("KVM_GET_LAPIC"))?,
            msrs: read_msrs(vcpu, &msrs.0)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Gives a new vCPU this state; it has its CPUID. `is_first` is that of the machine's first one, which
    /// comes before the others.
    ///
    /// # Errors
    /// [`VcpuStateError`]
    pub fn apply(
        &self,
        vcpu: &VcpuFd,
        known: &MsrList,
        is_first: bool,
    ) -> Result<(), VcpuStateError> {
        vcpu.set_mp_state(self.mp_state)
            .map_err(KvmError::call("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.general)
            .map_err(KvmError::call("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.special)
            .map_err(KvmError::call("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads more than this structure only of a process that asked for features with a
        // larger state (arch_prctl), and this one did not.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(KvmError::call("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
        // After its base, which is a special register; before the timer's deadline.
        vcpu.set_lapic(&self.lapic)
            .map_err(KvmError::call("KVM_SET_LAPIC"))?;
        self.apply_msrs(vcpu, known, is_first)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
        // Tells the guest that it stood still. A vCPU that never ran has no clock to be told by.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }

    fn apply_msrs(
        &self,
        vcpu: &VcpuFd,
        known: &MsrList,
        is_first: bool,
    ) -> Result<(), VcpuStateError> {
        let mut entries = Vec::with_capacity(self.msrs.len() + 1);
        for (number, value) in self.msrs.iter().copied() {
            if !known.0.contains(&number) {
                return Err(VcpuStateError::Msr { number, value });
            }
            if is_first && number == IA32_TSC {
                // A counter that is set to within a second of what it would be is taken for one that is
                // to be like another vCPU's, and would not go back. So it goes far away first, and the
                // other vCPUs, which follow, are like this one.
                entries.push((number, value ^ 1 << 62));
            }
            entries.push((number, value));
        }
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
            let set = vcpu
                .set_msrs(&msrs(chunk)?)
                .map_err(KvmError::call("KVM_SET_MSRS"))?;
            let mut done = set;
            if let Some(&(number, value)) = chunk.get(set) {
                // One that can't be written is as good if it says the same.
                if read_msrs(vcpu, &[number])? != [(number, value)] {
                    return Err(VcpuStateError::Msr { number, value });
                }
                done += 1;
            }
            rest = &rest[done..];
        }
        Ok(())
    }
}

/// Reads registers, but for those that this processor has not.
fn read_msrs(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut entries = msrs(&Vec::from_iter(chunk.iter().map(|number| (*number, 0))))?;
        let read = vcpu
            .get_msrs(&mut entries)
            .map_err(KvmError::call("KVM_GET_MSRS"))?;
        let read_entries = entries.as_slice().iter().take(read);
        values.extend(read_entries.map(|entry| (entry.index, entry.data)));
        rest = &rest[(read + 1).min(chunk.len())..];
    }
    Ok(values)
}

fn msrs(entries: &[(u32, u64)]) -> Result<Msrs, KvmError> {
    let entries: Vec<_> = entries
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::Call {
        call: "arrange model-specific registers",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}
