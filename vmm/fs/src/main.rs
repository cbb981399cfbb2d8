//! The binary around `hull_fs`: serves files of the host to one virtual machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_fs::main()
}
