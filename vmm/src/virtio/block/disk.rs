//! The host side of a disk: extents of files, one after another.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl};
use vm_memory::VolatileSlice;

use super::request::SECTOR;
use crate::extent::FileExtent;

/// The most slices in one system call (the kernel's UIO_MAXIOV).
const MAX_VECTORS: usize = 1024;

/// Why files make no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No extents, or an empty one, or one that is not whole sectors.
    #[error("disk extent {index} has {length} bytes, which is not a positive multiple of {SECTOR}")]
    Length {
        /// Which extent.
        index: usize,
        /// Its length.
        length: u64,
    },
    /// The extents' lengths don't fit in 63 bits.
    #[error("disk is too large")]
    TooLarge,
    /// Neither a regular file nor a block device.
    #[error("disk extent {0} is neither a regular file nor a block device")]
    Kind(usize),
    /// An extent ends after its file.
    #[error("disk extent {index} ends at {end}, its file has {size} bytes")]
    Short {
        /// Which extent.
        index: usize,
        /// Where it ends in the file.
        end: u64,
        /// Size of the file.
        size: u64,
    },
    /// A disk that is to be written has a file that can't be.
    #[error("disk extent {0} is not open for writing")]
    NotWritable(usize),
    /// The file could not be examined.
    #[error("examine disk extent {index}")]
    Examine {
        /// Which extent.
        index: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    extents: Vec<FileExtent>,
    /// Where each extent starts on the disk.
    starts: Vec<u64>,
    length: u64,
    readonly: bool,
}

impl Disk {
    /// Checks the extents and makes them a disk.
    ///
    /// # Errors
    /// [`DiskError`]
    pub fn new(extents: Vec<FileExtent>, readonly: bool) -> Result<Self, DiskError> {
        let mut starts = Vec::with_capacity(extents.len());
        let mut length = 0u64;
        for (index, extent) in extents.iter().enumerate() {
            check(index, extent, readonly)?;
            starts.push(length);
            length = length
                .checked_add(extent.length)
                .filter(|length| *length <= i64::MAX as u64)
                .ok_or(DiskError::TooLarge)?;
        }
        if extents.is_empty() {
            return Err(DiskError::Length {
                index: 0,
                length: 0,
            });
        }
        Ok(Self {
            extents,
            starts,
            length,
            readonly,
        })
    }

    /// Returns the length in bytes: whole sectors.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the extents, in order.
    #[must_use]
    pub fn extents(&self) -> &[FileExtent] {
        &self.extents
    }

    /// Tells whether writes are refused.
    #[must_use]
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Fills `slices` with what is on the disk from `position` on. The range is on the disk.
    ///
    /// # Errors
    /// What the host's file system says; `UnexpectedEof` when a file was cut meanwhile.
    pub fn read(&self, position: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.transfer(position, slices, |fd, vectors, offset| {
            // SAFETY: each vector is a part of a `VolatileSlice`, that is of mapped guest memory
            // that stays mapped during the call and that may change at any time anyway.
            unsafe { libc::preadv64(fd, vectors.as_ptr(), vectors.len() as i32, offset) }
        })
    }

    /// Puts `slices` on the disk from `position` on. The range is on the disk.
    ///
    /// # Errors
    /// What the host's file system says, e.g. `ENOSPC`.
    pub fn write(&self, position: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.readonly {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.transfer(position, slices, |fd, vectors, offset| {
            // SAFETY: as in `read`; the kernel only reads the vectors' memory.
            unsafe { libc::pwritev64(fd, vectors.as_ptr(), vectors.len() as i32, offset) }
        })
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// What the host's file system says.
    pub fn flush(&self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        let mut done: Option<&Arc<File>> = None;
        for extent in &self.extents {
            if done.is_none_or(|file| !Arc::ptr_eq(file, &extent.file)) {
                extent.file.sync_data()?;
                done = Some(&extent.file);
            }
        }
        Ok(())
    }

    /// Makes a range read as zeros and gives its space back. The range is on the disk.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the host's file system has no holes.
    pub fn punch(&self, position: u64, length: u64) -> io::Result<()> {
        if self.readonly {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let mut position = position;
        let mut left = length;
        while left > 0 {
            let (file, offset, here) = self.locate(position)?;
            let length = left.min(here);
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, mode, offset, length)?;
            position += length;
            left -= length;
        }
        Ok(())
    }

    /// Returns the file, the offset in it and how many bytes follow in the same extent.
    fn locate(&self, position: u64) -> io::Result<(&File, u64, u64)> {
        let index = self
            .starts
            .partition_point(|start| *start <= position)
            .saturating_sub(1);
        match (self.extents.get(index), self.starts.get(index)) {
            (Some(extent), Some(start)) if position < start + extent.length => {
                let inside = position - start;
                Ok((&extent.file, extent.offset + inside, extent.length - inside))
            }
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn transfer(
        &self,
        position: u64,
        slices: &[VolatileSlice<'_>],
        call: impl Fn(i32, &[libc::iovec], i64) -> isize,
    ) -> io::Result<()> {
        let mut position = position;
        let mut cursor = Cursor { slices, inside: 0 };
        let mut vectors = Vec::with_capacity(slices.len().min(MAX_VECTORS));
        while !cursor.at_end() {
            let (file, offset, here) = self.locate(position)?;
            cursor.vectors(&mut vectors, here);
            let moved = call(file.as_raw_fd(), &vectors, offset as i64);
            match usize::try_from(moved) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    cursor.advance(moved);
                    position += moved as u64;
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

/// A place in a list of slices.
struct Cursor<'s, 'm> {
    slices: &'s [VolatileSlice<'m>],
    /// How much of the first slice is done.
    inside: usize,
}

impl Cursor<'_, '_> {
    fn at_end(&mut self) -> bool {
        while let [first, rest @ ..] = self.slices
            && self.inside == first.len()
        {
            self.slices = rest;
            self.inside = 0;
        }
        self.slices.is_empty()
    }

    /// Lists what follows, at most `limit` bytes and [`MAX_VECTORS`] vectors.
    fn vectors(&self, vectors: &mut Vec<libc::iovec>, limit: u64) {
        vectors.clear();
        let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut inside = self.inside;
        for slice in self.slices {
            let length = (slice.len() - inside).min(left);
            if length > 0 {
                let base = slice.ptr_guard_mut().as_ptr().wrapping_add(inside);
                vectors.push(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: length,
                });
            }
            left -= length;
            inside = 0;
            if left == 0 || vectors.len() == MAX_VECTORS {
                break;
            }
        }
    }

    fn advance(&mut self, bytes: usize) {
        let mut left = bytes;
        while let [first, rest @ ..] = self.slices {
            let here = first.len() - self.inside;
            if left < here {
                self.inside += left;
                return;
            }
            left -= here;
            self.slices = rest;
            self.inside = 0;
        }
    }
}

fn check(index: usize, extent: &FileExtent, readonly: bool) -> Result<(), DiskError> {
    if extent.length == 0 || !extent.length.is_multiple_of(SECTOR) {
        return Err(DiskError::Length {
            index,
            length: extent.length,
        });
    }
    let failed = |source| DiskError::Examine { index, source };
    let metadata = extent.file.metadata().map_err(failed)?;
    let size = if metadata.file_type().is_file() {
        metadata.size()
    } else if metadata.file_type().is_block_device() {
        use std::io::{Seek, SeekFrom};
        (&*extent.file).seek(SeekFrom::End(0)).map_err(failed)?
    } else {
        return Err(DiskError::Kind(index));
    };
    let end = extent
        .offset
        .checked_add(extent.length)
        .ok_or(DiskError::TooLarge)?;
    if end > size {
        return Err(DiskError::Short { index, end, size });
    }
    if !readonly {
        let flags = fcntl_getfl(&extent.file).map_err(|error| failed(error.into()))?;
        if flags & OFlags::ACCMODE == OFlags::RDONLY {
            return Err(DiskError::NotWritable(index));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Arc::new(file)
    }

    fn extent(file: &Arc<File>, offset: u64, length: u64) -> FileExtent {
        FileExtent {
            file: Arc::clone(file),
            offset,
            length,
        }
    }

    #[test]
    fn extents_that_make_no_disk_are_refused() {
        let one = file(&[0; 1024]);
        let refused = |extents: Vec<FileExtent>| Disk::new(extents, false).unwrap_err();
        assert!(matches!(refused(vec![]), DiskError::Length { .. }));
        assert!(matches!(
            refused(vec![extent(&one, 0, 0)]),
            DiskError::Length { .. }
        ));
        assert!(matches!(
            refused(vec![extent(&one, 0, 513)]),
            DiskError::Length { .. }
        ));
        assert!(matches!(
            refused(vec![extent(&one, 512, 1024)]),
            DiskError::Short { .. }
        ));
        assert!(matches!(
            refused(vec![extent(&one, u64::MAX, 512)]),
            DiskError::TooLarge
        ));
        let null = Arc::new(File::open("/dev/null").unwrap());
        assert!(matches!(
            refused(vec![extent(&null, 0, 512)]),
            DiskError::Kind(0)
        ));
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(512).unwrap();
        let readonly = Arc::new(File::open(path.path()).unwrap());
        assert!(matches!(
            refused(vec![extent(&readonly, 0, 512)]),
            DiskError::NotWritable(0)
        ));
        Disk::new(vec![extent(&readonly, 0, 512)], true).unwrap();
    }

    #[test]
    fn a_file_that_was_cut_is_an_error() {
        let one = file(&[7; 1024]);
        let disk = Disk::new(vec![extent(&one, 0, 1024)], false).unwrap();
        one.set_len(512).unwrap();
        let mut buffer = [0; 1024];
        let slices = [VolatileSlice::from(buffer.as_mut_slice())];
        assert_eq!(
            disk.read(0, &slices).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn punched_ranges_read_as_zeros_across_extents() {
        let (one, two) = (file(&[1; 1024]), file(&[2; 1024]));
        let disk = Disk::new(vec![extent(&one, 0, 1024), extent(&two, 0, 1024)], false).unwrap();
        disk.punch(512, 1024).unwrap();
        let mut buffer = [9; 2048];
        disk.read(0, &[VolatileSlice::from(buffer.as_mut_slice())])
            .unwrap();
        assert_eq!(
            buffer,
            *[[1; 512], [0; 512], [0; 512], [2; 512]].as_flattened()
        );
    }

    /// All disks of up to three extents of one or two sectors, and all ranges on them: a disk is a plain
    /// row of bytes.
    #[test]
    fn each_range_of_each_small_disk_is_that_of_a_row_of_bytes() {
        let kinds = (1..=3).flat_map(|count| {
            (0..1_u32 << count)
                .map(move |bits| (0..count).map(|at| 1 + u64::from(bits >> at & 1)).collect())
        });
        for lengths in kinds.collect::<Vec<Vec<u64>>>() {
            let sectors: u64 = lengths.iter().sum();
            let files: Vec<_> = lengths
                .iter()
                .map(|n| file(&vec![0; 3 * (n * SECTOR) as usize]))
                .collect();
            // Each extent is the middle of its file.
            let extents = files.iter().zip(&lengths);
            let extents = extents.map(|(file, n)| extent(file, n * SECTOR, n * SECTOR));
            let disk = Disk::new(extents.collect(), false).unwrap();
            let mut model = vec![0; (sectors * SECTOR) as usize];
            let mut fill = 0;
            for start in 0..=sectors {
                for count in 0..=sectors - start {
                    fill += 1;
                    let range = (start * SECTOR) as usize..((start + count) * SECTOR) as usize;
                    let mut written = vec![fill; range.len()];
                    disk.write(
                        start * SECTOR,
                        &[VolatileSlice::from(written.as_mut_slice())],
                    )
                    .unwrap();
                    model[range.clone()].fill(fill);
                    if count % 2 == 1 {
                        disk.punch(start * SECTOR, SECTOR).unwrap();
                        model[range.start..range.start + SECTOR as usize].fill(0);
                    }
                    let mut all = vec![9; model.len()];
                    disk.read(0, &[VolatileSlice::from(all.as_mut_slice())])
                        .unwrap();
                    assert!(all == model, "{lengths:?}: {count} sectors at {start}");
                }
                let mut beyond = vec![0; ((sectors - start + 1) * SECTOR) as usize];
                let beyond = VolatileSlice::from(beyond.as_mut_slice());
                disk.read(start * SECTOR, &[beyond]).unwrap_err();
            }
            for (file, n) in files.iter().zip(&lengths) {
                let mut outside = vec![1; (n * SECTOR) as usize];
                for at in [0, 2 * n * SECTOR] {
                    file.read_exact_at(&mut outside, at).unwrap();
                    assert!(outside.iter().all(|byte| *byte == 0), "beside an extent");
                }
            }
        }
    }

    proptest! {
        /// Whatever the extents and the slices, a disk is the concatenation of its extents.
        #[test]
        fn requests_may_cross_extents(
            lengths in prop::collection::vec(1u64..5, 1..6),
            cuts in prop::collection::vec(0usize..4000, 0..5),
            start in 0u64..8,
        ) {
            let files: Vec<_> = (1u8..).zip(&lengths).map(|(n, length)| {
                file(&[&[0xee; 100], vec![n; (length * SECTOR) as usize].as_slice()].concat())
            }).collect();
            let extents = files.iter().zip(&lengths).map(|(f, l)| extent(f, 100, l * SECTOR)).collect();
            let disk = Disk::new(extents, false).unwrap();
            let whole: Vec<u8> = (1u8..).zip(&lengths).flat_map(|(n, l)| vec![n; (l * SECTOR) as usize]).collect();
            prop_assert_eq!(disk.length(), whole.len() as u64);
            let start = (start * SECTOR).min(disk.length()) as usize;

            let mut buffer = vec![0; whole.len() - start];
            let mut rest = buffer.as_mut_slice();
            let mut slices = Vec::new();
            for cut in cuts {
                let (head, tail) = rest.split_at_mut(cut.min(rest.len()));
                slices.push(VolatileSlice::from(head));
                rest = tail;
            }
            slices.push(VolatileSlice::from(rest));
            disk.read(start as u64, &slices).unwrap();
            for slice in &slices { slice.copy_from(vec![0x55u8; slice.len()].as_slice()); }
            disk.write(start as u64, &slices).unwrap();
            drop(slices);
            disk.read(start as u64, &[VolatileSlice::from(buffer.as_mut_slice())]).unwrap();
            prop_assert!(buffer.iter().all(|byte| *byte == 0x55));
            // Nothing before the first extent's offset was touched.
            let mut head = [0; 100];
            files[0].read_exact_at(&mut head, 0).unwrap();
            prop_assert_eq!(head, [0xee; 100]);
        }
    }
}
