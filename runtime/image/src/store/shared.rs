//! What all clones of the store and all pulls share.

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::StoreConfig;
use crate::error::StoreError;
use crate::image::Image;
use crate::pinned::PinnedImages;
use crate::registry::client::HttpClients;

use super::budget::Budget;
use super::files::Files;
use super::locks::Locks;
use super::records::Records;

/// What all clones and all pulls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    /// What counts of the configuration's pins: they can change.
    pub(crate) pinned: watch::Sender<PinnedImages>,
    pub(crate) files: Files,
    pub(crate) records: Records,
    /// What of them was lost when the store was opened, for a person.
    pub(crate) lost: Vec<String>,
    pub(crate) locks: Locks,
    pub(crate) clients: Arc<HttpClients>,
    pub(crate) budget: Budget,
}

impl Shared {
    /// Pins the image if one of its names is configured so.
    pub(crate) fn with_pin(&self, mut image: Image) -> Image {
        let mut names = image.repo_tags.iter().chain(&image.repo_digests);
        let pinned = self.pinned.borrow();
        image.pinned |= names.any(|name| pinned.has(name));
        drop(pinned);
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
