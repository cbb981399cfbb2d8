//! Files that the host pushes: config maps, secrets, projected volumes.
//!
//! A set is replaced as a whole, in the way kubelet does it on a host, so that
//! programs which watch for that see the same:
//!
//! ```text
//! <set>/key      -> ..data/key
//! <set>/..data   -> ..7          replaced by one rename
//! <set>/..7/key
//! ```

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File as FsFile, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt, fchown, symlink},
    path::{Component, Path, PathBuf},
};

use hull_proto_agent::agent::File;

/// The link to the present content.
const DATA: &str = "..data";

/// Why a set was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilesError {
    #[error("{0:?} is no relative path without \"..\"")]
    Path(String),
    #[error("{0:?} is given twice")]
    Twice(String),
    #[error("the set \"sandbox\" belongs to Configure")]
    Reserved,
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Makes `dir` hold exactly `files`.
pub(crate) fn replace(dir: &Path, files: &[File]) -> Result<(), FilesError> {
    let mut paths = BTreeSet::new();
    for file in files {
        let path = checked(&file.path).ok_or_else(|| FilesError::Path(file.path.clone()))?;
        if !paths.insert(path) {
            return Err(FilesError::Twice(file.path.clone()));
        }
    }
    let failed = |source| FilesError::Write {
        path: dir.to_owned(),
        source,
    };
    make_dir(dir).map_err(failed)?;
    let old = fs::read_link(dir.join(DATA)).ok();
    let version = new_version(dir, old.as_deref()).map_err(failed)?;
    let fresh = dir.join(&version);
    let written = write_all(&fresh, files).and_then(|()| {
        let link = dir.join("..data_new");
        let _ = fs::remove_file(&link);
        symlink(&version, &link)
            .and_then(|()| fs::rename(&link, dir.join(DATA)))
            .map_err(failed)
    });
    if let Err(e) = written {
        let _ = fs::remove_dir_all(&fresh);
        return Err(e);
    }
    update_links(dir, &paths).map_err(failed)?;
    if let Some(old) = old.filter(|old| is_version(old)) {
        fs::remove_dir_all(dir.join(old)).map_err(failed)?;
    }
    Ok(())
}

/// Returns `path` when it is relative and stays below its directory. Its first
/// component must not look like one of ours.
fn checked(path: &str) -> Option<PathBuf> {
    let mut parts = Path::new(path).components();
    let first = match parts.next()? {
        Component::Normal(first) => first,
        _ => return None,
    };
    let plain = parts.all(|part| matches!(part, Component::Normal(_)));
    let ours = first.to_str()?.starts_with("..");
    let odd = path.contains(['\0', '\n']) || path.ends_with('/') || path.len() > 4000;
    (plain && !ours && !odd).then(|| Path::new(path).components().collect())
}

fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

fn is_version(name: &Path) -> bool {
    let name = name.to_str().and_then(|n| n.strip_prefix(".."));
    name.is_some_and(|n| n.parse::<u64>().is_ok())
}

/// Makes the directory of the next version and returns its name.
fn new_version(dir: &Path, old: Option<&Path>) -> io::Result<String> {
    let last = old
        .and_then(|old| old.to_str()?.strip_prefix("..")?.parse::<u64>().ok())
        .unwrap_or(0);
    let name = format!("..{}", last + 1);
    let path = dir.join(&name);
    // Left by an attempt that was cut off.
    match fs::remove_dir_all(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => make_dir(&path)?,
    }
    Ok(name)
}

fn write_all(dir: &Path, files: &[File]) -> Result<(), FilesError> {
    for file in files {
        let path = dir.join(&file.path);
        write_one(&path, file).map_err(|source| FilesError::Write { path, source })?;
    }
    Ok(())
}

fn write_one(path: &Path, file: &File) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    let mut new = FsFile::create_new(path)?;
    new.write_all(&file.content)?;
    fchown(&new, Some(file.uid), Some(file.gid))?;
    // After the owner: chown(2) clears set-id bits.
    new.set_permissions(Permissions::from_mode(file.mode & 0o7777))
}

/// Links every first component to the data and removes links without a target.
fn update_links(dir: &Path, paths: &BTreeSet<PathBuf>) -> io::Result<()> {
    let wanted: BTreeSet<_> = paths
        .iter()
        .filter_map(|p| Some(p.components().next()?.as_os_str().to_owned()))
        .collect();
    for name in &wanted {
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), link)?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let ours = name.to_string_lossy().starts_with("..");
        if !ours && !wanted.contains(&name) && entry.file_type()?.is_symlink() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn file(path: &str, content: &str) -> File {
        let owner = fs::metadata(".").unwrap();
        File {
            path: path.to_owned(),
            content: content.as_bytes().to_vec(),
            mode: 0o640,
            uid: owner.uid(),
            gid: owner.gid(),
            ..File::default()
        }
    }

    #[test]
    fn paths_stay_below_the_set() {
        for good in ["a", "a/b", ".hidden", "a..b"] {
            assert!(checked(good).is_some(), "{good}");
        }
        for bad in [
            "", "/a", "..", "../a", "a/../b", "a/..", "..data/a", "..x", "a\0b", "a/",
        ] {
            assert!(checked(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_set_is_replaced_as_a_whole() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("set");
        replace(&dir, &[file("a", "1"), file("sub/b", "2")]).unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.join("sub/b")).unwrap(), "2");
        let mode = fs::metadata(dir.join("a")).unwrap().mode() & 0o7777;
        assert_eq!(mode, 0o640);

        replace(&dir, &[file("a", "3"), file("c", "4")]).unwrap();
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert_eq!(fs::read_to_string(dir.join("c")).unwrap(), "4");
        assert!(fs::symlink_metadata(dir.join("sub")).is_err());
        let versions = fs::read_dir(&dir)
            .unwrap()
            .filter(|e| is_version(Path::new(&e.as_ref().unwrap().file_name())))
            .count();
        assert_eq!(versions, 1);
        replace(&dir, &[]).unwrap();
        assert!(fs::symlink_metadata(dir.join("a")).is_err());
    }

    #[test]
    fn a_bad_set_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("set");
        replace(&dir, &[file("a", "1")]).unwrap();
        assert!(replace(&dir, &[file("a", "2"), file("../x", "")]).is_err());
        assert!(replace(&dir, &[file("a", "2"), file("a", "3")]).is_err());
        assert!(replace(&dir, &[file("a", "2"), file("a/b", "3")]).is_err());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
    }
}
