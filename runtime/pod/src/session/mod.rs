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
pub(crate) mod permits;
mod shell;
mod streams;

pub use self::{
    attach::{AttachControl, AttachSession},
    dial::PodConnection,
    exec::{ExecControl, ExecSession},
    input::SessionInput,
    shell::shell,
    streams::{SessionOutput, SessionStreams},
};
