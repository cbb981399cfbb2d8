//! Guest RAM.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

use crate::layout::{FOUR_GIB, MMIO_GAP};

/// Guest memory: cheap to clone, all clones see the same bytes.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
/// How much is copied at a time; RAM is a multiple of it.
const CHUNK: usize = 256 << 10;
/// The smallest guest: room for a kernel and what boots it.
pub const MIN_MIB: u64 = 32;
/// The largest guest (1 TiB), so that no address arithmetic can overflow.
pub const MAX_MIB: u64 = 1 << 20;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Outside of [`MIN_MIB`] to [`MAX_MIB`].
    #[error("guest memory of {0} MiB is not between {MIN_MIB} and {MAX_MIB} MiB")]
    Size(u64),
    /// The host refuses.
    #[error("allocate {mib} MiB of guest memory")]
    Allocate {
        /// Size of the guest.
        mib: u64,
        /// What mmap says.
        #[source]
        source: MmapRegionError,
    },
    /// The file of a snapshot can't be read or written.
    #[error("use the file of a snapshot's memory")]
    File(#[source] io::Error),
    /// It is not what it is said to be.
    #[error("the file of a snapshot's memory has {length} bytes instead of {mib} MiB")]
    Length {
        /// Its length in bytes.
        length: u64,
        /// What it should be.
        mib: u64,
    },
    /// Does not happen: the regions overlap.
    #[error("arrange guest memory")]
    Arrange,
}

/// Returns the guest's RAM as (address, size), split around the MMIO gap.
#[must_use]
pub fn ranges(mib: u64) -> Vec<(u64, u64)> {
    let size = mib * MIB;
    if size <= MMIO_GAP {
        vec![(0, size)]
    } else {
        vec![(0, MMIO_GAP), (FOUR_GIB, size - MMIO_GAP)]
    }
}

/// Allocates RAM for a guest.
///
/// It is anonymous and private, because a shared or file mapping would cost twice the memory. It is
/// accounted (no `MAP_NORESERVE`), so that a host which obviously can't have it says so now.
///
/// # Errors
/// [`MemoryError`]
pub fn allocate(mib: u64) -> Result<Memory, MemoryError> {
    arrange(mib, |mapping, _| {
        mapping.with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
    })
    .inspect(|memory| memory.iter().for_each(advise))
}

/// Makes RAM of what [`save`] wrote to a file. What the guest writes is its own, page by page; the
/// others stay the file's, which must not change.
///
/// Advice that drops pages (`MADV_DONTNEED`) would bring the file's contents back: who takes memory from
/// a guest has to map anonymous memory over it.
///
/// # Errors
/// [`MemoryError`]
pub fn restore(mib: u64, file: File) -> Result<Memory, MemoryError> {
    let length = file.metadata().map_err(MemoryError::File)?.len();
    if Some(length) != mib.checked_mul(MIB) {
        return Err(MemoryError::Length { length, mib });
    }
    let file = Arc::new(file);
    arrange(mib, |mapping, offset| {
        let place = FileOffset::from_arc(Arc::clone(&file), offset);
        let mapping = mapping.with_mmap_flags(libc::MAP_PRIVATE);
        mapping.with_file_offset(place)
    })
}

/// Maps each range of RAM as `place` says, which is given its position among all of RAM.
fn arrange(
    mib: u64,
    place: impl Fn(MmapRegionBuilder, u64) -> MmapRegionBuilder,
) -> Result<Memory, MemoryError> {
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for (address, size) in ranges(mib) {
        let mapping = usize::try_from(size)
            .map_err(|_| MmapRegionError::InvalidPointer)
            .and_then(|size| {
                let mapping =
                    MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
                place(mapping, offset).build()
            })
            .map_err(|source| MemoryError::Allocate { mib, source })?;
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(MemoryError::Arrange)?;
        regions.push(region);
        offset += size;
    }
    Memory::from_regions(regions).map_err(|_| MemoryError::Arrange)
}

/// Writes the `mib` MiB of RAM of a guest that stands still to an empty file, with holes for zeros.
///
/// # Errors
/// [`MemoryError::File`], [`MemoryError::Length`]
pub fn save(memory: &Memory, mib: u64, file: &File) -> Result<(), MemoryError> {
    let length = file.metadata().map_err(MemoryError::File)?.len();
    if length != 0 {
        return Err(MemoryError::Length { length, mib: 0 });
    }
    file.set_len(mib * MIB).map_err(MemoryError::File)?;
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    for (address, size) in ranges(mib) {
        for start in (0..size).step_by(CHUNK) {
            let read = memory.read_slice(&mut buffer, GuestAddress(address + start));
            read.map_err(|_| MemoryError::Arrange)?;
            write_pages(&buffer, offset + start, file).map_err(MemoryError::File)?;
        }
        offset += size;
    }
    Ok(())
}

/// Writes the pages that are not zeros, in as few calls as that takes.
fn write_pages(pages: &[u8], offset: u64, file: &File) -> io::Result<()> {
    let is_zero = |page: &[u8]| page == [0; PAGE];
    let mut offset = offset;
    for run in pages
        .as_chunks::<PAGE>()
        .0
        .chunk_by(|a, b| is_zero(a) == is_zero(b))
    {
        if run.first().is_some_and(|page| !is_zero(page)) {
            file.write_all_at(run.as_flattened(), offset)?;
        }
        offset += run.as_flattened().len() as u64;
    }
    Ok(())
}

/// Asks for huge pages, which spare hundreds of nested page faults at boot, and for no core dumps.
/// Both are only wishes.
fn advise(region: &GuestRegionMmap) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
        // SAFETY: the range is the mapping that `region` owns; neither advice changes its contents.
        let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
        if result != 0 {
            crate::log::note(&format!("madvise {advice}: {}", io::Error::last_os_error()));
        }
    }
}

/// Returns (guest address, host address, length) of each region.
pub fn regions(memory: &Memory) -> impl Iterator<Item = (u64, u64, u64)> {
    memory.iter().map(|region| {
        (
            region.start_addr().0,
            region.as_ptr().expose_provenance() as u64,
            region.len(),
        )
    })
}

/// Tells whether devices may write to `address`: to RAM, but not to files ([`crate::file_regions`]).
/// Between the two is a gap, so it says the same of all that is reached from there on.
pub fn is_writable(memory: &Memory, address: GuestAddress) -> bool {
    memory
        .find_region(address)
        .is_some_and(|region| region.prot() & libc::PROT_WRITE != 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn ram_leaves_the_gap_free() {
        assert_eq!(ranges(128), [(0, 128 * MIB)]);
        assert_eq!(ranges(3328), [(0, 0xd000_0000)]);
        assert_eq!(ranges(4096), [(0, 0xd000_0000), (FOUR_GIB, 0x3000_0000)]);
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for mib in [0, 31, MAX_MIB + 1, u64::MAX] {
            assert!(matches!(allocate(mib), Err(MemoryError::Size(_))), "{mib}");
        }
    }

    #[test]
    fn what_was_saved_is_there_again_and_is_not_written_to() {
        let memory = allocate(MIN_MIB).unwrap();
        let places = [0, 5 * 4096 + 7, CHUNK as u64 - 1, 32 * MIB - 1];
        for place in places {
            memory
                .write_obj(place as u8 | 1, GuestAddress(place))
                .unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        save(&memory, MIN_MIB, &file).unwrap();
        let saved = file.metadata().unwrap();
        assert!(saved.blocks() <= 4 * 8, "{} blocks", saved.blocks());
        assert!(matches!(
            save(&memory, MIN_MIB, &file),
            Err(MemoryError::Length { .. })
        ));
        for _ in 0..2 {
            let restored = restore(MIN_MIB, file.try_clone().unwrap()).unwrap();
            for place in places {
                let byte: u8 = restored.read_obj(GuestAddress(place)).unwrap();
                assert_eq!(byte, place as u8 | 1);
            }
            assert_eq!(restored.read_obj::<u8>(GuestAddress(1)).unwrap(), 0);
            restored.write_obj(9u8, GuestAddress(0)).unwrap();
            assert!(is_writable(&restored, GuestAddress(0)));
        }
        assert!(matches!(
            restore(MIN_MIB + 1, file),
            Err(MemoryError::Length { .. })
        ));
    }
}
