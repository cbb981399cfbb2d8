//! The binary around `hull_vmm`: runs one virtual machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_vmm::main()
}
