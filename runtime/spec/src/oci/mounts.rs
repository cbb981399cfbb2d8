//! The mounts that every container has, and those that are asked for. Sources of bind mounts are
//! paths in the guest.

use std::path::Path;

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Mount};

use crate::{
    error::PodError,
    spec::{ContainerSpec, IdRange, MountSource, UserNamespace},
};

/// Shared memory of the pod, made by the agent.
const SHM: &str = "/run/hull/shm";
/// Files of the pod's identity, written by the agent when it is configured.
const SANDBOX_FILES: &str = "/run/hull/files/sandbox";

/// What stands for the source of a mount that was asked for until the agent finds it.
const ASKED_SOURCE: &str = "mount-";

/// Whose the files of a mount are: ids of the pod's user namespace.
#[derive(Debug)]
pub(super) struct Owners {
    uids: Vec<LinuxIdMapping>,
    gids: Vec<LinuxIdMapping>,
}

impl Owners {
    pub(super) fn of(user: UserNamespace) -> Result<Self, PodError> {
        Ok(Self {
            uids: vec![mapping(user.uids)?],
            gids: vec![mapping(user.gids)?],
        })
    }
}

/// Makes the list, in the order in which it is mounted: what is asked for takes the place of what
/// a container has anyway, and a mount comes before those below it. What is made for the pod or is
/// an image's belongs to the ids of its user namespace, if it has one.
pub(super) fn all(
    container: &ContainerSpec,
    locals: &[usize],
    owners: Option<&Owners>,
) -> Vec<Mount> {
    let asked = asked(container, locals, owners);
    let replaced = |mount: &Mount| {
        asked
            .iter()
            .any(|asked| same_place(asked.destination(), mount.destination()))
    };
    let mut mounts = system(container);
    mounts.extend(of_the_pod(container, owners));
    mounts.retain(|mount| !replaced(mount));
    mounts.extend(asked);
    // Stable: of two at one place, the later covers the earlier.
    mounts.sort_by_key(|mount| mount.destination().components().count());
    mounts
}

/// What is asked for: directories and files of the shared file system, volumes, images, and devices
/// of the guest.
fn asked(container: &ContainerSpec, locals: &[usize], owners: Option<&Owners>) -> Vec<Mount> {
    let mounts = container.mounts.iter().enumerate();
    mounts
        .map(|(index, asked)| {
            let at = asked.container_path.to_string_lossy();
            let flags = asked.flags.iter().map(|flag| flag.option());
            if let Some(path) = asked.of_devices() {
                // What is made or removed there is so for the whole guest.
                let writable = container.security.privileged && !asked.readonly;
                let access = if writable { "rw" } else { "ro" };
                let path = path.to_string_lossy();
                let options: Vec<_> = ["bind", "rprivate", access]
                    .into_iter()
                    .chain(flags)
                    .collect();
                return mount(&at, "bind", &path, &options);
            }
            let (mut options, owners) = match asked.source {
                MountSource::Host(_) => {
                    // The host refuses writes. The guest would also to what is mounted below,
                    // which a mount that is not recursively read-only allows: here, all is one
                    // file system. A copy and what the guest keeps are the guest's to protect.
                    let local = locals.contains(&index);
                    let here = asked.is_atomic_volume() || local && asked.readonly;
                    let readonly = here || asked.recursive_readonly;
                    let access = if readonly { "ro" } else { "rw" };
                    // A device node of the host's would be one of the guest's, with the same number.
                    let options = if local {
                        vec![access]
                    } else {
                        vec!["nodev", access]
                    };
                    // Checked: they are the pod's, if any.
                    (options, owners.filter(|_| asked.owners.is_some()))
                }
                MountSource::Image { .. } => (vec!["ro"], owners),
            };
            options.extend(flags);
            let source = format!("{ASKED_SOURCE}{index}");
            bind(&at, &source, &options, owners)
        })
        .collect()
}

/// Which of the container's mounts a mount of its specification is; none: not one that was asked for.
pub fn asked_mount(mount: &Mount) -> Option<usize> {
    let source = mount.source().as_ref()?.to_str()?;
    source.strip_prefix(ASKED_SOURCE)?.parse().ok()
}

/// Tells whether two paths are one, but for slashes.
fn same_place(a: &Path, b: &Path) -> bool {
    a.components().eq(b.components())
}

/// What the kernel's interfaces are.
fn system(container: &ContainerSpec) -> Vec<Mount> {
    let access = if container.security.privileged {
        "rw"
    } else {
        "ro"
    };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", access],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
}

/// What the containers of a pod have in common.
fn of_the_pod(container: &ContainerSpec, owners: Option<&Owners>) -> Vec<Mount> {
    let files = if container.security.readonly_rootfs {
        "ro"
    } else {
        "rw"
    };
    let shm = ["nosuid", "noexec", "nodev", "rw"];
    let mut mounts = vec![bind("/dev/shm", SHM, &shm, owners)];
    for name in ["hosts", "resolv.conf", "hostname"] {
        let source = format!("{SANDBOX_FILES}/{name}");
        mounts.push(bind(&format!("/etc/{name}"), &source, &[files], owners));
    }
    mounts
}

fn bind(destination: &str, source: &str, options: &[&str], owners: Option<&Owners>) -> Mount {
    let options: Vec<&str> = ["rbind", "rprivate"]
        .iter()
        .chain(options)
        .copied()
        .collect();
    let mut mount = mount(destination, "bind", source, &options);
    mount.set_uid_mappings(owners.map(|owners| owners.uids.clone()));
    mount.set_gid_mappings(owners.map(|owners| owners.gids.clone()));
    mount
}

fn mapping(ids: IdRange) -> Result<LinuxIdMapping, PodError> {
    LinuxIdMappingBuilder::default()
        .host_id(ids.host)
        .container_id(0_u32)
        .size(ids.length)
        .build()
        .map_err(|e| PodError::internal("map the owners of mounts", e))
}

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(destination.into());
    mount.set_typ(Some(typ.into()));
    mount.set_source(Some(source.into()));
    mount.set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    mount
}
