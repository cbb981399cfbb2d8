//! Why the store, a pull or an import failed.

use std::io;
use std::path::PathBuf;

/// Why the store failed on its own disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No image has this name or id.
    #[error("find image {0} in the store: not found")]
    NotFound(String),
    /// The file system is full.
    #[error("{action}: no space left")]
    NoSpace {
        /// What was being done.
        action: String,
    },
    /// A file operation failed.
    #[error("{action}")]
    Io {
        /// What was being done, with the path.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The records cannot be read or written.
    #[error("{action}")]
    Records {
        /// What was being done.
        action: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StoreError {
    pub(crate) fn io(action: impl Into<String>, source: io::Error) -> Self {
        let action = action.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { action },
            _ => Self::Io { action, source },
        }
    }
}

/// Why an image could not be pulled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The name is not an image reference.
    #[error("parse image reference {reference:?}: {reason}")]
    InvalidReference {
        /// What was asked for.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No registry configured for the name has the image.
    #[error("find {what} at {registry}: not found")]
    NotFound {
        /// The image, manifest or blob.
        what: String,
        /// Who was asked.
        registry: String,
    },
    /// The registry refuses this caller.
    #[error("pull {reference} from {registry}: access denied: {message}")]
    Unauthorized {
        /// The image.
        reference: String,
        /// Who was asked.
        registry: String,
        /// What the registry said.
        message: String,
    },
    /// Bytes from the registry are not those that the digest names.
    #[error("verify {what}: expected {expected}, got {actual}")]
    DigestMismatch {
        /// Which manifest, configuration, blob or layer.
        what: String,
        /// The digest that was announced.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// A layer is not what its media type says, or holds what an image may not hold.
    #[error("unpack layer {layer}: {reason}")]
    CorruptLayer {
        /// The layer's digest.
        layer: String,
        /// What is wrong.
        reason: String,
    },
    /// A manifest, index or configuration cannot be understood or used on this node.
    #[error("use {what}: {reason}")]
    Unsupported {
        /// Which document.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The image exceeds a limit of this node.
    #[error("pull {what}: larger than the limit of {limit} {unit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit.
        limit: u64,
        /// `bytes`, `entries`, `layers`.
        unit: &'static str,
    },
    /// The registry cannot be reached, broke off, or answers with an error of its own.
    #[error("fetch {what} from {registry}: {message}")]
    RegistryUnavailable {
        /// What was being fetched.
        what: String,
        /// Who was asked.
        registry: String,
        /// What happened.
        message: String,
    },
    /// The certificate of the registry does not show that it is the one that is meant.
    #[error("trust the certificate of {registry}: {reason}")]
    Untrusted {
        /// Who was asked.
        registry: String,
        /// What is wrong with it, and what mends that.
        reason: String,
    },
    /// The registry leads to where it may not.
    #[error("follow {registry} to {to}: refused")]
    Misled {
        /// Who was asked.
        registry: String,
        /// Where it leads, and why not there.
        to: String,
    },
    /// Nothing came for the configured time, or next to nothing.
    #[error("fetch {what} from {registry}: next to nothing came in {seconds} s")]
    Timeout {
        /// What was being fetched.
        what: String,
        /// Who was asked.
        registry: String,
        /// The limit that passed.
        seconds: u64,
    },
    /// A `hosts.toml` file cannot be used.
    #[error("read registry configuration {}: {reason}", path.display())]
    RegistryConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The process that handles what was sent is of no use: it died, hangs, or lies.
    #[error("unpack {what}: the process that does it {reason}")]
    Worker {
        /// The layer or image.
        what: String,
        /// What happened.
        reason: String,
    },
    /// The store's own files or records failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl PullError {
    /// The same, about this layer or image, if it does not say of which it is.
    pub(crate) fn about(self, what: String) -> Self {
        match self {
            Self::Worker { reason, .. } => Self::Worker { what, reason },
            other => other,
        }
    }
}
