//! One pod's VM as the daemon deals with it: its VMM process, the sockets of VMM and guest, and who
//! answers behind them.
//!
//! Read in this order: [`rundir`] (where its files are), [`process`] and [`identity`] (VMM and file
//! server as processes), [`cgroup`], [`client`] (the control socket), [`slots`], [`agent`] (the guest's
//! agent: calls, events, streams).
//!
//! What comes from VMM and guest is checked here and turned into types of ours; types of the two
//! contracts go no further than this crate and what `hull-pod` asks for.
//!
//! Not here: what a pod is, and what happens to it when.

#![forbid(unsafe_code)]
// Nothing that a guest or a VMM sends makes the daemon panic or a number wrong.
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

pub mod agent;
pub mod cgroup;
pub mod client;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod identity;
pub mod process;
pub mod rundir;
pub mod slots;
