//! The guest's agent: how the daemon connects to it, what it asks of it, what the agent tells.
//!
//! The guest is hostile: what comes from it is checked here and turned into types of this crate and
//! `hull-spec`.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

pub mod client;
pub mod configure;
pub(crate) mod connect;
pub mod error;
pub mod events;
pub(crate) mod fault;
pub mod stats;
pub mod stdio;
