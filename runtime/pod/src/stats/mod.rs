//! What pods and containers use.
//!
//! Two sources, which are never mixed in one number:
//!
//! * **The guest** tells about its containers, the network and the disks: what the workload sees.
//!   It is hostile; what it tells is bounded (see `guest::stats`), and times are the host's.
//! * **The host** tells about the pod as a whole ([`HostUsage`]): the CPU time and memory of the
//!   VMM's process with all its threads, so the guest's kernel, the agent and the VMM itself are
//!   in it. This is what the pod costs the node.
//!
//! All pods are asked at once. One whose guest does not answer in time is left out, and for a
//! while it is not asked again: a frozen guest costs the others nothing.

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

pub(crate) mod gather;
pub(crate) mod host;
pub(crate) mod samples;

pub use gather::Scope;
