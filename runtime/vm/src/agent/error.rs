//! Why the agent could not be asked, or refused.

use std::io;

use ttrpc::proto::Code;

use hull_spec::error::PodError;

/// Why the agent could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("connect to port {port} of the guest")]
    Connect { port: u32, source: io::Error },
    #[error("connect to port {port} of the guest: no answer in {seconds} s")]
    ConnectTimeout { port: u32, seconds: u64 },
    #[error("{call}: the agent refuses: {message}")]
    Refused {
        call: &'static str,
        code: Code,
        message: String,
    },
    #[error("{call}: the agent did not answer in {seconds} s")]
    Timeout { call: &'static str, seconds: u64 },
    #[error("{call}: the connection to the agent is lost")]
    Lost {
        call: &'static str,
        source: ttrpc::Error,
    },
    #[error("{call}: the agent's answer is wrong: {reason}")]
    Invalid {
        call: &'static str,
        reason: &'static str,
    },
    #[error("open a stream of {what}: the agent refuses: {message}")]
    StreamRefused { what: String, message: String },
    #[error("open a stream of {what}")]
    Stream { what: String, source: io::Error },
    /// It says what can't be: its VM is ended (see [`fault`]).
    #[error("the guest's agent misbehaves: {what}")]
    Misbehaved { what: String },
}

impl GuestError {
    /// Whether the agent says that what was named is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: Code::NOT_FOUND,
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
                Code::INVALID_ARGUMENT => Self::invalid(call, message),
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
            GuestError::Invalid { .. }
            | GuestError::StreamRefused { .. }
            | GuestError::Misbehaved { .. } => Self::internal("ask the guest's agent", error),
            other => Self::unavailable("reach the guest's agent", other),
        }
    }
}
