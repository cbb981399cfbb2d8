//! What the agent is asked for a container: a pure function of what callers ask and of the image.

use std::collections::HashMap;

use hull_image::{Image, ImageId};
use hull_proto_agent::agent::{CreateRequest, PidNamespace, StorageMount, User};
use oci_spec::runtime::Spec;
use protobuf::EnumOrUnknown;

use hull_spec::{
    error::PodError,
    id::ContainerId,
    oci::asked_mount,
    spec::{ContainerSpec, GroupsPolicy, MountSource, NamespaceMode},
};

use crate::storage::{devices::storage_id, empty_dir::LocalVolume, host_files::FILES_ID};

/// What the agent is asked; the sources of mounts and the devices are added to it.
pub(crate) fn create_request(
    id: &ContainerId,
    oci: &Spec,
    spec: &ContainerSpec,
    image: &Image,
) -> Result<CreateRequest, PodError> {
    let spec_json = serde_json::to_vec(oci)
        .map_err(|e| PodError::internal("encode the container's specification", e))?;
    let (pid, pid_target) = match &spec.security.namespaces.pid {
        NamespaceMode::Pod => (PidNamespace::POD, String::new()),
        NamespaceMode::Container => (PidNamespace::CONTAINER, String::new()),
        NamespaceMode::Node => (PidNamespace::NODE, String::new()),
        NamespaceMode::Target(target) => (PidNamespace::TARGET, target.clone()),
    };
    Ok(CreateRequest {
        container_id: id.to_string(),
        spec: spec_json,
        lower: vec![storage_id(&image.id)],
        // Also under a read-only root: mount points are made in the upper layer.
        writable: true,
        user: Some(user(spec, image)).into(),
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        tty: spec.tty,
        pid: EnumOrUnknown::new(pid),
        pid_target,
        guest_devices: spec.security.privileged,
        ..CreateRequest::default()
    })
}

/// Where the mounts that were asked for are in the specification.
pub(crate) fn asked_mounts(oci: &Spec) -> HashMap<usize, u32> {
    let mounts = oci.mounts().iter().flatten().zip(0..);
    mounts
        .filter_map(|(mount, index)| Some((asked_mount(mount)?, index)))
        .collect()
}

/// Where the agent finds the sources of image volumes and of those that the guest keeps.
pub(crate) fn storage_mounts(
    mounts: &HashMap<usize, u32>,
    spec: &ContainerSpec,
    volumes: &[(usize, ImageId)],
    locals: &[(usize, LocalVolume)],
) -> Vec<StorageMount> {
    let local = |(asked, volume): &(usize, LocalVolume)| {
        Some(StorageMount {
            mount: *mounts.get(asked)?,
            storage: volume.storage.clone(),
            sub_path: volume.sub_path.clone(),
            ..StorageMount::default()
        })
    };
    let of = |(asked, image): &(usize, ImageId)| {
        let MountSource::Image { sub_path, .. } = &spec.mounts.get(*asked)?.source else {
            return None;
        };
        Some(StorageMount {
            mount: *mounts.get(asked)?,
            storage: storage_id(image),
            sub_path: sub_path.clone(),
            ..StorageMount::default()
        })
    };
    let locals = locals.iter().filter_map(local);
    volumes.iter().filter_map(of).chain(locals).collect()
}

/// A number that was asked for comes before a name, and a name before the image's user. The
/// image's group belongs to the image's user alone.
fn user(spec: &ContainerSpec, image: &Image) -> User {
    let security = &spec.security;
    let name = if security.run_as_user.is_some() {
        String::new()
    } else if security.run_as_username.is_empty() {
        image.config.user.clone()
    } else {
        security.run_as_username.clone()
    };
    User {
        user: name,
        uid: security.run_as_user,
        gid: security.run_as_group,
        supplemental_groups: security.supplemental_groups.clone(),
        strict_groups: security.groups_policy == GroupsPolicy::Strict,
        ..User::default()
    }
}

/// Where the agent finds a path of the host: below the mount of all of them, at `place`. `atomic_volume` is
/// the path if the guest is to have a copy that follows it.
pub(crate) fn share_mount(
    mount: u32,
    place: String,
    atomic_volume: Option<String>,
) -> StorageMount {
    StorageMount {
        mount,
        storage: FILES_ID.to_owned(),
        sub_path: place,
        atomic_volume: atomic_volume.unwrap_or_default(),
        ..StorageMount::default()
    }
}
