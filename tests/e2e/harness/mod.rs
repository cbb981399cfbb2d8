//! A node for one test.

mod leftovers;
mod node;
mod registry;
pub mod vm;
mod wait;

pub use node::{Node, Place, Pod};
pub use registry::{BUSYBOX, Fault, FaultyRegistry, NETWORK_TOOLS};
pub use wait::PATIENCE;
