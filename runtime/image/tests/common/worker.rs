//! The program of workers: in tests the store's own program is not one.

use std::path::PathBuf;

use hull_image::{Registries, StoreConfig, Workers};

/// The newest build: `examples/image-worker` of `cargo build`, `examples/image_worker-…` of `cargo test`.
pub fn program() -> PathBuf {
    let mut examples = std::env::current_exe().unwrap();
    examples.pop();
    examples.set_file_name("examples");
    let built = std::fs::read_dir(&examples).into_iter().flatten().flatten();
    let newest = built
        .filter(|file| {
            let (name, path) = (file.file_name(), file.path());
            let name = name.to_string_lossy();
            path.extension().is_none()
                && (name == "image-worker" || name.starts_with("image_worker-"))
        })
        .max_by_key(|file| file.metadata().and_then(|data| data.modified()).ok());
    newest
        .unwrap_or_else(|| {
            panic!(
                "no image-worker in {}: cargo build --examples",
                examples.display()
            )
        })
        .path()
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
