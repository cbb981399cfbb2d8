//! A layer on its way from who sends it through the workers into its files.
//!
//! What is handed on is counted and hashed here, so that nothing that a worker says decides what the
//! layer is known by: the compressed stream on its way to `inflate`, the plain one on its way from
//! there to `unpack`. Plain bytes are copied through this process for that: a worker could change
//! what it has put in a pipe after it was looked at there (vmsplice(2)).

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use hull_base::faults::{self, Point};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use crate::config::{Limits, StoreConfig, Workers};
use crate::digest::{Digest, Hasher};
use crate::erofs::BLOCK_SIZE;
use crate::error::{PullError, StoreError};
use crate::layer::source::{BUFFER, Chunk, Compression, MARK};
use crate::worker::job::{Failure, Job, JobFile, Unit, UnpackLimits, file_error};
use crate::worker::pace::Pace;
use crate::worker::pipes::{Handed, hand, new_pipe, sender};
use crate::worker::process::{Allowance, Worker, WorkerError, supervised};

#[cfg(test)]
mod tests;

/// Memory of a worker that decompresses: the largest window, twice as it moves, and buffers.
const INFLATE_MEMORY: u64 = 96 << 20;
/// Memory of one that unpacks: buffers, a compressor, and one member's headers.
const UNPACK_MEMORY: u64 = 96 << 20;
/// Longest answer that says nothing but whether it is done, or why not, bytes.
pub(crate) const SHORT_ANSWER: usize = 16 << 10;

/// What a layer has to be.
#[derive(Debug, Clone)]
pub(crate) struct ExpectedLayer {
    /// Digest of the bytes at the registry.
    pub(crate) digest: Digest,
    /// Number of these bytes.
    pub(crate) size: u64,
    /// Digest of the plain tar stream.
    pub(crate) diff_id: Digest,
}

impl ExpectedLayer {
    fn name(&self) -> String {
        format!("layer {}", self.digest)
    }

    fn corrupt(&self, reason: impl Into<String>) -> PullError {
        PullError::CorruptLayer {
            layer: self.digest.to_string(),
            reason: reason.into(),
        }
    }

    fn too_large(&self, limit: u64, unit: &'static str) -> PullError {
        PullError::TooLarge {
            what: self.name(),
            limit,
            unit,
        }
    }
}

/// A layer's stream as it comes.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) chunks: mpsc::Receiver<Chunk>,
    /// Its other end is gone when nobody wants the layer any more.
    pub(crate) wanted: oneshot::Receiver<Infallible>,
}

/// Writes `data`, `tree` and `recipe` of a layer into `directory`, durably. Blocks.
///
/// # Errors
/// When the stream breaks off or is not the layer expected, exceeds a limit, or cannot be stored.
pub(crate) fn unpack(
    transfer: Transfer,
    expected: &ExpectedLayer,
    directory: &Path,
    config: &StoreConfig,
) -> Result<(), PullError> {
    let files = ["data", "tree", "recipe"].map(|name| NewFile::create(directory.join(name)));
    let [data, tree, recipe] = files;
    let files = [data?, tree?, recipe?];
    run(transfer, expected, Some(&files), config)?;
    for file in &files {
        file.sync()?;
    }
    let [data, ..] = &files;
    let length = fs::metadata(&data.path).map_err(|e| data.error(e))?.len();
    if !length.is_multiple_of(BLOCK_SIZE) {
        let lie = WorkerError::Lies("data that end within a block");
        return Err(PullError::from(lie).about(expected.name()));
    }
    Ok(())
}

/// Reads a stream that is a layer which is there already: who sends it has it. Blocks.
///
/// # Errors
/// When the stream breaks off, is not the layer expected, or exceeds a limit.
pub(crate) fn prove(
    transfer: Transfer,
    expected: &ExpectedLayer,
    config: &StoreConfig,
) -> Result<(), PullError> {
    run(transfer, expected, None, config)
}

fn run(
    mut transfer: Transfer,
    expected: &ExpectedLayer,
    files: Option<&[NewFile; 3]>,
    config: &StoreConfig,
) -> Result<(), PullError> {
    let done = supervised(config.workers.patience, async |pace| {
        let layer = Layer {
            expected,
            files,
            limits: &config.limits,
            workers: &config.workers,
            pace,
        };
        let Transfer { chunks, wanted } = &mut transfer;
        tokio::select! {
            // All that this holds goes with it: pipes and processes.
            done = layer.take_in(chunks) => done,
            _ = wanted => Err(broken_off(expected)),
        }
    });
    done.map_err(|error| error.about(expected.name()))
}

fn broken_off(expected: &ExpectedLayer) -> PullError {
    expected.corrupt("transfer broke off")
}

/// A file of the layer, in the making.
struct NewFile {
    path: PathBuf,
    file: File,
}

impl NewFile {
    fn create(path: PathBuf) -> Result<Self, StoreError> {
        let file = faults::write(Point::LayerWrite)
            .and_then(|()| File::create_new(&path))
            .map_err(|e| StoreError::io(format!("create {}", path.display()), e))?;
        Ok(Self { path, file })
    }

    fn sync(&self) -> Result<(), StoreError> {
        faults::write(Point::LayerWrite)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| self.error(e))
    }

    fn action(&self) -> String {
        format!("write {}", self.path.display())
    }

    fn error(&self, source: io::Error) -> StoreError {
        StoreError::io(self.action(), source)
    }
}

/// Counts and hashes a stream.
struct Count {
    hasher: Hasher,
    count: u64,
    limit: u64,
}

impl Count {
    fn new(hasher: Hasher, limit: u64) -> Self {
        Self {
            hasher,
            count: 0,
            limit,
        }
    }

    /// `false` when the stream is longer than it may be.
    fn take(&mut self, bytes: &[u8]) -> bool {
        self.count += bytes.len() as u64;
        self.hasher.update(bytes);
        self.count <= self.limit
    }
}

struct Layer<'a> {
    expected: &'a ExpectedLayer,
    files: Option<&'a [NewFile; 3]>,
    limits: &'a Limits,
    workers: &'a Workers,
    pace: &'a Pace,
}

impl Layer<'_> {
    async fn take_in(&self, chunks: &mut mpsc::Receiver<Chunk>) -> Result<(), PullError> {
        let unpacker = match self.files {
            Some(files) => Some(self.unpacker(files).await?),
            None => None,
        };
        let mut source = Source {
            layer: self,
            chunks,
            ended: false,
            count: Count::new(self.expected.digest.hasher(), self.expected.size),
        };
        let start = source.start().await?;
        let unpacked = match Compression::detect(&start) {
            Compression::None => source.straight(start, unpacker).await,
            Compression::Gzip | Compression::Zstd => source.inflated(start, unpacker).await,
        };
        if let Err(PullError::TooLarge { .. } | PullError::Store(_) | PullError::Worker { .. }) =
            unpacked
        {
            return unpacked;
        }
        // Also for a broken archive: whether the registry or the image is at fault shows in the digest.
        source.rest().await?;
        let Count { hasher, count, .. } = source.count;
        let digest = hasher.finish();
        let ExpectedLayer {
            digest: wanted,
            size,
            ..
        } = self.expected;
        if digest != *wanted {
            return Err(PullError::DigestMismatch {
                what: format!("layer {wanted} ({count} of {size} bytes)"),
                expected: wanted.to_string(),
                actual: digest.to_string(),
            });
        }
        unpacked
    }

    async fn unpacker(&self, files: &[NewFile; 3]) -> Result<Unpacker, PullError> {
        let limits = self.limits;
        let job = Job::Unpack(UnpackLimits {
            max_unpacked_bytes: limits.max_unpacked_bytes,
            max_entries: limits.max_entries,
            max_tree_bytes: limits.max_tree_bytes,
            tree_memory: limits.tree_memory,
        });
        let allowance = Allowance {
            memory: UNPACK_MEMORY,
            // A file's last block is full.
            file_size: longest(limits)
                .saturating_add(limits.max_entries.saturating_mul(BLOCK_SIZE))
                .max(limits.max_tree_bytes.saturating_mul(2)),
        };
        let (theirs, ours) = new_pipe()?;
        let [data, tree, recipe] = files;
        let descriptors = [
            theirs.as_fd(),
            data.file.as_fd(),
            tree.file.as_fd(),
            recipe.file.as_fd(),
        ];
        Ok(Unpacker {
            worker: Worker::start(self.workers, allowance, &job, &descriptors).await?,
            pipe: sender(ours)?,
        })
    }

    fn failed(&self, failure: Failure) -> PullError {
        let file = |file: JobFile| {
            let files = self.files?;
            let [data, tree, recipe] = files;
            match file {
                JobFile::Data => Some(data),
                JobFile::Tree => Some(tree),
                JobFile::Recipe => Some(recipe),
                _ => None,
            }
        };
        match failure {
            Failure::Invalid(reason) => self.expected.corrupt(reason),
            Failure::TooLarge { limit, unit } => self.expected.too_large(limit, unit.as_str()),
            Failure::File {
                file: of,
                code,
                reason,
            } => match file(of) {
                Some(file) => file_error(file.action(), code, reason).into(),
                None => WorkerError::Lies("a file that it does not have").into(),
            },
            other => WorkerError::from(other).into(),
        }
    }
}

/// A worker that unpacks, and where its stream goes.
struct Unpacker {
    worker: Worker,
    pipe: pipe::Sender,
}

/// The compressed stream.
struct Source<'a> {
    layer: &'a Layer<'a>,
    chunks: &'a mut mpsc::Receiver<Chunk>,
    ended: bool,
    count: Count,
}

impl Source<'_> {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        if self.ended {
            return Ok(None);
        }
        let expected = self.layer.expected;
        let next = match self.chunks.try_recv() {
            Err(mpsc::error::TryRecvError::Empty) => {
                self.layer.pace.for_others(self.chunks.recv()).await
            }
            next => next.ok(),
        };
        match next {
            Some(Chunk::Data(bytes)) if self.count.take(&bytes) => Ok(Some(bytes)),
            Some(Chunk::Data(_)) => Err(PullError::DigestMismatch {
                what: expected.name(),
                expected: format!("{} bytes", expected.size),
                actual: "more".into(),
            }),
            Some(Chunk::End) => {
                self.ended = true;
                Ok(None)
            }
            None => Err(broken_off(expected)),
        }
    }

    /// The first bytes, as many as tell how the stream is compressed if there are so many.
    async fn start(&mut self) -> Result<Bytes, PullError> {
        let mut start = Vec::new();
        while start.len() < MARK
            && let Some(bytes) = self.next().await?
        {
            start.extend_from_slice(&bytes);
        }
        Ok(start.into())
    }

    /// Takes what nobody wants to read.
    async fn rest(&mut self) -> Result<(), PullError> {
        while self.next().await?.is_some() {}
        Ok(())
    }

    /// The stream is a plain one.
    async fn straight(
        &mut self,
        start: Bytes,
        unpacker: Option<Unpacker>,
    ) -> Result<(), PullError> {
        let mut plain = Plain::new(self.layer, unpacker);
        let mut next = Some(start);
        while let Some(bytes) = next {
            if plain.take(&bytes).await? == Handed::Refused {
                return plain.end(Handed::Refused).await;
            }
            next = self.next().await?;
        }
        plain.end(Handed::All).await
    }

    /// The stream has to be decompressed.
    async fn inflated(
        &mut self,
        start: Bytes,
        unpacker: Option<Unpacker>,
    ) -> Result<(), PullError> {
        let layer = self.layer;
        let allowance = Allowance {
            memory: INFLATE_MEMORY,
            file_size: 0,
        };
        let (their_input, input) = new_pipe()?;
        let (output, their_output) = new_pipe()?;
        let descriptors = [their_input.as_fd(), their_output.as_fd()];
        let inflate = Worker::start(layer.workers, allowance, &Job::Inflate, &descriptors).await?;
        drop((their_input, their_output));
        let input = sender(input)?;
        let mut output = pipe::Receiver::from_owned_fd(output).map_err(WorkerError::Talk)?;
        let unpacked = async move {
            let mut plain = Plain::new(layer, unpacker);
            let mut buffer = vec![0; BUFFER];
            loop {
                let count = output.read(&mut buffer).await.map_err(WorkerError::Talk)?;
                layer.pace.moved(count);
                if count == 0 {
                    break;
                }
                if plain.take(&buffer[..count]).await? == Handed::Refused {
                    return plain.end(Handed::Refused).await;
                }
            }
            match inflate.answer::<()>(SHORT_ANSWER).await? {
                Ok(_) => plain.end(Handed::All).await,
                Err(Failure::Invalid(reason)) => Err(layer.expected.corrupt(reason)),
                Err(other) => Err(WorkerError::from(other).into()),
            }
        };
        tokio::pin!(unpacked);
        tokio::select! {
            unpacked = &mut unpacked => return unpacked,
            fed = self.feed(start, input) => fed?,
        }
        unpacked.await
    }

    /// Hands the stream on until it ends, or nobody reads it.
    async fn feed(&mut self, start: Bytes, mut pipe: pipe::Sender) -> Result<(), PullError> {
        let mut next = Some(start);
        while let Some(bytes) = next {
            if hand(&mut pipe, &bytes, self.layer.pace).await? == Handed::Refused {
                break;
            }
            next = self.next().await?;
        }
        Ok(())
    }
}

/// The plain stream.
struct Plain<'a> {
    layer: &'a Layer<'a>,
    count: Count,
    unpacker: Option<Unpacker>,
}

impl<'a> Plain<'a> {
    fn new(layer: &'a Layer<'a>, unpacker: Option<Unpacker>) -> Self {
        let hasher = layer.expected.diff_id.hasher();
        Self {
            layer,
            count: Count::new(hasher, longest(layer.limits)),
            unpacker,
        }
    }

    async fn take(&mut self, bytes: &[u8]) -> Result<Handed, PullError> {
        if !self.count.take(bytes) {
            let limit = self.count.limit;
            return Err(self.layer.expected.too_large(limit, Unit::Bytes.as_str()));
        }
        match &mut self.unpacker {
            Some(unpacker) => Ok(hand(&mut unpacker.pipe, bytes, self.layer.pace).await?),
            None => Ok(Handed::All),
        }
    }

    /// Waits for the unpacker, and holds the stream against the configuration's digest.
    async fn end(self, handed: Handed) -> Result<(), PullError> {
        if let Some(Unpacker { worker, pipe }) = self.unpacker {
            drop(pipe);
            let answer = worker.answer::<()>(SHORT_ANSWER).await?;
            answer.map_err(|failure| self.layer.failed(failure))?;
        }
        if handed == Handed::Refused {
            return Err(WorkerError::Lies("that it has read all").into());
        }
        let actual = self.count.hasher.finish();
        let ExpectedLayer {
            digest, diff_id, ..
        } = self.layer.expected;
        if actual == *diff_id {
            return Ok(());
        }
        Err(PullError::DigestMismatch {
            what: format!("content of layer {digest}"),
            expected: diff_id.to_string(),
            actual: actual.to_string(),
        })
    }
}

/// Most bytes of a plain stream: the archive's own headers and padding come on top of contents.
fn longest(limits: &Limits) -> u64 {
    limits
        .max_unpacked_bytes
        .saturating_add(limits.max_entries.saturating_mul(2048))
}
