//! Control groups: version 2 alone, at the usual place.

use std::{fs, path::Path};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::finding::Finding;

const ADVICE: &str = "boot with `systemd.unified_cgroup_hierarchy=1`, or mount cgroup2 on \
                      /sys/fs/cgroup";

/// What pods are limited and counted by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Tells which version is mounted.
pub(super) fn check(mount: &Path) -> Finding {
    match statfs(mount) {
        Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => controllers(mount),
        Ok(_) if mount.join("unified").is_dir() || mount.join("memory").is_dir() => Finding::bad(
            "version 1 (or both versions); Hull needs version 2 alone",
            ADVICE,
        ),
        Ok(_) => Finding::bad(format!("none on {}", mount.display()), ADVICE),
        Err(error) => Finding::bad(format!("look at {}: {error}", mount.display()), ADVICE),
    }
}

fn controllers(mount: &Path) -> Finding {
    let there = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    let mut needed = CONTROLLERS.into_iter();
    match needed.find(|name| !there.split_ascii_whitespace().any(|other| other == *name)) {
        None => Finding::Good(format!("version 2 on {}", mount.display())),
        Some(name) => Finding::bad(
            format!("no controller {name} on {}", mount.display()),
            format!("boot with `cgroup_enable={name}`, and without `cgroup_disable={name}`"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let detail = |path: &Path| match check(path) {
            Finding::Bad { detail, .. } => detail,
            Finding::Good(detail) => panic!("{detail}"),
        };
        assert!(detail(directory.path()).starts_with("none on "));
        fs::create_dir(directory.path().join("memory")).unwrap();
        assert!(detail(directory.path()).starts_with("version 1"));
        assert!(detail(Path::new("/nonexistent")).starts_with("look at "));
        fs::write(directory.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        assert!(!controllers(directory.path()).is_good());
        fs::write(
            directory.path().join("cgroup.controllers"),
            "cpu io memory pids\n",
        )
        .unwrap();
        assert!(controllers(directory.path()).is_good());
    }
}
