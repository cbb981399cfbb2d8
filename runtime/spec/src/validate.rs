//! Refuses what is wrong in itself, or what a VM or this version can't do, before anything is
//! made. Every refusal names the field.

use std::path::{Component, Path};

use hull_proto_vmm::fs::MAX_SHARES;

use crate::{
    error::PodError,
    field::{DeviceField, Field, MountField},
    resources,
    spec::{
        AppArmor, ContainerSpec, DeviceSpec, MountPropagation, MountSource, MountSpec,
        NamespaceMode, Namespaces, SandboxSpec,
    },
};

/// Longest host name (gethostname(2): HOST_NAME_MAX).
const HOSTNAME_MAX: usize = 64;

/// Checks a sandbox.
pub fn sandbox(spec: &SandboxSpec) -> Result<(), PodError> {
    let metadata = &spec.metadata;
    for (field, value) in [
        (Field::PodName, &metadata.name),
        (Field::PodNamespace, &metadata.namespace),
        (Field::PodUid, &metadata.uid),
    ] {
        if value.is_empty() {
            return Err(PodError::invalid(field, "it is missing"));
        }
    }
    if spec.hostname.len() > HOSTNAME_MAX {
        return Err(PodError::invalid(
            Field::Hostname,
            format!("it is longer than {HOSTNAME_MAX} bytes"),
        ));
    }
    if spec
        .hostname
        .contains(|c: char| c.is_whitespace() || c == '/')
    {
        return Err(PodError::invalid(Field::Hostname, "it is no host name"));
    }
    namespaces(&spec.namespaces)?;
    if matches!(spec.namespaces.pid, NamespaceMode::Target(_)) {
        return Err(PodError::invalid(
            Field::PidNamespace,
            "TARGET is for containers",
        ));
    }
    if spec.namespaces.user_namespace.is_some() && spec.namespaces.pid == NamespaceMode::Node {
        return Err(PodError::invalid(
            Field::PidNamespace,
            "NODE is not possible in a user namespace",
        ));
    }
    for (name, value) in &spec.sysctls {
        sysctl(name, value)?;
    }
    Ok(())
}

/// The form of a sysctl; whether the guest has it shows when it is set.
fn sysctl(name: &str, value: &str) -> Result<(), PodError> {
    let refused = |reason: &str| {
        Err(PodError::invalid(
            Field::Sysctls,
            format!("{name:?}: {reason}"),
        ))
    };
    let parts: Vec<&str> = name.split(['.', '/']).collect();
    if parts.len() < 2 || parts.iter().any(|part| part.is_empty()) || name.contains("..") {
        return refused("it is no name of a sysctl");
    }
    if value.contains(['\0', '\n']) {
        return refused("its value has a line break or zero byte");
    }
    Ok(())
}

/// Checks a container.
pub fn container(spec: &ContainerSpec, sandbox: &SandboxSpec) -> Result<(), PodError> {
    if spec.metadata.name.is_empty() {
        return Err(PodError::invalid(Field::ContainerName, "it is missing"));
    }
    if spec.image.image.is_empty() {
        return Err(PodError::invalid(Field::Image, "it is missing"));
    }
    for (name, value) in &spec.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(PodError::invalid(
                Field::Env,
                format!("{name:?} is no variable"),
            ));
        }
    }
    for word in spec.command.iter().chain(&spec.args) {
        if word.contains('\0') {
            return Err(PodError::invalid(Field::Command, "a word has a NUL byte"));
        }
    }
    if spec.stdin_once && !spec.stdin {
        return Err(PodError::invalid(Field::StdinOnce, "it needs stdin"));
    }
    if spec.mounts.len() > MAX_SHARES {
        return Err(PodError::invalid(
            Field::Mounts,
            format!("there are more than {MAX_SHARES}"),
        ));
    }
    for (index, mount) in spec.mounts.iter().enumerate() {
        self::mount(index, mount)?;
        if mount.owners.is_some() && mount.owners != sandbox.namespaces.user_namespace {
            return Err(PodError::invalid(
                Field::Mount(index, MountField::Owners),
                "they and gidMappings are not those of the sandbox's user namespace",
            ));
        }
        devices_mount(index, mount, spec, sandbox)?;
    }
    for (index, device) in spec.devices.iter().enumerate() {
        self::device(index, device, sandbox)?;
    }
    if let Some(device) = spec.cdi_devices.first() {
        return Err(PodError::unimplemented(
            Field::CdiDevices,
            format!("{device} is a device of the host, which a VM can't be given"),
        ));
    }
    if let Some(limits) = &spec.resources {
        resources::check(limits, Field::Limit)?;
    }
    let security = &spec.security;
    namespaces(&security.namespaces)?;
    let own = security.namespaces.user_namespace;
    if own.is_some() && own != sandbox.namespaces.user_namespace {
        return Err(PodError::invalid(
            Field::UserNamespace,
            "it is not that of the sandbox",
        ));
    }
    if sandbox.namespaces.user_namespace.is_some() && security.namespaces.pid == NamespaceMode::Node
    {
        return Err(PodError::invalid(
            Field::PidNamespace,
            "NODE is not possible in a user namespace",
        ));
    }
    apparmor(&security.apparmor)?;
    let has_user = security.run_as_user.is_some() || !security.run_as_username.is_empty();
    if security.run_as_group.is_some() && !has_user {
        return Err(PodError::invalid(
            Field::RunAsGroup,
            "it needs run_as_user or run_as_username",
        ));
    }
    if security.run_as_user.is_some() && !security.run_as_username.is_empty() {
        return Err(PodError::invalid(
            Field::RunAsUsername,
            "run_as_user is given too",
        ));
    }
    if security.privileged && !sandbox.security.privileged {
        return Err(PodError::invalid(
            Field::Privileged,
            "the sandbox is not privileged",
        ));
    }
    Ok(())
}

fn mount(index: usize, mount: &MountSpec) -> Result<(), PodError> {
    let field = |field| Field::Mount(index, field);
    let at = mount.container_path.display();
    if !mount.container_path.is_absolute() {
        return Err(PodError::invalid(
            field(MountField::ContainerPath),
            format!("{at} is not absolute"),
        ));
    }
    match &mount.source {
        MountSource::Host(path) => host_mount(index, path, mount),
        MountSource::Image { sub_path, .. } => {
            if !mount.readonly {
                return Err(PodError::invalid(
                    field(MountField::Readonly),
                    "an image can be mounted read-only only",
                ));
            }
            let inside = Path::new(sub_path)
                .components()
                .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
            if !inside {
                return Err(PodError::invalid(
                    field(MountField::ImageSubPath),
                    format!("{sub_path:?} is no path in an image"),
                ));
            }
            Ok(())
        }
    }
}

fn device(index: usize, device: &DeviceSpec, sandbox: &SandboxSpec) -> Result<(), PodError> {
    let refused = |field: DeviceField, reason: String| {
        Err(PodError::invalid(Field::Device(index, field), reason))
    };
    let path = &device.container_path;
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.starts_with("/dev") || path == Path::new("/dev") || !plain {
        return refused(
            DeviceField::ContainerPath,
            format!("{} is not below /dev", path.display()),
        );
    }
    if !device.host_path.is_absolute() {
        return refused(
            DeviceField::HostPath,
            format!("{} is not absolute", device.host_path.display()),
        );
    }
    let access = &device.permissions;
    if access.is_empty() || access.chars().any(|c| !"rwm".contains(c)) {
        return refused(
            DeviceField::Permissions,
            format!("{access:?} is not of r, w and m"),
        );
    }
    if sandbox.namespaces.user_namespace.is_some() {
        return refused(
            DeviceField::HostPath,
            "devices can't be used in a user namespace".to_owned(),
        );
    }
    Ok(())
}

fn host_mount(index: usize, path: &Path, mount: &MountSpec) -> Result<(), PodError> {
    let field = |field| Field::Mount(index, field);
    if !path.is_absolute() {
        return Err(PodError::invalid(
            field(MountField::HostPath),
            format!("{} is not absolute", path.display()),
        ));
    }
    if mount.propagation == MountPropagation::Bidirectional {
        return Err(PodError::invalid(
            field(MountField::Propagation),
            "BIDIRECTIONAL is not possible: what is mounted in the container is mounted in the \
             kernel of its VM, and can't appear on the host",
        ));
    }
    let private = mount.propagation == MountPropagation::Private;
    if mount.recursive_readonly && !(mount.readonly && private) {
        return Err(PodError::invalid(
            field(MountField::RecursiveReadonly),
            "it needs readonly and private propagation",
        ));
    }
    Ok(())
}

/// A volume of the node's devices shows the guest's.
fn devices_mount(
    index: usize,
    mount: &MountSpec,
    spec: &ContainerSpec,
    sandbox: &SandboxSpec,
) -> Result<(), PodError> {
    let Some(path) = mount.of_devices() else {
        return Ok(());
    };
    let refused = |field, reason: &str| {
        let reason = format!("{}: {reason}", path.display());
        Err(PodError::invalid(Field::Mount(index, field), reason))
    };
    if sandbox.namespaces.user_namespace.is_some() {
        return refused(
            MountField::HostPath,
            "devices can't be used in a user namespace",
        );
    }
    let in_place = mount
        .container_path
        .components()
        .eq(Path::new("/dev").components());
    if in_place && !spec.security.privileged {
        return refused(
            MountField::ContainerPath,
            "only a privileged container can have it in the place of its own /dev",
        );
    }
    Ok(())
}

fn namespaces(asked: &Namespaces) -> Result<(), PodError> {
    for (field, mode) in [
        (Field::NetworkNamespace, &asked.network),
        (Field::IpcNamespace, &asked.ipc),
    ] {
        match mode {
            // A container's own is what POD is to a pod of one: nobody asks for it.
            NamespaceMode::Pod | NamespaceMode::Container => {}
            NamespaceMode::Node => {
                return Err(PodError::invalid(
                    field,
                    "NODE is not possible: the pod is a VM with a kernel of its own",
                ));
            }
            NamespaceMode::Target(_) => {
                return Err(PodError::invalid(field, "TARGET is for pid only"));
            }
        }
    }
    Ok(())
}

fn apparmor(profile: &AppArmor) -> Result<(), PodError> {
    match profile {
        AppArmor::RuntimeDefault | AppArmor::Unconfined => Ok(()),
        AppArmor::Localhost(name) if name.is_empty() || name.contains(char::is_control) => Err(
            PodError::invalid(Field::AppArmor, format!("{name:?} is no name of a profile")),
        ),
        AppArmor::Localhost(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::ErrorKind,
        spec::{
            ContainerSecurity, IdRange, ImageRequest, SandboxMetadata, SandboxSecurity,
            UserNamespace,
        },
    };

    fn good_sandbox() -> SandboxSpec {
        SandboxSpec {
            metadata: SandboxMetadata {
                name: "n".into(),
                uid: "u".into(),
                namespace: "ns".into(),
                attempt: 0,
            },
            ..SandboxSpec::default()
        }
    }

    fn good_container() -> ContainerSpec {
        ContainerSpec {
            metadata: crate::spec::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            },
            image: ImageRequest {
                image: "i".into(),
                ..ImageRequest::default()
            },
            ..ContainerSpec::default()
        }
    }

    fn refusal(result: Result<(), PodError>) -> (ErrorKind, String) {
        let error = result.unwrap_err();
        (error.kind(), error.to_string())
    }

    #[test]
    fn good_ones_pass() {
        sandbox(&good_sandbox()).unwrap();
        container(&good_container(), &good_sandbox()).unwrap();
    }

    #[test]
    fn a_missing_name_is_named() {
        let mut spec = good_sandbox();
        spec.metadata.uid.clear();
        let (kind, text) = refusal(sandbox(&spec));
        assert_eq!(kind, ErrorKind::InvalidArgument);
        assert!(text.starts_with("pod uid: "), "{text}");
    }

    #[test]
    fn namespaces_of_the_node_are_refused_by_field() {
        for field in ["network", "IPC"] {
            let mut spec = good_sandbox();
            match field {
                "network" => spec.namespaces.network = NamespaceMode::Node,
                _ => spec.namespaces.ipc = NamespaceMode::Node,
            }
            let (kind, text) = refusal(sandbox(&spec));
            assert_eq!(kind, ErrorKind::InvalidArgument);
            assert!(text.starts_with(&format!("{field} namespace: ")), "{text}");
        }
        let mut spec = good_sandbox();
        spec.namespaces.pid = NamespaceMode::Node;
        sandbox(&spec).unwrap();
    }

    #[test]
    fn mounts_that_a_vm_cannot_have_are_refused_by_field() {
        let good = MountSpec {
            container_path: "/etc/hosts".into(),
            source: MountSource::Host("/var/lib/kubelet/hosts".into()),
            readonly: true,
            recursive_readonly: true,
            propagation: MountPropagation::Private,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        };
        let check = |mount: MountSpec| {
            let spec = ContainerSpec {
                mounts: vec![good.clone(), mount],
                ..good_container()
            };
            container(&spec, &good_sandbox())
        };
        check(good.clone()).unwrap();
        let both_ways = MountSpec {
            propagation: MountPropagation::Bidirectional,
            recursive_readonly: false,
            ..good.clone()
        };
        let one_way = MountSpec {
            propagation: MountPropagation::HostToContainer,
            ..good.clone()
        };
        let writable = MountSpec {
            readonly: false,
            ..good.clone()
        };
        let relative = MountSpec {
            source: MountSource::Host("x".into()),
            ..good.clone()
        };
        for (mount, field) in [
            (both_ways, MountField::Propagation),
            (one_way, MountField::RecursiveReadonly),
            (writable, MountField::RecursiveReadonly),
            (relative, MountField::HostPath),
        ] {
            let (kind, text) = refusal(check(mount));
            assert_eq!(kind, ErrorKind::InvalidArgument);
            assert!(text.starts_with(&format!("mount 1: {field}: ")), "{text}");
        }
    }

    #[test]
    fn the_guests_devices_are_for_privileged_containers() {
        let check = |at: &str, privileged, user: Option<UserNamespace>| {
            let mut sandbox = good_sandbox();
            sandbox.security.privileged = true;
            sandbox.namespaces.user_namespace = user;
            let mut spec = good_container();
            spec.security.privileged = privileged;
            spec.mounts = vec![MountSpec {
                container_path: at.into(),
                source: MountSource::Host("/dev/".into()),
                readonly: false,
                recursive_readonly: false,
                propagation: MountPropagation::Private,
                selinux_relabel: false,
                flags: Vec::new(),
                owners: None,
            }];
            container(&spec, &sandbox)
        };
        check("/dev", true, None).unwrap();
        check("/host/dev", false, None).unwrap();
        let ids = IdRange { host: 1, length: 9 };
        let user = UserNamespace {
            uids: ids,
            gids: ids,
        };
        for (refused, why) in [
            (
                check("/dev/", false, None),
                "mount 0: path in the container: /dev: only a privileged",
            ),
            (
                check("/host/dev", true, Some(user)),
                "mount 0: path on the host: /dev: devices can't",
            ),
        ] {
            let (kind, text) = refusal(refused);
            assert_eq!(kind, ErrorKind::InvalidArgument);
            assert!(text.starts_with(why), "{text}");
        }
    }

    #[test]
    fn owners_of_a_mount_are_mapped_as_those_of_the_sandbox() {
        let namespace = |host| {
            let ids = IdRange {
                host,
                length: 65_536,
            };
            UserNamespace {
                uids: ids,
                gids: ids,
            }
        };
        let check = |pod: Option<UserNamespace>, owners: Option<UserNamespace>| {
            let mut sandbox = good_sandbox();
            sandbox.namespaces.user_namespace = pod;
            let mount = MountSpec {
                container_path: "/m".into(),
                source: MountSource::Host("/m".into()),
                readonly: false,
                recursive_readonly: false,
                propagation: MountPropagation::Private,
                selinux_relabel: false,
                flags: Vec::new(),
                owners,
            };
            let spec = ContainerSpec {
                mounts: vec![mount],
                ..good_container()
            };
            container(&spec, &sandbox)
        };
        let (a, b) = (Some(namespace(100_000)), Some(namespace(200_000)));
        for (pod, owners) in [(None, None), (a, None), (a, a)] {
            check(pod, owners).unwrap();
        }
        for (pod, owners) in [(None, a), (a, b)] {
            let (kind, text) = refusal(check(pod, owners));
            assert_eq!(kind, ErrorKind::InvalidArgument);
            assert!(text.starts_with("mount 0: id mappings: "), "{text}");
        }
    }

    #[test]
    fn security_settings_that_contradict_are_refused() {
        let with = |security| {
            let spec = ContainerSpec {
                security,
                ..good_container()
            };
            refusal(container(&spec, &good_sandbox())).1
        };
        let group = with(ContainerSecurity {
            run_as_group: Some(1),
            ..ContainerSecurity::default()
        });
        assert!(group.starts_with("group: "));
        let privileged = with(ContainerSecurity {
            privileged: true,
            ..ContainerSecurity::default()
        });
        assert!(privileged.contains("privileged"));
        let profile = with(ContainerSecurity {
            apparmor: AppArmor::Localhost("p\nq".into()),
            ..ContainerSecurity::default()
        });
        assert!(profile.contains("AppArmor"));
        let pod = SandboxSpec {
            security: SandboxSecurity {
                privileged: true,
                ..SandboxSecurity::default()
            },
            ..good_sandbox()
        };
        let spec = ContainerSpec {
            security: ContainerSecurity {
                privileged: true,
                ..ContainerSecurity::default()
            },
            ..good_container()
        };
        container(&spec, &pod).unwrap();
    }
}
