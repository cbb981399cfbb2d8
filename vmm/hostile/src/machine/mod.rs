//! The machine as the guest uses it.
//!
//! All memory is the guest's, mapped one to one, and all that it can break with a wild access is itself: so these
//! functions are safe to call as far as the host is concerned, which is what the attacks are to show.

pub(crate) mod cpu;
pub(crate) mod memory;
pub(crate) mod random;
pub(crate) mod second;
pub(crate) mod serial;
pub(crate) mod virtio;
