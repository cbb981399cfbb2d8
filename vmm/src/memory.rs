//! Guest RAM.

use std::io;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::layout::{FOUR_GIB, MMIO_GAP};

/// Guest memory: cheap to clone, all clones see the same bytes.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
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
}
