//! What the registers of all slots read as: memory that the guest reads without an exit, and can't
//! write. Each write is an exit, to KVM where a doorbell sits, else to the transport.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hull_proto_vmm::SLOTS;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, VolatileMemory};

use crate::layout::SLOT_SIZE;

/// The registers of all slots, one page each.
#[derive(Debug, Clone)]
pub struct Registers(Arc<MmapRegion>);

impl Registers {
    /// Allocates registers that are all 0.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new() -> Result<Self, MmapRegionError> {
        let size = usize::from(SLOTS) * SLOT_SIZE as usize;
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build()?;
        Ok(Self(Arc::new(region)))
    }

    /// Returns where they are in this process, and their length in bytes.
    #[must_use]
    pub fn place(&self) -> (u64, u64) {
        let start = self.0.as_ptr().expose_provenance() as u64;
        (start, self.0.size() as u64)
    }

    /// Returns the registers of one slot.
    #[must_use]
    pub fn page(&self, slot: u8) -> Page {
        Page {
            all: self.clone(),
            start: usize::from(slot) * SLOT_SIZE as usize,
        }
    }
}

/// The registers of one slot. Those beyond its end are nowhere.
#[derive(Debug, Clone)]
pub struct Page {
    all: Registers,
    start: usize,
}

impl Page {
    /// Changes a register of 4 bytes to what `change` makes of it.
    pub fn update(&self, offset: u64, change: impl Fn(u32) -> u32) {
        if let Some(word) = self.word(offset) {
            let change = |old| Some(change(u32::from_le(old)).to_le());
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        }
    }

    /// Sets a register of 4 bytes.
    pub fn set(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// Returns a register of 4 bytes.
    #[must_use]
    pub fn get(&self, offset: u64) -> u32 {
        self.word(offset)
            .map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    /// Sets bytes from `offset` on.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        let at = self.start + offset as usize;
        // It does not fail: callers stay inside of the page.
        let _ = self.all.0.as_volatile_slice().write_slice(bytes, at);
    }

    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        let at = self.start + offset as usize;
        self.all.0.get_atomic_ref(at).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_do_not_share_registers() {
        let registers = Registers::new().unwrap();
        let (first, last) = (registers.page(0), registers.page(SLOTS - 1));
        first.set(0xffc, 1);
        last.set(0xffc, 2);
        last.update(0xffc, |old| old + 5);
        last.fill(0x101, &[3, 4]);
        assert_eq!((first.get(0xffc), last.get(0xffc)), (1, 7));
        assert_eq!((first.get(0x100), last.get(0x100)), (0, 0x04_0300));
        assert_eq!(registers.page(1).get(0), 0);
        last.set(0x1000, 1);
        assert_eq!(last.get(0x1000), 0);
    }
}
