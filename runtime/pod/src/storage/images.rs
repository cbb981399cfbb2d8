//! Disks of images in a pod: each attached once, shared by the containers that use it, and
//! detached with the last of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    os::fd::OwnedFd,
    path::Path,
};

use hull_image::{DiskExtent, ImageId};
use hull_proto_vmm::{DeviceConfig, ErrorKind, Extent, FdIndex, MAX_FDS};

use super::StorageError;
use crate::{
    error::PodError,
    guest::client::{Agent, Storage},
    id::ContainerId,
    vm::{VmError, client::VmClient, slots::Slots},
};

/// Disks are made of sectors of this size.
const SECTOR: u64 = 512;

/// The image disks of one VM.
#[derive(Debug, Default)]
pub(crate) struct ImageDisks {
    slots: Slots,
    disks: BTreeMap<ImageId, ImageDisk>,
}

#[derive(Debug)]
struct ImageDisk {
    slot: u8,
    users: BTreeSet<ContainerId>,
}

/// The name of an image's mount in the guest.
pub(crate) fn storage_id(image: &ImageId) -> String {
    format!("image-{}", &image.hex()[..16])
}

impl ImageDisks {
    /// Keeps a slot that something else is in.
    pub(crate) fn reserve(&mut self, slot: u8) {
        self.slots.mark(slot);
    }

    /// Notes a disk that was attached before the daemon was restarted.
    pub(crate) fn adopt(&mut self, image: &ImageId, slot: u8, user: &ContainerId) {
        self.slots.mark(slot);
        let disk = self.disks.entry(image.clone()).or_insert(ImageDisk {
            slot,
            users: BTreeSet::new(),
        });
        disk.users.insert(user.clone());
    }

    /// Sees to it that the image is mounted in the guest for `user`; returns its slot.
    ///
    /// # Errors
    /// When it can't be attached or mounted; nothing of it stays then.
    pub(crate) async fn attach(
        &mut self,
        vm: &VmClient,
        agent: &Agent,
        image: &ImageId,
        extents: &[DiskExtent],
        user: &ContainerId,
    ) -> Result<u8, PodError> {
        if let Some(disk) = self.disks.get_mut(image) {
            disk.users.insert(user.clone());
            return Ok(disk.slot);
        }
        let slot = self.plug(vm, image, extents).await?;
        let storage = Storage {
            id: &storage_id(image),
            slot,
            fstype: "erofs",
            readonly: true,
            scratch: false,
        };
        if let Err(error) = agent.attach_storage(storage).await {
            let undo = self.unplug(vm, slot).await;
            return Err(PodError::from(error).after_undo(undo));
        }
        let users = BTreeSet::from([user.clone()]);
        self.disks.insert(image.clone(), ImageDisk { slot, users });
        Ok(slot)
    }

    /// Ends the use of all images by `user`, and detaches those that nobody uses any more.
    ///
    /// # Errors
    /// When one can't be detached; its slot stays taken.
    pub(crate) async fn release(
        &mut self,
        vm: &VmClient,
        agent: &Agent,
        user: &ContainerId,
    ) -> Result<(), PodError> {
        let mut unused = Vec::new();
        for (image, disk) in &mut self.disks {
            if disk.users.remove(user) && disk.users.is_empty() {
                unused.push((image.clone(), disk.slot));
            }
        }
        let mut result = Ok(());
        for (image, slot) in unused {
            self.disks.remove(&image);
            let detached = match agent.detach_storage(&storage_id(&image)).await {
                Ok(()) => self.unplug(vm, slot).await,
                Err(error) => Err(error.into()),
            };
            result = result.and(detached);
        }
        result
    }

    async fn plug(
        &mut self,
        vm: &VmClient,
        image: &ImageId,
        extents: &[DiskExtent],
    ) -> Result<u8, PodError> {
        loop {
            let slot = self.slots.take()?;
            let (device, fds) = device(image, extents)?;
            match vm.attach(slot, device, fds).await {
                Ok(()) => return Ok(slot),
                // Left from an attachment that an earlier daemon did not live to record: the
                // slot stays marked as taken, the next one is tried.
                Err(VmError::Refused {
                    kind: ErrorKind::Busy,
                    ..
                }) => {}
                Err(error) => {
                    self.slots.free(slot);
                    return Err(error.into());
                }
            }
        }
    }

    async fn unplug(&mut self, vm: &VmClient, slot: u8) -> Result<(), PodError> {
        vm.detach(slot).await?;
        self.slots.free(slot);
        Ok(())
    }
}

/// Opens the files of a disk, each once, and describes it.
fn device(
    image: &ImageId,
    extents: &[DiskExtent],
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
    let device = DeviceConfig::Block {
        serial: image.hex()[..20].to_owned(),
        readonly: true,
        extents: pieces,
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
        let (device, fds) = device(&image(), &extents).unwrap();
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
    }

    #[test]
    fn a_disk_that_is_no_disk_is_refused() {
        let odd = DiskExtent {
            path: "/dev/null".into(),
            offset: 0,
            length: 100,
        };
        assert!(device(&image(), &[odd]).is_err());
        assert!(device(&image(), &[]).is_err());
        let absent = DiskExtent {
            path: "/nonexistent".into(),
            offset: 0,
            length: 512,
        };
        assert!(device(&image(), &[absent]).is_err());
    }
}
