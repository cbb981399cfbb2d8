//! An image's disk: made once, then handed out as extents.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::erofs::{self, BLOCK_SIZE, LayoutError};
use crate::error::{PullError, StoreError};
use crate::image::{DiskExtent, ImageId};
use crate::layer::source::BUFFER;
use crate::layer::tree;
use crate::merge::{MergeError, Merger};

use super::budget::TreeMemory;
use super::records::ExtentRecord;
use super::shared::Shared;

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

/// Merges the layers and writes the image's metadata; all layers are in the store.
pub(crate) fn build(
    shared: &Shared,
    id: &ImageId,
    layers: &[Digest],
    memory: &TreeMemory,
) -> Result<Vec<ExtentRecord>, PullError> {
    let limits = &shared.config.limits;
    let mut merger = Merger::new(limits.max_entries, memory.bytes());
    let mut lengths = Vec::with_capacity(layers.len());
    for layer in layers {
        let directory = shared.files.layer(layer);
        let path = directory.join("tree");
        let read = |e| StoreError::io(format!("read {}", path.display()), e);
        lay_over(&mut merger, &path).map_err(|e| match e {
            MergeError::Invalid { .. } => PullError::CorruptLayer {
                layer: layer.to_string(),
                reason: e.to_string(),
            },
            MergeError::TooManyEntries(limit) => PullError::TooLarge {
                what: format!("image {id}"),
                limit,
                unit: "entries",
            },
            MergeError::TooMuchMemory(limit) => PullError::TooLarge {
                what: format!("image {id}"),
                limit,
                unit: "bytes of memory for its entries",
            },
            MergeError::Read(e) => read(e).into(),
        })?;
        lengths.push(fs::metadata(directory.join("data")).map_err(read)?.len());
    }
    let tree = merger.finish();
    let directory = shared.files.new_directory()?;
    let path = directory.path().join("meta.erofs");
    let failed = |e| StoreError::io(format!("write {}", path.display()), e);
    let mut out = BufWriter::with_capacity(1 << 20, File::create_new(&path).map_err(failed)?);
    let written = erofs::write(&mut out, &tree, &lengths, uuid(id)).map_err(|e| match e {
        erofs::WriteError::Io(e) => PullError::from(failed(e)),
        erofs::WriteError::Layout(LayoutError::TooManyBlocks) => PullError::TooLarge {
            what: format!("image {id}"),
            limit: u64::from(u32::MAX) * BLOCK_SIZE,
            unit: "bytes",
        },
        erofs::WriteError::Layout(LayoutError::TooManyXattrs) => PullError::Unsupported {
            what: format!("image {id}"),
            reason: e.to_string(),
        },
    })?;
    out.flush()
        .and_then(|()| out.get_ref().sync_all())
        .map_err(failed)?;
    drop(out);
    shared.files.keep_image(directory, id)?;
    let mut extents = vec![ExtentRecord {
        layer: None,
        length: written.length,
    }];
    extents.extend(written.layers.into_iter().map(|number| ExtentRecord {
        layer: Some(layers[number].clone()),
        length: lengths[number],
    }));
    Ok(extents)
}

/// Lays the layer with this tree file over those before it.
fn lay_over(merger: &mut Merger, path: &Path) -> Result<(), MergeError> {
    let open = || -> io::Result<_> { Ok(BufReader::with_capacity(BUFFER, File::open(path)?)) };
    tree::read(open()?, |entry| merger.hide(&entry))?;
    tree::read(open()?, |entry| merger.add(entry))?;
    merger.end_layer();
    Ok(())
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
