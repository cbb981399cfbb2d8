//! How much of its VM's connections, and of the daemon's memory, the clients of one pod may use.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use hull_spec::error::PodError;

/// Most execs and attachments of a pod at a time; each has up to three connections.
const SESSIONS: usize = 128;
/// Most connections to servers of a pod at a time. With logs, calls, commands and sessions they
/// stay below what a VM's vsock device has.
const DIALS: usize = 256;
/// Most commands of a pod at a time whose output is collected (`ExecSync`, probes); each has two
/// connections.
const COMMANDS: usize = 32;
/// Most output of each kind that a command returns, bytes; the rest is read and dropped.
pub(crate) const OUTPUT_MAX: usize = 16 << 20;
/// Room of one pod, bytes: two commands that write as much as they may.
pub(crate) const POD_OUTPUT: usize = 4 * OUTPUT_MAX;
/// Room of all pods, bytes.
pub(crate) const NODE_OUTPUT: usize = 4 * POD_OUTPUT;

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
