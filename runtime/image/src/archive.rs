//! Images in one tar archive, as a source for a pull: an OCI image layout (image-spec,
//! image-layout.md) or what `docker save` writes.
//!
//! The archive is read once, from the first byte to the last, and its files are laid down one
//! after the other in a file of the store's temporary directory: an index may come after the
//! blobs that it names. From there on it is a registry: nothing in it is trusted before its digest
//! is that which is asked for. No name in the archive ever becomes a name on this machine.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use hull_base::blocking;
use serde::Deserialize;
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::config::Limits;
use crate::digest::Digest;
use crate::error::{PullError, StoreError};
use crate::layer::header::TarError;
use crate::layer::path::clean_path;
use crate::layer::source::{BUFFER, Chunk, decompress};
use crate::layer::tar::{Member, MemberKind, TarReader};
use crate::manifest::{Descriptor, Document, MAX_CONFIGURATION, choose, types};
use crate::reference::Name;
use crate::shown::{json_error, line};

/// Largest document of the archive's own (index, `manifest.json`), bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Most files and links.
const MAX_MEMBERS: usize = 1 << 16;
/// Most bytes of all their names.
const MAX_NAMES: usize = 8 << 20;
/// Bytes of headers and padding beside the files.
const OVERHEAD: u64 = 256 << 20;
/// Most links that lead to each other.
const MAX_LINKS: usize = 8;

/// Annotations that name an image: containerd's with the whole name, the specification's with
/// whatever the writer likes, often the tag alone.
const FULL_NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An archive whose files are on this machine.
#[derive(Debug)]
pub(crate) struct Archive {
    spool: Arc<File>,
    blobs: HashMap<Digest, Span>,
    /// Removes the file at the end.
    _directory: TempDir,
}

/// An image of the archive.
#[derive(Debug)]
pub(crate) struct ArchivedImage {
    pub(crate) names: Vec<Name>,
    pub(crate) document: Document,
}

/// Where a file's bytes are.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset: u64,
    length: u64,
}

#[derive(Debug)]
enum Found {
    File(Span),
    /// Another path of the archive.
    Link(Vec<u8>),
}

impl Archive {
    /// Reads a whole archive, plain or compressed, and tells what images are in it. `name` is for
    /// one that does not name its image itself, or is to be named otherwise. Blocks.
    pub(crate) fn read(
        stream: impl Read,
        directory: TempDir,
        name: Option<&Name>,
        limits: &Limits,
    ) -> Result<(Self, Vec<ArchivedImage>), PullError> {
        let spool = Spool::fill(stream, directory, limits)?;
        let (archive, images) = if spool.is_oci_layout()? {
            oci_layout(spool, name)?
        } else if spool.find(b"manifest.json")?.is_some() {
            docker_save(spool, name)?
        } else {
            return Err(unusable(
                "is neither an OCI image layout nor what docker save writes",
            ));
        };
        if images.is_empty() {
            return Err(unusable("has no image"));
        }
        Ok((archive, images))
    }

    /// The manifest with a digest.
    pub(crate) fn manifest(&self, digest: &Digest) -> Result<Document, PullError> {
        Ok(Document {
            bytes: self.whole(digest, MAX_DOCUMENT)?.into(),
            digest: digest.clone(),
            content_type: String::new(),
        })
    }

    /// A small blob whole.
    pub(crate) fn small_blob(&self, blob: &Descriptor, limit: u64) -> Result<Bytes, PullError> {
        Ok(self.whole(&blob.digest, limit)?.into())
    }

    /// Sends a blob's bytes down a channel; the receiver verifies them. Ends early without error
    /// when the receiver is gone.
    pub(crate) async fn blob(
        &self,
        blob: &Descriptor,
        chunks: &mpsc::Sender<Chunk>,
        mut received: impl FnMut(u64),
    ) -> Result<(), PullError> {
        let Span { mut offset, length } = self.span(&blob.digest)?;
        let end = offset + length;
        while offset < end {
            let spool = Arc::clone(&self.spool);
            let read = blocking(move || {
                let size = (end - offset).min(BUFFER as u64);
                let mut bytes = vec![0; usize::try_from(size).unwrap_or(BUFFER)];
                spool.read_exact_at(&mut bytes, offset).map(|()| bytes)
            });
            let bytes = read
                .await
                .map_err(|e| StoreError::io("read the stored archive", e))?;
            offset += bytes.len() as u64;
            received(bytes.len() as u64);
            if chunks.send(Chunk::Data(bytes.into())).await.is_err() {
                return Ok(());
            }
        }
        // The receiver may be gone already, having failed for its own reasons.
        let _ = chunks.send(Chunk::End).await;
        Ok(())
    }

    fn span(&self, digest: &Digest) -> Result<Span, PullError> {
        let span = self.blobs.get(digest).copied();
        span.ok_or_else(|| PullError::NotFound {
            what: format!("blob {digest}"),
            registry: "the archive".into(),
        })
    }

    fn whole(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, PullError> {
        let what = format!("blob {digest}");
        let bytes = read_span(&self.spool, self.span(digest)?, limit, &what)?;
        digest.verify(&what, &bytes)?;
        Ok(bytes)
    }
}

/// The files of an archive by their names there.
struct Spool {
    file: File,
    found: HashMap<Vec<u8>, Found>,
    directory: TempDir,
}

impl Spool {
    fn fill(stream: impl Read, directory: TempDir, limits: &Limits) -> Result<Self, PullError> {
        let path = directory.path().join("archive");
        let store = |e| StoreError::io(format!("write {}", path.display()), e);
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(store)?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        let plain = decompress(stream).map_err(|e| unusable(e.to_string()))?;
        // What is no file has to end as well.
        let longest = limits.max_archive_bytes.saturating_add(OVERHEAD);
        let plain = BufReader::with_capacity(BUFFER, plain.take(longest));
        let mut archive = TarReader::new(plain);
        let mut found = HashMap::new();
        let (mut position, mut names, mut members) = (0u64, 0, 0);
        let mut buffer = vec![0; BUFFER];
        while let Some(member) = archive.next_member().map_err(broken)? {
            members += 1;
            names += member.path.len() + member.link.len();
            if members > MAX_MEMBERS {
                return Err(too_large(MAX_MEMBERS as u64, "entries"));
            }
            if names > MAX_NAMES {
                return Err(too_large(MAX_NAMES as u64, "bytes of names"));
            }
            let Some((path, file)) = Found::of(&member, position)? else {
                continue;
            };
            if member.size > limits.max_archive_bytes.saturating_sub(position) {
                return Err(too_large(limits.max_archive_bytes, "bytes"));
            }
            if let Found::File(span) = file {
                loop {
                    let count = archive
                        .read(&mut buffer)
                        .map_err(|e| unusable(e.to_string()))?;
                    if count == 0 {
                        break;
                    }
                    out.write_all(&buffer[..count]).map_err(store)?;
                }
                position += span.length;
            }
            found.insert(path, file);
        }
        // To the last byte, so that who writes the archive into a pipe can end.
        let rest = io::copy(&mut archive.into_inner(), &mut io::sink());
        rest.map_err(|e| unusable(e.to_string()))?;
        out.flush().map_err(store)?;
        drop(out);
        Ok(Self {
            file,
            found,
            directory,
        })
    }

    /// The file of a name, through links.
    fn find(&self, path: &[u8]) -> Result<Option<Span>, PullError> {
        let mut path = path;
        for _ in 0..=MAX_LINKS {
            match self.found.get(path) {
                None => return Ok(None),
                Some(Found::File(span)) => return Ok(Some(*span)),
                Some(Found::Link(target)) => path = target,
            }
        }
        Err(unusable("has links that lead to each other"))
    }

    fn is_oci_layout(&self) -> Result<bool, PullError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Layout {
            image_layout_version: String,
        }
        let Some(span) = self.find(b"oci-layout")? else {
            return Ok(false);
        };
        let layout: Layout = self.document("oci-layout", span)?;
        if !layout.image_layout_version.starts_with("1.") {
            let version = layout.image_layout_version;
            return Err(unusable(format!("has the unknown layout {version:?}")));
        }
        Ok(true)
    }

    fn document<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
        span: Span,
    ) -> Result<T, PullError> {
        let bytes = read_span(&self.file, span, MAX_DOCUMENT, name)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| unusable(format!("has a broken {name}: {}", json_error(&e))))
    }

    fn into_archive(self, blobs: HashMap<Digest, Span>) -> Archive {
        Archive {
            spool: Arc::new(self.file),
            blobs,
            _directory: self.directory,
        }
    }
}

impl Found {
    /// What a member is, under its clean path; `None` for what can be neither a file nor lead to one.
    fn of(member: &Member, position: u64) -> Result<Option<(Vec<u8>, Self)>, PullError> {
        let bad = |reason: &str| {
            let shown = line(&member.path.escape_ascii().to_string(), 300);
            unusable(format!("has the file {shown:?}, which {reason}"))
        };
        let path = clean_path(&member.path).map_err(bad)?;
        let found = match member.kind {
            MemberKind::File if member.sparse.is_some() => return Err(bad("is a sparse file")),
            MemberKind::File => Self::File(Span {
                offset: position,
                length: member.size,
            }),
            MemberKind::Hardlink => Self::Link(clean_path(&member.link).map_err(bad)?),
            MemberKind::Symlink => {
                let parent = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
                let target = [&path[..parent], b"/", &member.link].concat();
                Self::Link(clean_path(&target).map_err(bad)?)
            }
            MemberKind::Directory | MemberKind::Char | MemberKind::Block | MemberKind::Fifo => {
                return Ok(None);
            }
        };
        Ok(Some((path, found)))
    }
}

/// An OCI image layout: blobs are known by their file names, images are in the index.
fn oci_layout(
    spool: Spool,
    name: Option<&Name>,
) -> Result<(Archive, Vec<ArchivedImage>), PullError> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Descriptor>,
    }
    let span = spool.find(b"index.json")?;
    let span = span.ok_or_else(|| unusable("has no index.json"))?;
    let index: Index = spool.document("index.json", span)?;
    let mut blobs = HashMap::new();
    for path in spool.found.keys() {
        if let Some(digest) = blob_digest(path)
            && let Some(span) = spool.find(path)?
        {
            blobs.insert(digest, span);
        }
    }
    let archive = spool.into_archive(blobs);
    let mut images = Vec::new();
    for (names, manifests) in by_names(index.manifests, name)? {
        let chosen = choose(manifests).ok_or_else(|| unusable("has no image for linux/amd64"))?;
        images.push(ArchivedImage {
            names,
            document: archive.manifest(&chosen.digest)?,
        });
    }
    Ok((archive, images))
}

/// The digest that `blobs/sha256/…` names.
fn blob_digest(path: &[u8]) -> Option<Digest> {
    let path = std::str::from_utf8(path).ok()?;
    let (algorithm, hex) = path.strip_prefix("blobs/")?.split_once('/')?;
    Digest::try_from(format!("{algorithm}:{hex}")).ok()
}

/// The entries of an index that have the same name: they differ in their platform.
type Platforms = (Vec<Name>, Vec<Descriptor>);

/// Puts the entries of an index together by their names.
fn by_names(manifests: Vec<Descriptor>, name: Option<&Name>) -> Result<Vec<Platforms>, PullError> {
    let mut groups: BTreeMap<Option<String>, Vec<Descriptor>> = BTreeMap::new();
    for manifest in manifests {
        let own = image_name(&manifest)?.map(|name| name.full());
        groups.entry(own).or_default().push(manifest);
    }
    if let Some(name) = name {
        if groups.len() != 1 {
            let count = groups.len();
            return Err(unusable(format!(
                "has {count} images, and one name fits one"
            )));
        }
        return Ok(groups
            .into_values()
            .map(|manifests| (vec![name.clone()], manifests))
            .collect());
    }
    groups
        .into_iter()
        .map(|(own, manifests)| {
            let own = own.ok_or_else(|| unusable("does not name its image; give it a name"))?;
            Ok((vec![Name::parse(&own)?], manifests))
        })
        .collect()
}

/// The name that an entry of the index has, if it is a whole one: a tag alone is none.
fn image_name(manifest: &Descriptor) -> Result<Option<Name>, PullError> {
    let Some(annotations) = &manifest.annotations else {
        return Ok(None);
    };
    if let Some(name) = annotations.get(FULL_NAME) {
        return Name::parse(name).map(Some);
    }
    match annotations.get(REF_NAME) {
        Some(name) if name.contains([':', '/']) => Name::parse(name).map(Some),
        _ => Ok(None),
    }
}

/// What `docker save` wrote before it wrote image layouts: files by any name, and neither a
/// manifest nor digests of the layers, so both are made here.
fn docker_save(
    spool: Spool,
    name: Option<&Name>,
) -> Result<(Archive, Vec<ArchivedImage>), PullError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Saved {
        config: String,
        #[serde(default)]
        repo_tags: Option<Vec<String>>,
        layers: Vec<String>,
    }
    let span = spool.find(b"manifest.json")?;
    let span = span.ok_or_else(|| unusable("has no manifest.json"))?;
    let saved: Vec<Saved> = spool.document("manifest.json", span)?;
    if name.is_some() && saved.len() != 1 {
        let count = saved.len();
        return Err(unusable(format!(
            "has {count} images, and one name fits one"
        )));
    }
    let file = |path: &str| -> Result<Span, PullError> {
        let clean = clean_path(path.as_bytes()).map_err(unusable)?;
        spool.find(&clean)?.ok_or_else(|| PullError::NotFound {
            what: format!("file {path:?}"),
            registry: "the archive".into(),
        })
    };
    let mut blobs = HashMap::new();
    let mut digests: HashMap<u64, Digest> = HashMap::new();
    let mut images = Vec::new();
    for saved in saved {
        let span = file(&saved.config)?;
        let config = read_span(&spool.file, span, MAX_CONFIGURATION, "image configuration")?;
        let config_digest = Digest::of(&config);
        blobs.insert(config_digest.clone(), span);
        let mut layers = Vec::new();
        for path in &saved.layers {
            let span = file(path)?;
            // A file that is there once may be named often.
            let digest = match digests.get(&span.offset) {
                Some(digest) => digest.clone(),
                None => digest_of(&spool.file, span)?,
            };
            digests.insert(span.offset, digest.clone());
            blobs.insert(digest.clone(), span);
            layers.push(serde_json::json!({
                "mediaType": types::DOCKER_LAYER, "digest": digest, "size": span.length,
            }));
        }
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": types::DOCKER_MANIFEST,
            "config": {
                "mediaType": types::DOCKER_CONFIG, "digest": config_digest, "size": span.length,
            },
            "layers": layers,
        });
        let bytes = Bytes::from(manifest.to_string());
        let names = match name {
            Some(name) => vec![name.clone()],
            None => {
                let tags = saved.repo_tags.unwrap_or_default();
                tags.iter()
                    .map(|tag| Name::parse(tag))
                    .collect::<Result<_, _>>()?
            }
        };
        if names.is_empty() {
            return Err(unusable("does not name its image; give it a name"));
        }
        images.push(ArchivedImage {
            names,
            document: Document {
                digest: Digest::of(&bytes),
                bytes,
                content_type: types::DOCKER_MANIFEST.into(),
            },
        });
    }
    Ok((spool.into_archive(blobs), images))
}

fn digest_of(file: &File, span: Span) -> Result<Digest, PullError> {
    let mut hasher = Digest::of(b"").hasher();
    let mut buffer = vec![0; BUFFER];
    let (mut offset, end) = (span.offset, span.offset + span.length);
    while offset < end {
        let size = usize::try_from(end - offset).unwrap_or(BUFFER).min(BUFFER);
        file.read_exact_at(&mut buffer[..size], offset)
            .map_err(|e| StoreError::io("read the stored archive", e))?;
        hasher.update(&buffer[..size]);
        offset += size as u64;
    }
    Ok(hasher.finish())
}

fn read_span(file: &File, span: Span, limit: u64, what: &str) -> Result<Vec<u8>, PullError> {
    let length = usize::try_from(span.length).ok();
    let length = length.filter(|length| *length as u64 <= limit);
    let length = length.ok_or_else(|| PullError::TooLarge {
        what: what.to_owned(),
        limit,
        unit: "bytes",
    })?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, span.offset)
        .map_err(|e| StoreError::io("read the stored archive", e))?;
    Ok(bytes)
}

fn broken(error: TarError) -> PullError {
    match error {
        TarError::Io(e) => unusable(e.to_string()),
        TarError::Malformed(reason) => unusable(reason),
    }
}

fn unusable(reason: impl Into<String>) -> PullError {
    PullError::Unsupported {
        what: "archive".into(),
        reason: reason.into(),
    }
}

fn too_large(limit: u64, unit: &'static str) -> PullError {
    PullError::TooLarge {
        what: "archive".into(),
        limit,
        unit,
    }
}
