//! The images that a guest has mounted: it remembers where on them what is.

use std::{fs::File, io, os::unix::fs::FileExt};

use hull_image::{DiskExtent, ImageId};

use hull_base::blocking;
use hull_spec::error::PodError;

use super::{aside::ACTION, digest, manifest::SavedImage};
use crate::ports::PodImages;

/// Describes the disk of an image.
///
/// # Errors
/// When it is not there, or can't be read.
pub(crate) async fn saved_image(
    images: &dyn PodImages,
    id: &ImageId,
    pmem: bool,
) -> Result<SavedImage, PodError> {
    let found = images.get(id.as_str()).await;
    let found = found.map_err(|e| PodError::internal("look for the image", e))?;
    let mut names = found.iter().flat_map(|image| &image.repo_tags);
    let name = names.next().cloned().unwrap_or_default();
    let extents = images.disk(id).await;
    let extents = extents.map_err(|e| PodError::internal("find the image's disk", e))?;
    let layout = blocking(move || layout(&extents)).await;
    let layout = layout.map_err(|e| PodError::internal(ACTION, e))?;
    Ok(SavedImage {
        id: id.clone(),
        name,
        pmem,
        layout,
    })
}

/// A digest of where on a disk what is: of the lengths of its pieces, and of the first one, which has the names
/// and places of what is in the others. Layers, which those are, are what the image's id says. Blocks.
fn layout(extents: &[DiskExtent]) -> io::Result<String> {
    let mut told = Vec::new();
    for extent in extents {
        told.extend(extent.length.to_le_bytes());
    }
    if let Some(first) = extents.first() {
        let start = told.len();
        let length = usize::try_from(first.length).map_err(io::Error::other)?;
        told.resize(start + length, 0);
        File::open(&first.path)?.read_exact_at(&mut told[start..], first.offset)?;
    }
    digest::of(told.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_metadata_and_other_lengths_are_another_disk() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["meta", "data"].map(|name| dir.path().join(name));
        for path in &paths {
            std::fs::write(path, vec![1; 8192]).unwrap();
        }
        let extent = |number: usize, length| DiskExtent {
            path: paths[number].clone(),
            offset: 0,
            length,
        };
        let first = layout(&[extent(0, 4096), extent(1, 4096)]).unwrap();
        assert_ne!(layout(&[extent(0, 4096), extent(1, 8192)]).unwrap(), first);
        std::fs::write(&paths[1], vec![2; 8192]).unwrap();
        assert_eq!(layout(&[extent(0, 4096), extent(1, 4096)]).unwrap(), first);
        std::fs::write(&paths[0], vec![2; 8192]).unwrap();
        assert_ne!(layout(&[extent(0, 4096), extent(1, 4096)]).unwrap(), first);
    }
}
