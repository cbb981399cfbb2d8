//! The processes of a container, as its own programs see them.

use std::{
    collections::HashMap,
    io::{self, Read},
};

use hull_proto_agent::agent::{ProcessInfo, ProcessesResponse};
use nix::unistd::Pid;
use rustix::fs::OFlags;

use crate::{
    container::cgroup::Cgroup,
    pidfd::{Process, Stat},
    time,
};

/// Most processes that are told of.
const MOST: usize = 1024;
/// Most bytes of a command that are read.
const COMMAND: u64 = 512;
/// What /proc counts in: ticks (USER_HZ) and pages of this processor.
const TICK_MS: u64 = 10;
const PAGE: u64 = 4096;

/// Tells of the processes of a container, whose first one is `init`; `first_uid` is what its uid 0 is in the guest.
///
/// It reads many files, so call it beside the event loop.
pub(crate) fn processes(init: &Process, cgroup: &Cgroup, first_uid: u32) -> ProcessesResponse {
    // One that ends meanwhile is none.
    let mut members = cgroup.members().unwrap_or_default();
    members.sort_by_key(Process::pid);
    let left_out = members.len().saturating_sub(MOST);
    members.truncate(MOST);
    let level = Status::of(init).map_or(0, |init| init.pids.len().saturating_sub(1));
    let known = members.iter().filter_map(|process| {
        let (stat, status) = (process.stat().ok()?, Status::of(process)?);
        let pid = *status.pids.get(level)?;
        Some((process, stat, pid, status.uid))
    });
    let known: Vec<_> = known.collect();
    let pids: HashMap<Pid, u32> = known.iter().map(|known| (known.0.pid(), known.2)).collect();
    let now_ms = time::boot_ns() / 1_000_000;
    let tell = |(process, stat, pid, uid): &(&Process, Stat, u32, u32)| ProcessInfo {
        pid: *pid,
        parent: pids.get(&stat.parent).copied().unwrap_or(0),
        uid: uid.saturating_sub(first_uid),
        state: stat.state.to_string(),
        cpu_ms: stat.used.saturating_mul(TICK_MS),
        memory_bytes: stat.pages.saturating_mul(PAGE),
        age_ms: now_ms.saturating_sub(stat.started.saturating_mul(TICK_MS)),
        command: command(process),
        ..ProcessInfo::default()
    };
    ProcessesResponse {
        processes: known.iter().map(tell).collect(),
        left_out: left_out as u64,
        ..ProcessesResponse::default()
    }
}

/// A part of /proc/PID/status.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    /// The effective one.
    uid: u32,
    /// Its pids, from the guest's namespace to its own.
    pids: Vec<u32>,
}

impl Status {
    fn of(process: &Process) -> Option<Self> {
        Self::parse(&process.read("status").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let numbers = |key: &str| -> Option<Vec<u32>> {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_ascii_whitespace()
                .map(|n| n.parse().ok())
                .collect()
        };
        Some(Self {
            uid: *numbers("Uid:")?.get(1)?,
            pids: numbers("NSpid:")?,
        })
    }
}

/// Its arguments; its name when it has none, as a zombie or one of the kernel's.
fn command(process: &Process) -> String {
    let arguments = arguments(process).unwrap_or_default();
    if !arguments.is_empty() {
        return arguments;
    }
    let name = process.read("comm").unwrap_or_default();
    format!("[{}]", name.trim_end())
}

fn arguments(process: &Process) -> io::Result<String> {
    let mut bytes = Vec::new();
    let file = process.open_file("cmdline", OFlags::RDONLY)?;
    file.take(COMMAND).read_to_end(&mut bytes)?;
    Ok(shown(&bytes))
}

/// Arguments in a line, no longer than what is read: all together must fit into an answer.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut text = text.trim_end_matches('\0').replace('\0', " ");
    // What stands for a byte that is no text takes three.
    let most = usize::try_from(COMMAND).unwrap_or(usize::MAX);
    text.truncate(text.floor_char_boundary(most));
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    #[test]
    fn ids_are_those_of_the_innermost_namespace_and_of_what_counts() {
        let text = "Name:\tx\nUid:\t7\t8\t9\t9\nGid:\t1\t1\t1\t1\nNSpid:\t120\t7\t1\n";
        let status = Status::parse(text).unwrap();
        assert_eq!((status.uid, status.pids), (8, vec![120, 7, 1]));
        for broken in [
            "",
            "Uid:\t1\nNSpid:\t1\n",
            "Uid:\t1\t1\n",
            "Uid:\tx\ty\nNSpid:\t1\n",
        ] {
            assert_eq!(Status::parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn arguments_are_no_longer_than_what_is_read_of_them() {
        assert_eq!(shown(b"sh\0-c\0a b\0"), "sh -c a b");
        assert!(shown(&[0xff; 512]).len() <= 512);
        assert_eq!(shown(b""), "");
    }

    #[test]
    fn a_process_is_told_with_its_parent_and_command() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (me, its) = (std::process::id(), child.id());
        fs::write(dir.path().join("cgroup.procs"), format!("{me}\n{its}\n")).unwrap();
        let init = Process::open(Pid::this()).unwrap();
        let cgroup = Cgroup::at(dir.path().to_owned());
        // Until it has become that.
        let told = loop {
            let told = processes(&init, &cgroup, 0);
            if told.processes.iter().any(|p| p.command == "sleep 100") {
                break told;
            }
        };
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((told.processes.len(), told.left_out), (2, 0));
        let of = |command: &str| told.processes.iter().find(|p| p.command.contains(command));
        let (parent, sleep) = (of("agent").unwrap(), of("sleep 100").unwrap());
        assert_eq!((sleep.parent, parent.parent), (parent.pid, 0));
        assert!(
            parent.memory_bytes > 1 << 20 && sleep.age_ms < 600_000,
            "{told:?}"
        );
        assert!(["S", "R", "D"].contains(&sleep.state.as_str()), "{told:?}");
        // The child has gone.
        let told = processes(&init, &cgroup, 0);
        assert_eq!(told.processes.len(), 1);
    }
}
