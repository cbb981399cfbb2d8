//! Container images on this node: pulled from registries, unpacked once into EROFS, given to
//! guests as extents of read-only files.
//!
//! Read in this order, from the top down; a file uses only what comes after it: `image_store` (what
//! callers use), `export` (images to an archive), `pull` (from a name to a complete image), `store`
//! (files, records and locks), `archive` (an archive in place of a registry), `registry` (what is
//! spoken with registries), `layer` (tar stream to layer files), `merge` (layers to one tree),
//! `erofs` (tree to disk), `manifest` and `reference` (what registries hold, and its names),
//! `config`, `error`. [`database`] is how a file of records is opened; pods' are too.
//!
//! Not here: CRI types, anything about pods, mounting of images.
//!
//! Layers are known by their diff-ID. An image that names a layer that is on the node gets it only
//! once its registry has shown that it has the layer and lets the caller read it (`pull`).
#![forbid(unsafe_code)]

// So that a file of the tests can be one of the unit tests, too.
#[cfg(test)]
extern crate self as hull_image;

mod archive;
mod config;
pub mod database;
mod digest;
mod erofs;
mod error;
mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod image;
mod image_store;
mod layer;
mod manifest;
mod merge;
mod pinned;
mod pull;
mod reference;
mod registry;
mod remade;
mod shown;
mod spool;
mod store;
#[cfg(test)]
#[path = "../tests/common/worker.rs"]
mod test_worker;
mod unpack;
mod worker;

pub use config::{Limits, Registries, StoreConfig, Workers};
pub use error::{PullError, StoreError};
pub use image::{DiskExtent, Image, ImageConfig, ImageId, InvalidImageId};
pub use image_store::ImageStore;
pub use pinned::{InvalidPin, PinnedImages};
pub use pull::progress::PullProgress;
pub use reference::canonical_registry;
pub use registry::auth::Auth;
pub use store::files::Usage;
pub use worker::entry::worker;

/// The registry of an image's name, as it counts: `docker.io` where none is named.
///
/// # Errors
/// [`PullError::InvalidReference`].
pub fn registry_of(name: &str) -> Result<String, PullError> {
    Ok(reference::Name::parse(name)?.registry().to_owned())
}
