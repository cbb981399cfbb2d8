//! What the server needs from a runtime: processes with streams, and connections into pods.

use std::{fmt, pin::Pin};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};

/// A command to run in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// The container.
    pub container_id: String,
    /// The command and its arguments.
    pub cmd: Vec<String>,
    /// It gets a terminal; its error output is then part of its output.
    pub tty: bool,
    /// Its input is wanted.
    pub stdin: bool,
    /// Its output is wanted.
    pub stdout: bool,
    /// Its error output is wanted.
    pub stderr: bool,
}

/// A container whose first process is to be attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// The container.
    pub container_id: String,
    /// It has a terminal.
    pub tty: bool,
    /// Its input is wanted.
    pub stdin: bool,
    /// Its output is wanted.
    pub stdout: bool,
    /// Its error output is wanted.
    pub stderr: bool,
}

/// A pod whose ports are to be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForwardRequest {
    /// The pod.
    pub pod_sandbox_id: String,
    /// The ports; only old WebSocket clients are told them here.
    pub ports: Vec<u16>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}

/// A connection in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// How a session came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The process ended; its code, or 128 and its signal.
    Code(i32),
    /// The process goes on without this session.
    Detached,
}

/// The streams of a process. Dropping it kills a command, and detaches from a container.
pub struct Process {
    /// Its input; shut down at the client's end of file.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Its output; ends when the process can write no more.
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Its error output.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Takes the sizes of the client's terminal.
    pub resize: Option<mpsc::Sender<TerminalSize>>,
    /// Its end. Kept until its output has ended too, also when it is ready.
    pub exit: Pin<Box<dyn Future<Output = Result<Exit, BackendError>> + Send>>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("stdin", &self.stdin.is_some())
            .field("stdout", &self.stdout.is_some())
            .field("stderr", &self.stderr.is_some())
            .field("resize", &self.resize.is_some())
            .finish_non_exhaustive()
    }
}

/// Why there is no process or connection; the client gets to read it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct BackendError {
    /// The reason in words.
    pub message: String,
    /// Set when the command could not be executed: what a shell would end with.
    pub exit_code: Option<u8>,
}

impl BackendError {
    /// One that is not about executing a command.
    #[must_use]
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            exit_code: None,
        }
    }
}

/// A runtime.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Starts a command. The future may be dropped before it is ready: nothing may run then.
    async fn exec(&self, request: ExecRequest) -> Result<Process, BackendError>;

    /// Attaches to a container: output from now on.
    async fn attach(&self, request: AttachRequest) -> Result<Process, BackendError>;

    /// Connects to a port of the pod's own localhost.
    async fn dial(&self, pod_sandbox_id: &str, port: u16) -> Result<Box<dyn Duplex>, BackendError>;
}
