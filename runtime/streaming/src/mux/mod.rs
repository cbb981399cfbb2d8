//! Many streams over one connection, by SPDY/3.1.
//!
//! A reading task hands frames to the streams, a writing task sends theirs; both end with the
//! [`Mux`]. There is no flow control per stream (nobody who speaks this has it): what waits in all
//! streams is bounded, and when they take nothing, nothing is read.

mod connection;
mod reader;
mod shared;
mod stream;
mod writer;

pub use self::stream::StreamSender;
pub(crate) use self::{connection::Mux, shared::Side, stream::Incoming};
