//! What the pods of this node need to know about the node.

use std::{path::PathBuf, time::Duration};

/// As what a guest is given images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageDevice {
    /// Memory, in which it uses files in place; a disk, where memory does not fit.
    Pmem,
    /// A disk, whose files it copies to its page cache.
    Block,
}

/// Which pods are clones of one template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateScope {
    /// None: every VM boots.
    Off,
    /// Those of one namespace.
    Namespace,
    /// All of the node.
    Node,
}

/// Users and groups of the host that are nobody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
    count: u32,
}

impl UserRange {
    /// Where the default range begins: beyond what systemd gives to anybody (its "UIDS-GIDS").
    pub const FIRST: u32 = 0x7000_0000;
    /// How many it has.
    pub const COUNT: u32 = 1 << 16;

    /// Those from `first` on, `count` of them; none: root, or what is no user, would be among them,
    /// or there would be none for pods.
    #[must_use]
    pub const fn new(first: u32, count: u32) -> Option<Self> {
        // The last one of all numbers means none (chown(2)).
        let fits = matches!(first.checked_add(count), Some(end) if end < u32::MAX);
        if first == 0 || count < 2 || !fits {
            return None;
        }
        Some(Self { first, count })
    }

    /// That of processes which unpack images.
    #[must_use]
    pub const fn images(&self) -> u32 {
        self.first
    }

    /// Those of pods.
    pub fn pods(&self) -> impl Iterator<Item = u32> + use<> {
        (self.first..self.first.saturating_add(self.count)).skip(1)
    }
}

impl Default for UserRange {
    fn default() -> Self {
        Self {
            first: Self::FIRST,
            count: Self::COUNT,
        }
    }
}

/// Paths, sizes and times.
#[derive(Debug, Clone)]
pub struct PodsConfig {
    /// Persistent directory: `hull.redb`, `pods/<id>/scratch.img`, the scratch template.
    pub root: PathBuf,
    /// Volatile directory: `pods/<id>/` with sockets, the exit report and the VMM's own log.
    pub state: PathBuf,
    /// The `hull-vmm` program.
    pub vmm: PathBuf,
    /// The `hull-fs` program, which serves paths of the host to pods that mount some.
    pub file_server: PathBuf,
    /// The guest's kernel, an uncompressed ELF.
    pub kernel: PathBuf,
    /// The guest's root with the agent, an EROFS image.
    pub guest_root: PathBuf,
    /// Memory of a VM whose pod names no limit, and the least of any VM, in MiB.
    pub memory_mib: u64,
    /// The most memory of a VM whose pod names no limit, in MiB. Not above `memory_mib`: it never gets more.
    pub max_memory_mib: u64,
    /// Memory that the guest itself needs on top of a pod's limit when the pod names no
    /// overhead, in MiB.
    pub guest_overhead_mib: u64,
    /// vCPUs of a VM whose pod names no quota; at least 1.
    pub vcpus: u8,
    /// Size of a pod's scratch disk and so the quota of its writable layers, in bytes.
    pub scratch_bytes: u64,
    /// Guests keep emptyDirs by themselves: faster, and the host does not see what is in them. Else
    /// they are shared as other paths are.
    pub guest_volumes: bool,
    /// As what a guest is given images.
    pub image_device: ImageDevice,
    /// Which pods are clones of one template.
    pub template: TemplateScope,
    /// How long a guest may take from the start of its VM to an agent that answers.
    pub boot_timeout: Duration,
    /// How long the agent may take to answer a call.
    pub agent_timeout: Duration,
    /// As whom VMMs run, a user for each pod.
    pub users: UserRange,
    /// Where cgroup v2 is mounted.
    pub cgroup_root: PathBuf,
    /// Writes the guest's serial console to `console.log` in the pod's run directory.
    pub serial_console: bool,
    /// Containers that name no seccomp profile get the default one.
    pub seccomp_default: bool,
    /// Containers get the volumes that their image declares.
    pub image_volumes: bool,
    /// Where the host's kernel tells of its AppArmor policy; none: AppArmor is off, and so it is in guests.
    pub apparmor: Option<PathBuf>,
}

impl PodsConfig {
    /// Defaults for everything but the three directories.
    #[must_use]
    pub fn new(
        root: impl Into<PathBuf>,
        state: impl Into<PathBuf>,
        assets: impl Into<PathBuf>,
    ) -> Self {
        let assets = assets.into();
        Self {
            root: root.into(),
            state: state.into(),
            vmm: assets.join("hull-vmm"),
            file_server: assets.join("hull-fs"),
            kernel: assets.join("vmlinux"),
            guest_root: assets.join("root.erofs"),
            memory_mib: 256,
            max_memory_mib: 0,
            guest_overhead_mib: 64,
            vcpus: 1,
            scratch_bytes: 10 << 30,
            guest_volumes: true,
            image_device: ImageDevice::Block,
            template: TemplateScope::Off,
            boot_timeout: Duration::from_secs(60),
            agent_timeout: Duration::from_secs(60),
            users: UserRange::default(),
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
            serial_console: false,
            seccomp_default: true,
            image_volumes: true,
            apparmor: None,
        }
    }
}
