//! What a pod's task is asked, and what it answers with.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::sync::{oneshot, watch};

use hull_spec::{
    error::{ObjectKind, PodError},
    id::ContainerId,
    info::SandboxInfo,
    spec::{ContainerSpec, Resources},
};
use hull_vm::agent::{client::Agent, events::ProcessExit, stdio::OutputEnd};

use crate::logs::{fanout::AttachedOutput, pump::LogHandle};

/// Asked about a sandbox that is ready, before anybody sees it; a refusal takes it down again.
pub type Admission =
    Box<dyn FnOnce(SandboxInfo) -> BoxFuture<'static, Result<(), PodError>> + Send>;

/// Where an answer goes; the caller may be gone.
pub(crate) type Reply<T = ()> = oneshot::Sender<Result<T, PodError>>;

/// What a pod is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    StopSandbox(Reply),
    RemoveSandbox(Reply),
    /// The id is that of the container, unless the same one is being created already.
    CreateContainer(ContainerId, Arc<ContainerSpec>, Reply<CreatedContainer>),
    StartContainer(ContainerId, Reply),
    StopContainer(ContainerId, Duration, Reply),
    RemoveContainer(ContainerId, Reply),
    /// Announces an exec, so that its end can be waited for.
    Exec(ContainerId, String, Reply<ExecHandle>),
    /// Follows the output of a container's first process.
    Attach(ContainerId, Reply<AttachHandle>),
    /// Changes limits of a container.
    UpdateContainer(ContainerId, Box<Resources>, Reply),
    /// Changes overhead and resources of the sandbox.
    UpdateSandbox(Box<(Option<Resources>, Option<Resources>)>, Reply),
    /// Writes a checkpoint to this directory; answers how long the VM stood still.
    Checkpoint(PathBuf, Reply<Duration>),
    /// The log of a running container.
    Log(ContainerId, Reply<LogHandle>),
}

/// A container that was created; whoever gets this says so.
#[derive(Debug)]
pub(crate) struct CreatedContainer {
    pub id: ContainerId,
    pub delivered: Delivered,
}

/// What a caller needs to run a command in a container.
#[derive(Debug)]
pub(crate) struct ExecHandle {
    pub agent: Agent,
    pub stdout_end: watch::Receiver<OutputEnd>,
    pub stderr_end: watch::Receiver<OutputEnd>,
    /// Closed without a value when the VM is gone.
    pub exited: oneshot::Receiver<ProcessExit>,
}

/// What a caller needs to attach to a container.
#[derive(Debug)]
pub(crate) struct AttachHandle {
    pub agent: Agent,
    pub tty: bool,
    /// Whether it has an input.
    pub stdin: bool,
    pub stdout: AttachedOutput,
    /// None: it has a terminal.
    pub stderr: Option<AttachedOutput>,
}

/// Whether somebody got the result of an operation that creates.
#[derive(Debug, Clone, Default)]
pub(crate) struct Delivered(Arc<AtomicBool>);

impl Delivered {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The refusal of what needs a VM; `message` says why there is none.
pub(crate) fn not_ready(action: &str, message: &str) -> PodError {
    let reason = if message.is_empty() {
        "the sandbox is not ready".to_owned()
    } else {
        format!("the sandbox is not ready: {message}")
    };
    PodError::precondition(action, reason)
}

/// There is no such container in the pod.
pub(crate) fn container_not_found(id: &ContainerId) -> PodError {
    PodError::NotFound {
        object: ObjectKind::Container,
        id: id.to_string(),
    }
}
