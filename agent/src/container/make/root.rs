//! Paths of a container, found by descriptors: nothing in it, whatever it is exchanged for meanwhile,
//! leads out of its root.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Component, Path},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat, openat2, readlinkat},
    io::Errno,
};

/// Where devices are, in a container and in the guest.
pub(crate) const DEV: &str = "/dev";
/// Most links on the way to one path (`MAXSYMLINKS` of Linux).
const LINKS: u32 = 40;
/// How often a path is tried that others change meanwhile.
const TRIES: u32 = 64;
/// Mode of directories and files that are made for a mount to be on, as runc has it.
const MODE: Mode = Mode::from_raw_mode(0o755);

/// What is wanted at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// Anything else, a device too.
    File,
}

impl Kind {
    /// What is behind a descriptor.
    pub(crate) fn of(file: impl AsFd) -> io::Result<Self> {
        Ok(match FileType::from_raw_mode(fstat(file)?.st_mode) {
            FileType::Directory => Self::Directory,
            _ => Self::File,
        })
    }
}

/// A container's root directory.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

impl Root {
    /// The directory `path` of the calling process.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(open(path, flags, Mode::empty())?))
    }

    /// Returns whether `file` is the root itself.
    pub(super) fn is(&self, file: impl AsFd) -> io::Result<bool> {
        let (root, file) = (fstat(&self.0)?, fstat(file)?);
        Ok((root.st_dev, root.st_ino) == (file.st_dev, file.st_ino))
    }

    /// Opens what is at `path`. Links are followed as a process in the container would.
    pub(crate) fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, ResolveFlags::NO_MAGICLINKS)
    }

    /// The same, but there must be no links.
    pub(super) fn find_itself(&self, path: &Path) -> io::Result<OwnedFd> {
        self.resolve(path, ResolveFlags::NO_SYMLINKS)
    }

    fn resolve(&self, path: &Path, flags: ResolveFlags) -> io::Result<OwnedFd> {
        let how = OFlags::PATH | OFlags::CLOEXEC;
        for _ in 0..TRIES {
            // `..` beside a rename: once more (openat2(2)).
            match openat2(
                &self.0,
                path,
                how,
                Mode::empty(),
                ResolveFlags::IN_ROOT | flags,
            ) {
                Err(Errno::AGAIN) => {}
                found => return Ok(found?),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Opens what is at `path`, and makes what is missing of it: directories, and last what is wanted.
    /// A link that leads nowhere is followed, and where it leads is made.
    ///
    /// # Errors
    /// EISDIR or ENOTDIR: there is something of another kind.
    pub(super) fn find_or_make(&self, path: &Path, wanted: Kind) -> io::Result<OwnedFd> {
        let found = match self.find(path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => self.make(path, wanted)?,
            found => found?,
        };
        match (Kind::of(&found)?, wanted) {
            (Kind::Directory, Kind::File) => Err(Errno::ISDIR.into()),
            (Kind::File, Kind::Directory) => Err(Errno::NOTDIR.into()),
            _ => Ok(found),
        }
    }

    /// The same, but nothing on the way may be a link.
    pub(super) fn find_or_make_itself(&self, path: &Path, wanted: Kind) -> io::Result<OwnedFd> {
        match self.find_itself(path) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                self.find_or_make(path, wanted)?;
                self.find_itself(path)
            }
            found => found,
        }
    }

    /// Goes from one directory to the next, since the kernel makes nothing below a link that leads
    /// nowhere.
    fn make(&self, path: &Path, wanted: Kind) -> io::Result<OwnedFd> {
        let root = || self.0.try_clone();
        // The directory that was reached, and those above it: the kernel's `..` could be another by now.
        let mut way = vec![root()?];
        let mut rest = components(path);
        let (mut links, mut tries) = (0, 0);
        while let Some(name) = rest.pop_front() {
            if name == OsStr::new("..") {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let here = way.last().ok_or(Errno::NOENT)?;
            let look = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let found = match openat(here, &name, look, Mode::empty()) {
                Err(Errno::NOENT) => {
                    tries += 1;
                    if tries > TRIES {
                        return Err(Errno::AGAIN.into());
                    }
                    let kind = if rest.is_empty() {
                        wanted
                    } else {
                        Kind::Directory
                    };
                    make_one(here.as_fd(), &name, kind)?;
                    rest.push_front(name);
                    continue;
                }
                found => found?,
            };
            match FileType::from_raw_mode(fstat(&found)?.st_mode) {
                FileType::Symlink => {
                    links += 1;
                    if links > LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target =
                        OsString::from_vec(readlinkat(&found, "", Vec::new())?.into_bytes());
                    let target = Path::new(&target);
                    if target.is_absolute() {
                        way.truncate(1);
                    }
                    for name in components(target).into_iter().rev() {
                        rest.push_front(name);
                    }
                }
                FileType::Directory => way.push(found),
                _ if rest.is_empty() => return Ok(found),
                _ => return Err(Errno::NOTDIR.into()),
            }
        }
        way.pop().map_or_else(root, Ok)
    }
}

impl From<OwnedFd> for Root {
    /// A directory that was opened with `O_PATH`.
    fn from(directory: OwnedFd) -> Self {
        Self(directory)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn components(path: &Path) -> VecDeque<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    });
    names.collect()
}

/// Makes `name`; who was quicker is looked at like anything else.
fn make_one(dir: BorrowedFd<'_>, name: &OsStr, kind: Kind) -> io::Result<()> {
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = match kind {
        Kind::Directory => mkdirat(dir, name.as_bytes(), MODE),
        Kind::File => openat(dir, name.as_bytes(), new, MODE).map(drop),
    };
    match made {
        Err(Errno::EXIST) | Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::PathBuf};

    use super::*;

    /// A root in a directory that has something beside it.
    struct Case {
        dir: tempfile::TempDir,
        root: Root,
    }

    impl Case {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("root")).unwrap();
            fs::write(dir.path().join("outside"), "").unwrap();
            let root = Root::open(&dir.path().join("root")).unwrap();
            Self { dir, root }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir
                .path()
                .canonicalize()
                .unwrap()
                .join("root")
                .join(path)
        }

        fn made(&self, path: &str, kind: Kind) -> Result<PathBuf, i32> {
            use std::os::fd::AsRawFd;
            let found = self.root.find_or_make(Path::new(path), kind);
            let found = found.map_err(|e| e.raw_os_error().unwrap())?;
            Ok(fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap())
        }
    }

    #[test]
    fn what_is_missing_is_made() {
        let case = Case::new();
        assert_eq!(case.made("/a/b/c", Kind::Directory), Ok(case.at("a/b/c")));
        assert_eq!(case.made("/a/b/file", Kind::File), Ok(case.at("a/b/file")));
        assert!(case.at("a/b/file").is_file());
        assert_eq!(case.made("a/../a/./b", Kind::Directory), Ok(case.at("a/b")));
        assert_eq!(
            case.made("/", Kind::Directory),
            Ok(case.dir.path().canonicalize().unwrap().join("root"))
        );
    }

    #[test]
    fn links_that_lead_nowhere_are_followed_in_the_root() {
        let case = Case::new();
        fs::create_dir(case.at("etc")).unwrap();
        for (link, target) in [
            ("etc/localtime", "/usr/share/zoneinfo/UTC"),
            ("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
            ("etc/up", "../../../../../outside"),
            ("var", "etc/../real"),
            ("chain", "chain2"),
            ("chain2", "/chain3/x"),
        ] {
            symlink(target, case.at(link)).unwrap();
        }
        let made = |path, kind| case.made(path, kind).unwrap();
        assert_eq!(
            made("/etc/localtime", Kind::File),
            case.at("usr/share/zoneinfo/UTC")
        );
        let resolv = case.at("run/systemd/resolve/stub-resolv.conf");
        assert_eq!(made("/etc/resolv.conf", Kind::File), resolv);
        assert_eq!(made("/etc/up", Kind::File), case.at("outside"));
        assert_eq!(made("/var/run/x", Kind::Directory), case.at("real/run/x"));
        assert_eq!(made("/chain", Kind::Directory), case.at("chain3/x"));
        // Once more, and nothing changes.
        assert_eq!(
            made("/etc/localtime", Kind::File),
            case.at("usr/share/zoneinfo/UTC")
        );
        let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
        assert_eq!(names(case.dir.path()), 2);
        assert_eq!(fs::read(case.dir.path().join("outside")).unwrap(), b"");
    }

    #[test]
    fn what_is_of_another_kind_is_an_error() {
        let case = Case::new();
        fs::create_dir(case.at("dir")).unwrap();
        fs::write(case.at("file"), "").unwrap();
        symlink("/file/below", case.at("below")).unwrap();
        symlink("loop", case.at("loop")).unwrap();
        symlink("/proc/self/cwd", case.at("magic")).unwrap();
        assert_eq!(case.made("/dir", Kind::File), Err(libc::EISDIR));
        assert_eq!(case.made("/file", Kind::Directory), Err(libc::ENOTDIR));
        assert_eq!(case.made("/file/x", Kind::File), Err(libc::ENOTDIR));
        assert_eq!(case.made("/below", Kind::File), Err(libc::ENOTDIR));
        assert_eq!(case.made("/loop", Kind::File), Err(libc::ELOOP));
        // A name like any other in here.
        assert_eq!(
            case.made("/magic", Kind::Directory),
            Ok(case.at("proc/self/cwd"))
        );
    }

    #[test]
    fn a_link_can_be_refused() {
        let case = Case::new();
        symlink("/real", case.at("proc")).unwrap();
        let itself = |path| {
            case.root
                .find_or_make_itself(Path::new(path), Kind::Directory)
        };
        assert_eq!(
            itself("/proc").unwrap_err().raw_os_error(),
            Some(libc::ELOOP)
        );
        assert!(!case.at("real").exists());
        itself("/sys").unwrap();
        assert!(case.at("sys").is_dir());
    }
}
