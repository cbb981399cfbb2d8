//! The binary around `hull_agent`: `/init` of the guest.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_agent::main()
}
