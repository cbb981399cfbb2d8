//! Disks that the host attaches: image layers, scratch space, volumes; and files of the host.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::sleep,
    time::Duration,
};

use hull_proto_agent::agent::{AttachStorageRequest, Directory};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{major, minor},
    unistd::syncfs,
};
use tracing::warn;

use crate::{
    blocking::blocking,
    ident::{Id, IdError},
    layout::Layout,
    mmio::{DeviceError, Slots},
    trim,
};

/// How often a busy mount is tried again: a container's namespace may need a
/// moment to go.
const UNMOUNT_TRIES: u32 = 20;

/// The file system whose files are the host's.
const VIRTIOFS: &str = "virtiofs";

/// How far ahead of a reader the host's files are read, in KiB: eight requests at a time, where the
/// kernel's default is one.
const READ_AHEAD_KIB: u32 = 1024;

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
    slots: Slots,
    attached: Mutex<HashMap<Id, Storage>>,
    /// One attach or detach at a time: they all change the mount table.
    changing: tokio::sync::Mutex<()>,
}

impl Storages {
    /// Starts without storages.
    pub(crate) fn new(layout: Layout, slots: Slots) -> Arc<Self> {
        Arc::new(Self {
            layout,
            slots,
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
        let options = Options::parse(&request)?;
        let _changing = self.changing.lock().await;
        if let Some(known) = self.attached().get(&id) {
            return if known.request == request {
                Ok(known.clone())
            } else {
                Err(StorageError::Exists(id))
            };
        }
        let (slots, path) = (self.slots.clone(), self.layout.storage(&id));
        let storage = blocking(move || Storage::set_up(request, options, &slots, path)).await?;
        if let Some(path) = &storage.mount_point
            && (storage.request.scratch || storage.request.volume.is_some())
            && !storage.device.is_empty()
        {
            let device = storage.device.clone().into();
            tokio::spawn(trim::keep_trimmed(device, path.clone()));
        }
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
            None => {
                let slots = self.slots.clone();
                blocking(move || Ok(slots.slot(slot)?.release()?)).await
            }
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
        let slots = self.slots.clone();
        blocking(move || storage.take_down(&slots)).await?;
        self.attached().remove(id);
        Ok(())
    }

    /// Unmounts everything, as far as it goes, before the guest stops.
    pub(crate) async fn shutdown(&self) {
        let mounted: Vec<_> = self
            .attached()
            .iter()
            .filter_map(|(id, storage)| Some((id.clone(), storage.mount_point.clone()?)))
            .collect();
        blocking(move || {
            for (id, path) in mounted {
                if let Err(error) = umount2(&path, MntFlags::empty()) {
                    warn!(storage = %id, %error, "unmount");
                }
            }
        })
        .await;
    }
}

impl Storage {
    /// Brings up the device of `request`, and mounts it on `path` when it has a file system.
    fn set_up(
        request: AttachStorageRequest,
        mut options: Options,
        slots: &Slots,
        path: PathBuf,
    ) -> Result<Self, StorageError> {
        let fstype = request.fstype.as_str();
        // Memory and directories have no device; all else is behind a slot.
        let device = match fstype {
            "tmpfs" | "hugetlbfs" | "bind" => String::new(),
            // Known by its tag, which is the storage's id.
            VIRTIOFS => {
                slots.slot(request.slot)?.probe()?;
                request.id.clone()
            }
            _ => {
                let slot = slots.slot(request.slot)?;
                slot.probe()?;
                let disk = slot.disk()?;
                options.choose_access(fstype, &disk);
                format!("/dev/{disk}")
            }
        };
        let mount_point = if fstype.is_empty() {
            None
        } else {
            let mounted = options.mount(fstype, &device, &path).and_then(|()| {
                let volume = request.volume.as_ref();
                if fstype == VIRTIOFS {
                    read_ahead(&path);
                }
                let made = volume.map_or(Ok(()), |like| make_volume(&path, like));
                made.inspect_err(|_| {
                    // Nothing uses it yet.
                    let _ = umount2(&path, MntFlags::empty());
                })
            });
            mounted.inspect_err(|_| {
                let _ = fs::remove_dir(&path);
            })?;
            Some(path)
        };
        Ok(Self {
            request,
            device,
            mount_point,
        })
    }

    /// Unmounts it and releases its device.
    fn take_down(&self, slots: &Slots) -> Result<(), StorageError> {
        if let Some(path) = &self.mount_point {
            if self.request.volume.is_some() {
                // A mount namespace of a container may still hold on to the file system, and the
                // disk goes.
                write_back(path)?;
            }
            unmount(path)?;
            let _ = fs::remove_dir(path);
        }
        if !self.device.is_empty() {
            slots.slot(self.request.slot)?.release()?;
        }
        Ok(())
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

/// Has the kernel read files of the host ahead. Without, they are read as well.
fn read_ahead(path: &Path) {
    // It waits for the file server, whose first answer would undo what is set before.
    let set = fs::metadata(path)
        .and_then(|root| fs::write(read_ahead_of(root.dev()), READ_AHEAD_KIB.to_string()));
    if let Err(error) = set {
        warn!(path = %path.display(), %error, "set the read-ahead of shared files");
    }
}

/// The setting of a file system with this device number.
fn read_ahead_of(device: u64) -> PathBuf {
    let (major, minor) = (major(device), minor(device));
    format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb").into()
}

fn write_back(path: &Path) -> Result<(), StorageError> {
    let sync = || -> io::Result<()> { Ok(syncfs(File::open(path)?)?) };
    sync().map_err(|source| StorageError::Sync {
        path: path.to_owned(),
        source,
    })
}

fn unmount(path: &Path) -> Result<(), StorageError> {
    let mut tries = 0;
    loop {
        match umount2(path, MntFlags::empty()) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(nix::Error::EBUSY) if tries < UNMOUNT_TRIES => {
                tries += 1;
                sleep(Duration::from_millis(50));
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
    use nix::{
        sys::stat::{Mode, makedev},
        unistd::mkfifo,
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
    fn read_ahead_is_set_where_the_kernel_has_it() {
        assert_eq!(
            read_ahead_of(makedev(0, 43)),
            Path::new("/sys/class/bdi/0:43/read_ahead_kb")
        );
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

    /// A machine with an empty slot 6 and a disk in slot 5, whose device is never done.
    struct SlowMachine {
        dir: tempfile::TempDir,
    }

    impl SlowMachine {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let bus = dir.path().join("bus/platform");
            fs::create_dir_all(bus.join("devices/virtio-mmio.5/driver")).unwrap();
            fs::create_dir_all(bus.join("devices/virtio-mmio.6")).unwrap();
            fs::create_dir_all(bus.join("drivers/virtio-mmio")).unwrap();
            // Who writes there waits for a reader, as for a device.
            for file in ["drivers_probe", "drivers/virtio-mmio/unbind"] {
                mkfifo(&bus.join(file), Mode::S_IRWXU).unwrap();
            }
            Self { dir }
        }

        fn storages(&self) -> Arc<Storages> {
            let layout = Layout::new(self.dir.path().join("run"), "x".into());
            Storages::new(layout, Slots::below(self.dir.path(), self.dir.path()))
        }

        /// The device is done after all, in a while.
        fn done_later(&self, file: &str) -> std::thread::JoinHandle<String> {
            let path = self.dir.path().join("bus/platform").join(file);
            std::thread::spawn(move || {
                sleep(Duration::from_millis(500));
                fs::read_to_string(path).unwrap()
            })
        }
    }

    /// Bytes go to and fro, as streams of the pod do.
    async fn a_stream_goes_on() {
        let (mut host, process) = tokio::net::UnixStream::pair().unwrap();
        let echo = tokio::spawn(async move {
            let (mut reader, mut writer) = process.into_split();
            tokio::io::copy(&mut reader, &mut writer).await
        });
        for _ in 0..10 {
            host.write_all(b"x").await.unwrap();
            host.read_exact(&mut [0]).await.unwrap();
        }
        drop(host);
        echo.await.unwrap().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn streams_go_on_while_a_device_is_slow() {
        let machine = SlowMachine::new();
        let storages = machine.storages();

        let request = AttachStorageRequest {
            id: "disk".into(),
            slot: 6,
            ..AttachStorageRequest::default()
        };
        let probed = machine.done_later("drivers_probe");
        let own = Arc::clone(&storages);
        let attaching = tokio::spawn(async move { own.attach(request).await });
        a_stream_goes_on().await;
        assert!(!attaching.is_finished());
        let failed = attaching.await.unwrap();
        assert!(matches!(
            failed,
            Err(StorageError::Device(DeviceError::Empty(6)))
        ));
        assert_eq!(probed.join().unwrap(), "virtio-mmio.6");

        let storage = Storage {
            request: AttachStorageRequest {
                slot: 5,
                ..AttachStorageRequest::default()
            },
            device: "/dev/vdb".into(),
            mount_point: None,
        };
        let id = Id::parse("storage id", "disk").unwrap();
        storages.attached().insert(id.clone(), storage);
        let released = machine.done_later("drivers/virtio-mmio/unbind");
        let own = Arc::clone(&storages);
        let detaching = tokio::spawn(async move { own.detach("disk").await });
        a_stream_goes_on().await;
        assert!(!detaching.is_finished());
        detaching.await.unwrap().unwrap();
        assert_eq!(released.join().unwrap(), "virtio-mmio.5");
        assert_eq!(storages.attached().get(&id), None);

        // A device that was never noted.
        let released = machine.done_later("drivers/virtio-mmio/unbind");
        let own = Arc::clone(&storages);
        let vacating = tokio::spawn(async move { own.vacate(5).await });
        a_stream_goes_on().await;
        assert!(!vacating.is_finished());
        vacating.await.unwrap().unwrap();
        assert_eq!(released.join().unwrap(), "virtio-mmio.5");
    }

    #[test]
    fn what_is_behind_a_slot_is_found_without_its_name() {
        let storages = Storages::new(
            Layout::new("/nonexistent".into(), "x".into()),
            Slots::default(),
        );
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
