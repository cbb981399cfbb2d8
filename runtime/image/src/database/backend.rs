//! The file behind a database, whose writes tests can have fail.

use std::fs::File;
use std::io;
use std::ops::Bound;

use hull_base::faults::{self, Point};
use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

/// Where tests have the writes of a file fail, and its syncs.
#[derive(Debug, Clone, Copy)]
pub struct Points {
    /// Before a write.
    pub write: Point,
    /// Before a sync.
    pub sync: Point,
}

/// redb's own backend, and points before what it writes.
#[derive(Debug)]
pub(super) struct Backend {
    file: FileBackend,
    points: Points,
}

impl Backend {
    pub(super) fn new(file: File, points: Points) -> Result<Self, DatabaseError> {
        Ok(Self {
            file: FileBackend::new(file)?,
            points,
        })
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        faults::write(self.points.sync)?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        faults::write(self.points.write)?;
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
