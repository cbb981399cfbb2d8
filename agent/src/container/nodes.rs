//! Device nodes of a container beyond those that each has: the guest's own, and disks that the
//! host attached for it.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use hull_proto_agent::agent::CreateRequest;
use nix::sys::stat::{major, minor};
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec,
};

use super::{error::ContainerError, make::DEV, spec::SpecError};
use crate::{ident::Id, storage::Storages};

/// Names in it that every container has of its own.
const OWN: [&str; 13] = [
    "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty",
    "urandom", "zero",
];
/// Mode of a disk's node: for root alone, as the guest's is.
const DISK_MODE: u32 = 0o660;

/// A node of the guest.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    kind: LinuxDeviceType,
    major: u64,
    minor: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Adds the devices that `request` asks for to `spec`. With all of the guest's, its /dev is the guest's
/// own, so that what the kernel adds is there when it says so, such as a loop device; a user namespace
/// could change nothing there, and gets copies of what there is.
pub(super) fn add(
    spec: &mut Spec,
    request: &CreateRequest,
    storages: &Storages,
    user_namespace: bool,
) -> Result<(), ContainerError> {
    let (mut devices, mut rules) = (Vec::new(), Vec::new());
    if request.guest_devices && user_namespace {
        of_guest(Path::new(DEV), &mut devices)?;
    } else if request.guest_devices {
        let mounts = spec.mounts_mut().iter_mut().flatten();
        for dev in mounts.filter(|mount| is_own_dev(mount)) {
            dev.set_typ(Some("bind".to_owned()));
            dev.set_source(Some(DEV.into()));
            dev.set_options(Some(vec!["bind".to_owned(), "nosuid".to_owned()]));
        }
    }
    for asked in &request.devices {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ContainerError::Device { path, source }
        };
        let (path, is_disk) = if asked.storage.is_empty() {
            (PathBuf::from(&asked.guest_path), false)
        } else {
            let id = Id::parse("storage id", &asked.storage)?;
            let path = storages.device(&id);
            let path = path.ok_or_else(|| ContainerError::NoStorage(asked.storage.clone()))?;
            (path, true)
        };
        let mut node = look(&path)
            .and_then(|node| node.ok_or_else(|| io::Error::other("it is no device")))
            .map_err(failed(&path))?;
        if is_disk {
            node.mode = DISK_MODE;
        }
        rules.push(rule(&node, &asked.access));
        let at = PathBuf::from(&asked.path);
        devices.retain(|known: &LinuxDevice| *known.path() != at);
        devices.push(device(&node, at)?);
    }
    if devices.is_empty() {
        return Ok(());
    }
    let linux = spec.linux_mut().as_mut();
    let linux = linux.ok_or(SpecError::Missing("linux section"))?;
    // The last rule that matches decides: a privileged container's allows everything already.
    if !request.guest_devices
        && let Some(resources) = linux.resources_mut()
    {
        let mut all = resources.devices().clone().unwrap_or_default();
        all.extend(rules);
        resources.set_devices(Some(all));
    }
    linux.set_devices(Some(devices));
    Ok(())
}

/// Whether it is the /dev that a container has of its own.
fn is_own_dev(mount: &Mount) -> bool {
    mount.destination() == Path::new(DEV) && mount.typ().as_deref() == Some("tmpfs")
}

/// Adds all devices below `dir` but those that every container has.
fn of_guest(dir: &Path, devices: &mut Vec<LinuxDevice>) -> Result<(), ContainerError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ContainerError::Device { path, source }
    };
    for entry in fs::read_dir(dir).map_err(failed(dir))? {
        let entry = entry.map_err(failed(dir))?;
        let path = entry.path();
        let own = dir == Path::new(DEV)
            && entry
                .file_name()
                .to_str()
                .is_none_or(|name| OWN.contains(&name));
        if own {
            continue;
        }
        let kind = entry.file_type().map_err(failed(&path))?;
        if kind.is_dir() {
            of_guest(&path, devices)?;
        } else if !kind.is_symlink() {
            match look(&path) {
                Ok(Some(node)) => devices.push(device(&node, path)?),
                Ok(None) => {}
                // A disk that is being detached.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(failed(&path)(e)),
            }
        }
    }
    Ok(())
}

/// Returns what `path` is; `None`: no device.
fn look(path: &Path) -> io::Result<Option<Node>> {
    let found = fs::symlink_metadata(path)?;
    let kind = if found.file_type().is_char_device() {
        LinuxDeviceType::C
    } else if found.file_type().is_block_device() {
        LinuxDeviceType::B
    } else {
        return Ok(None);
    };
    Ok(Some(Node {
        kind,
        major: major(found.rdev()),
        minor: minor(found.rdev()),
        mode: found.mode() & 0o777,
        uid: found.uid(),
        gid: found.gid(),
    }))
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn device(node: &Node, path: PathBuf) -> Result<LinuxDevice, SpecError> {
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(node.kind)
        .major(number(node.major))
        .minor(number(node.minor))
        .file_mode(node.mode)
        .uid(node.uid)
        .gid(node.gid)
        .build()
        .map_err(SpecError::Build)
}

fn rule(node: &Node, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true);
    rule.set_typ(Some(node.kind));
    rule.set_major(Some(number(node.major)));
    rule.set_minor(Some(number(node.minor)));
    rule.set_access(Some(access.to_owned()));
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_told_from_a_file() {
        let null = look(Path::new("/dev/null")).unwrap().unwrap();
        assert_eq!(
            (null.kind, null.major, null.minor),
            (LinuxDeviceType::C, 1, 3)
        );
        assert_eq!(look(Path::new("/etc/passwd")).unwrap(), None);
        assert!(look(Path::new("/dev/nothing")).is_err());
    }
}
