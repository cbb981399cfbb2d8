//! The other side: opens the URLs of a streaming server, this one or another, as `kubectl` and
//! `crictl` do. For tests and tools.

mod command;
mod dial;
mod error;
mod forward;

pub use self::{
    command::{Ended, Session, Transport, Wants, open as command},
    dial::{Dialer, WebSocket},
    error::ClientError,
    forward::{Forward, Forwarder, forward, forward_channels, forward_tunnel},
};
pub use crate::exec::CommandStatus;
