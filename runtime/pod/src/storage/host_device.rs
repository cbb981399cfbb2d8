//! Devices that a container asks for: block devices of the host, which become disks of the VM,
//! and nodes that the guest has of its own.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::Path,
};

use hull_proto_vmm::{DeviceConfig, Extent, FdIndex};
use rustix::fs::{FileType, OFlags};

use hull_base::beneath;
use hull_spec::{
    error::PodError,
    field::{DeviceField, Field},
    id::ContainerId,
    spec::DeviceSpec,
};

/// Disks are made of sectors of this size.
const SECTOR: u64 = 512;

/// Nodes that stand for no hardware: what the guest has behind them is as good as the host's.
const OWN: [&str; 8] = [
    "/dev/full",
    "/dev/fuse",
    "/dev/net/tun",
    "/dev/null",
    "/dev/random",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
];

/// A device as it can be given to a VM.
#[derive(Debug)]
pub(crate) enum Device {
    /// The guest's own node of this path.
    Own(String),
    /// A block device of the host.
    Block(BlockDevice),
}

/// An open block device of the host, or a file that becomes one of the guest.
#[derive(Debug)]
pub(crate) struct BlockDevice {
    file: File,
    length: u64,
    readonly: bool,
}

/// Finds out what a device is. Blocks.
///
/// # Errors
/// [`PodError::InvalidArgument`] when it is none, or none that a VM can be given.
pub(crate) fn inspect(index: usize, asked: &DeviceSpec) -> Result<Device, PodError> {
    let path = asked.host_path.as_path();
    if let Some(own) = OWN.iter().find(|own| Path::new(own) == path) {
        return Ok(Device::Own((*own).to_owned()));
    }
    let field = Field::Device(index, DeviceField::HostPath);
    let shown = path.display();
    let refused = |reason: String| PodError::invalid(field, reason);
    let look = || {
        let held = beneath::hold(path)?;
        Ok((beneath::file_type(&held)?, held))
    };
    let (kind, held) = look().map_err(|e: io::Error| refused(format!("look at {shown}: {e}")))?;
    if kind == FileType::CharacterDevice {
        return Err(PodError::unimplemented(
            field,
            format!("{shown} is a character device of the host, which a VM can't be given"),
        ));
    }
    if kind != FileType::BlockDevice {
        return Err(refused(format!("{shown} is no device")));
    }
    let readonly = !asked.permissions.contains('w');
    let access = if readonly {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let device = beneath::reopen(&held, access)
        .and_then(|file| BlockDevice::of(file, readonly))
        .map_err(|e| refused(format!("open {shown}: {e}")))?;
    if device.length < SECTOR {
        return Err(refused(format!("{shown} is empty")));
    }
    Ok(Device::Block(device))
}

/// The name of a device in the guest; `index` is its place in the request.
pub(crate) fn storage_id(container: &ContainerId, index: usize) -> String {
    format!("device-{}-{index}", &container.as_str()[..16])
}

impl BlockDevice {
    /// What an open device or file has, as whole sectors.
    ///
    /// # Errors
    /// When its size can't be found out.
    pub(super) fn of(mut file: File, readonly: bool) -> io::Result<Self> {
        let length = file.seek(SeekFrom::End(0))?;
        Ok(Self {
            file,
            length: length - length % SECTOR,
            readonly,
        })
    }

    /// Whether writes are refused.
    pub(crate) fn readonly(&self) -> bool {
        self.readonly
    }

    /// What the VMM is told, and the open file that belongs to it.
    pub(crate) fn disk(&self, serial: &str) -> io::Result<(DeviceConfig, Vec<OwnedFd>)> {
        let device = DeviceConfig::Block {
            serial: serial.chars().take(20).collect(),
            readonly: self.readonly,
            extents: vec![Extent {
                file: FdIndex(0),
                offset: 0,
                length: self.length,
            }],
        };
        Ok((device, vec![self.file.try_clone()?.into()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_spec::error::ErrorKind;

    fn of(host_path: &str) -> Result<Device, PodError> {
        inspect(
            3,
            &DeviceSpec {
                container_path: "/dev/x".into(),
                host_path: host_path.into(),
                permissions: "rw".into(),
            },
        )
    }

    #[test]
    fn devices_of_the_host_are_told_from_the_guests_own() {
        assert!(matches!(of("/dev/null"), Ok(Device::Own(path)) if path == "/dev/null"));
        assert!(matches!(of("/dev/fuse"), Ok(Device::Own(_))));
        let character = of("/dev/ptmx").unwrap_err();
        assert_eq!(character.kind(), ErrorKind::Unimplemented);
        assert!(character.to_string().contains("device 3: path on the host"));
        for (path, reason) in [("/etc/passwd", "no device"), ("/nonexistent", "look at")] {
            let error = of(path).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
