//! The mounts that every container has. Sources of bind mounts are paths in the guest.

use oci_spec::runtime::Mount;

use crate::spec::ContainerSpec;

/// Shared memory of the pod, made by the agent.
const SHM: &str = "/run/hull/shm";
/// Files of the pod's identity, written by the agent when it is configured.
const SANDBOX_FILES: &str = "/run/hull/files/sandbox";

/// Makes the list, in the order in which it is mounted.
pub(super) fn standard(container: &ContainerSpec) -> Vec<Mount> {
    let access = if container.security.privileged {
        "rw"
    } else {
        "ro"
    };
    let files = if container.security.readonly_rootfs {
        "ro"
    } else {
        "rw"
    };
    let mut mounts = vec![
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
        bind("/dev/shm", SHM, &["nosuid", "noexec", "nodev", "rw"]),
    ];
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
