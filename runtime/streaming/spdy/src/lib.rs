//! Frames of SPDY/3.1, as far as Kubernetes' streaming uses them.
//!
//! Read in this order: [`Frame`], [`Decoder`] (bytes to frames), [`Encoder`] (frames to bytes),
//! `headers` (the compressed block of names and values in some frames), `dictionary`.
//!
//! Not here: sockets, streams and their states, flow control (nobody who speaks this does any).
//! Memory is bounded: a decoder holds what it was fed, at most [`MAX_CONTROL_FRAME`] of it without
//! an answer, and one header block of [`MAX_HEADER_BLOCK`].

#![forbid(unsafe_code)]

// The fuzz target's code, which the tests include, names the crate.
#[cfg(test)]
extern crate self as hull_spdy;

mod decode;
mod dictionary;
mod encode;
mod frame;
mod headers;
#[cfg(test)]
mod tests;

pub use decode::{DecodeError, Decoder};
pub use encode::{EncodeError, Encoder};
pub use frame::{Frame, Headers, status};
pub use headers::HeadersError;

/// The largest control frame that is read, bytes after its first eight.
pub const MAX_CONTROL_FRAME: usize = 16 << 10;
/// The largest header block, uncompressed bytes: it fits into a control frame however it is packed.
pub const MAX_HEADER_BLOCK: usize = 15 << 10;
/// The largest payload of a data frame that the format can tell.
pub const MAX_DATA: usize = (1 << 24) - 1;
/// The largest stream id.
pub const MAX_STREAM: u32 = (1 << 31) - 1;

/// The protocol version in control frames.
const VERSION: u16 = 3;

/// Types of control frames.
mod kind {
    pub(crate) const SYN_STREAM: u16 = 1;
    pub(crate) const SYN_REPLY: u16 = 2;
    pub(crate) const RST_STREAM: u16 = 3;
    pub(crate) const SETTINGS: u16 = 4;
    pub(crate) const PING: u16 = 6;
    pub(crate) const GOAWAY: u16 = 7;
    pub(crate) const HEADERS: u16 = 8;
    pub(crate) const WINDOW_UPDATE: u16 = 9;
}

/// Flags of frames.
mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const UNIDIRECTIONAL: u8 = 2;
}
