//! Devices behind virtio-mmio slots.
//!
//! The kernel command line declares every slot at boot; an empty one has no
//! driver bound. To attach a device, the VMM puts it behind the slot and the
//! agent makes the kernel probe the slot again. The kernel answers when the driver has
//! bound, or let go of, the device, which may wait for the host: all of this blocks.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

/// How long a disk or link may take to appear after its driver is bound.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);

/// Slots that a VM can have at most; a larger number is a mistake.
const SLOT_LIMIT: u32 = 256;

/// Why a device could not be attached or released.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error("there is no slot {0}")]
    NoSlot(u32),
    #[error("probe slot {slot}")]
    Probe {
        slot: u32,
        #[source]
        source: io::Error,
    },
    #[error("slot {0} is empty: no driver took its device")]
    Empty(u32),
    #[error("slot {slot} holds no {what}")]
    Lacks { slot: u32, what: &'static str },
    #[error("make the disk in slot {slot} read-only")]
    Protect {
        slot: u32,
        #[source]
        source: io::Error,
    },
    #[error("release slot {slot}")]
    Release {
        slot: u32,
        #[source]
        source: io::Error,
    },
}

/// The slots of a machine, by where it shows them.
#[derive(Debug, Clone)]
pub(crate) struct Slots {
    sysfs: PathBuf,
    /// Where device files are.
    dev: PathBuf,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            sysfs: PathBuf::from("/sys"),
            dev: PathBuf::from("/dev"),
        }
    }
}

impl Slots {
    /// Slots of a machine that is not there.
    #[cfg(test)]
    pub(crate) fn below(sysfs: &Path, dev: &Path) -> Self {
        Self {
            sysfs: sysfs.to_owned(),
            dev: dev.to_owned(),
        }
    }

    /// Names slot `number`, which must be on the kernel command line.
    pub(crate) fn slot(&self, number: u32) -> Result<Slot, DeviceError> {
        let slot = Slot {
            number,
            slots: self.clone(),
        };
        if number < SLOT_LIMIT && slot.device().exists() {
            Ok(slot)
        } else {
            Err(DeviceError::NoSlot(number))
        }
    }
}

/// One slot.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    number: u32,
    slots: Slots,
}

impl Slot {
    fn name(&self) -> String {
        format!("virtio-mmio.{}", self.number)
    }

    fn bus(&self) -> PathBuf {
        self.slots.sysfs.join("bus/platform")
    }

    fn device(&self) -> PathBuf {
        self.bus().join("devices").join(self.name())
    }

    /// Binds the driver; a bound one stays.
    pub(crate) fn probe(&self) -> Result<(), DeviceError> {
        if !self.device().join("driver").exists() {
            let file = self.bus().join("drivers_probe");
            fs::write(file, self.name()).map_err(|source| DeviceError::Probe {
                slot: self.number,
                source,
            })?;
        }
        match self.virtio() {
            Some(_) => Ok(()),
            None => Err(DeviceError::Empty(self.number)),
        }
    }

    /// Unbinds the driver; a free slot stays free.
    pub(crate) fn release(&self) -> Result<(), DeviceError> {
        if !self.device().join("driver").exists() {
            return Ok(());
        }
        let file = self.bus().join("drivers/virtio-mmio/unbind");
        fs::write(file, self.name()).map_err(|source| DeviceError::Release {
            slot: self.number,
            source,
        })
    }

    /// The directory of the virtio device in the slot.
    fn virtio(&self) -> Option<PathBuf> {
        entries(&self.device())
            .into_iter()
            .find(|(name, _)| name.starts_with("virtio"))
            .map(|(_, path)| path)
    }

    /// Returns the name of the virtio device's driver ("virtio_blk").
    pub(crate) fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.virtio()?.join("driver")).ok()?;
        Some(link.file_name()?.to_str()?.to_owned())
    }

    /// Waits for the disk in the slot and returns its name ("vdb", "pmem0"). One of persistent memory
    /// is made read-only: what is written there would be lost without an error.
    pub(crate) fn disk(&self) -> Result<String, DeviceError> {
        let name = self.wait_for("disk", |virtio| {
            child(&virtio.join("block"), "")
                .or_else(|| pmem_disk(virtio).filter(|name| self.is_ready(name)))
        })?;
        if let Some(region) = self.virtio().and_then(|virtio| pmem_region(&virtio)) {
            let protect = fs::write(region.join("read_only"), "1");
            protect.map_err(|source| DeviceError::Protect {
                slot: self.number,
                source,
            })?;
        }
        Ok(name)
    }

    /// Whether a disk that is made at the side, as those of persistent memory are, is complete: sysfs
    /// and /dev have it a moment before it can be opened.
    fn is_ready(&self, disk: &str) -> bool {
        fs::File::open(self.slots.dev.join(disk)).is_ok()
    }

    /// Waits for the network link in the slot and returns its name ("eth0").
    pub(crate) fn link(&self) -> Result<String, DeviceError> {
        self.wait_for("network link", |virtio| child(&virtio.join("net"), ""))
    }

    fn wait_for(
        &self,
        what: &'static str,
        find: impl Fn(&Path) -> Option<String>,
    ) -> Result<String, DeviceError> {
        let deadline = Instant::now() + APPEAR_TIMEOUT;
        loop {
            if let Some(name) = self.virtio().and_then(|virtio| find(&virtio)) {
                return Ok(name);
            }
            if Instant::now() > deadline {
                let slot = self.number;
                return Err(DeviceError::Lacks { slot, what });
            }
            sleep(Duration::from_millis(2));
        }
    }
}

/// What Linux makes of a pmem device: a bus with a region, and in that a namespace, which is a disk.
fn pmem_region(virtio: &Path) -> Option<PathBuf> {
    let bus = virtio.join(child(virtio, "ndbus")?);
    Some(bus.join(child(&bus, "region")?))
}

fn pmem_disk(virtio: &Path) -> Option<String> {
    let region = pmem_region(virtio)?;
    let namespace = child(&region, "namespace")?;
    child(&region.join(namespace).join("block"), "")
}

/// The first directory in `dir` whose name begins so.
fn child(dir: &Path, prefix: &str) -> Option<String> {
    let mut entries = entries(dir).into_iter();
    let found = entries.find(|(name, path)| name.starts_with(prefix) && path.is_dir());
    found.map(|(name, _)| name)
}

fn entries(dir: &Path) -> Vec<(String, PathBuf)> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A copy of the parts of sysfs that matter, with a disk in slot 5.
    fn sysfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let slot = dir.path().join("bus/platform/devices/virtio-mmio.5");
        fs::create_dir_all(slot.join("virtio3/block/vdc")).unwrap();
        symlink("../drivers/virtio-mmio", slot.join("driver")).unwrap();
        fs::create_dir_all(dir.path().join("bus/platform/devices/drivers/virtio-mmio")).unwrap();
        symlink("/x/virtio_blk", slot.join("virtio3/driver")).unwrap();
        fs::create_dir_all(dir.path().join("bus/platform/devices/virtio-mmio.6")).unwrap();
        fs::write(dir.path().join("bus/platform/drivers_probe"), "").unwrap();
        dir
    }

    #[test]
    fn the_disk_of_a_slot_is_found() {
        let dir = sysfs();
        let slot = Slots::below(dir.path(), dir.path()).slot(5).unwrap();
        slot.probe().unwrap();
        assert_eq!(slot.disk().unwrap(), "vdc");
        assert_eq!(slot.driver().unwrap(), "virtio_blk");
    }

    #[test]
    fn the_disk_of_a_pmem_device_is_found() {
        let dir = sysfs();
        let virtio = "bus/platform/devices/virtio-mmio.5/virtio3";
        let virtio = dir.path().join(virtio);
        fs::remove_dir_all(virtio.join("block")).unwrap();
        let region = virtio.join("ndbus0/region0");
        fs::create_dir_all(region.join("namespace0.0/block/pmem0")).unwrap();
        fs::write(region.join("namespace_seed"), "").unwrap();
        let dev = dir.path().join("dev");
        fs::create_dir(&dev).unwrap();
        let slot = Slots::below(dir.path(), &dev).slot(5).unwrap();
        let making = std::thread::spawn(move || {
            sleep(Duration::from_millis(20));
            fs::write(dev.join("pmem0"), "").unwrap();
        });
        assert_eq!(slot.disk().unwrap(), "pmem0");
        making.join().unwrap();
        assert_eq!(fs::read_to_string(region.join("read_only")).unwrap(), "1");
    }

    #[test]
    fn an_empty_slot_is_probed_and_named() {
        let dir = sysfs();
        let slot = Slots::below(dir.path(), dir.path()).slot(6).unwrap();
        assert!(matches!(slot.probe(), Err(DeviceError::Empty(6))));
        let probed = fs::read_to_string(dir.path().join("bus/platform/drivers_probe")).unwrap();
        assert_eq!(probed, "virtio-mmio.6");
        slot.release().unwrap();
    }

    #[test]
    fn a_slot_beyond_the_command_line_is_refused() {
        let dir = sysfs();
        assert!(matches!(
            Slots::below(dir.path(), dir.path()).slot(7),
            Err(DeviceError::NoSlot(7))
        ));
        assert!(Slots::below(dir.path(), dir.path()).slot(u32::MAX).is_err());
    }
}
