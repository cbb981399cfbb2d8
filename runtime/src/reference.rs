//! What manual pages, completions, documentation and packages are made of; `examples/reference.rs` writes them.

use clap::CommandFactory;

pub use crate::config::keys::{default_file, table};
pub use crate::exit::EXIT_CODES;
pub use hull_pod::FORMATS;

/// The command line.
#[must_use]
pub fn command() -> clap::Command {
    crate::cli::Cli::command()
}
