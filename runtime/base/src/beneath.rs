//! Files below directories that others can write: pods write in volumes, log collectors in log
//! directories, a VMM that its guest has taken over in its run directory.
//!
//! No file there is used by its path alone, because a path may lead elsewhere each time. A directory is
//! opened once, and the files in it through [`Directory`], which follows no link and never leaves the
//! directory. A file's type is looked at before it is opened: opening a FIFO can block, and opening a
//! device can have an effect.
//!
//! All functions fail when the kernel refuses. A path that leads out of a [`Directory`], or over a link,
//! is refused too.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, fchmod, fstat,
        linkat, mkdirat, openat2, renameat_with, unlinkat,
    },
    io::Errno,
};
use tokio::net::UnixStream;

/// A directory that stays the same one, whatever happens to its path.
#[derive(Debug)]
pub struct Directory(OwnedFd);

impl Directory {
    /// Opens a directory by a path that only the administrator can change: links are followed.
    pub fn open(path: &Path) -> io::Result<Self> {
        Directory(hold(path)?).enter(Path::new("."))
    }

    /// Opens a directory at or below this one.
    pub fn enter(&self, path: &Path) -> io::Result<Self> {
        Ok(Self(self.at(path, OFlags::PATH | OFlags::DIRECTORY)?))
    }

    /// Opens a directory at or below this one, and makes the directories on the way that are absent.
    pub fn make(&self, path: &Path) -> io::Result<Self> {
        let mut made = self.enter(Path::new("."))?;
        for name in path.components() {
            let name = Path::new(name.as_os_str());
            made = match made.enter(name) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let mode = Mode::from_raw_mode(0o755);
                    match mkdirat(&made.0, name, mode) {
                        Ok(()) | Err(Errno::EXIST) => made.enter(name)?,
                        Err(error) => return Err(error.into()),
                    }
                }
                other => other?,
            };
        }
        Ok(made)
    }

    /// Opens a regular file below this directory.
    ///
    /// # Errors
    /// When it is no regular file.
    pub fn file(&self, path: &Path, access: OFlags) -> io::Result<File> {
        regular(&self.hold(path)?, access)
    }

    /// Makes a file, with this mode whatever the daemon's mask is.
    ///
    /// # Errors
    /// When something has the name already.
    pub fn create(&self, name: &Path, access: OFlags, mode: u32) -> io::Result<File> {
        let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        let file = openat2(&self.0, name, flags, mode, strictly())?;
        fchmod(&file, mode)?;
        Ok(file.into())
    }

    /// Opens a regular file as [`Self::file`] does, or makes it when it is absent.
    pub fn file_or_new(&self, name: &Path, access: OFlags, mode: u32) -> io::Result<File> {
        match self.file(name, access) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create(name, access, mode)
            }
            other => other,
        }
    }

    /// Makes a file, and removes what had its name before.
    ///
    /// # Errors
    /// When a directory has the name.
    pub fn replace(&self, name: &Path, access: OFlags, mode: u32) -> io::Result<File> {
        self.unlink(name)?;
        self.create(name, access, mode)
    }

    /// Makes a file that has no name until [`Self::link`].
    pub fn unnamed(&self, mode: u32) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        Ok(openat2(&self.0, ".", flags, mode, strictly())?.into())
    }

    /// Gives a file of [`Self::unnamed`] a name.
    ///
    /// # Errors
    /// When something has the name already.
    pub fn link(&self, file: &File, name: &Path) -> io::Result<()> {
        let (name, follow) = (only_name(name)?, AtFlags::SYMLINK_FOLLOW);
        Ok(linkat(CWD, path_of(file.as_fd()), &self.0, name, follow)?)
    }

    /// The names in this directory, in no order. Their number has no bound.
    pub fn names(&self) -> io::Result<impl Iterator<Item = io::Result<PathBuf>> + use<>> {
        let opened = self.at(Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let names = Dir::new(opened)?.map(|entry| {
            let name = entry?.file_name().to_bytes().to_owned();
            Ok(PathBuf::from(OsString::from_vec(name)))
        });
        let is_own = |name: &Path| name == Path::new(".") || name == Path::new("..");
        Ok(names.filter(move |name| !name.as_deref().is_ok_and(is_own)))
    }

    /// Removes everything in this directory. The directories in a directory are moved up into this one
    /// before they are emptied, so that nesting takes neither stack nor descriptors.
    pub fn clear(&self) -> io::Result<()> {
        let mut moved = 0_u64;
        let mut is_empty = false;
        while !is_empty {
            is_empty = true;
            for name in self.names()? {
                let name = name?;
                is_empty = false;
                if self.unlink(&name)? {
                    continue;
                }
                let below = self.enter(&name)?;
                for inner in below.names()? {
                    let inner = inner?;
                    while !below.unlink(&inner)? {
                        moved += 1;
                        let to = format!(".removed-{moved}");
                        let only_new = RenameFlags::NOREPLACE;
                        match renameat_with(&below.0, &inner, &self.0, to, only_new) {
                            Ok(()) => break,
                            Err(Errno::EXIST) => {}
                            Err(error) => return Err(error.into()),
                        }
                    }
                }
                unlinkat(&self.0, &name, AtFlags::REMOVEDIR)?;
            }
        }
        Ok(())
    }

    /// Removes a name unless it is a directory's; tells whether the name is free now.
    fn unlink(&self, name: &Path) -> io::Result<bool> {
        match unlinkat(&self.0, only_name(name)?, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::ISDIR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Holds a file of any type by a descriptor, without opening it (`O_PATH`).
    pub fn hold(&self, path: &Path) -> io::Result<OwnedFd> {
        self.at(path, OFlags::PATH | OFlags::NOFOLLOW)
    }

    fn at(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let itself = path.as_os_str().is_empty();
        let path = if itself { Path::new(".") } else { path };
        let flags = flags | OFlags::CLOEXEC;
        Ok(openat2(&self.0, path, flags, Mode::empty(), strictly())?)
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens the directory of a path that only the administrator can change; returns it with the last name.
pub fn split(path: &Path) -> io::Result<(Directory, &Path)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((Directory::open(parent)?, Path::new(name))),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Connects to a socket, whose directory only the administrator can change. The socket itself may have
/// become a link, which is not followed.
///
/// # Errors
/// When it is no socket.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let (directory, name) = split(path)?;
    let held = directory.hold(name)?;
    if file_type(&held)? != FileType::Socket {
        return Err(io::Error::other("it is no socket"));
    }
    UnixStream::connect(path_of(held.as_fd())).await
}

/// Removes a directory with all in it; no effect when it is absent. Only the administrator can change
/// the directory that it is in.
pub fn remove_dir(path: &Path) -> io::Result<()> {
    let removed = split(path).and_then(|(parent, name)| {
        parent.enter(name)?.clear()?;
        Ok(unlinkat(&parent, name, AtFlags::REMOVEDIR)?)
    });
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Holds a file of any type, by a path that only the administrator can change, without opening it:
/// links are followed.
pub fn hold(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a file that is held.
///
/// # Errors
/// When it is no regular file.
pub fn regular(held: impl AsFd, access: OFlags) -> io::Result<File> {
    if file_type(&held)? == FileType::RegularFile {
        reopen(held, access)
    } else {
        Err(io::Error::other("it is no regular file"))
    }
}

/// Opens a file that is held, of whatever type it is. That does not wait, not even for a process that has
/// a lease on the file (fcntl(2)).
pub fn reopen(held: impl AsFd, access: OFlags) -> io::Result<File> {
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path_of(held.as_fd()), flags, Mode::empty())?.into())
}

/// The type of a file that is held.
pub fn file_type(held: impl AsFd) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(fstat(held)?.st_mode))
}

/// A path that leads to a file that is held, as long as its descriptor is open.
pub fn path_of(held: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", held.as_raw_fd()).into()
}

/// Checks that a path is a single name. In longer paths the kernel follows links, except in
/// openat2(2).
fn only_name(path: &Path) -> io::Result<&OsStr> {
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) => Ok(name),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// No link is followed, and no other way leads out of the directory.
fn strictly() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
        thread,
    };

    use nix::unistd::mkfifo;

    use super::*;

    /// A directory that others write, and one beside it that they may not reach.
    struct Places {
        _dir: tempfile::TempDir,
        path: PathBuf,
        outside: PathBuf,
        directory: Directory,
    }

    impl Places {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let [path, outside] = ["inside", "outside"].map(|name| dir.path().join(name));
            fs::create_dir_all(path.join("sub")).unwrap();
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("victim"), "precious").unwrap();
            symlink(&outside, path.join("link")).unwrap();
            symlink("../outside", path.join("up")).unwrap();
            symlink(outside.join("victim"), path.join("file-link")).unwrap();
            symlink(outside.join("new"), path.join("dangling")).unwrap();
            mkfifo(&path.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
            let directory = Directory::open(&path).unwrap();
            Self {
                _dir: dir,
                path,
                outside,
                directory,
            }
        }
    }

    impl Drop for Places {
        fn drop(&mut self) {
            let names = fs::read_dir(&self.outside).map(Iterator::count);
            let text = fs::read(self.outside.join("victim"));
            if !thread::panicking() {
                assert_eq!((names.unwrap(), text.unwrap()), (1, b"precious".to_vec()));
            }
        }
    }

    #[test]
    fn no_link_is_followed_and_no_other_way_leads_out() {
        let places = Places::new();
        let Places { directory, .. } = &places;
        for path in [
            "link",
            "up",
            "..",
            "sub/../..",
            "/",
            "link/x",
            "file-link",
            "fifo",
        ] {
            directory.enter(Path::new(path)).expect_err(path);
            directory.make(Path::new(path)).expect_err(path);
        }
        let others = [
            "dangling",
            "link/victim",
            "up/new",
            "sub",
            "/etc/passwd",
            "sub/../../outside/x",
        ];
        for path in ["file-link", "fifo"].iter().chain(&others) {
            let path = Path::new(path);
            directory.file(path, OFlags::RDWR).unwrap_err();
            directory
                .file_or_new(path, OFlags::RDWR, 0o600)
                .unwrap_err();
            directory.create(path, OFlags::RDWR, 0o600).unwrap_err();
        }
        directory.make(Path::new("sub/a/b")).unwrap();
        let at = Path::new("sub/a/b/file");
        directory.file_or_new(at, OFlags::RDWR, 0o600).unwrap();
        directory.file_or_new(at, OFlags::RDWR, 0o600).unwrap();
    }

    #[test]
    fn what_is_held_is_opened_and_nothing_that_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "text").unwrap();
        let file = regular(hold(&path).unwrap(), OFlags::RDONLY).unwrap();
        assert_eq!(io::read_to_string(file).unwrap(), "text");
        regular(hold(dir.path()).unwrap(), OFlags::RDONLY).unwrap_err();
        regular(hold(Path::new("/dev/zero")).unwrap(), OFlags::RDONLY).unwrap_err();
    }

    #[test]
    fn a_file_takes_the_place_of_a_link() {
        let places = Places::new();
        let victim = Path::new("link/victim");
        places
            .directory
            .replace(victim, OFlags::WRONLY, 0o600)
            .unwrap_err();
        for name in ["file-link", "dangling", "link", "fifo"] {
            let name = Path::new(name);
            places
                .directory
                .replace(name, OFlags::WRONLY, 0o600)
                .unwrap();
            assert!(
                fs::symlink_metadata(places.path.join(name))
                    .unwrap()
                    .is_file()
            );
        }
        let sub = Path::new("sub");
        places
            .directory
            .replace(sub, OFlags::WRONLY, 0o600)
            .unwrap_err();
    }

    #[test]
    fn a_file_without_a_name_gets_one_that_is_free() {
        let places = Places::new();
        let file = places.directory.unnamed(0o600).unwrap();
        for name in ["file-link", "dangling", "fifo", "sub", "link/new"] {
            places
                .directory
                .link(&file, Path::new(name))
                .expect_err(name);
        }
        places.directory.link(&file, Path::new("new")).unwrap();
        places
            .directory
            .file(Path::new("new"), OFlags::RDONLY)
            .unwrap();
    }

    #[test]
    fn a_directory_that_is_exchanged_for_a_link_stays_what_was_opened() {
        let places = Places::new();
        let sub = places.directory.enter(Path::new("sub")).unwrap();
        fs::rename(places.path.join("sub"), places.path.join("moved")).unwrap();
        symlink(&places.outside, places.path.join("sub")).unwrap();
        sub.create(Path::new("file"), OFlags::WRONLY, 0o600)
            .unwrap();
        assert!(places.path.join("moved/file").is_file());
        places.directory.enter(Path::new("sub")).unwrap_err();
    }

    #[tokio::test]
    async fn only_a_socket_is_connected_to_and_by_no_link() {
        let places = Places::new();
        let _listener = UnixListener::bind(places.path.join("socket")).unwrap();
        symlink("socket", places.path.join("socket-link")).unwrap();
        connect(&places.path.join("socket")).await.unwrap();
        for name in ["socket-link", "fifo", "file-link", "absent"] {
            connect(&places.path.join(name)).await.expect_err(name);
        }
        let absent = connect(&places.path.join("absent")).await.unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_directory_is_removed_however_deep_it_is() {
        let places = Places::new();
        let mut at = Directory::open(&places.path.join("sub")).unwrap();
        for _ in 0..1000 {
            at = at.make(Path::new("d")).unwrap();
        }
        at.create(Path::new("file"), OFlags::WRONLY, 0o600).unwrap();
        for name in [".removed-1", ".removed-2/x"] {
            fs::create_dir_all(places.path.join(name)).unwrap();
        }
        // A thread of tokio has 32 times that.
        let path = places.path.clone();
        let thread = thread::Builder::new().stack_size(64 << 10);
        let removed = thread.spawn(move || remove_dir(&path)).unwrap();
        removed.join().unwrap().unwrap();
        assert!(!places.path.exists());
        remove_dir(&places.path).unwrap();
        symlink(&places.outside, &places.path).unwrap();
        remove_dir(&places.path).unwrap_err();
    }
}
