//! Makes one process of a container, in a program of its own: forking, joining
//! namespaces and changing the user are not for a process with threads.
//!
//! ```text
//! agent ── request + descriptors ──▶ helper ── forks ──▶ the process, in its container
//!       ◀── "waiting" ───────────────────────────────────────┤
//!       ── go on ──────────────────▶ ends; its process       │
//!                                    becomes the agent's     │
//!       ── a byte through the gate ─────────────────────────▶│
//!       ◀── {"exec_failed":…}, or the end of the socket: it runs
//! ```
//! What happens to the process on the way is in [`super::make`]. It holds the socket until its
//! `execve` closes it, so the agent learns whether the command could be executed, and why not.
//!
//! No command runs before the agent has taken its process over: all wait at the gate, the first one
//! of a container until its start.
//!
//! The helper is in the container's cgroup, and what is done to all in there is done to it.
//!
//! In the container's namespaces, but before its `execve`, the process has powers and files
//! that others there must not get at. It is not dumpable, which none of the calls that change
//! credentials undoes, and so belongs to the guest's root for all who would trace it.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use error_reporter::Report as Reason;
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_dumpable,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::ForkResult,
};
use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Process as OciProcess, Spec};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::{
    descriptors,
    make::{
        Attributes, Container, Ids, Process, Root, StepError, Streams, Terminal, doing,
        enter_cgroup, enter_cgroup_beside, join,
    },
};
use crate::sys;

/// Most characters of a message.
const MESSAGE_LENGTH: usize = 1000;

/// Most bytes of a report: a character takes six at most, as an escape.
pub(crate) const REPORT_SIZE: u64 = 6 * MESSAGE_LENGTH as u64 + 200;

/// What the helper shall do. With it come descriptors, in this order: the gate; copies of mounts; a pidfd of
/// each process whose namespaces are joined; a socket for the terminal's master, or standard input, output and error.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The directory of the cgroup that the process is made in.
    pub(crate) cgroup: PathBuf,
    pub(crate) terminal: bool,
    pub(crate) action: Action,
}

/// Which process to make.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// The first process of a container.
    Create {
        spec: Box<Spec>,
        /// A directory of the container's in the guest.
        dir: PathBuf,
        /// What belongs to the user namespace that it joins, if it does.
        user: Option<Ids>,
        /// Whether it joins another's pid namespace.
        pid: bool,
        /// The mounts of `spec` that a copy is there for.
        trees: Vec<usize>,
    },
    /// One more process in a running container, of which it joins these namespaces (`CLONE_NEW*`).
    Exec {
        process: Box<OciProcess>,
        profile: Option<Box<LinuxSeccomp>>,
        namespaces: i32,
        /// The container's first process.
        init: i32,
    },
}

/// What the agent hears, one line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// The process is there, and waits to execute its command.
    Waiting,
    /// It could not be made.
    Failed { message: String },
    /// It was made but could not execute its command.
    ExecFailed { message: String, errno: i32 },
}

impl Report {
    fn send(&self, mut to: &UnixStream) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        to.write_all(&line)
    }
}

/// Serves one request on the socket that is standard input.
pub(crate) fn main() -> ExitCode {
    let served = || -> io::Result<ExitCode> {
        // What the agent has open is closed on its own; this is in case that something is not.
        sys::keep_standard_streams()?;
        set_dumpable(false)?;
        let agent = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let fds = descriptors::receive(&agent)?;
        let mut line = String::new();
        BufReader::new(&agent).read_line(&mut line)?;
        let request = serde_json::from_str(&line)?;
        serve(request, fds, &agent).or_else(|error| {
            failed(&error).send(&agent)?;
            Ok(ExitCode::FAILURE)
        })
    };
    served().unwrap_or(ExitCode::FAILURE)
}

/// The process that is to be.
enum Made {
    First(Box<Container>),
    Exec(Box<OciProcess>, Option<Box<LinuxSeccomp>>),
}

/// What a process has of the agent.
struct Ends {
    gate: fs::File,
    /// Where it says which AppArmor profile it is under, if it is.
    attributes: Option<Attributes>,
    /// One for the terminal's master, or three.
    streams: Vec<OwnedFd>,
}

/// Makes the process and stays its parent; in the process itself, becomes it, and returns if that fails.
fn serve(request: Request, fds: Vec<OwnedFd>, agent: &UnixStream) -> Result<ExitCode, StepError> {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| refused("a descriptor is missing"));
    let gate = fs::File::from(next()?);
    let process = match &request.action {
        Action::Create { spec, .. } => spec.process().as_ref(),
        Action::Exec { process, .. } => Some(process.as_ref()),
    };
    let adjustment = process.and_then(OciProcess::oom_score_adj).unwrap_or(0);
    fs::write("/proc/self/oom_score_adj", adjustment.to_string())
        .map_err(doing("set oom_score_adj"))?;
    let profile = process.and_then(|process| process.apparmor_profile().as_ref());
    let attributes = profile.map(|_| Attributes::of_guest()).transpose()?;
    let made = match request.action {
        Action::Create {
            spec,
            dir,
            user,
            pid,
            trees,
        } => {
            let trees = trees.into_iter().map(|index| Ok((index, next()?)));
            let trees = trees.collect::<Result<_, StepError>>()?;
            let container = Container::prepare(*spec, &dir, user, trees)?;
            enter_cgroup(&request.cgroup)?;
            if user.is_some() {
                join(&next()?, CloneFlags::CLONE_NEWUSER)?;
            }
            if pid {
                join(&next()?, CloneFlags::CLONE_NEWPID)?;
            } else if container.has(LinuxNamespaceType::Pid) {
                unshare(CloneFlags::CLONE_NEWPID).map_err(doing("make a pid namespace"))?;
            }
            Made::First(Box::new(container))
        }
        Action::Exec {
            process,
            profile,
            namespaces,
            init,
        } => {
            enter_cgroup_beside(init, &request.cgroup)?;
            join(&next()?, CloneFlags::from_bits_retain(namespaces))?;
            Made::Exec(process, profile)
        }
    };
    let ends = Ends {
        gate,
        attributes,
        streams: fds.collect(),
    };
    match sys::fork().map_err(doing("fork"))? {
        ForkResult::Child => {
            let report = match process_of(made, request.terminal, ends, agent) {
                Ok(error) => Report::ExecFailed {
                    message: told(&error),
                    errno: error.errno(),
                },
                Err(error) => failed(&error),
            };
            // Nobody else could be told.
            let _ = report.send(agent);
            Ok(ExitCode::FAILURE)
        }
        ForkResult::Parent { child } => {
            drop((made, ends));
            stay(child, agent).map_err(doing("watch the process"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Becomes the process; returns why its command could not be executed.
fn process_of(
    made: Made,
    with_terminal: bool,
    mut ends: Ends,
    agent: &UnixStream,
) -> Result<StepError, StepError> {
    let (process, terminal) = match made {
        Made::First(container) => {
            let process = Process::new(container.process()?, container.profile())?;
            (process, container.build(with_terminal)?)
        }
        Made::Exec(process, profile) => {
            let process = Process::new(*process, profile.as_deref())?;
            let terminal = match with_terminal {
                true => {
                    let root =
                        Root::open(Path::new("/")).map_err(doing("open the root directory"))?;
                    Some(Terminal::new(&root)?)
                }
                false => None,
            };
            (process, terminal)
        }
    };
    let streams = match terminal {
        Some(terminal) => {
            let socket = ends
                .streams
                .pop()
                .ok_or_else(|| refused("a descriptor is missing"))?;
            descriptors::send(&socket, &[terminal.master.as_fd()])
                .map_err(doing("hand the terminal over"))?;
            Streams::Terminal(terminal)
        }
        None => {
            let streams = ends.streams.try_into();
            Streams::Pipes(streams.map_err(|_| refused("a descriptor is missing"))?)
        }
    };
    process.settle(streams, ends.attributes.as_ref())?;
    Report::Waiting
        .send(agent)
        .map_err(doing("talk to the agent"))?;
    // Its end means that the agent gave up.
    ends.gate
        .read_exact(&mut [0])
        .map_err(doing("wait for the agent"))?;
    Ok(process.execute())
}

/// Stays the parent of `child` until the agent knows it, or it ends.
fn stay(child: nix::unistd::Pid, agent: &UnixStream) -> io::Result<()> {
    let pid = Pid::from_raw(child.as_raw()).ok_or(rustix::io::Errno::SRCH)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let watched = [process.as_fd(), agent.as_fd()];
    let mut watched = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        if !watched[1].revents().is_empty() {
            return Ok(());
        }
        if !watched[0].revents().is_empty() {
            // One that failed has said so itself.
            if let WaitStatus::Signaled(_, signal, _) =
                waitid(Id::Pid(child), WaitPidFlag::WEXITED)?
            {
                let message = format!("the process was ended by {signal} while it was made");
                Report::Failed { message }.send(agent)?;
            }
            return Ok(());
        }
    }
}

fn refused(why: &str) -> StepError {
    StepError::Refused(why.to_owned())
}

fn failed(error: &StepError) -> Report {
    Report::Failed {
        message: told(error),
    }
}

/// The beginning of what an error says.
fn told(error: &StepError) -> String {
    let text = Reason::new(error).to_string();
    text.chars().take(MESSAGE_LENGTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_message_fits_a_report() {
        for character in ["\u{1}", "\u{10ffff}", "\""] {
            let message = told(&refused(&character.repeat(2 * MESSAGE_LENGTH)));
            let report = Report::ExecFailed { message, errno: -1 };
            let line = serde_json::to_vec(&report).unwrap();
            assert!((line.len() as u64) < REPORT_SIZE, "{}", line.len());
        }
    }
}
