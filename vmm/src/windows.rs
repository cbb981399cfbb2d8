//! Windows: files that the guest sees as memory, read-only, in the host's page cache.
//!
//! One range of the guest's addresses above its RAM is set aside for them, and as much of this
//! process's addresses. A window maps its files over a part of it and makes that part a memory slot
//! of KVM. The rest is zeros here, and nothing in the guest:
//!
//! ```text
//! guest   RAM ┆        ┆ window │           │ window │            ┆
//! here    RAM ┆        ┆ files  │ zero pages│ files  │ zero pages ┆   none of it can be written
//! ```
//! The range is a region of the memory that devices see, so a guest can have a device read from a
//! window as from RAM. It lives as long as that memory: an address in it never becomes something else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

use crate::layout::FOUR_GIB;
use crate::virtio::Memory;
use crate::virtio::block::disk::Piece;
use crate::{lock, log, memory};

/// What a window's size is a multiple of, and what guest and host addresses agree in: a huge page,
/// which is also the least that Linux makes page structs for.
const GRAIN: u64 = 2 << 20;
/// Distance of windows, and of the first one from RAM: a section of Linux's memory model.
const SECTION: u64 = 128 << 20;
/// Size of the range. It costs addresses alone.
const RANGE: u64 = 64 << 30;
/// What pieces of files are multiples of.
const PAGE: u64 = 4096;
/// Bits of the addresses that Linux uses with four levels of page tables.
const LINUX_BITS: u32 = 46;

/// Why there is no window.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// A piece is not made of whole pages.
    #[error("piece {0} of the window is not made of whole pages")]
    Unaligned(usize),
    /// There is no room for one of this size.
    #[error("no room for a window of {0} bytes")]
    Full(u64),
    /// The host refuses.
    #[error("map a file")]
    Map(#[source] io::Error),
    /// KVM refuses.
    #[error("make a window part of the guest's memory")]
    Slot(#[source] io::Error),
}

/// Makes parts of this process's memory the guest's.
pub trait MemorySlots: std::fmt::Debug + Send + Sync {
    /// Makes `length` bytes at `host` readable for the guest at `guest`, as slot `number` of the windows.
    ///
    /// # Safety
    /// The bytes stay mapped as long as the slot is there.
    ///
    /// # Errors
    /// What KVM says.
    unsafe fn fill(&self, number: u32, guest: u64, host: u64, length: u64) -> io::Result<()>;

    /// Undoes [`MemorySlots::fill`].
    ///
    /// # Errors
    /// What KVM says.
    fn clear(&self, number: u32) -> io::Result<()>;
}

/// The windows of a VM.
#[derive(Debug)]
pub struct Windows {
    slots: Arc<dyn MemorySlots>,
    /// None where the guest's addresses don't suffice.
    range: Option<Arc<GuestRegionMmap>>,
    /// Guest address of the first window.
    start: u64,
    /// Start and length of each window, and of places that are lost.
    open: Mutex<BTreeMap<u64, u64>>,
}

impl Windows {
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
            Some(Arc::new(set_aside(start)?))
        } else {
            None
        };
        Ok(Self {
            slots,
            range,
            start,
            open: Mutex::default(),
        })
    }

    /// Returns `ram` and the windows: what devices can reach.
    #[must_use]
    pub fn join(&self, ram: &Memory) -> Memory {
        self.range
            .clone()
            .and_then(|range| ram.insert_region(range).ok())
            .unwrap_or_else(|| ram.clone())
    }

    /// Opens a window on pieces of files, one after another; what follows the last is zeros.
    ///
    /// # Errors
    /// [`WindowError`]; nothing changed.
    pub fn open(self: &Arc<Self>, pieces: &[Piece]) -> Result<Window, WindowError> {
        let mut length = 0u64;
        for (index, piece) in pieces.iter().enumerate() {
            if !piece.offset.is_multiple_of(PAGE) || !piece.length.is_multiple_of(PAGE) {
                return Err(WindowError::Unaligned(index));
            }
            length = length.saturating_add(piece.length);
        }
        let full = WindowError::Full(length);
        if length == 0 || length > RANGE {
            return Err(full);
        }
        let length = length.next_multiple_of(GRAIN);
        let mut open = lock(&self.open);
        let start = find_room(&open, self.start, self.start + RANGE, length);
        let (Some(range), Some(start)) = (&self.range, start) else {
            return Err(full);
        };
        if let Err(error) = self.show(range, start, length, pieces) {
            self.hide(&mut open, range, start, length);
            return Err(error);
        }
        open.insert(start, length);
        Ok(Window {
            windows: Arc::clone(self),
            start,
            length,
        })
    }

    fn show(
        &self,
        range: &GuestRegionMmap,
        start: u64,
        length: u64,
        pieces: &[Piece],
    ) -> Result<(), WindowError> {
        let mut at = start;
        for piece in pieces {
            map(range, at, piece.length, Some(piece)).map_err(WindowError::Map)?;
            at += piece.length;
        }
        let host = host_address(range, start) as u64;
        // SAFETY: the range is mapped as long as the memory that vCPUs hold.
        unsafe { self.slots.fill(self.number(start), start, host, length) }
            .map_err(WindowError::Slot)
    }

    /// Puts zeros where files were. If that fails the place is never used again, and stays what it is.
    fn hide(
        &self,
        open: &mut BTreeMap<u64, u64>,
        range: &GuestRegionMmap,
        start: u64,
        length: u64,
    ) {
        match map(range, start, length, None) {
            Ok(()) => drop(open.remove(&start)),
            Err(error) => {
                open.insert(start, length);
                log::note(&format!("unmap window at {start:#x}: {error}"));
            }
        }
    }

    fn close(&self, start: u64, length: u64) {
        let Some(range) = &self.range else { return };
        match self.slots.clear(self.number(start)) {
            Ok(()) => self.hide(&mut lock(&self.open), range, start, length),
            Err(error) => log::note(&format!(
                "take window at {start:#x} from the guest: {error}"
            )),
        }
    }

    /// The number of the KVM slot of a window: windows start in different sections.
    fn number(&self, start: u64) -> u32 {
        ((start - self.start) / SECTION) as u32
    }
}

/// A window. It closes when dropped.
#[derive(Debug)]
pub struct Window {
    windows: Arc<Windows>,
    start: u64,
    length: u64,
}

impl Window {
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

impl Drop for Window {
    fn drop(&mut self) {
        self.windows.close(self.start, self.length);
    }
}

/// Finds the first place between `start` and `end` where `length` bytes fit.
fn find_room(open: &BTreeMap<u64, u64>, start: u64, end: u64, length: u64) -> Option<u64> {
    let mut at = start;
    for (other, other_length) in open {
        if at + length <= *other {
            break;
        }
        at = (other + other_length).next_multiple_of(SECTION);
    }
    (at + length <= end).then_some(at)
}

/// Sets [`RANGE`] bytes aside at `start`, and up to a grain before, so that addresses agree.
fn set_aside(start: u64) -> Result<GuestRegionMmap, MmapRegionError> {
    let size = usize::try_from(RANGE + GRAIN).map_err(|_| MmapRegionError::InvalidPointer)?;
    let mapping = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()?;
    let host = mapping.as_ptr() as u64;
    let before = host.next_multiple_of(GRAIN) - host;
    GuestRegionMmap::new(mapping, GuestAddress(start - before))
        .ok_or(MmapRegionError::InvalidPointer)
}

fn host_address(range: &GuestRegionMmap, guest: u64) -> *mut u8 {
    let inside = guest - range.start_addr().0;
    range.as_ptr().wrapping_add(inside as usize)
}

/// Puts a piece of a file, or zeros, where the guest has `length` bytes of the range from `guest` on.
fn map(range: &GuestRegionMmap, guest: u64, length: u64, piece: Option<&Piece>) -> io::Result<()> {
    let (flags, fd, offset) = match piece {
        Some(piece) => (libc::MAP_SHARED, piece.file.as_raw_fd(), piece.offset),
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
#[path = "windows/tests.rs"]
pub(crate) mod tests;
