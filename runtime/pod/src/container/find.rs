//! What of the node a container asks for: images, devices of the host, a seccomp profile.

use std::{io::Read, path::PathBuf};

use hull_image::{Image, ImageId};
use hull_proto_agent::agent::{CreateRequest, Device as GuestDevice};
use rustix::fs::OFlags;

use hull_base::{beneath, blocking};
use hull_spec::{
    error::{ObjectKind, PodError},
    field::Field,
    id::ContainerId,
    oci::ProfileFile,
    spec::{ContainerSpec, MountSource},
};

use crate::{
    node::Node,
    storage::host_device::{self, BlockDevice, Device},
};

/// Largest seccomp profile of the node, in bytes.
const PROFILE_MAX: u64 = 1 << 20;

/// Finds an image of the node.
pub(crate) async fn find_image(node: &Node, name: &str) -> Result<Image, PodError> {
    let found = node.images.get(name).await;
    found
        .map_err(|e| PodError::internal("look for the image", e))?
        .ok_or_else(|| PodError::NotFound {
            object: ObjectKind::Image,
            id: name.to_owned(),
        })
}

/// Reads a seccomp profile of the node.
pub(crate) async fn read_profile(path: PathBuf) -> Result<ProfileFile, PodError> {
    let shown = path.display().to_string();
    let refused = |reason: String| PodError::invalid(Field::SeccompProfile, reason);
    let read = blocking(move || -> std::io::Result<Vec<u8>> {
        let file = beneath::regular(beneath::hold(&path)?, OFlags::RDONLY)?;
        let mut bytes = Vec::new();
        file.take(PROFILE_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > PROFILE_MAX {
            let reason = format!("it is larger than {PROFILE_MAX} bytes");
            return Err(std::io::Error::other(reason));
        }
        Ok(bytes)
    });
    let bytes = read.await;
    let bytes = bytes.map_err(|e| refused(format!("read {shown}: {e}")))?;
    ProfileFile::parse(&bytes).map_err(|e| refused(format!("parse {shown}: {e}")))
}

/// Finds the images of the container's image volumes, by index in its mounts.
pub(crate) async fn find_volumes(
    node: &Node,
    spec: &ContainerSpec,
) -> Result<Vec<(usize, ImageId)>, PodError> {
    let mut volumes = Vec::new();
    for (index, mount) in spec.mounts.iter().enumerate() {
        if let MountSource::Image { image, .. } = &mount.source {
            volumes.push((index, find_image(node, &image.image).await?.id));
        }
    }
    Ok(volumes)
}

/// Finds out what the container's devices are, and adds them to what the guest is asked.
pub(crate) async fn find_devices(
    id: &ContainerId,
    spec: &ContainerSpec,
    request: &mut CreateRequest,
) -> Result<Vec<(String, BlockDevice)>, PodError> {
    let mut disks = Vec::new();
    for (index, asked) in spec.devices.iter().cloned().enumerate() {
        let mut device = GuestDevice {
            path: asked.container_path.to_string_lossy().into_owned(),
            access: asked.permissions.clone(),
            ..GuestDevice::default()
        };
        match blocking(move || host_device::inspect(index, &asked)).await? {
            Device::Own(path) => device.guest_path = path,
            Device::Block(disk) => {
                device.storage = host_device::storage_id(id, index);
                disks.push((device.storage.clone(), disk));
            }
        }
        request.devices.push(device);
    }
    Ok(disks)
}
