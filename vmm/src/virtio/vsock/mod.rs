//! virtio-vsock: streams between Unix socket clients on the host and ports of the guest.
//!
//! A client connects to the device's listening socket, writes `CONNECT <port>\n`
//! and reads `OK <port>\n`; bytes follow in both directions, each of which can be
//! shut down alone. Until the guest's driver is there, clients wait in the
//! listener's backlog; when nobody listens in the guest they are hung up.
//! Connections that the guest asks for are refused: nobody listens on the host.
//!
//! Read in this order: [`packet`], [`connection`] (one stream, its states and
//! its credit), [`muxer`] (all of them in turn), [`device`].
//!
//! Not here: SEQPACKET, connections to other guests, a driver that shares memory
//! with another process.

mod connection;
mod device;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use device::{Vsock, VsockError};
