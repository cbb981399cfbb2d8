//! A process's terminal, which is one of its container's own.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, makedev, openat2},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
};

use super::{
    error::{StepError, doing},
    mounts::{copy_of, put},
    root::{Kind, Root},
};

/// `linux/magic.h`.
const DEVPTS: i64 = 0x1cd1;
/// What makes a terminal: one in each file system of them.
const PTMX: &str = "dev/pts/ptmx";
const CONSOLE: &str = "/dev/console";

/// Both ends of a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The agent's end.
    pub(crate) master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Makes one of the container whose root this is.
    pub(crate) fn new(root: &Root) -> Result<Self, StepError> {
        let open = || -> io::Result<Self> {
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
            let master = openat2(root, PTMX, flags, Mode::empty(), resolve)?;
            let found = fstat(&master)?;
            let is_device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice;
            if fstatfs(&master)?.f_type != DEVPTS || !is_device || found.st_rdev != makedev(5, 2) {
                return Err(io::Error::other("it does not make terminals"));
            }
            unlockpt(&master)?;
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let slave = ioctl_tiocgptpeer(&master, flags)?;
            Ok(Self { master, slave })
        };
        open().map_err(doing("open /dev/pts/ptmx"))
    }

    /// Makes the one of a container's first process, and has it at /dev/console.
    pub(super) fn of_container(root: &Root) -> Result<Self, StepError> {
        let terminal = Self::new(root)?;
        let place = || -> io::Result<()> {
            let console = root.find_or_make_itself(Path::new(CONSOLE), Kind::File)?;
            put(copy_of(terminal.slave.as_fd(), false)?, console)
        };
        place().map_err(doing("mount the terminal on /dev/console"))?;
        Ok(terminal)
    }

    /// Makes it that of the calling process's session, and its standard streams.
    pub(super) fn take(self) -> Result<(), StepError> {
        let take = || -> rustix::io::Result<()> {
            ioctl_tiocsctty(&self.slave)?;
            rustix::stdio::dup2_stdin(&self.slave)?;
            rustix::stdio::dup2_stdout(&self.slave)?;
            rustix::stdio::dup2_stderr(&self.slave)
        };
        take().map_err(doing("take up the terminal"))
    }
}
