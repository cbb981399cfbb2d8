//! Makes container processes through a child process (see [`super::child`]) and
//! takes them over.
//!
//! Reports come over a socket that the container's process holds too, so they say what
//! happened, never to which process. That is whom the kernel lists in the cgroup as a
//! child of the helper.

use std::{
    fs,
    io::{self, IoSlice, PipeReader, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::fchown,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio as ProcessStdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    pty::{OpenptFlags, ioctl_tiocgptpeer},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tracing::debug;

use super::{
    cgroup::Cgroup,
    child::{Action, REPORT_SIZE, Report, Request},
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
    #[error("a process whose namespaces it joins has ended")]
    Joined,
    #[error("wait for the process that the container helper made")]
    Adopt(#[source] io::Error),
    #[error("more than {REPORTS} reports from the container helper")]
    Talkative,
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

/// What to make.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// libcontainer's state directory of the container.
    pub(crate) state: PathBuf,
    pub(crate) action: Action,
    /// Where it is made.
    pub(crate) cgroup: &'a Cgroup,
    /// Those whose namespaces it joins. Their pids are in what the helper is told, and mean
    /// them as long as they are there.
    pub(crate) joins: Vec<Arc<Process>>,
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
    let making = Making {
        reaper,
        helper: &helper,
        cgroup: launch.cgroup,
        joins: &launch.joins,
        stdio: launch.stdio,
        console: console.as_ref(),
        uid: launch.uid,
    };
    let answer = timeout(
        LAUNCH_TIMEOUT,
        making.negotiate(ours, &request, launch.ends),
    )
    .await;
    match answer {
        Ok(Ok(launched)) => {
            let _ = helper_exit.await;
            Ok(launched)
        }
        Ok(Err(e)) => {
            // It ends by itself, and its process, which is not let go, does too.
            let _ = timeout(LAUNCH_TIMEOUT, helper_exit).await;
            Err(e)
        }
        Err(_) => {
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
    joins: &'a [Arc<Process>],
    stdio: &'a Stdio,
    console: Option<&'a Console>,
    uid: u32,
}

impl Making<'_> {
    async fn negotiate(
        &self,
        socket: std::os::unix::net::UnixStream,
        request: &Request,
        ends: Option<ProcessEnds>,
    ) -> Result<Launched, LaunchError> {
        let (gate, mut key) = io::pipe().map_err(LaunchError::Talk)?;
        send_fds(&socket, &gate, ends.as_ref(), self.uid).map_err(LaunchError::Talk)?;
        // The process alone must hold its ends.
        drop((gate, ends));
        let mut reports = Reports::new(socket)?;
        let mut line = serde_json::to_vec(request).map_err(|e| LaunchError::Talk(e.into()))?;
        line.push(b'\n');
        let socket = &mut reports.socket;
        socket.write_all(&line).await.map_err(LaunchError::Talk)?;
        let mut taken = None;
        let (mut exec_failed, mut detail) = (None, None);
        loop {
            match reports.next().await? {
                Some(Report::Waiting) if taken.is_some() => {}
                Some(Report::Waiting) => {
                    taken = Some(self.take_over().await?);
                    key.write_all(&[0]).map_err(LaunchError::Talk)?;
                }
                Some(Report::Started) => {
                    let (process, exit) = match taken {
                        Some(taken) => taken,
                        None => self.take_over().await?,
                    };
                    // "Go on": the helper waits for the end of its input.
                    let ended = reports.socket.shutdown().await;
                    ended.map_err(LaunchError::Talk)?;
                    return Ok(Launched {
                        process,
                        exit,
                        outcome: ExecOutcome { reports },
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

    /// Takes over the process, which waits. The helper is its parent until it is told to go
    /// on, so it cannot be collected before.
    async fn take_over(&self) -> Result<(Process, Exit), LaunchError> {
        let process = made_by(self.helper, self.cgroup).map_err(LaunchError::Find)?;
        if !self.joins.iter().all(|joined| joined.is_there()) {
            return Err(LaunchError::Joined);
        }
        if let Some(console) = self.console {
            let attached = async {
                let master = console.receive().await?;
                give_terminal(&master, self.uid)?;
                self.stdio.set_terminal(master)
            };
            attached.await.map_err(LaunchError::Terminal)?;
        }
        let exit = self.reaper.adopt(&process).map_err(LaunchError::Adopt)?;
        Ok((process, exit))
    }
}

/// Finds the process in `cgroup` that `helper` has made.
fn made_by(helper: &Process, cgroup: &Cgroup) -> io::Result<Process> {
    let mut made = cgroup.members()?;
    made.retain(|process| process.parent().is_ok_and(|parent| parent == helper.pid()));
    match (made.pop(), made.is_empty()) {
        (Some(only), true) => Ok(only),
        (None, _) => Err(io::Error::other("there is none in the cgroup")),
        (Some(_), false) => Err(io::Error::other("there are several in the cgroup")),
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
    fn new(socket: std::os::unix::net::UnixStream) -> Result<Self, LaunchError> {
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
                Some(Report::Detail { message }) => debug!(message, "container process"),
                Some(Report::ExecFailed { message, errno }) => {
                    return Err(LaunchError::Exec { message, errno });
                }
                Some(Report::Failed { message }) => return Err(LaunchError::Failed(message)),
                Some(Report::Waiting | Report::Started) => {}
                None => return Ok(()),
            }
        }
    }
}

/// Sends one byte with the gate that the process waits at and its standard streams, if there
/// are any.
fn send_fds(
    socket: &std::os::unix::net::UnixStream,
    gate: &PipeReader,
    ends: Option<&ProcessEnds>,
    uid: u32,
) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let null;
    let mut fds: Vec<BorrowedFd<'_>> = vec![gate.as_fd()];
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
            fchown(pipe, Some(uid), None)?;
        }
        fds.extend([stdin, ends.stdout.as_fd(), ends.stderr.as_fd()]);
    }
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for the standard streams"));
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn only_what_the_helper_made_is_taken_over() {
        let script = "sleep 60 & echo $!; sleep 60 & echo $!; wait";
        let spawn = |command: &str, args: &[&str]| {
            let mut command = Command::new(command);
            command.args(args).stderr(ProcessStdio::null());
            let child = command.stdout(ProcessStdio::piped()).spawn();
            let child = child.unwrap();
            let process = Process::open(Pid::from_raw(child.id() as i32)).unwrap();
            (child, process)
        };
        let (mut helper_child, helper) = spawn("sh", &["-c", script]);
        let (mut other_child, other) = spawn("sleep", &["60"]);
        let output = BufReader::new(helper_child.stdout.take().unwrap());
        let made: Vec<_> = output.lines().take(2).map(Result::unwrap).collect();
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::at(dir.path().to_owned());
        let found = |pids: &[&str]| {
            fs::write(dir.path().join("cgroup.procs"), pids.join("\n")).unwrap();
            made_by(&helper, &cgroup)
        };
        // Another container's first process, say.
        let foreign = other.pid().to_string();
        let error = found(&[&foreign]).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
        let found_beside = found(&[&foreign, &made[0]]).unwrap();
        assert_eq!(found_beside.pid().to_string(), made[0]);
        let error = found(&[&made[0], &made[1]]).unwrap_err();
        assert!(error.to_string().contains("several"), "{error}");
        for pid in made {
            let made = Process::open(Pid::from_raw(pid.parse().unwrap()));
            made.unwrap().signal(libc::SIGKILL).unwrap();
        }
        helper_child.wait().unwrap();
        other.signal(libc::SIGKILL).unwrap();
        other_child.wait().unwrap();
    }

    #[tokio::test]
    async fn reports_are_few_and_short() {
        let pair = || std::os::unix::net::UnixStream::pair().unwrap();
        let (ours, mut theirs) = pair();
        theirs.write_all(&vec![b' '; REPORT_SIZE as usize]).unwrap();
        let told = Reports::new(ours).unwrap().next().await;
        assert!(matches!(told, Err(LaunchError::Talk(_))), "{told:?}");

        let (ours, mut theirs) = pair();
        let mut reports = Reports::new(ours).unwrap();
        for _ in 0..REPORTS {
            theirs.write_all(b"\"waiting\"\n").unwrap();
            let told = reports.next().await.unwrap();
            assert!(matches!(told, Some(Report::Waiting)), "{told:?}");
        }
        let told = reports.next().await;
        assert!(matches!(told, Err(LaunchError::Talkative)), "{told:?}");
    }
}
