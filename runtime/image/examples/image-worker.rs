//! The process that handles what registries and archives chose, as a program of its own: for tests,
//! whose own program it can't be.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A runner of tests asks it which tests it has.
    hull_image::worker(std::env::args_os()).unwrap_or(ExitCode::SUCCESS)
}
