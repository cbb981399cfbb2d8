//! A container's root file system: read-only layers, and a writable one above.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{copies::Copies, pause::PodUser};
use crate::tree;

/// What a root is made of.
#[derive(Debug)]
pub(crate) struct Layers {
    /// Mounted layers, lowest first.
    pub(crate) lower: Vec<PathBuf>,
    /// Directory for the writable layer; `None`: read-only.
    pub(crate) writable: Option<PathBuf>,
    /// The user namespace whose ids the files belong to; `None`: the guest's.
    pub(crate) user: Option<PodUser>,
}

/// Why a root could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    #[error("a container needs at least one layer")]
    NoLayer,
    #[error("make directory {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("map the owners of {path}")]
    Map {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("mount root file system on {path}")]
    Mount {
        path: PathBuf,
        #[source]
        source: nix::Error,
    },
}

/// A mounted root.
#[derive(Debug)]
pub(crate) struct Rootfs {
    path: PathBuf,
    /// Directory of the writable layer, removed with the root.
    writable: Option<PathBuf>,
}

impl Rootfs {
    /// Mounts `layers` on `path`.
    pub(crate) fn assemble(path: PathBuf, layers: Layers) -> Result<Self, RootfsError> {
        let top = layers.lower.last().ok_or(RootfsError::NoLayer)?;
        make_dir(&path)?;
        let made = match (&layers.writable, &layers.user) {
            (writable, Some(user)) => {
                overlay_of_user(&path, &layers.lower, writable.as_ref(), user)
            }
            (Some(writable), None) => overlay(&path, &layers.lower, Some(writable)),
            (None, None) if layers.lower.len() == 1 => bind_read_only(top, &path),
            (None, None) => overlay(&path, &layers.lower, None),
        };
        let rootfs = Self {
            path,
            writable: layers.writable,
        };
        match made {
            Ok(()) => Ok(rootfs),
            Err(e) => {
                // The first failure says more than a failed clean-up of nothing.
                let _ = rootfs.remove();
                Err(e)
            }
        }
    }

    /// Returns where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of what the container may write: changes to its root, and volumes of its
    /// own.
    pub(crate) fn own(&self) -> Option<PathBuf> {
        self.writable.as_deref().map(own)
    }

    /// Unmounts it and removes the writable layer.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        remove_if_there(fs::remove_dir(&self.path))?;
        match &self.writable {
            Some(writable) => remove_if_there(tree::remove(writable)),
            None => Ok(()),
        }
    }
}

fn own(writable: &Path) -> PathBuf {
    writable.join("own")
}

fn remove_if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn make_dir(path: &Path) -> Result<(), RootfsError> {
    fs::create_dir_all(path).map_err(|source| RootfsError::Directory {
        path: path.to_owned(),
        source,
    })
}

/// The lower layers are copied mounts that show the ids of the user namespace; overlayfs keeps
/// copies of its own. The writable layer is the container's alone, so it holds ids as they are.
fn overlay_of_user(
    path: &Path,
    lower: &[PathBuf],
    writable: Option<&PathBuf>,
    user: &PodUser,
) -> Result<(), RootfsError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| RootfsError::Map { path, source }
    };
    let namespace = user.open().map_err(failed(&user.file()))?;
    let mut copies = Copies::default();
    let mut mapped = Vec::with_capacity(lower.len());
    for (index, layer) in lower.iter().enumerate() {
        let at = path.with_file_name(format!("layer-{index}"));
        copies
            .add(layer, &at, Some(&namespace))
            .map_err(failed(layer))?;
        mapped.push(at);
    }
    if let ([only], None) = (mapped.as_slice(), writable) {
        return bind_read_only(only, path);
    }
    overlay(path, &mapped, writable)
}

fn overlay(path: &Path, lower: &[PathBuf], writable: Option<&PathBuf>) -> Result<(), RootfsError> {
    let mut options = lower_option(lower);
    if let Some(writable) = writable {
        let (upper, work) = (own(writable).join("root"), writable.join("work"));
        make_dir(&upper)?;
        make_dir(&work)?;
        if let Some(top) = lower.last() {
            as_root_of(top, &upper).map_err(|source| RootfsError::Directory {
                path: upper.clone(),
                source,
            })?;
        }
        options.push_str(&format!(
            ",upperdir={},workdir={}",
            upper.display(),
            work.display()
        ));
    }
    mount(
        Some("overlay"),
        path,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .map_err(|source| RootfsError::Mount {
        path: path.to_owned(),
        source,
    })
}

/// The upper directory becomes "/" of the container, and so is what the image's is.
fn as_root_of(top: &Path, upper: &Path) -> io::Result<()> {
    let image = fs::metadata(top)?;
    chown(upper, Some(image.uid()), Some(image.gid()))?;
    let mode = image.permissions().mode() & 0o7777;
    fs::set_permissions(upper, fs::Permissions::from_mode(mode))
}

/// overlayfs wants the highest layer first.
fn lower_option(lower: &[PathBuf]) -> String {
    let paths: Vec<_> = lower
        .iter()
        .rev()
        .map(|p| p.display().to_string())
        .collect();
    format!("lowerdir={}", paths.join(":"))
}

fn bind_read_only(source: &Path, path: &Path) -> Result<(), RootfsError> {
    let step = |from: Option<&Path>, flags| {
        mount(from, path, None::<&str>, flags, None::<&str>).map_err(|source| RootfsError::Mount {
            path: path.to_owned(),
            source,
        })
    };
    step(Some(source), MsFlags::MS_BIND)?;
    step(
        None,
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_layer_comes_first() {
        let lower = [PathBuf::from("/base"), PathBuf::from("/top")];
        assert_eq!(lower_option(&lower), "lowerdir=/top:/base");
    }

    #[test]
    fn a_root_without_layers_is_refused() {
        let layers = Layers {
            lower: Vec::new(),
            writable: None,
            user: None,
        };
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Rootfs::assemble(dir.path().join("r"), layers),
            Err(RootfsError::NoLayer)
        ));
    }
}
