//! A node for one test.

mod leftovers;
mod node;
mod registry;
pub mod vm;
mod wait;

pub use hull_tests::client::Pod;
pub use node::{Node, Place};
pub use registry::{BUSYBOX, Fault, FaultyRegistry, NETWORK_TOOLS};
pub use wait::PATIENCE;
