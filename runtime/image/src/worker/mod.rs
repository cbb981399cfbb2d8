//! Processes that handle what registries and archives chose: they decompress, read tar streams, merge
//! trees and write disks, with no power but over the descriptors that they are given.
//!
//! ```text
//!             compressed          plain                 data, tree, recipe
//! registry ─▶ daemon ─▶ inflate ─▶ daemon ─▶ unpack ─▶ (files that the daemon made)
//!             hashes              hashes
//! ```
//!
//! The daemon computes all digests itself, of what it hands on. That is why a compressed layer has two
//! workers: one that both decompressed and unpacked could say of any bytes that they are the stream
//! that the configuration names, and what it leaves is used for every image with that layer. As it is,
//! what a lost `unpack` leaves is known by the digest of the very bytes that took it over.
//!
//! A worker serves one job and ends. What it answers is as hostile as what it read: bounded here, and
//! held against what is known. Read in this order: `job` (what is asked and answered), `control` (how
//! that is sent), `process` and `pipes` (the daemon's end), `pace` (when a worker hangs), `serve` (the worker's own
//! code), `jail` (how it locks itself in), `entry` (the process's main function).

mod control;
pub(crate) mod entry;
mod jail;
pub(crate) mod job;
pub(crate) mod pace;
pub(crate) mod pipes;
pub(crate) mod process;
pub(crate) mod serve;
