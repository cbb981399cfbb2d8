//! What containers, the pod and its disks use.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use hull_proto_agent::agent::{
    CgroupStats, ContainerStats, FilesystemStats, InterfaceStats, StatsResponse,
};
use protobuf::MessageField;
use rustix::fs::statvfs;

use crate::{
    container::{Made, cgroup::value},
    ident::Id,
    time,
};

/// Reads all counters. It reads many files, so call it beside the event loop.
pub(crate) fn collect(
    containers: &[(Id, Made)],
    pod_cgroup: &Path,
    scratch: Option<&Path>,
) -> StatsResponse {
    let of_container = |(id, made): &(Id, Made)| ContainerStats {
        container_id: id.to_string(),
        cgroup: MessageField::some(cgroup(made.cgroup.path())),
        writable: made.upper.as_deref().map(tree).into(),
        ..ContainerStats::default()
    };
    StatsResponse {
        at_ns: time::real_ns(),
        containers: containers.iter().map(of_container).collect(),
        sandbox: MessageField::some(cgroup(pod_cgroup)),
        interfaces: interfaces(&read(Path::new("/proc/net/dev"))),
        scratch: scratch.and_then(filesystem).into(),
        ..StatsResponse::default()
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Reads a cgroup; what it does not count is 0.
fn cgroup(dir: &Path) -> CgroupStats {
    let number = |file: &str| read(&dir.join(file)).trim().parse().unwrap_or(0);
    let (cpu, memory) = (read(&dir.join("cpu.stat")), read(&dir.join("memory.stat")));
    let stat = |key| value(&memory, key).unwrap_or(0);
    let usage: u64 = number("memory.current");
    CgroupStats {
        cpu_usage_ns: value(&cpu, "usage_usec").unwrap_or(0).saturating_mul(1000),
        memory_usage_bytes: usage,
        // kubelet's definition: what cannot easily be given back.
        memory_working_set_bytes: usage.saturating_sub(stat("inactive_file")),
        memory_rss_bytes: stat("anon"),
        memory_page_faults: stat("pgfault"),
        memory_major_page_faults: stat("pgmajfault"),
        swap_usage_bytes: number("memory.swap.current"),
        pids: number("pids.current"),
        // "max" is no number.
        memory_limit_bytes: number("memory.max"),
        ..CgroupStats::default()
    }
}

/// Adds up a directory tree of one file system, as du(1) does.
fn tree(dir: &Path) -> FilesystemStats {
    let mut total = FilesystemStats {
        capacity_bytes: filesystem(dir).map_or(0, |f| f.capacity_bytes),
        ..FilesystemStats::default()
    };
    let mut seen = std::collections::HashSet::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            // It may be gone already; the container is at work.
            let Ok(meta) = entry.metadata() else {
                continue;
            };
            if meta.is_dir() {
                todo.push(entry.path());
            } else if meta.nlink() > 1 && !seen.insert(meta.ino()) {
                continue;
            }
            total.used_bytes += meta.blocks() * 512;
            total.used_inodes += 1;
        }
    }
    total
}

fn filesystem(path: &Path) -> Option<FilesystemStats> {
    let fs = statvfs(path).ok()?;
    Some(FilesystemStats {
        used_bytes: fs.f_blocks.saturating_sub(fs.f_bfree) * fs.f_frsize,
        used_inodes: fs.f_files.saturating_sub(fs.f_ffree),
        capacity_bytes: fs.f_blocks * fs.f_frsize,
        ..FilesystemStats::default()
    })
}

/// Reads `/proc/net/dev`; loopback is left out.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> = counters
                .split_whitespace()
                .map_while(|c| c.parse().ok())
                .collect();
            Some(InterfaceStats {
                name: name.trim().to_owned(),
                rx_bytes: *counters.first()?,
                rx_errors: *counters.get(2)?,
                tx_bytes: *counters.get(8)?,
                tx_errors: *counters.get(10)?,
                ..InterfaceStats::default()
            })
        })
        .filter(|i| i.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroups_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("cpu.stat", "usage_usec 1500\nuser_usec 1000\n"),
            ("memory.current", "5000\n"),
            (
                "memory.stat",
                "anon 3000\ninactive_file 1200\npgfault 7\npgmajfault 2\n",
            ),
            ("memory.max", "max\n"),
            ("pids.current", "3\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let stats = cgroup(dir.path());
        assert_eq!(stats.cpu_usage_ns, 1_500_000);
        assert_eq!(stats.memory_working_set_bytes, 3800);
        assert_eq!((stats.memory_rss_bytes, stats.pids), (3000, 3));
        assert_eq!((stats.memory_limit_bytes, stats.swap_usage_bytes), (0, 0));
    }

    #[test]
    fn interfaces_are_read_without_loopback() {
        let text = "Inter-|   Receive  |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
            lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  \
            eth0: 100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\n";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].name, "eth0");
        assert_eq!((all[0].rx_bytes, all[0].rx_errors), (100, 3));
        assert_eq!((all[0].tx_bytes, all[0].tx_errors), (900, 11));
    }

    #[test]
    fn a_hard_link_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 8192]).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        let stats = tree(dir.path());
        assert_eq!(stats.used_inodes, 2);
        assert!(stats.capacity_bytes > 0);
    }
}
