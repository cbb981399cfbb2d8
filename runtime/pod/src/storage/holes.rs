//! Where a sparse file has data (lseek(2), SEEK_DATA).

use std::{fs::File, io, ops::Range};

use nix::unistd::{Whence, lseek64};

/// The next data at or behind `at` of a file of this length, up to the hole behind it; none behind the last. Moves
/// the file's position.
///
/// # Errors
/// When the kernel can't tell.
pub(crate) fn data(file: &File, at: u64, length: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = seek(file, at, Whence::SeekData)? else {
        return Ok(None);
    };
    let end = seek(file, start, Whence::SeekHole)?.unwrap_or(length);
    Ok(Some(start..end))
}

/// The next data or hole at or behind `at`; none behind the last (ENXIO of lseek(2)).
fn seek(file: &File, at: u64, whence: Whence) -> io::Result<Option<u64>> {
    let offset = i64::try_from(at).map_err(io::Error::other)?;
    match lseek64(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
