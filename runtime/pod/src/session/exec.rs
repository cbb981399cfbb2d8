//! A command in a running container, with its streams.
//!
//! A client that reads slowly slows the command down, as a pipe does.

use std::fmt;

use tokio::{
    io::{AsyncWriteExt, DuplexStream, duplex},
    runtime::Handle,
    sync::{OwnedSemaphorePermit, oneshot},
    task::JoinSet,
};

use hull_spec::{error::PodError, id::ContainerId, signal::Signal};
use hull_vm::agent::{
    client::{Agent, Exec, SignalTarget},
    events::ProcessExit,
    stdio::{self, Output, OutputKind},
};

use super::{
    input::SessionInput,
    streams::{SessionOutput, SessionStreams},
};
use crate::command::ExecHandle;

const ACTION: &str = "run a command in the container";
const BUFFER: usize = 64 * 1024;

/// A command that runs in a container. The parts may be given to different tasks.
pub struct ExecSession {
    /// Its input, when that was wanted.
    pub stdin: Option<SessionInput>,
    /// Its output, when that was wanted; otherwise it is thrown away.
    pub stdout: Option<SessionOutput>,
    /// Its error output, when that was wanted; otherwise it is thrown away.
    pub stderr: Option<SessionOutput>,
    /// Its terminal and its end.
    pub control: ExecControl,
}

/// Terminal and end of a command. Dropping it kills the command with all its descendants, unless
/// it has ended.
pub struct ExecControl {
    agent: Agent,
    container: ContainerId,
    exec: String,
    exited: Option<oneshot::Receiver<ProcessExit>>,
    /// Carry the output.
    pumps: JoinSet<()>,
    _permit: OwnedSemaphorePermit,
}

impl ExecControl {
    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// When it has none, or has ended.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), PodError> {
        let (container, exec) = (self.container.as_str(), &self.exec);
        Ok(self.agent.resize(container, exec, columns, rows).await?)
    }

    /// Waits for its end and returns its exit code, or 128 + signal. All its output has been
    /// read when the output streams have ended, which may be later.
    ///
    /// # Errors
    /// When its VM is gone, or its end was told before.
    pub async fn exited(&mut self) -> Result<i32, PodError> {
        let gone = || PodError::precondition(ACTION, "the VM ended meanwhile");
        let told = self.exited.as_mut().ok_or_else(gone)?.await;
        self.exited = None;
        told.map(|exit| exit.code).map_err(|_| gone())
    }
}

impl Drop for ExecControl {
    fn drop(&mut self) {
        let Some(exited) = &mut self.exited else {
            return;
        };
        if exited.try_recv() != Err(oneshot::error::TryRecvError::Empty) {
            return;
        }
        kill_left(&self.agent, &self.container, std::mem::take(&mut self.exec));
    }
}

/// Kills a command that nobody waits for, in the background. The agent does so too when its streams
/// are gone, but later.
pub(crate) fn kill_left(agent: &Agent, container: &ContainerId, exec: String) {
    if let Ok(runtime) = Handle::try_current() {
        let (agent, container) = (agent.clone(), container.clone());
        runtime.spawn(async move {
            let target = SignalTarget::Exec(exec);
            let killed = agent.signal(container.as_str(), Signal::KILL, target);
            if let Ok(Err(error)) = agent.guard(killed).await {
                tracing::debug!(%container, %error, "kill a command that was left");
            }
        });
    }
}

impl fmt::Debug for ExecSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecSession")
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ExecControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecControl")
            .field("container", &self.container)
            .field("exec", &self.exec)
            .finish_non_exhaustive()
    }
}

/// Starts a command and opens its streams.
pub(crate) async fn start(
    handle: ExecHandle,
    permit: OwnedSemaphorePermit,
    container: ContainerId,
    exec: String,
    args: Vec<String>,
    streams: SessionStreams,
) -> Result<ExecSession, PodError> {
    streams.check()?;
    let agent = handle.agent;
    // From here on a failure kills it, and so does a caller that does not wait.
    let mut control = ExecControl {
        agent: agent.clone(),
        container: container.clone(),
        exec: exec.clone(),
        exited: Some(handle.exited),
        pumps: JoinSet::new(),
        _permit: permit,
    };
    agent
        .exec(Exec {
            container: container.as_str(),
            id: &exec,
            args,
            timeout: None,
            tty: streams.tty,
            stdin: streams.stdin,
        })
        .await?;
    let stdin = if streams.stdin {
        let stdin = stdio::open_input(&agent, container.as_str(), &exec).await?;
        Some(SessionInput(stdin))
    } else {
        None
    };
    let mut open = |kind, end, wanted: bool| {
        let output = Output::new(&agent, kind, container.as_str(), &exec, 0, end);
        let (ours, theirs) = duplex(BUFFER);
        let (agent, pump) = (agent.clone(), pump(output, ours));
        control.pumps.spawn(async move {
            // A panic has told the pod's task.
            let _ = agent.guard(pump).await;
        });
        wanted.then(|| Box::new(theirs) as SessionOutput)
    };
    let stdout = open(OutputKind::Stdout, handle.stdout_end, streams.stdout);
    let stderr = if streams.tty {
        None
    } else {
        open(OutputKind::Stderr, handle.stderr_end, streams.stderr)
    };
    Ok(ExecSession {
        stdin,
        stdout,
        stderr,
        control,
    })
}

/// Carries output to the client. What it does not want is read all the same: the command must
/// not wait for a reader that does not exist.
async fn pump(mut output: Output, mut client: DuplexStream) {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    let mut listens = true;
    loop {
        let bytes = output.read(&mut buffer).await;
        if bytes.is_empty() {
            break;
        }
        if listens {
            listens = client.write_all(bytes).await.is_ok();
        }
        total = u64::saturating_add(total, bytes.len() as u64);
        output.acknowledge(total).await;
    }
    let _ = client.shutdown().await;
}
