//! The command line: the manager, and the server that it starts.

use std::panic;
use std::path::PathBuf;
use std::process::{self, ExitCode};

use clap::{Parser, Subcommand};
use error_reporter::Report;

use crate::seccomp::LISTS;
use crate::{manager, server};

/// Hull's file server: one process for each pod that mounts paths of the host
#[derive(Debug, Parser)]
#[command(name = "hull-fs", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the VM whose socket is standard input; the daemon says what
    Run {
        /// The pod's id, so that the process can be told from others
        #[arg(long)]
        id: String,
        /// Where to listen for the daemon
        #[arg(long)]
        socket: PathBuf,
        /// A directory of cgroup v2 to be in
        #[arg(long)]
        cgroup: Option<PathBuf>,
    },
    /// Prints which system calls which threads may make
    #[command(hide = true)]
    Syscalls,
    /// The part that faces the guest; started by `run`
    #[command(hide = true)]
    Serve {
        /// An existing directory that becomes the root, in a namespace of its own
        #[arg(long)]
        root: PathBuf,
    },
}

/// Does what the command line says; returns how that went.
#[must_use]
pub fn main() -> ExitCode {
    abort_on_panic();
    let (who, error) = match Arguments::parse().command {
        Command::Run { id, socket, cgroup } => match manager::run(&socket, cgroup.as_deref()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (id, Report::new(error).to_string()),
        },
        Command::Syscalls => {
            LISTS.iter().for_each(|list| print!("{list}"));
            return ExitCode::SUCCESS;
        }
        Command::Serve { root } => match server::run(&root) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => ("server".to_owned(), Report::new(error).to_string()),
        },
    };
    eprintln!("hull-fs: {who}: {error}");
    ExitCode::FAILURE
}

/// Has a panic of any thread end the process: a server that goes on without one of them would leave
/// requests of the guest unanswered.
fn abort_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        print(panic);
        process::abort();
    }));
}
