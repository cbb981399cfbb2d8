//! What can go wrong.

use std::io;

use crate::channel::Lost;

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
