//! Exec and attach: the streams of a process.
//!
//! Whatever carries them, they end in the same order: output, then the status on the error stream,
//! then the connection.

mod channels;
mod resize;
mod session;
mod spdy;
mod status;

#[cfg(any(test, feature = "client"))]
pub use self::status::Status as CommandStatus;
pub(crate) use self::{
    channels::{CLIENT_CHANNELS, over_channels},
    spdy::over_spdy,
};
