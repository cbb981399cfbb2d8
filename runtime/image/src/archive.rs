//! Images in one tar archive, as a source for a pull: an OCI image layout (image-spec,
//! image-layout.md) or what `docker save` writes.
//!
//! The archive is read once, from the first byte to the last, and its files are laid down one
//! after the other in a file of the store's temporary directory: an index may come after the
//! blobs that it names. From there on it is a registry: nothing in it is trusted before its digest
//! is that which is asked for. No name in the archive ever becomes a name on this machine.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use hull_base::blocking;
use serde::Deserialize;
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::config::StoreConfig;
use crate::digest::Digest;
use crate::error::{PullError, StoreError};
use crate::layer::path::clean_path;
use crate::layer::source::{BUFFER, Chunk};
use crate::manifest::{Descriptor, Document, MAX_CONFIGURATION, choose, types};
use crate::reference::Name;
use crate::shown::json_error;
use crate::spool::{Found, MAX_MEMBERS, MAX_NAMES, Span};
use crate::worker::job::{Failure, Job, file_error};
use crate::worker::pipes::{Handed, hand, new_pipe, sender};
use crate::worker::process::{Allowance, Worker, WorkerError, supervised};

/// Largest document of the archive's own (index, `manifest.json`), bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// Longest answer of the worker that reads an archive, bytes: a link may repeat its directory's name.
const LONGEST_ANSWER: usize = 2 * MAX_NAMES + 32 * MAX_MEMBERS;
/// Bytes of memory for that answer, the windows of decompressors, and one member's headers.
const MEMORY: u64 = 160 << 20;
/// The file of the temporary directory that an archive's files are laid down in.
const SPOOL: &str = "archive";
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

impl Archive {
    /// Reads a whole archive, plain or compressed, and tells what images are in it. `name` is for
    /// one that does not name its image itself, or is to be named otherwise. Blocks.
    pub(crate) fn read(
        stream: impl Read,
        directory: TempDir,
        name: Option<&Name>,
        config: &StoreConfig,
    ) -> Result<(Self, Vec<ArchivedImage>), PullError> {
        Self::of(Spool::fill(stream, directory, config)?, name)
    }

    fn of(spool: Spool, name: Option<&Name>) -> Result<(Self, Vec<ArchivedImage>), PullError> {
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
    fn fill(
        mut stream: impl Read,
        directory: TempDir,
        config: &StoreConfig,
    ) -> Result<Self, PullError> {
        let file = Self::file(&directory)?;
        let max_archive_bytes = config.limits.max_archive_bytes;
        let job = Job::Spool { max_archive_bytes };
        let allowance = Allowance {
            memory: MEMORY,
            file_size: max_archive_bytes,
        };
        let mut buffer = vec![0; BUFFER];
        let answer = supervised(config.workers.patience, async |pace| {
            let (theirs, ours) = new_pipe()?;
            let descriptors = [theirs.as_fd(), file.as_fd()];
            let worker = Worker::start(&config.workers, allowance, &job, &descriptors).await?;
            drop(theirs);
            let mut pipe = sender(ours)?;
            loop {
                let read = pace.for_others(async { stream.read(&mut buffer) }).await;
                let count = match read {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => return Err(unusable(e.to_string())),
                };
                // Why it reads no more is in its answer.
                if hand(&mut pipe, &buffer[..count], pace).await? == Handed::Refused {
                    break;
                }
            }
            drop(pipe);
            Ok(worker.answer::<u64>(LONGEST_ANSWER).await?)
        });
        let answer = answer.map_err(|error: PullError| error.about("the archive".into()))?;
        Self::answered(answer, file, directory)
    }

    /// The new file that the archive's files are laid down in.
    fn file(directory: &TempDir) -> Result<File, StoreError> {
        let mut options = File::options();
        let options = options.create_new(true).read(true).write(true);
        let file = options.open(directory.path().join(SPOOL));
        file.map_err(|e| StoreError::io(writing(directory), e))
    }

    /// What a worker has laid down, if it can be.
    fn answered(
        answer: Result<(u64, Vec<u8>), Failure>,
        file: File,
        directory: TempDir,
    ) -> Result<Self, PullError> {
        let about = |error: WorkerError| PullError::from(error).about("the archive".into());
        let (count, entries) = answer.map_err(|failure| match failure {
            Failure::Invalid(reason) => unusable(reason),
            Failure::TooLarge { limit, unit } => too_large(limit, unit.as_str()),
            Failure::File { code, reason, .. } => {
                file_error(writing(&directory), code, reason).into()
            }
            other => about(other.into()),
        })?;
        let metadata = file.metadata();
        let length = metadata.map_err(|e| StoreError::io(writing(&directory), e))?;
        let length = length.len();
        let found = found(count, &entries, length).map_err(about)?;
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

fn writing(directory: &TempDir) -> String {
    format!("write {}", directory.path().join(SPOOL).display())
}

/// What the worker says that is in an archive of so many bytes.
fn found(
    count: u64,
    mut entries: &[u8],
    length: u64,
) -> Result<HashMap<Vec<u8>, Found>, WorkerError> {
    if count > MAX_MEMBERS as u64 {
        return Err(WorkerError::Lies("too many files"));
    }
    let mut all = HashMap::new();
    for _ in 0..count {
        let ((path, found), rest) = postcard::take_from_bytes::<(Vec<u8>, Found)>(entries)
            .map_err(|_| WorkerError::Lies("a file that is none"))?;
        if let Found::File(Span {
            offset,
            length: own,
        }) = found
            && offset.checked_add(own).is_none_or(|end| end > length)
        {
            return Err(WorkerError::Lies("a file that is not there"));
        }
        all.insert(path, found);
        entries = rest;
    }
    match entries {
        [] => Ok(all),
        _ => Err(WorkerError::Lies("more files than there are")),
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
    let mut digests: HashMap<Span, Digest> = HashMap::new();
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
            let digest = match digests.get(&span) {
                Some(digest) => digest.clone(),
                None => digest_of(&spool.file, span)?,
            };
            digests.insert(span, digest.clone());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_layer_is_not_the_file_that_comes_after_it() {
        let contents =
            br#"{}[{"Config":"c","RepoTags":["a.b/c:1"],"Layers":["empty","l","empty"]}]"#;
        let directory = tempfile::tempdir().unwrap();
        let file = Spool::file(&directory).unwrap();
        file.write_all_at(contents, 0).unwrap();
        let mut entries = Vec::new();
        let all = contents.len() as u64;
        for (path, offset, length) in [
            ("c", 0, 2),
            ("empty", 0, 0),
            ("l", 0, 2),
            ("manifest.json", 2, all - 2),
        ] {
            let found = Found::File(Span { offset, length });
            entries = postcard::to_extend(&(path.as_bytes(), found), entries).unwrap();
        }
        let spool = Spool::answered(Ok((4, entries)), file, directory).unwrap();
        let (archive, images) = Archive::of(spool, None).unwrap();
        let manifest = String::from_utf8(images[0].document.bytes.to_vec()).unwrap();
        for contents in [&b""[..], b"{}"] {
            let digest = Digest::of(contents);
            assert!(manifest.contains(digest.as_str()), "{manifest}");
            assert_eq!(archive.whole(&digest, 10).unwrap(), contents);
        }
    }

    #[test]
    fn what_is_said_to_be_in_an_archive_is_there() {
        let answer = |entries: &[(&str, Found)]| -> Vec<u8> {
            let entries = entries
                .iter()
                .map(|(path, found)| (path.as_bytes().to_vec(), found));
            entries
                .flat_map(|entry| postcard::to_stdvec(&entry).unwrap())
                .collect()
        };
        let file = |offset, length| Found::File(Span { offset, length });
        let good = answer(&[("a", file(0, 10)), ("b", Found::Link(b"a".to_vec()))]);
        assert_eq!(found(2, &good, 10).unwrap().len(), 2);
        assert_eq!(found(0, &[], 10).unwrap().len(), 0);
        for (count, entries, length) in [
            (2, &good[..], 9),
            (1, &good, 10),
            (3, &good, 10),
            (2, &good[..good.len() - 1], 10),
            (u64::MAX, &good, 10),
            (1, &answer(&[("a", file(u64::MAX, 2))]), 10),
            // Names that take no room here, and much as what they are.
            (MAX_MEMBERS as u64 + 1, &vec![0; 1 << 20], 10),
        ] {
            assert!(found(count, entries, length).is_err(), "{count} {length}");
        }
    }
}
