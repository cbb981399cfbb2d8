//! File regions: files that the guest has as memory, read-only, in the host's page cache.
//!
//! One range of the guest's addresses above its RAM is set aside for them, and as much of this
//! process's addresses. A file region maps its files over a part of it and makes that part a memory slot
//! of KVM. The rest is zeros here, and nothing in the guest:
//!
//! ```text
//! guest   RAM ┆        ┆ region │           │ region │            ┆
//! here    RAM ┆        ┆ files  │ zero pages│ files  │ zero pages ┆   none of it can be written
//! ```
//! The range is a region of the memory that devices see, so a guest can have a device read from a
//! file as from RAM. It lives as long as that memory: an address in it never becomes something else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use crate::extent::FileExtent;
use crate::layout::FOUR_GIB;
use crate::memory::Memory;
use crate::sync::lock;
use crate::{log, memory};

/// What a file region's size is a multiple of, and what guest and host addresses agree in: a huge page,
/// which is also the least that Linux makes page structs for.
const ALIGNMENT: u64 = 2 << 20;
/// Distance of file regions, and of the first one from RAM: a section of Linux's memory model.
const SECTION: u64 = 128 << 20;
/// Size of the range. It costs addresses alone.
const RANGE: u64 = 64 << 30;
/// What extents of files are multiples of.
const PAGE: u64 = 4096;
/// Bits of the addresses that Linux uses with four levels of page tables.
const LINUX_BITS: u32 = 46;

/// Why there is no file region.
#[derive(Debug, thiserror::Error)]
pub enum FileRegionError {
    /// An extent is not made of whole pages.
    #[error("extent {0} of the file region is not made of whole pages")]
    Unaligned(usize),
    /// There is no room for one of this size.
    #[error("no room for a file region of {0} bytes")]
    Full(u64),
    /// The host refuses.
    #[error("map a file")]
    Map(#[source] io::Error),
    /// KVM refuses.
    #[error("make files part of the guest's memory")]
    Slot(#[source] io::Error),
}

/// Makes parts of this process's memory the guest's.
pub trait MemorySlots: std::fmt::Debug + Send + Sync {
    /// Makes `length` bytes at `host` readable for the guest at `guest`, as slot `number` of the file regions.
    ///
    /// # Safety
    /// The bytes stay mapped as long as the slot is there.
    ///
    /// # Errors
    /// What KVM says.
    unsafe fn map(&self, number: u32, guest: u64, host: u64, length: u64) -> io::Result<()>;

    /// Undoes [`MemorySlots::map`].
    ///
    /// # Errors
    /// What KVM says.
    fn unmap(&self, number: u32) -> io::Result<()>;
}

/// The file regions of a VM.
#[derive(Debug)]
pub struct FileRegions {
    slots: Arc<dyn MemorySlots>,
    /// None where the guest's addresses don't suffice.
    range: Option<Arc<GuestRegionMmap>>,
    /// Guest address of the first file region.
    start: u64,
    /// Start and length of each file region, and of places that can't be used any more.
    mapped: Mutex<BTreeMap<u64, u64>>,
}

impl FileRegions {
    /// Sets addresses aside behind the RAM of a guest whose physical addresses have `bits` bits.
    ///
    /// # Errors
    /// When this process has no room for them.
    pub fn new(
        ram: &Memory,
        bits: u32,
        slots: Arc<dyn MemorySlots>,
    ) -> Result<Self, MmapRegionError> {
        let end = memory::regions(ram).map(|(guest, _, length)| guest + length);
        let end = end.max().unwrap_or_default().max(FOUR_GIB);
        let start = end.next_multiple_of(SECTION) + SECTION;
        let range = if start + RANGE <= 1 << bits.min(LINUX_BITS) {
            Some(Arc::new(reserve(start)?))
        } else {
            None
        };
        Ok(Self {
            slots,
            range,
            start,
            mapped: Mutex::default(),
        })
    }

    /// Returns `ram` and the file regions: what devices can reach.
    #[must_use]
    pub fn join(&self, ram: &Memory) -> Memory {
        self.range
            .clone()
            .and_then(|range| ram.insert_region(range).ok())
            .unwrap_or_else(|| ram.clone())
    }

    /// Maps extents of files, one after another; what follows the last is zeros.
    ///
    /// # Errors
    /// [`FileRegionError`]; nothing changed.
    pub fn map(self: &Arc<Self>, extents: &[FileExtent]) -> Result<FileRegion, FileRegionError> {
        let mut length = 0u64;
        for (index, extent) in extents.iter().enumerate() {
            if !extent.offset.is_multiple_of(PAGE) || !extent.length.is_multiple_of(PAGE) {
                return Err(FileRegionError::Unaligned(index));
            }
            length = length.saturating_add(extent.length);
        }
        let full = FileRegionError::Full(length);
        if length == 0 || length > RANGE {
            return Err(full);
        }
        let length = length.next_multiple_of(ALIGNMENT);
        let mut mapped = lock(&self.mapped);
        let start = find_room(&mapped, self.start, self.start + RANGE, length);
        let (Some(range), Some(start)) = (&self.range, start) else {
            return Err(full);
        };
        if let Err(error) = self.map_files(range, start, length, extents) {
            self.unmap_files(&mut mapped, range, start, length);
            return Err(error);
        }
        mapped.insert(start, length);
        Ok(FileRegion {
            regions: Arc::clone(self),
            start,
            length,
        })
    }

    fn map_files(
        &self,
        range: &GuestRegionMmap,
        start: u64,
        length: u64,
        extents: &[FileExtent],
    ) -> Result<(), FileRegionError> {
        let mut at = start;
        for extent in extents {
            map(range, at, extent.length, Some(extent)).map_err(FileRegionError::Map)?;
            at += extent.length;
        }
        let host = host_address(range, start) as u64;
        // SAFETY: the range is mapped as long as the memory that vCPUs hold.
        unsafe { self.slots.map(self.number(start), start, host, length) }
            .map_err(FileRegionError::Slot)
    }

    /// Puts zeros where files were. If that fails the place is never used again, and stays what it is.
    fn unmap_files(
        &self,
        mapped: &mut BTreeMap<u64, u64>,
        range: &GuestRegionMmap,
        start: u64,
        length: u64,
    ) {
        match map(range, start, length, None) {
            Ok(()) => drop(mapped.remove(&start)),
            Err(error) => {
                mapped.insert(start, length);
                log::note(&format!("unmap files at {start:#x}: {error}"));
            }
        }
    }

    fn unmap(&self, start: u64, length: u64) {
        let Some(range) = &self.range else { return };
        match self.slots.unmap(self.number(start)) {
            Ok(()) => self.unmap_files(&mut lock(&self.mapped), range, start, length),
            Err(error) => log::note(&format!(
                "take the file region at {start:#x} from the guest: {error}"
            )),
        }
    }

    /// The number of the KVM slot of a file region: they start in different sections.
    fn number(&self, start: u64) -> u32 {
        ((start - self.start) / SECTION) as u32
    }
}

/// Files as memory of the guest. They are unmapped when this is dropped.
#[derive(Debug)]
pub struct FileRegion {
    regions: Arc<FileRegions>,
    start: u64,
    length: u64,
}

impl FileRegion {
    /// Returns its address in the guest.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Returns its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }
}

impl Drop for FileRegion {
    fn drop(&mut self) {
        self.regions.unmap(self.start, self.length);
    }
}

/// Finds the first place between `start` and `end` where `length` bytes fit.
fn find_room(mapped: &BTreeMap<u64, u64>, start: u64, end: u64, length: u64) -> Option<u64> {
    let mut at = start;
    for (other, other_length) in mapped {
        if at + length <= *other {
            break;
        }
        at = (other + other_length).next_multiple_of(SECTION);
    }
    (at + length <= end).then_some(at)
}

/// Reserves [`RANGE`] bytes at `start`, and up to an alignment before, so that addresses agree.
fn reserve(start: u64) -> Result<GuestRegionMmap, MmapRegionError> {
    let size = usize::try_from(RANGE + ALIGNMENT).map_err(|_| MmapRegionError::InvalidPointer)?;
    let mapping = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()?;
    let host = mapping.as_ptr() as u64;
    let before = host.next_multiple_of(ALIGNMENT) - host;
    GuestRegionMmap::new(mapping, GuestAddress(start - before))
        .ok_or(MmapRegionError::InvalidPointer)
}

fn host_address(range: &GuestRegionMmap, guest: u64) -> *mut u8 {
    let inside = guest - range.start_addr().0;
    range.as_ptr().wrapping_add(inside as usize)
}

/// Puts a extent of a file, or zeros, where the guest has `length` bytes of the range from `guest` on.
fn map(
    range: &GuestRegionMmap,
    guest: u64,
    length: u64,
    extent: Option<&FileExtent>,
) -> io::Result<()> {
    let (flags, fd, offset) = match extent {
        Some(extent) => (libc::MAP_SHARED, extent.file.as_raw_fd(), extent.offset),
        None => (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        ),
    };
    let at = host_address(range, guest);
    // SAFETY: the place is inside of `range`'s mapping, which is only ever reached through raw
    // pointers, may change at any time, and stays mapped; callers have room there.
    let result = unsafe {
        libc::mmap64(
            at.cast(),
            length as usize,
            libc::PROT_READ,
            flags | libc::MAP_FIXED,
            fd,
            offset as i64,
        )
    };
    if result == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
#[path = "file_regions/tests.rs"]
pub(crate) mod tests;
