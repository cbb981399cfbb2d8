//! What a worker is asked for, and what it answers.

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::shown::line;

/// Most characters of a worker's text in a message.
const MAX_SHOWN: usize = 1000;

/// What a worker does. Files and pipes come with it, in the order that is told here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Decompresses a pipe into a pipe.
    Inflate,
    /// Unpacks the tar stream of a pipe into new files: data, tree, recipe.
    Unpack(UnpackLimits),
    /// Makes a layer's tar stream from the files recipe and data, into a pipe.
    Remake,
    /// Merges trees into a new file, the metadata of a disk. Each layer's tree follows, as a file of
    /// its own. Answers [`Merged`].
    Merge(Merge),
    /// Lays down the files of a possibly compressed archive from a pipe in a new file. Answers their
    /// number, and behind the answer a name and a place for each.
    Spool {
        /// Most bytes of all files.
        max_archive_bytes: u64,
    },
}

impl Job {
    /// The name that its process goes by.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Inflate => "inflate",
            Self::Unpack(_) => "unpack",
            Self::Remake => "remake",
            Self::Merge(_) => "merge",
            Self::Spool { .. } => "spool",
        }
    }
}

/// Bounds for one layer, see [`crate::config::Limits`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct UnpackLimits {
    pub(crate) max_unpacked_bytes: u64,
    pub(crate) max_entries: u64,
    pub(crate) max_tree_bytes: u64,
    pub(crate) tree_memory: u64,
}

/// What a merge needs to know besides the trees.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Merge {
    /// Length of each layer's data, bytes.
    pub(crate) data: Vec<u64>,
    /// The file system's.
    pub(crate) uuid: [u8; 16],
    pub(crate) max_entries: u64,
    /// Bytes that the tree may take.
    pub(crate) memory: u64,
}

/// A disk's metadata that was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Merged {
    /// Bytes.
    pub(crate) length: u64,
    /// Which of the layers have contents in the disk, ascending.
    pub(crate) layers: Vec<u32>,
}

/// A file of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum JobFile {
    Data,
    Tree,
    Recipe,
    Metadata,
    Archive,
    /// The tree of this layer of a merge.
    TreeOf(u32),
}

/// What there is too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Unit {
    Bytes,
    Entries,
    Memory,
    Names,
    Attributes,
}

impl Unit {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Entries => "entries",
            Self::Memory => "bytes of memory for its entries",
            Self::Names => "bytes of names",
            Self::Attributes => "bytes of names and attributes",
        }
    }
}

/// Why a job could not be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Failure {
    /// What was read is not what it has to be.
    Invalid(String),
    /// The tree of a layer does not fit on those below it.
    InvalidLayer {
        layer: u32,
        reason: String,
    },
    /// The image needs what a disk does not have.
    Unsupported(String),
    TooLarge {
        limit: u64,
        unit: Unit,
    },
    /// A file of the job can't be read or written.
    File {
        file: JobFile,
        /// The number of the error; 0 when it is not the system's.
        code: i32,
        reason: String,
    },
    /// The worker could not give up its powers.
    NotLockedIn(String),
    /// The worker has a fault.
    Panicked,
}

impl Failure {
    pub(crate) fn too_large(limit: u64, unit: Unit) -> Self {
        Self::TooLarge { limit, unit }
    }

    pub(crate) fn file(file: JobFile, error: &io::Error) -> Self {
        Self::File {
            file,
            code: error.raw_os_error().unwrap_or(0),
            reason: error.to_string(),
        }
    }

    /// As it may be shown, and sent: short, and printable.
    pub(crate) fn shown(self) -> Self {
        let short = |reason: String| line(&reason, MAX_SHOWN);
        match self {
            Self::Invalid(reason) => Self::Invalid(short(reason)),
            Self::Unsupported(reason) => Self::Unsupported(short(reason)),
            Self::NotLockedIn(reason) => Self::NotLockedIn(short(reason)),
            Self::InvalidLayer { layer, reason } => Self::InvalidLayer {
                layer,
                reason: short(reason),
            },
            Self::File { file, code, reason } => Self::File {
                file,
                code,
                reason: short(reason),
            },
            other => other,
        }
    }
}

/// The error of a file, as if it had been met here; `action` says what was done with the file.
pub(crate) fn file_error(action: String, code: i32, reason: String) -> StoreError {
    let source = match code {
        0 => io::Error::other(reason),
        code => io::Error::from_raw_os_error(code),
    };
    StoreError::io(action, source)
}
