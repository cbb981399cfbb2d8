//! Paths as text: nothing is looked up.

use std::path::{Component, Path, PathBuf};

/// The path from the root on, with what `..` says done: as other runtimes read paths that links have no
/// part in.
pub(crate) fn clean(path: impl AsRef<Path>) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.as_ref().components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}
