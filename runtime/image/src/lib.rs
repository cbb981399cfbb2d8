//! Container images on this node: pulled from registries, unpacked once into EROFS, given to
//! guests as extents of read-only files.
//!
//! Read in this order: `store` (what callers use), `pull` (from a name to a complete image),
//! `reference` (names), `registry` (what is spoken with registries), `archive` (an archive in place
//! of one), `manifest` (what comes from them), `layer` (tar stream to layer files), `merge` (layers
//! to one tree), `erofs` (tree to disk), `export` (images to an archive), `store/records` (what is
//! remembered), [`database`] (how a file of records is opened; pods' are too).
//!
//! Not here: CRI types, anything about pods, mounting of images.
//!
//! Layers are known by their diff-ID. An image that names a layer that is on the node gets it only
//! once its registry has shown that it has the layer and lets the caller read it (`pull`).
#![forbid(unsafe_code)]

mod archive;
pub mod database;
mod digest;
mod erofs;
mod export;
mod image;
mod layer;
mod manifest;
mod merge;
mod pinned;
mod pull;
mod reference;
mod registry;
mod shown;
mod store;

pub use image::{DiskExtent, Image, ImageConfig, ImageId, InvalidImageId};
pub use pinned::{InvalidPin, PinnedImages};
pub use pull::{Auth, PullError, PullProgress};
pub use store::{ImageStore, Limits, Registries, StoreConfig, StoreError, Usage};
