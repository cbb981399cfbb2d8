//! The layers of an image: those that are missing are sent and unpacked, some at a time.

use std::sync::Arc;

use futures::StreamExt;
use hull_base::{blocking, stages::stage};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tracing::debug;

use crate::digest::Digest;
use crate::error::PullError;
use crate::manifest::{Configuration, Descriptor};
use crate::store::pins::Pins;
use crate::store::shared::Shared;
use crate::unpack::{self, ExpectedLayer, Transfer};

use super::progress::PullProgress;
use super::source::Source;

/// Chunks of a layer that may wait for the unpacker; a chunk is what the network gave at once.
const CHUNKS_AHEAD: usize = 16;
/// A layer to have, and where to get it.
pub(super) struct LayerToFetch {
    pub(super) descriptor: Descriptor,
    pub(super) diff_id: Digest,
    /// Whether it was not on this node when the pull began.
    missing: bool,
}

/// Gets the layers of one image.
pub(super) struct Layers<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) pins: &'a Pins,
    pub(super) source: &'a Source,
    pub(super) progress: &'a watch::Sender<PullProgress>,
}

impl Layers<'_> {
    /// Gets all layers that are not there yet, some at a time. A failure stops the others, and
    /// all of them have stopped when this returns.
    pub(super) async fn all(&self, layers: Vec<LayerToFetch>) -> Result<(), PullError> {
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
            .map(|layer| {
                let name = format!("layer {}", layer.descriptor.digest);
                stage(name, self.layer(layer, stopped.clone()))
            })
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
                self.may_use(&descriptor.digest, &diff_id).await
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
        let (want, wanted) = oneshot::channel();
        let expected = ExpectedLayer {
            digest: descriptor.digest.clone(),
            size: descriptor.size,
            diff_id,
        };
        let incoming = Transfer {
            chunks: receiver,
            wanted,
        };
        let unpacked = self.unpack(expected.clone(), there, incoming, place);
        let transfer = async {
            let received = |count| {
                self.progress
                    .send_modify(|progress| progress.bytes_done += count);
            };
            let result = tokio::select! {
                result = self.source.blob(&descriptor, &chunks, received) => {
                    result.map(|server| (server, Some(want)))
                }
                () = &mut stop => Ok((None, None)),
            };
            drop(chunks);
            result
        };
        let (transferred, unpacked) = tokio::join!(transfer, unpacked);
        // A broken transfer also breaks the unpacking; the first is the cause.
        let (server, _want) = transferred?;
        unpacked?;
        if let Some(server) = server {
            let shared = Arc::clone(self.shared);
            let ExpectedLayer {
                digest, diff_id, ..
            } = expected;
            blocking(move || shared.records.add_source(&diff_id, &server, &digest)).await?;
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
    async fn may_use(&self, blob: &Digest, diff_id: &Digest) -> Result<bool, PullError> {
        let Source::Registry(registry) = self.source else {
            return Ok(false);
        };
        // What is wrong shows when the blob is fetched.
        let Ok(server) = registry.may_read(blob).await else {
            return Ok(false);
        };
        let shared = Arc::clone(self.shared);
        let (blob, diff_id) = (blob.clone(), diff_id.clone());
        let known = blocking(move || shared.records.has_source(&diff_id, &server, &blob));
        Ok(known.await?)
    }

    /// Starts the half of a layer that blocks, which is only read when it is `there`. It keeps the
    /// pins, so that clean-up comes after it even when nobody waits for it any more.
    fn unpack(
        &self,
        expected: ExpectedLayer,
        there: bool,
        transfer: Transfer,
        place: OwnedSemaphorePermit,
    ) -> impl Future<Output = Result<(), PullError>> + use<> {
        let shared = Arc::clone(self.shared);
        let pins = self.pins.clone();
        blocking(move || {
            if there {
                unpack::prove(transfer, &expected, &shared.config)?;
            } else {
                let directory = shared.files.new_directory()?;
                unpack::unpack(transfer, &expected, directory.path(), &shared.config)?;
                shared.files.keep_layer(directory, &expected.diff_id)?;
            }
            drop((pins, place));
            Ok(())
        })
    }
}

/// The layers of a manifest, each with the diff-ID that the configuration has in its place.
pub(super) fn pair_layers(
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
