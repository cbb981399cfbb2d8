//! The command line.

use clap::{Parser, Subcommand};

use crate::{config::Flags, images::ImagesCommand, run::RunArgs};

/// Runs every Kubernetes pod in its own microVM.
#[derive(Debug, Parser)]
#[command(name = "hull", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) flags: Flags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the Container Runtime Interface (CRI) until SIGTERM; pods outlive it
    Serve,
    /// Tell whether this host can run microVMs, and if not, why and what to do
    Check {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Run one container in a microVM of its own, print its output, and clean up
    Run(RunArgs),
    /// List, pull, remove, import and export images
    #[command(subcommand)]
    Images(ImagesCommand),
    /// Print the version
    Version,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_for_the_container_follows_two_dashes() {
        let cli = Cli::try_parse_from([
            "hull", "run", "--env", "A=b", "--memory", "64M", "busybox", "--", "sh", "-c", "id",
        ])
        .unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        assert_eq!(run.image, "busybox");
        assert_eq!(run.command, ["sh", "-c", "id"]);
        assert!(Cli::try_parse_from(["hull", "run", "--memory", "lots", "busybox"]).is_err());
        assert!(Cli::try_parse_from(["hull", "run", "--env", "=", "busybox"]).is_err());
    }
}
