//! virtio-net on a tap.
//!
//! Frames of the guest go from its memory to the tap without a copy, and frames for
//! the guest from the tap into as many of its buffers as they need; only what is longer
//! than those before it is copied once more. Checksums and TCP segmentation are left to
//! whoever sends the frame on at last. The tap is opened, named and connected by the
//! daemon.
//!
//! A card has a pair of queues for each port that it is given: the queues of one multi-queue tap, on
//! which the host's kernel spreads flows. With one pair it has no control queue.
//!
//! Read in this order: [`header`], [`tap`], `frame` (what is read from a tap), `pair` (a receive and a
//! transmit queue), `control`, `rate_limit`, [`device`].
//!
//! Not here: filters by MAC or VLAN and other commands of the control queue than the number of pairs;
//! receive hashes (RSS): flows go to the pair that they were last sent from; UDP segmentation.

mod control;
mod device;
mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod header;
mod pair;
mod rate_limit;
pub(crate) mod tap;
#[cfg(test)]
mod tests;

pub use device::{Net, NetError};
pub use tap::Tap;
