//! A node under one seed: the daemon's pods, killed at any await and at any change of a file, with VMs,
//! guests, networks, images, disk and clock that fail, hang and come late as the seed says. The same seed
//! is the same run. See docs/ARCHITECTURE.md, and CONTRIBUTING.md for its use.
//!
//! ```text
//! simulate SEED            one seed, with all that happens
//! simulate FIRST COUNT [N] so many seeds, each in a process of its own; ends when N (10) showed a fault
//! ```
//!
//! Read in this order: [`world`] (what a run is), [`kubelet`] (the client, and what must be so),
//! [`daemon`], [`vms`], [`files`] and [`node`] (what it needs), [`host`] and [`kernel`] (how all of it is one thread
//! that can be repeated).

#![expect(
    clippy::unwrap_used,
    reason = "it is a part of tests: what surprises it ends it"
)]

mod common;
mod daemon;
mod dice;
mod files;
mod host;
mod kernel;
mod kubelet;
mod logs;
mod node;
mod report;
mod seeds;
mod trace;
mod vms;
mod world;

// The fake VMM and its guest, here without a process of their own: links to the files of the other example.
mod agent;
mod control;
mod guest;
mod outputs;
mod process;
mod script;
mod streams;
mod wire;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &String| text.parse::<u64>().ok();
    match arguments.as_slice() {
        [quiet, seed] if quiet == "--quiet" => match number(seed) {
            Some(seed) => world::run(seed, false),
            None => usage(),
        },
        [seed] => match number(seed) {
            Some(seed) => world::run(seed, true),
            None => usage(),
        },
        [first, count, most @ ..] if most.len() < 2 => {
            let most = most.first().map_or(Some(10), number);
            match (number(first), number(count), most) {
                (Some(first), Some(count), Some(most)) => seeds::run(first, count, most),
                _ => usage(),
            }
        }
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: simulate SEED, or simulate FIRST COUNT [N]");
    ExitCode::FAILURE
}
