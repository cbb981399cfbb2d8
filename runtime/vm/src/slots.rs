//! The device slots of a VM: what is behind which.

use std::collections::BTreeSet;

use hull_proto_vmm::SLOTS;

use crate::error::VmError;

/// virtio-vsock.
pub const VSOCK: u8 = 0;
/// virtio-rng.
pub const RNG: u8 = 1;
/// The guest's root disk: the first virtio-blk, so `/dev/vda`.
pub const ROOT: u8 = 2;
/// The first network interface; further ones have the last slots ([`net`]).
pub const NET: u8 = 3;
/// The scratch disk.
pub const SCRATCH: u8 = 4;
/// The file server, once a container mounts files of the host.
pub const FILES: u8 = 5;
/// Memory that comes and goes.
pub const MEMORY: u8 = 6;
/// What the guest tells of free pages by.
pub const BALLOON: u8 = 7;
const FIRST_FREE: u8 = 8;

/// The slot of a pod's network interface: the first interface has [`NET`], others count down from
/// the last slot, which hot-added devices take last.
#[must_use]
pub fn net(interface: u8) -> u8 {
    match interface {
        0 => NET,
        other => SLOTS.saturating_sub(other),
    }
}

/// The slots that hot-added devices may take.
#[derive(Debug, Default)]
pub struct Slots {
    taken: BTreeSet<u8>,
}

impl Slots {
    /// Takes the first free slot.
    ///
    /// # Errors
    /// [`VmError::NoSlot`].
    pub fn take(&mut self) -> Result<u8, VmError> {
        let slot = (FIRST_FREE..SLOTS)
            .find(|slot| !self.taken.contains(slot))
            .ok_or(VmError::NoSlot)?;
        self.taken.insert(slot);
        Ok(slot)
    }

    /// Takes this slot, and tells whether it was free.
    pub fn claim(&mut self, slot: u8) -> bool {
        self.taken.insert(slot)
    }

    /// Marks a slot that is known to be taken.
    pub fn mark(&mut self, slot: u8) {
        self.taken.insert(slot);
    }

    /// Whether a device may be behind this slot that was hot-added and never noted here.
    #[must_use]
    pub fn is_unknown(&self, slot: u8) -> bool {
        (FIRST_FREE..SLOTS).contains(&slot) && !self.taken.contains(&slot)
    }

    /// Gives a slot back.
    pub fn free(&mut self, slot: u8) {
        self.taken.remove(&slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_run_out_and_come_back() {
        let mut slots = Slots::default();
        slots.mark(11);
        let taken: Vec<u8> = std::iter::from_fn(|| slots.take().ok()).collect();
        assert_eq!(taken.first(), Some(&8));
        assert!(!taken.contains(&11));
        assert_eq!(taken.len(), usize::from(SLOTS - FIRST_FREE) - 1);
        assert_eq!((net(0), net(1), net(3)), (NET, SLOTS - 1, SLOTS - 3));
        assert!(!slots.is_unknown(9) && !slots.is_unknown(SCRATCH) && !slots.is_unknown(SLOTS));
        assert!(!slots.claim(9));
        slots.free(9);
        assert!(slots.is_unknown(9));
        assert_eq!(slots.take().unwrap(), 9);
    }
}
