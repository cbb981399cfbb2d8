//! `hull-vmm boot`: a VM without a daemon, to try kernels and to measure.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use error_reporter::Report;
use hull_proto_vmm::{DeviceConfig, ExitReason, ExitReport, Extent, FdIndex, Metrics, VmConfig};

use crate::event_loop::{EventLoop, LoopError};
use crate::fds::Fds;
use crate::kvm::device::KvmDevice;
use crate::seccomp::START;

const SLOT_VSOCK: u8 = 0;
const SLOT_RNG: u8 = 1;
const SLOT_ROOT: u8 = 2;
const SLOT_FIRST_DISK: u8 = 4;

/// What to boot.
#[derive(Debug, Args)]
pub struct Boot {
    /// An uncompressed ELF kernel (vmlinux)
    #[arg(long)]
    kernel: PathBuf,
    /// An uncompressed initrd
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// An EROFS image for /
    #[arg(long)]
    root: Option<PathBuf>,
    /// A disk image; with `:ro` at the end it is read-only
    #[arg(long)]
    disk: Vec<String>,
    /// Memory in MiB
    #[arg(long, default_value_t = 128)]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// CPUs that the kernel starts itself (all)
    #[arg(long)]
    boot_cpus: Option<u8>,
    /// Added to the kernel's command line
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Show the kernel's messages
    #[arg(long)]
    serial: bool,
    /// Listen here for connections to the guest's vsock ports
    #[arg(long)]
    vsock: Option<PathBuf>,
    /// A control socket, e.g. to attach devices
    #[arg(long)]
    socket: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error("open {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("listen on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("duplicate standard output")]
    Output(#[source] io::Error),
    #[error(transparent)]
    Loop(#[from] LoopError),
}

/// Boots and waits for the end.
pub fn run(start: Instant, boot: &Boot) -> ExitCode {
    match boot_and_wait(start, boot) {
        Ok((report, metrics)) => {
            eprintln!("hull-vmm: {:?}: {}", report.reason, report.message);
            print(&metrics);
            match report.reason {
                ExitReason::Stopped | ExitReason::GuestShutdown => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("hull-vmm: {}", Report::new(&error));
            ExitCode::FAILURE
        }
    }
}

fn boot_and_wait(start: Instant, boot: &Boot) -> Result<(ExitReport, Metrics), BootError> {
    let mut fds = FdList::default();
    let config = configure(boot, &mut fds)?;
    let mut event_loop = EventLoop::new(start, Duration::ZERO, KvmDevice::open())?;
    if let Some(path) = &boot.socket {
        event_loop.listen(listen(path)?)?;
    }
    START.apply_by_name().map_err(LoopError::from)?;
    event_loop.boot(&config, &Fds::new(fds.0))?;
    let report = event_loop.run()?;
    event_loop.close();
    Ok((report, event_loop.metrics()))
}

fn configure(boot: &Boot, fds: &mut FdList) -> Result<VmConfig, BootError> {
    let kernel = fds.add(open(&boot.kernel, true)?);
    let initrd = match &boot.initrd {
        Some(path) => Some(fds.add(open(path, true)?)),
        None => None,
    };
    let mut devices = vec![(SLOT_RNG, DeviceConfig::Rng)];
    let mut cmdline = String::new();
    if let Some(path) = &boot.root {
        cmdline.push_str("root=/dev/vda rootfstype=erofs ro init=/init ");
        devices.push((SLOT_ROOT, disk(fds, path, true)?));
    }
    cmdline.push_str(&boot.cmdline);
    for (slot, spec) in (SLOT_FIRST_DISK..).zip(&boot.disk) {
        let (path, readonly) = match spec.strip_suffix(":ro") {
            Some(path) => (path, true),
            None => (spec.as_str(), false),
        };
        devices.push((slot, disk(fds, Path::new(path), readonly)?));
    }
    if let Some(path) = &boot.vsock {
        let listener = fds.add(listen(path)?);
        devices.push((SLOT_VSOCK, DeviceConfig::Vsock { cid: 3, listener }));
    }
    let serial = if boot.serial {
        Some(
            fds.add(
                io::stdout()
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(BootError::Output)?,
            ),
        )
    } else {
        None
    };
    Ok(VmConfig {
        vcpus: boot.cpus,
        boot_vcpus: boot.boot_cpus.unwrap_or(boot.cpus),
        memory_mib: boot.memory,
        pluggable: None,
        kernel,
        initrd,
        cmdline,
        serial,
        devices,
    })
}

#[derive(Debug, Default)]
struct FdList(Vec<OwnedFd>);

impl FdList {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex(self.0.len() as u32 - 1)
    }
}

fn disk(fds: &mut FdList, path: &Path, readonly: bool) -> Result<DeviceConfig, BootError> {
    let file = open(path, readonly)?;
    let length = file
        .metadata()
        .map_err(|source| BootError::Open {
            path: path.to_owned(),
            source,
        })?
        .len();
    let serial: String = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .chars()
        .take(20)
        .collect();
    let extents = vec![Extent {
        file: fds.add(file),
        offset: 0,
        length,
    }];
    Ok(DeviceConfig::Block {
        serial,
        readonly,
        extents,
    })
}

fn open(path: &Path, readonly: bool) -> Result<File, BootError> {
    File::options()
        .read(true)
        .write(!readonly)
        .open(path)
        .map_err(|source| BootError::Open {
            path: path.to_owned(),
            source,
        })
}

fn listen(path: &Path) -> Result<UnixListener, BootError> {
    // What the last run left: none can remove it when it ends, since it may call that no more.
    if path
        .symlink_metadata()
        .is_ok_and(|it| it.file_type().is_socket())
    {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path);
    listener.map_err(|source| BootError::Listen {
        path: path.to_owned(),
        source,
    })
}

fn print(metrics: &Metrics) {
    for (phase, nanoseconds) in &metrics.start_ns {
        eprintln!("start {phase}: {} us", nanoseconds / 1000);
    }
    for (reason, count) in metrics.exits.iter().filter(|(_, count)| *count > 0) {
        eprintln!("exits {reason}: {count}");
    }
    for device in &metrics.devices {
        eprintln!("{device:?}");
    }
}
