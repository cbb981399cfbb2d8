//! What callers ask for and are told, as plain data, and the pure functions over it: nothing here
//! opens a file, speaks with anybody or waits.
//!
//! Read in this order: [`spec`] (what goes in), [`info`] and [`stats`] (what comes out), [`error`] and
//! [`field`] (why not), [`config`] (the node), [`validate`] and [`resources`] (what is refused), [`size`] (of a VM),
//! [`oci`] (the OCI specification of a container).
//!
//! Not here: CRI types, gRPC codes.

#![forbid(unsafe_code)]

pub mod config;
pub mod error;
pub mod field;
pub mod id;
pub mod info;
pub mod oci;
mod path;
pub mod resources;
pub mod signal;
pub mod size;
pub mod spec;
pub mod stats;
pub mod validate;
