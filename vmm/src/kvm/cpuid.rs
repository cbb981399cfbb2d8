//! What CPUID tells the guest: what KVM supports on this host, with our topology and clocks.

use std::arch::x86_64::__cpuid;
use std::ops::RangeInclusive;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::KvmError;

const FEATURES: u32 = 1;
const INTEL_CACHES: u32 = 4;
const POWER: u32 = 6;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const HYPERVISOR: u32 = 0x4000_0000;
const KVM: u32 = 0x4000_0001;
const TIMING: u32 = 0x4000_0010;
const AMD_HIGHEST: u32 = 0x8000_0000;
/// The processor's name.
const BRAND: RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EAX_ARAT: u32 = 1 << 2;
/// `KVM_FEATURE_POLL_CONTROL`
const EAX_POLL_CONTROL: u32 = 1 << 12;
const ECX_CMP_LEGACY: u32 = 1 << 1;

/// The frequency of KVM's local APIC timer, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// CPUID of all vCPUs, without what differs between them.
#[derive(Debug, Clone)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
}

impl Template {
    /// Asks KVM what it supports and makes it fit a machine with `vcpus` processors.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut template = Self::from_supported(supported.as_slice(), vcpus, deadline);
        template.name_processor();
        Ok(template)
    }

    /// Passes the processor's name on, which KVM leaves out. It is only for people.
    fn name_processor(&mut self) {
        if __cpuid(AMD_HIGHEST).eax < *BRAND.end() {
            return;
        }
        for function in BRAND {
            let host = __cpuid(function);
            self.entries.retain(|entry| entry.function != function);
            self.entries.push(kvm_cpuid_entry2 {
                function,
                eax: host.eax,
                ebx: host.ebx,
                ecx: host.ecx,
                edx: host.edx,
                ..Default::default()
            });
        }
        self.change(AMD_HIGHEST, |entry| entry.eax = entry.eax.max(*BRAND.end()));
    }

    fn from_supported(supported: &[kvm_cpuid_entry2], vcpus: u8, tsc_deadline: bool) -> Self {
        let mut template = Self {
            entries: supported.to_vec(),
            vcpus,
        };
        // One package of single-threaded cores is told by leaf 0xb alone.
        template.entries.retain(|entry| {
            !matches!(
                entry.function,
                TOPOLOGY | TOPOLOGY_V2 | AMD_TOPOLOGY_V2 | TIMING
            )
        });
        let cores = u32::from(vcpus);
        template.change(FEATURES, |entry| {
            entry.ecx |= ECX_HYPERVISOR;
            // The performance counters that it describes are not passed on.
            entry.ecx &= !ECX_PDCM;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            entry.ebx = entry.ebx & 0xff00_ffff | cores << 16;
            set(&mut entry.edx, EDX_HTT, cores > 1);
        });
        // The local APIC's timer never stops. Linux starts no PIT only if it knows that.
        template.change(POWER, |entry| {
            entry.eax = EAX_ARAT;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        });
        template.change(PERFORMANCE, |entry| {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        });
        template.change(INTEL_CACHES, |entry| {
            if entry.eax & 0x1f != 0 {
                entry.eax = entry.eax & 0x3fff
                    | sharing(entry.eax, cores) << 14
                    | (cores - 1).min(63) << 26;
            }
        });
        template.change(AMD_CACHES, |entry| {
            if entry.eax & 0x1f != 0 {
                entry.eax = entry.eax & 0x3fff | sharing(entry.eax, cores) << 14;
            }
        });
        template.change(AMD_FEATURES, |entry| {
            if cores == 1 {
                entry.ecx &= !ECX_CMP_LEGACY;
            }
        });
        template.change(AMD_SIZES, |entry| {
            entry.ecx = if entry.ecx == 0 && cores == 1 {
                0
            } else {
                id_bits(cores) << 12 | (cores - 1)
            };
        });
        // The guest's idle driver would turn the host's polling off, in favour of its own, which it
        // is told not to do. Whether to poll is for the host.
        template.change(KVM, |entry| entry.eax &= !EAX_POLL_CONTROL);
        template.change(HYPERVISOR, |entry| entry.eax = entry.eax.max(TIMING));
        template
    }

    /// Returns how many bits the guest's physical addresses have: as the processor has them, or
    /// what KVM can map of those (AMD APM, CPUID Fn8000_0008_EAX).
    #[must_use]
    pub fn address_bits(&self) -> u32 {
        let sizes = self.entries.iter().find(|e| e.function == AMD_SIZES);
        // The least that a processor in 64-bit mode has.
        let eax = sizes.map_or(36, |entry| entry.eax);
        match (eax & 0xff, eax >> 16 & 0xff) {
            (bits, 0) => bits,
            (bits, mapped) => bits.min(mapped),
        }
    }

    /// Returns what a snapshot keeps of it: all that the first vCPU is told, but for its clock's rate.
    #[must_use]
    pub fn saved(&self) -> Vec<kvm_cpuid_entry2> {
        self.for_vcpu(0, 0)
    }

    /// Gives a vCPU its CPUID. To be done before its MSRs are read.
    ///
    /// # Errors
    /// [`KvmError::Call`]
    pub fn apply(&self, vcpu: &VcpuFd, id: u8) -> Result<(), KvmError> {
        let entries = self.for_vcpu(id, tsc_khz(vcpu));
        let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::Call {
            call: "KVM_SET_CPUID2",
            source: std::io::ErrorKind::InvalidInput.into(),
        })?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(KvmError::call("KVM_SET_CPUID2"))
    }

    fn for_vcpu(&self, id: u8, tsc_khz: u32) -> Vec<kvm_cpuid_entry2> {
        let mut vcpu = self.clone();
        let apic = u32::from(id);
        let cores = u32::from(self.vcpus);
        vcpu.change(FEATURES, |entry| {
            entry.ebx = entry.ebx & 0x00ff_ffff | apic << 24
        });
        vcpu.change(AMD_TOPOLOGY, |entry| {
            entry.eax = apic;
            entry.ebx = apic & 0xff;
            entry.ecx = 0;
            entry.edx = 0;
        });
        // Level types: 1 thread, 2 core (Intel SDM, CPUID leaf 0xb).
        for (index, shift, count, kind) in
            [(0, 0, 1, 1), (1, id_bits(cores), cores, 2), (2, 0, 0, 0)]
        {
            vcpu.entries.push(kvm_cpuid_entry2 {
                function: TOPOLOGY,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: kind << 8 | index,
                edx: apic,
                ..Default::default()
            });
        }
        if tsc_khz != 0 {
            vcpu.entries.push(kvm_cpuid_entry2 {
                function: TIMING,
                eax: tsc_khz,
                ebx: APIC_BUS_KHZ,
                ..Default::default()
            });
        }
        vcpu.entries
    }

    fn change(&mut self, function: u32, mut change: impl FnMut(&mut kvm_cpuid_entry2)) {
        self.entries
            .iter_mut()
            .filter(|entry| entry.function == function)
            .for_each(&mut change);
    }
}

/// Returns the rate of a vCPU's time stamp counter, in kHz. KVM gives 0 or an error where it can't tell; the
/// guest then measures.
#[must_use]
pub fn tsc_khz(vcpu: &VcpuFd) -> u32 {
    vcpu.get_tsc_khz().unwrap_or(0)
}

/// Returns the name of the processor that is described.
#[must_use]
pub fn processor(entries: &[kvm_cpuid_entry2]) -> String {
    let words = BRAND.filter_map(|function| entries.iter().find(|e| e.function == function));
    let bytes = words.flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx].map(u32::to_le_bytes));
    let name: Vec<u8> = bytes.flatten().filter(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&name).trim().to_owned()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

/// Returns how many bits hold a core number.
fn id_bits(cores: u32) -> u32 {
    cores.next_power_of_two().trailing_zeros()
}

/// Returns the number of threads that share this cache, less one: all share the third level.
fn sharing(eax: u32, cores: u32) -> u32 {
    let level = eax >> 5 & 7;
    if level >= 3 { cores - 1 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn the_guest_sees_its_own_topology_and_clocks() {
        let host = [
            entry(0, 0, [0xd, 0, 0, 0]),
            entry(FEATURES, 0, [0, 0xff10_0800, ECX_PDCM, 0]),
            entry(INTEL_CACHES, 0, [0xfc00_4121, 0, 0, 0]),
            entry(INTEL_CACHES, 3, [0xfc1f_c163, 0, 0, 0]),
            entry(POWER, 0, [0xff, 1, 9, 0]),
            entry(PERFORMANCE, 0, [1, 2, 3, 4]),
            entry(TOPOLOGY, 0, [1, 2, 3, 77]),
            entry(TOPOLOGY_V2, 0, [1, 2, 3, 77]),
            entry(HYPERVISOR, 0, [0x4000_0001, 0, 0, 0]),
            entry(KVM, 0, [0x0100_7efb, 0, 0, 0]),
            entry(AMD_SIZES, 0, [0x30_3034, 0, 0x7f, 0]),
            entry(AMD_TOPOLOGY, 0, [77, 7, 7, 0]),
        ];
        let template = Template::from_supported(&host, 3, true);
        assert_eq!(template.address_bits(), 48);
        let entries = template.for_vcpu(2, 2_500_000);

        let features = find(&entries, FEATURES, 0);
        assert_eq!(features.ebx, 0x0203_0800);
        assert_eq!(features.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert_eq!(features.edx, EDX_HTT);
        assert_eq!(find(&entries, POWER, 0).eax, EAX_ARAT);
        assert_eq!(find(&entries, PERFORMANCE, 0).eax, 0);
        assert_eq!(find(&entries, INTEL_CACHES, 0).eax, 2 << 26 | 0x121);
        assert_eq!(
            find(&entries, INTEL_CACHES, 3).eax,
            2 << 26 | 2 << 14 | 0x163
        );
        assert_eq!(find(&entries, AMD_SIZES, 0).ecx, 2 << 12 | 2);
        assert_eq!(find(&entries, AMD_TOPOLOGY, 0).eax, 2);
        let core = find(&entries, TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert!(entries.iter().all(|e| e.function != TOPOLOGY_V2));
        assert_eq!(find(&entries, HYPERVISOR, 0).eax, TIMING);
        assert_eq!(find(&entries, KVM, 0).eax, 0x0100_6efb);
        assert_eq!(find(&entries, TIMING, 0).eax, 2_500_000);
    }

    #[test]
    fn a_single_core_is_no_hyperthread() {
        let entries = Template::from_supported(&[entry(FEATURES, 0, [0, 0, 0, EDX_HTT])], 1, false)
            .for_vcpu(0, 0);
        let features = find(&entries, FEATURES, 0);
        assert_eq!(
            (features.edx, features.ecx, features.ebx),
            (0, ECX_HYPERVISOR, 1 << 16)
        );
        assert!(entries.iter().all(|e| e.function != TIMING));
    }
}
