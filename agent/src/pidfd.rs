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

    /// Returns what the kernel tells of it in one line.
    pub(crate) fn stat(&self) -> io::Result<Stat> {
        Stat::parse(&self.read("stat")?).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Returns its children, as far as they are of its main thread's.
    pub(crate) fn children(&self) -> io::Result<Vec<Pid>> {
        let text = self.read(&format!("task/{}/children", self.pid))?;
        let pids = text.split_ascii_whitespace().map(str::parse);
        let pids: Result<Vec<_>, _> = pids.map(|pid| pid.map(Pid::from_raw)).collect();
        pids.map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A part of /proc/PID/stat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) parent: Pid,
    pub(crate) session: Pid,
    /// When it was started, in ticks since boot: two processes of one pid differ by it.
    pub(crate) started: u64,
    pub(crate) state: char,
    /// CPU time in ticks.
    pub(crate) used: u64,
    /// Resident memory in pages.
    pub(crate) pages: u64,
}

impl Stat {
    /// "pid (name) state parent …"; a name may hold anything.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let pid = |field: usize| fields.get(field)?.parse().ok().map(Pid::from_raw);
        let number = |field: usize| fields.get(field)?.parse::<u64>().ok();
        // proc_pid_stat(5) counts from the pid on, and from 1.
        Some(Self {
            parent: pid(4 - 3)?,
            session: pid(6 - 3)?,
            started: number(22 - 3)?,
            state: fields.first()?.chars().next()?,
            used: number(14 - 3)?.saturating_add(number(15 - 3)?),
            pages: number(24 - 3)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_told_whatever_its_name() {
        let stat =
            "12 (a) S 1 (x) R 7 8 9 0 -1 4194560 94 0 0 0 1 2 0 0 20 0 1 0 31337 2449408 178";
        let told = Stat {
            parent: Pid::from_raw(7),
            session: Pid::from_raw(9),
            started: 31337,
            state: 'R',
            used: 3,
            pages: 178,
        };
        assert_eq!(Stat::parse(stat), Some(told));
        assert_eq!(Stat::parse("12 (x) R 7 8 9"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn a_process_is_there_until_it_is_collected() {
        let mut child = Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process::open(Pid::from_raw(child.id() as i32)).unwrap();
        assert_eq!(process.stat().unwrap().parent, Pid::this());
        assert!(process.children().unwrap().is_empty());
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
