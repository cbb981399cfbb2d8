//! A pod's network on the host: network namespace, CNI, and the tap that takes
//! it into the VM.
//!
//! Read in this order: [`Network`] (set up and tear down), `request` (what a pod
//! asks for), [`cni`] (which network, how plugins are called), `record` and `cache` (what
//! is known of it, and kept on disk), [`netns`] (the namespace), `netlink`, `view` (what CNI
//! made, read back), `link` (joins it to taps), [`tap`], [`guest`] (what the guest is told),
//! `watch` (what changes later).
//!
//! Deliberately not here: anything about VMs or the agent. The result is a tap
//! and plain values.

#![deny(unsafe_code)]

mod cache;
pub mod cni;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guest;
mod link;
mod netlink;
pub mod netns;
mod record;
mod request;
mod setup;
pub mod tap;
mod view;
mod watch;

pub use guest::{
    Dns, GuestInterface, GuestNeighbor, GuestNetwork, GuestNextHop, GuestRange, GuestRoute,
    GuestRule,
};
pub use link::{MAX_LINKS, PodLink};
pub use netlink::LinkError;
pub use record::NetworkRecord;
pub use request::{PodNetworkRequest, PortMapping, RequestError};
pub use setup::{Network, NetworkConfig, NetworkError, PodNetwork};
