//! What callers ask for. Part of the records on disk, so every change of a field that is not an
//! addition with a default needs a new record version.

use std::{
    collections::BTreeMap,
    path::{Component, PathBuf},
};

use oci_spec::runtime::PosixRlimitType;
use serde::{Deserialize, Serialize};

use crate::{path::clean, signal::Signal};

/// Longest host name that is made of a pod's name, as kubelet cuts it.
const LABEL_MAX: usize = 63;
/// Directories of kubelet's plugins, in a pod's directory, for volumes that it replaces as a whole.
const PLUGINS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// Names in /dev of file systems that have no devices.
const NO_DEVICES: [&str; 4] = ["hugepages", "mqueue", "pts", "shm"];

/// A pod sandbox.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxSpec {
    /// Its name; `name`, `uid` and `namespace` must not be empty.
    pub metadata: SandboxMetadata,
    /// Host name of the guest; empty: the metadata's name.
    pub hostname: String,
    /// Directory of the containers' log files; empty: no log files.
    pub log_directory: PathBuf,
    /// Resolver settings; none: what CNI returned, else the host's.
    pub dns: Option<Dns>,
    /// Ports of the host that lead to the pod.
    pub port_mappings: Vec<PortMapping>,
    /// Returned unchanged.
    pub labels: BTreeMap<String, String>,
    /// Returned unchanged.
    pub annotations: BTreeMap<String, String>,
    /// The pod's cgroup on the host; may be empty.
    pub cgroup_parent: String,
    /// Sysctls of the guest.
    pub sysctls: BTreeMap<String, String>,
    /// Sum of the containers' resources; sizes the VM.
    pub resources: Option<Resources>,
    /// What the pod may use on top of `resources`; sizes the VM.
    pub overhead: Option<Resources>,
    /// Namespaces; `Node` is refused for network and ipc.
    pub namespaces: Namespaces,
    /// Security settings of the sandbox.
    pub security: SandboxSecurity,
    /// The handler that was asked for; empty for the default one. Chosen before it comes here.
    pub runtime_handler: String,
}

impl SandboxSpec {
    /// The guest's host name: the one asked for, else the beginning of the pod's name.
    #[must_use]
    pub fn guest_hostname(&self) -> &str {
        if !self.hostname.is_empty() {
            return &self.hostname;
        }
        let name = &self.metadata.name;
        let label = name.get(..name.floor_char_boundary(LABEL_MAX));
        let label = label.unwrap_or_default();
        label.trim_end_matches(['-', '.'])
    }
}

/// The name of a sandbox. The four together are unique on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SandboxMetadata {
    /// Name of the pod.
    pub name: String,
    /// Uid of the pod.
    pub uid: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Counts sandboxes of the same pod.
    pub attempt: u32,
}

/// Resolver settings (resolv.conf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// A port of the host that leads to the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Port in the pod.
    pub container_port: u16,
    /// Port of the host; 0: none, the mapping has no effect.
    pub host_port: u16,
    /// Address of the host; empty: all.
    pub host_ip: String,
}

/// Whose namespace is used.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamespaceMode {
    /// The pod's.
    #[default]
    Pod,
    /// One of its own.
    Container,
    /// The node's; for pid, that is the guest's root namespace.
    Node,
    /// That of the container with this id.
    Target(String),
}

/// Namespaces of a sandbox or container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespaces {
    /// Network: `Pod` only.
    pub network: NamespaceMode,
    /// Process ids.
    pub pid: NamespaceMode,
    /// SysV IPC and POSIX message queues: `Pod` only.
    pub ipc: NamespaceMode,
    /// Ids of the pod's own user namespace; none: the guest's.
    pub user_namespace: Option<UserNamespace>,
}

/// A user namespace; ids in it start at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// User ids.
    pub uids: IdRange,
    /// Group ids.
    pub gids: IdRange,
}

/// What the ids from 0 on are outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The id that 0 is.
    pub host: u32,
    /// How many there are.
    pub length: u32,
}

/// Security settings of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxSecurity {
    /// A container of the pod may be privileged.
    pub privileged: bool,
    /// AppArmor profile; has no effect, because a sandbox has no process of its own.
    pub apparmor: AppArmor,
    /// Seccomp profile; has no effect, for the same reason.
    pub seccomp: Seccomp,
}

/// An AppArmor profile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AppArmor {
    /// None was named, or the runtime's default.
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A profile that is loaded on the node, by its name.
    Localhost(String),
}

/// A seccomp profile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// None was named: what the node is configured for.
    #[default]
    Unset,
    /// The runtime's default.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// The profile in this file of the node, in the OCI (or Docker) JSON form.
    Localhost(PathBuf),
}

/// A container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    /// Its name; unique in its sandbox.
    pub metadata: ContainerMetadata,
    /// The image.
    pub image: ImageRequest,
    /// Replaces the image's entrypoint when not empty.
    pub command: Vec<String>,
    /// Replaces the image's command when not empty, or when `command` is not.
    pub args: Vec<String>,
    /// Replaces the image's working directory when not empty.
    pub working_dir: String,
    /// Added to the image's environment; a later name replaces an earlier one.
    pub env: Vec<(String, String)>,
    /// Mounts.
    pub mounts: Vec<MountSpec>,
    /// Devices: block devices of the host, and nodes that the guest has of its own.
    pub devices: Vec<DeviceSpec>,
    /// CDI devices by name; refused, because they are devices of the host.
    pub cdi_devices: Vec<String>,
    /// Returned unchanged.
    pub labels: BTreeMap<String, String>,
    /// Returned unchanged.
    pub annotations: BTreeMap<String, String>,
    /// Log file, relative to the sandbox's log directory; empty: none.
    pub log_path: PathBuf,
    /// Keep standard input open.
    pub stdin: bool,
    /// Close standard input after the first attach.
    pub stdin_once: bool,
    /// Give it a terminal.
    pub tty: bool,
    /// Limits.
    pub resources: Option<Resources>,
    /// Security settings.
    pub security: ContainerSecurity,
    /// The signal that asks it to end; none: the image's, else SIGTERM. On disk its name, or empty.
    #[serde(with = "crate::signal::optional_name")]
    pub stop_signal: Option<Signal>,
    /// What plugins of the node want besides.
    pub adjusted: Adjusted,
}

/// What plugins of the node want of a container, and a request can't say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Adjusted {
    /// Variables that it does not have, whoever sets them.
    pub unset_env: Vec<String>,
    /// Resource limits of its first process.
    pub rlimits: Vec<Rlimit>,
    /// Annotations that clients are not told of.
    pub annotations: BTreeMap<String, String>,
}

/// A resource limit of a process (getrlimit(2)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_NOFILE`.
    pub kind: String,
    /// What counts.
    pub soft: u64,
    /// What the process may raise it to.
    pub hard: u64,
}

impl Rlimit {
    /// Whether there is a limit of this kind.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.kind.parse::<PosixRlimitType>().is_ok()
    }
}

/// The name of a container. The pair is unique in its sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ContainerMetadata {
    /// Name of the container.
    pub name: String,
    /// Counts containers of the same name.
    pub attempt: u32,
}

/// The image of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageRequest {
    /// A name or id that the image store knows.
    pub image: String,
    /// What the user wrote; returned unchanged.
    pub user_specified: String,
    /// Returned unchanged.
    pub annotations: BTreeMap<String, String>,
}

/// A mount of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Where it appears; absolute.
    pub container_path: PathBuf,
    /// What appears there.
    pub source: MountSource,
    /// Refuse writes.
    pub readonly: bool,
    /// Refuse writes below mounts in it too.
    pub recursive_readonly: bool,
    /// Propagation of mounts made later.
    pub propagation: MountPropagation,
    /// SELinux relabelling was asked for; has no effect.
    pub selinux_relabel: bool,
    /// What the mount forbids besides, in the container alone.
    #[serde(default)]
    pub flags: Vec<MountFlag>,
    /// The user namespace whose ids the owners of its files are, as they are on the host; must be
    /// the pod's. None: they are ids outside of it. An image's files are the pod's anyway.
    #[serde(default)]
    pub owners: Option<UserNamespace>,
}

/// What a mount forbids (mount(8), options of all file systems).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountFlag {
    /// Devices are not opened.
    NoDev,
    /// Programs are not run.
    NoExec,
    /// Set-user-ID and set-group-ID bits and capabilities of files have no effect.
    NoSuid,
}

impl MountFlag {
    /// Reads a mount option; none if it is another one.
    #[must_use]
    pub fn of_option(option: &str) -> Option<Self> {
        [Self::NoDev, Self::NoExec, Self::NoSuid]
            .into_iter()
            .find(|flag| flag.option() == option)
    }

    /// The mount option.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::NoDev => "nodev",
            Self::NoExec => "noexec",
            Self::NoSuid => "nosuid",
        }
    }
}

impl MountSpec {
    /// Whether it is a config map, secret, projected or downward-API volume, which kubelet replaces as
    /// a whole, and the guest is to have a copy: nobody may write to it, and nothing that is mounted
    /// later is to appear.
    #[must_use]
    pub fn is_atomic_volume(&self) -> bool {
        let MountSource::Host(path) = &self.source else {
            return false;
        };
        let mut names = path.components().rev().map(Component::as_os_str).skip(1);
        let plugin = names.next().and_then(|name| name.to_str());
        plugin.is_some_and(|plugin| PLUGINS.contains(&plugin))
            && names.next().is_some_and(|name| name == "volumes")
            && self.readonly
            && self.propagation == MountPropagation::Private
    }

    /// What of the node's devices it shows, if it does: /dev, or a path below it but for file systems
    /// that are mounted there. The node's are not lent, and so the guest's path of this name is meant.
    #[must_use]
    pub fn of_devices(&self) -> Option<PathBuf> {
        let MountSource::Host(path) = &self.source else {
            return None;
        };
        let plain = clean(path);
        let below = plain.strip_prefix("/dev").ok()?;
        let no_devices = NO_DEVICES.iter().any(|name| below.starts_with(name));
        (!no_devices).then_some(plain)
    }
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// A file or directory of the host.
    Host(PathBuf),
    /// An image, or a directory in it.
    Image {
        /// The image.
        image: ImageRequest,
        /// Path in it; empty: its root.
        sub_path: String,
    },
}

/// Propagation of mounts made later (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountPropagation {
    /// None.
    #[default]
    Private,
    /// From the host to the container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// A device of the host for a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Path in the container.
    pub container_path: PathBuf,
    /// Path on the host.
    pub host_path: PathBuf,
    /// `r`, `w`, `m`.
    pub permissions: String,
}

/// Security settings of a container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSecurity {
    /// Changes to the default capabilities.
    pub capabilities: Capabilities,
    /// All capabilities, and the guest's devices (never the host's).
    pub privileged: bool,
    /// Namespaces; `Node` is refused for network and ipc.
    pub namespaces: Namespaces,
    /// User id.
    pub run_as_user: Option<u32>,
    /// User name in the image's /etc/passwd; empty: none.
    pub run_as_username: String,
    /// Primary group; refused without a user.
    pub run_as_group: Option<u32>,
    /// Further groups.
    pub supplemental_groups: Vec<u32>,
    /// Whether groups of the image's /etc/group are added.
    pub groups_policy: GroupsPolicy,
    /// Mount the root read-only.
    pub readonly_rootfs: bool,
    /// Set `no_new_privs` (prctl(2)).
    pub no_new_privs: bool,
    /// Paths that are hidden; empty: the defaults, or none in a user namespace.
    pub masked_paths: Vec<String>,
    /// Paths that are read-only; empty: the defaults, or none in a user namespace.
    pub readonly_paths: Vec<String>,
    /// Seccomp profile.
    pub seccomp: Seccomp,
    /// AppArmor profile.
    pub apparmor: AppArmor,
}

/// Whether groups of the image's /etc/group are added to a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupsPolicy {
    /// They are.
    #[default]
    Merge,
    /// They are not.
    Strict,
}

/// Changes to the default capabilities; names with or without `CAP_`, or `ALL`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Added.
    pub add: Vec<String>,
    /// Dropped.
    pub drop: Vec<String>,
    /// Added to the ambient set too.
    pub add_ambient: Vec<String>,
}

/// Limits; 0 means none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Period of the CPU quota, in microseconds.
    pub cpu_period_us: i64,
    /// CPU time per period, in microseconds.
    pub cpu_quota_us: i64,
    /// Relative weight of CPU time (cgroup v1 scale, 1024 is one CPU).
    pub cpu_shares: i64,
    /// CPUs, `0-3,5`; empty: all.
    pub cpuset_cpus: String,
    /// Memory nodes; empty: all.
    pub cpuset_mems: String,
    /// Memory in bytes.
    pub memory_limit_bytes: i64,
    /// Memory and swap together, in bytes; -1: no limit.
    pub memory_swap_limit_bytes: i64,
    /// Processes and threads.
    pub pids_limit: i64,
    /// Adjustment of the OOM killer's score, -1000 to 1000.
    pub oom_score_adj: i64,
    /// Huge pages by size.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Files of cgroup v2 and their values.
    pub unified: BTreeMap<String, String>,
}

/// A limit of huge pages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugepageLimit {
    /// `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes.
    pub limit_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(path: &str) -> MountSpec {
        MountSpec {
            container_path: "/x".into(),
            source: MountSource::Host(path.into()),
            readonly: true,
            recursive_readonly: false,
            propagation: MountPropagation::Private,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        }
    }

    #[test]
    fn devices_of_the_node_are_known() {
        for (path, device) in [
            ("/dev", "/dev"),
            ("/dev/", "/dev"),
            ("/var/../dev/./net/tun", "/dev/net/tun"),
            ("/../dev/shmem", "/dev/shmem"),
        ] {
            assert_eq!(mount(path).of_devices(), Some(device.into()), "{path}");
        }
        for other in [
            "/",
            "/device",
            "/dev/shm",
            "/dev/shm/x",
            "/dev/..",
            "/x/dev",
        ] {
            assert_eq!(mount(other).of_devices(), None, "{other}");
        }
    }

    #[test]
    fn volumes_that_kubelet_replaces_are_known() {
        let pod = "/var/lib/kubelet/pods/1";
        for plugin in PLUGINS {
            assert!(mount(&format!("{pod}/volumes/{plugin}/v")).is_atomic_volume());
        }
        for other in [
            "volumes/kubernetes.io~empty-dir/v",
            "volumes/kubernetes.io~secret",
            "volumes/kubernetes.io~secret/v/key",
            "volumes/v/kubernetes.io~secret",
            "kubernetes.io~secret/v",
            "volume-subpaths/v/main/0",
            "etc-hosts",
        ] {
            assert!(
                !mount(&format!("{pod}/{other}")).is_atomic_volume(),
                "{other}"
            );
        }
        let live = mount(&format!("{pod}/volumes/kubernetes.io~secret/v"));
        let writable = MountSpec {
            readonly: false,
            ..live.clone()
        };
        let propagated = MountSpec {
            propagation: MountPropagation::HostToContainer,
            ..live
        };
        assert!(!writable.is_atomic_volume() && !propagated.is_atomic_volume());
    }
}
