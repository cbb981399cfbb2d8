//! The program of workers: in tests the store's own program is not one.

use std::path::PathBuf;

use hull_image::{Registries, StoreConfig, Workers};

/// It.
pub fn program() -> PathBuf {
    hull_built::example("image-worker")
}

/// Workers of that program.
pub fn workers() -> Workers {
    Workers {
        program: program(),
        ..Workers::default()
    }
}

/// A store in a directory.
pub fn store(root: impl Into<PathBuf>) -> StoreConfig {
    let mut config = StoreConfig::new(root, Registries::default());
    config.workers = workers();
    config
}
