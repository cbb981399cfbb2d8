//! What Hull's end-to-end tests and the demo's CRI client share.
//!
//! [`client`] connects to a CRI socket; [`logs`] reads CRI log files; [`streams`] opens the URLs of
//! exec, attach and port-forward, for the CRI client. The tests
//! themselves are beside this crate's sources, one folder per kind.

#![forbid(unsafe_code)]

pub mod client;
pub mod logs;
pub mod streams;
