//! Sources of bind mounts: paths in attached storages, and copies of mounts that show the
//! owners of a user namespace.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use hull_proto_agent::agent::StorageMount;
use oci_spec::runtime::Spec;
use pathrs::Root;
use rustix::fs::CWD;

use super::{error::ContainerError, make, pause::PodUser, spec::SpecError};
use crate::{
    atomic_volumes::AtomicVolumes,
    ident::Id,
    storage::{Base, Storages},
    sys,
};

/// Sources that containers may replace by something else until they are mounted, by index of the
/// mount: they are held open.
pub(super) type Held = HashMap<usize, OwnedFd>;

/// Copies of mounts that are mounted nowhere, by index of the mount that is to show them.
pub(super) type Trees = BTreeMap<usize, OwnedFd>;

/// The mounts of a container that lie in storages.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) wanted: Vec<StorageMount>,
    pub(super) storages: Arc<Storages>,
    pub(super) atomic: Arc<AtomicVolumes>,
    pub(super) container: Id,
}

impl Sources {
    /// Gives those mounts of `spec` their sources.
    pub(super) fn locate(&self, spec: &mut Spec) -> Result<Held, ContainerError> {
        let mut held = Held::new();
        for wanted in &self.wanted {
            let id = Id::parse("storage id", &wanted.storage)?;
            let base = self.storages.base(&id);
            let base = base.ok_or_else(|| ContainerError::NoStorage(wanted.storage.clone()))?;
            let found = find(&base, &wanted.sub_path).and_then(|found| {
                let path = fs::read_link(opened(&found))?;
                Ok((found, path))
            });
            let (found, mut source) = found.map_err(|source| ContainerError::SubPath {
                path: wanted.sub_path.clone(),
                source,
            })?;
            let index = usize::try_from(wanted.mount).unwrap_or(usize::MAX);
            let mount = spec.mounts_mut().as_mut().and_then(|m| m.get_mut(index));
            let mount = mount.ok_or(SpecError::Missing("mount for a storage"))?;
            if base.changes {
                held.insert(index, found);
            } else if !wanted.atomic_volume.is_empty()
                && let Some(copy) = self
                    .atomic
                    .add(&wanted.atomic_volume, &source, &self.container)
            {
                source = copy;
            }
            mount.set_source(Some(source));
        }
        Ok(held)
    }
}

/// Resolves `sub_path` without leaving `base`. What a volume lacks is made: directories like its
/// own, as kubelet makes them.
fn find(base: &Base, sub_path: &str) -> io::Result<OwnedFd> {
    let inside = Path::new("/").join(sub_path);
    let find = || -> Result<OwnedFd, pathrs::error::Error> {
        let root = Root::open(&base.path)?;
        match root.resolve(&inside) {
            Err(e) if base.changes && is_missing(&e) => {
                let mode = fs::metadata(&base.path).map_or(0o777, |m| m.permissions().mode());
                let like = Permissions::from_mode(mode & 0o777);
                let made = root.mkdir_all(&inside, &like)?.into();
                // Whatever the umask is, and with set-id bits.
                let _ = fs::set_permissions(opened(&made), Permissions::from_mode(mode & 0o7777));
                Ok(made)
            }
            found => Ok(found?.into()),
        }
    };
    find().map_err(|e| match e.kind() {
        pathrs::error::ErrorKind::OsError(Some(errno)) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other(e),
    })
}

fn is_missing(error: &pathrs::error::Error) -> bool {
    matches!(error.kind(), pathrs::error::ErrorKind::OsError(Some(errno)) if errno == libc::ENOENT)
}

fn opened(file: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

/// Copies what those bind mounts of `spec` show that have id mappings or a held source, by index of the
/// mount. Of a mapped one, files belong to the ids of the pod's user namespace: no other mapping is possible.
pub(super) fn copy(
    spec: &mut Spec,
    user: Option<&PodUser>,
    held: &Held,
) -> Result<Trees, ContainerError> {
    let mut trees = Trees::new();
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        let (uids, gids) = (mount.uid_mappings(), mount.gid_mappings());
        let mapped = uids.is_some() || gids.is_some();
        let held = held.get(&index);
        if !mapped && held.is_none() {
            continue;
        }
        let (uids, gids) = (uids.as_deref(), gids.as_deref());
        let user = user
            .filter(|user| user.is_mapped_by(uids.unwrap_or_default(), gids.unwrap_or_default()));
        let source = mount.source().clone();
        let source = source.filter(|_| mount.typ().as_deref() == Some("bind"));
        let Some(source) = source.filter(|_| !mapped || user.is_some()) else {
            return Err(ContainerError::Mapping(mount.destination().clone()));
        };
        let copied = || -> io::Result<OwnedFd> {
            let tree = match held {
                Some(held) => make::copy(held, Path::new(""), false)?,
                None => make::copy(CWD, &source, false)?,
            };
            if let Some(user) = user.filter(|_| mapped) {
                sys::map_mount(&tree, user.open()?)?;
            }
            Ok(tree)
        };
        let tree = copied().map_err(|error| ContainerError::File {
            action: "copy the mount of",
            path: source.clone(),
            source: error,
        })?;
        trees.insert(index, tree);
        mount.set_uid_mappings(None);
        mount.set_gid_mappings(None);
    }
    Ok(trees)
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
        let find = |sub_path: &str, changes| {
            let path = base.clone();
            let found = find(&Base { path, changes }, sub_path)?;
            fs::read_link(opened(&found))
        };
        assert_eq!(find("", false).unwrap(), base);
        assert_eq!(find("etc/sub", false).unwrap(), base.join("etc/sub"));
        assert_eq!(find("etc/file", false).unwrap(), base.join("etc/file"));
        assert_eq!(find("absolute/sub", false).unwrap(), base.join("etc/sub"));
        assert_eq!(find("up", false).unwrap(), base);
        let missing = find("none", false).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);

        // Of a volume it is made, and nowhere else.
        fs::set_permissions(&base, Permissions::from_mode(0o2775)).unwrap();
        let made = find("absolute/new/sub", true).unwrap();
        assert_eq!(made, base.join("etc/new/sub"));
        assert_eq!(find("etc/file", true).unwrap(), base.join("etc/file"));
        assert!(find("etc/file/below", true).is_err());
        symlink("nowhere", base.join("dangling")).unwrap();
        assert!(find("dangling", true).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
