//! The mounts that every container has, and those that are asked for. Sources of bind mounts are
//! paths in the guest.

use std::path::Path;

use oci_spec::runtime::Mount;

use crate::{
    id::ContainerId,
    spec::{ContainerSpec, MountSource},
    storage::files::guest_directory,
};

/// Shared memory of the pod, made by the agent.
const SHM: &str = "/run/hull/shm";
/// Files of the pod's identity, written by the agent when it is configured.
const SANDBOX_FILES: &str = "/run/hull/files/sandbox";

/// What stands for the source of an image volume until the agent finds it.
const IMAGE_SOURCE: &str = "image-volume-";

/// Makes the list, in the order in which it is mounted: what is asked for takes the place of what
/// a container has anyway, and a mount comes before those below it.
pub(super) fn all(id: &ContainerId, container: &ContainerSpec) -> Vec<Mount> {
    let asked = asked(id, container);
    let replaced = |mount: &Mount| {
        asked
            .iter()
            .any(|asked| same_place(asked.destination(), mount.destination()))
    };
    let mut mounts = system(container);
    let mut others = of_the_pod(container);
    mounts.retain(|mount| !replaced(mount));
    others.retain(|mount| !replaced(mount));
    others.extend(asked);
    // Stable: of two at one place, the later covers the earlier.
    others.sort_by_key(|mount| mount.destination().components().count());
    mounts.extend(others);
    mounts
}

/// What is asked for: directories and files of the shared file system, and images.
fn asked(id: &ContainerId, container: &ContainerSpec) -> Vec<Mount> {
    let mut shared = 0_usize;
    let mounts = container.mounts.iter().enumerate();
    mounts
        .map(|(index, asked)| {
            let (source, access) = match asked.source {
                MountSource::Host(_) => {
                    let source = format!("{}/{shared}", guest_directory(id));
                    shared += 1;
                    // The host refuses writes. The guest would also to what is mounted below,
                    // which a mount that is not recursively read-only allows: here, all is one
                    // file system.
                    (source, if asked.recursive_readonly { "ro" } else { "rw" })
                }
                MountSource::Image { .. } => (format!("{IMAGE_SOURCE}{index}"), "ro"),
            };
            bind(&asked.container_path.to_string_lossy(), &source, &[access])
        })
        .collect()
}

/// Which of the container's mounts a mount of its specification is; none: not an image volume.
pub(crate) fn image_volume(mount: &Mount) -> Option<usize> {
    let source = mount.source().as_ref()?.to_str()?;
    source.strip_prefix(IMAGE_SOURCE)?.parse().ok()
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
fn of_the_pod(container: &ContainerSpec) -> Vec<Mount> {
    let files = if container.security.readonly_rootfs {
        "ro"
    } else {
        "rw"
    };
    let mut mounts = vec![bind("/dev/shm", SHM, &["nosuid", "noexec", "nodev", "rw"])];
    for name in ["hosts", "resolv.conf", "hostname"] {
        let source = format!("{SANDBOX_FILES}/{name}");
        mounts.push(bind(&format!("/etc/{name}"), &source, &[files]));
    }
    mounts
}

fn bind(destination: &str, source: &str, options: &[&str]) -> Mount {
    let options: Vec<&str> = ["rbind", "rprivate"]
        .iter()
        .chain(options)
        .copied()
        .collect();
    mount(destination, "bind", source, &options)
}

fn mount(destination: &str, typ: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(destination.into());
    mount.set_typ(Some(typ.into()));
    mount.set_source(Some(source.into()));
    mount.set_options(Some(options.iter().map(|o| (*o).to_owned()).collect()));
    mount
}
