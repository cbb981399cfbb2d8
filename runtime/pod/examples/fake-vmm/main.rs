//! A VMM and a guest that are neither, for the tests of this crate.
//!
//! It is a process of its own, like the real one: it speaks the control protocol, gets its file
//! descriptors by `SCM_RIGHTS`, and serves an agent behind the vsock listener among them. It is the
//! file server too ([`files`]). What
//! is to go wrong stands in the "kernel" file ([`script::Script`]); what a "container" does
//! stands in its arguments ([`process`], [`wire`]).

#![expect(
    clippy::unwrap_used,
    reason = "it is a part of tests: what surprises it ends it"
)]

mod agent;
mod control;
mod files;
mod guest;
mod outputs;
mod process;
mod report;
mod script;
mod streams;
mod wire;

use std::{
    io::{self, Read},
    path::PathBuf,
};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some("run") {
        return;
    }
    let mut socket = None;
    let mut report = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--socket" => socket = arguments.next().map(PathBuf::from),
            "--exit-report" => report = arguments.next().map(PathBuf::from),
            _ => {}
        }
    }
    match report {
        Some(report) => {
            // The daemon that started it has written down which process it is.
            if io::stdin().read_exact(&mut [0]).is_ok() {
                control::serve(&socket.unwrap(), &report).await;
            }
        }
        None => files::serve(&socket.unwrap()).await,
    }
}
