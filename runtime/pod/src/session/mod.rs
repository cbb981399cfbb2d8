//! Live connections of clients to processes and servers in a pod: `exec`, `attach`, `dial`.
//!
//! A session holds one of its pod's permits until it is dropped, so that clients can't use up the
//! connections that logs and calls need.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

pub(crate) mod attach;
pub(crate) mod dial;
pub(crate) mod exec;
mod input;

use std::sync::Arc;

use tokio::{
    io::AsyncRead,
    sync::{OwnedSemaphorePermit, Semaphore},
};

pub use self::{
    attach::{AttachControl, AttachSession},
    dial::PodConnection,
    exec::{ExecControl, ExecSession},
    input::SessionInput,
};
use hull_spec::error::PodError;

use crate::exec::POD_OUTPUT;

/// Most execs and attachments of a pod at a time; each has up to three connections.
const SESSIONS: usize = 128;
/// Most connections to servers of a pod at a time. With logs, calls, commands and sessions they
/// stay below what a VM's vsock device has.
const DIALS: usize = 256;
/// Most commands of a pod at a time whose output is collected (`ExecSync`, probes); each has two
/// connections.
const COMMANDS: usize = 32;

/// Output of a process; its end is the end of the output.
pub type SessionOutput = Box<dyn AsyncRead + Send + Unpin>;

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionStreams {
    /// Input of the process.
    pub stdin: bool,
    /// Its output, or that of its terminal.
    pub stdout: bool,
    /// Its error output; never with a terminal.
    pub stderr: bool,
    /// It has a terminal.
    pub tty: bool,
}

impl SessionStreams {
    /// Refuses what no client can want.
    fn check(self) -> Result<(), PodError> {
        if self.tty && self.stderr {
            return Err(PodError::invalid(
                "stderr",
                "a terminal has no error output of its own",
            ));
        }
        if !(self.stdin || self.stdout || self.stderr) {
            return Err(PodError::invalid(
                "stdin, stdout, stderr",
                "none of them is wanted",
            ));
        }
        Ok(())
    }
}

/// The permits of one pod.
#[derive(Debug, Clone)]
pub(crate) struct Permits {
    sessions: Arc<Semaphore>,
    dials: Arc<Semaphore>,
    commands: Arc<Semaphore>,
    /// Room for what commands write until it is answered, bytes.
    output: Arc<Semaphore>,
}

impl Default for Permits {
    fn default() -> Self {
        Self {
            sessions: Arc::new(Semaphore::new(SESSIONS)),
            dials: Arc::new(Semaphore::new(DIALS)),
            commands: Arc::new(Semaphore::new(COMMANDS)),
            output: Arc::new(Semaphore::new(POD_OUTPUT)),
        }
    }
}

impl Permits {
    pub(crate) fn session(&self, action: &str) -> Result<OwnedSemaphorePermit, PodError> {
        take(&self.sessions, action, "exec or attach sessions", SESSIONS)
    }

    pub(crate) fn dial(&self, action: &str) -> Result<OwnedSemaphorePermit, PodError> {
        take(&self.dials, action, "forwarded connections", DIALS)
    }

    pub(crate) fn command(&self, action: &str) -> Result<OwnedSemaphorePermit, PodError> {
        take(&self.commands, action, "commands that run", COMMANDS)
    }

    pub(crate) fn output(&self) -> Arc<Semaphore> {
        Arc::clone(&self.output)
    }
}

fn take(
    from: &Arc<Semaphore>,
    action: &str,
    what: &str,
    limit: usize,
) -> Result<OwnedSemaphorePermit, PodError> {
    let permit = Arc::clone(from).try_acquire_owned();
    permit.map_err(|_| PodError::ResourceExhausted {
        action: action.into(),
        reason: format!("the pod has {limit} {what} already"),
    })
}
