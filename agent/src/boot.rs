//! What PID 1 does before it answers: mounts, cgroups, limits.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::resource::{RLIM_INFINITY, Resource, rlim_t, setrlimit},
};

use crate::layout::{CGROUP_ROOT, Layout};

/// Memory that the workload cannot take from the agent and the kernel, in bytes.
const RESERVE: u64 = 24 << 20;
/// Guests with less memory get no limit: there is nothing to spare.
const SMALL_GUEST: u64 = 96 << 20;
/// Threads that the workload cannot take from the agent and the kernel, beyond those that there are
/// at boot.
const THREADS_RESERVE: u64 = 256;
/// Open files that containers may use at most, as hosts set it.
const OPEN_FILES: u64 = 1 << 20;

/// Why the guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error("mount {fstype} on {path}")]
    Mount {
        fstype: &'static str,
        path: &'static str,
        #[source]
        source: nix::Error,
    },
    #[error("{action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

struct Mount {
    fstype: &'static str,
    path: &'static str,
    flags: MsFlags,
    data: &'static str,
    /// The kernel may lack it.
    optional: bool,
}

/// In the order in which they are mounted.
fn mounts() -> [Mount; 11] {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let need = |fstype, path, flags, data| Mount {
        fstype,
        path,
        flags,
        data,
        optional: false,
    };
    let nosuid = MsFlags::MS_NOSUID;
    let devices = nosuid | MsFlags::MS_NOEXEC;
    [
        need("proc", "/proc", safe, ""),
        need("sysfs", "/sys", safe, ""),
        // Policies of AppArmor are given to the kernel there.
        Mount {
            optional: true,
            ..need("securityfs", "/sys/kernel/security", safe, "")
        },
        need("devtmpfs", "/dev", nosuid, "mode=0755"),
        need("devpts", "/dev/pts", devices, "gid=5,mode=620,ptmxmode=666"),
        need("tmpfs", "/dev/shm", safe, "mode=1777"),
        Mount {
            optional: true,
            ..need("mqueue", "/dev/mqueue", safe, "")
        },
        // Programs of containers lie below it when there is no scratch disk.
        need("tmpfs", "/run", MsFlags::empty(), "mode=0755"),
        need("tmpfs", "/tmp", nosuid | MsFlags::MS_NODEV, "mode=1777"),
        need("cgroup2", CGROUP_ROOT, safe, "nsdelegate"),
        Mount {
            optional: true,
            ..need("bpf", "/sys/fs/bpf", safe, "mode=0700")
        },
    ]
}

/// Mounts the kernel's file systems. Only for the guest's PID 1.
pub(crate) fn mount_all() -> Result<(), BootError> {
    for m in mounts() {
        match fs::create_dir(m.path) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::AlreadyExists) && !m.optional => {
                return Err(file("make directory", m.path)(e));
            }
            _ => {}
        }
        let data = (!m.data.is_empty()).then_some(m.data);
        match mount(Some(m.fstype), m.path, Some(m.fstype), m.flags, data) {
            // The kernel itself mounts /dev.
            Ok(()) | Err(nix::Error::EBUSY) => {}
            Err(_) if m.optional => {}
            Err(source) => {
                return Err(BootError::Mount {
                    fstype: m.fstype,
                    path: m.path,
                    source,
                });
            }
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        // Nothing but comfort.
        let _ = std::os::unix::fs::symlink(target, link);
    }
    Ok(())
}

/// What processes of containers inherit, as from containerd under systemd: the kernel's own follow from a
/// small guest's memory.
const LIMITS: [(Resource, rlim_t); 4] = [
    (Resource::RLIMIT_NOFILE, OPEN_FILES),
    (Resource::RLIMIT_NPROC, RLIM_INFINITY),
    (Resource::RLIMIT_CORE, RLIM_INFINITY),
    // What a host with 32 GiB has.
    (Resource::RLIMIT_SIGPENDING, 1 << 17),
];

/// Raises limits that children inherit and protects the agent from the
/// kernel's out-of-memory killer.
pub(crate) fn limits() {
    // A build machine may not allow it; there it does not matter.
    for (resource, most) in LIMITS {
        let _ = setrlimit(resource, most, most);
    }
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// Limits of the whole kernel that belong to no namespace, so that no pod can ask for them. A small guest's
/// own are smaller than any host's, and what hosts raise them to is not known here: so they are the highest
/// that there are. What they count takes memory, which the containers' cgroups count.
const KERNEL_LIMITS: [(&str, &str); 14] = [
    // As who sets it "to the highest" has it (2^31 - 6): programs add to it.
    ("vm/max_map_count", "2147483642"),
    // As kubelet sets it on its node.
    ("vm/overcommit_memory", "1"),
    ("fs/inotify/max_user_instances", "2147483647"),
    ("fs/inotify/max_user_watches", "2147483647"),
    // Both as systemd sets them.
    ("fs/file-max", "9223372036854775807"),
    ("kernel/pid_max", "4194304"),
    ("user/max_user_namespaces", NAMESPACES),
    ("user/max_pid_namespaces", NAMESPACES),
    ("user/max_mnt_namespaces", NAMESPACES),
    ("user/max_net_namespaces", NAMESPACES),
    ("user/max_ipc_namespaces", NAMESPACES),
    ("user/max_uts_namespaces", NAMESPACES),
    ("user/max_cgroup_namespaces", NAMESPACES),
    ("user/max_time_namespaces", NAMESPACES),
];
/// What a host with 16 GiB allows a user. The kernel does not count all of their memory.
const NAMESPACES: &str = "63000";
/// The least memory that a thread takes, in bytes: a stack and the tables of the kernel.
const THREAD_SIZE: u64 = 32 << 10;

/// Raises limits of the guest.
pub(crate) fn kernel_limits() {
    let sys = Path::new("/proc/sys");
    for (file, value) in KERNEL_LIMITS {
        // A kernel without the limit has no such file.
        let _ = fs::write(sys.join(file), value);
    }
    // The kernel's own leaves seven eighths of the memory to other things, which is their cgroup's to say.
    let memory = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| meminfo(&text, "MemTotal"));
    if let Some(memory) = memory {
        let _ = fs::write(
            sys.join("kernel/threads-max"),
            (memory / THREAD_SIZE).to_string(),
        );
    }
}

/// Moves the agent to a cgroup of its own and makes the one above all
/// containers, with every controller and a limit that leaves the agent room.
pub(crate) fn cgroups(layout: &Layout) -> Result<(), BootError> {
    let root = Path::new(CGROUP_ROOT);
    let pod = layout.pod_cgroup();
    let agent = layout.agent_cgroup();
    for dir in [&pod, &agent] {
        match fs::create_dir(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(file("make cgroup", dir)(e));
            }
            _ => {}
        }
    }
    let procs = agent.join("cgroup.procs");
    fs::write(&procs, "0").map_err(file("join cgroup", &procs))?;
    let controllers = root.join("cgroup.controllers");
    let controllers =
        fs::read_to_string(&controllers).map_err(file("read controllers", &controllers))?;
    for dir in [root, &pod] {
        for controller in controllers.split_whitespace() {
            // One by one: a controller that cannot be used must not cost the others.
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    let _ = fs::write(agent.join("memory.min"), (RESERVE / 2).to_string());
    if let Some(limit) = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| workload_limit(&text))
    {
        let _ = fs::write(pod.join("memory.max"), limit.to_string());
    }
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
    let loads = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    if let Some(limit) = thread_limit(
        number("/proc/sys/kernel/threads-max"),
        number("/proc/sys/kernel/pid_max"),
        &loads,
    ) {
        let _ = fs::write(pod.join("pids.max"), limit.to_string());
    }
    Ok(())
}

/// Returns a number of `/proc/meminfo` in bytes.
pub(crate) fn meminfo(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(key, _)| *key == name)?;
    let kib: u64 = value.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Returns how much memory all containers may use together.
fn workload_limit(text: &str) -> Option<u64> {
    let total = meminfo(text, "MemTotal")?;
    (total > SMALL_GUEST).then(|| total - RESERVE)
}

/// Returns how many threads all containers may have together. The kernel's own limits hold for the
/// agent too, which needs threads to do anything, and to end containers.
fn thread_limit(threads_max: Option<u64>, pid_max: Option<u64>, loads: &str) -> Option<u64> {
    let most = [threads_max, pid_max].into_iter().flatten().min()?;
    // "0.20 0.18 0.12 1/80 11206": the fourth is running/all.
    let there: u64 = loads.split(['/', ' ']).nth(4)?.parse().ok()?;
    // A guest so small that nothing is left gives half.
    Some(most.saturating_sub(there + THREADS_RESERVE).max(most / 2))
}

fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> BootError {
    let path = path.as_ref().to_owned();
    move |source| BootError::File {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_leaves_the_agent_some_memory() {
        let text = "MemTotal:         262144 kB\nMemFree: 1 kB\n";
        assert_eq!(workload_limit(text), Some((256 << 20) - RESERVE));
        assert_eq!(workload_limit("MemTotal: 65536 kB\n"), None);
        assert_eq!(workload_limit("nothing"), None);
    }

    #[test]
    fn a_guest_leaves_the_agent_some_threads() {
        let loads = "0.20 0.18 0.12 1/80 11206\n";
        assert_eq!(
            thread_limit(Some(1900), Some(32768), loads),
            Some(1900 - 80 - 256)
        );
        assert_eq!(
            thread_limit(None, Some(32768), loads),
            Some(32768 - 80 - 256)
        );
        assert_eq!(thread_limit(Some(500), None, loads), Some(250));
        assert_eq!(thread_limit(None, None, loads), None);
        assert_eq!(thread_limit(Some(1900), None, ""), None);
    }
}
