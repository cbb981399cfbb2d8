//! The AppArmor profile of a process.

use std::{io, os::fd::OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::error::{StepError, doing};

/// The guest's /proc, taken before the process is in its container: what that has there, it may have led elsewhere.
pub(crate) struct Attributes(OwnedFd);

impl Attributes {
    /// Takes it, in the guest's mount namespace.
    pub(crate) fn of_guest() -> Result<Self, StepError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = openat(CWD, "/proc", flags, Mode::empty());
        proc.map(Self).map_err(doing("open the guest's /proc"))
    }

    /// Has what the calling thread executes be under a profile of the guest's kernel
    /// (security/apparmor/procattr.c).
    pub(crate) fn confine(&self, profile: &str) -> Result<(), StepError> {
        let take = || -> io::Result<()> {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = openat(
                &self.0,
                "thread-self/attr/apparmor/exec",
                flags,
                Mode::empty(),
            )?;
            rustix::io::write(file, format!("exec {profile}").as_bytes())?;
            Ok(())
        };
        take().map_err(doing(&format!("use AppArmor profile {profile}")))
    }
}
