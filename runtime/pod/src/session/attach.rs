//! Clients that look at a running container's first process.
//!
//! They see what it writes from now on; what it wrote before is in its log. The log is written
//! by the same task that serves them, and neither it nor the container waits for a client: one
//! that is too far behind is cut off, with an error at the end of its output. The client may
//! attach again, and the log has every byte.

use std::{fmt, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, watch};

use hull_spec::{error::PodError, field::Field, id::ContainerId, info::ContainerState};
use hull_vm::agent::{client::Agent, stdio};

use super::{
    input::SessionInput,
    streams::{SessionOutput, SessionStreams},
};
use crate::{command::AttachHandle, registry::PodView};

/// A client's connection to a container. Its parts may be given to different tasks; dropping
/// them leaves the container as it is.
pub struct AttachSession {
    /// The container's input, when that was wanted and the container has one. Its end closes the
    /// container's input only when that was created with `stdin_once`.
    pub stdin: Option<SessionInput>,
    /// Its output, when that was wanted.
    pub stdout: Option<SessionOutput>,
    /// Its error output, when that was wanted.
    pub stderr: Option<SessionOutput>,
    /// Its terminal and its end.
    pub control: AttachControl,
}

/// Terminal and end of a container.
pub struct AttachControl {
    agent: Agent,
    container: ContainerId,
    view: watch::Receiver<Arc<PodView>>,
    _permit: OwnedSemaphorePermit,
}

impl AttachControl {
    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// When it has none, or has ended.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), PodError> {
        let container = self.container.as_str();
        Ok(self.agent.resize(container, "", columns, rows).await?)
    }

    /// Waits until the container has ended or is gone.
    pub async fn ended(&mut self) {
        let container = &self.container;
        let ended = self.view.wait_for(|view| {
            let found = view.containers.get(container);
            found.is_none_or(|c| c.state == ContainerState::Exited)
        });
        // An error means that its sandbox was removed.
        let _ = ended.await;
    }
}

impl fmt::Debug for AttachSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachSession")
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for AttachControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachControl")
            .field("container", &self.container)
            .finish_non_exhaustive()
    }
}

/// Opens the streams of a container whose outputs were subscribed to.
pub(crate) async fn start(
    handle: AttachHandle,
    permit: OwnedSemaphorePermit,
    view: watch::Receiver<Arc<PodView>>,
    container: ContainerId,
    streams: SessionStreams,
) -> Result<AttachSession, PodError> {
    streams.check()?;
    if streams.tty != handle.tty {
        let reason = if handle.tty {
            "the container has a terminal"
        } else {
            "the container has no terminal"
        };
        return Err(PodError::invalid(Field::Tty, reason));
    }
    let stdin = if streams.stdin && handle.stdin {
        let stdin = stdio::open_input(&handle.agent, container.as_str(), "").await?;
        Some(SessionInput(stdin))
    } else {
        None
    };
    let output = |reader, wanted: bool| wanted.then(|| Box::new(reader) as SessionOutput);
    Ok(AttachSession {
        stdin,
        stdout: output(handle.stdout, streams.stdout),
        stderr: handle
            .stderr
            .and_then(|reader| output(reader, streams.stderr)),
        control: AttachControl {
            agent: handle.agent,
            container,
            view,
            _permit: permit,
        },
    })
}
