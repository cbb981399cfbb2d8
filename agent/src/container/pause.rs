//! The pod's shared pid namespace, held by a process that does nothing else.
//!
//! It is made when the first container asks for it: [`opener`] makes a pid
//! namespace and in it [`init`], which collects orphans and so lives as long as
//! the pod.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    os::{fd::AsFd, fd::OwnedFd},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask},
    unistd::Pid,
};
use rustix::process::{WaitOptions, wait};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    sync::Mutex,
    time::timeout,
};
use tracing::warn;

use crate::reaper::Reaper;

/// How long the process may take to be there.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// The pod's pid namespace.
#[derive(Debug, Default)]
pub(crate) struct PodPid(Mutex<Option<Pid>>);

impl PodPid {
    /// Returns the first process of the namespace; makes it when there is none.
    pub(crate) async fn get(&self, reaper: &Reaper) -> io::Result<Pid> {
        let mut pid = self.0.lock().await;
        if let Some(pid) = *pid {
            return Ok(pid);
        }
        let started = timeout(START_TIMEOUT, start(reaper)).await??;
        *pid = Some(started);
        Ok(started)
    }
}

async fn start(reaper: &Reaper) -> io::Result<Pid> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("pause-opener")
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let (_, opener) = reaper.spawn(&mut command)?;
    drop(command);
    ours.set_nonblocking(true)?;
    let mut socket = tokio::io::BufReader::new(tokio::net::UnixStream::from_std(ours)?);
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    let pid =
        line.trim().parse().map(Pid::from_raw).map_err(|_| {
            io::Error::other(format!("make the pod's pid namespace: {}", line.trim()))
        })?;
    let exit = reaper.adopt(pid);
    socket.shutdown().await?;
    let _ = opener.await;
    tokio::spawn(async move {
        if let Ok(status) = exit.await {
            warn!(?status, "the pod's pid namespace is gone");
        }
    });
    Ok(pid)
}

/// Makes the namespace and its first process, and tells the pid on the socket
/// that is standard input; ends when that is closed.
pub(crate) fn opener() -> ExitCode {
    let result = || -> io::Result<()> {
        let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let made = unshare(CloneFlags::CLONE_NEWPID)
            .map_err(io::Error::from)
            .and_then(|()| {
                Command::new("/proc/self/exe")
                    .arg("pause")
                    .env_clear()
                    .stdin(Stdio::null())
                    .spawn()
            });
        match made {
            Ok(child) => writeln!(&socket, "{}", child.id())?,
            Err(e) => writeln!(&socket, "{e}")?,
        }
        BufReader::new(socket).read_line(&mut String::new())?;
        Ok(())
    };
    result().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

/// The first process of the namespace: collects what ends, for ever.
pub(crate) fn init() -> ExitCode {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let blocked = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None);
    if blocked.is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {}
        if children.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
