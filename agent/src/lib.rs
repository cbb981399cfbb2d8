//! `hull-agent`: PID 1 of a pod's microVM.
//!
//! It brings the guest up ([`boot`], [`apparmor`]), gives it its identity ([`sandbox`],
//! [`network`]), attaches what the host plugs in ([`mmio`], [`storage`]), copies
//! volumes that change ([`atomic_volumes`]), runs containers ([`container`]) and carries
//! their bytes ([`stdio`]). The host speaks to it in the contract of
//! `proto/agent` ([`rpc`], [`events`], [`stats`]) over vsock ([`transport`]).
//! [`reaper`] is the only place that waits for processes, [`pidfd`] what they are known by.
//!
//! The program has one thread for all of this, and more only for what may wait for a
//! disk or device ([`blocking`]). Whatever has to fork does so in a child process: this
//! program itself, called with another first argument ([`container::child`],
//! [`container::pause`]).
//!
//! Not here: anything that needs another program in the guest. There is none.
//!
//! Outside of a guest, `hull-agent --listen unix:DIR` serves the same contract
//! on `DIR/rpc.sock` and `DIR/stream.sock`, for tests in a pid and mount
//! namespace of their own. `--listen vsock:CID` is what a guest's PID 1 does, for a
//! host with that context id: a test has only vsock's loopback.

#![deny(unsafe_code)]

mod apparmor;
mod atomic_volumes;
mod blocking;
mod boot;
mod container;
mod events;
mod ident;
mod layout;
mod log;
mod memory;
mod mmio;
mod network;
mod pidfd;
mod reaper;
mod rpc;
mod sandbox;
mod shutdown;
mod stats;
mod stdio;
mod storage;
#[expect(
    unsafe_code,
    reason = "system calls without a safe wrapper, each documented"
)]
mod sys;
mod time;
mod transport;
mod tree;
mod trim;

use std::{
    env,
    error::Error,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use error_reporter::Report;
use hull_proto_agent::{RPC_PORT, STREAM_PORT, rpc as contract};
use tokio::sync::Notify;
use tokio_vsock::VMADDR_CID_HOST;
use tracing::{error, info, warn};

use self::{
    apparmor::AppArmor,
    atomic_volumes::AtomicVolumes,
    container::{
        Containers, Context, HugePages, child,
        pause::{self, PodNamespaces},
    },
    layout::Layout,
    memory::Memory,
    mmio::Slots,
    reaper::Reaper,
    rpc::Service,
    sandbox::Sandbox,
    stdio::{server, shell::Shells},
    storage::Storages,
    transport::Listener,
};

/// On the root of guests that may be entered: their shell, and all of its tools.
const SHELL: &str = "/debug/busybox";

/// How the program was called.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// As PID 1 of a guest, whose host has the context id `host`.
    Guest {
        host: u32,
    },
    /// For tests: Unix sockets in `dir`.
    Test {
        dir: PathBuf,
    },
    /// As the helper that makes a container's process.
    Child,
    PauseOpener(Vec<String>),
    Pause,
    Version,
    Wrong,
}

fn call(mut args: impl Iterator<Item = String>) -> Call {
    match args.next().as_deref() {
        Some("container-child") => Call::Child,
        Some("pause-opener") => Call::PauseOpener(args.collect()),
        // PID 1 too, of the pod's pid namespace.
        Some("pause") => Call::Pause,
        Some("--version") => Call::Version,
        Some("--listen") => listen(&args.next().unwrap_or_default()),
        // The kernel hands on words of its command line that it does not know.
        _ if std::process::id() == 1 => Call::Guest {
            host: VMADDR_CID_HOST,
        },
        _ => Call::Wrong,
    }
}

fn listen(address: &str) -> Call {
    match address.split_once(':') {
        Some(("unix", dir)) => Call::Test {
            dir: PathBuf::from(dir),
        },
        Some(("vsock", host)) => host
            .parse()
            .map_or(Call::Wrong, |host| Call::Guest { host }),
        _ => Call::Wrong,
    }
}

/// Runs the agent, or the part of it that the arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let kernel_ns = time::boot_ns();
    match call(env::args().skip(1)) {
        Call::Child => child::main(),
        Call::PauseOpener(args) => pause::opener(&args),
        Call::Pause => pause::init(),
        Call::Version => {
            println!("hull-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Call::Wrong => {
            eprintln!(
                "usage: hull-agent [--version | --listen unix:DIR | --listen vsock:CID]; in a guest it is /init"
            );
            ExitCode::FAILURE
        }
        Call::Guest { host } => finish(guest(kernel_ns, host)),
        Call::Test { dir } => finish(outside(kernel_ns, &dir)),
    }
}

type AnyError = Box<dyn Error>;

fn finish(result: Result<(), AnyError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let message = Report::new(e.as_ref());
            error!("{message}");
            eprintln!("hull-agent: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The life of PID 1. When it returns, the kernel panics and so ends the VM.
fn guest(kernel_ns: u64, host: u32) -> Result<(), AnyError> {
    boot::mount_all()?;
    log::start(true);
    boot::limits();
    boot::kernel_limits();
    let layout = Layout::default();
    boot::cgroups(&layout)?;
    let apparmor = AppArmor::of_guest()?;
    run(
        kernel_ns,
        layout,
        apparmor,
        SHELL.as_ref(),
        Some(host),
        || {
            let rpc = Listener::vsock(RPC_PORT, host)?;
            Ok((rpc, Listener::vsock(STREAM_PORT, host)?))
        },
    )?;
    shutdown::stop();
    Ok(())
}

/// The same on a machine that has other things to do.
fn outside(kernel_ns: u64, dir: &Path) -> Result<(), AnyError> {
    log::start(false);
    boot::limits();
    // Agents of several tests share one machine.
    let own = dir.file_name().unwrap_or_default().to_string_lossy();
    let name = format!("hull-{}", own.trim_start_matches('.'));
    let layout = Layout::new(dir.join("run"), name);
    boot::cgroups(&layout)?;
    // That of the machine is not the agent's.
    let apparmor = AppArmor::default();
    run(
        kernel_ns,
        layout,
        apparmor,
        &dir.join("busybox"),
        None,
        || {
            let rpc = Listener::unix(&dir.join("rpc.sock"))?;
            Ok((rpc, Listener::unix(&dir.join("stream.sock"))?))
        },
    )
}

/// Serves the host, which has this context id, until it asks for the end. Without one this is no guest.
/// `shell` is the program of shells in the guest itself, if it is there.
fn run(
    kernel_ns: u64,
    layout: Layout,
    apparmor: AppArmor,
    shell: &Path,
    host: Option<u32>,
    listen: impl FnOnce() -> Result<(Listener, Listener), AnyError>,
) -> Result<(), AnyError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let reaper = Arc::new(Reaper::default());
        let reaping = tokio::spawn(Arc::clone(&reaper).run());
        let pod: Arc<PodNamespaces> = Arc::default();
        let context = Arc::new(Context {
            storages: Storages::new(layout.clone(), Slots::default()),
            atomic_volumes: Arc::new(AtomicVolumes::new(layout.atomic_volumes())),
            huge_pages: Arc::new(HugePages::new(&layout.pod_cgroup())),
            layout: layout.clone(),
            apparmor: Arc::new(apparmor),
            reaper: Arc::clone(&reaper),
            events: Arc::default(),
            pod: Arc::clone(&pod),
        });
        let containers = Arc::new(Containers::new(Arc::clone(&context)));
        let shells = Shells::new(shell, layout.clone(), Arc::clone(&reaper));
        let (rpc, streams) = listen()?;
        tokio::spawn(server::serve(
            streams,
            Arc::clone(&containers) as Arc<_>,
            Arc::new(shells),
        ));
        let stop = Arc::new(Notify::new());
        let service = Service {
            context,
            containers,
            memory: Memory::follow(&layout.pod_cgroup(), host),
            sandbox: Arc::new(Sandbox::new(layout, pod, Arc::clone(&reaper))),
            stats: Arc::default(),
            kernel_ns,
            ready_ns: time::boot_ns(),
            stop: Arc::clone(&stop),
        };
        let mut server = ttrpc::r#async::Server::new()
            .add_listener(rpc.into_ttrpc())
            .register_service(contract::create_agent(Arc::new(service)));
        server.start().await?;
        info!("listening");
        tokio::spawn(async {
            if let Err(error) = network::loopback().await {
                warn!(error = &error as &dyn Error, "set up loopback");
            }
        });
        tokio::select! {
            () = stop.notified() => {}
            ended = reaping => {
                ended??;
            }
        }
        // Time for the answer to reach the host.
        tokio::time::sleep(shutdown::LAST_WORDS).await;
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn called(args: &[&str]) -> Call {
        call(args.iter().map(|a| (*a).to_owned()))
    }

    #[test]
    fn the_first_argument_names_the_part() {
        assert_eq!(called(&["pause"]), Call::Pause);
        assert_eq!(called(&["container-child"]), Call::Child);
        assert_eq!(called(&[]), Call::Wrong);
        assert_eq!(called(&["--listen", "tcp:1"]), Call::Wrong);
        assert_eq!(
            called(&["--listen", "unix:/x"]),
            Call::Test { dir: "/x".into() }
        );
        assert_eq!(called(&["--listen", "vsock:1"]), Call::Guest { host: 1 });
        assert_eq!(called(&["--listen", "vsock:x"]), Call::Wrong);
    }
}
