//! Trees of files that an image has or a container leaves, which may have any shape: copied and removed.

use std::{
    collections::HashMap,
    ffi::{CStr, OsStr},
    fs::File,
    io::{self, Read, Seek},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, SeekFrom, Stat, Timespec,
        Timestamps, XattrFlags, chmodat, chownat, fchmod, fchown, fgetxattr, fgetxattr_query,
        flistxattr, flistxattr_query, fsetxattr, fstat, futimens, linkat, mkdir, mkdirat, mknodat,
        openat, readlinkat, renameat_with, rmdir, seek, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
    path::Arg,
    process::{Gid, Uid},
};

/// How deep a tree may be that is copied: each directory on the way takes two descriptors.
const DEEPEST: usize = 200;

/// Why a tree could not be copied.
#[derive(Debug, thiserror::Error)]
#[error("copy {path} of it")]
pub(crate) struct CopyError {
    /// What was copied, from the tree's top on.
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Copies the directory `from` to `to`, which must not be there, with all that is in it: contents (holes
/// stay such), owners, modes, times, extended attributes, hard links. Nobody else may change either.
///
/// # Errors
/// The first entry that could not be copied; what was copied before it stays.
pub(crate) fn copy(from: impl AsFd, to: &Path) -> Result<(), CopyError> {
    let begin = || -> io::Result<(OwnedFd, OwnedFd)> {
        let from = open(from, ".")?;
        mkdir(to, Mode::RWXU)?;
        Ok((from, open(CWD, to)?))
    };
    let (from, top) = begin().map_err(|source| CopyError {
        path: PathBuf::from("/"),
        source,
    })?;
    let mut copier = Copier {
        top: &top,
        links: HashMap::new(),
        at: PathBuf::new(),
    };
    copier
        .directory(from, &top, DEEPEST)
        .map_err(|source| CopyError {
            path: Path::new("/").join(&copier.at),
            source,
        })
}

struct Copier<'a> {
    top: &'a OwnedFd,
    /// Where the first name of a file with several was copied to.
    links: HashMap<(u64, u64), PathBuf>,
    /// What is being copied, below the top.
    at: PathBuf,
}

impl Copier<'_> {
    /// Copies what is in a directory, and then what it is.
    fn directory(&mut self, from: OwnedFd, to: &OwnedFd, deepest: usize) -> io::Result<()> {
        let deepest = deepest.checked_sub(1).ok_or(Errno::LOOP)?;
        let mut entries = Dir::new(from)?;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.at.push(OsStr::from_bytes(name.to_bytes()));
            let from = entries.fd()?;
            let is = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(is.st_mode) == FileType::Directory {
                mkdirat(to, name, Mode::RWXU)?;
                self.directory(open(from, name)?, &open(to, name)?, deepest)?;
            } else {
                self.other(from, to, name, &is)?;
            }
            self.at.pop();
        }
        let from = entries.fd()?;
        describe(from, to, &fstat(from)?)
    }

    /// Copies what is no directory.
    fn other(&mut self, from: impl AsFd, to: &OwnedFd, name: &CStr, is: &Stat) -> io::Result<()> {
        if is.st_nlink > 1 {
            let file = (is.st_dev, is.st_ino);
            if let Some(first) = self.links.get(&file) {
                return Ok(linkat(self.top, first, to, name, AtFlags::empty())?);
            }
            self.links.insert(file, self.at.clone());
        }
        let no_link = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(is.st_mode) {
            FileType::RegularFile => {
                let from = openat(&from, name, OFlags::RDONLY | no_link, Mode::empty())?;
                let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | no_link;
                let to = openat(to, name, new, Mode::RUSR | Mode::WUSR)?;
                let (from, to) = (File::from(from), File::from(to));
                contents(&from, &to)?;
                describe(&from, &to, is)
            }
            FileType::Symlink => {
                let target = readlinkat(&from, name, Vec::new())?;
                symlinkat(target, to, name)?;
                describe_name(to, name, is)
            }
            kind => {
                mknodat(to, name, kind, Mode::from_raw_mode(is.st_mode), is.st_rdev)?;
                describe_name(to, name, is)
            }
        }
    }
}

/// Copies what a file holds, but for its holes.
fn contents(from: &File, mut to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    let mut at = 0;
    loop {
        let data = match seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => return Ok(()),
            data => data?,
        };
        at = seek(from, SeekFrom::Hole(data))?;
        for mut file in [from, to] {
            file.seek(io::SeekFrom::Start(data))?;
        }
        io::copy(&mut from.take(at.saturating_sub(data)), &mut to)?;
    }
}

/// Gives an open copy the owners, mode, attributes and times of what it is one of.
fn describe(from: impl AsFd, to: impl AsFd, is: &Stat) -> io::Result<()> {
    fchown(
        &to,
        Some(Uid::from_raw(is.st_uid)),
        Some(Gid::from_raw(is.st_gid)),
    )?;
    fchmod(&to, Mode::from_raw_mode(is.st_mode & 0o7777))?;
    let mut names = vec![0; flistxattr_query(&from)?];
    let length = flistxattr(&from, names.as_mut_slice())?;
    names.truncate(length);
    for name in names.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let mut value = vec![0; fgetxattr_query(&from, name)?];
        let length = fgetxattr(&from, name, value.as_mut_slice())?;
        value.truncate(length);
        match fsetxattr(&to, name, &value, XattrFlags::empty()) {
            // The file system has none of this kind.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(futimens(&to, &times(is))?)
}

/// The same for what has no contents, by its name.
fn describe_name(to: &OwnedFd, name: &CStr, is: &Stat) -> io::Result<()> {
    let itself = AtFlags::SYMLINK_NOFOLLOW;
    let (uid, gid) = (Uid::from_raw(is.st_uid), Gid::from_raw(is.st_gid));
    chownat(to, name, Some(uid), Some(gid), itself)?;
    if FileType::from_raw_mode(is.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(is.st_mode & 0o7777);
        chmodat(to, name, mode, AtFlags::empty())?;
    }
    Ok(utimensat(to, name, &times(is), itself)?)
}

fn times(is: &Stat) -> Timestamps {
    let time = |tv_sec, tv_nsec: u64| Timespec {
        tv_sec,
        // Below a thousand millions.
        tv_nsec: i64::try_from(tv_nsec).unwrap_or_default(),
    };
    Timestamps {
        last_access: time(is.st_atime, is.st_atime_nsec),
        last_modification: time(is.st_mtime, is.st_mtime_nsec),
    }
}

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
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        thread,
    };

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
            symlinkat(&outside, &at, "link").unwrap();
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

    #[test]
    fn a_copy_is_what_it_is_a_copy_of() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        fs::create_dir_all(from.join("d/e")).unwrap();
        fs::set_permissions(from.join("d"), Permissions::from_mode(0o3751)).unwrap();
        fs::set_permissions(&from, Permissions::from_mode(0o1700)).unwrap();
        fs::write(from.join("d/file"), "content").unwrap();
        fs::set_permissions(from.join("d/file"), Permissions::from_mode(0o4410)).unwrap();
        fs::hard_link(from.join("d/file"), from.join("d/e/again")).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        fs::write(from.join("empty"), "").unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        std::os::unix::fs::FileExt::write_at(&sparse, b"x", 8 << 20).unwrap();
        sparse.set_len(16 << 20).unwrap();
        let fifo = FileType::Fifo;
        mknodat(CWD, from.join("fifo"), fifo, Mode::from_raw_mode(0o620), 0).unwrap();
        let past = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 5);
        File::open(&from).unwrap().set_modified(past).unwrap();
        // Where attributes of users can't be, the test of the agent's containers has them.
        let file = File::open(from.join("d/file")).unwrap();
        let attribute = fsetxattr(&file, "user.a", b"value", XattrFlags::empty()).is_ok();

        copy(File::open(&from).unwrap(), &to).unwrap();
        for name in [
            "",
            "d",
            "d/e",
            "d/file",
            "d/e/again",
            "link",
            "empty",
            "sparse",
            "fifo",
        ] {
            let is = |top: &Path| {
                let is = fs::symlink_metadata(top.join(name)).unwrap();
                let length = if is.is_dir() { 0 } else { is.len() };
                (
                    is.mode(),
                    is.uid(),
                    is.gid(),
                    length,
                    is.mtime(),
                    is.mtime_nsec(),
                    is.nlink(),
                )
            };
            assert_eq!(is(&from), is(&to), "{name}");
        }
        assert_eq!(fs::read(to.join("d/e/again")).unwrap(), b"content");
        assert_eq!(
            fs::read(from.join("sparse")).unwrap(),
            fs::read(to.join("sparse")).unwrap()
        );
        assert!(fs::metadata(to.join("sparse")).unwrap().blocks() < 1 << 10);
        assert_eq!(
            fs::read_link(to.join("link")).unwrap(),
            Path::new("/nowhere")
        );
        if attribute {
            let mut value = [0; 5];
            let file = File::open(to.join("d/file")).unwrap();
            assert_eq!(fgetxattr(&file, "user.a", value.as_mut_slice()), Ok(5));
            assert_eq!(&value, b"value");
        }
    }

    #[test]
    fn what_is_nested_too_deep_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        let mut at = open(CWD, &top).unwrap();
        for _ in 0..DEEPEST {
            mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = open(&at, "d").unwrap();
        }
        let error = copy(open(CWD, &top).unwrap(), &dir.path().join("copy")).unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::ELOOP));
        assert!(error.path.starts_with("/d/d/d"), "{error}");
    }
}
