//! What of a request can be refused. Callers have paths of their own for these fields.

use std::fmt;

/// A field of a specification or call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// The name of a pod.
    PodName,
    /// The namespace of a pod.
    PodNamespace,
    /// The uid of a pod.
    PodUid,
    /// Name, namespace and uid of a pod together.
    PodMetadata,
    /// A pod's annotations.
    PodAnnotations,
    /// A pod's host name.
    Hostname,
    /// The parent of a pod's cgroup.
    CgroupParent,
    /// A pod's sysctls.
    Sysctls,
    /// The name of a container.
    ContainerName,
    /// The image of a container.
    Image,
    /// A container's environment.
    Env,
    /// A container's command.
    Command,
    /// The signal that asks a container to end.
    StopSignal,
    /// Whether standard input is closed after the first attach.
    StdinOnce,
    /// A container's mounts together.
    Mounts,
    /// A part of the mount with this index.
    Mount(usize, MountField),
    /// A part of the device with this index.
    Device(usize, DeviceField),
    /// A container's CDI devices.
    CdiDevices,
    /// A limit of a container that is created.
    Limit(Limit),
    /// A limit of a container's update.
    NewLimit(Limit),
    /// A limit of a pod's update: the sum of its containers' limits.
    PodLimit(Limit),
    /// A limit of a pod's update: what comes on top.
    PodOverhead(Limit),
    /// The mode of the network namespace.
    NetworkNamespace,
    /// The mode of the IPC namespace.
    IpcNamespace,
    /// The mode of the process id namespace.
    PidNamespace,
    /// The container whose process ids are shared.
    TargetContainer,
    /// The user namespace.
    UserNamespace,
    /// The AppArmor profile.
    AppArmor,
    /// The file of a seccomp profile.
    SeccompProfile,
    /// Names of capabilities.
    Capabilities(CapabilityList),
    /// The name of the user.
    RunAsUsername,
    /// The primary group.
    RunAsGroup,
    /// Whether a container is privileged.
    Privileged,
    /// The command of an exec.
    ExecCommand,
    /// Whether standard input, output or error output are wanted by a session.
    Streams,
    /// Whether error output is wanted by a session.
    Stderr,
    /// Whether a session has a terminal.
    Tty,
}

/// A part of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountField {
    /// Where it appears.
    ContainerPath,
    /// The path on the host.
    HostPath,
    /// The path in the image.
    ImageSubPath,
    /// Whether writes are refused.
    Readonly,
    /// Whether writes are refused below it too.
    RecursiveReadonly,
    /// Propagation of mounts made later.
    Propagation,
    /// Whose its files are.
    Owners,
}

/// A part of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceField {
    /// Where it appears.
    ContainerPath,
    /// The path on the host.
    HostPath,
    /// What may be done with it.
    Permissions,
}

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The period of the CPU quota.
    CpuPeriod,
    /// CPU time per period.
    CpuQuota,
    /// Relative weight of CPU time.
    CpuShares,
    /// CPUs.
    CpusetCpus,
    /// Memory nodes.
    CpusetMems,
    /// Memory.
    Memory,
    /// Memory and swap together.
    MemorySwap,
    /// Adjustment of the OOM killer's score.
    OomScoreAdj,
    /// Huge pages.
    Hugepages,
    /// Files of cgroup v2.
    Unified,
}

/// A list of capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapabilityList {
    /// Those that are added.
    Add,
    /// Those that are dropped.
    Drop,
    /// Those that are added to the ambient set too.
    AddAmbient,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PodName => "pod name",
            Self::PodNamespace => "pod namespace",
            Self::PodUid => "pod uid",
            Self::PodMetadata => "pod metadata",
            Self::PodAnnotations => "annotations",
            Self::Hostname => "host name",
            Self::CgroupParent => "cgroup parent",
            Self::Sysctls => "sysctls",
            Self::ContainerName => "container name",
            Self::Image => "image",
            Self::Env => "environment",
            Self::Command | Self::ExecCommand => "command",
            Self::StopSignal => "stop signal",
            Self::StdinOnce => "stdin once",
            Self::Mounts => "mounts",
            Self::Mount(index, field) => return write!(f, "mount {index}: {field}"),
            Self::Device(index, field) => return write!(f, "device {index}: {field}"),
            Self::CdiDevices => "CDI devices",
            Self::Limit(limit) | Self::NewLimit(limit) => return limit.fmt(f),
            Self::PodLimit(limit) => return write!(f, "{limit} of the pod"),
            Self::PodOverhead(limit) => return write!(f, "{limit} of the overhead"),
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "IPC namespace",
            Self::PidNamespace => "pid namespace",
            Self::TargetContainer => "target of the pid namespace",
            Self::UserNamespace => "user namespace",
            Self::AppArmor => "AppArmor profile",
            Self::SeccompProfile => "seccomp profile",
            Self::Capabilities(CapabilityList::Add) => "added capabilities",
            Self::Capabilities(CapabilityList::Drop) => "dropped capabilities",
            Self::Capabilities(CapabilityList::AddAmbient) => "ambient capabilities",
            Self::RunAsUsername => "user name",
            Self::RunAsGroup => "group",
            Self::Privileged => "privileged",
            Self::Streams => "streams",
            Self::Stderr => "error output",
            Self::Tty => "terminal",
        })
    }
}

impl fmt::Display for MountField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ContainerPath => "path in the container",
            Self::HostPath => "path on the host",
            Self::ImageSubPath => "path in the image",
            Self::Readonly => "read-only",
            Self::RecursiveReadonly => "recursively read-only",
            Self::Propagation => "propagation",
            Self::Owners => "id mappings",
        })
    }
}

impl fmt::Display for DeviceField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ContainerPath => "path in the container",
            Self::HostPath => "path on the host",
            Self::Permissions => "permissions",
        })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuPeriod => "CPU period",
            Self::CpuQuota => "CPU quota",
            Self::CpuShares => "CPU shares",
            Self::CpusetCpus => "CPU set",
            Self::CpusetMems => "memory nodes",
            Self::Memory => "memory limit",
            Self::MemorySwap => "limit of memory and swap",
            Self::OomScoreAdj => "OOM score adjustment",
            Self::Hugepages => "limits of huge pages",
            Self::Unified => "limits of cgroup v2",
        })
    }
}
