//! The binary around the crate `hull`: the daemon of a node, and a command line.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    hull::main()
}
