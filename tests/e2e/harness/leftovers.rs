//! What a pod could leave on the host, listed before and after.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Everything on the host that a pod may make, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Lists what is there now. `roots` are directories whose content counts.
    pub fn list(roots: &[PathBuf]) -> Self {
        let mut found = BTreeSet::new();
        for pid in names(Path::new("/proc")).filter(|n| n.parse::<u32>().is_ok()) {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // What follows the name is what the process is about.
            let program = command.trim().split(':').next().unwrap_or_default();
            if matches!(program, "hull-vmm" | "hull-fs") {
                found.insert(format!("process {pid} {program}"));
            }
        }
        found.extend(names(Path::new("/run/netns")).map(|n| format!("netns {n}")));
        // The bridge belongs to the network, not to a pod.
        found.extend(
            names(Path::new("/sys/class/net"))
                .filter(|n| !n.starts_with("hull-e2e"))
                .map(|n| format!("link {n}")),
        );
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        found.extend(
            mounts
                .lines()
                .filter(|l| !l.contains("/.X") && !l.starts_with("tracefs"))
                .map(|l| format!("mount {}", l.split(' ').nth(1).unwrap_or(l))),
        );
        tree(Path::new("/sys/fs/cgroup"), &mut found, "cgroup");
        for root in roots {
            tree(root, &mut found, "file");
        }
        Self(found)
    }

    /// What is in `self` and not in `before`.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// Waits until nothing is left since `before`: processes take a moment to go.
pub fn assert_none(before: &Leftovers, roots: &[PathBuf]) {
    let mut left = Vec::new();
    for _ in 0..100 {
        left = Leftovers::list(roots).since(before);
        if left.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("left on the host: {left:#?}");
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

fn tree(dir: &Path, found: &mut BTreeSet<String>, what: &str) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        // Files of a cgroup come and go with controllers; its directories count.
        if is_dir || what == "file" {
            found.insert(format!("{what} {}", path.display()));
        }
        if is_dir {
            tree(&path, found, what);
        }
    }
}
