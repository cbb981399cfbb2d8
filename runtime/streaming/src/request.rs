//! Requests of the CRI, before anybody has opened their URL.

use crate::backend::{AttachRequest, ExecRequest, PortForwardRequest};

/// Why there is no URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A field is empty.
    #[error("{0}: is missing")]
    Missing(&'static str),
    /// A field does not go with others.
    #[error("{field}: {reason}")]
    Invalid {
        /// Its name in the request.
        field: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// Too many URLs wait to be opened.
    #[error("{0} streaming requests wait for their client already")]
    TooMany(usize),
    /// The system gives no random numbers, so there is no token.
    #[error("make a token: {0}")]
    Random(String),
}

/// The first part of a URL's path for port-forward.
pub(crate) const FORWARD: &str = "portforward";

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    Command(Command),
    PortForward(PortForwardRequest),
}

/// A process to get, by running or finding it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

/// Which streams there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Streams {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

impl Request {
    /// Its first part in a URL's path.
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Self::Command(command) => command.verb(),
            Self::PortForward(_) => FORWARD,
        }
    }

    pub(crate) fn check(&self) -> Result<(), RequestError> {
        match self {
            Self::Command(command) => command.check(),
            Self::PortForward(request) if request.pod_sandbox_id.is_empty() => {
                Err(RequestError::Missing("pod_sandbox_id"))
            }
            Self::PortForward(_) => Ok(()),
        }
    }
}

impl Command {
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
        }
    }

    /// The container.
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Exec(request) => &request.container_id,
            Self::Attach(request) => &request.container_id,
        }
    }

    pub(crate) fn streams(&self) -> Streams {
        match self {
            Self::Exec(r) => Streams {
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
                tty: r.tty,
            },
            Self::Attach(r) => Streams {
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
                tty: r.tty,
            },
        }
    }

    fn check(&self) -> Result<(), RequestError> {
        if self.id().is_empty() {
            return Err(RequestError::Missing("container_id"));
        }
        if let Self::Exec(request) = self
            && request.cmd.is_empty()
        {
            return Err(RequestError::Missing("cmd"));
        }
        let streams = self.streams();
        if streams.tty && streams.stderr {
            return Err(RequestError::Invalid {
                field: "stderr",
                reason: "a terminal has one output, stdout",
            });
        }
        if !(streams.stdin || streams.stdout || streams.stderr) {
            return Err(RequestError::Invalid {
                field: "stdin, stdout, stderr",
                reason: "one of them must be wanted",
            });
        }
        Ok(())
    }
}
