//! Parts of files, of which disks and file-backed memory are made.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use hull_proto_vmm::Extent;

use crate::fds::{FdError, Fds};

/// A part of a file.
#[derive(Debug, Clone)]
pub struct FileExtent {
    /// The file.
    pub file: Arc<File>,
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

impl FileExtent {
    /// Takes the files of a configuration's extents, each once.
    ///
    /// # Errors
    /// [`FdError`]
    pub fn take(extents: &[Extent], fds: &Fds) -> Result<Vec<Self>, FdError> {
        let mut files = HashMap::new();
        extents
            .iter()
            .map(|extent| {
                let file = match files.get(&extent.file.0) {
                    Some(file) => Arc::clone(file),
                    None => {
                        let file = Arc::new(fds.file(extent.file)?);
                        files.insert(extent.file.0, Arc::clone(&file));
                        file
                    }
                };
                Ok(Self {
                    file,
                    offset: extent.offset,
                    length: extent.length,
                })
            })
            .collect()
    }
}
