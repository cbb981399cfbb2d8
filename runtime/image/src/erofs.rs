//! A tree as a read-only EROFS whose file contents lie outside it.
//!
//! What is written here is the metadata alone: superblock, inodes, directories, links, attributes.
//! The device that a guest sees is this, then the data files of the layers one after the other;
//! inodes of regular files point into those by block number. Nothing is compressed.
//!
//! ```text
//! block 0        superblock at byte 1024
//! blocks 1..i    inodes with their extended attributes and, where they fit, links and directories
//! blocks i..m    directories and links that do not fit
//! blocks m..     data of the layers (other files)
//! ```
//!
//! The format: Linux, fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst. Directories
//! need their names sorted by byte; a tail that is kept with its inode may not cross a block.

mod format;
mod layout;
#[cfg(any(test, fuzzing))]
pub(crate) mod reader;
#[cfg(test)]
mod tests;
mod write;
mod xattr;

pub(crate) use format::BLOCK_SIZE;
pub(crate) use layout::LayoutError;
pub(crate) use write::{WriteError, write};
