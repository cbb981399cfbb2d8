//! From a name, or an archive, to a complete image.
//!
//! ```text
//! name ─▶ manifest ─▶ (index: manifest of linux/amd64) ─▶ configuration ─▶ layers, in parallel
//!      ─▶ merged tree ─▶ metadata disk ─▶ record          each verified before it is used
//! ```
//!
//! Every step writes in the store's temporary directory and renames when it is complete. What a
//! pull needs is pinned while it runs; when the last pin goes, whatever no record names goes too:
//! that is the whole of the clean-up, after errors, after a caller that went away, and after
//! success.

mod layers;
pub(crate) mod progress;
mod source;

use std::io::Read;
use std::sync::Arc;

use hull_base::{blocking, stages::stage};
use tokio::sync::{oneshot, watch};
use tracing::info;

use crate::archive::Archive;
use crate::digest::Digest;
use crate::error::PullError;
use crate::image::ImageId;
use crate::manifest::{Configuration, Descriptor, Document, MAX_CONFIGURATION, Manifest};
use crate::reference::Name;
use crate::registry::Registry;
use crate::registry::auth::Auth;
use crate::store::disk;
use crate::store::pins::Pins;
use crate::store::records::{ExtentRecord, ImageRecord};
use crate::store::shared::Shared;

use layers::{Layers, pair_layers};
use progress::{PullProgress, told};
use source::Source;

/// Most indexes that lead to each other.
const MAX_INDEXES: usize = 3;
/// Pulls an image into the store.
pub(crate) async fn pull(
    shared: &Arc<Shared>,
    reference: &str,
    auth: Option<Auth>,
    progress: &watch::Sender<PullProgress>,
) -> Result<ImageId, PullError> {
    let _place = shared.budget.pull().await?;
    let pins = Pins::new(shared);
    let pull = Pull {
        shared,
        pins: &pins,
        progress,
    };
    let result = told(pull.of_registry(reference, auth), reference, progress).await;
    let id = released(pins, result).await?;
    info!(%reference, %id, "pulled");
    Ok(id)
}

/// Takes the images of an archive into the store, as pulls do from the archive as a registry.
pub(crate) async fn import(
    shared: &Arc<Shared>,
    archive: impl Read + Send + 'static,
    name: Option<&str>,
    progress: &watch::Sender<PullProgress>,
) -> Result<Vec<ImageId>, PullError> {
    let name = name.map(Name::parse).transpose()?;
    let place = Arc::new(shared.budget.pull().await?);
    let read = blocking({
        let (shared, place) = (Arc::clone(shared), Arc::clone(&place));
        move || {
            let directory = shared.files.new_directory()?;
            let read = Archive::read(archive, directory, name.as_ref(), &shared.config);
            drop(place);
            read
        }
    });
    let (archive, images) = read.await?;
    let source = Source::Archive(archive);
    let mut ids = Vec::new();
    for image in images {
        progress.send_replace(PullProgress::default());
        let pins = Pins::new(shared);
        let pull = Pull {
            shared,
            pins: &pins,
            progress,
        };
        let result = pull.image(&source, &image.names, &image.document).await;
        let id = released(pins, result).await?;
        info!(name = image.names.first().map(Name::full), %id, "imported");
        // An image with several names is there once.
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Waits for the clean-up, so that a caller who sees an error also sees that nothing is left.
async fn released<T>(pins: Pins, result: Result<T, PullError>) -> Result<T, PullError> {
    let cleaned = pins.release().await;
    let value = result?;
    cleaned?;
    Ok(value)
}

struct Pull<'a> {
    shared: &'a Arc<Shared>,
    pins: &'a Pins,
    progress: &'a watch::Sender<PullProgress>,
}

impl Pull<'_> {
    async fn of_registry(&self, reference: &str, auth: Option<Auth>) -> Result<ImageId, PullError> {
        let name = Name::parse(reference)?;
        let registry = Registry::open(
            &name,
            auth,
            &self.shared.config.registries,
            &self.shared.config.limits,
            &self.shared.clients,
        )?;
        let named = stage("resolve", registry.resolve()).await?;
        self.image(&Source::Registry(registry.into()), &[name], &named)
            .await
    }

    /// Makes the image that `names` name by `named` complete.
    async fn image(
        &self,
        source: &Source,
        names: &[Name],
        named: &Document,
    ) -> Result<ImageId, PullError> {
        let limits = &self.shared.config.limits;
        let (document, config, layers) = stage("manifest", image_manifest(source, named)).await?;
        let id =
            ImageId::try_from(config.digest.to_string()).map_err(|e| PullError::Unsupported {
                what: format!("manifest {}", document.digest),
                reason: e.to_string(),
            })?;
        let config_text = source.small_blob(&config, MAX_CONFIGURATION).await?;
        let configuration = Configuration::parse(&config.digest, &config_text)?;
        let layers = pair_layers(&configuration, layers, limits.max_layers, &config.digest)?;

        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let size = document.bytes.len() as u64
            + layers.iter().fold(config.size, |sum, layer| {
                sum.saturating_add(layer.descriptor.size)
            });
        self.pins.add(&id, &diff_ids);
        let fetch = Layers {
            shared: self.shared,
            pins: self.pins,
            source,
            progress: self.progress,
        };
        stage("layers", fetch.all(layers)).await?;
        let _only_one = self.shared.locks.lock(id.as_str()).await;
        let disk = stage("disk", self.disk(&id, &diff_ids)).await?;
        let record = ImageRecord {
            id: id.clone(),
            manifest: String::from_utf8_lossy(&document.bytes).into_owned(),
            manifest_digest: document.digest.clone(),
            configuration: String::from_utf8_lossy(&config_text).into_owned(),
            layers: diff_ids,
            disk,
            size,
            pinned: false,
            removed: false,
        };
        let names: Vec<String> = names
            .iter()
            .flat_map(|name| [Some(name.with_digest(&named.digest)), name.tagged()])
            .flatten()
            .collect();
        let (shared, pins) = (Arc::clone(self.shared), self.pins.clone());
        blocking(move || {
            let put = shared.records.put_image(&record, &names);
            drop(pins);
            put
        })
        .await?;
        Ok(id)
    }

    /// Makes the image's disk, or finds it.
    async fn disk(&self, id: &ImageId, layers: &[Digest]) -> Result<Vec<ExtentRecord>, PullError> {
        let (shared, pins) = (Arc::clone(self.shared), self.pins.clone());
        let (id, layers) = (id.clone(), layers.to_vec());
        let found = blocking({
            let (shared, id, layers) = (Arc::clone(&shared), id.clone(), layers.clone());
            move || match shared.records.image(&id)? {
                Some(record) if shared.files.has_image(&id) => Ok(Found::Disk(record.disk)),
                _ => disk::memory(&shared, &layers).map(Found::Layers),
            }
        });
        let memory = match found.await? {
            Found::Disk(disk) => return Ok(disk),
            Found::Layers(memory) => memory,
        };
        let memory = self.shared.budget.tree(memory).await?;
        let (want, wanted) = oneshot::channel();
        let disk = blocking(move || {
            let disk = disk::build(&shared, &id, &layers, &memory, wanted);
            drop((pins, memory));
            disk
        })
        .await;
        drop(want);
        disk
    }
}

/// What there is of an image.
enum Found {
    Disk(Vec<ExtentRecord>),
    /// Its layers alone; bytes of memory that its disk takes to make.
    Layers(u64),
}

/// The image's own manifest, through indexes if need be.
async fn image_manifest(
    source: &Source,
    named: &Document,
) -> Result<(Document, Descriptor, Vec<Descriptor>), PullError> {
    let mut document = Document {
        bytes: named.bytes.clone(),
        digest: named.digest.clone(),
        content_type: named.content_type.clone(),
    };
    for _ in 0..=MAX_INDEXES {
        match Manifest::parse(&document)? {
            Manifest::Image { config, layers } => return Ok((document, config, layers)),
            Manifest::Index(chosen) => document = source.manifest(&chosen.digest).await?,
        }
    }
    Err(PullError::Unsupported {
        what: format!("manifest {}", named.digest),
        reason: "indexes lead to indexes".into(),
    })
}
