//! What running pulls need, kept from being collected.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use hull_base::blocking;
use tracing::warn;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::image::ImageId;

use super::files::{image_path, layer_path};
use super::shared::Shared;

/// What one pull needs, kept from being collected while any clone of this lives.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    shared: Arc<Shared>,
    paths: Mutex<Vec<PathBuf>>,
}

impl Pins {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self {
            held: Arc::new(Held {
                shared: Arc::clone(shared),
                paths: Mutex::default(),
            }),
        }
    }

    pub(crate) fn add(&self, id: &ImageId, layers: &[Digest]) {
        let mut added: Vec<PathBuf> = layers.iter().map(layer_path).collect();
        added.push(image_path(id));
        self.held.shared.files.pin(&added);
        self.held
            .paths
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(added);
    }

    /// Gives everything up and waits until what nobody needs is gone.
    pub(crate) async fn release(self) -> Result<(), StoreError> {
        let held = self.held;
        blocking(move || held.let_go()).await
    }
}

impl Held {
    fn let_go(&self) -> Result<(), StoreError> {
        let paths = std::mem::take(&mut *self.paths.lock().unwrap_or_else(PoisonError::into_inner));
        if paths.is_empty() {
            return Ok(());
        }
        self.shared.files.unpin(&paths);
        self.shared.collect_garbage()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Only when a pull was dropped half-way: its blocking work ends here, in its own thread.
        if let Err(e) = self.let_go() {
            warn!(
                error = &e as &dyn std::error::Error,
                "clean up after an abandoned pull"
            );
        }
    }
}
