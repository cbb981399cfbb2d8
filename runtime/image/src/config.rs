//! How to open a store, and the bounds for what a registry may make this node do.

use std::path::PathBuf;
use std::time::Duration;

use crate::pinned::PinnedImages;

/// Where registries are configured.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// Directory with `<host>/hosts.toml` files in containerd's form; read at every pull.
    pub config_dir: Option<PathBuf>,
}

/// Bounds for what a registry may make this node do.
#[derive(Debug, Clone)]
pub struct Limits {
    /// A transfer that brings no byte for this long fails.
    pub no_progress: Duration,
    /// How often a transfer that broke off is taken up again.
    pub retries: u32,
    /// Pulls, imports and exports at the same time; more wait.
    pub parallel_pulls: usize,
    /// Layers of one pull that are in transfer at the same time.
    pub parallel_layers: usize,
    /// Layers of all pulls that are in transfer at the same time; more wait.
    pub parallel_transfers: usize,
    /// Largest compressed layer, bytes.
    pub max_layer_bytes: u64,
    /// Largest unpacked layer (sum of file contents), bytes.
    pub max_unpacked_bytes: u64,
    /// Most entries in one layer and in one merged image.
    pub max_entries: u64,
    /// Most bytes on disk for the names and attributes of one layer.
    pub max_tree_bytes: u64,
    /// Bytes of memory for the trees of all images that are made at the same time. A layer or image
    /// that does not fit is refused; one for which there is no room now waits.
    pub tree_memory: u64,
    /// Most layers of an image.
    pub max_layers: usize,
    /// Largest archive that is imported, unpacked, bytes.
    pub max_archive_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            no_progress: Duration::from_secs(60),
            retries: 3,
            parallel_pulls: 16,
            parallel_layers: 3,
            // A decompressor's window and the buffers of one are up to 48 MiB.
            parallel_transfers: 10,
            max_layer_bytes: 64 << 30,
            max_unpacked_bytes: 128 << 30,
            max_entries: 4 << 20,
            max_tree_bytes: 2 << 30,
            tree_memory: 512 << 20,
            max_layers: 512,
            max_archive_bytes: 256 << 30,
        }
    }
}

/// The processes that handle what registries and archives chose.
#[derive(Debug, Clone)]
pub struct Workers {
    /// A program whose `main` begins with [`crate::worker`].
    pub program: PathBuf,
    /// The user that they run as, and the group of the same number; it owns nothing.
    pub user: u32,
    /// A process that did not move 64 KiB in this time while it was waited for is ended.
    pub patience: Duration,
    /// One that merges layers is ended after this time.
    pub merge: Duration,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            // Also when another version has taken the place of this one.
            program: "/proc/self/exe".into(),
            user: FIRST_USER,
            // A disk may be slow.
            patience: Duration::from_secs(300),
            merge: Duration::from_secs(900),
        }
    }
}

/// The first of the users that nobody is (systemd's "Users, Groups, UIDs and GIDs": unused on Linux
/// systems above 1879048191).
const FIRST_USER: u32 = 1_879_048_192;

/// How to open a store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Directory that the store owns, e.g. `/var/lib/hull/images`.
    pub root: PathBuf,
    /// Where registries are configured.
    pub registries: Registries,
    /// Images that are shown as pinned.
    pub pinned: PinnedImages,
    /// Bounds.
    pub limits: Limits,
    /// How what strangers sent is handled.
    pub workers: Workers,
}

impl StoreConfig {
    /// A configuration with default limits.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>, registries: Registries) -> Self {
        Self {
            root: root.into(),
            registries,
            pinned: PinnedImages::default(),
            limits: Limits::default(),
            workers: Workers::default(),
        }
    }
}
