//! What a share is to the kernel: a detached clone of the host's mounts.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use hull_proto_vmm::fs::{Access, ErrorKind, Propagation, Share};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// Why a path can't be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The path is not there.
    #[error("{} does not exist on the host", .0.display())]
    NotFound(PathBuf),
    /// A guest has a kernel of its own, and the other end would be in the host's.
    #[error("{} is a {kind}, which can't be shared with a VM", path.display())]
    Special {
        /// The path.
        path: PathBuf,
        /// The file's kind.
        kind: &'static str,
    },
    /// The path is not absolute.
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
    /// The kernel refused.
    #[error("{action} {}", path.display())]
    Kernel {
        /// The call, as a verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ShareError {
    /// The kind by which the daemon knows it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::Special { .. } => ErrorKind::Special,
            Self::Relative(_) => ErrorKind::Invalid,
            Self::Kernel { .. } => ErrorKind::Internal,
        }
    }
}

/// What a share shows: shares whose identities are equal show the same, whenever they were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    file: (u64, u64),
    access: Access,
    propagation: Propagation,
    /// The mount that it is in and all that are below it, as proc_pid_mountinfo(5) tells them: what
    /// is mounted there later is seen by later shares alone.
    mounts: Vec<Vec<u8>>,
    /// Which of them it is in. None may be, when another process unmounts it.
    own: Option<usize>,
}

impl Identity {
    fn of(place: &OwnedFd, file: (u64, u64), share: &Share) -> io::Result<Self> {
        let number = place.as_raw_fd();
        let path = fs::read_link(format!("/proc/self/fd/{number}"))?;
        let about = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let mount = about.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let mount = mount.map(str::trim).unwrap_or_default();
        let all = fs::read("/proc/self/mountinfo")?;
        let mut own = None;
        let mut mounts = Vec::new();
        for line in all.split(|byte| *byte == b'\n') {
            let Some(parsed) = MountLine::parse(line) else {
                continue;
            };
            let is_own = parsed.id == mount.as_bytes();
            if is_own {
                own = Some(mounts.len());
            }
            if is_own || parsed.point.starts_with(&path) {
                mounts.push(line.to_vec());
            }
        }
        Ok(Self {
            file,
            access: share.access,
            propagation: share.propagation,
            mounts,
            own,
        })
    }

    /// One of a share in a file system that is mounted as these lines say, of which `own` is the mount
    /// that it is in.
    #[cfg(test)]
    pub fn new(
        file: (u64, u64),
        access: Access,
        propagation: Propagation,
        mounts: Vec<Vec<u8>>,
        own: usize,
    ) -> Self {
        Self {
            file,
            access,
            propagation,
            mounts,
            own: Some(own),
        }
    }

    /// The mounts that it shows, as lines of proc_pid_mountinfo(5).
    pub fn mounts(&self) -> impl Iterator<Item = &[u8]> {
        self.mounts.iter().map(Vec::as_slice)
    }

    /// The one that it is in.
    #[must_use]
    pub fn mount(&self) -> Option<&[u8]> {
        self.mounts.get(self.own?).map(Vec::as_slice)
    }

    /// Whether mounts that the host makes later appear in it.
    #[must_use]
    pub fn follows_host(&self) -> bool {
        self.propagation == Propagation::Slave
    }
}

/// A line of proc_pid_mountinfo(5), as far as it matters here.
#[derive(Debug)]
pub struct MountLine<'a> {
    /// The mount's id.
    pub id: &'a [u8],
    /// Of the file system, `MAJOR:MINOR`.
    pub device: &'a [u8],
    /// Where it is mounted.
    pub point: PathBuf,
    /// The file system's type.
    pub kind: &'a [u8],
}

impl<'a> MountLine<'a> {
    /// Reads a line; none if it is not one.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let (id, device) = (fields.next()?, fields.nth(1)?);
        let point = unescape(fields.nth(1)?);
        // Optional fields end with a hyphen.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(Self {
            id,
            device,
            point,
            kind,
        })
    }
}

/// A path as proc_pid_mountinfo(5) writes it: space, tab, newline and backslash are octal.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| first == b'\\');
        let code = code.and_then(|code| u8::from_str_radix(str::from_utf8(code).ok()?, 8).ok());
        path.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(path).into()
}

/// Whether a file system is that of the host's devices.
fn is_of_devices(device: u64) -> bool {
    let of = |path| {
        let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        Some(fstat(&file).ok()?.st_dev)
    };
    of("/dev") == Some(device) && of("/") != Some(device)
}

/// A share that is mounted nowhere yet. It is gone when this is dropped.
#[derive(Debug)]
pub struct Detached {
    tree: OwnedFd,
    /// Whether it is a directory; else it is a regular file.
    pub directory: bool,
    /// By which equal shares are found.
    pub identity: Identity,
}

impl Detached {
    /// Clones what is at the share's path, with all that is mounted below it, in the mount
    /// namespace of the caller.
    ///
    /// # Errors
    /// [`ShareError`]
    pub fn clone_of(share: &Share) -> Result<Self, ShareError> {
        let path = &share.path;
        if !path.is_absolute() {
            return Err(ShareError::Relative(path.clone()));
        }
        let failed = |action| {
            let path = path.clone();
            move |error: Errno| ShareError::Kernel {
                action,
                path,
                source: error.into(),
            }
        };
        // What is looked at is what is cloned, whatever happens to the path meanwhile.
        let place =
            open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(
                |error| match error {
                    Errno::NOENT | Errno::NOTDIR => ShareError::NotFound(path.clone()),
                    error => failed("open")(error),
                },
            )?;
        let stat = fstat(&place).map_err(failed("look at"))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            // By another path, since the daemon lets the guest's stand for it.
            _ if is_of_devices(stat.st_dev) => Err("part of the host's /dev"),
            FileType::Directory => Ok(true),
            FileType::RegularFile => Ok(false),
            FileType::BlockDevice | FileType::CharacterDevice => Err("device"),
            FileType::Socket => Err("socket"),
            FileType::Fifo => Err("FIFO"),
            _ => Err("special file"),
        };
        let directory = kind.map_err(|kind| ShareError::Special {
            path: path.clone(),
            kind,
        })?;
        let file = (stat.st_dev, stat.st_ino);
        let identity = Identity::of(&place, file, share).map_err(|source| ShareError::Kernel {
            action: "find the mounts of",
            path: path.clone(),
            source,
        })?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(&place, "", flags).map_err(failed("clone mounts of"))?;
        let detached = Self {
            tree,
            directory,
            identity,
        };
        detached
            .restrict(share)
            .map_err(|source| ShareError::Kernel {
                action: "restrict the clone of",
                path: path.clone(),
                source,
            })?;
        Ok(detached)
    }

    fn restrict(&self, share: &Share) -> io::Result<()> {
        let readonly = libc::MOUNT_ATTR_RDONLY;
        // The server neither runs programs nor opens devices; the guest's kernel has rules of
        // its own, which these do not touch.
        let mut all = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        if share.access == Access::RecursiveReadOnly {
            all |= readonly;
        }
        let propagation = match share.propagation {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::Slave => libc::MS_SLAVE,
        };
        set_attributes(&self.tree, libc::AT_RECURSIVE, all, propagation)?;
        if share.access == Access::ReadOnly {
            set_attributes(&self.tree, 0, readonly, 0)?;
        }
        Ok(())
    }

    /// Mounts it at `target` in the mount namespace of the caller.
    ///
    /// # Errors
    /// What move_mount(2) says.
    pub fn mount(&self, target: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.tree, "", CWD, target, flags)?)
    }
}

/// mount_setattr(2), which rustix lacks.
fn set_attributes(
    tree: &OwnedFd,
    flags: libc::c_int,
    set: u64,
    propagation: libc::c_ulong,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, and `attributes` is readable memory of the size given;
    // the call changes nothing but mounts.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The mount namespace of a process.
#[derive(Debug)]
pub struct MountNamespace(File);

impl MountNamespace {
    /// Names that of the process with this pid, or `self`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of(process: &str) -> io::Result<Self> {
        File::open(format!("/proc/{process}/ns/mnt")).map(Self)
    }

    /// Moves the one thread of this process there; its root and working directory are then the
    /// root of that namespace.
    ///
    /// # Errors
    /// What setns(2) says: with several threads, that it is impossible.
    pub fn enter(&self) -> io::Result<()> {
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        Ok(move_into_link_name_space(
            self.0.as_fd(),
            Some(LinkNameSpaceType::Mount),
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mounts_are_read_as_they_are_written() {
        for (written, meant) in [
            ("/plain", "/plain"),
            (r"/a\040b\134c", r"/a b\c"),
            (r"/\9", r"/\9"),
            (r"/end\01", r"/end\01"),
        ] {
            assert_eq!(unescape(written.as_bytes()), Path::new(meant));
        }
    }

    #[test]
    fn shares_are_the_same_if_they_show_the_same() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::create_dir(dir.path().join("b")).unwrap();
        let identity = |name: &str, access| {
            let path = dir.path().join(name);
            let place = open(&path, OFlags::PATH, Mode::empty()).unwrap();
            let stat = fstat(&place).unwrap();
            let share = Share {
                path,
                access,
                propagation: Propagation::Private,
            };
            Identity::of(&place, (stat.st_dev, stat.st_ino), &share).unwrap()
        };
        let first = identity("a", Access::ReadWrite);
        assert_eq!(first.mounts.len(), 1, "the one that it is in");
        assert_eq!(first, identity("a", Access::ReadWrite));
        assert_ne!(first, identity("a", Access::ReadOnly));
        assert_ne!(first, identity("b", Access::ReadWrite));
    }
}
