//! Pod networks in a network namespace of the test's own that plays the node: with the real CNI
//! plugins (Debian: containernetworking-plugins), and with plugins that misbehave.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod node;
mod real;
mod scripted;
