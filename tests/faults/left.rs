//! What pods, containers and pulls have of a node: listed before and after.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// Everything that a pod, a container or a pull may make, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Left(BTreeSet<String>);

impl Left {
    pub fn list(dir: &Path) -> Self {
        let mut found = BTreeSet::new();
        for (pid, line) in processes(dir) {
            // Their names have the pod's.
            found.insert(format!("process {pid} {line}"));
        }
        for name in [
            "state/pods",
            "state/records",
            "state/netns",
            "root/pods",
            "root/cni",
            "root/images/tmp",
            "root/images/layers",
            "root/images/images",
            "leases/test",
            "state/pods/*",
        ] {
            let (parent, below) = match name.strip_suffix("/*") {
                Some(parent) => (dir.join(parent), true),
                None => (dir.join(name), false),
            };
            for entry in names(&parent) {
                let own = ["lock", "last_reserved_ip.0"].contains(&entry.as_str());
                if !below && !own {
                    found.insert(format!("{name}/{entry}"));
                }
                if below {
                    // Notes of how far logs are go with their container.
                    let notes = names(&parent.join(&entry))
                        .into_iter()
                        .filter(|note| note.len() >= 64);
                    found.extend(notes.map(|note| format!("note {note}")));
                }
            }
        }
        found.extend(
            names(&dir.join("root"))
                .into_iter()
                .filter(|name| name.ends_with(".tmp")),
        );
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        found.extend(
            mounts
                .filter(|path| Path::new(path).starts_with(dir))
                .map(|path| format!("mount {path}")),
        );
        let links = Command::new("ip").args(["-o", "link"]).output();
        let links = links.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        for link in links.unwrap_or_default().lines() {
            let name = link.split(": ").nth(1).unwrap_or_default();
            // The bridge is the network's, not a pod's.
            if name != "hull-f0" {
                found.insert(format!("link {name}"));
            }
        }
        cgroups(Path::new("/sys/fs/cgroup/hull-faults"), &mut found);
        Self(found)
    }

    pub fn has(&self, what: &str) -> bool {
        self.0.contains(what)
    }

    /// How many there are whose names begin so.
    pub fn count(&self, what: &str) -> usize {
        self.0.iter().filter(|name| name.starts_with(what)).count()
    }

    /// What is here and not there.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// Processes with the node's directory in their command line, but for daemon and registry.
pub fn processes(dir: &Path) -> Vec<(u32, String)> {
    let dir = dir.display().to_string();
    let mut found = Vec::new();
    for pid in names(Path::new("/proc"))
        .iter()
        .filter_map(|name| name.parse::<u32>().ok())
    {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let own = line.contains("hull.toml") || line.contains("registry.yml");
        if line.contains(&dir) && !own {
            found.push((pid, line));
        }
    }
    found.sort_unstable();
    found
}

/// Those of a pod whose command line has a word of their program: its run directory is in it.
pub fn processes_of(dir: &Path, pod: &str, word: &str) -> Vec<u32> {
    processes(dir)
        .into_iter()
        .filter(|(_, line)| line.contains(&format!("/pods/{pod}/")) && line.contains(word))
        .map(|(pid, _)| pid)
        .collect()
}

/// How many processes have this parent.
pub fn children(parent: u32) -> usize {
    let line = format!("PPid:\t{parent}\n");
    let processes = names(Path::new("/proc"));
    let statuses = processes
        .iter()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
    statuses.filter(|status| status.contains(&line)).count()
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn cgroups(dir: &Path, found: &mut BTreeSet<String>) {
    for name in names(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            found.insert(format!("cgroup {}", path.display()));
            cgroups(&path, found);
        }
    }
}
