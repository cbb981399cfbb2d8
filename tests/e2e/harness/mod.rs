//! A node for one test.

mod leftovers;
mod node;
mod registry;
pub mod vm;

pub use leftovers::Leftovers;
pub use node::{Node, Pod};
pub use registry::{Fault, FaultyRegistry, Registry};

/// The image that most tests use, under a name that only a mirror can serve.
pub const BUSYBOX: &str = "registry.test/demo/busybox:latest";
