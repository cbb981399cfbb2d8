//! The store: what the rest of the runtime calls.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use crate::image::{DiskExtent, Image, ImageId};

/// Where registries are configured.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// Directory with `<host>/hosts.toml` files in containerd's form; read at every pull.
    pub config_dir: Option<PathBuf>,
}

/// Who pulls; the fields are those of CRI's `AuthConfig`, empty when not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// User name for basic authentication.
    pub username: String,
    /// Password for basic authentication.
    pub password: String,
    /// A token that is exchanged for an access token.
    pub identity_token: String,
    /// A bearer token that is sent as it is.
    pub registry_token: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// Bounds for what a registry may make this node do.
#[derive(Debug, Clone)]
pub struct Limits {
    /// A transfer that brings no byte for this long fails.
    pub no_progress: Duration,
    /// Layers of one pull that are in transfer at the same time.
    pub parallel_layers: usize,
    /// Largest compressed layer, bytes.
    pub max_layer_bytes: u64,
    /// Largest unpacked layer (sum of file contents), bytes.
    pub max_unpacked_bytes: u64,
    /// Most entries in one layer and in one merged image.
    pub max_entries: u64,
    /// Most layers of an image.
    pub max_layers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            no_progress: Duration::from_secs(60),
            parallel_layers: 3,
            max_layer_bytes: 64 << 30,
            max_unpacked_bytes: 256 << 30,
            max_entries: 8 << 20,
            max_layers: 512,
        }
    }
}

/// How to open a store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Directory that the store owns, e.g. `/var/lib/hull/images`.
    pub root: PathBuf,
    /// Where registries are configured.
    pub registries: Registries,
    /// Bounds.
    pub limits: Limits,
}

impl StoreConfig {
    /// A configuration with default limits.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>, registries: Registries) -> Self {
        Self {
            root: root.into(),
            registries,
            limits: Limits::default(),
        }
    }
}

/// How far a pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullProgress {
    /// Layers of the image; 0 until the manifest is known.
    pub layers: usize,
    /// Layers that are complete on this node.
    pub layers_done: usize,
    /// Compressed bytes of all layers that had to be transferred.
    pub bytes: u64,
    /// Compressed bytes received.
    pub bytes_done: u64,
}

/// What the store occupies on its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
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
    #[error("find {what} at {registry}")]
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
    /// No byte came for the configured time.
    #[error("fetch {what} from {registry}: no progress for {seconds} s")]
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
    /// The store's own files or records failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why the store failed on its own disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No image has this name or id.
    #[error("find image {0} in the store")]
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
        source: std::io::Error,
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

/// The images of this node. Clones share one store.
#[derive(Debug, Clone)]
pub struct ImageStore {}

impl ImageStore {
    /// Opens the store, creates it when absent, and removes what an interrupted run left.
    ///
    /// # Errors
    /// When the directory or its records cannot be used.
    pub async fn open(_config: StoreConfig) -> Result<Self, StoreError> {
        unimplemented!("not written yet")
    }

    /// Pulls an image and makes its disk; a layer that is present is not fetched again.
    ///
    /// # Errors
    /// See [`PullError`]; nothing of a failed pull stays.
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<ImageId, PullError> {
        self.pull_watched(reference, auth, &watch::Sender::default())
            .await
    }

    /// As [`ImageStore::pull`], and tells how far it is.
    ///
    /// # Errors
    /// As [`ImageStore::pull`].
    pub async fn pull_watched(
        &self,
        _reference: &str,
        _auth: Option<Auth>,
        _progress: &watch::Sender<PullProgress>,
    ) -> Result<ImageId, PullError> {
        unimplemented!("not written yet")
    }

    /// Finds an image by name, name@digest, id, or id prefix; `None` when there is none.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn get(&self, _name_or_id: &str) -> Result<Option<Image>, StoreError> {
        unimplemented!("not written yet")
    }

    /// Lists the images, sorted by id.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn list(&self) -> Result<Vec<Image>, StoreError> {
        unimplemented!("not written yet")
    }

    /// Removes an image with all its names; one that is absent is removed already. Files that are
    /// leased stay until their last lease is released.
    ///
    /// # Errors
    /// When records or files cannot be changed.
    pub async fn remove(&self, _name_or_id: &str) -> Result<(), StoreError> {
        unimplemented!("not written yet")
    }

    /// The pieces of the image's block device, a read-only EROFS.
    ///
    /// # Errors
    /// When the image is unknown or the records cannot be read.
    pub async fn disk(&self, _id: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
        unimplemented!("not written yet")
    }

    /// Keeps the image's disk until `owner` releases it, over restarts too. Idempotent.
    ///
    /// # Errors
    /// When the image is unknown or the records cannot be written.
    pub async fn lease(&self, _id: &ImageId, _owner: &str) -> Result<(), StoreError> {
        unimplemented!("not written yet")
    }

    /// Gives up all leases of `owner`; deletes what nobody needs any more. Idempotent.
    ///
    /// # Errors
    /// When records or files cannot be changed.
    pub async fn release(&self, _owner: &str) -> Result<(), StoreError> {
        unimplemented!("not written yet")
    }

    /// The owners that hold leases, sorted: a caller releases those it no longer knows.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn lease_owners(&self) -> Result<Vec<String>, StoreError> {
        unimplemented!("not written yet")
    }

    /// What the store occupies.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn usage(&self) -> Result<Usage, StoreError> {
        unimplemented!("not written yet")
    }
}
