//! The virtio devices and what they share.
//!
//! Read in this order: [`device`] (the trait that each device implements, and
//! which thread calls what), [`queue`] and [`buffers`] (how a device reaches
//! guest memory), [`interrupt`], [`watch`], then a device folder; [`rng`] is
//! the smallest.
//!
//! A device knows nothing of its transport, its slot's address or KVM.

pub mod block;
pub mod buffers;
pub mod device;
pub mod fs;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod registers;
pub mod rng;
#[cfg(test)]
pub(crate) mod test_driver;
pub mod vsock;
pub mod watch;

use vm_memory::{GuestAddress, GuestMemoryBackend};

pub use device::{Activation, Counters, DeviceError, DeviceState, Kind, Progress, VirtioDevice};

/// Guest memory: cheap to clone, all clones see the same bytes.
pub type Memory = vm_memory::GuestMemoryMmap<()>;

/// Tells whether devices may write to `address`: to RAM, but not to [`crate::windows`]. Between the
/// two is a gap, so it says the same of all that is reached from there on.
pub(crate) fn is_writable(memory: &Memory, address: GuestAddress) -> bool {
    memory
        .find_region(address)
        .is_some_and(|region| region.prot() & libc::PROT_WRITE != 0)
}
