//! Paths that a container shall not read or write (OCI runtime specification, "Masked Paths", "Readonly
//! Paths").

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::fs::fstatfs;

use super::{
    error::{StepError, doing_to},
    mounts::{PROC, copy_of, nothing, put},
    options::RDONLY,
    root::{Kind, Root},
};
use crate::sys::{MountAttr, change_mount};

/// Makes each of `paths` read-only, with what is mounted below it. What is missing needs nothing.
pub(super) fn read_only(root: &Root, paths: &[String]) -> Result<(), StepError> {
    let mut attr = MountAttr::default();
    attr.add(RDONLY);
    for path in paths.iter().map(Path::new) {
        let protect = || -> io::Result<()> {
            let Some(target) = find(root, path)? else {
                return Ok(());
            };
            let copy = copy_of(&target, true)?;
            change_mount(&copy, attr, true)?;
            put(copy, target)
        };
        protect().map_err(doing_to("make read-only", path))?;
    }
    Ok(())
}

/// Puts `null`, the guest's /dev/null, on each of `paths` that is no directory, and an empty
/// directory on the others.
pub(super) fn mask(root: &Root, paths: &[String], null: &OwnedFd) -> Result<(), StepError> {
    for path in paths.iter().map(Path::new) {
        let mask = || -> io::Result<()> {
            let Some(target) = find(root, path)? else {
                return Ok(());
            };
            match Kind::of(&target)? {
                Kind::Directory => put(nothing()?, target),
                Kind::File => put(copy_of(null, false)?, target),
            }
        };
        mask().map_err(doing_to("mask", path))?;
    }
    Ok(())
}

/// Finds `path`; `None`: there is none. What is below /proc must be the kernel's.
fn find(root: &Root, path: &Path) -> io::Result<Option<OwnedFd>> {
    let found = match root.find(path) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            return Ok(None);
        }
        found => found?,
    };
    if path.starts_with("/proc") && fstatfs(&found)?.f_type != PROC {
        return Err(io::Error::other("it is not the kernel's"));
    }
    Ok(Some(found))
}
