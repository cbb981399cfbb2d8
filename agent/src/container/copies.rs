//! Copies of mounts, and who their files belong to.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, move_mount},
};

use super::make::copy;
use crate::sys;

/// Mounts that are gone when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Copies(Vec<PathBuf>);

impl Copies {
    /// Mounts `source` on `at`, with the ids of the user namespace `user` if there is one.
    pub(super) fn add(
        &mut self,
        source: &Path,
        at: &Path,
        user: Option<impl AsFd>,
    ) -> io::Result<()> {
        let tree = copy(CWD, source, false)?;
        if let Some(user) = user {
            sys::map_mount(&tree, user)?;
        }
        if fs::metadata(source)?.is_dir() {
            fs::create_dir(at)?;
        } else {
            fs::File::create_new(at)?;
        }
        self.0.push(at.to_owned());
        move_mount(&tree, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(())
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for path in &self.0 {
            // What can't be unmounted goes with the guest; what was not mounted is no mount.
            let _ = umount2(path, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(path).or_else(|_| fs::remove_file(path));
        }
    }
}
