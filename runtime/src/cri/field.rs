//! Where in CRI's requests the fields are that pods and containers may be refused for.

use hull_spec::field::{CapabilityList, DeviceField, Field, Limit, MountField};

/// The path of a field, in the message that it comes in.
pub(crate) fn path(field: Field) -> String {
    let path = match field {
        Field::PodName | Field::ContainerName => "config.metadata.name",
        Field::PodNamespace => "config.metadata.namespace",
        Field::PodUid => "config.metadata.uid",
        Field::PodMetadata => "config.metadata",
        Field::PodAnnotations => "config.annotations",
        Field::Hostname => "config.hostname",
        Field::CgroupParent => "config.linux.cgroup_parent",
        Field::Sysctls => "config.linux.sysctls",
        Field::Image => "config.image.image",
        Field::Env => "config.envs",
        Field::Command => "config.command",
        Field::StopSignal => "config.stop_signal",
        Field::StdinOnce => "config.stdin_once",
        Field::Mounts => "config.mounts",
        Field::Mount(index, field) => return format!("config.mounts[{index}].{}", of_mount(field)),
        Field::Device(index, field) => {
            return format!("config.devices[{index}].{}", of_device(field));
        }
        Field::CdiDevices => "config.CDI_devices",
        Field::Limit(limit) => return format!("config.linux.resources.{}", of_limit(limit)),
        Field::NewLimit(limit) => return format!("linux.{}", of_limit(limit)),
        Field::PodLimit(limit) => return format!("resources.{}", of_limit(limit)),
        Field::PodOverhead(limit) => return format!("overhead.{}", of_limit(limit)),
        Field::ExecCommand => "cmd",
        Field::Streams => "stdin, stdout, stderr",
        Field::Stderr => "stderr",
        Field::Tty => "tty",
        field => return format!("config.linux.security_context.{}", of_context(field)),
    };
    path.to_owned()
}

/// Fields of a security context, of a sandbox's or container's.
fn of_context(field: Field) -> &'static str {
    match field {
        Field::NetworkNamespace => "namespace_options.network",
        Field::IpcNamespace => "namespace_options.ipc",
        Field::PidNamespace => "namespace_options.pid",
        Field::TargetContainer => "namespace_options.target_id",
        Field::UserNamespace => "namespace_options.userns_options",
        Field::AppArmor => "apparmor",
        Field::SeccompProfile => "seccomp.localhost_ref",
        Field::Capabilities(CapabilityList::Add) => "capabilities.add_capabilities",
        Field::Capabilities(CapabilityList::Drop) => "capabilities.drop_capabilities",
        Field::Capabilities(CapabilityList::AddAmbient) => "capabilities.add_ambient_capabilities",
        Field::RunAsUsername => "run_as_username",
        Field::RunAsGroup => "run_as_group",
        _ => "privileged",
    }
}

fn of_mount(field: MountField) -> &'static str {
    match field {
        MountField::ContainerPath => "container_path",
        MountField::HostPath => "host_path",
        MountField::ImageSubPath => "image_sub_path",
        MountField::Readonly => "readonly",
        MountField::RecursiveReadonly => "recursive_read_only",
        MountField::Propagation => "propagation",
        MountField::Owners => "uidMappings",
    }
}

fn of_device(field: DeviceField) -> &'static str {
    match field {
        DeviceField::ContainerPath => "container_path",
        DeviceField::HostPath => "host_path",
        DeviceField::Permissions => "permissions",
    }
}

fn of_limit(limit: Limit) -> &'static str {
    match limit {
        Limit::CpuPeriod => "cpu_period",
        Limit::CpuQuota => "cpu_quota",
        Limit::CpuShares => "cpu_shares",
        Limit::CpusetCpus => "cpuset_cpus",
        Limit::CpusetMems => "cpuset_mems",
        Limit::Memory => "memory_limit_in_bytes",
        Limit::MemorySwap => "memory_swap_limit_in_bytes",
        Limit::OomScoreAdj => "oom_score_adj",
        Limit::Hugepages => "hugepage_limits",
        Limit::Unified => "unified",
    }
}
