//! `ImageFsInfo`: what images and writable layers occupy on this node.

use std::{os::unix::fs::MetadataExt, path::Path};

use hull_base::{blocking, clock};
use hull_image::Usage;
use hull_proto_cri::v1::{FilesystemIdentifier, FilesystemUsage, ImageFsInfoResponse, UInt64Value};

use crate::cri::{Backend, error::CriError};

/// Tells what images and pods occupy.
pub(crate) async fn fs_info(backend: &Backend) -> Result<ImageFsInfoResponse, CriError> {
    let images = backend.images.usage().await?;
    let pods_dir = backend.pods_dir.clone();
    let pods = blocking(move || allocated(&pods_dir)).await;
    Ok(ImageFsInfoResponse {
        image_filesystems: vec![usage(&backend.images_dir, images)],
        container_filesystems: vec![usage(&backend.pods_dir, pods)],
    })
}

fn usage(directory: &Path, usage: Usage) -> FilesystemUsage {
    FilesystemUsage {
        timestamp: clock::now_ns(),
        fs_id: Some(FilesystemIdentifier {
            mountpoint: directory.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(UInt64Value { value: usage.bytes }),
        inodes_used: Some(UInt64Value {
            value: usage.inodes,
        }),
    }
}

/// Sums up a directory. Pods come and go meanwhile: what vanishes counts nothing.
fn allocated(directory: &Path) -> Usage {
    let mut sum = Usage::default();
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
        for entry in entries {
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            sum.bytes += metadata.blocks() * 512;
            sum.inodes += 1;
            if metadata.is_dir() {
                open.push(entry.path());
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_files_count_what_is_allocated() {
        let directory = tempfile::tempdir().unwrap();
        let pod = directory.path().join("pod");
        std::fs::create_dir(&pod).unwrap();
        let file = std::fs::File::create(pod.join("scratch.img")).unwrap();
        file.set_len(1 << 30).unwrap();
        let usage = allocated(directory.path());
        assert_eq!(usage.inodes, 2);
        assert!(usage.bytes < 1 << 20);
        assert_eq!(allocated(Path::new("/nonexistent")), Usage::default());
    }
}
