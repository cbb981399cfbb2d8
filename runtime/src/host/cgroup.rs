//! Control groups: version 2 alone, at the usual place.

use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::finding::Finding;

const ADVICE: &str = "boot with `systemd.unified_cgroup_hierarchy=1`, or mount cgroup2 on \
                      /sys/fs/cgroup";

/// Tells which version is mounted.
pub(super) fn check(mount: &Path) -> Finding {
    match statfs(mount) {
        Ok(stat) if stat.filesystem_type() == CGROUP2_SUPER_MAGIC => {
            Finding::Good(format!("version 2 on {}", mount.display()))
        }
        Ok(_) if mount.join("unified").is_dir() || mount.join("memory").is_dir() => Finding::bad(
            "version 1 (or both versions); Hull needs version 2 alone",
            ADVICE,
        ),
        Ok(_) => Finding::bad(format!("none on {}", mount.display()), ADVICE),
        Err(error) => Finding::bad(format!("look at {}: {error}", mount.display()), ADVICE),
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
        std::fs::create_dir(directory.path().join("memory")).unwrap();
        assert!(detail(directory.path()).starts_with("version 1"));
        assert!(detail(Path::new("/nonexistent")).starts_with("look at "));
    }
}
