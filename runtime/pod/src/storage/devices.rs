//! What is in the device slots of a VM. The disk of an image or a volume is attached once, shared by the
//! containers that use it, and detached with the last of them; a block device of the host belongs to
//! one container; slots of network cards are kept for who follows the network.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    os::fd::OwnedFd,
    path::Path,
};

use hull_image::{DiskExtent, ImageId};
use hull_proto_vmm::{DeviceConfig, ErrorKind, Extent, FdIndex, MAX_FDS};

use hull_base::blocking;
use hull_spec::{
    config::{ImageDevice, PodsConfig},
    error::{ErrorKind as PodErrorKind, PodError},
    id::ContainerId,
    size::VmSize,
};
use hull_vm::{
    agent::{client::Storage, error::GuestError},
    client::CALL_TIMEOUT,
    error::VmError,
    running::RunningVm,
    slots::Slots,
};

use super::{
    StorageError,
    empty_dir::{LocalVolume, Medium},
    host_device::BlockDevice,
};
use crate::record::{DeviceRecord, LocalRecord};

/// Disks are made of sectors of this size.
const SECTOR: u64 = 512;
/// What a VM calls them.
const DISKS: [&str; 2] = ["block", "pmem"];
/// How many times as large as the guest's memory an image that it has as memory may be. The guest's
/// kernel keeps 64 bytes for each of its pages, so that is the 32nd part of the guest's memory.
const LARGEST: u64 = 2;

/// The devices that one VM got after its start.
#[derive(Debug)]
pub(crate) struct Devices {
    /// The largest image that the guest is given as memory, in bytes.
    largest: u64,
    slots: Slots,
    /// Those of images by id, those of volumes by name in the guest.
    shared: BTreeMap<String, SharedDisk>,
    devices: BTreeMap<ContainerId, Vec<DeviceRecord>>,
}

#[derive(Debug)]
struct SharedDisk {
    /// Its name in the guest.
    storage: String,
    slot: u8,
    users: BTreeSet<ContainerId>,
    /// False: the guest may have let go of it, when that was not answered or a daemon was killed behind it.
    is_mounted: bool,
}

/// Who did not let go of a disk.
enum TakeOutError {
    Guest(GuestError),
    Vm(PodError),
}

impl From<TakeOutError> for PodError {
    fn from(error: TakeOutError) -> Self {
        match error {
            TakeOutError::Guest(error) => error.into(),
            TakeOutError::Vm(error) => error,
        }
    }
}

/// The name of an image's mount in the guest.
pub(crate) fn storage_id(image: &ImageId) -> String {
    format!("image-{}", &image.hex()[..16])
}

impl Devices {
    /// Starts without disks, for a VM of this size; the configuration may have changed since it was
    /// started.
    pub(crate) fn new(size: VmSize, image_device: ImageDevice) -> Self {
        let memory_mib = size.memory_mib;
        let largest = match image_device {
            ImageDevice::Pmem => memory_mib.saturating_mul(LARGEST << 20),
            ImageDevice::Block => 0,
        };
        Self {
            largest,
            slots: Slots::default(),
            shared: BTreeMap::new(),
            devices: BTreeMap::new(),
        }
    }

    /// Keeps a slot that something else is in.
    pub(crate) fn reserve(&mut self, slot: u8) {
        self.slots.mark(slot);
    }

    /// Keeps a slot for something else, unless something is in it; tells whether it does.
    pub(crate) fn claim(&mut self, slot: u8) -> bool {
        self.slots.claim(slot)
    }

    /// Gives a slot back that something else was in.
    pub(crate) fn give_back(&mut self, slot: u8) {
        self.slots.free(slot);
    }

    /// Notes a disk that was attached before the daemon was restarted.
    pub(crate) fn adopt(&mut self, image: &ImageId, slot: u8, user: &ContainerId) {
        self.adopt_shared(image.as_str(), storage_id(image), slot, user);
    }

    /// Notes the disk of a volume, if it has one, that was attached before the daemon was restarted.
    pub(crate) fn adopt_volume(&mut self, volume: &LocalRecord, user: &ContainerId) {
        let Some(slot) = volume.slot else { return };
        self.adopt_shared(&volume.storage, volume.storage.clone(), slot, user);
    }

    fn adopt_shared(&mut self, key: &str, storage: String, slot: u8, user: &ContainerId) {
        self.slots.mark(slot);
        let disk = self.shared.entry(key.to_owned());
        let disk = disk.or_insert_with(|| SharedDisk {
            storage,
            slot,
            users: BTreeSet::new(),
            is_mounted: false,
        });
        disk.users.insert(user.clone());
    }

    /// Notes a disk that was just attached.
    fn add_shared(&mut self, key: &str, storage: Storage<'_>, user: &ContainerId) {
        let disk = SharedDisk {
            storage: storage.id.to_owned(),
            slot: storage.slot,
            users: BTreeSet::from([user.clone()]),
            is_mounted: true,
        };
        self.shared.insert(key.to_owned(), disk);
    }

    /// The slot of a disk that is attached, for one more user; `storage` tells how the guest mounts what is
    /// in a slot. None: there is none.
    async fn join<'a>(
        &mut self,
        vm: &RunningVm,
        key: &str,
        storage: impl FnOnce(u8) -> Storage<'a>,
        user: &ContainerId,
    ) -> Result<Option<u8>, PodError> {
        let Some(disk) = self.shared.get_mut(key) else {
            return Ok(None);
        };
        if !disk.is_mounted {
            match vm.agent.attach_storage(storage(disk.slot)).await {
                Ok(()) => {}
                // With what was asked for at its time.
                Err(error) if error.is_there_already() => {}
                Err(error) => {
                    if disk.users.is_empty() {
                        self.shared.remove(key);
                    }
                    return Err(error.into());
                }
            }
            disk.is_mounted = true;
        }
        disk.users.insert(user.clone());
        Ok(Some(disk.slot))
    }

    /// Makes what was noted and what the VM has the same: an earlier daemon may not have lived to
    /// record that it attached a disk, or took one out. What fails costs a slot of this VM.
    pub(crate) async fn reconcile(&mut self, vm: &RunningVm) {
        let there: BTreeSet<u8> = match vm.control.metrics(CALL_TIMEOUT).await {
            Ok(metrics) => {
                let disks = metrics
                    .devices
                    .iter()
                    .filter(|d| DISKS.contains(&d.kind.as_str()));
                disks.map(|disk| disk.slot).collect()
            }
            Err(error) => {
                tracing::warn!(%error, "ask a VM for its disks");
                return;
            }
        };
        let Self {
            slots,
            shared,
            devices,
            ..
        } = self;
        let mut is_there = |slot| {
            if !there.contains(&slot) {
                slots.free(slot);
            }
            there.contains(&slot)
        };
        shared.retain(|_, disk| is_there(disk.slot));
        for disks in devices.values_mut() {
            disks.retain(|disk| is_there(disk.slot));
        }
        for slot in there {
            if !self.slots.is_unknown(slot) {
                continue;
            }
            self.slots.mark(slot);
            let taken_out = match vm.agent.vacate(slot).await {
                Ok(()) => self.unplug(vm, slot).await,
                Err(error) => Err(error.into()),
            };
            match taken_out {
                Ok(()) => tracing::info!(slot, "took out a disk that no record names"),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(slot, error, "take out a disk that no record names");
                }
            }
        }
    }

    /// Sees to it that the image is mounted in the guest for `user`; returns its slot.
    ///
    /// # Errors
    /// When it can't be attached or mounted; nothing of it stays then.
    pub(crate) async fn attach(
        &mut self,
        vm: &RunningVm,
        image: &ImageId,
        extents: &[DiskExtent],
        user: &ContainerId,
    ) -> Result<u8, PodError> {
        let (key, id) = (image.as_str(), storage_id(image));
        let storage = |slot| Storage {
            id: &id,
            slot,
            fstype: "erofs",
            readonly: true,
            ..Storage::default()
        };
        if let Some(slot) = self.join(vm, key, storage, user).await? {
            return Ok(slot);
        }
        let slot = self.plug_image(vm, image, extents).await?;
        self.bring_up(vm, storage(slot)).await?;
        self.add_shared(key, storage(slot), user);
        Ok(slot)
    }

    /// Sees to it that the guest has mounted a volume for `user`; returns the slot of its disk, if
    /// it has one. A volume in memory stays until the VM ends.
    ///
    /// # Errors
    /// When it can't be attached or mounted; no disk stays then.
    pub(crate) async fn attach_volume(
        &mut self,
        vm: &RunningVm,
        config: &PodsConfig,
        volume: &LocalVolume,
        user: &ContainerId,
    ) -> Result<Option<u8>, PodError> {
        if volume.medium != Medium::Disk {
            vm.agent.attach_storage(volume.storage(0)).await?;
            return Ok(None);
        }
        let id = &volume.storage;
        let storage = |slot| volume.storage(slot);
        if let Some(slot) = self.join(vm, id, storage, user).await? {
            return Ok(Some(slot));
        }
        let (config, made) = (config.clone(), volume.clone());
        let device = blocking(move || made.disk(&config)).await?;
        let slot = self.plug_device(vm, &device, id).await?;
        self.bring_up(vm, storage(slot)).await?;
        self.add_shared(id, storage(slot), user);
        Ok(Some(slot))
    }

    /// Makes a block device of the host a disk of the guest, for `user` alone.
    ///
    /// # Errors
    /// When it can't be attached; nothing of it stays then.
    pub(crate) async fn attach_device(
        &mut self,
        vm: &RunningVm,
        device: &BlockDevice,
        id: &str,
        user: &ContainerId,
    ) -> Result<(), PodError> {
        let slot = self.plug_device(vm, device, id).await?;
        let storage = Storage {
            id,
            slot,
            readonly: device.readonly(),
            ..Storage::default()
        };
        self.bring_up(vm, storage).await?;
        self.adopt_device(
            DeviceRecord {
                storage: id.to_owned(),
                slot,
            },
            user,
        );
        Ok(())
    }

    /// Notes a device that was attached before the daemon was restarted.
    pub(crate) fn adopt_device(&mut self, device: DeviceRecord, user: &ContainerId) {
        self.slots.mark(device.slot);
        self.devices.entry(user.clone()).or_default().push(device);
    }

    /// The block devices of `user`.
    pub(crate) fn devices(&self, user: &ContainerId) -> Vec<DeviceRecord> {
        self.devices.get(user).cloned().unwrap_or_default()
    }

    /// Has the guest take a disk that was just put behind its slot.
    async fn bring_up(&mut self, vm: &RunningVm, storage: Storage<'_>) -> Result<(), PodError> {
        let Err(error) = vm.agent.attach_storage(storage).await else {
            return Ok(());
        };
        let undo = self.unplug(vm, storage.slot).await;
        Err(PodError::from(error).after_undo(undo))
    }

    /// Ends the use of all disks by `user`, and detaches those that nobody uses any more.
    ///
    /// # Errors
    /// When one can't be detached; its slot stays taken.
    pub(crate) async fn release(
        &mut self,
        vm: &RunningVm,
        user: &ContainerId,
    ) -> Result<(), PodError> {
        let shared = self.shared.extract_if(.., |_, disk| {
            disk.users.remove(user) && disk.users.is_empty()
        });
        let shared: Vec<_> = shared.collect();
        let mut result = Ok(());
        for (key, disk) in shared {
            let detached = self.take_out(vm, &disk.storage, disk.slot).await;
            if let Err(TakeOutError::Guest(_)) = &detached {
                // It may have it still, and would refuse the same in another slot.
                let is_mounted = false;
                self.shared.insert(key, SharedDisk { is_mounted, ..disk });
            }
            result = result.and(detached);
        }
        for disk in self.devices.remove(user).unwrap_or_default() {
            result = result.and(self.take_out(vm, &disk.storage, disk.slot).await);
        }
        result.map_err(PodError::from)
    }

    async fn take_out(
        &mut self,
        vm: &RunningVm,
        storage: &str,
        slot: u8,
    ) -> Result<(), TakeOutError> {
        let detached = vm.agent.detach_storage(storage).await;
        detached.map_err(TakeOutError::Guest)?;
        self.unplug(vm, slot).await.map_err(TakeOutError::Vm)
    }

    async fn plug_device(
        &mut self,
        vm: &RunningVm,
        device: &BlockDevice,
        id: &str,
    ) -> Result<u8, PodError> {
        let disk = || {
            let disk = device.disk(id);
            disk.map_err(|e| PodError::internal("share an open device", e))
        };
        self.plug(vm, disk).await
    }

    /// Gives the VM an image as memory; as a disk if it is too large, or the VMM has no room for it
    /// or is too old for it.
    async fn plug_image(
        &mut self,
        vm: &RunningVm,
        image: &ImageId,
        extents: &[DiskExtent],
    ) -> Result<u8, PodError> {
        let sizes = extents.iter().map(|extent| extent.length);
        if sizes.fold(0, u64::saturating_add) <= self.largest {
            let memory = || Ok(device(image, extents, ImageDevice::Pmem)?);
            match self.plug(vm, memory).await {
                Ok(slot) => return Ok(slot),
                Err(error) if error.kind() == PodErrorKind::Unavailable => return Err(error),
                Err(error) => {
                    tracing::info!(%image, %error, "give a VM an image as a disk instead")
                }
            }
        }
        let disk = || Ok(device(image, extents, ImageDevice::Block)?);
        self.plug(vm, disk).await
    }

    async fn plug(
        &mut self,
        vm: &RunningVm,
        disk: impl Fn() -> Result<(DeviceConfig, Vec<OwnedFd>), PodError>,
    ) -> Result<u8, PodError> {
        loop {
            let (device, fds) = disk()?;
            let slot = self.slots.take()?;
            match vm.control.attach(slot, device, fds).await {
                Ok(()) => return Ok(slot),
                // Left from an earlier daemon, and could not be taken out: the slot stays marked
                // as taken, the next one is tried.
                Err(VmError::Refused {
                    kind: ErrorKind::Busy,
                    ..
                }) => {}
                // It may be attached yet: the slot stays marked as taken.
                Err(error @ (VmError::Timeout { .. } | VmError::Codec { .. })) => {
                    return Err(error.into());
                }
                Err(error) => {
                    self.slots.free(slot);
                    return Err(error.into());
                }
            }
        }
    }

    async fn unplug(&mut self, vm: &RunningVm, slot: u8) -> Result<(), PodError> {
        vm.control.detach(slot).await?;
        self.slots.free(slot);
        Ok(())
    }
}

/// Opens the files of a disk, each once, and describes it.
///
/// # Errors
/// When it is no disk, or a file can't be opened.
pub(crate) fn device(
    image: &ImageId,
    extents: &[DiskExtent],
    device: ImageDevice,
) -> Result<(DeviceConfig, Vec<OwnedFd>), StorageError> {
    let refused = |reason| StorageError::Disk {
        image: image.to_string(),
        reason,
    };
    if extents.is_empty() {
        return Err(refused("it is empty"));
    }
    let mut fds = Vec::new();
    let mut index: HashMap<&Path, FdIndex> = HashMap::new();
    let mut pieces = Vec::with_capacity(extents.len());
    for extent in extents {
        if extent.length == 0 || !extent.length.is_multiple_of(SECTOR) {
            return Err(refused("a piece of it is no multiple of 512 bytes"));
        }
        let file = match index.get(extent.path.as_path()) {
            Some(file) => *file,
            None => {
                let opened = File::open(&extent.path).map_err(|source| StorageError::Io {
                    action: "open",
                    path: extent.path.clone(),
                    source,
                })?;
                let next = u32::try_from(fds.len())
                    .ok()
                    .filter(|_| fds.len() < MAX_FDS)
                    .ok_or_else(|| refused("it is made of too many files"))?;
                fds.push(OwnedFd::from(opened));
                index.insert(&extent.path, FdIndex(next));
                FdIndex(next)
            }
        };
        pieces.push(Extent {
            file,
            offset: extent.offset,
            length: extent.length,
        });
    }
    let device = match device {
        ImageDevice::Pmem => DeviceConfig::Pmem { extents: pieces },
        ImageDevice::Block => DeviceConfig::Block {
            serial: image.hex()[..20].to_owned(),
            readonly: true,
            extents: pieces,
        },
    };
    Ok((device, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageId {
        ImageId::try_from(format!("sha256:{}", "ab".repeat(32))).unwrap()
    }

    #[test]
    fn a_file_that_is_used_twice_is_sent_once() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["meta", "data"].map(|name| dir.path().join(name));
        for path in &paths {
            std::fs::write(path, vec![0; 8192]).unwrap();
        }
        let extent = |i: usize, offset| DiskExtent {
            path: paths[i].clone(),
            offset,
            length: 4096,
        };
        let extents = [extent(0, 0), extent(1, 0), extent(0, 4096)];
        let (memory, _) = device(&image(), &extents, ImageDevice::Pmem).unwrap();
        let (device, fds) = device(&image(), &extents, ImageDevice::Block).unwrap();
        assert_eq!(fds.len(), 2);
        let DeviceConfig::Block {
            extents, readonly, ..
        } = device
        else {
            panic!("{device:?}");
        };
        assert!(readonly);
        let files: Vec<u32> = extents.iter().map(|e| e.file.0).collect();
        assert_eq!(files, [0, 1, 0]);
        assert_eq!(memory, DeviceConfig::Pmem { extents });
    }

    #[test]
    fn a_disk_that_is_no_disk_is_refused() {
        let odd = DiskExtent {
            path: "/dev/null".into(),
            offset: 0,
            length: 100,
        };
        let device = |extents: &[DiskExtent]| device(&image(), extents, ImageDevice::Block);
        assert!(device(&[odd]).is_err());
        assert!(device(&[]).is_err());
        let absent = DiskExtent {
            path: "/nonexistent".into(),
            offset: 0,
            length: 512,
        };
        assert!(device(&[absent]).is_err());
    }
}
