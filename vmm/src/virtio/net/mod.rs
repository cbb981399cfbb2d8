//! virtio-net on a tap.
//!
//! Frames of the guest go from its memory to the tap without a copy, and frames for
//! the guest from the tap into as many of its buffers as they need; only what is longer
//! than those before it is copied once more. Checksums and TCP segmentation are left to
//! whoever sends the frame on at last. The tap is opened, named and connected by the
//! daemon.
//!
//! Read in this order: [`header`], [`tap`], `frame` (what is read from a tap), [`device`].
//!
//! Not here: several queue pairs (a virtio-mmio device has one interrupt, so they would share
//! a CPU of the guest), the control queue (so no filters by MAC or VLAN), UDP segmentation.

pub mod device;
mod frame;
pub mod header;
pub mod state;
pub mod tap;
#[cfg(test)]
mod tests;

pub use device::{Net, NetError};
pub use state::State;
pub use tap::{Tap, TapError};
