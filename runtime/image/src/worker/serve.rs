//! What a worker does with its job.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Serialize;

use crate::erofs::{self, BLOCK_SIZE, LayoutError};
use crate::layer::recipe::Remade;
use crate::layer::source::{BUFFER, decompress};
use crate::layer::{self, LayerFiles, tree};
use crate::merge::{MergeError, Merger};
use crate::spool;

use super::control::Control;
use super::job::{Failure, Job, JobFile, Merge, Merged, Unit};

/// Does the one job that comes by this socket, and answers it.
///
/// # Errors
/// When the daemon can't be understood, or is gone.
pub(super) fn serve(socket: OwnedFd) -> io::Result<()> {
    let mut control = Control::new(socket);
    let (job, descriptors) = control.job()?;
    let job = postcard::from_bytes(&job).map_err(io::Error::other)?;
    let files = descriptors.into_iter().map(File::from);
    let done = catch_unwind(AssertUnwindSafe(|| work(job, files, &mut control)));
    let answer = done.unwrap_or(Err(Failure::Panicked));
    let answer = match answer {
        Ok(answer) => answer,
        Err(failure) => encode(&Err::<(), _>(failure.shown()))?,
    };
    control.answer(&answer)
}

pub(crate) fn encode<T: Serialize>(answer: &Result<T, Failure>) -> io::Result<Vec<u8>> {
    postcard::to_stdvec(answer).map_err(io::Error::other)
}

fn work(
    job: Job,
    mut files: impl Iterator<Item = File>,
    control: &mut Control,
) -> Result<Vec<u8>, Failure> {
    let mut file = || {
        let missing = || Failure::Invalid("descriptors are missing".into());
        files.next().ok_or_else(missing)
    };
    let answer = match job {
        Job::Inflate => {
            inflate(file()?, file()?)?;
            encode(&Ok(()))
        }
        Job::Unpack(limits) => {
            let stream = file()?;
            let files = LayerFiles {
                data: file()?,
                tree: file()?,
                recipe: file()?,
            };
            layer::unpack(stream, files, &limits)?;
            encode(&Ok(()))
        }
        Job::Remake => {
            let (recipe, data, out) = (file()?, file()?, file()?);
            remake(recipe, data, out)?;
            encode(&Ok(()))
        }
        Job::Merge(job) => {
            let out = file()?;
            encode(&Ok(merge(&job, out, || control.descriptor())?))
        }
        Job::Spool { max_archive_bytes } => Ok(spool(file()?, file()?, max_archive_bytes)?),
    };
    answer.map_err(|e| Failure::Invalid(e.to_string()))
}

/// Lays down the files of an archive; returns the answer, with a name and a place for each behind it.
pub(crate) fn spool(
    stream: impl Read,
    out: impl Write,
    max_archive_bytes: u64,
) -> Result<Vec<u8>, Failure> {
    let found = spool::fill(stream, out, max_archive_bytes)?;
    let answer = encode(&Ok(found.len() as u64));
    let answer = found.iter().fold(answer, |answer, entry| {
        postcard::to_extend(entry, answer?).map_err(io::Error::other)
    });
    answer.map_err(|e| Failure::Invalid(e.to_string()))
}

fn inflate(stream: File, mut out: File) -> Result<(), Failure> {
    let invalid = |e: io::Error| Failure::Invalid(e.to_string());
    let mut plain = decompress(stream).map_err(invalid)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match plain.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(invalid(e)),
        };
        // Nobody reads on: the reader has its own reasons.
        if out.write_all(&buffer[..count]).is_err() {
            return Ok(());
        }
    }
}

fn remake(recipe: File, data: File, mut out: File) -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::file(JobFile::Recipe, &e);
    let mut stream = Remade::new(recipe, data).map_err(failed)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = stream.read(&mut buffer).map_err(failed)?;
        if count == 0 || out.write_all(&buffer[..count]).is_err() {
            return Ok(());
        }
    }
}

pub(crate) fn merge(
    job: &Merge,
    out: File,
    mut next_tree: impl FnMut() -> io::Result<OwnedFd>,
) -> Result<Merged, Failure> {
    let mut merger = Merger::new(job.max_entries, job.memory);
    for layer in 0..u32::try_from(job.data.len()).unwrap_or(u32::MAX) {
        let tree = next_tree().map_err(|e| Failure::file(JobFile::TreeOf(layer), &e))?;
        lay_over(&mut merger, &File::from(tree)).map_err(|e| match e {
            MergeError::Invalid { .. } => Failure::InvalidLayer {
                layer,
                reason: e.to_string(),
            },
            MergeError::TooManyEntries(limit) => Failure::too_large(limit, Unit::Entries),
            MergeError::TooMuchMemory(limit) => Failure::too_large(limit, Unit::Memory),
            MergeError::Read(e) => Failure::file(JobFile::TreeOf(layer), &e),
        })?;
    }
    let tree = merger.finish();
    let failed = |e: io::Error| Failure::file(JobFile::Metadata, &e);
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let written = erofs::write(&mut out, &tree, &job.data, job.uuid).map_err(|e| match e {
        erofs::WriteError::Io(e) => failed(e),
        erofs::WriteError::Layout(LayoutError::TooManyBlocks) => {
            Failure::too_large(u64::from(u32::MAX) * BLOCK_SIZE, Unit::Bytes)
        }
        erofs::WriteError::Layout(LayoutError::TooManyXattrs) => {
            Failure::Unsupported(e.to_string())
        }
    })?;
    out.flush().map_err(failed)?;
    Ok(Merged {
        length: written.length,
        layers: written.layers,
    })
}

/// Lays the layer with this tree file over those before it.
fn lay_over(merger: &mut Merger, file: &File) -> Result<(), MergeError> {
    let read = || BufReader::with_capacity(BUFFER, FromStart { file, position: 0 });
    tree::read(read(), |entry| merger.hide(&entry))?;
    tree::read(read(), |entry| merger.add(entry))?;
    merger.end_layer();
    Ok(())
}

/// Reads a file from its start, wherever others of its readers are.
struct FromStart<'a> {
    file: &'a File,
    position: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}
