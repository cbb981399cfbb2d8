//! The store: what the rest of the runtime calls.
//!
//! ```text
//! <root>/images.redb                     records: images, names, leases
//! <root>/layers/<diff-id>/               data, tree, recipe: shared by all images that have the layer
//! <root>/images/<id>/meta.erofs          metadata of one image's disk
//! <root>/tmp/                            work in progress; emptied at open
//! ```

pub(crate) mod budget;
pub(crate) mod disk;
pub(crate) mod files;
mod locks;
pub(crate) mod records;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::export;
use crate::image::{DiskExtent, Image, ImageId};
use crate::pinned::PinnedImages;
use crate::pull::{self, Auth, PullError, PullProgress};
use crate::registry::HttpClients;

use budget::Budget;
use files::Files;
use locks::Locks;
use records::Records;

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
        }
    }
}

/// What the store occupies on its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

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
    /// A task of the store ended without a result.
    #[error("run a task of the image store")]
    Task(#[source] tokio::task::JoinError),
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

/// The images of this node. Clones share one store.
#[derive(Debug, Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

/// What all clones and all pulls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    pub(crate) files: Files,
    pub(crate) records: Records,
    /// What of them was lost when the store was opened, for a person.
    lost: Vec<String>,
    pub(crate) locks: Locks,
    pub(crate) clients: Arc<HttpClients>,
    pub(crate) budget: Budget,
}

impl ImageStore {
    /// Opens the store, creates it when absent, and removes what an interrupted run left.
    ///
    /// # Errors
    /// When the directory or its records cannot be used, e.g. because another process has them open.
    pub async fn open(config: StoreConfig) -> Result<Self, StoreError> {
        blocking(move || {
            let files = Files::open(&config.root)?;
            let (records, lost) = Records::open(&config.root.join("images.redb"))?;
            let shared = Shared {
                budget: Budget::new(&config.limits),
                config,
                files,
                records,
                lost,
                locks: Locks::default(),
                clients: Arc::default(),
            };
            shared.collect_garbage()?;
            Ok(Self {
                shared: Arc::new(shared),
            })
        })
        .await?
    }

    /// Pulls an image and makes its disk; a layer that is present is not fetched again.
    ///
    /// # Errors
    /// See [`PullError`]; nothing of a failed pull stays, nor of one whose future was dropped.
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
        reference: &str,
        auth: Option<Auth>,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<ImageId, PullError> {
        pull::pull(&self.shared, reference, auth, progress).await
    }

    /// Takes in the images of an archive, an OCI image layout or what `docker save` writes, plain
    /// or compressed. They are verified as those from a registry are. `name` names an image that
    /// the archive does not, or that is to be named otherwise.
    ///
    /// # Errors
    /// See [`PullError`]; images that came before the one that failed stay.
    pub async fn import(
        &self,
        archive: impl io::Read + Send + 'static,
        name: Option<&str>,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<Vec<ImageId>, PullError> {
        pull::import(&self.shared, archive, name, progress).await
    }

    /// Writes images, by name or id, as one OCI image layout in a tar archive. Layers are written
    /// plain, with the digests that the configuration names: an image's id is the same wherever it
    /// is imported, the digest of its manifest is another one than its registry's.
    ///
    /// # Errors
    /// When an image is unknown, its files are not as they were made, or `out` fails.
    pub async fn export(
        &self,
        names: &[String],
        out: impl io::Write + Send + 'static,
    ) -> Result<(), StoreError> {
        export::export(&self.shared, names, out).await
    }

    /// Finds an image by name, name@digest, id, or the start of an id that no other image shares (at
    /// least 8 digits, or after `sha256:`); `None` when there is none.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn get(&self, name_or_id: &str) -> Result<Option<Image>, StoreError> {
        let wanted = name_or_id.to_owned();
        self.with(move |shared| {
            let image = shared.records.describe_named(&wanted)?;
            Ok(image.map(|image| shared.with_pin(image)))
        })
        .await
    }

    /// Lists the images, sorted by id.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn list(&self) -> Result<Vec<Image>, StoreError> {
        let mut images = self.list_all().await?;
        images.retain(|image| !image.removed);
        Ok(images)
    }

    /// As [`ImageStore::list`], with images that are removed and still leased.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn list_all(&self) -> Result<Vec<Image>, StoreError> {
        self.with(|shared| {
            let images = shared.records.describe_all()?;
            Ok(images.into_iter().map(|i| shared.with_pin(i)).collect())
        })
        .await
    }

    /// Removes an image with all its names; one that is absent is removed already. Files that are
    /// leased stay until their last lease is released.
    ///
    /// # Errors
    /// When records or files cannot be changed.
    pub async fn remove(&self, name_or_id: &str) -> Result<(), StoreError> {
        let wanted = name_or_id.to_owned();
        self.with(move |shared| {
            if let Some(id) = shared.records.find(&wanted)? {
                shared.records.remove_image(&id)?;
                shared.collect_garbage()?;
            }
            Ok(())
        })
        .await
    }

    /// The image's configuration as the registry has it, JSON.
    ///
    /// # Errors
    /// When the image is unknown or the records cannot be read.
    pub async fn configuration(&self, id: &ImageId) -> Result<String, StoreError> {
        let id = id.clone();
        self.with(move |shared| match shared.records.image(&id)? {
            Some(record) => Ok(record.configuration),
            None => Err(StoreError::NotFound(id.to_string())),
        })
        .await
    }

    /// The pieces of the image's block device, a read-only EROFS.
    ///
    /// # Errors
    /// When the image is unknown or its files are not as they were made.
    pub async fn disk(&self, id: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
        let id = id.clone();
        self.with(move |shared| disk::extents(shared, &id)).await
    }

    /// Keeps the image's disk until `owner` releases it, over restarts too. Idempotent.
    ///
    /// # Errors
    /// When the image is unknown or the records cannot be written.
    pub async fn lease(&self, id: &ImageId, owner: &str) -> Result<(), StoreError> {
        let (id, owner) = (id.clone(), owner.to_owned());
        self.with(move |shared| shared.records.lease(&id, &owner))
            .await
    }

    /// Gives up all leases of `owner`; deletes what nobody needs any more. Idempotent.
    ///
    /// # Errors
    /// When records or files cannot be changed.
    pub async fn release(&self, owner: &str) -> Result<(), StoreError> {
        let owner = owner.to_owned();
        self.with(move |shared| {
            if shared.records.release(&owner)? {
                shared.collect_garbage()?;
            }
            Ok(())
        })
        .await
    }

    /// The owners that hold leases, sorted: a caller releases those it no longer knows.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn lease_owners(&self) -> Result<Vec<String>, StoreError> {
        self.with(|shared| shared.records.lease_owners()).await
    }

    /// What of the records was lost when the store was opened, for a person; empty: nothing.
    #[must_use]
    pub fn record_faults(&self) -> &[String] {
        &self.shared.lost
    }

    /// What the store occupies.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn usage(&self) -> Result<Usage, StoreError> {
        self.with(|shared| shared.files.usage()).await
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        blocking(move || work(&shared)).await?
    }
}

impl Shared {
    /// Pins the image if one of its names is configured so.
    fn with_pin(&self, mut image: Image) -> Image {
        let mut names = image.repo_tags.iter().chain(&image.repo_digests);
        image.pinned |= names.any(|name| self.config.pinned.has(name));
        image
    }

    /// Deletes every layer and image directory that neither a record nor a running pull needs.
    pub(crate) fn collect_garbage(&self) -> Result<(), StoreError> {
        let gone = self.files.collect_garbage(|| self.records.needed())?;
        if gone.is_empty() {
            return Ok(());
        }
        self.records.forget_sources(&gone)
    }
}

/// Runs disk and CPU work where it may block. The work starts at once, and goes on when nobody
/// waits for it any more.
pub(crate) fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = Result<T, StoreError>> {
    let task = tokio::task::spawn_blocking(work);
    async { task.await.map_err(StoreError::Task) }
}
