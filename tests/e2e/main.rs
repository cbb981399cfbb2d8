//! Whole pods in real microVMs, through the CRI socket of a real daemon.
//!
//! Runs inside the KVM host (`tests/host/run.sh`), as root. Every test has a
//! daemon, a registry, a CNI network and directories of its own (see
//! [`harness::Node`]) and ends by proving that nothing is left on the host.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test stops at the first surprise"
)]

#[path = "../../runtime/tests/collector/mod.rs"]
mod collector;
mod harness;

mod bad_input;
mod checkpoints;
mod command_line;
mod commands;
mod containers;
mod devices;
mod empty_dirs;
mod events;
mod hot_add;
mod images;
mod lifecycle;
mod limits;
mod lists;
mod logs;
mod network;
mod pods;
mod posix;
mod recovery;
mod security;
mod stats;
mod storage;
mod streaming;
mod templates;
mod volumes;
mod within;
