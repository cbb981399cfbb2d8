//! The layer's file `data`.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use crate::erofs::BLOCK_SIZE;
use crate::worker::job::{Failure, JobFile};

use super::recipe::Recorder;
use super::tar::{SparseEntry, TarReader};

/// The `data` file: contents one after the other, each from a block boundary on.
pub(super) struct DataFile {
    file: File,
    buffer: Vec<u8>,
    /// Bytes in `buffer` that are not in the file yet.
    filled: usize,
    /// Where the next byte goes, in the file's terms.
    position: u64,
}

pub(super) enum AppendError {
    Archive(io::Error),
    Store(Failure),
}

impl DataFile {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            buffer: vec![0; 1 << 20],
            filled: 0,
            position: 0,
        }
    }

    /// Appends the contents of the current member and tells where they start. A file without
    /// contents takes no room and starts at 0.
    pub(super) fn append(
        &mut self,
        archive: &mut TarReader<Recorder<impl Read>>,
        size: u64,
        sparse: Option<&[SparseEntry]>,
    ) -> Result<u64, AppendError> {
        if size == 0 {
            return Ok(0);
        }
        let start = self.position;
        match sparse {
            None => self.copy(archive, size)?,
            Some(entries) => {
                for entry in entries {
                    self.jump(start + entry.offset)?;
                    self.copy(archive, entry.length)?;
                }
            }
        }
        self.jump((start + size).next_multiple_of(BLOCK_SIZE))?;
        Ok(start)
    }

    fn copy(
        &mut self,
        archive: &mut TarReader<Recorder<impl Read>>,
        length: u64,
    ) -> Result<(), AppendError> {
        archive.stream().content(self.position, length);
        let mut left = length;
        while left > 0 {
            if self.filled == self.buffer.len() {
                self.write_out()?;
            }
            let room = &mut self.buffer[self.filled..];
            let limit = usize::try_from(left).unwrap_or(usize::MAX).min(room.len());
            let count = archive
                .read(&mut room[..limit])
                .map_err(AppendError::Archive)?;
            if count == 0 {
                return Err(AppendError::Archive(io::ErrorKind::UnexpectedEof.into()));
            }
            self.filled += count;
            self.position += count as u64;
            left -= count as u64;
        }
        Ok(())
    }

    /// Leaves zeros up to `position`; a long run of them becomes a hole.
    fn jump(&mut self, position: u64) -> Result<(), AppendError> {
        let gap = position - self.position;
        if gap < BLOCK_SIZE {
            let mut left = usize::try_from(gap).unwrap_or_default();
            while left > 0 {
                if self.filled == self.buffer.len() {
                    self.write_out()?;
                }
                let count = left.min(self.buffer.len() - self.filled);
                self.buffer[self.filled..self.filled + count].fill(0);
                self.filled += count;
                left -= count;
            }
        } else {
            self.write_out()?;
            self.file
                .seek(SeekFrom::Start(position))
                .map_err(|e| AppendError::Store(failed(&e)))?;
        }
        self.position = position;
        Ok(())
    }

    fn write_out(&mut self) -> Result<(), AppendError> {
        self.file
            .write_all(&self.buffer[..self.filled])
            .map_err(|e| AppendError::Store(failed(&e)))?;
        self.filled = 0;
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), Failure> {
        match self.write_out() {
            Ok(()) | Err(AppendError::Archive(_)) => {}
            Err(AppendError::Store(e)) => return Err(e),
        }
        // A hole at the very end has no write behind it that would set the length.
        self.file.set_len(self.position).map_err(|e| failed(&e))
    }
}

fn failed(error: &io::Error) -> Failure {
    Failure::file(JobFile::Data, error)
}
