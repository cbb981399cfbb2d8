//! Pods and containers as plugins are told of them.

use std::collections::{BTreeMap, HashMap};

use hull_image::ImageId;
use hull_proto_nri::{
    Container, ContainerState as State, HugepageLimit, Image, LinuxCPU, LinuxContainer,
    LinuxMemory, LinuxNamespace, LinuxPids, LinuxPodSandbox, LinuxResources, Mount, OptionalInt,
    OptionalInt64, OptionalUInt64, POSIXRlimit, PodSandbox, User,
};
use hull_spec::{
    id::ContainerId,
    info::{ContainerInfo, ContainerState, SandboxInfo},
    spec::{ContainerSpec, MountPropagation, MountSource, MountSpec, Resources},
};
use protobuf::{EnumOrUnknown, MessageField};

/// A pod as plugins are told of it.
pub type Pod = PodSandbox;
/// A container as plugins are told of it.
pub type Told = Container;

/// What a container runs, with what its image says.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// All words of it.
    pub args: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
}

/// A pod.
#[must_use]
pub fn pod(info: &SandboxInfo) -> Pod {
    let spec = &info.spec;
    let vm = info.vm.as_ref();
    let network = vm.map(|vm| LinuxNamespace {
        type_: "network".into(),
        path: vm.netns.to_string_lossy().into_owned(),
        ..LinuxNamespace::default()
    });
    let cgroup = vm.and_then(|vm| vm.cgroup.as_ref());
    let linux = LinuxPodSandbox {
        pod_overhead: spec.overhead.as_ref().map(resources).into(),
        pod_resources: spec.resources.as_ref().map(resources).into(),
        cgroup_parent: spec.cgroup_parent.clone(),
        cgroups_path: cgroup.map_or_else(String::new, |path| path.to_string_lossy().into_owned()),
        namespaces: network.into_iter().collect(),
        ..LinuxPodSandbox::default()
    };
    PodSandbox {
        id: info.id.to_string(),
        name: spec.metadata.name.clone(),
        uid: spec.metadata.uid.clone(),
        namespace: spec.metadata.namespace.clone(),
        labels: map(&spec.labels),
        annotations: map(&spec.annotations),
        runtime_handler: spec.runtime_handler.clone(),
        linux: Some(linux).into(),
        pid: vm.map_or(0, |vm| vm.pid),
        ips: info.ips.iter().map(ToString::to_string).collect(),
        ..PodSandbox::default()
    }
}

/// A container that is to be created.
#[must_use]
pub fn draft(id: &ContainerId, pod: &SandboxInfo, spec: &ContainerSpec, command: Command) -> Told {
    let rlimits = spec.adjusted.rlimits.iter();
    let mut annotations = map(&spec.annotations);
    annotations.extend(spec.adjusted.annotations.clone());
    let limits = spec.resources.clone().unwrap_or_default();
    let oom = OptionalInt {
        value: limits.oom_score_adj,
        ..OptionalInt::default()
    };
    let linux = LinuxContainer {
        resources: Some(resources(&limits)).into(),
        oom_score_adj: Some(oom).into(),
        ..LinuxContainer::default()
    };
    let image = &spec.image;
    let name = [&image.user_specified, &image.image];
    let name = name.into_iter().find(|name| !name.is_empty());
    Container {
        id: id.to_string(),
        pod_sandbox_id: pod.id.to_string(),
        name: spec.metadata.name.clone(),
        state: EnumOrUnknown::new(State::CONTAINER_CREATED),
        labels: map(&spec.labels),
        annotations,
        args: command.args,
        env: command.env,
        mounts: spec.mounts.iter().map(mount).collect(),
        linux: Some(linux).into(),
        rlimits: rlimits
            .map(|limit| POSIXRlimit {
                type_: limit.kind.clone(),
                hard: limit.hard,
                soft: limit.soft,
                ..POSIXRlimit::default()
            })
            .collect(),
        image: Some(Image {
            name: name.cloned().unwrap_or_default(),
            ..Image::default()
        })
        .into(),
        user: spec
            .security
            .run_as_user
            .map(|uid| User {
                uid,
                gid: spec.security.run_as_group.unwrap_or_default(),
                additional_gids: spec.security.supplemental_groups.clone(),
                ..User::default()
            })
            .into(),
        ..Container::default()
    }
}

/// A container that there is.
#[must_use]
pub fn container(info: &ContainerInfo, pod: &SandboxInfo, command: Command) -> Told {
    let mut told = draft(&info.id, pod, &info.spec, command);
    told.state = EnumOrUnknown::new(match info.state {
        ContainerState::Created => State::CONTAINER_CREATED,
        ContainerState::Running => State::CONTAINER_RUNNING,
        ContainerState::Exited => State::CONTAINER_STOPPED,
        ContainerState::Unknown => State::CONTAINER_UNKNOWN,
    });
    told.created_at = info.created_at_ns;
    told.started_at = info.started_at_ns;
    told.finished_at = info.finished_at_ns;
    told.exit_code = info.exit_code;
    told.status_reason.clone_from(&info.reason);
    told.status_message.clone_from(&info.message);
    if let Some(user) = &info.user {
        let user = User {
            uid: user.uid,
            gid: user.gid,
            additional_gids: user.groups.clone(),
            ..User::default()
        };
        told.user = Some(user).into();
    }
    if let (Some(limits), Some(linux)) = (&info.resources, told.linux.as_mut()) {
        linux.resources = Some(resources(limits)).into();
    }
    image(&mut told, &info.image_id, &info.image_ref);
    told
}

/// Tells which image it is.
pub fn image(told: &mut Told, id: &ImageId, reference: &str) {
    let image = told.image.mut_or_insert_default();
    let digest = reference.split_once('@').map(|(_, digest)| digest);
    image.digest = digest.unwrap_or_default().to_owned();
    image.config_digest = id.to_string();
}

/// Limits; what has none is left out.
pub(crate) fn resources(limits: &Resources) -> LinuxResources {
    let signed = |value: i64| {
        let value = (value != 0).then(|| OptionalInt64 {
            value,
            ..OptionalInt64::default()
        });
        MessageField::from(value)
    };
    let unsigned = |value: i64| {
        let value = u64::try_from(value).ok().filter(|value| *value != 0);
        MessageField::from(value.map(|value| OptionalUInt64 {
            value,
            ..OptionalUInt64::default()
        }))
    };
    let hugepages = limits.hugepage_limits.iter();
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(limits.memory_limit_bytes),
            swap: signed(limits.memory_swap_limit_bytes),
            ..LinuxMemory::default()
        })
        .into(),
        cpu: Some(LinuxCPU {
            shares: unsigned(limits.cpu_shares),
            quota: signed(limits.cpu_quota_us),
            period: unsigned(limits.cpu_period_us),
            cpus: limits.cpuset_cpus.clone(),
            mems: limits.cpuset_mems.clone(),
            ..LinuxCPU::default()
        })
        .into(),
        hugepage_limits: hugepages
            .map(|limit| HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit_bytes,
                ..HugepageLimit::default()
            })
            .collect(),
        unified: map(&limits.unified),
        pids: (limits.pids_limit != 0)
            .then(|| LinuxPids {
                limit: limits.pids_limit,
                ..LinuxPids::default()
            })
            .into(),
        ..LinuxResources::default()
    }
}

fn mount(mount: &MountSpec) -> Mount {
    let (kind, source) = match &mount.source {
        MountSource::Host(path) => ("bind", path.to_string_lossy().into_owned()),
        MountSource::Image { image, .. } => ("image", image.image.clone()),
    };
    let propagation = match mount.propagation {
        MountPropagation::Private => "rprivate",
        MountPropagation::HostToContainer => "rslave",
        MountPropagation::Bidirectional => "rshared",
    };
    let access = if mount.readonly { "ro" } else { "rw" };
    Mount {
        destination: mount.container_path.to_string_lossy().into_owned(),
        type_: kind.into(),
        source,
        options: ["rbind", propagation, access].map(String::from).into(),
        ..Mount::default()
    }
}

fn map(of: &BTreeMap<String, String>) -> HashMap<String, String> {
    of.clone().into_iter().collect()
}
