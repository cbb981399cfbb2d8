//! What a node must have to restore a checkpoint: the same VMM, the same guest's kernel and root.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use hull_spec::{config::PodsConfig, error::PodError};

use super::digest;

/// SHA-256 digests of programs and files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Class {
    /// The VMM: another one has another form of state.
    pub vmm: String,
    pub kernel: String,
    pub guest_root: String,
}

/// What of a class differs, for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it is of another {what} (sha256 {}…) than this node's ({}…)", theirs.get(..12).unwrap_or_default(), ours.get(..12).unwrap_or_default())]
pub(crate) struct Other {
    what: &'static str,
    theirs: String,
    ours: String,
}

impl Class {
    /// Whether what is of the other class can be restored here.
    ///
    /// # Errors
    /// The first difference.
    pub(crate) fn accepts(&self, other: &Self) -> Result<(), Other> {
        for (what, ours, theirs) in [
            ("VMM", &self.vmm, &other.vmm),
            ("guest kernel", &self.kernel, &other.kernel),
            ("guest root", &self.guest_root, &other.guest_root),
        ] {
            if ours != theirs {
                return Err(Other {
                    what,
                    theirs: theirs.clone(),
                    ours: ours.clone(),
                });
            }
        }
        Ok(())
    }
}

/// A file as it was: device, inode, size, time of its last change.
type Version = (u64, u64, u64, i64, i64);

/// The digests of this node's files, which are made once for each.
#[derive(Debug, Default)]
pub(crate) struct Classes(Mutex<HashMap<PathBuf, (Version, String)>>);

impl Classes {
    /// The class of this node now. Blocks.
    ///
    /// # Errors
    /// When a file can't be read.
    pub(crate) fn of(&self, config: &PodsConfig) -> Result<Class, PodError> {
        Ok(Class {
            vmm: self.digest(&config.vmm)?,
            kernel: self.digest(&config.kernel)?,
            guest_root: self.digest(&config.guest_root)?,
        })
    }

    fn digest(&self, path: &Path) -> Result<String, PodError> {
        let failed = |e| PodError::internal(format!("read {}", path.display()), e);
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let version = (
            metadata.dev(),
            metadata.ino(),
            metadata.len(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, digest)) = known().get(path)
            && *of == version
        {
            return Ok(digest.clone());
        }
        let digest = digest::of(file).map_err(failed)?;
        known().insert(path.to_owned(), (version, digest.clone()));
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_updated_is_another_class() {
        let dir = tempfile::tempdir().unwrap();
        let config = PodsConfig::new(dir.path(), dir.path(), dir.path());
        let classes = Classes::default();
        assert!(classes.of(&config).is_err(), "no files");
        for file in [&config.vmm, &config.kernel, &config.guest_root] {
            std::fs::write(file, "1").unwrap();
        }
        let first = classes.of(&config).unwrap();
        assert_eq!(classes.of(&config).unwrap(), first);
        first.accepts(&first).unwrap();
        // The same contents elsewhere, as on another node.
        std::fs::remove_file(&config.kernel).unwrap();
        std::fs::write(&config.kernel, "1").unwrap();
        assert_eq!(classes.of(&config).unwrap(), first);
        let new = config.kernel.with_extension("new");
        std::fs::write(&new, "2").unwrap();
        std::fs::rename(new, &config.kernel).unwrap();
        let second = classes.of(&config).unwrap();
        assert_eq!(
            second.accepts(&first).unwrap_err().to_string(),
            "it is of another guest kernel (sha256 6b86b273ff34…) than this node's (d4735e3a265e…)"
        );
    }
}
