//! Has container processes made by a helper (see [`super::child`]) and
//! takes them over.
//!
//! Reports come over a socket that the container's process holds too, so they say what
//! happened, never to which process. That is whom the kernel lists as the helper's child.

use std::{
    fs,
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::fchown, net::UnixStream as StdStream},
    },
    process::{Command, Stdio as ProcessStdio},
    sync::Arc,
    time::Duration,
};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::timeout,
};

use super::{
    cgroup::Cgroup,
    child::{Action, REPORT_SIZE, Report, Request},
    descriptors,
};
use crate::{
    pidfd::Process,
    reaper::{Exit, Reaper},
    stdio::{ProcessEnds, Stdio},
};

/// How long the making of a process may take; emulated machines are slow.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);
/// Most reports about one process.
const REPORTS: u32 = 256;

/// Why a process could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("start the container helper")]
    Spawn(#[source] io::Error),
    #[error("talk to the container helper")]
    Talk(#[source] io::Error),
    #[error("take over the terminal")]
    Terminal(#[source] io::Error),
    #[error("find the process that the container helper made")]
    Find(#[source] io::Error),
    #[error("wait for the process that the container helper made")]
    Adopt(#[source] io::Error),
    #[error("more than {REPORTS} reports from the container helper")]
    Talkative,
    /// The helper's or the process's word.
    #[error("{0}")]
    Failed(String),
    /// The command could not be executed.
    #[error("{message}")]
    Exec { message: String, errno: i32 },
    #[error("the process ended and could not say why: does its seccomp profile allow too little?")]
    NoAnswer,
    #[error("the kernel ended the process for lack of memory: is the container's limit too low?")]
    NoMemory,
    #[error("the container helper gave no answer in time")]
    Timeout,
}

/// A process that the agent has taken over. It waits at its gate.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) process: Process,
    pub(crate) exit: Exit,
    pub(crate) gate: Gate,
    /// Tells whether the command was executed.
    pub(crate) outcome: ExecOutcome,
}

/// What a process waits at before its command. It gives up when this is dropped.
#[derive(Debug)]
pub(crate) struct Gate(StdStream);

impl Gate {
    /// Lets the process execute its command.
    pub(crate) fn open(mut self) -> io::Result<()> {
        self.0.write_all(&[0])
    }
}

/// What to make.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) action: Action,
    /// Where it is made.
    pub(crate) cgroup: &'a Cgroup,
    /// Copies of mounts, as `action` has them.
    pub(crate) trees: Vec<OwnedFd>,
    /// Those whose namespaces it joins, as `action` has them.
    pub(crate) joins: Vec<Arc<Process>>,
    /// The streams of the process.
    pub(crate) stdio: &'a Stdio,
    /// The pipe ends; `None` for a terminal.
    pub(crate) ends: Option<ProcessEnds>,
    /// Who shall own the streams.
    pub(crate) uid: u32,
}

/// Makes a process.
pub(crate) async fn launch(reaper: &Reaper, launch: Launch<'_>) -> Result<Launched, LaunchError> {
    let (ours, theirs) = StdStream::pair().map_err(LaunchError::Spawn)?;
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
    let oom_kills = launch.cgroup.oom_kills();
    let making = Making {
        reaper,
        helper: &helper,
        cgroup: launch.cgroup,
        trees: &launch.trees,
        joins: &launch.joins,
        stdio: launch.stdio,
        uid: launch.uid,
    };
    let negotiated = making.negotiate(ours, launch.action, launch.ends);
    match timeout(LAUNCH_TIMEOUT, negotiated).await {
        Ok(Ok(launched)) => {
            let _ = helper_exit.await;
            Ok(launched)
        }
        Ok(Err(e)) => {
            // It ends by itself, and its process, which is not let go, does too.
            let _ = timeout(LAUNCH_TIMEOUT, helper_exit).await;
            let is_oom = launch.cgroup.oom_kills() > oom_kills;
            Err(if is_oom { LaunchError::NoMemory } else { e })
        }
        Err(_) => {
            // Nobody else knows it yet.
            if let Ok(process) = made_by(&helper) {
                let _ = process.signal(libc::SIGKILL);
            }
            let _ = helper.signal(libc::SIGKILL);
            Err(LaunchError::Timeout)
        }
    }
}

/// A process that a helper is making.
struct Making<'a> {
    reaper: &'a Reaper,
    helper: &'a Process,
    cgroup: &'a Cgroup,
    trees: &'a [OwnedFd],
    joins: &'a [Arc<Process>],
    stdio: &'a Stdio,
    uid: u32,
}

impl Making<'_> {
    async fn negotiate(
        &self,
        socket: StdStream,
        action: Action,
        ends: Option<ProcessEnds>,
    ) -> Result<Launched, LaunchError> {
        let (gate, key) = StdStream::pair().map_err(LaunchError::Talk)?;
        let request = Request {
            cgroup: self.cgroup.path().to_owned(),
            terminal: ends.is_none(),
            action,
        };
        let streams = Streams::new(ends, self.uid).map_err(LaunchError::Talk)?;
        self.send_fds(&socket, &gate, &streams)
            .map_err(LaunchError::Talk)?;
        // The process alone must hold its ends.
        drop(gate);
        let console = streams.into_console().map_err(LaunchError::Terminal)?;
        let mut reports = Reports::new(socket)?;
        let mut line = serde_json::to_vec(&request).map_err(|e| LaunchError::Talk(e.into()))?;
        line.push(b'\n');
        let socket = &mut reports.socket;
        socket.write_all(&line).await.map_err(LaunchError::Talk)?;
        match reports.next().await? {
            Some(Report::Waiting) => {
                let (process, exit) = self.take_over(console).await?;
                // The helper waits for the end of its input.
                let ended = reports.socket.shutdown().await;
                ended.map_err(LaunchError::Talk)?;
                Ok(Launched {
                    process,
                    exit,
                    gate: Gate(key),
                    outcome: ExecOutcome { reports },
                })
            }
            Some(Report::Failed { message }) => Err(LaunchError::Failed(message)),
            Some(Report::ExecFailed { message, errno }) => {
                Err(LaunchError::Exec { message, errno })
            }
            None => Err(LaunchError::NoAnswer),
        }
    }

    /// Sends the gate, mounts, whom to join, and the streams.
    fn send_fds(&self, socket: &StdStream, gate: &StdStream, streams: &Streams) -> io::Result<()> {
        let mut fds: Vec<BorrowedFd<'_>> = vec![gate.as_fd()];
        fds.extend(self.trees.iter().map(AsFd::as_fd));
        fds.extend(self.joins.iter().map(|joined| joined.as_fd()));
        fds.extend(streams.theirs());
        descriptors::send(socket, &fds)
    }

    /// Takes over the process, which waits. The helper is its parent until it is told to go
    /// on, so it cannot be collected before.
    async fn take_over(&self, console: Option<UnixStream>) -> Result<(Process, Exit), LaunchError> {
        let process = made_by(self.helper).map_err(LaunchError::Find)?;
        if let Some(console) = console {
            let attached = async {
                let master = receive_fd(&console).await?;
                give_terminal(&master, self.uid)?;
                self.stdio.set_terminal(master)
            };
            attached.await.map_err(LaunchError::Terminal)?;
        }
        let exit = self.reaper.adopt(&process).map_err(LaunchError::Adopt)?;
        Ok((process, exit))
    }
}

/// What a process gets as its streams.
enum Streams {
    /// Standard input, output and error.
    Pipes([OwnedFd; 3]),
    /// A socket for the terminal's master, and the other end of it.
    Terminal(StdStream, StdStream),
}

impl Streams {
    fn new(ends: Option<ProcessEnds>, uid: u32) -> io::Result<Self> {
        let Some(ends) = ends else {
            let (ours, theirs) = StdStream::pair()?;
            return Ok(Self::Terminal(ours, theirs));
        };
        let pipes = ends.stdin.iter().chain([&ends.stdout, &ends.stderr]);
        for pipe in pipes {
            // So that a program may open /dev/stdout again.
            fchown(pipe, Some(uid), None)?;
        }
        let stdin = match ends.stdin {
            Some(stdin) => stdin,
            None => fs::File::open("/dev/null")?.into(),
        };
        Ok(Self::Pipes([stdin, ends.stdout, ends.stderr]))
    }

    fn theirs(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Pipes(pipes) => pipes.iter().map(AsFd::as_fd).collect(),
            Self::Terminal(_, theirs) => vec![theirs.as_fd()],
        }
    }

    /// Closes what the process has now.
    fn into_console(self) -> io::Result<Option<UnixStream>> {
        match self {
            Self::Pipes(_) => Ok(None),
            Self::Terminal(ours, _) => {
                ours.set_nonblocking(true)?;
                UnixStream::from_std(ours).map(Some)
            }
        }
    }
}

/// Finds the process that `helper` has made.
fn made_by(helper: &Process) -> io::Result<Process> {
    match helper.children()?.as_slice() {
        [only] => {
            let process = Process::open(*only)?;
            // Else it has ended, and another has its pid.
            if process.stat()?.parent == helper.pid() {
                return Ok(process);
            }
            Err(io::Error::other("it has ended"))
        }
        [] => Err(io::Error::other("there is none")),
        _ => Err(io::Error::other("there are several")),
    }
}

/// Makes `uid` the owner of the terminal behind `master`: it belongs to who opened it, root.
///
/// It is opened through its master. A path would be looked up among the container's mounts,
/// and a descriptor of the process may be anything.
fn give_terminal(master: &OwnedFd, uid: u32) -> io::Result<()> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(master, flags)?;
    fchown(slave, Some(uid), None)
}

/// What is heard about one process. Also the container's process can send it, until its
/// `execve`: it is bounded.
#[derive(Debug)]
struct Reports {
    socket: BufReader<UnixStream>,
    /// How many more are heard.
    left: u32,
}

impl Reports {
    fn new(socket: StdStream) -> Result<Self, LaunchError> {
        socket.set_nonblocking(true).map_err(LaunchError::Talk)?;
        let socket = UnixStream::from_std(socket).map_err(LaunchError::Talk)?;
        Ok(Self {
            socket: BufReader::new(socket),
            left: REPORTS,
        })
    }

    /// Waits for one more; `None`: all who could send some are gone.
    async fn next(&mut self) -> Result<Option<Report>, LaunchError> {
        self.left = self.left.checked_sub(1).ok_or(LaunchError::Talkative)?;
        let mut line = Vec::new();
        let mut bounded = (&mut self.socket).take(REPORT_SIZE);
        let read = bounded.read_until(b'\n', &mut line).await;
        match read.map_err(LaunchError::Talk)? {
            0 => Ok(None),
            _ => serde_json::from_slice(&line)
                .map(Some)
                .map_err(|e| LaunchError::Talk(e.into())),
        }
    }
}

/// Whether a waiting process executed its command once it was let go.
#[derive(Debug)]
pub(crate) struct ExecOutcome {
    reports: Reports,
}

impl ExecOutcome {
    /// Waits, however long, until the command runs or its process is gone.
    ///
    /// # Errors
    /// [`LaunchError::Exec`] when the command could not be executed.
    pub(crate) async fn wait(mut self) -> Result<(), LaunchError> {
        loop {
            match self.reports.next().await? {
                Some(Report::ExecFailed { message, errno }) => {
                    return Err(LaunchError::Exec { message, errno });
                }
                Some(Report::Failed { message }) => return Err(LaunchError::Failed(message)),
                Some(Report::Waiting) => {}
                None => return Ok(()),
            }
        }
    }
}

/// Waits for the master of a terminal.
async fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let receive = || {
        let fds = descriptors::receive(stream)?;
        let master = fds.into_iter().next();
        master.ok_or_else(|| io::Error::other("there is none"))
    };
    loop {
        stream.readable().await?;
        match stream.try_io(tokio::io::Interest::READABLE, receive) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}
