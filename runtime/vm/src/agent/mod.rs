//! The guest's agent: how the daemon connects to it, what it asks of it, what the agent tells.
//!
//! The guest is hostile: what comes from it is checked here and turned into types of this crate and
//! `hull-spec`.

pub mod client;
pub mod configure;
pub(crate) mod connect;
pub mod error;
pub mod events;
pub(crate) mod fault;
mod names;
mod processes;
pub mod stats;
pub mod stdio;
pub mod wall_clock;
pub(crate) mod wire;
