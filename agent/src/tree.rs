//! Removes the tree of files that a container leaves, which may have any shape.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, openat, renameat_with, rmdir, unlinkat},
    io::Errno,
    path::Arg,
};

/// Removes a directory with all in it; no link is followed. Directories come up to its top before
/// they are emptied: however deep they are nested, it takes no more stack and descriptors.
///
/// # Errors
/// When something can't be removed, or `path` is not there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let top = open(CWD, path)?;
    let mut moved = 0_u64;
    let mut is_empty = false;
    while !is_empty {
        is_empty = true;
        each(&top, |name| {
            is_empty = false;
            if unlink(&top, name)? {
                return Ok(());
            }
            let below = open(&top, name)?;
            each(&below, |inner| {
                while !unlink(&below, inner)? {
                    moved = moved.wrapping_add(1);
                    let to = format!(".removed-{moved}");
                    let only_new = RenameFlags::NOREPLACE;
                    match renameat_with(&below, inner, &top, to, only_new) {
                        Ok(()) => break,
                        Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(())
            })?;
            Ok(unlinkat(&top, name, AtFlags::REMOVEDIR)?)
        })?;
    }
    Ok(rmdir(path)?)
}

fn open(directory: impl AsFd, name: impl Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?)
}

/// Does something with each name that is in a directory.
fn each(directory: &OwnedFd, mut work: impl FnMut(&CStr) -> io::Result<()>) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            work(name)?;
        }
    }
    Ok(())
}

/// Removes a name; tells whether it is gone, and else that of a directory.
fn unlink(directory: &OwnedFd, name: &CStr) -> io::Result<bool> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::ISDIR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, thread};

    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn a_tree_is_removed_however_deep_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let [path, outside] = ["tree", "outside"].map(|name| dir.path().join(name));
        for made in [&path, &outside, &path.join(".removed-2/x")] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(outside.join("file"), "").unwrap();
        let mut at = open(CWD, &path).unwrap();
        for _ in 0..1000 {
            mkdirat(&at, "d", Mode::RWXU).unwrap();
            rustix::fs::symlinkat(&outside, &at, "link").unwrap();
            at = open(&at, "d").unwrap();
        }
        // A thread of the agent has 32 times that.
        let thread = thread::Builder::new().stack_size(64 << 10);
        let tree = path.clone();
        let removed = thread.spawn(move || remove(&tree)).unwrap();
        removed.join().unwrap().unwrap();
        assert!(!path.exists() && outside.join("file").exists());
        let absent = remove(&path).unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
        symlink(&outside, &path).unwrap();
        remove(&path).unwrap_err();
        assert!(outside.join("file").exists());
    }
}
