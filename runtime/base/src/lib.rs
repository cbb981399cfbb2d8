//! What several parts of the daemon need of the operating system and of the asynchronous runtime:
//! opening files below what others can write ([`beneath`]), work that blocks ([`blocking`]), panics
//! that end one pod and not all ([`panics`]), processes held by descriptors ([`pidfd`]), clocks, the
//! host's size, text of a hostile side, where tests put faults ([`faults`]), what is measured
//! ([`metrics`]), and where a call's time goes ([`stages`]).
//!
//! Not here: pods, VMs, images.

#![forbid(unsafe_code)]

pub mod beneath;
mod blocking;
pub mod clock;
pub mod faults;
pub mod host;
pub mod metrics;
pub mod panics;
pub mod pidfd;
pub mod printable;
pub mod readiness;
pub mod stages;

pub use blocking::{block_in_place, blocking};
