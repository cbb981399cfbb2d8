//! The only place that waits for processes.
//!
//! The agent is PID 1, so every orphan of the guest becomes its child. One task
//! collects all of them; whoever started or adopted a process gets its end
//! through a channel, and the rest is dropped. A second `waitpid` anywhere would
//! steal from this one.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use nix::unistd::Pid;
use rustix::{
    io::Errno,
    process::{WaitOptions, wait},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tracing::{debug, warn};

use crate::pidfd::Process;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    /// It returned this code.
    Exited(i32),
    /// This signal killed it.
    Signaled(i32),
}

impl ExitStatus {
    /// Returns the code as a shell gives it: 128 + signal for a killed process.
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
        }
    }

    /// Returns the signal that killed it; 0 for none.
    pub(crate) fn signal(self) -> u32 {
        match self {
            Self::Exited(_) => 0,
            Self::Signaled(signal) => u32::try_from(signal).unwrap_or(0),
        }
    }
}

/// Gets the end of one process. It fails only when the agent itself ends.
pub(crate) type Exit = oneshot::Receiver<ExitStatus>;

/// Starts processes and collects them.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    /// Held while a process is started, so that none is collected before its
    /// waiter is known.
    waiters: Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>,
}

impl Reaper {
    /// Starts `command`.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(Process, Exit)> {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        // The handle of std is not used: it would wait by itself.
        let child = command.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        let (tx, rx) = oneshot::channel();
        waiters.insert(pid, tx);
        // It cannot be collected as long as the lock is held.
        Ok((Process::open(pid)?, rx))
    }

    /// Watches a process that is about to be reparented to the agent.
    /// Its present parent must stay until this call returned.
    ///
    /// # Errors
    /// `AlreadyExists` when somebody waits for it: nobody loses a process to another.
    pub(crate) fn adopt(&self, process: &Process) -> io::Result<Exit> {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        match waiters.entry(process.pid()) {
            Entry::Occupied(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Entry::Vacant(vacant) => {
                let (tx, rx) = oneshot::channel();
                vacant.insert(tx);
                Ok(rx)
            }
        }
    }

    /// Collects processes until the agent ends.
    pub(crate) async fn run(self: Arc<Self>) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.collect();
            if ended.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn collect(&self) {
        let mut waiters = self.waiters.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // rustix, because nix loses processes that a real-time signal ended.
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some(ended)) => ended,
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    warn!(%error, "wait for processes");
                    return;
                }
            };
            let status = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ExitStatus::Exited(code),
                (None, Some(signal)) => ExitStatus::Signaled(signal),
                (None, None) => continue,
            };
            let pid = Pid::from_raw(pid.as_raw_nonzero().get());
            match waiters.remove(&pid) {
                // Who does not listen any more does not need it.
                Some(waiter) => drop(waiter.send(status)),
                None => debug!(%pid, ?status, "collected an orphan"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn nobody_loses_a_process_to_another() {
        let reaper = Reaper::default();
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped());
        let (process, mut exit) = reaper.spawn(&mut command).unwrap();
        let again = reaper.adopt(&process).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert!(
            exit.try_recv()
                .is_err_and(|e| e == oneshot::error::TryRecvError::Empty)
        );
        process.signal(libc::SIGKILL).unwrap();
        // Other tests of this program have children too, which are none of this reaper's.
        let pid = rustix::process::Pid::from_raw(process.pid().as_raw()).unwrap();
        rustix::process::waitpid(Some(pid), WaitOptions::empty()).unwrap();
    }
}
