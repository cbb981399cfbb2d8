//! A checkpoint that is being written: a directory beside where it will be, which nobody takes for one.

use std::{
    fs::{DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, OFlags, RenameFlags, renameat_with},
    io::Errno,
};

use hull_base::{
    beneath::{self, Directory},
    faults::{self, Point},
};
use hull_spec::error::PodError;

use super::{
    digest,
    manifest::{self, Manifest},
};

/// What is tried.
pub(crate) const ACTION: &str = "checkpoint the pod";
/// The names of its files.
pub(crate) const STATE: &str = "state";
pub(crate) const MEMORY: &str = "memory";
pub(crate) const SCRATCH: &str = "scratch";
/// What the guest knows of the host's files; not there if it has none.
pub(crate) const SHARES: &str = "shares";

/// Where a checkpoint will be, and where it is written.
#[derive(Debug, Clone)]
pub(crate) struct Aside {
    output: PathBuf,
    path: PathBuf,
}

impl Aside {
    /// Chooses the place for a checkpoint at `output`; makes nothing. Blocks.
    ///
    /// # Errors
    /// When there is something, or can be nothing.
    pub(crate) fn plan(output: &Path) -> Result<Self, PodError> {
        let refused = |reason: &str| {
            let reason = format!("{} {reason}", output.display());
            Err(PodError::precondition(ACTION, reason))
        };
        let (Some(parent), Some(name)) = (output.parent(), output.file_name()) else {
            return refused("can't be its directory");
        };
        if !output.is_absolute() {
            return refused("is no absolute path");
        }
        if output.symlink_metadata().is_ok() {
            return refused("is there already");
        }
        if !parent.is_dir() {
            return refused("can't be made: there is no directory above it");
        }
        let (name, random) = (name.to_string_lossy(), rand::random::<u64>());
        Ok(Self {
            output: output.to_owned(),
            path: parent.join(format!(".{name}.{random:016x}.hull-checkpoint")),
        })
    }

    /// Where it is written.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory, for nobody else to see into. Blocks.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn make(&self) -> Result<(), PodError> {
        let made = DirBuilder::new().mode(0o700).create(&self.path);
        made.map_err(|e| self.failed("make", e))
    }

    /// Makes a file in it. Blocks.
    ///
    /// # Errors
    /// When it can't be made.
    pub(crate) fn file(&self, name: &str) -> Result<File, PodError> {
        let made = Directory::open(&self.path)
            .and_then(|at| at.create(Path::new(name), OFlags::RDWR, 0o600));
        made.map_err(|e| self.failed("write", e))
    }

    /// Completes it with its manifest, and puts it at its place. Blocks.
    ///
    /// # Errors
    /// When it can't be; then nothing is there.
    pub(crate) fn finish(&self, mut manifest: Manifest) -> Result<(), PodError> {
        let mut finish = || -> io::Result<()> {
            let at = Directory::open(&self.path)?;
            let digest = |name: &str| -> io::Result<String> {
                let file = at.file(Path::new(name), OFlags::RDONLY)?;
                faults::write(Point::CheckpointWrite)?;
                file.sync_all()?;
                digest::of_file(&file)
            };
            manifest.files = manifest::Files {
                state: digest(STATE)?,
                memory: digest(MEMORY)?,
                scratch: digest(SCRATCH)?,
                shares: match manifest.has_shares() {
                    true => Some(digest(SHARES)?),
                    false => None,
                },
                volumes: {
                    let volumes = manifest.volumes();
                    let digests = volumes.map(|(_, name)| Ok((name.to_owned(), digest(name)?)));
                    digests.collect::<io::Result<_>>()?
                },
            };
            let text = manifest.encode().map_err(io::Error::other)?;
            let mut file = at.create(Path::new(manifest::NAME), OFlags::WRONLY, 0o600)?;
            file.write_all(&text)?;
            file.sync_all()?;
            File::open(&self.path)?.sync_all()?;
            rename(&self.path, &self.output)?;
            let parent = self.output.parent().unwrap_or(&self.output);
            File::open(parent)?.sync_all()
        };
        finish().map_err(|e| self.failed("write", e))?;
        faults::point(Point::CheckpointKept);
        Ok(())
    }

    fn failed(&self, action: &str, error: io::Error) -> PodError {
        let output = self.output.display();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                PodError::ResourceExhausted {
                    action: format!("{action} {output}"),
                    reason: "no space left".into(),
                }
            }
            _ => PodError::internal(format!("{action} {output}"), error),
        }
    }
}

/// Removes what was written aside; no effect when it is not there. Blocks.
///
/// # Errors
/// When it can't be removed.
pub(crate) fn remove(path: &Path) -> Result<(), PodError> {
    let removed = beneath::remove_dir(path);
    removed.map_err(|e| PodError::internal(format!("remove {}", path.display()), e))
}

/// Renames a directory, if nothing has the new name.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can; a directory takes the place of an empty one at most.
        Err(Errno::INVAL) => std::fs::rename(from, to),
        renamed => Ok(renamed?),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_place_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let told = |path: &Path| Aside::plan(path).unwrap_err().to_string();
        assert!(told(Path::new("here")).contains("is no absolute path"));
        assert!(told(Path::new("/")).contains("can't be its directory"));
        assert!(told(&dir.path().join("a/b")).contains("no directory above it"));
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        for there in [dir.path(), &dir.path().join("link")] {
            assert!(told(there).contains("is there already"), "{there:?}");
        }
    }

    #[test]
    fn what_is_written_aside_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let aside = Aside::plan(&dir.path().join("c")).unwrap();
        aside.make().unwrap();
        aside.file(STATE).unwrap();
        aside.file(STATE).unwrap_err();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(aside.path()), 0o700);
        assert_eq!(mode(&aside.path().join(STATE)), 0o600);
        remove(aside.path()).unwrap();
        remove(aside.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_came_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::create_dir(&from).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(to.join("x"), "").unwrap();
        assert!(rename(&from, &to).is_err());
        std::fs::remove_dir_all(&to).unwrap();
        rename(&from, &to).unwrap();
    }
}
