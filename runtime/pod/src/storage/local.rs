//! Volumes that the guest keeps by itself: kubelet's emptyDirs, which nobody but the pod uses.
//!
//! One on disk is a sparse image in kubelet's directory of the volume, so kubelet counts what it
//! occupies and removes it with the pod; it outlives containers and sandboxes. One in memory is a
//! tmpfs of the guest, as large as kubelet's, until the VM ends. The existence of the image is all
//! that is to be known of a volume: nothing is recorded about it but who has it attached.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

use nix::{
    libc,
    sys::statfs::{TMPFS_MAGIC, statfs},
};

use super::{StorageError, devices::BlockDevice, scratch};
use crate::{
    config::PodsConfig,
    guest::client::{Storage, Volume},
    spec::{MountPropagation, MountSource, MountSpec},
};

/// kubelet's directory of a pod's emptyDirs.
const PLUGIN: &str = "kubernetes.io~empty-dir";
/// The image in kubelet's directory of a volume.
const IMAGE: &str = ".hull-volume.img";
/// Most volumes of a pod that its guest keeps: each disk takes one of the VM's slots.
pub(crate) const MOST: usize = 8;
/// Directories that are looked at in one volume.
const MOST_DIRECTORIES: usize = 1000;

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

/// Tells how the guest keeps a volume, or that it can't: because the host has files in it, shares
/// it with a container already (`shared`), or mounts things there. Blocks.
pub(crate) fn find(mount: &MountSpec, directory: &Path, shared: bool) -> Option<LocalVolume> {
    let MountSource::Host(path) = &mount.source else {
        return None;
    };
    let known = fs::symlink_metadata(directory.join(IMAGE)).is_ok_and(|m| m.is_file());
    let follows_host = mount.propagation != MountPropagation::Private;
    if !known && (shared || follows_host) {
        return None;
    }
    let look = || -> io::Result<Option<LocalVolume>> {
        let metadata = fs::symlink_metadata(directory)?;
        let parent = fs::metadata(directory.parent().unwrap_or_else(|| Path::new("/")))?;
        let about = statfs(directory)?;
        let medium = if metadata.dev() == parent.dev() {
            Medium::Disk
        } else if about.filesystem_type() == TMPFS_MAGIC {
            let blocks = u64::try_from(about.block_size()).unwrap_or(0);
            let bytes = about.blocks().saturating_mul(blocks);
            Medium::Memory { bytes }
        } else {
            // Huge pages, or something that is not kubelet's.
            return Ok(None);
        };
        let target = fs::metadata(path)?;
        let content = Content::look_for(&target, directory)?;
        let Some(sub_path) = content.found.filter(|_| known || !content.files) else {
            return Ok(None);
        };
        let name = directory.file_name().unwrap_or_default();
        Ok(metadata.is_dir().then(|| LocalVolume {
            storage: format!("volume-{}", name.to_string_lossy()),
            medium,
            sub_path,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            directory: directory.to_owned(),
        }))
    };
    // Whatever is wrong with the path, sharing it will tell.
    look().ok().flatten()
}

/// What the host has in kubelet's directory of a volume: of kubelet, only directories, those of
/// subPaths.
#[derive(Default)]
struct Content {
    /// Where the directory is that was looked for.
    found: Option<String>,
    /// There are files, or too many directories.
    files: bool,
}

impl Content {
    fn look_for(target: &fs::Metadata, directory: &Path) -> io::Result<Self> {
        let is_target = |m: &fs::Metadata| (m.dev(), m.ino()) == (target.dev(), target.ino());
        let mut content = Self::default();
        let mut left = vec![directory.to_owned()];
        let mut seen = 0;
        while let Some(at) = left.pop() {
            seen += 1;
            if seen > MOST_DIRECTORIES {
                content.files = true;
                break;
            }
            if is_target(&fs::symlink_metadata(&at)?) {
                let inside = at.strip_prefix(directory).ok().and_then(Path::to_str);
                content.found = inside.map(str::to_owned);
            }
            for entry in fs::read_dir(&at)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    left.push(entry.path());
                } else if at != directory || !is_ours(&entry.file_name()) {
                    content.files = true;
                }
            }
        }
        Ok(content)
    }
}

/// The image, or one that was not finished.
fn is_ours(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(IMAGE))
}

impl LocalVolume {
    /// What the guest is asked to mount.
    pub(crate) fn storage(&self, slot: u8) -> Storage<'_> {
        let (fstype, size) = match self.medium {
            Medium::Disk => ("ext4", None),
            Medium::Memory { bytes } => ("tmpfs", Some(bytes)),
        };
        Storage {
            id: &self.storage,
            slot,
            fstype,
            volume: Some(Volume {
                size,
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
    /// When it can't be made, or is not as this daemon makes it.
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
        if !path.try_exists().map_err(failed("look for"))? {
            scratch::create_volume(config, &path)?;
        }
        open_image(&path)
            .and_then(|file| BlockDevice::of(file, false))
            .map_err(failed("open"))
    }
}

/// A pod that shared the directory before could have left anything under this name.
fn open_image(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.nlink() == 1 && metadata.uid() == 0 {
        Ok(file)
    } else {
        Err(io::Error::other("it is not as this runtime made it"))
    }
}

#[cfg(test)]
mod tests {
    use hull_proto_vmm::DeviceConfig;

    use super::*;

    fn mount(path: impl Into<PathBuf>) -> MountSpec {
        MountSpec {
            container_path: "/x".into(),
            source: MountSource::Host(path.into()),
            readonly: false,
            recursive_readonly: false,
            propagation: MountPropagation::Private,
            selinux_relabel: false,
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
    fn volume(dir: &Path) -> (PathBuf, impl Fn(&Path, bool) -> Option<LocalVolume>) {
        let path = dir.join("pods/u1/volumes").join(PLUGIN).join("data");
        fs::create_dir_all(&path).unwrap();
        let found = {
            let path = path.clone();
            move |at: &Path, shared| find(&mount(at), &path, shared)
        };
        (path, found)
    }

    #[test]
    fn a_volume_with_files_or_sharers_is_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let (path, find) = volume(dir.path());
        fs::create_dir_all(path.join("a/b")).unwrap();
        let found = find(&path, false).unwrap();
        assert_eq!((found.medium, found.sub_path.as_str()), (Medium::Disk, ""));
        assert_eq!(found.storage, "volume-data");
        assert_eq!(find(&path.join("a/b"), false).unwrap().sub_path, "a/b");
        assert_eq!(find(&path, true), None);
        assert_eq!(find(dir.path(), false), None);
        fs::write(path.join("a/file"), "").unwrap();
        assert_eq!(find(&path, false), None);
        fs::remove_file(path.join("a/file")).unwrap();
        // What an earlier daemon did not finish.
        fs::write(path.join(".hull-volume.img.tmp"), "").unwrap();
        assert!(find(&path, false).is_some());
        // What is the guest's stays so.
        fs::write(path.join(IMAGE), "").unwrap();
        fs::write(path.join("a/file"), "").unwrap();
        assert!(find(&path, true).is_some());
    }

    #[test]
    fn an_image_is_made_once_and_only_ours_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let config = PodsConfig {
            scratch_bytes: 64 << 20,
            ..PodsConfig::new(dir.path(), dir.path(), dir.path())
        };
        let (path, find) = volume(dir.path());
        let local = find(&path, false).unwrap();
        let disk = local.disk(&config).unwrap();
        let (device, _) = disk.disk(&local.storage).unwrap();
        let DeviceConfig::Block { extents, .. } = device else {
            panic!("{device:?}");
        };
        assert_eq!(extents[0].length, 64 << 20);
        let image = path.join(IMAGE);
        let number = fs::metadata(&image).unwrap().ino();
        assert!(fs::metadata(&image).unwrap().blocks() * 512 < 16 << 20);
        local.disk(&config).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().ino(), number);

        fs::hard_link(&image, path.join("second")).unwrap();
        assert!(local.disk(&config).is_err());
        fs::remove_file(path.join("second")).unwrap();
        fs::rename(&image, dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &image).unwrap();
        assert!(local.disk(&config).is_err());
    }
}
