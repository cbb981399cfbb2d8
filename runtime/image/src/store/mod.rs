//! What the store keeps, and who may use it at the same time.
//!
//! ```text
//! <root>/images.redb                     records: images, names, leases
//! <root>/layers/<diff-id>/               data, tree, recipe: shared by all images that have the layer
//! <root>/images/<id>/meta.erofs          metadata of one image's disk
//! <root>/tmp/                            work in progress; emptied at open
//! ```

pub(crate) mod budget;
pub(crate) mod disk;
pub(crate) mod files;
pub(crate) mod locks;
pub(crate) mod pins;
pub(crate) mod records;
pub(crate) mod shared;
