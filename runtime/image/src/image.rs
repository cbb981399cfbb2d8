//! What an image is to the rest of the runtime.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The identity of an image: `sha256:` and the 64 hex digits of its configuration's digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageId(String);

/// The text is not `sha256:` followed by 64 lower-case hex digits.
#[derive(Debug, thiserror::Error)]
#[error("parse image id {0:?}: it must be sha256: and 64 lower-case hex digits")]
pub struct InvalidImageId(String);

impl ImageId {
    /// The id with its algorithm prefix, e.g. `sha256:ab12…`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 64 hex digits alone.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.trim_start_matches("sha256:")
    }
}

impl FromStr for ImageId {
    type Err = InvalidImageId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

impl TryFrom<String> for ImageId {
    type Error = InvalidImageId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(is_hex) => Ok(Self(text)),
            _ => Err(InvalidImageId(text)),
        }
    }
}

impl From<ImageId> for String {
    fn from(id: ImageId) -> Self {
        id.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A complete image of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of the image's configuration.
    pub id: ImageId,
    /// Full names with tag, e.g. `docker.io/library/busybox:latest`. Empty when every tag has moved on.
    pub repo_tags: Vec<String>,
    /// Full names with the digest that the pulled reference resolved to (an index's own digest
    /// when the image came through one).
    pub repo_digests: Vec<String>,
    /// Bytes that the image's layers and configuration have at the registry (compressed), as
    /// other runtimes report them.
    pub size: u64,
    /// What the image asks for its containers.
    pub config: ImageConfig,
    /// Whether garbage collection must leave the image alone.
    pub pinned: bool,
    /// How many owners hold a lease of it.
    pub leases: usize,
    /// It was removed, and is there only for its leases.
    pub removed: bool,
}

/// What an image asks for its containers: the `config` object of the OCI image configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group` or `uid:gid`; empty for root.
    pub user: String,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Words put before the command.
    pub entrypoint: Vec<String>,
    /// The default command or arguments.
    pub cmd: Vec<String>,
    /// Absolute path; empty for `/`.
    pub working_dir: String,
    /// Name or number of the signal that ends the container; empty for SIGTERM.
    pub stop_signal: String,
    /// Paths that the image declares as volumes.
    pub volumes: Vec<String>,
    /// `80/tcp` each.
    pub exposed_ports: Vec<String>,
    /// Free-form labels.
    pub labels: BTreeMap<String, String>,
}

/// A part of the image's block device that is a range of a file; extents follow each other in the
/// order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskExtent {
    /// A regular file that never changes while the image is leased.
    pub path: PathBuf,
    /// First byte in the file, a multiple of 4096.
    pub offset: u64,
    /// Length in bytes, a multiple of 4096.
    pub length: u64,
}
