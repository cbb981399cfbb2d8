//! What only /proc tells: processes, what they have open, their limits.

use std::{fs, path::Path};

use hull_proto_agent::agent::{CgroupStats, Ulimit};

use crate::{container::cgroup::Cgroup, pidfd::Process};

/// Descriptors are counted by listing them: a container with more than this many
/// does not make every request slow, and has this count.
const DESCRIPTORS: u64 = 100_000;

/// Counts the processes of a cgroup and what they have open.
pub(super) fn count(cgroup: &Cgroup, stats: &mut CgroupStats) {
    let pids = cgroup.processes().unwrap_or_default();
    stats.processes = pids.len() as u64;
    for pid in pids {
        let fds = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd"));
        for fd in fds.into_iter().flatten().flatten() {
            if stats.file_descriptors >= DESCRIPTORS {
                return;
            }
            stats.file_descriptors += 1;
            // It may be closed already.
            let target = fs::read_link(fd.path()).unwrap_or_default();
            if target
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"socket:")
            {
                stats.sockets += 1;
            }
        }
    }
}

/// The limits of a process; none when it is gone.
pub(super) fn ulimits(process: &Process) -> Vec<Ulimit> {
    parse(&process.read("limits").unwrap_or_default())
}

fn parse(text: &str) -> Vec<Ulimit> {
    text.lines().skip(1).filter_map(limit).collect()
}

/// "Max open files            1024                 1048576              files"
fn limit(line: &str) -> Option<Ulimit> {
    let (name, rest) = line.split_once("  ")?;
    let soft = rest.split_ascii_whitespace().next()?;
    let unlimited = soft == "unlimited";
    Some(Ulimit {
        name: name.to_ascii_lowercase().replace(' ', "_"),
        soft: if unlimited { 0 } else { soft.parse().ok()? },
        unlimited,
        ..Ulimit::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let text = "\
Limit                     Soft Limit           Hard Limit           Units     \n\
Max cpu time              unlimited            unlimited            seconds   \n\
Max open files            1024                 1048576              files     \n\
Max realtime priority     0                    0                    \n";
        let all = parse(text);
        assert_eq!(all.len(), 3);
        assert!(all[0].unlimited);
        assert_eq!((&*all[1].name, all[1].soft), ("max_open_files", 1024));
        assert_eq!(&*all[2].name, "max_realtime_priority");
        assert!(!ulimits(&Process::open(nix::unistd::Pid::this()).unwrap()).is_empty());
    }

    #[test]
    fn open_sockets_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let me = format!("{}\n", std::process::id());
        fs::write(dir.path().join("cgroup.procs"), me).unwrap();
        let cgroup = Cgroup::at(dir.path().to_owned());
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let mut stats = CgroupStats::default();
        count(&cgroup, &mut stats);
        assert_eq!(stats.processes, 1);
        assert!(stats.sockets >= 2 && stats.file_descriptors > stats.sockets);
    }
}
