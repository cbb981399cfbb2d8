//! The CRI streaming server: exec, attach and port-forward over SPDY/3.1 and WebSocket.
//!
//! A CRI call makes a URL with a token ([`Streaming::exec`] and its siblings); the client then opens
//! that URL and gets its streams, which end at a [`Backend`]. Read in this order: `server` (listener
//! and life), [`backend`] (what is served), `request` and `tokens` (from CRI call to URL),
//! `strangers`, `http` and `negotiate` (from URL to protocol), `channel` and `output` (one stream, in
//! and out), `mux` and `websocket` (many streams over one connection), `exec` and `forward` (what
//! happens on them), `client` (the other side, for tests and tools).
//!
//! Not here: CRI's own types, pods, SPDY's frames (`hull-spdy`).
//!
//! # Bounds
//! A connection holds at most [`Limits::buffered`] bytes that its streams have not taken yet, 16
//! frames of 16 KiB that the client has not taken yet, a buffer of 16 KiB per open stream, 64 KiB of
//! what was read or is being written, and two zlib windows (0.4 MiB): 1.3 MiB for exec and attach,
//! at most 9.3 MiB for port-forward with 512 pairs. A WebSocket adds one message and the parts of
//! it that are put together, at most twice [`Limits::message`]. Who has not shown a token gets
//! 16 KiB of HTTP headers, [`Config::handshake_timeout`], and one of [`Limits::strangers`] places.
//! A client that does not read stops its own connection and nothing else.

#![forbid(unsafe_code)]

mod activity;
pub mod backend;
mod channel;
#[cfg(any(test, feature = "client"))]
pub mod client;
mod config;
mod exec;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod http;
mod mux;
mod negotiate;
mod output;
mod request;
mod server;
mod shared;
mod strangers;
#[cfg(test)]
mod tests;
mod tls;
mod tokens;
mod websocket;

pub use backend::{
    AttachRequest, Backend, BackendError, Duplex, ExecRequest, Exit, PortForwardRequest, Process,
    TerminalSize,
};
pub use channel::{Input, Lost};
pub use config::{Config, Limits, TlsFiles};
pub use output::Output;
pub use request::RequestError;
pub use server::{StartError, Streaming};
