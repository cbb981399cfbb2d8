//! From a device's configuration to the device.

use hull_proto_vmm::{DeviceConfig, Extent, FdIndex};

use crate::areas::Areas;
use crate::extent::FileExtent;
use crate::fds::{FdError, Fds};
use crate::file_regions::FileRegionError;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::disk::{Disk, DiskError};
use crate::virtio::block::{Block, BlockError};
use crate::virtio::device::VirtioDevice;
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::mem::{self, Mem};
use crate::virtio::net::tap::TapError;
use crate::virtio::net::{Net, NetError, Tap};
use crate::virtio::pmem::{self, Pmem};
use crate::virtio::rng::Rng;
use crate::virtio::state::DeviceState;
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
    /// The device is another one than the saved state's.
    #[error("device is not the one that was saved")]
    Mismatch,
    /// The files are not the memory that was saved.
    #[error("restore persistent memory")]
    Pmem(#[from] pmem::Mismatch),
    /// There is nothing to plug.
    #[error("create memory device")]
    Memory(#[from] mem::Taken),
    /// The pluggable memory is not that which was saved.
    #[error("restore memory device")]
    RestoreMemory(#[from] mem::RestoreError),
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
    areas: &Areas,
) -> Result<Box<dyn VirtioDevice>, DeviceConfigError> {
    Ok(match config {
        DeviceConfig::Block {
            serial,
            readonly,
            extents,
        } => Box::new(Block::new(disk(extents, *readonly, fds)?, serial.clone())?),
        DeviceConfig::Pmem { extents } => {
            let disk = disk(extents, true, fds)?;
            Box::new(Pmem::new(areas.files.map(disk.extents())?))
        }
        DeviceConfig::Net { taps, mac, mtu } => Box::new(Net::new(ports(taps, fds)?, *mac, *mtu)?),
        DeviceConfig::Rng => Box::new(Rng::new()),
        DeviceConfig::Memory => {
            let memory = areas.pluggable.as_ref().ok_or(mem::Taken)?;
            Box::new(Mem::new(memory)?)
        }
        DeviceConfig::Balloon => Box::new(Balloon::new(areas.backing)),
        DeviceConfig::Vsock { cid, listener } => {
            let vsock = Vsock::new(*cid, fds.get(*listener)?)?;
            Box::new(vsock.hearing(areas.pluggable.clone()))
        }
        DeviceConfig::Fs { tag, socket } => Box::new(Fs::new(tag, fds.get(*socket)?)?),
    })
}

/// Makes an idle device from what was saved of one that had the same configuration, whose files may be
/// others.
///
/// # Errors
/// [`DeviceConfigError`]
pub fn restore(
    config: &DeviceConfig,
    state: &DeviceState,
    fds: &Fds,
    areas: &Areas,
) -> Result<Box<dyn VirtioDevice>, DeviceConfigError> {
    Ok(match (config, state) {
        (
            DeviceConfig::Block {
                serial,
                readonly,
                extents,
            },
            DeviceState::Block(state),
        ) if *serial == state.serial => {
            Box::new(Block::restore(state, disk(extents, *readonly, fds)?)?)
        }
        (DeviceConfig::Pmem { extents }, DeviceState::Pmem(state)) => {
            let disk = disk(extents, true, fds)?;
            Box::new(Pmem::restore(state, areas.files.map(disk.extents())?)?)
        }
        // Nothing is at the end of its cable, and it is told so: a guest that is to get other cards.
        (DeviceConfig::Net { taps, .. }, DeviceState::Net(state)) if taps.is_empty() => {
            Box::new(Net::unplugged(state)?)
        }
        (DeviceConfig::Net { taps, mac, mtu }, DeviceState::Net(state))
            if (mac, mtu) == (&state.mac, &state.mtu) =>
        {
            Box::new(Net::restore(state, ports(taps, fds)?)?)
        }
        (DeviceConfig::Rng, DeviceState::Rng(state)) => Box::new(Rng::restore(state)),
        (DeviceConfig::Memory, DeviceState::Memory(state)) => {
            let memory = areas.pluggable.as_ref().ok_or(mem::Taken)?;
            Box::new(Mem::restore(state, memory)?)
        }
        (DeviceConfig::Balloon, DeviceState::Balloon(state)) => {
            Box::new(Balloon::restore(state, areas.backing))
        }
        (DeviceConfig::Vsock { cid, listener }, DeviceState::Vsock(state)) if *cid == state.cid => {
            let vsock = Vsock::restore(state, fds.get(*listener)?)?;
            Box::new(vsock.hearing(areas.pluggable.clone()))
        }
        (DeviceConfig::Fs { tag, socket }, DeviceState::Fs(state)) if *tag == state.tag => {
            Box::new(Fs::restore(state, fds.get(*socket)?)?)
        }
        _ => return Err(DeviceConfigError::Mismatch),
    })
}

fn disk(extents: &[Extent], readonly: bool, fds: &Fds) -> Result<Disk, DeviceConfigError> {
    Ok(Disk::new(FileExtent::take(extents, fds)?, readonly)?)
}

fn ports(taps: &[FdIndex], fds: &Fds) -> Result<Vec<Tap>, DeviceConfigError> {
    let taps: Result<Vec<_>, _> = taps.iter().map(|tap| fds.get(*tap)).collect();
    Ok(Tap::all(taps?)?)
}
