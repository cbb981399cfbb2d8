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

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info};

use crate::archive::Archive;
use crate::digest::Digest;
use crate::image::ImageId;
use crate::layer::source::{ChannelReader, Chunk};
use crate::layer::{self, ExpectedLayer};
use crate::manifest::{Configuration, Descriptor, Manifest};
use crate::reference::Name;
use crate::registry::{Document, Registry};
use crate::store::files::Pins;
use crate::store::records::{DiskPiece, ImageRecord};
use crate::store::{Shared, StoreError, blocking, disk};

/// Largest image configuration, bytes; as for other runtimes.
pub(crate) const MAX_CONFIGURATION: u64 = 4 << 20;
/// Most indexes that lead to each other.
const MAX_INDEXES: usize = 3;
/// Chunks of a layer that may wait for the unpacker; a chunk is what the network gave at once.
const CHUNKS_AHEAD: usize = 16;
/// How often the log tells about a pull that takes long.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Who pulls; the fields are those of CRI's `AuthConfig`, empty when not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// User name for basic authentication.
    pub username: String,
    /// Password for basic authentication.
    pub password: String,
    /// The server that the credentials are for; empty for all that are asked.
    pub server_address: String,
    /// A token that is exchanged for an access token.
    pub identity_token: String,
    /// A bearer token that is sent as it is.
    pub registry_token: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
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
    /// The store's own files or records failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

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
            let read = Archive::read(archive, directory, name.as_ref(), &shared.config.limits);
            drop(place);
            read
        }
    });
    let (archive, images) = read.await??;
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

/// Who has an image's documents and blobs.
#[derive(Debug)]
enum Source {
    Registry(Registry),
    Archive(Archive),
}

impl Source {
    async fn manifest(&self, digest: &Digest) -> Result<Document, PullError> {
        match self {
            Self::Registry(registry) => registry.manifest(digest).await,
            Self::Archive(archive) => archive.manifest(digest),
        }
    }

    async fn small_blob(&self, blob: &Descriptor, limit: u64) -> Result<Bytes, PullError> {
        match self {
            Self::Registry(registry) => registry.small_blob(blob, limit).await,
            Self::Archive(archive) => archive.small_blob(blob, limit),
        }
    }

    /// Sends a blob's bytes down a channel; the receiver verifies them. Returns the one server that
    /// they came from.
    async fn blob(
        &self,
        blob: &Descriptor,
        chunks: &mpsc::Sender<Chunk>,
        received: impl FnMut(u64),
    ) -> Result<Option<String>, PullError> {
        match self {
            Self::Registry(registry) => registry.blob(blob, chunks, received).await,
            Self::Archive(archive) => {
                archive.blob(blob, chunks, received).await?;
                Ok(None)
            }
        }
    }
}

/// Logs now and then how far a long pull is.
async fn told<T>(
    work: impl Future<Output = T>,
    reference: &str,
    progress: &watch::Sender<PullProgress>,
) -> T {
    let mut tick = tokio::time::interval_at(Instant::now() + TELL_EVERY, TELL_EVERY);
    tokio::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = tick.tick() => {
                let PullProgress { layers, layers_done, bytes, bytes_done } = *progress.borrow();
                info!(%reference, layers, layers_done, bytes, bytes_done, "pulling");
            }
        }
    }
}

struct Pull<'a> {
    shared: &'a Arc<Shared>,
    pins: &'a Pins,
    progress: &'a watch::Sender<PullProgress>,
}

/// A layer to have, and where to get it.
struct LayerToFetch {
    descriptor: Descriptor,
    diff_id: Digest,
    /// Whether it was not on this node when the pull began.
    missing: bool,
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
        let named = registry.resolve().await?;
        self.image(&Source::Registry(registry), &[name], &named)
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
        let (document, config, layers) = image_manifest(source, named).await?;
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
        self.layers(source, layers).await?;
        let _only_one = self.shared.locks.lock(id.as_str()).await;
        let disk = self.disk(&id, &diff_ids).await?;
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
        .await??;
        Ok(id)
    }

    /// Gets all layers that are not there yet, some at a time. A failure stops the others, and
    /// all of them have stopped when this returns.
    async fn layers(&self, source: &Source, layers: Vec<LayerToFetch>) -> Result<(), PullError> {
        let count = layers.len();
        let (stop, stopped) = watch::channel(false);
        let mut unique: Vec<LayerToFetch> = Vec::new();
        for layer in layers {
            if unique.iter().any(|known| known.diff_id == layer.diff_id) {
                self.progress
                    .send_modify(|progress| progress.layers_done += 1);
            } else {
                unique.push(layer);
            }
        }
        for layer in &mut unique {
            layer.missing = !self.shared.files.has_layer(&layer.diff_id);
        }
        let missing = unique.iter().filter(|layer| layer.missing);
        let bytes = missing.fold(0, |sum: u64, layer| {
            sum.saturating_add(layer.descriptor.size)
        });
        self.progress.send_modify(|progress| {
            progress.layers = count;
            progress.bytes = bytes;
        });
        let mut results = futures::stream::iter(unique)
            .map(|layer| self.layer(source, layer, stopped.clone()))
            .buffer_unordered(self.shared.config.limits.parallel_layers.max(1));
        let mut first_failure = None;
        while let Some(result) = results.next().await {
            if let Err(error) = result {
                stop.send_replace(true);
                first_failure.get_or_insert(error);
            }
        }
        first_failure.map_or(Ok(()), Err)
    }

    async fn layer(
        &self,
        source: &Source,
        layer: LayerToFetch,
        mut stopped: watch::Receiver<bool>,
    ) -> Result<(), PullError> {
        let LayerToFetch {
            descriptor,
            diff_id,
            missing,
        } = layer;
        let stop = async move {
            // The sender outlives this; an error would mean that nobody waits any more.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        };
        tokio::pin!(stop);
        let _only_one = tokio::select! {
            lock = self.shared.locks.lock(diff_id.as_str()) => lock,
            () = &mut stop => return Ok(()),
        };
        let there = self.shared.files.has_layer(&diff_id);
        let may_use = async {
            if there {
                self.may_use(source, &descriptor.digest, &diff_id).await
            } else {
                Ok(false)
            }
        };
        let may_use = tokio::select! {
            may_use = may_use => may_use?,
            () = &mut stop => return Ok(()),
        };
        if may_use {
            debug!(%diff_id, "layer is there");
            self.progress.send_modify(|progress| {
                progress.layers_done += 1;
                if missing {
                    // Another pull brought it.
                    progress.bytes_done += descriptor.size;
                }
            });
            return Ok(());
        }
        let max = self.shared.config.limits.max_layer_bytes;
        if descriptor.size > max {
            return Err(PullError::TooLarge {
                what: format!("layer {}", descriptor.digest),
                limit: max,
                unit: "bytes",
            });
        }
        if there && !missing {
            self.progress
                .send_modify(|progress| progress.bytes += descriptor.size);
        }
        let place = tokio::select! {
            place = self.shared.budget.transfer() => place?,
            () = &mut stop => return Ok(()),
        };
        let (chunks, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let expected = ExpectedLayer {
            digest: descriptor.digest.clone(),
            size: descriptor.size,
            diff_id,
        };
        let unpacked = self.unpack(expected.clone(), there, receiver, place);
        let transfer = async {
            let received = |count| {
                self.progress
                    .send_modify(|progress| progress.bytes_done += count);
            };
            let result = tokio::select! {
                result = source.blob(&descriptor, &chunks, received) => result,
                () = &mut stop => Ok(None),
            };
            drop(chunks);
            result
        };
        let (transferred, unpacked) = tokio::join!(transfer, unpacked);
        // A broken transfer also breaks the unpacking; the first is the cause.
        let server = transferred?;
        unpacked??;
        if let Some(server) = server {
            let shared = Arc::clone(self.shared);
            let ExpectedLayer {
                digest, diff_id, ..
            } = expected;
            blocking(move || shared.records.add_source(&diff_id, &server, &digest)).await??;
        }
        self.progress
            .send_modify(|progress| progress.layers_done += 1);
        Ok(())
    }

    /// Whether a layer that is on this node may be used for this image without being sent again.
    ///
    /// A configuration can name any layer, so its author has to show that it has this one, or may
    /// read it. A server that sent the layer as this blob before says that by letting this caller
    /// read the blob. Another one's word is worth nothing, it can say yes to anything.
    async fn may_use(
        &self,
        source: &Source,
        blob: &Digest,
        diff_id: &Digest,
    ) -> Result<bool, PullError> {
        let Source::Registry(registry) = source else {
            return Ok(false);
        };
        // What is wrong shows when the blob is fetched.
        let Ok(server) = registry.may_read(blob).await else {
            return Ok(false);
        };
        let shared = Arc::clone(self.shared);
        let (blob, diff_id) = (blob.clone(), diff_id.clone());
        let known = blocking(move || shared.records.has_source(&diff_id, &server, &blob));
        Ok(known.await??)
    }

    /// Starts the blocking half of a layer, which is only read when it is `there`. It keeps the pins, so that clean-up comes after it
    /// even when nobody waits for it any more.
    fn unpack(
        &self,
        expected: ExpectedLayer,
        there: bool,
        receiver: mpsc::Receiver<Chunk>,
        place: OwnedSemaphorePermit,
    ) -> impl Future<Output = Result<Result<(), PullError>, StoreError>> + use<> {
        let shared = Arc::clone(self.shared);
        let pins = self.pins.clone();
        blocking(move || {
            let limits = &shared.config.limits;
            let stream = ChannelReader::new(receiver);
            if there {
                layer::prove(stream, &expected, limits)?;
            } else {
                let directory = shared.files.new_directory()?;
                layer::unpack(stream, &expected, directory.path(), limits)?;
                shared.files.keep_layer(directory, &expected.diff_id)?;
            }
            drop((pins, place));
            Ok(())
        })
    }

    /// Makes the image's disk, or finds it.
    async fn disk(&self, id: &ImageId, layers: &[Digest]) -> Result<Vec<DiskPiece>, PullError> {
        let (shared, pins) = (Arc::clone(self.shared), self.pins.clone());
        let (id, layers) = (id.clone(), layers.to_vec());
        let found = blocking({
            let (shared, id, layers) = (Arc::clone(&shared), id.clone(), layers.clone());
            move || match shared.records.image(&id)? {
                Some(record) if shared.files.has_image(&id) => Ok(Found::Disk(record.disk)),
                _ => disk::memory(&shared, &layers).map(Found::Layers),
            }
        });
        let memory = match found.await?? {
            Found::Disk(disk) => return Ok(disk),
            Found::Layers(memory) => memory,
        };
        let memory = self.shared.budget.tree(memory).await?;
        blocking(move || {
            let disk = disk::build(&shared, &id, &layers, &memory);
            drop((pins, memory));
            disk
        })
        .await?
    }
}

/// What there is of an image.
enum Found {
    Disk(Vec<DiskPiece>),
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

fn pair_layers(
    configuration: &Configuration,
    layers: Vec<Descriptor>,
    max_layers: usize,
    config_digest: &Digest,
) -> Result<Vec<LayerToFetch>, PullError> {
    let what = || format!("image configuration {config_digest}");
    let diff_ids = configuration.rootfs.diff_ids.clone().unwrap_or_default();
    if layers.len() != diff_ids.len() {
        let reason = format!(
            "has {} layers, and the manifest has {}",
            diff_ids.len(),
            layers.len()
        );
        return Err(PullError::Unsupported {
            what: what(),
            reason,
        });
    }
    if layers.len() > max_layers {
        return Err(PullError::TooLarge {
            what: what(),
            limit: max_layers as u64,
            unit: "layers",
        });
    }
    Ok(layers
        .into_iter()
        .zip(diff_ids)
        .map(|(descriptor, diff_id)| LayerToFetch {
            descriptor,
            diff_id,
            missing: false,
        })
        .collect())
}
