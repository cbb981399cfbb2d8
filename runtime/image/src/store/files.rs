//! Directories of the store: complete or not there; and which of them running pulls need.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use hull_base::faults::{self, Point};
use tempfile::TempDir;
use tracing::info;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::image::ImageId;
use crate::layer::tree;

const LAYERS: &str = "layers";
const IMAGES: &str = "images";
const TEMPORARY: &str = "tmp";

/// What the store occupies on its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// What records need: names of directories below `layers` and `images`.
#[derive(Debug, Default)]
pub(crate) struct Needed {
    pub(crate) layers: HashSet<String>,
    pub(crate) images: HashSet<String>,
}

/// The store's directories.
#[derive(Debug)]
pub(crate) struct Files {
    root: PathBuf,
    /// Directories below the root that running pulls need, and how many pulls need each. Held
    /// while garbage is chosen, so that a pull either sees a layer and keeps it, or misses it.
    pins: Mutex<HashMap<PathBuf, usize>>,
}

impl Files {
    /// Makes the directories and empties the temporary one.
    pub(crate) fn open(root: &Path) -> Result<Self, StoreError> {
        let temporary = root.join(TEMPORARY);
        if let Err(e) = fs::remove_dir_all(&temporary)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(StoreError::io(format!("empty {}", temporary.display()), e));
        }
        for directory in [LAYERS, IMAGES, TEMPORARY] {
            let path = root.join(directory);
            // Images may hold secrets: root alone reads them here.
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(|e| StoreError::io(format!("create {}", path.display()), e))?;
        }
        Ok(Self {
            root: root.to_owned(),
            pins: Mutex::default(),
        })
    }

    pub(crate) fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.root.join(layer_path(diff_id))
    }

    pub(crate) fn image(&self, id: &ImageId) -> PathBuf {
        self.root.join(image_path(id))
    }

    /// Whether the layer is there, in the form that this program reads.
    pub(crate) fn has_layer(&self, diff_id: &Digest) -> bool {
        let tree = File::open(self.layer(diff_id).join("tree"));
        tree.and_then(|mut file| tree::summary(&mut file)).is_ok()
    }

    pub(crate) fn has_image(&self, id: &ImageId) -> bool {
        self.image(id).join("meta.erofs").exists()
    }

    /// A directory that goes away with the value unless it is kept.
    pub(crate) fn new_directory(&self) -> Result<TempDir, StoreError> {
        let temporary = self.root.join(TEMPORARY);
        TempDir::new_in(&temporary).map_err(|e| {
            StoreError::io(format!("create a directory in {}", temporary.display()), e)
        })
    }

    /// Makes a complete directory the layer.
    pub(crate) fn keep_layer(
        &self,
        directory: TempDir,
        diff_id: &Digest,
    ) -> Result<(), StoreError> {
        self.keep(directory, &layer_path(diff_id))
    }

    /// Makes a complete directory the image's.
    pub(crate) fn keep_image(&self, directory: TempDir, id: &ImageId) -> Result<(), StoreError> {
        self.keep(directory, &image_path(id))
    }

    fn keep(&self, directory: TempDir, place: &Path) -> Result<(), StoreError> {
        let place = self.root.join(place);
        let parent = place.parent().unwrap_or(&self.root);
        let keep = || {
            faults::write(Point::ImageWrite)?;
            sync(directory.path())?;
            // Left from a store whose records were lost, or there already: nobody uses it, as
            // every use holds the lock of this name and looks first.
            if place.exists() {
                fs::remove_dir_all(&place)?;
            }
            fs::rename(directory.path(), &place)?;
            sync(parent)
        };
        keep()
            .map_err(|e| StoreError::io(format!("move finished work to {}", place.display()), e))?;
        faults::point(Point::ImageKept);
        // Its path is gone, so there is nothing to remove.
        let _ = directory.keep();
        Ok(())
    }

    /// Deletes what is neither in `needed` nor pinned; returns the layers among that.
    pub(crate) fn collect_garbage(
        &self,
        needed: impl FnOnce() -> Result<Needed, StoreError>,
    ) -> Result<HashSet<String>, StoreError> {
        let bin = self.new_directory()?;
        let mut moved = 0;
        let mut layers = HashSet::new();
        {
            let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
            let needed = needed()?;
            for (directory, needed) in [(LAYERS, &needed.layers), (IMAGES, &needed.images)] {
                for name in names(&self.root.join(directory))? {
                    let relative = Path::new(directory).join(&name);
                    if needed.contains(&name) || pins.contains_key(&relative) {
                        continue;
                    }
                    let path = self.root.join(&relative);
                    fs::rename(&path, bin.path().join(format!("{directory}-{name}")))
                        .map_err(|e| StoreError::io(format!("remove {}", path.display()), e))?;
                    moved += 1;
                    if directory == LAYERS {
                        layers.insert(name.replacen('-', ":", 1));
                    }
                }
            }
        }
        if moved > 0 {
            info!(moved, "removed layers and images that nothing needs");
        }
        let path = bin.path().to_owned();
        bin.close()
            .map_err(|e| StoreError::io(format!("remove {}", path.display()), e))?;
        faults::point(Point::ImageCollected);
        Ok(layers)
    }

    /// Allocated bytes and inodes below the root.
    pub(crate) fn usage(&self) -> Result<Usage, StoreError> {
        let mut usage = Usage::default();
        let mut directories = vec![self.root.clone()];
        while let Some(directory) = directories.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                // Garbage may go while it is counted.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io(format!("read {}", directory.display()), e)),
            };
            for entry in entries.flatten() {
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                usage.inodes += 1;
                usage.bytes += metadata.blocks() * 512;
                if metadata.is_dir() {
                    directories.push(entry.path());
                }
            }
        }
        Ok(usage)
    }

    pub(super) fn pin(&self, paths: &[PathBuf]) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        for path in paths {
            *pins.entry(path.clone()).or_default() += 1;
        }
    }

    pub(super) fn unpin(&self, paths: &[PathBuf]) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        for path in paths {
            if let Some(count) = pins.get_mut(path) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(path);
                }
            }
        }
    }
}

pub(super) fn layer_path(diff_id: &Digest) -> PathBuf {
    Path::new(LAYERS).join(diff_id.file_name())
}

pub(super) fn image_path(id: &ImageId) -> PathBuf {
    Path::new(IMAGES).join(image_directory(id))
}

/// The name of an image's directory.
pub(crate) fn image_directory(id: &ImageId) -> String {
    format!("sha256-{}", id.hex())
}

fn names(directory: &Path) -> Result<Vec<String>, StoreError> {
    let read = || -> io::Result<Vec<String>> {
        fs::read_dir(directory)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    };
    read().map_err(|e| StoreError::io(format!("read {}", directory.display()), e))
}

/// Makes names in a directory durable.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
