//! From a device's configuration to the device.

use std::collections::HashMap;
use std::sync::Arc;

use hull_proto_vmm::{DeviceConfig, Extent};

use crate::fds::{FdError, Fds};
use crate::virtio::VirtioDevice;
use crate::virtio::block::disk::{Disk, DiskError, Piece};
use crate::virtio::block::{Block, BlockError};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::net::tap::TapError;
use crate::virtio::net::{Net, NetError, Tap};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};
use crate::windows::{WindowError, Windows};

/// Why a device was not made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceConfigError {
    /// A descriptor is missing.
    #[error("take device's file descriptor")]
    Fd(#[from] FdError),
    /// The disk's files are not right.
    #[error("open disk")]
    Disk(#[from] DiskError),
    /// The block device is not right.
    #[error("create block device")]
    Block(#[from] BlockError),
    /// The descriptor is not a suitable tap.
    #[error("use tap")]
    Tap(#[from] TapError),
    /// The network device is not right.
    #[error("create network device")]
    Net(#[from] NetError),
    /// The socket device is not right.
    #[error("create vsock device")]
    Vsock(#[from] VsockError),
    /// The file system device is not right.
    #[error("create file system device")]
    Fs(#[from] FsError),
    /// The files are not seen as memory.
    #[error("open window")]
    Window(#[from] WindowError),
}

/// Makes an idle device.
///
/// # Errors
/// [`DeviceConfigError`]
pub fn create(
    config: &DeviceConfig,
    fds: &Fds,
    windows: &Arc<Windows>,
) -> Result<Box<dyn VirtioDevice>, DeviceConfigError> {
    Ok(match config {
        DeviceConfig::Block {
            serial,
            readonly,
            extents,
        } => {
            let disk = Disk::new(pieces(extents, fds)?, *readonly)?;
            Box::new(Block::new(disk, serial.clone())?)
        }
        DeviceConfig::Pmem { extents } => {
            let disk = Disk::new(pieces(extents, fds)?, true)?;
            Box::new(Pmem::new(windows.open(disk.pieces())?))
        }
        DeviceConfig::Net { taps, mac, mtu } => {
            let taps: Result<Vec<_>, _> = taps.iter().map(|tap| fds.get(*tap)).collect();
            Box::new(Net::new(Tap::all(taps?)?, *mac, *mtu)?)
        }
        DeviceConfig::Rng => Box::new(Rng::new()),
        DeviceConfig::Vsock { cid, listener } => Box::new(Vsock::new(*cid, fds.get(*listener)?)?),
        DeviceConfig::Fs { tag, socket } => Box::new(Fs::new(tag, fds.get(*socket)?)?),
    })
}

fn pieces(extents: &[Extent], fds: &Fds) -> Result<Vec<Piece>, FdError> {
    let mut files = HashMap::new();
    extents
        .iter()
        .map(|extent| {
            let file = match files.get(&extent.file.0) {
                Some(file) => Arc::clone(file),
                None => {
                    let file = Arc::new(fds.file(extent.file)?);
                    files.insert(extent.file.0, Arc::clone(&file));
                    file
                }
            };
            Ok(Piece {
                file,
                offset: extent.offset,
                length: extent.length,
            })
        })
        .collect()
}
