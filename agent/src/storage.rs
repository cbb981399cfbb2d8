//! Disks that the host attaches: image layers, scratch space, volumes; and files of the host.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hull_proto_agent::agent::{AttachStorageRequest, Directory};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::syncfs,
};
use tokio::time::sleep;
use tracing::warn;

use crate::{
    ident::{Id, IdError},
    layout::Layout,
    mmio::{DeviceError, Slot},
    trim,
};

/// How often a busy mount is tried again: a container's namespace may need a
/// moment to go.
const UNMOUNT_TRIES: u32 = 20;

/// The file system whose files are the host's.
const VIRTIOFS: &str = "virtiofs";

/// The directory of a volume in its file system, whose root may have more (`lost+found`).
const VOLUME: &str = "volume";

/// Why a storage could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error(transparent)]
    BadId(#[from] IdError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("storage {0} is attached with other settings")]
    Exists(Id),
    #[error("make directory {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("mount {device} ({fstype}) on {path}")]
    Mount {
        device: String,
        fstype: String,
        path: PathBuf,
        #[source]
        source: nix::Error,
    },
    #[error("unmount {path}")]
    Unmount {
        path: PathBuf,
        #[source]
        source: nix::Error,
    },
    #[error("mount option {0:?} is not allowed")]
    Option(String),
    #[error("write what {path} holds to its disk")]
    Sync {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Where containers find what is in a storage.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Base {
    pub(crate) path: PathBuf,
    /// Containers change what is there.
    pub(crate) changes: bool,
}

/// An attached storage.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Storage {
    request: AttachStorageRequest,
    /// "/dev/vdb", or the tag of a shared file system; empty for what needs no device.
    pub(crate) device: String,
    pub(crate) mount_point: Option<PathBuf>,
}

/// All attached storages.
#[derive(Debug)]
pub(crate) struct Storages {
    layout: Layout,
    attached: Mutex<HashMap<Id, Storage>>,
    /// One attach or detach at a time: they all change the mount table.
    changing: tokio::sync::Mutex<()>,
}

impl Storages {
    /// Starts without storages.
    pub(crate) fn new(layout: Layout) -> Arc<Self> {
        Arc::new(Self {
            layout,
            attached: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    fn attached(&self) -> MutexGuard<'_, HashMap<Id, Storage>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns where `id` is mounted.
    pub(crate) fn mount_point(&self, id: &Id) -> Option<PathBuf> {
        self.attached().get(id)?.mount_point.clone()
    }

    /// Returns where containers find what is in `id`.
    pub(crate) fn base(&self, id: &Id) -> Option<Base> {
        let attached = self.attached();
        let storage = attached.get(id)?;
        let mount_point = storage.mount_point.as_ref()?;
        let changes = storage.request.volume.is_some();
        let path = if changes {
            mount_point.join(VOLUME)
        } else {
            mount_point.clone()
        };
        Some(Base { path, changes })
    }

    /// Returns the device node of `id`, which is not mounted.
    pub(crate) fn device(&self, id: &Id) -> Option<PathBuf> {
        let attached = self.attached();
        let storage = attached.get(id).filter(|s| s.mount_point.is_none())?;
        (!storage.device.is_empty()).then(|| PathBuf::from(&storage.device))
    }

    /// Returns where the pod's scratch disk is mounted.
    pub(crate) fn scratch(&self) -> Option<PathBuf> {
        let attached = self.attached();
        let scratch = attached.values().find(|s| s.request.scratch)?;
        scratch.mount_point.clone()
    }

    /// Brings up the device and mounts it when it has a file system.
    pub(crate) async fn attach(
        &self,
        request: AttachStorageRequest,
    ) -> Result<Storage, StorageError> {
        let id = Id::parse("storage id", &request.id)?;
        let mut options = Options::parse(&request)?;
        let _changing = self.changing.lock().await;
        if let Some(known) = self.attached().get(&id) {
            return if known.request == request {
                Ok(known.clone())
            } else {
                Err(StorageError::Exists(id))
            };
        }
        // Memory and directories have no device; all else is behind a slot.
        let device = match request.fstype.as_str() {
            "tmpfs" | "bind" => String::new(),
            // Known by its tag, which is the storage's id.
            VIRTIOFS => {
                Slot::new(request.slot)?.probe()?;
                request.id.clone()
            }
            _ => {
                let slot = Slot::new(request.slot)?;
                slot.probe()?;
                let disk = slot.disk().await?;
                options.choose_access(&request.fstype, &disk);
                format!("/dev/{disk}")
            }
        };
        let mount_point = if request.fstype.is_empty() {
            None
        } else {
            let path = self.layout.storage(&id);
            let (fstype, from, at) = (request.fstype.clone(), device.clone(), path.clone());
            let volume = request.volume.clone();
            let mounted = tokio::task::spawn_blocking(move || {
                options.mount(&fstype, &from, &at)?;
                let made = volume
                    .as_ref()
                    .map_or(Ok(()), |like| make_volume(&at, like));
                made.inspect_err(|_| {
                    // Nothing uses it yet.
                    let _ = umount2(&at, MntFlags::empty());
                })
            })
            .await;
            let mounted = mounted.unwrap_or_else(|e| {
                Err(StorageError::Directory {
                    path: path.clone(),
                    source: io::Error::other(e),
                })
            });
            if let Err(e) = mounted {
                let _ = fs::remove_dir(&path);
                return Err(e);
            }
            Some(path)
        };
        if let Some(path) = &mount_point
            && (request.scratch || request.volume.is_some())
            && !device.is_empty()
        {
            tokio::spawn(trim::keep_trimmed(device.clone().into(), path.clone()));
        }
        let storage = Storage {
            request,
            device,
            mount_point,
        };
        self.attached().insert(id, storage.clone());
        Ok(storage)
    }

    /// Unmounts the storage and releases its device; unknown is fine.
    pub(crate) async fn detach(&self, id: &str) -> Result<(), StorageError> {
        let id = Id::parse("storage id", id)?;
        let _changing = self.changing.lock().await;
        self.remove(&id).await
    }

    /// As [`Self::detach`], for what is behind a slot, whatever it is called; nothing is fine.
    pub(crate) async fn vacate(&self, slot: u32) -> Result<(), StorageError> {
        let _changing = self.changing.lock().await;
        match self.behind(slot) {
            Some(id) => self.remove(&id).await,
            // A device that was never noted: its attachment failed, or was not asked for.
            None => Ok(Slot::new(slot)?.release()?),
        }
    }

    fn behind(&self, slot: u32) -> Option<Id> {
        let attached = self.attached();
        let mut with_device = attached.iter().filter(|(_, s)| !s.device.is_empty());
        let found = with_device.find(|(_, storage)| storage.request.slot == slot);
        found.map(|(id, _)| id.clone())
    }

    async fn remove(&self, id: &Id) -> Result<(), StorageError> {
        let Some(storage) = self.attached().get(id).cloned() else {
            return Ok(());
        };
        if let Some(path) = &storage.mount_point {
            if storage.request.volume.is_some() {
                // A mount namespace of a container may still hold on to the file system, and the
                // disk goes.
                write_back(path).await?;
            }
            unmount(path).await?;
            let _ = fs::remove_dir(path);
        }
        if !storage.device.is_empty() {
            Slot::new(storage.request.slot)?.release()?;
        }
        self.attached().remove(id);
        Ok(())
    }

    /// Unmounts everything, as far as it goes, before the guest stops.
    pub(crate) async fn shutdown(&self) {
        let ids: Vec<_> = self.attached().keys().cloned().collect();
        for id in ids {
            let Some(path) = self.mount_point(&id) else {
                continue;
            };
            if let Err(error) = umount2(&path, MntFlags::empty()) {
                warn!(storage = %id, %error, "unmount");
            }
        }
    }
}

/// Makes the directory of a volume, unless the file system has it from before.
fn make_volume(at: &Path, like: &Directory) -> Result<(), StorageError> {
    let path = at.join(VOLUME);
    let make = || -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&path) {
            // It is as its users left it.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            made => made?,
        }
        chown(&path, Some(like.uid), Some(like.gid))?;
        // After the owner: chown(2) clears set-id bits.
        fs::set_permissions(&path, Permissions::from_mode(like.mode & 0o7777))
    };
    make().map_err(|source| StorageError::Directory { path, source })
}

async fn write_back(path: &Path) -> Result<(), StorageError> {
    let at = path.to_owned();
    let sync =
        tokio::task::spawn_blocking(move || -> io::Result<()> { Ok(syncfs(File::open(at)?)?) });
    let synced = sync.await.unwrap_or_else(|e| Err(io::Error::other(e)));
    synced.map_err(|source| StorageError::Sync {
        path: path.to_owned(),
        source,
    })
}

async fn unmount(path: &Path) -> Result<(), StorageError> {
    let mut tries = 0;
    loop {
        match umount2(path, MntFlags::empty()) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(nix::Error::EBUSY) if tries < UNMOUNT_TRIES => {
                tries += 1;
                sleep(Duration::from_millis(50)).await;
            }
            Err(source) => {
                let path = path.to_owned();
                return Err(StorageError::Unmount { path, source });
            }
        }
    }
}

/// How to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Options {
    flags: MsFlags,
    data: String,
}

impl Options {
    fn parse(request: &AttachStorageRequest) -> Result<Self, StorageError> {
        let mut flags = MsFlags::empty();
        if request.readonly {
            flags |= MsFlags::MS_RDONLY;
        }
        let mut data = Vec::new();
        for option in &request.options {
            match option.as_str() {
                "ro" => flags |= MsFlags::MS_RDONLY,
                "nodev" => flags |= MsFlags::MS_NODEV,
                "nosuid" => flags |= MsFlags::MS_NOSUID,
                "noexec" => flags |= MsFlags::MS_NOEXEC,
                "noatime" => flags |= MsFlags::MS_NOATIME,
                "rw" | "" => {}
                other if other.contains([',', '\0']) => {
                    return Err(StorageError::Option(other.to_owned()));
                }
                other => data.push(other),
            }
        }
        Ok(Self {
            flags,
            data: data.join(","),
        })
    }

    /// Files of an image that is memory are used in place, not copied to the page cache.
    fn choose_access(&mut self, fstype: &str, disk: &str) {
        if fstype == "erofs" && disk.starts_with("pmem") {
            let separator = if self.data.is_empty() { "" } else { "," };
            self.data = format!("{}{separator}dax=always", self.data);
        }
    }

    fn mount(&self, fstype: &str, device: &str, path: &Path) -> Result<(), StorageError> {
        fs::create_dir_all(path).map_err(|source| StorageError::Directory {
            path: path.to_owned(),
            source,
        })?;
        let failed = |source| StorageError::Mount {
            device: device.to_owned(),
            fstype: fstype.to_owned(),
            path: path.to_owned(),
            source,
        };
        if fstype == "bind" {
            // Only tests on a machine without slots use it.
            let bind = MsFlags::MS_BIND;
            let none = None::<&str>;
            mount(Some(self.data.as_str()), path, none, bind, none).map_err(failed)?;
            let again = bind | MsFlags::MS_REMOUNT | self.flags;
            return mount(none, path, none, again, none).map_err(failed);
        }
        let source = if device.is_empty() { fstype } else { device };
        mount(
            Some(source),
            path,
            Some(fstype),
            self.flags,
            Some(self.data.as_str()),
        )
        .map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Result<Options, StorageError> {
        Options::parse(&AttachStorageRequest {
            readonly: true,
            options: list.iter().map(|s| (*s).to_owned()).collect(),
            ..AttachStorageRequest::default()
        })
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let parsed = options(&["nodev", "size=64k", "rw", "mode=700"]).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(parsed.data, "size=64k,mode=700");
    }

    #[test]
    fn an_image_in_memory_is_used_in_place() {
        for (fstype, disk, data) in [
            ("erofs", "pmem0", "x=1,dax=always"),
            ("erofs", "vda", "x=1"),
            ("ext4", "pmem0", "x=1"),
        ] {
            let mut parsed = options(&["x=1"]).unwrap();
            parsed.choose_access(fstype, disk);
            assert_eq!(parsed.data, data);
        }
    }

    #[test]
    fn what_is_behind_a_slot_is_found_without_its_name() {
        let storages = Storages::new(Layout::new("/nonexistent".into(), "x".into()));
        let id = |text: &str| Id::parse("storage id", text).unwrap();
        for (name, slot, device) in [("disk", 7, "/dev/vdb"), ("memory", 8, "")] {
            let storage = Storage {
                request: AttachStorageRequest {
                    slot,
                    ..AttachStorageRequest::default()
                },
                device: device.to_owned(),
                mount_point: None,
            };
            storages.attached().insert(id(name), storage);
        }
        assert_eq!(storages.behind(7), Some(id("disk")));
        assert_eq!(storages.behind(8), None);
        assert_eq!(storages.behind(0), None);
    }

    #[test]
    fn a_volume_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let like = |mode| Directory {
            mode,
            uid: nix::unistd::getuid().into(),
            gid: nix::unistd::getgid().into(),
            ..Directory::default()
        };
        make_volume(dir.path(), &like(0o2770)).unwrap();
        let mode = || {
            let path = dir.path().join(VOLUME);
            fs::metadata(path).unwrap().permissions().mode() & 0o7777
        };
        assert_eq!(mode(), 0o2770);
        make_volume(dir.path(), &like(0o755)).unwrap();
        assert_eq!(mode(), 0o2770);
        let missing = dir.path().join("missing");
        assert!(make_volume(&missing, &like(0o755)).is_err());
    }

    #[test]
    fn one_option_cannot_smuggle_in_another() {
        assert!(matches!(
            options(&["x,y"]),
            Err(StorageError::Option(o)) if o == "x,y"
        ));
    }
}
