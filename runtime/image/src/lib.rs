//! Container images on this node: pulled from registries, unpacked once into EROFS, given to
//! guests as extents of read-only files.
//!
//! Read in this order: [`store`] (what callers use), `reference` (names), `registry` (what is
//! spoken with registries), `pull` (from a name to a complete image), `layer` (tar stream to
//! layer files), `merge` (layers to one tree), `erofs` (tree to disk), `records` (what is
//! remembered).
//!
//! Not here: CRI types, anything about pods, mounting of images.
#![forbid(unsafe_code)]

mod image;
mod store;

pub use image::{DiskExtent, Image, ImageConfig, ImageId, InvalidImageId};
pub use store::{
    Auth, ImageStore, Limits, PullError, PullProgress, Registries, StoreConfig, StoreError, Usage,
};
