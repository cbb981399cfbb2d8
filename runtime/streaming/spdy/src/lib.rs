//! Frames of SPDY/3.1, as far as Kubernetes' streaming uses them.
//!
//! Read in this order: [`Frame`], [`Decoder`] (bytes to frames), [`Encoder`] (frames to bytes),
//! `headers` (the compressed block of names and values in some frames), `dictionary`, `wire` (the
//! numbers of the format).
//!
//! Not here: sockets, streams and their states, flow control (nobody who speaks this does any).
//! Memory is bounded: a decoder holds what it was fed, at most [`MAX_CONTROL_FRAME`] of it without
//! an answer, and one header block of [`MAX_HEADER_BLOCK`].

#![forbid(unsafe_code)]

mod decode;
mod dictionary;
mod encode;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod headers;
#[cfg(test)]
mod tests;
mod wire;

pub use decode::{DecodeError, Decoder, MAX_CONTROL_FRAME};
pub use encode::{EncodeError, Encoder};
pub use frame::{Frame, Headers, status};
pub use headers::{HeadersError, MAX_HEADER_BLOCK};
pub use wire::{MAX_DATA, MAX_STREAM};
