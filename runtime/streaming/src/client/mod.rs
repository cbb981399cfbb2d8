//! The other side: opens the URLs of a streaming server, this one or another, as `kubectl` and
//! `crictl` do. For tests and tools.

mod command;
mod dial;
mod forward;

use std::io;

pub use self::{
    command::{Ended, Session, Wants, open as command},
    dial::{Dialer, WebSocket},
    forward::{Forward, Forwarder, forward, forward_channels, forward_tunnel},
};
use crate::channel::Lost;
pub use crate::exec::CommandStatus;

/// What carries a command's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport<'a> {
    /// SPDY/3.1, with these subprotocols in order of preference.
    Spdy(&'a [&'a str]),
    /// A WebSocket with this subprotocol; the empty one is not sent.
    WebSocket(&'a str),
}

/// Why there is no session, or how it broke.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not a URL that can be opened.
    #[error("{0:?} is no http or https URL")]
    Url(String),
    /// The server can't be reached.
    #[error("connect to {0}")]
    Connect(String, #[source] io::Error),
    /// HTTP broke.
    #[error("HTTP")]
    Http(#[from] hyper::Error),
    /// The server's answer is no upgrade.
    #[error("the server answers {status}: {body}")]
    Refused {
        /// As of HTTP.
        status: u16,
        /// What it says.
        body: String,
        /// The subprotocols that it would take.
        accepted: Vec<String>,
    },
    /// The answer is an upgrade to something else.
    #[error("the server's upgrade is wrong: {0}")]
    Upgrade(&'static str),
    /// The session broke.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// What came on the error stream is no status.
    #[error("{0:?} is no status")]
    Status(String),
}
