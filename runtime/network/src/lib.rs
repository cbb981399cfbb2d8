//! A pod's network on the host: network namespace, CNI, and the tap that takes
//! it into the VM.
//!
//! Read in this order: [`Network`] (set up and tear down), [`cni`] (which
//! network, how plugins are called), [`netns`] (the namespace), `link` (what CNI
//! made, read back, and joined to the tap), [`tap`], [`guest`] (what the guest
//! is told).
//!
//! Deliberately not here: anything about VMs or the agent. The result is a tap
//! and plain values.

#![deny(unsafe_code)]

pub mod cni;
pub mod guest;
mod link;
pub mod netns;
mod setup;
pub mod tap;

pub use guest::{Dns, GuestInterface, GuestNeighbor, GuestNetwork, GuestRoute};
pub use setup::{
    Network, NetworkConfig, NetworkError, NetworkRecord, PodNetwork, PodNetworkRequest, PortMapping,
};
