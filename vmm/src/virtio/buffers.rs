//! The memory that a descriptor chain describes, checked once and read from the table once.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::queue::Chain;
use crate::memory::{Memory, is_writable};

/// A chain that no driver following virtio 1.2, section 2.7 would make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor refers to memory that the guest does not have, or may not write.
    #[error("descriptor outside guest memory")]
    Address,
    /// A readable descriptor follows a writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// The chain loops, is cut off, or has more descriptors than allowed.
    #[error("descriptor chain too long or cut off")]
    Length,
}

/// The parts of a chain. Guest memory changes under these slices whenever the guest likes:
/// copy what is examined more than once.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// What the device may read.
    pub readable: Vec<VolatileSlice<'m>>,
    /// What the device may write.
    pub writable: Vec<VolatileSlice<'m>>,
}

impl<'m> Buffers<'m> {
    /// Follows a chain of at most `limit` descriptors.
    ///
    /// # Errors
    /// [`ChainError`] when the chain is not well-formed.
    pub fn collect(chain: Chain<'m>, memory: &'m Memory, limit: usize) -> Result<Self, ChainError> {
        let mut buffers = Self::default();
        buffers.refill(chain, memory, limit)?;
        Ok(buffers)
    }

    /// Follows a chain as [`Buffers::collect`] does, into the lists that are there already. After
    /// an error they have part of it.
    ///
    /// # Errors
    /// [`ChainError`] when the chain is not well-formed.
    pub fn refill(
        &mut self,
        chain: Chain<'m>,
        memory: &'m Memory,
        limit: usize,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            if count == limit {
                return Err(ChainError::Length);
            }
            complete = !descriptor.has_next();
            let (list, access) = if descriptor.is_write_only() {
                (&mut self.writable, Permissions::Write)
            } else if self.writable.is_empty() {
                (&mut self.readable, Permissions::Read)
            } else {
                return Err(ChainError::Order);
            };
            let slices = memory
                .get_slices(descriptor.addr(), descriptor.len() as usize, access)
                .map_err(|_| ChainError::Address)?;
            if descriptor.is_write_only() && !is_writable(memory, descriptor.addr()) {
                return Err(ChainError::Address);
            }
            for slice in slices {
                list.push(slice.map_err(|_| ChainError::Address)?);
            }
        }
        if complete {
            Ok(())
        } else {
            Err(ChainError::Length)
        }
    }
}

/// Returns the number of bytes in the slices.
#[must_use]
pub fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}
