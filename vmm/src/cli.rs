//! The command line: what runs one virtual machine, with a daemon or without.

use std::io;
use std::os::unix::net::UnixListener;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::time::Instant;

use clap::{Parser, Subcommand};
use error_reporter::Report;
use hull_proto_vmm::{ExitReason, ExitReport};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};

use crate::event_loop::{EventLoop, LoopError};
use crate::{direct, exit, log, probe};

/// Hull's virtual machine monitor: one process for each pod.
#[derive(Debug, Parser)]
#[command(name = "hull-vmm", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves a control socket; the daemon configures and starts the VM through it
    Run {
        /// The pod's id, so that the process can be told from others
        #[arg(long)]
        id: String,
        /// Where to listen
        #[arg(long)]
        socket: PathBuf,
        /// Where to write why the VM ended
        #[arg(long)]
        exit_report: PathBuf,
    },
    /// Tells whether this host can run microVMs, by running a very small one
    Probe,
    /// Boots a kernel without a daemon, console on standard output
    Boot(direct::Boot),
}

/// Does what the command line says; returns how that went.
#[must_use]
pub fn main() -> ExitCode {
    abort_on_panic();
    let start = Instant::now();
    match Arguments::parse().command {
        Command::Run {
            id,
            socket,
            exit_report,
        } => serve(start, &id, &socket, &exit_report),
        Command::Probe => match probe::run() {
            Ok(()) => {
                println!("/dev/kvm runs microVMs");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("{}", Report::new(&error));
                ExitCode::FAILURE
            }
        },
        Command::Boot(boot) => direct::run(start, &boot),
    }
}

/// Has a panic of any thread end the process: what the others hold may be halfway changed, and a VM
/// that goes on without one of them would only seem to run.
fn abort_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        print(panic);
        process::abort();
    }));
}

fn serve(start: Instant, id: &str, socket: &Path, exit_report: &Path) -> ExitCode {
    let report = run(start, socket, exit_report).unwrap_or_else(|error| {
        let report = ExitReport {
            reason: ExitReason::VmmError,
            message: Report::new(&error).to_string(),
        };
        write_report(&report, exit_report);
        report
    });
    log::note(&format!("{id}: {}", report.message));
    let _ = std::fs::remove_file(socket);
    match report.reason {
        ExitReason::Stopped | ExitReason::GuestShutdown => ExitCode::SUCCESS,
        ExitReason::GuestPanic | ExitReason::KvmError | ExitReason::VmmError => ExitCode::FAILURE,
    }
}

fn run(start: Instant, socket: &Path, exit_report: &Path) -> Result<ExitReport, RunError> {
    // Before there are threads, which inherit it.
    let signal = block_termination().map_err(RunError::Signal)?;
    raise_descriptor_limit();
    let mut event_loop = EventLoop::new(start)?;
    event_loop.stop_on(signal)?;
    let listener = bind(socket).map_err(RunError::Listen)?;
    event_loop.listen(listener)?;
    let report = event_loop.run()?;
    // The daemon reads the report when it sees the connection close.
    write_report(&report, exit_report);
    event_loop.close();
    Ok(report)
}

fn write_report(report: &ExitReport, path: &Path) {
    if let Err(error) = exit::write(report, path) {
        log::note(&format!("write {}: {error}", path.display()));
    }
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("block signals")]
    Signal(#[source] nix::Error),
    #[error("listen on control socket")]
    Listen(#[source] io::Error),
    #[error("run event loop")]
    Loop(#[from] LoopError),
}

/// Listens on a socket that only its owner can connect to.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let old = umask(Mode::XUSR | Mode::RWXG | Mode::RWXO);
    let listener = UnixListener::bind(path);
    umask(old);
    listener
}

/// Takes as many file descriptors as the process may have: each layer of an image is one.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let limit = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::note(&format!("raise RLIMIT_NOFILE: {error}"));
    }
}

/// Turns SIGTERM and SIGINT into a readable descriptor.
fn block_termination() -> nix::Result<SignalFd> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}
