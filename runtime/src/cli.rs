//! The command line.

use clap::{Parser, Subcommand};

use crate::{
    config::Flags,
    containers::ContainersCommand,
    images::{
        ImagesCommand, PullArgs,
        login::{LoginArgs, LogoutArgs},
    },
    reset::ResetArgs,
    run::{RestoreArgs, RunArgs},
    runtime_class::RuntimeClassArgs,
    support::SupportArgs,
    table::Output,
};

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
        #[command(flatten)]
        output: Output,
    },
    /// Run one container in a microVM of its own, and clean up when it has ended
    Run(Box<RunArgs>),
    /// Start a pod that goes on from a checkpoint, any number of times; the daemon has it until `hull rm -f`
    Restore(RestoreArgs),
    #[command(flatten)]
    Containers(ContainersCommand),
    /// Pull an image and print its id, as `hull images pull` does
    Pull(PullArgs),
    /// Keep a name and a password for a registry, where docker keeps them; pull and run use them
    Login(LoginArgs),
    /// Forget what login kept
    Logout(LogoutArgs),
    /// List, pull, remove, import and export images
    #[command(subcommand)]
    Images(ImagesCommand),
    /// Print or check the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Measure what an idle pod takes, and print it as RuntimeClasses for Kubernetes
    RuntimeClass(RuntimeClassArgs),
    /// Gather versions, configuration, logs, metrics and states in one archive, without secrets
    Support(SupportArgs),
    /// End and remove all pods of this node, Kubernetes' too; images stay
    Reset(ResetArgs),
    /// Print the version
    Version,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print a file with all keys, their defaults, and what they are for
    Default,
    /// Tell whether the files make sense, and if not, why
    Check,
    /// Print what counts, and which file, flag or variable it comes from
    Show,
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
    fn a_command_for_the_container_follows_the_image() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' '));
        for line in [
            "hull run -it --env A=b --memory 64M busybox -- sh -c id",
            "hull run -m 64M busybox sh -c id",
        ] {
            let Command::Run(run) = parse(line).unwrap().command else {
                panic!("not run");
            };
            assert_eq!(run.image(), "busybox");
            assert_eq!(run.command(), ["sh", "-c", "id"]);
        }
        for line in [
            "hull ps -o json",
            "hull images list --output table",
            "hull stats -o json",
            "hull events -o json",
            "hull inspect -o table x",
            "hull check -o json",
            "hull checkpoint web ./web",
            "hull restore ./web --name other --no-start",
            "hull suspend web ./web",
            "hull resume ./web",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "hull run",
            "hull run --memory lots busybox",
            "hull run --env = busybox",
            "hull run --name a/b busybox",
            "hull run -p 80 busybox",
            "hull exec container",
            "hull checkpoint web",
            "hull restore",
            "hull suspend web",
            "hull resume",
            "hull restore ./web --name a/b",
            "hull stop",
            "hull rm -f",
            "hull port-forward container",
            "hull ps -q -o json",
            "hull ps -o yaml",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
