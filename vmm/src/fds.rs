//! The file descriptors that came with a request.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use hull_proto_vmm::FdIndex;

/// Why a descriptor can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// The index is beyond those sent.
    #[error("file descriptor {index} is not among the {count} sent")]
    Missing {
        /// The index.
        index: u32,
        /// How many were sent.
        count: usize,
    },
    /// No more descriptors in this process.
    #[error("duplicate file descriptor")]
    Duplicate(#[source] io::Error),
}

/// Descriptors by index.
#[derive(Debug, Default)]
pub struct Fds(Vec<OwnedFd>);

impl Fds {
    /// Wraps descriptors in their order.
    #[must_use]
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds)
    }

    /// Returns a copy of a descriptor. An index may be used more than once.
    ///
    /// # Errors
    /// [`FdError`]
    pub fn get(&self, index: FdIndex) -> Result<OwnedFd, FdError> {
        let fd = usize::try_from(index.0)
            .ok()
            .and_then(|index| self.0.get(index));
        let fd = fd.ok_or(FdError::Missing {
            index: index.0,
            count: self.0.len(),
        })?;
        fd.try_clone().map_err(FdError::Duplicate)
    }

    /// Returns a copy of a descriptor as a file.
    ///
    /// # Errors
    /// [`FdError`]
    pub fn file(&self, index: FdIndex) -> Result<File, FdError> {
        self.get(index).map(File::from)
    }
}
