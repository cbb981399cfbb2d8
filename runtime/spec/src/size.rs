//! How large a VM is.

use serde::{Deserialize, Serialize};

use crate::{
    config::PodsConfig,
    error::PodError,
    spec::{Resources, SandboxSpec},
};

const MIB: u64 = 1 << 20;
/// The kernel's default period of a CPU quota (cgroup v2 `cpu.max`).
const DEFAULT_PERIOD_US: i64 = 100_000;

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// Virtual CPUs; at least 1.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl VmSize {
    /// That of a VM of which nothing is recorded: enough to end it, and nothing fits into it.
    pub const UNKNOWN: Self = Self {
        vcpus: 1,
        memory_mib: 0,
    };

    /// From what the pod may use: the limit of its containers and its overhead, and huge pages beside
    /// them. A pod without a limit gets the configured size.
    pub fn of(spec: &SandboxSpec, config: &PodsConfig, host_cpus: usize) -> Self {
        let memory = |r: &Option<Resources>| {
            r.as_ref()
                .map_or(0, |r| u64::try_from(r.memory_limit_bytes).unwrap_or(0))
        };
        let huge_mib = spec.resources.as_ref().map_or(0, huge_mib);
        let memory_mib = match (memory(&spec.resources), memory(&spec.overhead)) {
            (0, _) => config.memory_mib,
            (limit, 0) => (limit.div_ceil(MIB)).saturating_add(config.guest_overhead_mib),
            (limit, overhead) => limit.saturating_add(overhead).div_ceil(MIB),
        };
        let quota = match &spec.resources {
            Some(resources) => cpus(resources) + spec.overhead.as_ref().map_or(0.0, cpus),
            None => 0.0,
        };
        let wanted = if quota > 0.0 {
            quota.ceil() as usize
        } else {
            usize::from(config.vcpus)
        };
        Self {
            vcpus: u8::try_from(wanted.clamp(1, host_cpus.max(1))).unwrap_or(u8::MAX),
            memory_mib: memory_mib.max(config.memory_mib).saturating_add(huge_mib),
        }
    }

    /// Refuses a VM that the host could not back with memory now.
    ///
    /// # Errors
    /// [`PodError::ResourceExhausted`].
    pub fn check_memory(self, available_mib: Option<u64>) -> Result<(), PodError> {
        match available_mib {
            Some(available_mib) if available_mib < self.memory_mib => {
                Err(PodError::ResourceExhausted {
                    action: "find memory for the VM".into(),
                    reason: format!(
                        "it needs {} MiB, {available_mib} MiB are available",
                        self.memory_mib
                    ),
                })
            }
            _ => Ok(()),
        }
    }
}

fn huge_mib(resources: &Resources) -> u64 {
    let limits = resources.hugepage_limits.iter();
    let bytes = limits.fold(0_u64, |sum, limit| sum.saturating_add(limit.limit_bytes));
    bytes.div_ceil(MIB)
}

fn cpus(resources: &Resources) -> f64 {
    let period = match resources.cpu_period_us {
        period if period > 0 => period,
        _ => DEFAULT_PERIOD_US,
    };
    if resources.cpu_quota_us > 0 {
        resources.cpu_quota_us as f64 / period as f64
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::HugepageLimit;

    fn size(resources: Option<Resources>, overhead: Option<Resources>) -> VmSize {
        let spec = SandboxSpec {
            resources,
            overhead,
            ..SandboxSpec::default()
        };
        VmSize::of(&spec, &PodsConfig::new("/r", "/s", "/a"), 8)
    }

    fn resources(memory_mib: i64, quota_us: i64) -> Option<Resources> {
        Some(Resources {
            memory_limit_bytes: memory_mib * MIB as i64,
            cpu_quota_us: quota_us,
            ..Resources::default()
        })
    }

    #[test]
    fn a_pod_without_limits_gets_the_default() {
        let expected = VmSize {
            vcpus: 1,
            memory_mib: 256,
        };
        assert_eq!(size(None, None), expected);
        assert_eq!(size(resources(0, 0), resources(64, 0)), expected);
        assert_eq!(size(resources(-1, -1), None), expected);
    }

    #[test]
    fn limits_and_overhead_add_up() {
        assert_eq!(size(resources(512, 150_000), None).memory_mib, 512 + 64);
        assert_eq!(size(resources(512, 150_000), None).vcpus, 2);
        assert_eq!(size(resources(512, 0), resources(100, 0)).memory_mib, 612);
        let both = size(resources(512, 200_000), resources(100, 50_000));
        assert_eq!(both.vcpus, 3);
    }

    #[test]
    fn huge_pages_are_beside_the_rest() {
        let mut limits = resources(512, 0).unwrap();
        let pages = |size: &str, mib: u64| HugepageLimit {
            page_size: size.into(),
            limit_bytes: mib * MIB,
        };
        limits.hugepage_limits = vec![pages("2MB", 64), pages("1GB", 0)];
        assert_eq!(size(Some(limits.clone()), None).memory_mib, 512 + 64 + 64);
        limits.memory_limit_bytes = 0;
        assert_eq!(size(Some(limits.clone()), None).memory_mib, 256 + 64);
        limits.hugepage_limits = vec![pages("2MB", u64::MAX / MIB), pages("1GB", 1024)];
        assert!(size(Some(limits), None).memory_mib > u64::MAX / MIB);
    }

    #[test]
    fn a_vm_is_never_too_small_nor_has_more_cpus_than_the_host() {
        assert_eq!(size(resources(16, 0), None).memory_mib, 256);
        assert_eq!(size(resources(512, 10_000_000), None).vcpus, 8);
        assert_eq!(
            size(resources(i64::MAX >> 20, i64::MAX), None).vcpus,
            8,
            "absurd numbers do not overflow"
        );
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let size = VmSize {
            vcpus: 1,
            memory_mib: 256,
        };
        assert!(size.check_memory(Some(255)).is_err());
        assert!(size.check_memory(Some(256)).is_ok());
        assert!(size.check_memory(None).is_ok());
    }
}
