//! The other side: opens the URLs of a streaming server, this one or another, as `kubectl` and
//! `crictl` do. `hull` itself is such a client at a prompt ([`terminal`], [`listen()`]), and so are tests.

mod command;
mod detach;
mod dial;
mod error;
mod forward;
mod listen;
mod terminal;

pub use self::{
    command::{Ended, Session, Transport, Wants, open as command},
    dial::{Dialer, WebSocket},
    error::ClientError,
    forward::{Forward, Forwarder, forward, forward_channels, forward_tunnel},
    listen::{Ports, listen},
    terminal::{Detach, Left, feed, interact, relay},
};
pub use crate::exec::CommandStatus;
