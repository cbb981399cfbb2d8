//! A pod's VM as the daemon sees it: the processes of VMM and file server, the VMM's control socket,
//! and the guest's agent.
//!
//! Read in this order: [`rundir`] (where a pod's files are), [`process`] and [`identity`] (VMM and file
//! server as processes), [`cgroup`], [`client`] (the control socket), [`slots`] (of devices), [`agent`]
//! (calls, events, streams); [`pagemap`] stands alone.
//!
//! Everything that VMM and guest send is checked here and turned into types of this crate or
//! `hull-spec`. Requests have the types of the contracts; `hull-pod` fills them in.
//!
//! Not here: containers, a pod's lifecycle, and when a VM is started and ended.

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
pub mod pagemap;
pub mod process;
pub mod rundir;
pub mod running;
pub mod slots;
