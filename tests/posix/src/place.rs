//! Where a check works.

use std::{fs, path::PathBuf};

/// Where a check works.
#[derive(Debug)]
pub struct Place {
    /// Its own directory, of mode 0755.
    pub dir: PathBuf,
    /// A directory of another file system.
    pub other: PathBuf,
}

impl Place {
    /// The path of a name in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes a file with this text.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, text).unwrap();
        path
    }
}
