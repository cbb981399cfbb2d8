//! From a device's configuration to the device.

use std::sync::Arc;

use hull_proto_vmm::DeviceConfig;

use crate::extent::FileExtent;
use crate::fds::{FdError, Fds};
use crate::file_regions::{FileRegionError, FileRegions};
use crate::virtio::block::disk::{Disk, DiskError};
use crate::virtio::block::{Block, BlockError};
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::net::tap::TapError;
use crate::virtio::net::{Net, NetError, Tap};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};

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
    /// The files can't be memory of the guest.
    #[error("map files as guest memory")]
    FileRegion(#[from] FileRegionError),
}

/// Makes an idle device.
///
/// # Errors
/// [`DeviceConfigError`]
pub fn create(
    config: &DeviceConfig,
    fds: &Fds,
    regions: &Arc<FileRegions>,
) -> Result<Box<dyn VirtioDevice>, DeviceConfigError> {
    Ok(match config {
        DeviceConfig::Block {
            serial,
            readonly,
            extents,
        } => {
            let disk = Disk::new(FileExtent::take(extents, fds)?, *readonly)?;
            Box::new(Block::new(disk, serial.clone())?)
        }
        DeviceConfig::Pmem { extents } => {
            let disk = Disk::new(FileExtent::take(extents, fds)?, true)?;
            Box::new(Pmem::new(regions.map(disk.extents())?))
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
