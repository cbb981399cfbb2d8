//! Volumes that an image declares: directories of the container's own, which begin with what the image
//! has there, with its owners and modes. They lie beside the container's changes to its root, so they
//! count as those do, go with them, and are no overlay.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
};

use oci_spec::runtime::Mount;
use rustix::fs::fstat;

use super::{
    error::ContainerError,
    make::{Kind, Root},
    pause::PodUser,
};
use crate::tree;

/// Makes the volumes `declared` below `own`, and returns the mounts that put them into their places. `root`
/// is the container's, in which nothing runs yet; `user` the user namespace that it is in.
pub(super) fn make(
    declared: &[String],
    root: &Path,
    own: &Path,
    user: Option<&PodUser>,
) -> Result<Vec<Mount>, ContainerError> {
    if declared.is_empty() {
        return Ok(Vec::new());
    }
    let dir = own.join("volumes");
    let begin = || -> io::Result<Root> {
        fs::create_dir(&dir)?;
        Root::open(root)
    };
    let root = begin().map_err(|source| failed(&dir, source))?;
    let mut mounts = Vec::with_capacity(declared.len());
    for (number, path) in declared.iter().enumerate() {
        let path = Path::new(path);
        let at = dir.join(number.to_string());
        if one(path, &at, &root, user)? {
            mounts.push(mount(path, at));
        }
    }
    Ok(mounts)
}

/// Makes the directory `at` for the volume `path`, or tells that there shall be none.
fn one(
    path: &Path,
    at: &Path,
    root: &Root,
    user: Option<&PodUser>,
) -> Result<bool, ContainerError> {
    let found = match root.find(path) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
            new(at, user).map_err(|source| failed(path, source))?;
            return Ok(true);
        }
        Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => {
            return Err(ContainerError::NoDirectory(path.to_owned()));
        }
        found => found.map_err(|source| failed(path, source))?,
    };
    if Kind::of(&found).map_err(|source| failed(path, source))? == Kind::File {
        return Err(ContainerError::NoDirectory(path.to_owned()));
    }
    let same = || -> io::Result<bool> {
        let (root, found) = (fstat(root)?, fstat(&found)?);
        Ok((root.st_dev, root.st_ino) == (found.st_dev, found.st_ino))
    };
    // The root can't be one, and is as new and writable, if it may be.
    if same().map_err(|source| failed(path, source))? {
        return Ok(false);
    }
    let copied = tree::copy(found, at);
    copied.map_err(|source| ContainerError::Volume {
        path: path.to_owned(),
        source,
    })?;
    Ok(true)
}

/// An empty directory of the container's root user.
fn new(at: &Path, user: Option<&PodUser>) -> io::Result<()> {
    fs::create_dir(at)?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o755))?;
    match user {
        Some(user) => chown(at, user.uid(0), user.gid(0)),
        None => Ok(()),
    }
}

fn mount(path: &Path, source: PathBuf) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(path.to_owned());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source));
    mount.set_options(Some(vec!["bind".to_owned(), "rprivate".to_owned()]));
    mount
}

fn failed(path: &Path, source: io::Error) -> ContainerError {
    ContainerError::File {
        action: "make the image's volume",
        path: path.to_owned(),
        source,
    }
}
