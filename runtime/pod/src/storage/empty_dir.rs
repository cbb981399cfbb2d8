//! Volumes that the guest keeps by itself: kubelet's emptyDirs, which nobody but the pod uses.
//!
//! One on disk is a sparse image in kubelet's directory of the volume, so kubelet counts what it
//! occupies and removes it with the pod; it outlives containers and sandboxes. One in memory is a
//! tmpfs of the guest, as large as kubelet's, until the VM ends; one in huge pages the same in a
//! hugetlbfs. The existence of the image is all
//! that is to be known of a volume: nothing is recorded about it but who has it attached.
//!
//! Containers that share the directory with the host can make any file there, as root too. So an
//! image is only what has a mark that they can't give: an attribute of the host's administrator
//! (`trusted.*` of xattr(7)), which a file server has not the power to set. All else in the
//! directory are the pod's files, whatever they are called. The image never has a name before it is
//! whole, and what is given to a VM is the file that was checked or made, not what its path names.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use rustix::{
    fs::{AtFlags, OFlags, XattrFlags, fgetxattr, fsetxattr, fstat, unlinkat},
    io::Errno,
};

use hull_base::beneath::Directory;
use hull_spec::{
    config::PodsConfig,
    spec::{MountPropagation, MountSource, MountSpec},
};
use hull_vm::agent::client::{Storage, Volume};

use super::{StorageError, host_device::BlockDevice, scratch};
use crate::record::LocalRecord;

/// kubelet's directory of a pod's emptyDirs.
const PLUGIN: &str = "kubernetes.io~empty-dir";
/// The image in kubelet's directory of a volume.
const IMAGE: &str = ".hull-volume.img";
/// Most volumes of a pod that its guest keeps: each disk takes one of the VM's slots.
pub(crate) const MOST: usize = 8;
/// What is looked at in one volume, of files and directories.
const MOST_ENTRIES: usize = 1000;
/// The attribute by which an image is known; its value is the image's size in bytes, as it was made.
const MARK: &str = "trusted.hull.volume";
/// The permissions of an image.
const MODE: u32 = 0o600;

/// A volume as a container mounts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalVolume {
    /// kubelet's directory of it.
    pub directory: PathBuf,
    /// Its name in the guest.
    pub storage: String,
    pub medium: Medium,
    /// Path in it; empty: all of it.
    pub sub_path: String,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Where a volume's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    /// In the image.
    Disk,
    /// In a tmpfs of this size.
    Memory { bytes: u64 },
    /// In the guest's huge pages of this size, of which the containers' limits say how many there are.
    HugePages { bytes: u64 },
}

/// kubelet's directory of the emptyDir that a mount shows or is in, by the form of its path:
/// `pods/UID/volumes/kubernetes.io~empty-dir/NAME`, and for a subPath
/// `pods/UID/volume-subpaths/NAME/CONTAINER/INDEX`.
pub(crate) fn directory(pod_uid: &str, mount: &MountSpec) -> Option<PathBuf> {
    let MountSource::Host(path) = &mount.source else {
        return None;
    };
    let names: Option<Vec<&str>> = path
        .components()
        .map(|component| match component {
            Component::RootDir => Some("/"),
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    let names = names?;
    let (pod, name) = match names.as_slice() {
        [pods @ .., "volumes", PLUGIN, name] => (pods, *name),
        [pods @ .., "volume-subpaths", name, _, _] => (pods, *name),
        _ => return None,
    };
    let of_the_pod = matches!(pod, [.., "pods", uid] if *uid == pod_uid);
    let pod: PathBuf = pod.iter().collect();
    (of_the_pod && is_label(name)).then(|| pod.join("volumes").join(PLUGIN).join(name))
}

/// Whether it is a name of a volume in Kubernetes (RFC 1123 label).
fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Who among a pod's containers uses a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InUse {
    No,
    /// The guest keeps it for one.
    ByGuest,
    /// One shares kubelet's directory, or another is to.
    ByHost,
}

/// Tells how the guest keeps a volume, or that it can't: because the host has files in it, shares
/// it with a container already, or mounts things there. Blocks.
pub(crate) fn find(mount: &MountSpec, directory: &Path, in_use: InUse) -> Option<LocalVolume> {
    // Whatever is wrong with the path, sharing it will tell.
    look(mount, directory, in_use).ok().flatten()
}

fn look(mount: &MountSpec, path: &Path, in_use: InUse) -> io::Result<Option<LocalVolume>> {
    let MountSource::Host(mounted) = &mount.source else {
        return Ok(None);
    };
    let place = Place::open(path)?;
    let known = in_use == InUse::ByGuest || matches!(place.image(), Ok(Some(_)));
    let follows_host = mount.propagation != MountPropagation::Private;
    if !known && (in_use == InUse::ByHost || follows_host) {
        return Ok(None);
    }
    let stat = fstat(&place.volume)?;
    let about = fstatfs(&place.volume)?;
    let medium = if stat.st_dev == fstat(&place.plugin)?.st_dev {
        Medium::Disk
    } else if about.filesystem_type() == TMPFS_MAGIC {
        let blocks = u64::try_from(about.block_size()).unwrap_or(0);
        let bytes = about.blocks().saturating_mul(blocks);
        Medium::Memory { bytes }
    } else if about.filesystem_type() == HUGETLBFS_MAGIC {
        let bytes = u64::try_from(about.block_size()).unwrap_or(0);
        Medium::HugePages { bytes }
    } else {
        // Something that is not kubelet's.
        return Ok(None);
    };
    if !known && medium == Medium::Disk && !place.can_have_image() {
        return Ok(None);
    }
    let Ok(inside) = mounted.strip_prefix(&place.pod_path) else {
        return Ok(None);
    };
    let target = place.pod.enter(inside)?;
    let content = Content::look_for(&target, &place.volume)?;
    let Some(sub_path) = content.found.filter(|_| known || !content.files) else {
        return Ok(None);
    };
    let name = path.file_name().unwrap_or_default();
    Ok(Some(LocalVolume {
        storage: format!("volume-{}", name.to_string_lossy()),
        medium,
        sub_path,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        directory: path.to_owned(),
    }))
}

/// kubelet's directories of a pod and of one of its volumes, as they are when they are opened.
struct Place {
    pod_path: PathBuf,
    pod: Directory,
    /// That of all emptyDirs of the pod.
    plugin: Directory,
    volume: Directory,
}

impl Place {
    /// Opens them by the path of the volume, as [`directory`] tells it. Up to the pod's own, the
    /// path is the administrator's.
    fn open(path: &Path) -> io::Result<Self> {
        let pod_path = path.ancestors().nth(3);
        let pod_path = pod_path.ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let pod = Directory::open(&pod_path)?;
        let plugin = pod.enter(&Path::new("volumes").join(PLUGIN))?;
        let volume = plugin.enter(Path::new(path.file_name().unwrap_or_default()))?;
        Ok(Self {
            pod_path,
            pod,
            plugin,
            volume,
        })
    }

    /// The image of the volume; none when nothing has its name.
    ///
    /// # Errors
    /// When what has its name is not as this runtime makes it.
    fn image(&self) -> io::Result<Option<File>> {
        let file = match self.volume.file(Path::new(IMAGE), OFlags::RDWR) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if is_ours(&file)? {
            Ok(Some(file))
        } else {
            Err(io::Error::other("it is not as this runtime made it"))
        }
    }

    /// Gives a file the mark and the name of the image.
    fn keep_image(&self, file: &File) -> io::Result<()> {
        mark(file)?;
        self.volume.link(file, Path::new(IMAGE))
    }

    /// Whether the file system can have files without a name, and marks.
    fn can_have_image(&self) -> bool {
        self.volume
            .unnamed(MODE)
            .is_ok_and(|file| mark(&file).is_ok())
    }
}

fn mark(image: &File) -> io::Result<()> {
    let bytes = image.metadata()?.len().to_string();
    Ok(fsetxattr(
        image,
        MARK,
        bytes.as_bytes(),
        XattrFlags::CREATE,
    )?)
}

fn is_ours(image: &File) -> io::Result<bool> {
    let metadata = image.metadata()?;
    let mut mark = [0; 20];
    let mark = match fgetxattr(image, MARK, &mut mark) {
        Ok(length) => mark.get(..length).unwrap_or_default(),
        Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    Ok(metadata.is_file()
        && metadata.nlink() == 1
        && metadata.uid() == 0
        && metadata.mode() & 0o7777 == MODE
        && mark == metadata.len().to_string().as_bytes())
}

/// What the host has in kubelet's directory of a volume: of kubelet, only directories, those of
/// subPaths.
#[derive(Default)]
struct Content {
    /// Where the directory is that was looked for.
    found: Option<String>,
    /// There is more than directories, or too much to look at.
    files: bool,
}

impl Content {
    fn look_for(target: &Directory, volume: &Directory) -> io::Result<Self> {
        let target = fstat(target)?;
        let mut content = Self::default();
        let mut left = vec![PathBuf::new()];
        let mut seen = 0;
        while let Some(at) = left.pop() {
            let directory = match volume.enter(&at) {
                Ok(directory) => directory,
                // A file, a link, or what nobody can enter.
                Err(_) => {
                    content.files = true;
                    continue;
                }
            };
            let stat = fstat(&directory)?;
            if (stat.st_dev, stat.st_ino) == (target.st_dev, target.st_ino) {
                content.found = at.to_str().map(str::to_owned);
            }
            for name in directory.names()? {
                seen += 1;
                if seen > MOST_ENTRIES {
                    content.files = true;
                    return Ok(content);
                }
                left.push(at.join(name?));
            }
        }
        Ok(content)
    }
}

impl LocalVolume {
    /// As it is recorded for a container's mount of this number, with the slot of its disk.
    pub(crate) fn record(&self, mount: usize, slot: Option<u8>) -> LocalRecord {
        LocalRecord {
            mount,
            directory: self.directory.clone(),
            storage: self.storage.clone(),
            slot,
        }
    }

    /// What the guest is asked to mount.
    pub(crate) fn storage(&self, slot: u8) -> Storage<'_> {
        let (fstype, option) = match self.medium {
            Medium::Disk => ("ext4", None),
            Medium::Memory { bytes } => ("tmpfs", Some(("size", bytes))),
            Medium::HugePages { bytes } => ("hugetlbfs", Some(("pagesize", bytes))),
        };
        Storage {
            id: &self.storage,
            slot,
            fstype,
            volume: Some(Volume {
                option,
                mode: self.mode,
                uid: self.uid,
                gid: self.gid,
            }),
            ..Storage::default()
        }
    }

    /// The image as a disk for the VM; made when there is none. Blocks.
    ///
    /// # Errors
    /// When it can't be made, or is not as this runtime makes it.
    pub(super) fn disk(&self, config: &PodsConfig) -> Result<BlockDevice, StorageError> {
        let path = self.directory.join(IMAGE);
        let failed = |action| {
            let path = path.clone();
            move |source| StorageError::Io {
                action,
                path,
                source,
            }
        };
        let place = Place::open(&self.directory).map_err(failed("find the place of"))?;
        let file = match place.image().map_err(failed("open"))? {
            Some(file) => file,
            None => {
                let file = place.volume.unnamed(MODE).map_err(failed("make"))?;
                scratch::fill_volume(config, &file, &path)?;
                place.keep_image(&file).map_err(failed("keep"))?;
                file
            }
        };
        BlockDevice::of(file, false).map_err(failed("measure"))
    }

    /// Makes a copy of a disk the image of the volume, in the place of one that is there; returns it for the VM.
    /// Blocks.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn restore(&self, from: &File) -> Result<BlockDevice, StorageError> {
        let failed = |action| {
            move |source| StorageError::Io {
                action,
                path: self.directory.join(IMAGE),
                source,
            }
        };
        let place = Place::open(&self.directory).map_err(failed("find the place of"))?;
        let file = place.volume.unnamed(MODE).map_err(failed("make"))?;
        scratch::copy_file(from, &file).map_err(failed("copy to"))?;
        // Of a pod that could not go on, or of what was there before this one.
        if place.image().map_err(failed("open"))?.is_some() {
            let removed = unlinkat(&place.volume, IMAGE, AtFlags::empty());
            removed.map_err(|error| failed("remove")(error.into()))?;
        }
        place.keep_image(&file).map_err(failed("keep"))?;
        BlockDevice::of(file, false).map_err(failed("measure"))
    }
}

/// A copy of a disk in a file of `directory` that has no name, for a VM. Blocks.
///
/// # Errors
/// When it can't be made.
pub(crate) fn restore_unnamed(from: &File, directory: &Path) -> Result<BlockDevice, StorageError> {
    let failed = |source| StorageError::Io {
        action: "copy a disk to",
        path: directory.to_owned(),
        source,
    };
    let at = Directory::open(directory).map_err(failed)?;
    let file = at.unnamed(MODE).map_err(failed)?;
    scratch::copy_file(from, &file).map_err(failed)?;
    BlockDevice::of(file, false).map_err(failed)
}

/// Copies the image of the volume in this directory, whose VM stands still. Blocks.
///
/// # Errors
/// When there is none, or it can't be copied.
pub(crate) fn save(directory: &Path, to: &File) -> Result<(), StorageError> {
    let saved = Place::open(directory).and_then(|place| {
        let image = place.image()?.ok_or(io::ErrorKind::NotFound)?;
        scratch::copy_file(&image, to)
    });
    saved.map_err(|source| StorageError::Io {
        action: "copy",
        path: directory.join(IMAGE),
        source,
    })
}

/// Whether this is what the guest calls a volume, [`LocalVolume::storage`].
pub(crate) fn is_storage(name: &str) -> bool {
    name.strip_prefix("volume-").is_some_and(is_label)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, chown, symlink},
    };

    use hull_proto_vmm::DeviceConfig;
    use nix::sys::stat::Mode;

    use super::*;

    fn mount(path: impl Into<PathBuf>) -> MountSpec {
        MountSpec {
            container_path: "/x".into(),
            source: MountSource::Host(path.into()),
            readonly: false,
            recursive_readonly: false,
            propagation: MountPropagation::Private,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        }
    }

    #[test]
    fn an_empty_directory_is_known_by_its_path() {
        let of = |path: &str| directory("u1", &mount(path));
        let expected = PathBuf::from("/k/pods/u1/volumes/kubernetes.io~empty-dir/data");
        let paths = [
            "/k/pods/u1/volumes/kubernetes.io~empty-dir/data",
            "/k/pods/u1/volume-subpaths/data/main/0",
        ];
        for path in paths {
            assert_eq!(of(path), Some(expected.clone()), "{path}");
        }
        for other in [
            "/k/pods/u2/volumes/kubernetes.io~empty-dir/data",
            "/k/pods/u1/volumes/kubernetes.io~empty-dir/data/sub",
            "/k/pods/u1/volumes/kubernetes.io~empty-dir/../x",
            "/k/pods/u1/volumes/kubernetes.io~empty-dir/Upper_Case",
            "/k/pods/u1/volumes/kubernetes.io~secret/data",
            "/k/pods/u1/etc-hosts",
            "/u1/volumes/kubernetes.io~empty-dir/data",
            "/",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    /// A kubelet's directory of one volume, and the volume as it is found.
    fn volume(dir: &Path) -> (PathBuf, impl Fn(&Path, InUse) -> Option<LocalVolume>) {
        let path = dir.join("pods/u1/volumes").join(PLUGIN).join("data");
        fs::create_dir_all(&path).unwrap();
        let found = {
            let path = path.clone();
            move |at: &Path, in_use| find(&mount(at), &path, in_use)
        };
        (path, found)
    }

    fn config(root: &Path) -> PodsConfig {
        PodsConfig {
            scratch_bytes: 64 << 20,
            ..PodsConfig::new(root, root, root)
        }
    }

    #[test]
    fn a_volume_with_files_or_sharers_is_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let (path, find) = volume(dir.path());
        fs::create_dir_all(path.join("a/b")).unwrap();
        let found = find(&path, InUse::No).unwrap();
        assert_eq!((found.medium, found.sub_path.as_str()), (Medium::Disk, ""));
        assert_eq!(found.storage, "volume-data");
        assert_eq!(find(&path.join("a/b"), InUse::No).unwrap().sub_path, "a/b");
        assert_eq!(find(&path, InUse::ByHost), None);
        assert_eq!(find(dir.path(), InUse::No), None);
        fs::write(path.join("a/file"), "").unwrap();
        assert_eq!(find(&path, InUse::No), None);
        // What is the guest's stays so.
        assert_eq!(find(&path, InUse::ByGuest).unwrap(), found);
        found.disk(&config(dir.path())).unwrap();
        assert_eq!(find(&path, InUse::ByHost).unwrap(), found);
    }

    /// Names of an image, and what containers that share the directory can give them: none is ours.
    #[test]
    fn what_a_container_leaves_is_never_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let (path, find) = volume(dir.path());
        let local = find(&path, InUse::No).unwrap();
        type Plant = fn(&Path, &Path);
        let plants: [(&str, Plant); 6] = [
            ("link", |at, victim| symlink(victim, at).unwrap()),
            ("dangling link", |at, _| {
                symlink("/nonexistent", at).unwrap()
            }),
            ("hard link", |at, victim| fs::hard_link(victim, at).unwrap()),
            ("FIFO", |at, _| {
                nix::unistd::mkfifo(at, Mode::S_IRWXU).unwrap()
            }),
            ("directory", |at, _| {
                fs::create_dir(at).unwrap();
                fs::write(at.join("file"), "").unwrap();
            }),
            ("root's file", |at, _| {
                let file = File::create_new(at).unwrap();
                file.set_len(64 << 20).unwrap();
                file.set_permissions(fs::Permissions::from_mode(MODE))
                    .unwrap();
            }),
        ];
        for (what, plant) in plants {
            for name in [IMAGE, ".hull-volume.img.tmp", ".hull-volume.imgx"] {
                let at = path.join(name);
                plant(&at, &victim);
                assert_eq!(find(&path, InUse::No), None, "{what} {name}");
                let disk = local.disk(&config);
                if name == IMAGE {
                    disk.expect_err(what);
                } else {
                    disk.unwrap();
                    fs::remove_file(path.join(IMAGE)).unwrap();
                }
                assert_eq!(fs::read(&victim).unwrap(), b"precious", "{what} {name}");
                let there = fs::symlink_metadata(&at).unwrap();
                assert!(!there.is_file() || there.len() != 0, "{what} {name}");
                let _ = fs::remove_file(&at).or_else(|_| fs::remove_dir_all(&at));
            }
        }
        assert_eq!(fs::metadata(&victim).unwrap().nlink(), 1);
        assert!(find(&path, InUse::No).is_some());
    }

    #[test]
    fn an_image_is_made_once_and_only_ours_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let (path, find) = volume(dir.path());
        let local = find(&path, InUse::No).unwrap();
        let disk = local.disk(&config).unwrap();
        let (device, _) = disk.disk(&local.storage).unwrap();
        let DeviceConfig::Block { extents, .. } = device else {
            panic!("{device:?}");
        };
        assert_eq!(extents[0].length, 64 << 20);
        let image = path.join(IMAGE);
        let number = fs::metadata(&image).unwrap().ino();
        assert!(fs::metadata(&image).unwrap().blocks() * 512 < 16 << 20);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
        local.disk(&config).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().ino(), number);

        let change = |wrong: &dyn Fn(), right: &dyn Fn()| {
            wrong();
            assert!(local.disk(&config).is_err());
            right();
            local.disk(&config).unwrap();
        };
        let second = path.join("second");
        change(&|| fs::hard_link(&image, &second).unwrap(), &|| {
            fs::remove_file(&second).unwrap();
        });
        let size = |bytes| {
            File::options()
                .write(true)
                .open(&image)
                .unwrap()
                .set_len(bytes)
        };
        change(&|| size(1 << 40).unwrap(), &|| size(64 << 20).unwrap());
        let mode = |mode| fs::set_permissions(&image, fs::Permissions::from_mode(mode));
        change(&|| mode(0o644).unwrap(), &|| mode(MODE).unwrap());
        let owner = |uid| chown(&image, Some(uid), None);
        change(&|| owner(1000).unwrap(), &|| owner(0).unwrap());
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&image, &elsewhere).unwrap();
        change(&|| symlink(&elsewhere, &image).unwrap(), &|| {
            fs::rename(&elsewhere, &image).unwrap();
        });
        // A copy has no mark.
        fs::copy(&image, &elsewhere).unwrap();
        fs::rename(&elsewhere, &image).unwrap();
        mode(MODE).unwrap();
        assert!(local.disk(&config).is_err());
    }

    #[test]
    fn a_directory_that_became_a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        // kubelet's own directory may be reached by one: that is the administrator's.
        let kubelet = dir.path().join("kubelet");
        fs::create_dir(dir.path().join("data")).unwrap();
        symlink("data", &kubelet).unwrap();
        let (path, find) = volume(&kubelet);
        fs::create_dir(path.join("sub")).unwrap();
        let local = find(&path, InUse::No).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(local.disk(&config).is_err());
        assert_eq!(find(&path, InUse::No), None);
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
        fs::remove_file(&path).unwrap();
        fs::rename(&elsewhere, &path).unwrap();
        local.disk(&config).unwrap();
        fs::remove_dir(path.join("sub")).unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        symlink(dir.path().join("sub"), path.join("sub")).unwrap();
        assert_eq!(find(&path.join("sub"), InUse::No), None);
    }

    #[test]
    fn not_all_of_a_large_volume_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let (path, find) = volume(dir.path());
        for number in 0..=MOST_ENTRIES {
            fs::create_dir(path.join(number.to_string())).unwrap();
        }
        assert_eq!(find(&path, InUse::No), None);
        fs::remove_dir(path.join("7")).unwrap();
        assert!(find(&path, InUse::No).is_some());
    }
}
