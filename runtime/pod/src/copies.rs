//! Copies of the records, should their store be lost while pods run.
//!
//! ```text
//! <state>/records/sandbox-<id>, container-<id>    a record each, as it is in the store
//! ```
//!
//! They are in memory as the rest of the state directory, and gone after a reboot of the host, as
//! the VMs are; so they cost no disk and are not synced. Not in the pods' run directories: only the
//! daemon writes here.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::PathBuf,
};

use hull_base::faults::{self, Point};

/// What a copy is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sandbox,
    Container,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox-",
            Self::Container => "container-",
        }
    }
}

/// The directory of copies.
#[derive(Debug)]
pub(crate) struct Copies(PathBuf);

impl Copies {
    /// Opens the directory, and makes it when absent. Blocks.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)?;
        // Those that a daemon did not finish which was killed.
        for entry in fs::read_dir(&directory)?.flatten() {
            if entry
                .path()
                .extension()
                .is_some_and(|extension| extension == "new")
            {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self(directory))
    }

    /// Replaces a copy in one step. A failure is logged: the store has the record. Blocks.
    pub(crate) fn put(&self, kind: Kind, id: &str, record: &[u8]) {
        let path = self.path(kind, id);
        let new = path.with_extension("new");
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            faults::write(Point::CopyWrite)?;
            file.write_all(record)?;
            fs::rename(&new, &path)
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&new);
            tracing::warn!(%error, path = %path.display(), "copy a record");
        }
    }

    /// Removes a copy; one that is absent is removed already. Blocks.
    pub(crate) fn remove(&self, kind: Kind, id: &str) {
        let path = self.path(kind, id);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "remove the copy of a record");
        }
    }

    /// A copy, if there is one that can be read. Blocks.
    pub(crate) fn get(&self, kind: Kind, id: &str) -> Option<Vec<u8>> {
        fs::read(self.path(kind, id)).ok()
    }

    /// The ids that there are copies of. Blocks.
    pub(crate) fn ids(&self, kind: Kind) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let id = name.strip_prefix(kind.prefix())?;
                // Others were not finished.
                (!id.contains('.')).then(|| id.to_owned())
            })
            .collect()
    }

    fn path(&self, kind: Kind, id: &str) -> PathBuf {
        self.0.join(format!("{}{id}", kind.prefix()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_finished_does_not_stay() {
        let dir = tempfile::tempdir().unwrap();
        let copies = Copies::open(dir.path().to_owned()).unwrap();
        copies.put(Kind::Sandbox, "a", b"{}");
        fs::write(dir.path().join("sandbox-b.new"), "{").unwrap();
        let copies = Copies::open(copies.0).unwrap();
        assert_eq!(copies.ids(Kind::Sandbox), ["a"]);
        // A copy that can't be put in its place.
        fs::create_dir(dir.path().join("sandbox-c")).unwrap();
        copies.put(Kind::Sandbox, "c", b"{}");
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["sandbox-a", "sandbox-c"]);
    }
}
