//! Disks of a pod: the scratch disk, one read-only disk for each image in use, and block devices
//! of the host; paths of the host, with the volumes among them that change, and volumes that the
//! guest keeps instead.

pub(crate) mod atomic_volumes;
pub(crate) mod attachments;
pub(crate) mod devices;
pub(crate) mod empty_dir;
pub(crate) mod holes;
pub(crate) mod host_device;
pub(crate) mod host_files;
pub(crate) mod scratch;

use std::{io, path::PathBuf};

use hull_spec::error::PodError;

/// Why a disk can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error("{action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("format {} with mkfs.ext4: {message}", path.display())]
    Mkfs { path: PathBuf, message: String },
    #[error("find mkfs.ext4: it is not installed (package e2fsprogs)")]
    NoMkfs,
    #[error("use the disk of image {image}: {reason}")]
    Disk { image: String, reason: &'static str },
}

impl From<StorageError> for PodError {
    fn from(error: StorageError) -> Self {
        match &error {
            StorageError::Io {
                action,
                path,
                source,
            } if matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) =>
            {
                Self::ResourceExhausted {
                    action: format!("{action} {}", path.display()),
                    reason: "no space left".into(),
                }
            }
            StorageError::NoMkfs => {
                Self::precondition("find mkfs.ext4", "package e2fsprogs is not installed")
            }
            _ => Self::internal("prepare the pod's disks", error),
        }
    }
}
