//! Settings.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Where and how to serve.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// Host (and port) that URLs name instead of the address listened at.
    pub advertise: Option<String>,
    /// Serves TLS when given.
    pub tls: Option<TlsFiles>,
    /// A session without traffic for so long is closed.
    pub idle_timeout: Duration,
    /// How long a client may take to open the streams that it announced.
    pub creation_timeout: Duration,
    /// How long a client may take for TLS, HTTP and its token.
    pub handshake_timeout: Duration,
    /// How long a URL that nobody opens is good.
    pub token_ttl: Duration,
    /// Sizes and counts.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            tls: None,
            idle_timeout: Duration::from_secs(4 * 60 * 60),
            creation_timeout: Duration::from_secs(30),
            handshake_timeout: Duration::from_secs(10),
            token_ttl: Duration::from_secs(60),
            limits: Limits::default(),
        }
    }
}

/// PEM files for TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, with those between it and its root.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// How much of what there may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// URLs that nobody has opened yet.
    pub tokens: usize,
    /// Connections at a time whose clients have shown a token; one more is refused.
    pub connections: usize,
    /// Connections at a time whose clients have not; for one more the oldest is closed.
    pub strangers: usize,
    /// Streams at a time in a port-forward connection: two for each forwarded one.
    pub streams: usize,
    /// Bytes that came for the streams of a connection and wait there.
    pub buffered: usize,
    /// Bytes in a WebSocket message.
    pub message: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tokens: 1000,
            connections: 1024,
            strangers: 256,
            streams: 1024,
            buffered: 512 << 10,
            message: 4 << 20,
        }
    }
}
