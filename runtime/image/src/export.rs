//! From the store to an archive: an OCI image layout (image-spec, image-layout.md) with the
//! `manifest.json` that lets `docker load` read it too.
//!
//! What a registry sent is not kept, so layers are written as plain tar streams, made again from
//! their recipes by workers; each is held against its diff-ID as it passes. The manifest is a new one.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::sync::Arc;

use hull_base::blocking;
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::error::StoreError;
use crate::image::ImageId;
use crate::layer::recipe::announced_length;
use crate::layer::source::HashReader;
use crate::manifest::types;
use crate::reference::Name;
use crate::remade::Remade;
use crate::store::pins::Pins;
use crate::store::records::ImageRecord;
use crate::store::shared::Shared;

/// An image to write, and the names to write it under.
struct Chosen {
    record: ImageRecord,
    tags: Vec<String>,
}

/// Writes the images that `names` name. They stay as long as that takes.
pub(crate) async fn export(
    shared: &Arc<Shared>,
    names: &[String],
    out: impl Write + Send + 'static,
) -> Result<(), StoreError> {
    let place = shared.budget.pull().await?;
    let pins = Pins::new(shared);
    let work = blocking({
        let (shared, pins, names) = (Arc::clone(shared), pins.clone(), names.to_vec());
        move || {
            let images = choose(&shared, &names, &pins)?;
            let result = Writer::new(&shared, out).layout(&images);
            drop((pins, place));
            result
        }
    });
    let result = work.await;
    result.and(pins.release().await)
}

/// Finds the images and keeps them. One that is asked for by several names has them all.
fn choose(shared: &Shared, names: &[String], pins: &Pins) -> Result<Vec<Chosen>, StoreError> {
    let mut images: Vec<Chosen> = Vec::new();
    for name in names {
        let not_found = || StoreError::NotFound(name.clone());
        let id = shared.records.find(name)?.ok_or_else(not_found)?;
        let known = shared.records.describe(&id)?.ok_or_else(not_found)?;
        let tag = Name::parse(name).ok().and_then(|name| name.tagged());
        let mut tags = match tag.filter(|tag| known.repo_tags.contains(tag)) {
            Some(tag) => vec![tag],
            None => known.repo_tags,
        };
        if let Some(image) = images.iter_mut().find(|image| image.record.id == id) {
            tags.retain(|tag| !image.tags.contains(tag));
            image.tags.append(&mut tags);
            continue;
        }
        let record = shared.records.image(&id)?.ok_or_else(not_found)?;
        pins.add(&id, &record.layers);
        // Removed before it was pinned?
        shared.records.image(&id)?.ok_or_else(not_found)?;
        images.push(Chosen { record, tags });
    }
    Ok(images)
}

struct Writer<'a, W: Write> {
    shared: &'a Shared,
    archive: tar::Builder<W>,
    /// Blobs that are in the archive already.
    written: HashSet<String>,
}

impl<'a, W: Write> Writer<'a, W> {
    fn new(shared: &'a Shared, out: W) -> Self {
        Self {
            shared,
            archive: tar::Builder::new(out),
            written: HashSet::new(),
        }
    }

    fn layout(mut self, images: &[Chosen]) -> Result<(), StoreError> {
        self.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut index = Vec::new();
        let mut saved = Vec::new();
        for image in images {
            let (manifest, layers) = self.image(&image.record)?;
            if image.tags.is_empty() {
                index.push(manifest.clone());
            }
            for tag in &image.tags {
                let mut manifest = manifest.clone();
                let short = tag.rsplit(':').next().unwrap_or_default();
                manifest["annotations"] = json!({
                    "io.containerd.image.name": tag, "org.opencontainers.image.ref.name": short,
                });
                index.push(manifest);
            }
            saved.push(json!({
                "Config": blob_path(image.record.id.as_str()),
                "RepoTags": image.tags,
                "Layers": layers,
            }));
        }
        let index = json!({
            "schemaVersion": 2, "mediaType": types::OCI_INDEX, "manifests": index,
        });
        self.file("index.json", index.to_string().as_bytes())?;
        self.file("manifest.json", Value::from(saved).to_string().as_bytes())?;
        let mut out = self.archive.into_inner().map_err(write_failed)?;
        out.flush().map_err(write_failed)
    }

    /// Writes an image's blobs; returns its manifest's descriptor and the layers' paths.
    fn image(&mut self, record: &ImageRecord) -> Result<(Value, Vec<String>), StoreError> {
        let id = &record.id;
        let configuration = record.configuration.as_bytes();
        if Digest::of(configuration).as_str() != id.as_str() {
            let reason = "its stored configuration is not the one that it is known by";
            return Err(damaged(id, reason));
        }
        self.blob(id.as_str(), configuration)?;
        let mut layers = Vec::new();
        let mut paths = Vec::new();
        for layer in &record.layers {
            let size = self.layer(id, layer)?;
            layers.push(json!({"mediaType": types::OCI_LAYER, "digest": layer, "size": size}));
            paths.push(blob_path(layer.as_str()));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": types::OCI_MANIFEST,
            "config": {
                "mediaType": types::OCI_CONFIG, "digest": id, "size": configuration.len(),
            },
            "layers": layers,
        });
        let manifest = manifest.to_string();
        let digest = Digest::of(manifest.as_bytes());
        self.blob(digest.as_str(), manifest.as_bytes())?;
        let descriptor = json!({
            "mediaType": types::OCI_MANIFEST, "digest": digest, "size": manifest.len(),
            "platform": {"os": "linux", "architecture": "amd64"},
        });
        Ok((descriptor, paths))
    }

    /// Writes a layer's stream, unless it is there; returns its length.
    fn layer(&mut self, image: &ImageId, layer: &Digest) -> Result<u64, StoreError> {
        let action = format!("export layer {layer} of image {image}");
        let directory = self.shared.files.layer(layer);
        let open = |name| {
            let opened = File::open(directory.join(name));
            opened.map_err(|e| StoreError::io(&action, e))
        };
        let mut recipe = open("recipe")?;
        let length = announced_length(&mut recipe).map_err(|e| StoreError::io(&action, e))?;
        if !self.written.insert(layer.to_string()) {
            return Ok(length);
        }
        recipe.rewind().map_err(|e| StoreError::io(&action, e))?;
        let remade = Remade::start(&self.shared.config.workers, &recipe, &open("data")?);
        let remade = remade.map_err(|e| StoreError::io(&action, io::Error::other(e)))?;
        let mut stream = HashReader::new(remade, layer.hasher(), length);
        let mut failure = None;
        let watched = Watched {
            inner: &mut stream,
            failure: &mut failure,
        };
        let appended = self.append(&blob_path(layer.as_str()), length, watched.take(length));
        if let Some(e) = failure {
            return Err(StoreError::io(action, e));
        }
        appended.map_err(write_failed)?;
        let (actual, count) = stream.finish().map_err(|e| StoreError::io(&action, e))?;
        if actual != *layer || count != length {
            return Err(damaged(
                image,
                "its stored layer is not the one that was pulled",
            ));
        }
        Ok(length)
    }

    fn blob(&mut self, digest: &str, bytes: &[u8]) -> Result<(), StoreError> {
        if self.written.insert(digest.to_owned()) {
            self.file(&blob_path(digest), bytes)?;
        }
        Ok(())
    }

    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.append(path, bytes.len() as u64, bytes)
            .map_err(write_failed)
    }

    fn append(&mut self, path: &str, length: u64, contents: impl Read) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(length);
        header.set_mode(0o644);
        self.archive.append_data(&mut header, path, contents)
    }
}

/// Keeps what reading failed with apart from what writing failed with.
struct Watched<'a, R> {
    inner: R,
    failure: &'a mut Option<io::Error>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|e| {
            let kind = e.kind();
            *self.failure = Some(e);
            kind.into()
        })
    }
}

/// `blobs/sha256/…`
fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn damaged(image: &ImageId, reason: &'static str) -> StoreError {
    let source = io::Error::new(io::ErrorKind::InvalidData, reason);
    StoreError::io(format!("export image {image}"), source)
}

fn write_failed(source: io::Error) -> StoreError {
    StoreError::io("write the archive", source)
}
