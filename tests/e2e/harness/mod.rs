//! A node for one test.

mod leftovers;
mod node;
mod registry;
pub mod vm;

pub use leftovers::Leftovers;
pub use node::{Node, PATIENCE, Place, Pod};
pub use registry::{Fault, FaultyRegistry, Registry};

/// The image that most tests use, under a name that only a mirror can serve.
pub const BUSYBOX: &str = "registry.test/demo/busybox:latest";
/// busybox with the tools of those who set up networks: ip, iptables, nft, ping, socat; and inotifywait.
pub const NETWORK_TOOLS: &str = "registry.test/demo/network:latest";
