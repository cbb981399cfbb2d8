//! What can go wrong.

use std::{io, path::PathBuf};

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
    /// One of our own streams failed.
    #[error("{action}")]
    Own {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A port can't be listened on.
    #[error("listen on port {0} of 127.0.0.1")]
    Listen(u16, #[source] io::Error),
    /// What the server says went wrong.
    #[error("{0}")]
    Told(String),
    /// The server ended what should go on.
    #[error("the server hung up")]
    HungUp,
    /// Certificates to trust can't be read.
    #[error("read {}", .0.display())]
    Certificates(PathBuf, #[source] rustls_pki_types::pem::Error),
    /// What came on the error stream is no status.
    #[error("{0:?} is no status")]
    Status(String),
}
