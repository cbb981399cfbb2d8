//! Where images and pods' disks are kept.

use std::{io, path::Path};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::statvfs::statvfs,
};

use super::finding::Finding;

/// Room for a small image and the disks of a few pods, in MiB.
const ROOM_MIB: u64 = 1024;

/// Whether the file system has room, and takes the space of a hole back: else disks of pods only grow.
pub(super) fn check(root: &Path) -> Finding {
    let there = root.ancestors().find(|dir| dir.is_dir()).unwrap_or(root);
    match look(there) {
        Ok((free_mib, _)) if free_mib < ROOM_MIB => Finding::bad(
            format!("{free_mib} MiB are free in {}", there.display()),
            format!("make room for {ROOM_MIB} MiB, or set `root` to a larger disk"),
        ),
        Ok((_, false)) => Finding::bad(
            format!(
                "the file system of {} has no holes in files",
                there.display()
            ),
            "set `root` to ext4, xfs, btrfs or tmpfs",
        ),
        Ok((free_mib, true)) => {
            Finding::Good(format!("{free_mib} MiB are free in {}", there.display()))
        }
        Err(error) => Finding::bad(
            format!("write in {}: {error}", there.display()),
            "mount it read-write, and run as root",
        ),
    }
}

/// Free MiB, and whether holes can be punched.
fn look(directory: &Path) -> io::Result<(u64, bool)> {
    let stat = statvfs(directory)?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let file = tempfile::tempfile_in(directory)?;
    file.set_len(1 << 16)?;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok((free >> 20, fallocate(&file, hole, 0, 1 << 12).is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_need_not_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let (free_mib, holes) = look(dir.path()).unwrap();
        assert!(holes);
        let found = check(&dir.path().join("not/there/yet"));
        assert_eq!(found.is_good(), free_mib >= ROOM_MIB, "{found:?}");
        assert!(!check(Path::new("/proc")).is_good());
    }
}
