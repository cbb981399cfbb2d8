//! An image's disk: made once, then handed out as extents.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use hull_base::faults::{self, Point};
use tokio::sync::oneshot;

use crate::config::Limits;
use crate::digest::Digest;
use crate::erofs::BLOCK_SIZE;
use crate::error::{PullError, StoreError};
use crate::image::{DiskExtent, ImageId};
use crate::layer::tree;
use crate::worker::job::{Failure, Job, JobFile, Merge, Merged, file_error};
use crate::worker::process::{Allowance, Worker, WorkerError, supervised};

use super::budget::TreeMemory;
use super::records::ExtentRecord;
use super::shared::Shared;

/// Memory of a worker that merges besides the tree's own, bytes: buffers.
const MERGE_MEMORY: u64 = 32 << 20;
/// Longest answer: the numbers of some hundred layers, or a reason, bytes.
const LONGEST_ANSWER: usize = 32 << 10;

/// Bytes of memory that the image's tree takes while it is made; all layers are in the store.
pub(crate) fn memory(shared: &Shared, layers: &[Digest]) -> Result<u64, StoreError> {
    let mut sum = 0u64;
    for layer in layers {
        let path = shared.files.layer(layer).join("tree");
        let summary = File::open(&path).and_then(|mut file| tree::summary(&mut file));
        let summary = summary.map_err(|e| StoreError::io(format!("read {}", path.display()), e))?;
        sum = sum.saturating_add(summary.memory);
    }
    // Links in paths can lead to directories that no layer counts. There are few.
    Ok(sum.saturating_add(sum / 4).saturating_add(1 << 20))
}

/// Merges the layers and writes the image's metadata, in a worker, as long as it is `wanted`; all
/// layers are in the store. Blocks.
pub(crate) fn build(
    shared: &Shared,
    id: &ImageId,
    layers: &[Digest],
    memory: &TreeMemory,
    wanted: oneshot::Receiver<Infallible>,
) -> Result<Vec<ExtentRecord>, PullError> {
    let mut lengths = Vec::with_capacity(layers.len());
    for layer in layers {
        let path = shared.files.layer(layer).join("data");
        let length = fs::metadata(&path).map(|metadata| metadata.len());
        lengths.push(length.map_err(|e| StoreError::io(format!("read {}", path.display()), e))?);
    }
    let directory = shared.files.new_directory()?;
    let path = directory.path().join("meta.erofs");
    let failed = |e| StoreError::io(format!("write {}", path.display()), e);
    let out = faults::write(Point::DiskWrite).and_then(|()| File::create_new(&path));
    let out = out.map_err(failed)?;
    let merged = merge(shared, id, layers, &lengths, memory, &out, wanted)?;
    let merged = merged.map_err(|failure| match failure {
        Failure::InvalidLayer { layer, reason } => match layers.get(layer as usize) {
            Some(layer) => PullError::CorruptLayer {
                layer: layer.to_string(),
                reason,
            },
            None => lie(id, "a layer that the image does not have"),
        },
        Failure::TooLarge { limit, unit } => PullError::TooLarge {
            what: format!("image {id}"),
            limit,
            unit: unit.as_str(),
        },
        Failure::Unsupported(reason) => PullError::Unsupported {
            what: format!("image {id}"),
            reason,
        },
        Failure::File { file, code, reason } => {
            let action = match file {
                JobFile::TreeOf(layer) => match layers.get(layer as usize) {
                    Some(layer) => {
                        let path = shared.files.layer(layer).join("tree");
                        format!("read {}", path.display())
                    }
                    None => return lie(id, "a layer that the image does not have"),
                },
                _ => format!("write {}", path.display()),
            };
            file_error(action, code, reason).into()
        }
        other => PullError::from(WorkerError::from(other)).about(format!("image {id}")),
    })?;
    out.sync_all().map_err(failed)?;
    let length = out.metadata().map_err(failed)?.len();
    let extents = extents_of(&merged, length, layers, &lengths).map_err(|what| lie(id, what))?;
    shared.files.keep_image(directory, id)?;
    Ok(extents)
}

/// The extents of a disk whose metadata are so long, unless the worker says what can't be.
pub(crate) fn extents_of(
    merged: &Merged,
    length: u64,
    layers: &[Digest],
    lengths: &[u64],
) -> Result<Vec<ExtentRecord>, &'static str> {
    if merged.length != length || length == 0 || !length.is_multiple_of(BLOCK_SIZE) {
        return Err("another length than its file has");
    }
    let mut extents = vec![ExtentRecord {
        layer: None,
        length,
    }];
    let mut next = 0;
    for number in &merged.layers {
        let number = *number as usize;
        let (Some(layer), Some(length)) = (layers.get(number), lengths.get(number)) else {
            return Err("a layer that the image does not have");
        };
        if number < next {
            return Err("a layer twice");
        }
        next = number + 1;
        extents.push(ExtentRecord {
            layer: Some(layer.clone()),
            length: *length,
        });
    }
    Ok(extents)
}

fn lie(id: &ImageId, what: &'static str) -> PullError {
    PullError::from(WorkerError::Lies(what)).about(format!("image {id}"))
}

/// Has a worker merge the layers.
fn merge(
    shared: &Shared,
    id: &ImageId,
    layers: &[Digest],
    lengths: &[u64],
    memory: &TreeMemory,
    out: &File,
    wanted: oneshot::Receiver<Infallible>,
) -> Result<Result<Merged, Failure>, PullError> {
    let Limits { max_entries, .. } = shared.config.limits;
    let workers = &shared.config.workers;
    let job = Job::Merge(Merge {
        data: lengths.to_vec(),
        uuid: uuid(id),
        max_entries,
        memory: memory.bytes(),
    });
    let allowance = Allowance {
        // Tables grow to twice what is in them, which takes addresses and no memory.
        memory: memory
            .bytes()
            .saturating_mul(2)
            .saturating_add(MERGE_MEMORY),
        // A file takes a block at most besides its name, attributes and link.
        file_size: memory
            .bytes()
            .saturating_mul(2)
            .saturating_add(max_entries.saturating_mul(2 * BLOCK_SIZE)),
    };
    let merged = supervised(workers.merge, async |_| {
        let work = async {
            let worker = Worker::start(workers, allowance, &job, &[out.as_fd()]).await?;
            for layer in layers {
                let path = shared.files.layer(layer).join("tree");
                let tree = File::open(&path)
                    .map_err(|e| StoreError::io(format!("read {}", path.display()), e))?;
                worker.give(tree.as_fd()).await?;
            }
            let answer = worker.answer::<Merged>(LONGEST_ANSWER).await?;
            Ok(answer.map(|(merged, _)| merged))
        };
        tokio::select! {
            merged = work => merged,
            _ = wanted => Err(WorkerError::Unwanted.into()),
        }
    });
    merged.map_err(|error: PullError| error.about(format!("image {id}")))
}

/// Where the extents of an image's disk are.
pub(crate) fn extents(shared: &Shared, id: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
    let record = shared
        .records
        .image(id)?
        .ok_or_else(|| StoreError::NotFound(id.to_string()))?;
    record
        .disk
        .into_iter()
        .map(|extent| {
            let path: PathBuf = match &extent.layer {
                None => shared.files.image(id).join("meta.erofs"),
                Some(layer) => shared.files.layer(layer).join("data"),
            };
            let action = format!("use {}", path.display());
            let length = fs::metadata(&path)
                .map_err(|e| StoreError::io(action.clone(), e))?
                .len();
            if length != extent.length {
                let reason = format!("has {length} bytes and should have {}", extent.length);
                return Err(StoreError::io(action, io::Error::other(reason)));
            }
            Ok(DiskExtent {
                path,
                offset: 0,
                length,
            })
        })
        .collect()
}

/// The file system's UUID: from the image's id, so that the same image is the same disk everywhere.
fn uuid(id: &ImageId) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (byte, digits) in uuid.iter_mut().zip(id.hex().as_bytes().chunks_exact(2)) {
        let digit = |ascii: u8| (ascii as char).to_digit(16).unwrap_or(0) as u8;
        *byte = digit(digits[0]) << 4 | digit(digits[1]);
    }
    uuid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_data_of_its_own_layers_once_and_in_their_order() {
        let layers = [Digest::of(b"a"), Digest::of(b"b")];
        let extents = |length, told: &[u32]| {
            let merged = Merged {
                length: 8192,
                layers: told.to_vec(),
            };
            extents_of(&merged, length, &layers, &[4096, 0])
        };
        assert_eq!(extents(8192, &[]).unwrap().len(), 1);
        assert_eq!(extents(8192, &[0, 1]).unwrap().len(), 3);
        assert_eq!(
            extents(8192, &[1]).unwrap()[1].layer,
            Some(layers[1].clone())
        );
        for (length, told) in [
            (4096, &[0][..]),
            (8192, &[2]),
            (8192, &[u32::MAX]),
            (8192, &[0, 0]),
            (8192, &[1, 0]),
        ] {
            assert!(extents(length, told).is_err(), "{length} {told:?}");
        }
    }
}
