//! A pod's network on the host: network namespace, CNI, and the tap that takes
//! it into the VM.
//!
//! Read in this order: [`Network`] (set up and tear down), `request` (what a pod
//! asks for), [`cni`] (which network, how plugins are called), `cache` (what they
//! answered, on disk), [`netns`] (the namespace), `view` (what CNI made, read
//! back), `link` (joins it to taps), [`tap`], [`guest`] (what the guest is told), `watch`
//! (what changes later).
//!
//! Deliberately not here: anything about VMs or the agent. The result is a tap
//! and plain values.

#![deny(unsafe_code)]

mod cache;
pub mod cni;
pub mod guest;
mod link;
pub mod netns;
mod request;
mod setup;
pub mod tap;
mod view;
mod watch;

pub use guest::{
    Dns, GuestInterface, GuestNeighbor, GuestNetwork, GuestNextHop, GuestRange, GuestRoute,
    GuestRule,
};
pub use link::{LinkError, MAX_LINKS, PodLink};
pub use request::{PodNetworkRequest, PortMapping, RequestError};
pub use setup::{Network, NetworkConfig, NetworkError, NetworkRecord, PodNetwork};
