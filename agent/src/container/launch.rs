//! Makes container processes through a child process (see [`super::child`]) and
//! takes them over.

use std::{
    fs,
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio as ProcessStdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use nix::unistd::Pid;
use rustix::{
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::{PidfdFlags, pidfd_open},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tracing::debug;

use super::child::{Action, Report, Request};
use crate::{
    reaper::{Exit, Reaper},
    stdio::{ProcessEnds, Stdio},
    sys,
};

/// How long the making of a process may take; emulated machines are slow.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a process could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("start the container helper")]
    Spawn(#[source] io::Error),
    #[error("talk to the container helper")]
    Talk(#[source] io::Error),
    #[error("take over the terminal")]
    Terminal(#[source] io::Error),
    #[error("open process {pid}")]
    OpenProcess {
        pid: i32,
        #[source]
        source: io::Error,
    },
    /// libcontainer's word.
    #[error("{0}")]
    Failed(String),
    /// The command could not be executed.
    #[error("{message}")]
    Exec { message: String, errno: i32 },
    #[error("the container helper ended without an answer")]
    NoAnswer,
    #[error("the container helper gave no answer in time")]
    Timeout,
}

/// A process that the agent has taken over.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) process: Process,
    pub(crate) exit: Exit,
    /// Tells whether the command was executed.
    pub(crate) outcome: ExecOutcome,
}

/// A handle that cannot mean another process when the pid is used again.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    fd: OwnedFd,
}

impl Process {
    /// Sends `signal`; a process that is gone is no error.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        match sys::send_signal(&self.fd, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }
}

/// What to make.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// libcontainer's state directory of the container.
    pub(crate) state: PathBuf,
    pub(crate) action: Action,
    /// The streams of the process.
    pub(crate) stdio: &'a Stdio,
    /// The pipe ends; `None` for a terminal.
    pub(crate) ends: Option<ProcessEnds>,
    /// Where the sockets for terminals lie.
    pub(crate) consoles: PathBuf,
    /// Who shall own the streams.
    pub(crate) uid: u32,
}

/// Makes a process.
pub(crate) async fn launch(reaper: &Reaper, launch: Launch<'_>) -> Result<Launched, LaunchError> {
    let console = match &launch.ends {
        None => Some(Console::bind(&launch.consoles).map_err(LaunchError::Terminal)?),
        Some(_) => None,
    };
    let request = Request {
        state: launch.state,
        console: console.as_ref().map(|c| c.path.clone()),
        action: launch.action,
    };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(LaunchError::Spawn)?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("container-child")
        .env_clear()
        .current_dir("/")
        .stdin(ProcessStdio::from(OwnedFd::from(theirs)))
        .stdout(ProcessStdio::null())
        .stderr(ProcessStdio::null());
    let (helper, helper_exit) = reaper.spawn(&mut command).map_err(LaunchError::Spawn)?;
    // The child's end of the socket must not stay open here.
    drop(command);
    let answer = timeout(
        LAUNCH_TIMEOUT,
        negotiate(reaper, ours, &request, launch.ends, launch.uid),
    )
    .await;
    let launched = match answer {
        Ok(Ok(launched)) => launched,
        Ok(Err(e)) => {
            // It ends by itself; its process, if any, is collected as an orphan.
            let _ = timeout(LAUNCH_TIMEOUT, helper_exit).await;
            return Err(e);
        }
        Err(_) => {
            let _ = nix::sys::signal::kill(helper, nix::sys::signal::Signal::SIGKILL);
            return Err(LaunchError::Timeout);
        }
    };
    let _ = helper_exit.await;
    if let Some(console) = console {
        let attached = async {
            let master = timeout(LAUNCH_TIMEOUT, console.receive()).await??;
            // The slave belongs to who opened it: root.
            let slave = format!("/proc/{}/fd/0", launched.process.pid);
            let _ = std::os::unix::fs::chown(slave, Some(launch.uid), None);
            launch.stdio.set_terminal(master)
        };
        if let Err(e) = attached.await {
            let _ = launched.process.signal(libc::SIGKILL);
            return Err(LaunchError::Terminal(e));
        }
    }
    Ok(launched)
}

/// Opens a process that is there, be it as a zombie.
fn open(pid: i32) -> Result<Process, LaunchError> {
    let fd = rustix::process::Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
        .map_err(|e| LaunchError::OpenProcess {
            pid,
            source: e.into(),
        })?;
    let pid = Pid::from_raw(pid);
    Ok(Process { pid, fd })
}

async fn negotiate(
    reaper: &Reaper,
    socket: std::os::unix::net::UnixStream,
    request: &Request,
    ends: Option<ProcessEnds>,
    uid: u32,
) -> Result<Launched, LaunchError> {
    send_fds(&socket, ends.as_ref(), uid).map_err(LaunchError::Talk)?;
    // The process alone must hold its ends.
    drop(ends);
    socket.set_nonblocking(true).map_err(LaunchError::Talk)?;
    let mut socket = BufReader::new(UnixStream::from_std(socket).map_err(LaunchError::Talk)?);
    let mut line = serde_json::to_vec(request).map_err(|e| LaunchError::Talk(e.into()))?;
    line.push(b'\n');
    socket.write_all(&line).await.map_err(LaunchError::Talk)?;
    let (mut exec_failed, mut detail) = (None, None);
    loop {
        match next_report(&mut socket).await? {
            Some(Report::Started { pid }) => {
                // The helper is still its parent, so it cannot be collected yet.
                let process = open(pid)?;
                let exit = reaper.adopt(process.pid);
                // "Go on": the helper waits for the end of its input.
                socket.shutdown().await.map_err(LaunchError::Talk)?;
                return Ok(Launched {
                    process,
                    exit,
                    outcome: ExecOutcome { socket },
                });
            }
            // The first is the innermost.
            Some(Report::Detail { message }) => detail = detail.or(Some(message)),
            Some(Report::Failed { message }) => {
                let message = match detail {
                    Some(detail) => format!("{message}: {detail}"),
                    None => message,
                };
                return Err(exec_failed.unwrap_or(LaunchError::Failed(message)));
            }
            Some(Report::ExecFailed { message, errno }) => {
                exec_failed = Some(LaunchError::Exec { message, errno });
            }
            None => return Err(exec_failed.unwrap_or(LaunchError::NoAnswer)),
        }
    }
}

async fn next_report(socket: &mut BufReader<UnixStream>) -> Result<Option<Report>, LaunchError> {
    let mut line = String::new();
    match socket.read_line(&mut line).await {
        Ok(0) => Ok(None),
        Ok(_) => serde_json::from_str(&line)
            .map(Some)
            .map_err(|e| LaunchError::Talk(e.into())),
        Err(e) => Err(LaunchError::Talk(e)),
    }
}

/// Whether a waiting process executed its command once it was let go.
#[derive(Debug)]
pub(crate) struct ExecOutcome {
    socket: BufReader<UnixStream>,
}

impl ExecOutcome {
    /// Waits, however long, until the command runs or its process is gone.
    ///
    /// # Errors
    /// [`LaunchError::Exec`] when the command could not be executed.
    pub(crate) async fn wait(mut self) -> Result<(), LaunchError> {
        loop {
            match next_report(&mut self.socket).await? {
                Some(Report::Detail { message }) => debug!(message, "container process"),
                Some(Report::ExecFailed { message, errno }) => {
                    return Err(LaunchError::Exec { message, errno });
                }
                Some(Report::Failed { message }) => return Err(LaunchError::Failed(message)),
                Some(Report::Started { .. }) | None => return Ok(()),
            }
        }
    }
}

/// Sends one byte with the standard streams, if there are any.
fn send_fds(
    socket: &std::os::unix::net::UnixStream,
    ends: Option<&ProcessEnds>,
    uid: u32,
) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let null;
    let fds: Vec<BorrowedFd<'_>>;
    if let Some(ends) = ends {
        let stdin = match &ends.stdin {
            Some(stdin) => stdin.as_fd(),
            None => {
                null = fs::File::open("/dev/null")?;
                null.as_fd()
            }
        };
        let pipes = ends.stdin.iter().chain([&ends.stdout, &ends.stderr]);
        for pipe in pipes {
            // So that a program may open /dev/stdout again.
            std::os::unix::fs::fchown(pipe, Some(uid), None)?;
        }
        fds = vec![stdin, ends.stdout.as_fd(), ends.stderr.as_fd()];
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for the standard streams"));
        }
    }
    sendmsg(
        socket,
        &[IoSlice::new(&[0])],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// A socket on which libcontainer hands a terminal over.
#[derive(Debug)]
struct Console {
    path: PathBuf,
    listener: UnixListener,
}

impl Console {
    fn bind(dir: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(dir)?;
        let path = dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let listener = UnixListener::bind(&path)?;
        Ok(Self { path, listener })
    }

    /// Waits for the terminal's master.
    async fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        loop {
            stream.readable().await?;
            match stream.try_io(tokio::io::Interest::READABLE, || receive_fd(&stream)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 4096];
    recvmsg(
        stream,
        &mut [io::IoSliceMut::new(&mut name)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::other("no terminal in the message"))
}
