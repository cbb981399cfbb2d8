//! Why the agent could not be asked, or refused.

use std::io;

use ttrpc::proto::Code;

use hull_spec::error::PodError;

/// Why the agent could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Nobody listens in the guest, or the VMM is gone.
    #[error("connect to port {port} of the guest")]
    Connect {
        /// The vsock port.
        port: u32,
        /// Why.
        source: io::Error,
    },
    /// The guest took too long to accept a connection.
    #[error("connect to port {port} of the guest: no answer in {seconds} s")]
    ConnectTimeout {
        /// The vsock port.
        port: u32,
        /// How long it was tried.
        seconds: u64,
    },
    /// The agent answered with an error.
    #[error("{call}: the agent refuses: {message}")]
    Refused {
        /// What was asked for.
        call: &'static str,
        /// The status that the agent chose.
        code: Code,
        /// Its words, made printable.
        message: String,
    },
    /// The agent could not execute the command of a container or exec.
    #[error("{call}: the agent refuses: {message}")]
    NotExecuted {
        /// What was asked for.
        call: &'static str,
        /// What a shell would end with: 126, or 127 if there is no such command.
        exit_code: u8,
        /// Its words, made printable.
        message: String,
    },
    /// The request does not fit into a message.
    #[error("{call}: the request takes {bytes} bytes, of which the guest's agent reads {most}")]
    TooLarge {
        /// What was asked for.
        call: &'static str,
        /// How long it is.
        bytes: u64,
        /// How long it may be.
        most: u64,
    },
    /// The agent took too long.
    #[error("{call}: the agent did not answer in {seconds} s")]
    Timeout {
        /// What was asked for.
        call: &'static str,
        /// The time given.
        seconds: u64,
    },
    /// The connection ended before the answer.
    #[error("{call}: the connection to the agent is lost: {reason}")]
    Lost {
        /// What was asked for.
        call: &'static str,
        /// Why.
        reason: String,
    },
    /// The agent's answer can't be used.
    #[error("{call}: the agent's answer is wrong: {reason}")]
    Invalid {
        /// What was asked for.
        call: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
    /// The agent does not open a stream.
    #[error("open a stream of {what}: the agent refuses: {message}")]
    StreamRefused {
        /// The container or port.
        what: String,
        /// The agent's words, made printable.
        message: String,
    },
    /// A stream could not be opened.
    #[error("open a stream of {what}")]
    Stream {
        /// The container or port.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The agent says what can't be, and its VM is ended.
    #[error("the guest's agent misbehaves: {what}")]
    Misbehaved {
        /// What it did.
        what: String,
    },
}

impl GuestError {
    /// Whether the agent says that what was named is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: Code::NOT_FOUND,
                ..
            }
        )
    }

    /// Whether the agent says that it has not done what it was asked for.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::NotExecuted { .. })
    }

    /// Whether the agent may have done what it was asked for: its answer is missing.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Lost { .. })
    }

    /// Whether the agent says that what was to be made is there, made in another way.
    #[must_use]
    pub fn is_there_already(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: Code::ALREADY_EXISTS,
                ..
            }
        )
    }
}

impl From<GuestError> for PodError {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Refused {
                call,
                code,
                message,
            } => match code {
                Code::INVALID_ARGUMENT => Self::GuestRefused {
                    action: call.into(),
                    reason: message,
                },
                Code::FAILED_PRECONDITION | Code::NOT_FOUND | Code::ALREADY_EXISTS => {
                    Self::precondition(call, message)
                }
                Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted {
                    action: call.into(),
                    reason: message,
                },
                code => Self::internal(
                    "ask the guest's agent",
                    GuestError::Refused {
                        call,
                        code,
                        message,
                    },
                ),
            },
            GuestError::NotExecuted {
                call,
                exit_code,
                message,
            } => Self::NotExecuted {
                action: call.into(),
                exit_code,
                reason: message,
            },
            GuestError::Invalid { .. }
            | GuestError::StreamRefused { .. }
            | GuestError::Misbehaved { .. } => Self::internal("ask the guest's agent", error),
            GuestError::TooLarge { call, bytes, most } => Self::GuestRefused {
                action: call.into(),
                reason: format!(
                    "the request takes {bytes} bytes, of which the guest's agent reads {most}"
                ),
            },
            other => Self::unavailable("reach the guest's agent", other),
        }
    }
}
