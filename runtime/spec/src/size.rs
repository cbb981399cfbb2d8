//! How large a VM is.

use serde::{Deserialize, Serialize};

use hull_proto_vmm::{PLUG_MIB, PLUG_STEP_MIB};

use crate::{
    config::PodsConfig,
    error::PodError,
    spec::{Resources, SandboxSpec},
};

const MIB: u64 = 1 << 20;
/// The kernel's default period of a CPU quota (cgroup v2 `cpu.max`).
const DEFAULT_PERIOD_US: i64 = 100_000;

/// What a pod takes beside its guest's memory, in MiB: its VMM, its file servers, what the kernel keeps for them.
const HOST_MIB: u64 = 12;
/// The part of a guest's memory that its page tables take on the host.
const PAGE_TABLES: u64 = 128;
/// The least memory that a guest boots with and has some left for containers, in MiB.
const LEAST_MIB: u64 = 48;
/// What a guest's kernel and agent take of it, in MiB.
const GUEST_MIB: u64 = 24;
/// What a pod takes beside its containers, if these use all of their limits, in MiB; without the page tables.
pub const OVERHEAD_MIB: u64 = HOST_MIB + GUEST_MIB;
/// The part of their limits that the containers of a pod may lack for what its VM takes.
const LACK: u64 = 4;

/// How much memory the host lets a pod have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// No cgroup was named for it: only the pod itself says how much it may use.
    Unknown,
    /// Its cgroup has no limit, so not all of its containers have one.
    Unlimited,
    /// The limit of its cgroup, in MiB. The kernel kills the VMM of a pod that takes more, and a guest may take all
    /// of its memory, if only for its page cache.
    Mib(u64),
}

impl Room {
    /// How much of that the guest may have at most, in MiB.
    #[must_use]
    pub fn of_guest(self) -> u64 {
        match self {
            Self::Unknown | Self::Unlimited => u64::MAX,
            Self::Mib(mib) => mib.saturating_sub(HOST_MIB + mib / PAGE_TABLES),
        }
    }

    /// Whether a VM fits in, and its containers have about what their limits say: without an overhead, small limits
    /// leave a VM nothing.
    #[must_use]
    pub fn holds(self, spec: &SandboxSpec) -> bool {
        let limit = memory(spec.resources.as_ref()) / MIB;
        let containers = limit - limit / LACK;
        self.of_guest() >= LEAST_MIB.max(GUEST_MIB.saturating_add(containers))
    }
}

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// Virtual CPUs; at least 1.
    pub vcpus: u8,
    /// Memory at its start, in MiB.
    pub memory_mib: u64,
    /// How much there can be beside that, in MiB. VMs of earlier versions have none.
    #[serde(default)]
    pub pluggable_mib: u64,
    /// How much of that it has at least, in MiB.
    #[serde(default)]
    pub least_mib: u64,
    /// How much of that it may have when its guest needs it, in MiB.
    #[serde(default)]
    pub most_mib: u64,
}

impl VmSize {
    /// That of a VM of which nothing is recorded: enough to end it, and nothing fits into it.
    pub const UNKNOWN: Self = Self {
        vcpus: 1,
        memory_mib: 0,
        pluggable_mib: 0,
        least_mib: 0,
        most_mib: 0,
    };

    /// From what the pod may use: the limit of its containers and its overhead, and huge pages beside
    /// them. It has all of that from its start, because programs look at how much memory there is and take
    /// their share of it. A pod without a limit gets the configured size, and more when it needs it. Neither gets
    /// more than there is room for.
    #[must_use]
    pub fn of(spec: &SandboxSpec, config: &PodsConfig, host_cpus: usize, room: Room) -> Self {
        let limit = memory(spec.resources.as_ref());
        let huge_mib = spec.resources.as_ref().map_or(0, huge_mib);
        let memory_mib = match (limit, memory(spec.overhead.as_ref())) {
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
        let memory_mib = memory_mib.max(config.memory_mib).saturating_add(huge_mib);
        let most = room.of_guest();
        let memory_mib = memory_mib.min(most);
        let pluggable_mib = config.max_memory_mib.saturating_sub(memory_mib);
        let pluggable_mib = pluggable_mib - pluggable_mib % PLUG_MIB;
        let limited = limit > 0 && room == Room::Unknown;
        let beside = (most - memory_mib) / PLUG_STEP_MIB * PLUG_STEP_MIB;
        Self {
            vcpus: u8::try_from(wanted.clamp(1, host_cpus.max(1))).unwrap_or(u8::MAX),
            memory_mib,
            pluggable_mib,
            least_mib: 0,
            most_mib: if limited {
                0
            } else {
                pluggable_mib.min(beside)
            },
        }
    }

    /// The most memory that the guest may have, in MiB.
    #[must_use]
    pub fn max_memory_mib(self) -> u64 {
        self.memory_mib.saturating_add(self.most_mib)
    }

    /// Whether the guest gets more memory when it needs it.
    #[must_use]
    pub fn grows(self) -> bool {
        self.most_mib > self.least_mib
    }

    /// The same VM with the memory of another; none: it can't have so much.
    #[must_use]
    pub fn with_memory_of(self, other: Self) -> Option<Self> {
        let least = other.memory_mib.saturating_add(other.least_mib);
        let beside = |mib: u64| {
            mib.saturating_sub(self.memory_mib)
                .checked_next_multiple_of(PLUG_STEP_MIB)
        };
        let least_mib = beside(least).filter(|mib| *mib <= self.pluggable_mib)?;
        let most_mib = beside(other.max_memory_mib())?.clamp(least_mib, self.pluggable_mib);
        Some(Self {
            least_mib,
            most_mib,
            ..self
        })
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

/// The limit, in bytes; 0: there is none.
fn memory(resources: Option<&Resources>) -> u64 {
    resources.map_or(0, |r| u64::try_from(r.memory_limit_bytes).unwrap_or(0))
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
        size_in(Room::Unknown, resources, overhead)
    }

    fn size_in(room: Room, resources: Option<Resources>, overhead: Option<Resources>) -> VmSize {
        let spec = SandboxSpec {
            resources,
            overhead,
            ..SandboxSpec::default()
        };
        let mut config = PodsConfig::new("/r", "/s", "/a");
        config.max_memory_mib = 1000;
        VmSize::of(&spec, &config, 8, room)
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
            pluggable_mib: 640,
            least_mib: 0,
            most_mib: 640,
        };
        assert_eq!(size(None, None), expected);
        assert!(expected.grows() && expected.max_memory_mib() == 896);
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
    fn a_pod_with_limits_has_all_of_them_and_changes_with_them() {
        let vm = size(resources(512, 0), None);
        assert_eq!((vm.pluggable_mib, vm.most_mib), (384, 0));
        assert!(!vm.grows());
        let beside = |memory_mib| {
            let other = size(resources(memory_mib, 0), None);
            vm.with_memory_of(other)
                .map(|vm| (vm.memory_mib, vm.least_mib, vm.most_mib))
        };
        assert_eq!(beside(512), Some((576, 0, 0)));
        assert_eq!(beside(513), Some((576, 2, 2)));
        assert_eq!(beside(896), Some((576, 384, 384)));
        assert_eq!(beside(897), None);
        assert_eq!(beside(10), Some((576, 0, 0)), "the start's is not taken");
        assert_eq!(beside(i64::MAX >> 20), None);
        let unlimited = vm.with_memory_of(size(None, None)).unwrap();
        assert!(unlimited.grows() && unlimited.max_memory_mib() <= 960);
        assert_eq!(VmSize::UNKNOWN.with_memory_of(vm), None);
    }

    #[test]
    fn a_guest_fits_into_the_limit_of_its_pods_cgroup() {
        // As kubelet sets it: limits and the overhead of a RuntimeClass.
        let vm = size_in(Room::Mib(192), resources(128, 0), resources(64, 0));
        assert_eq!((vm.memory_mib, vm.most_mib), (192 - 13, 0));
        let vm = size_in(Room::Mib(4096), resources(4096, 0), None);
        assert_eq!((vm.memory_mib, vm.most_mib), (4096 - 44, 0));
        // Limits of some containers, below a cgroup of the node's pods.
        let vm = size_in(Room::Mib(600), resources(128, 0), resources(64, 0));
        assert_eq!((vm.memory_mib, vm.most_mib), (256, 600 - 16 - 256));
        let vm = size_in(Room::Unlimited, resources(128, 0), None);
        assert_eq!((vm.memory_mib, vm.most_mib), (256, 640));
        let vm = size_in(Room::Mib(300), None, None);
        assert_eq!((vm.memory_mib, vm.most_mib), (256, 30));
        // In-place resize.
        let vm = size_in(Room::Mib(192), resources(128, 0), resources(64, 0));
        let more = size_in(Room::Mib(292), resources(228, 0), resources(64, 0));
        let more = vm.with_memory_of(more).unwrap();
        assert_eq!((more.least_mib, more.most_mib), (100, 100));
    }

    #[test]
    fn a_pod_whose_cgroup_leaves_its_containers_too_little_is_told() {
        let holds = |room_mib: u64, limit_mib: i64| {
            let resources = resources(limit_mib, 0);
            let spec = SandboxSpec {
                resources,
                ..SandboxSpec::default()
            };
            Room::Mib(room_mib).holds(&spec)
        };
        // Without an overhead the limits are all there is.
        let least = (1..1000).find(|mib| holds(*mib, *mib as i64));
        assert_eq!(least, Some(148));
        assert!(holds(60, 0) && !holds(59, 0));
        // With that of docs/KUBERNETES.md any limits are held.
        assert!((1..10_000).all(|mib| holds(mib + 64, mib as i64)));
        assert!(!holds(20 + 32, 20));
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
            memory_mib: 256,
            ..VmSize::UNKNOWN
        };
        assert!(size.check_memory(Some(255)).is_err());
        assert!(size.check_memory(Some(256)).is_ok());
        assert!(size.check_memory(None).is_ok());
    }
}
