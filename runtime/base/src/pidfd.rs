//! Processes, held by a descriptor that never means another one: pids are reused.

use std::{io, os::fd::OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::readiness::register;

/// A process, dead or alive (pidfd_open(2)).
#[derive(Debug)]
pub struct Pidfd(AsyncFd<OwnedFd>);

impl Pidfd {
    /// Opens the process that has this pid now. That it is the one that is meant is the caller's to
    /// know: a child that was not waited for yet is.
    ///
    /// # Errors
    /// When no process has this pid.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::NotFound)?;
        let fd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        Ok(Self(register(fd, Interest::READABLE)?))
    }

    /// Whether the process has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.0.get_ref(), PollFlags::IN)];
        // A pidfd can be read from once its process has ended. A failure tells nothing of that.
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Waits until the process has ended, without waiting for it as its parent does.
    pub async fn ended(&self) {
        if self.0.readable().await.is_err() {
            // The runtime is being shut down, and this task with it.
            std::future::pending::<()>().await;
        }
    }

    /// Kills the process; no effect when it has ended.
    ///
    /// # Errors
    /// When it is another user's.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.0.get_ref(), Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_process_is_waited_for_until_it_ends() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = Pidfd::open(child.id()).unwrap();
        let waiting = timeout(Duration::from_millis(50), pidfd.ended());
        assert!(waiting.await.is_err() && !pidfd.has_ended());
        pidfd.kill().unwrap();
        timeout(Duration::from_secs(10), pidfd.ended())
            .await
            .unwrap();
        // A zombie has ended.
        assert!(pidfd.has_ended());
        child.wait().unwrap();
        pidfd.ended().await;
        pidfd.kill().unwrap();
        Pidfd::open(child.id()).unwrap_err();
    }
}
