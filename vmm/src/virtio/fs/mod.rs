//! virtio-fs (virtio 1.2, section 5.11), without files: requests go to a file server and its
//! replies come back as packets of a Unix socket.
//!
//! ```text
//!   guest ── chain ──▶ [request] ── packet ──▶ hull-fs
//!   guest ◀─ chain ─── [device]  ◀─ packet ───
//! ```
//!
//! The server never sees guest memory, and a VMM that is lost can say FUSE and nothing else. A
//! request is known by its `unique`, which the device replaces by one of its own: the server's
//! view of which requests are there does not depend on the guest.

mod device;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod request;
mod socket;
#[cfg(test)]
mod tests;

pub use device::{Fs, FsError};
