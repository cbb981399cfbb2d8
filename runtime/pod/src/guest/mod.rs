//! The guest's agent: how it is reached, what it is asked, what it tells.
//!
//! The guest is hostile: what comes from it is checked here and turned into types of this crate.
//! Types of the agent's contract go no further than this module.

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

pub(crate) mod client;
pub(crate) mod configure;
pub(crate) mod connect;
pub(crate) mod events;
pub(crate) mod fault;
pub(crate) mod network;
pub(crate) mod stats;
pub(crate) mod stdio;

use std::io;

use ttrpc::proto::Code;

use crate::error::PodError;

/// Why the agent could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
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
    pub(crate) fn is_not_found(&self) -> bool {
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

/// The text without control characters and no longer than `max` bytes.
pub(crate) fn printable(text: &str, max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let c = if c.is_control() && c != '\n' {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        };
        if out.len().saturating_add(c.len_utf8()) > max {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_guest_is_tamed() {
        assert_eq!(printable("a\u{1b}[31mb", 64), "a\u{fffd}[31mb");
        assert_eq!(printable("äöü", 3), "ä");
    }
}
