//! The store: what the rest of the runtime calls.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use hull_base::{blocking, metrics};
use tokio::sync::watch;

use crate::config::StoreConfig;
use crate::error::{PullError, StoreError};
use crate::export;
use crate::image::{DiskExtent, Image, ImageId};
use crate::pinned::PinnedImages;
use crate::pull;
use crate::pull::progress::PullProgress;
use crate::reference::Name;
use crate::registry::Registry;
use crate::registry::auth::Auth;
use crate::store::budget::Budget;
use crate::store::disk;
use crate::store::files::{Files, Usage};
use crate::store::locks::Locks;
use crate::store::records::Records;
use crate::store::shared::Shared;

/// The images of this node. Clones share one store.
#[derive(Debug, Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
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
                pinned: watch::Sender::new(config.pinned.clone()),
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
        .await
    }

    /// Pins other images from now on, in place of those of the configuration.
    pub fn pin(&self, pinned: PinnedImages) {
        self.shared.pinned.send_replace(pinned);
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
        let begun = Instant::now();
        let result = pull::pull(&self.shared, reference, auth, progress).await;
        metrics::PULL.observe(&[metrics::result(&result)], begun.elapsed());
        result
    }

    /// Asks a registry, a host with a port if it has one, whether it lets a caller in. Returns its name as
    /// images have it.
    ///
    /// # Errors
    /// [`PullError::Unauthorized`] when it does not; see [`PullError`] for others.
    pub async fn log_in(&self, registry: &str, auth: Auth) -> Result<String, PullError> {
        let name = Name::of_registry(registry)?;
        let config = &self.shared.config;
        let (registries, limits) = (&config.registries, &config.limits);
        let clients = &self.shared.clients;
        let registry = Registry::open(&name, Some(auth), registries, limits, clients)?;
        registry.log_in().await?;
        Ok(name.registry().to_owned())
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

    /// The extents of the image's block device, a read-only EROFS.
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
        blocking(move || work(&shared)).await
    }
}
