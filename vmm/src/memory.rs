//! Guest RAM.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use hull_proto_vmm::CopiedMemory;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::layout::{FOUR_GIB, MMIO_GAP};

/// Guest memory: cheap to clone, all clones see the same bytes.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
/// How much is copied at a time; RAM is a multiple of it.
const CHUNK: usize = 256 << 10;
/// A huge page of the host.
const HUGE: u64 = 2 << 20;
/// So many pages with data, of 512, are worth a huge page: the others take memory then.
const DENSE: usize = 448;
/// Holes that are shorter stay the file's, so that a guest's memory is some hundred mappings.
const SHORT_HOLE: u64 = 64 << 10;
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
    /// No whole pages of the file.
    #[error("{0:#x?} are no whole pages of a snapshot's memory")]
    Written(Range<u64>),
    /// A port that has no room for a number.
    #[error("{0:#x} is no port by which a guest could say how much memory it wants")]
    Port(u32),
    /// The host has no more descriptors.
    #[error("make a descriptor for changes of pluggable memory")]
    Event(#[source] io::Error),
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
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let mut regions = Vec::new();
    for (address, size) in ranges(mib) {
        let mapping = usize::try_from(size)
            .map_err(|_| MmapRegionError::InvalidPointer)
            .and_then(|size| {
                MmapRegionBuilder::new(size)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
                    .build()
            })
            .map_err(|source| MemoryError::Allocate { mib, source })?;
        let region =
            GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(MemoryError::Arrange)?;
        advise(&region);
        regions.push(region);
    }
    Memory::from_regions(regions).map_err(|_| MemoryError::Arrange)
}

/// Makes RAM of what [`save`] wrote to a file. What the guest writes is its own, page by page; what else
/// has data in the file stays the file's, which must not change. The rest is as [`allocate`] gives it: a first
/// touch there would put a page of zeros into the file, and copy that. It has its own pages of `written`, parts
/// of the file, from the start.
///
/// Advice that drops pages (`MADV_DONTNEED`) would bring the file's contents back: who takes memory from
/// a guest has to map anonymous memory over it.
///
/// The file has `beside_mib` more behind RAM, for [`restore_part`].
///
/// # Errors
/// [`MemoryError`]
pub fn restore(
    mib: u64,
    beside_mib: u64,
    file: &File,
    written: &[Range<u64>],
) -> Result<Memory, MemoryError> {
    let length = file.metadata().map_err(MemoryError::File)?.len();
    let all = mib.checked_add(beside_mib);
    if Some(length) != all.and_then(|all| all.checked_mul(MIB)) {
        let mib = all.unwrap_or(u64::MAX);
        return Err(MemoryError::Length { length, mib });
    }
    let memory = allocate(mib)?;
    let mut start = 0;
    for region in memory.iter() {
        let end = start + region.len();
        restore_part(region, 0..region.len(), file, start)?;
        for part in written {
            // Regions are more than pages, so that a part which is not in one is in none.
            if (start..end).contains(&part.start) {
                copy(region, part.start - start, part)?;
            }
        }
        start = end;
    }
    match written.iter().find(|part| part.start >= start) {
        Some(part) => Err(MemoryError::Written(part.clone())),
        None => Ok(memory),
    }
}

/// Has the guest's RAM from `offset` of a region on, this part of a file, be of pages of its own.
fn copy(region: &GuestRegionMmap, offset: u64, part: &Range<u64>) -> Result<(), MemoryError> {
    let wrong = || MemoryError::Written(part.clone());
    let length = part.end.checked_sub(part.start).ok_or_else(wrong)?;
    let (at, length) = pages(region, offset, length).map_err(|_| wrong())?;
    // SAFETY: the pages are inside of the mapping that `region` owns; their contents stay as they are. Kernels
    // before Linux 5.14 refuse, and the guest copies them later.
    let _ = unsafe { libc::madvise(at.cast(), length, libc::MADV_POPULATE_WRITE) };
    Ok(())
}

/// As [`restore`], for a part of a region whose first byte is at `start` of the file.
///
/// # Errors
/// [`MemoryError::File`]
pub fn restore_part(
    region: &GuestRegionMmap,
    part: Range<u64>,
    file: &File,
    start: u64,
) -> Result<(), MemoryError> {
    let wanted = start + part.start..start + part.end;
    for data in data(file, wanted).map_err(MemoryError::File)? {
        map(region, file, data.start - start, data).map_err(MemoryError::File)?;
    }
    Ok(())
}

/// Returns where a range of a file has data, but for short holes.
fn data(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        // The place in the file is shared with whoever else has it, and not used.
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < range.end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(range.end);
        match found.last_mut() {
            Some(last) if start - last.end < SHORT_HOLE => last.end = end,
            _ => found.push(start..end),
        }
        at = end;
    }
    Ok(found)
}

/// Has the guest's RAM from `offset` of a region on be a private copy of this part of a file.
fn map(region: &GuestRegionMmap, file: &File, offset: u64, part: Range<u64>) -> io::Result<()> {
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let length = usize::try_from(part.end - part.start).map_err(too_long)?;
    let at = region
        .get_slice(MemoryRegionAddress(offset), length)
        .map_err(io::Error::other)?
        .ptr_guard_mut();
    // SAFETY: the place is inside of the mapping that `region` owns, which is only ever reached through
    // raw pointers and stays mapped; nobody has seen it yet.
    let result = unsafe {
        libc::mmap64(
            at.as_ptr().cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            file.as_raw_fd(),
            i64::try_from(part.start).map_err(too_long)?,
        )
    };
    if result == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory beside RAM that is saved with it.
#[derive(Debug, Default)]
pub struct Beside {
    /// Its address in the guest.
    pub start: u64,
    /// How much of it there is, in MiB.
    pub mib: u64,
    /// The parts that the guest has, in bytes from its start.
    pub parts: Vec<Range<u64>>,
}

impl Beside {
    /// What is saved with `mib` MiB of RAM: (address in the guest, length, offset in the file), in bytes.
    fn parts(&self, mib: u64) -> Vec<(u64, u64, u64)> {
        let mut offset = 0;
        let ram = ranges(mib).into_iter().map(|(address, size)| {
            offset += size;
            (address, size, offset - size)
        });
        let mut parts: Vec<_> = ram.collect();
        let beside = self.parts.iter().map(|part| {
            let (address, size) = (self.start + part.start, part.end - part.start);
            (address, size, mib * MIB + part.start)
        });
        parts.extend(beside);
        parts
    }
}

/// Writes the `mib` MiB of RAM of a guest to an empty file, and what is beside it behind that, with holes for
/// zeros. What has few of them is huge pages of a file in memory, if the host's kernel can (Linux 6.1): a guest
/// that only reads there, as it does its kernel's code, then faults once for 512 pages.
///
/// A file that was written before is told what has `changed` since, in bytes and whole pages. The guest stands
/// still, but for a file that this will be done with.
///
/// # Errors
/// [`MemoryError::File`], [`MemoryError::Length`]; [`MemoryError::Written`] for a change that is not in the file.
pub fn save(
    memory: &Memory,
    mib: u64,
    beside: &Beside,
    file: &File,
    changed: Option<&[Range<u64>]>,
) -> Result<(), MemoryError> {
    let length = file.metadata().map_err(MemoryError::File)?.len();
    let all = (mib + beside.mib) * MIB;
    let parts = beside.parts(mib);
    match changed {
        None if length == 0 => {
            file.set_len(all).map_err(MemoryError::File)?;
            write(memory, &parts, file)
        }
        Some(changed) if length == all => rewrite(memory, &parts, file, length, changed),
        None => Err(MemoryError::Length { length, mib: 0 }),
        Some(_) => {
            let mib = all / MIB;
            Err(MemoryError::Length { length, mib })
        }
    }
}

fn write(memory: &Memory, parts: &[(u64, u64, u64)], file: &File) -> Result<(), MemoryError> {
    let mut buffer = vec![0; CHUNK];
    // Pages with data of the huge page that is being written.
    let mut pages = 0;
    for &(address, size, offset) in parts {
        for start in (0..size).step_by(CHUNK) {
            let read = memory.read_slice(&mut buffer, GuestAddress(address + start));
            read.map_err(|_| MemoryError::Arrange)?;
            let at = offset + start;
            pages += write_pages(&buffer, at, file).map_err(MemoryError::File)?;
            let end = at + CHUNK as u64;
            if end.is_multiple_of(HUGE) {
                if pages >= DENSE {
                    // Only a wish.
                    let _ = collapse(file, end - HUGE);
                }
                pages = 0;
            }
        }
    }
    Ok(())
}

/// Writes what has changed to a file of this length, zeros too; what is in none of `parts` the guest does not have.
fn rewrite(
    memory: &Memory,
    parts: &[(u64, u64, u64)],
    file: &File,
    length: u64,
    changed: &[Range<u64>],
) -> Result<(), MemoryError> {
    let page = PAGE as u64;
    let mut buffer = vec![0; CHUNK];
    for change in changed {
        let is_whole = change.start.is_multiple_of(page) && change.end.is_multiple_of(page);
        if !is_whole || change.start >= change.end || change.end > length {
            return Err(MemoryError::Written(change.clone()));
        }
        for &(address, size, offset) in parts {
            let (mut at, end) = (change.start.max(offset), change.end.min(offset + size));
            while at < end {
                let count = usize::try_from(end - at).map_or(CHUNK, |left| left.min(CHUNK));
                let (buffer, from) = (&mut buffer[..count], GuestAddress(address + at - offset));
                let read = memory.read_slice(buffer, from);
                read.map_err(|_| MemoryError::Arrange)?;
                file.write_all_at(buffer, at).map_err(MemoryError::File)?;
                at += count as u64;
            }
        }
    }
    Ok(())
}

/// Where what [`save`] writes stands in this process, parts of the file that the guest does not have too.
///
/// # Errors
/// [`MemoryError::Arrange`]
pub fn copied(
    memory: &Memory,
    mib: u64,
    beside: &Beside,
) -> Result<Vec<CopiedMemory>, MemoryError> {
    let whole = Beside {
        parts: Vec::from_iter((beside.mib > 0).then_some(0..beside.mib * MIB)),
        ..*beside
    };
    let place = |(guest, length, offset)| {
        let address = memory.get_host_address(GuestAddress(guest));
        let address = address.map_err(|_| MemoryError::Arrange)?;
        Ok(CopiedMemory {
            offset,
            address: address.expose_provenance() as u64,
            length,
        })
    };
    whole.parts(mib).into_iter().map(place).collect()
}

/// Writes the pages that are not zeros, in as few calls as that takes; returns how many there are.
fn write_pages(pages: &[u8], offset: u64, file: &File) -> io::Result<usize> {
    let is_zero = |page: &[u8]| page == [0; PAGE];
    let mut offset = offset;
    let mut written = 0;
    for run in pages
        .as_chunks::<PAGE>()
        .0
        .chunk_by(|a, b| is_zero(a) == is_zero(b))
    {
        if run.first().is_some_and(|page| !is_zero(page)) {
            file.write_all_at(run.as_flattened(), offset)?;
            written += run.len();
        }
        offset += run.as_flattened().len() as u64;
    }
    Ok(written)
}

/// Makes one huge page of what a file in memory has at a multiple of [`HUGE`].
fn collapse(file: &File, offset: u64) -> io::Result<()> {
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // Somewhere in it is a place for a huge page.
    let place = MmapRegionBuilder::<()>::new(2 * HUGE as usize)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)?;
    let start = place.as_ptr();
    let at = start.wrapping_add(start.align_offset(HUGE as usize));
    // SAFETY: it is inside of the mapping that `place` owns and nobody reads, and goes with it.
    let mapped = unsafe {
        libc::mmap64(
            at.cast(),
            HUGE as usize,
            libc::PROT_READ,
            libc::MAP_SHARED | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above; what the file has stays the same.
    if unsafe { libc::madvise(mapped, HUGE as usize, libc::MADV_COLLAPSE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What is behind guest memory, which decides how it is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Memory of the VM's own ([`allocate`]).
    Own,
    /// In parts the file of a snapshot ([`restore`]).
    Snapshot,
}

/// Gives the host back what is behind whole pages of RAM, which read as zeros from then on.
///
/// # Errors
/// What the host says; `InvalidInput` for what is not whole pages of RAM.
pub fn give_back(
    memory: &Memory,
    backing: Backing,
    start: GuestAddress,
    length: u64,
) -> io::Result<()> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = memory.find_region(start).ok_or_else(wrong)?;
    if region.prot() & libc::PROT_WRITE == 0 {
        return Err(wrong());
    }
    let offset = start.0 - region.start_addr().0;
    match backing {
        Backing::Own => drop_pages(region, offset, length),
        Backing::Snapshot => replace_pages(region, offset, length),
    }
}

/// Gives the host back `length` bytes of a region that is no file, from `offset` on.
///
/// # Errors
/// As for [`give_back`].
pub fn drop_pages(region: &GuestRegionMmap, offset: u64, length: u64) -> io::Result<()> {
    let (at, length) = pages(region, offset, length)?;
    // SAFETY: the pages are inside of the mapping that `region` owns, which is only ever reached through raw
    // pointers; they become zeros, as the guest may write at any time.
    let result = unsafe { libc::madvise(at.cast(), length, libc::MADV_DONTNEED) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// As [`drop_pages`], where a file may be mapped, whose contents would be there again.
///
/// # Errors
/// As for [`give_back`].
pub fn replace_pages(region: &GuestRegionMmap, offset: u64, length: u64) -> io::Result<()> {
    let (at, length) = pages(region, offset, length)?;
    // SAFETY: as for `drop_pages`; what is there is replaced in one step, so it is mapped all the time.
    let result = unsafe {
        libc::mmap64(
            at.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if result == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Returns where whole pages of a region are.
fn pages(region: &GuestRegionMmap, offset: u64, length: u64) -> io::Result<(*mut u8, usize)> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let page = PAGE as u64;
    if length == 0 || !offset.is_multiple_of(page) || !length.is_multiple_of(page) {
        return Err(wrong());
    }
    let length = usize::try_from(length).map_err(|_| wrong())?;
    let slice = region.get_slice(MemoryRegionAddress(offset), length);
    let at = slice.map_err(|_| wrong())?.ptr_guard_mut();
    Ok((at.as_ptr(), length))
}

/// Asks for huge pages, which spare hundreds of nested page faults at boot, and for no core dumps.
/// Both are only wishes.
pub fn advise(region: &GuestRegionMmap) {
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

    use rustix::fs::{MemfdFlags, memfd_create};

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
    fn what_a_guest_gives_back_is_zeros_whatever_was_behind_it() {
        let memory = allocate(MIN_MIB).unwrap();
        let places = [4096, 8192, 12288];
        let fill = |memory: &Memory| {
            for place in places {
                memory.write_obj(7u8, GuestAddress(place)).unwrap();
            }
        };
        fill(&memory);
        let file = tempfile::tempfile().unwrap();
        save(&memory, MIN_MIB, &Beside::default(), &file, None).unwrap();
        let restored = restore(MIN_MIB, 0, &file, &[]).unwrap();
        let clone = restore(MIN_MIB, 0, &file, &[]).unwrap();
        fill(&clone);
        for (memory, backing) in [
            (memory, Backing::Own),
            (restored, Backing::Snapshot),
            (clone, Backing::Snapshot),
        ] {
            give_back(&memory, backing, GuestAddress(8192), 4096).unwrap();
            let bytes = places.map(|place| memory.read_obj::<u8>(GuestAddress(place)).unwrap());
            assert_eq!(bytes, [7, 0, 7], "{backing:?}");
            memory.write_obj(9u8, GuestAddress(8192)).unwrap();
            for (start, length) in [
                (1, 4096),
                (0, 4095),
                (0, 0),
                (32 * MIB, 4096),
                (0, 33 * MIB),
            ] {
                let start = GuestAddress(start);
                assert!(give_back(&memory, backing, start, length).is_err());
            }
        }
    }

    #[test]
    fn what_has_few_zeros_is_huge_pages_of_a_file_in_memory() {
        let memory = allocate(MIN_MIB).unwrap();
        let fill = |start: u64, pages: u64| {
            for page in 0..pages {
                let address = GuestAddress(start + page * PAGE as u64);
                memory.write_obj(page | 1, address).unwrap();
            }
        };
        fill(4 * MIB, DENSE as u64);
        fill(8 * MIB, DENSE as u64 - 1);
        let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
        save(&memory, MIN_MIB, &Beside::default(), &file, None).unwrap();
        let pages = |blocks: u64| blocks * 512 / PAGE as u64;
        let sparse = 2 * DENSE as u64 - 1;
        if pages(file.metadata().unwrap().blocks()) == sparse {
            println!("SKIPPED: huge pages of files: this kernel has none by MADV_COLLAPSE");
            return;
        }
        assert_eq!(
            pages(file.metadata().unwrap().blocks()),
            sparse + (512 - DENSE as u64)
        );
        let restored = restore(MIN_MIB, 0, &file, &[]).unwrap();
        for (start, page) in [(4 * MIB, 0), (4 * MIB, DENSE as u64 - 1), (8 * MIB, 7)] {
            let address = GuestAddress(start + page * PAGE as u64);
            assert_eq!(restored.read_obj::<u64>(address).unwrap(), page | 1);
        }
        let end = GuestAddress(6 * MIB - 8);
        assert_eq!(restored.read_obj::<u64>(end).unwrap(), 0);
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
        save(&memory, MIN_MIB, &Beside::default(), &file, None).unwrap();
        let saved = file.metadata().unwrap();
        assert!(saved.blocks() <= 4 * 8, "{} blocks", saved.blocks());
        assert!(matches!(
            save(&memory, MIN_MIB, &Beside::default(), &file, None),
            Err(MemoryError::Length { .. })
        ));
        // What changed since a file was written, zeros too, and nothing else.
        let ahead = tempfile::tempfile().unwrap();
        let page = PAGE as u64;
        for place in [3 * page, 9 * page] {
            memory.write_obj(7u8, GuestAddress(place)).unwrap();
        }
        save(&memory, MIN_MIB, &Beside::default(), &ahead, None).unwrap();
        for place in [3 * page, 9 * page] {
            memory.write_obj(0u8, GuestAddress(place)).unwrap();
        }
        let save_changed = |changed: &[Range<u64>]| {
            save(&memory, MIN_MIB, &Beside::default(), &ahead, Some(changed))
        };
        save_changed(&[3 * page..4 * page, 20 * page..21 * page]).unwrap();
        let byte = |at| {
            let mut byte = [0];
            ahead.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        assert_eq!((byte(3 * page), byte(9 * page)), (0, 7));
        save_changed(&[0..16 * MIB, 16 * MIB..32 * MIB]).unwrap();
        assert_eq!((byte(9 * page), byte(32 * MIB - 1)), (0, 255));
        for wrong in [1..page, page..page, 32 * MIB..33 * MIB, 0..u64::MAX] {
            let refused = save_changed(&[0..page, wrong.clone()]);
            assert!(matches!(refused, Err(MemoryError::Written(part)) if part == wrong));
        }
        for _ in 0..2 {
            let restored = restore(MIN_MIB, 0, &file, &[]).unwrap();
            for place in places {
                let byte: u8 = restored.read_obj(GuestAddress(place)).unwrap();
                assert_eq!(byte, place as u8 | 1);
            }
            assert_eq!(restored.read_obj::<u8>(GuestAddress(1)).unwrap(), 0);
            for place in [0, 16 * MIB] {
                restored.write_obj(9u8, GuestAddress(place)).unwrap();
            }
            assert_eq!(file.metadata().unwrap().blocks(), saved.blocks());
            assert!(is_writable(&restored, GuestAddress(0)));
        }
        let written = [0..page, 32 * MIB - page..32 * MIB];
        let restored = restore(MIN_MIB, 0, &file, &written).unwrap();
        for place in places {
            let byte: u8 = restored.read_obj(GuestAddress(place)).unwrap();
            assert_eq!(byte, place as u8 | 1);
        }
        assert_eq!(file.metadata().unwrap().blocks(), saved.blocks());
        for wrong in [
            1..page,
            0..1,
            page..page,
            page..0,
            32 * MIB - page..32 * MIB + page,
            32 * MIB..33 * MIB,
            0..u64::MAX,
            u64::MAX - 1..u64::MAX,
        ] {
            let refused = restore(MIN_MIB, 0, &file, &[0..page, wrong.clone()]);
            assert!(matches!(refused, Err(MemoryError::Written(part)) if part == wrong));
        }
        assert!(matches!(
            restore(MIN_MIB, 1, &file, &[]),
            Err(MemoryError::Length { .. })
        ));
    }
}
