//! Sources of bind mounts: paths in attached storages, and copies of mounts that show the
//! owners of a user namespace.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use hull_proto_agent::agent::StorageMount;
use libcontainer::oci_spec::runtime::Spec;
use nix::mount::{MntFlags, umount2};
use pathrs::Root;

use super::{ContainerError, pause::PodUser, spec::SpecError};
use crate::{ident::Id, live::LiveVolumes, storage::Storages, sys};

/// The mounts of a container that lie in storages.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) wanted: Vec<StorageMount>,
    pub(super) storages: Arc<Storages>,
    pub(super) live: Arc<LiveVolumes>,
    pub(super) container: Id,
}

impl Sources {
    /// Gives those mounts of `spec` their sources.
    pub(super) fn locate(&self, spec: &mut Spec) -> Result<(), ContainerError> {
        for wanted in &self.wanted {
            let id = Id::parse("storage id", &wanted.storage)?;
            let base = self.storages.mount_point(&id);
            let base = base.ok_or_else(|| ContainerError::NoStorage(wanted.storage.clone()))?;
            let found = find(&base, &wanted.sub_path);
            let mut source = found.map_err(|source| ContainerError::SubPath {
                path: wanted.sub_path.clone(),
                source,
            })?;
            if !wanted.live.is_empty()
                && let Some(copy) = self.live.add(&wanted.live, &source, &self.container)
            {
                source = copy;
            }
            let index = usize::try_from(wanted.mount).unwrap_or(usize::MAX);
            let mount = spec.mounts_mut().as_mut().and_then(|m| m.get_mut(index));
            let mount = mount.ok_or(SpecError::Missing("mount for a storage"))?;
            mount.set_source(Some(source));
        }
        Ok(())
    }
}

/// Resolves `sub_path` without leaving `base`, whose content does not change.
fn find(base: &Path, sub_path: &str) -> io::Result<PathBuf> {
    let inside = Path::new("/").join(sub_path);
    let found = Root::open(base)
        .and_then(|root| root.resolve(inside))
        .map_err(|e| match e.kind() {
            pathrs::error::ErrorKind::OsError(Some(errno)) => io::Error::from_raw_os_error(errno),
            _ => io::Error::other(e),
        })?;
    fs::read_link(format!("/proc/self/fd/{}", found.as_fd().as_raw_fd()))
}

/// Mounts that are gone when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Copies(Vec<PathBuf>);

impl Copies {
    /// Makes every bind mount of `spec` with id mappings one of a copy below `dir` whose files
    /// belong to the ids of the pod's user namespace. No other mapping is possible.
    pub(super) fn make(
        spec: &mut Spec,
        dir: &Path,
        user: Option<&PodUser>,
    ) -> Result<Self, ContainerError> {
        let mut copies = Self::default();
        for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
            let (uids, gids) = (mount.uid_mappings(), mount.gid_mappings());
            if uids.is_none() && gids.is_none() {
                continue;
            }
            let (uids, gids) = (uids.as_deref(), gids.as_deref());
            let user = user.filter(|user| {
                user.is_mapped_by(uids.unwrap_or_default(), gids.unwrap_or_default())
            });
            let source = mount.source().clone();
            let source = source.filter(|_| mount.typ().as_deref() == Some("bind"));
            let (Some(user), Some(source)) = (user, source) else {
                return Err(ContainerError::Mapping(mount.destination().clone()));
            };
            let at = dir.join(format!("bind-{index}"));
            fs::File::open(user.file())
                .and_then(|namespace| copies.add(&source, &at, namespace))
                .map_err(|error| ContainerError::File {
                    action: "map the owners of",
                    path: source,
                    source: error,
                })?;
            mount.set_source(Some(at));
            // Done: libcontainer would do it once more.
            mount.set_uid_mappings(None);
            mount.set_gid_mappings(None);
        }
        Ok(copies)
    }

    /// Mounts `source` on `at`, with the ids of the user namespace `user`.
    pub(super) fn add(&mut self, source: &Path, at: &Path, user: impl AsFd) -> io::Result<()> {
        let tree = sys::copy_mount(source)?;
        sys::map_mount(&tree, user)?;
        if fs::metadata(source)?.is_dir() {
            fs::create_dir(at)?;
        } else {
            fs::File::create_new(at)?;
        }
        self.0.push(at.to_owned());
        sys::place_mount(&tree, at)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for path in &self.0 {
            // What can't be unmounted goes with the guest; what was not mounted is no mount.
            let _ = umount2(path, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(path).or_else(|_| fs::remove_file(path));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_sub_path_stays_in_its_storage() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap().join("storage");
        fs::create_dir_all(base.join("etc/sub")).unwrap();
        fs::write(base.join("etc/file"), "").unwrap();
        symlink("/etc", base.join("absolute")).unwrap();
        symlink("../../..", base.join("up")).unwrap();
        assert_eq!(find(&base, "").unwrap(), base);
        assert_eq!(find(&base, "etc/sub").unwrap(), base.join("etc/sub"));
        assert_eq!(find(&base, "etc/file").unwrap(), base.join("etc/file"));
        assert_eq!(find(&base, "absolute/sub").unwrap(), base.join("etc/sub"));
        assert_eq!(find(&base, "up").unwrap(), base);
        let missing = find(&base, "none").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
