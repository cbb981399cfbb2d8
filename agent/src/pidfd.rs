//! Processes, by handles that cannot mean another one when a pid is used again.
//!
//! A pid by itself is good for messages only: whoever it meant may have ended, and a
//! container can start processes until one of its own has that number.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::unistd::Pid;
use rustix::{
    fs::{Mode, OFlags, open, openat},
    io::Errno,
    process::{PidfdFlags, pidfd_open},
};

use crate::sys;

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    fd: OwnedFd,
}

impl Process {
    /// Opens a process that is there, be it as a zombie.
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        let known = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(Errno::SRCH)?;
        let fd = pidfd_open(known, PidfdFlags::empty())?;
        Ok(Self { pid, fd })
    }

    /// Returns its pid, which is its own as long as [`Self::is_there`].
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns whether nobody has collected it yet.
    pub(crate) fn is_there(&self) -> bool {
        sys::send_signal(&self.fd, 0).is_ok()
    }

    /// Sends `signal`; a process that is gone is no error.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        match sys::send_signal(&self.fd, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Opens `name` in its directory of /proc.
    pub(crate) fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let path = format!("/proc/{}", self.pid);
        let dir = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = open(path, dir, Mode::empty())?;
        // Then the directory is that of this process, whatever becomes of it.
        if !self.is_there() {
            return Err(Errno::SRCH.into());
        }
        let file = openat(dir, name, flags | OFlags::CLOEXEC, Mode::empty())?;
        Ok(File::from(file))
    }

    /// Reads `name` in its directory of /proc.
    pub(crate) fn read(&self, name: &str) -> io::Result<String> {
        let mut text = String::new();
        self.open_file(name, OFlags::RDONLY)?
            .read_to_string(&mut text)?;
        Ok(text)
    }

    /// Writes `text` to `name` in its directory of /proc.
    pub(crate) fn write(&self, name: &str, text: &str) -> io::Result<()> {
        self.open_file(name, OFlags::WRONLY)?
            .write_all(text.as_bytes())
    }

    /// Returns the pid of its parent.
    pub(crate) fn parent(&self) -> io::Result<Pid> {
        parent(&self.read("stat")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// "pid (name) state parent …"; a name may hold anything.
fn parent(stat: &str) -> Option<Pid> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let parent = rest.split(' ').nth(1)?;
    parent.parse().ok().map(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_parent_is_read_whatever_the_name() {
        let stat = "12 (a) S 1 (x) R 7 7 7 0 -1";
        assert_eq!(parent(stat), Some(Pid::from_raw(7)));
        assert_eq!(parent("12 (x) R"), None);
        assert_eq!(parent(""), None);
    }

    #[test]
    fn a_process_is_there_until_it_is_collected() {
        let mut child = Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(Pid::from_raw(child.id() as i32)).unwrap();
        assert_eq!(process.parent().unwrap(), Pid::this());
        process.write("oom_score_adj", "500").unwrap();
        assert_eq!(process.read("oom_score_adj").unwrap(), "500\n");
        process.signal(libc::SIGKILL).unwrap();
        // A zombie keeps its pid.
        while process.read("stat").unwrap().contains(") S") {
            std::thread::yield_now();
        }
        assert!(process.is_there());
        child.wait().unwrap();
        assert!(!process.is_there());
        process.signal(libc::SIGKILL).unwrap();
        let error = process.read("stat").unwrap_err();
        assert!(
            matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
            "{error}"
        );
        assert!(Process::open(Pid::from_raw(0)).is_err());
    }
}
