//! The command line: what runs one virtual machine, with a daemon or without.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::time::Instant;

use clap::{Parser, Subcommand};
use error_reporter::Report;
use hull_jail::JailError;
use hull_proto_vmm::{ExitReason, ExitReport};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::Mode;
use rustix::process::umask;

use crate::event_loop::{EventLoop, LoopError};
use crate::kvm::device::KvmDevice;
use crate::seccomp::{LISTS, START};
use crate::{direct, exit, jail, log, probe};

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
        /// The user and group to run as, which nobody else has; not root
        #[arg(long)]
        user: u32,
    },
    /// Tells whether this host can run microVMs, by running a very small one
    Probe,
    /// Prints which system calls which threads may make
    #[command(hide = true)]
    Syscalls,
    /// Boots a kernel without a daemon, console on standard output
    Boot(direct::Boot),
}

/// Does what the command line says; returns how that went.
#[must_use]
pub fn main() -> ExitCode {
    abort_on_panic();
    bound_arenas();
    let start = Instant::now();
    match Arguments::parse().command {
        Command::Run {
            id,
            socket,
            exit_report,
            user,
        } => serve(start, &id, &socket, &exit_report, user),
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
        Command::Syscalls => {
            LISTS.iter().for_each(|list| print!("{list}"));
            ExitCode::SUCCESS
        }
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

/// Has the C library's allocator keep one arena for all threads. For another it would look for the number of CPUs,
/// and to give back memory of it, whether the host overcommits: in files that threads can't open by then.
fn bound_arenas() {
    // SAFETY: there is one thread, and the setting is one of mallopt(3).
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } != 1 {
        log::note("the allocator takes no bound of its arenas");
    }
}

fn serve(start: Instant, id: &str, socket: &Path, exit_report: &Path, user: u32) -> ExitCode {
    let report = run(start, socket, exit_report, user).unwrap_or_else(|error| ExitReport {
        reason: ExitReason::VmmError,
        message: Report::new(&error).to_string(),
    });
    log::note(&format!("{id}: {}", report.message));
    match report.reason {
        ExitReason::Stopped | ExitReason::GuestShutdown => ExitCode::SUCCESS,
        ExitReason::GuestPanic | ExitReason::KvmError | ExitReason::VmmError => ExitCode::FAILURE,
    }
}

/// Opens by paths what the VM needs for all of its life, then locks the process in.
fn run(
    start: Instant,
    socket: &Path,
    exit_report: &Path,
    user: u32,
) -> Result<ExitReport, RunError> {
    jail::wait_until_known().map_err(RunError::Unknown)?;
    let mut exit_report = exit::create(exit_report).map_err(RunError::ExitReport)?;
    let report = prepare(start, socket, user).and_then(|mut event_loop| {
        let report = event_loop.run()?;
        // The daemon reads the report when it sees the connection close.
        write_report(&report, &mut exit_report);
        event_loop.close();
        Ok(report)
    });
    report.inspect_err(|error| {
        let report = ExitReport {
            reason: ExitReason::VmmError,
            message: Report::new(error).to_string(),
        };
        write_report(&report, &mut exit_report);
    })
}

fn prepare(start: Instant, socket: &Path, user: u32) -> Result<EventLoop, RunError> {
    // Before there are threads, which inherit it.
    let signal = block_termination().map_err(RunError::Signal)?;
    let directory = socket.parent().filter(|directory| directory.is_absolute());
    let directory = directory.ok_or(RunError::Directory)?;
    let listener = bind(socket).map_err(RunError::Listen)?;
    let kvm = KvmDevice::open();
    let begin = Instant::now();
    jail::enter(user, directory)?;
    let mut event_loop = EventLoop::new(start, begin.elapsed(), kvm)?;
    event_loop.stop_on(signal)?;
    event_loop.listen(listener)?;
    START.apply_by_name()?;
    Ok(event_loop)
}

fn write_report(report: &ExitReport, file: &mut File) {
    if let Err(error) = exit::write(report, file) {
        log::note(&format!("write the exit report: {error}"));
    }
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("wait to be known to who started this process")]
    Unknown(#[source] io::Error),
    #[error("make the exit report")]
    ExitReport(#[source] io::Error),
    #[error("block signals")]
    Signal(#[source] nix::Error),
    #[error("the control socket is in no directory")]
    Directory,
    #[error("listen on control socket")]
    Listen(#[source] io::Error),
    #[error("lock the process in")]
    Jail(#[from] JailError),
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

/// Turns SIGTERM and SIGINT into a readable descriptor.
fn block_termination() -> nix::Result<SignalFd> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}
