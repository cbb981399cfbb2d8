//! The other side of [`super::launch`]: a process of its own for one call of
//! libcontainer, which forks and must not do so in a process with threads.
//!
//! ```text
//! agent ── request + stdio fds ──▶ child ── libcontainer ──▶ container process
//!       ◀── "waiting" (an exec) ─────────────────────────────────────┤
//!       ── a byte through the gate ─────────────────────────────────▶│
//!       ◀── "started" ────────────                                   │
//!       ── go on ────────────────▶ ends; its process becomes         │
//!                                  the agent's (PID 1)               │
//!       ◀── {"exec_failed":…}, or the end of the socket: it runs ────┘
//! ```
//!
//! The container process holds the socket until its `execve` closes it, so the
//! agent learns whether the command could be executed, and why not.
//!
//! No command runs before the agent has taken its process over: the first one of a container
//! waits for its start, and one of an exec at the gate.
//!
//! In the container's namespaces, but before its `execve`, the process has powers and files
//! that others there must not get at. It is not dumpable, which none of the calls that change
//! credentials undoes, and so belongs to the guest's root for all who would trace it.

use std::{
    error::Error,
    ffi::CString,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use libcontainer::{
    capabilities::{drop_privileges, reset_effective},
    container::builder::ContainerBuilder,
    oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec},
    seccomp::initialize_seccomp,
    syscall::syscall::{SyscallType, create_syscall},
    workload::{Executor, ExecutorError, ExecutorValidationError},
};
use nix::{
    sched::{CloneFlags, setns},
    sys::prctl::{set_dumpable, set_keepcaps},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::{Deserialize, Serialize};

use crate::sys;

/// The id that libcontainer knows every container by: each has a state
/// directory of its own, and a short name keeps socket paths short.
pub(crate) const INNER_ID: &str = "c";

/// Most characters of a message: some hold a whole specification.
const MESSAGE_LENGTH: usize = 1000;

/// Most bytes of a report: a character takes six at most, as an escape.
pub(crate) const REPORT_SIZE: u64 = 6 * MESSAGE_LENGTH as u64 + 200;

/// What the child shall do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// libcontainer's state directory of this container.
    pub(crate) state: PathBuf,
    /// Where to send the terminal's master.
    pub(crate) console: Option<PathBuf>,
    pub(crate) action: Action,
}

/// Which process to make.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// The first process of a container, which waits for its start.
    Create {
        /// Directory with the `config.json`.
        bundle: PathBuf,
    },
    /// One more process in a running container.
    Exec {
        /// File with the OCI `process`.
        process: PathBuf,
        /// Cgroup below the container's.
        cgroup: String,
        /// What libcontainer leaves out for an exec.
        late: Box<Late>,
    },
}

/// What is done just before `execve`, in this order. It takes CAP_SYS_ADMIN, so
/// `process` has more than the real capabilities.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Late {
    /// The user namespace to join, and who to be there.
    pub(crate) user: Option<LateUser>,
    /// The filter to load.
    pub(crate) filter: Option<LinuxSeccomp>,
    /// The capabilities to keep; `None`: `process` has just these.
    pub(crate) capabilities: Option<LinuxCapabilities>,
    /// Loads the filter after the capabilities are dropped: with `no_new_privs`
    /// it takes none, and what drops them need not be in the filter.
    pub(crate) filter_last: bool,
}

/// A user in a user namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LateUser {
    /// The namespace, as a file of /proc.
    pub(crate) namespace: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// What the agent hears, one line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// The process of an exec is there, and waits to execute its command.
    Waiting,
    /// The process is there: the first one of a container waits for its start, another one
    /// executes its command.
    Started,
    /// It could not be made.
    Failed { message: String },
    /// What libcontainer logged as an error; its answers often lack the cause.
    Detail { message: String },
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
    let served = || {
        // What the agent has open is closed on its own; this is in case that something is not.
        sys::keep_standard_streams()?;
        set_dumpable(false)?;
        serve(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
    };
    match served() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(agent: UnixStream) -> io::Result<()> {
    let fds = receive_fds(&agent)?;
    let mut reader = BufReader::new(agent.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let request = serde_json::from_str(&line)?;
    let agent = Arc::new(agent);
    report_errors(&agent);
    let report = match run(request, fds, &agent) {
        Ok(()) => Report::Started,
        Err(e) => Report::Failed {
            message: brief(&chain(e.as_ref())),
        },
    };
    report.send(&agent)?;
    // Until the agent knows the process it must not lose its parent.
    reader.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Sends what is logged as an error to the agent, from the container's process
/// too: it has no other place to say it.
fn report_errors(agent: &Arc<UnixStream>) {
    let agent = Arc::clone(agent);
    let builder = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::ERROR)
        .with_writer(move || Details(Arc::clone(&agent)))
        .with_ansi(false)
        .with_level(false)
        .with_target(false)
        .without_time();
    // There is no other subscriber in this process.
    let _ = builder.try_init();
}

/// Sends each text that is written to it.
struct Details(Arc<UnixStream>);

impl Write for Details {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let message = String::from_utf8_lossy(text);
        let message = brief(message.trim());
        Report::Detail { message }.send(&self.0)?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Receives the gate, and stdin, stdout and stderr unless there is to be a terminal.
fn receive_fds(agent: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        agent,
        &mut [io::IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.flatten().collect())
}

fn run(request: Request, fds: Vec<OwnedFd>, agent: &Arc<UnixStream>) -> Result<(), Box<dyn Error>> {
    // The agent's own protection; the specification's value follows, if any.
    fs::write("/proc/self/oom_score_adj", "0")?;
    let mut workload = Workload {
        agent: Arc::clone(agent),
        gate: None,
        late: Late::default(),
        user_namespace: None,
    };
    let mut fds = fds.into_iter();
    let gate = fds.next().ok_or("no gate")?;
    if let Action::Exec { late, .. } = &request.action {
        workload.gate = Some(Arc::new(fs::File::from(gate)));
        workload.late = late.as_ref().clone();
        if let Some(user) = &late.user {
            // Out of sight once the process is in the container.
            workload.user_namespace = Some(Arc::new(fs::File::open(&user.namespace)?));
        }
    }
    let mut builder = ContainerBuilder::new(INNER_ID.to_owned(), SyscallType::default())
        .with_root_path(request.state)?
        .with_console_socket(request.console)
        .with_executor(workload);
    if let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) {
        builder = builder
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr);
    }
    match request.action {
        Action::Create { bundle } => {
            builder
                .as_init(bundle)
                .with_systemd(false)
                .with_detach(true)
                .build()?;
        }
        Action::Exec {
            process, cgroup, ..
        } => {
            builder
                .as_tenant()
                .with_detach(true)
                .with_process(Some(process))
                .with_sub_cgroup(Some(cgroup))
                .build()?;
        }
    }
    Ok(())
}

/// Returns the beginning of a text.
fn brief(text: &str) -> String {
    text.chars().take(MESSAGE_LENGTH).collect()
}

/// Joins an error of libcontainer or libcgroups and its causes, each once: many of their messages hold
/// that of the cause, which is their source too.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text.trim_end_matches('\0').to_owned()
}

/// Executes the container's command.
#[derive(Debug, Clone)]
struct Workload {
    agent: Arc<UnixStream>,
    /// Where the process of an exec waits.
    gate: Option<Arc<fs::File>>,
    late: Late,
    user_namespace: Option<Arc<fs::File>>,
}

impl Workload {
    /// Waits until the agent has taken this process over.
    fn wait(&self) -> io::Result<()> {
        let Some(gate) = &self.gate else {
            return Ok(());
        };
        Report::Waiting.send(&self.agent)?;
        // Its end means that the agent gave up.
        gate.as_ref().read_exact(&mut [0])
    }

    fn finish(&self) -> Result<(), String> {
        if let (Some(user), Some(namespace)) = (&self.late.user, &self.user_namespace) {
            join(user, namespace).map_err(|e| format!("join the user namespace: {e}"))?;
        }
        if !self.late.filter_last {
            self.load_filter()?;
        }
        if let Some(capabilities) = &self.late.capabilities {
            let syscall = create_syscall();
            reset_effective(syscall.as_ref())
                .and_then(|()| drop_privileges(capabilities, syscall.as_ref()))
                .map_err(|e| format!("drop capabilities: {e}"))?;
        }
        if self.late.filter_last {
            self.load_filter()?;
        }
        Ok(())
    }

    fn load_filter(&self) -> Result<(), String> {
        if let Some(filter) = &self.late.filter {
            initialize_seccomp(filter).map_err(|e| format!("load seccomp filter: {e}"))?;
        }
        Ok(())
    }

    fn fail(&self, message: String, errno: i32) -> ExecutorError {
        let report = Report::ExecFailed {
            message: brief(&message),
            errno,
        };
        // Nobody else could be told.
        let _ = report.send(&self.agent);
        ExecutorError::Other(message)
    }
}

/// Becomes `user` of a user namespace, with all capabilities in it.
fn join(user: &LateUser, namespace: &fs::File) -> nix::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    setresgid(gid, gid, gid)?;
    set_keepcaps(true)?;
    setresuid(uid, uid, uid)?;
    set_keepcaps(false)
}

impl Executor for Workload {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = spec.process().as_ref().and_then(|p| p.args().as_ref());
        let args: Result<Vec<CString>, _> = args
            .into_iter()
            .flatten()
            .map(|arg| CString::new(arg.as_bytes()))
            .collect();
        let args = args.map_err(|_| self.fail("an argument holds a NUL".to_owned(), 0))?;
        let Some(command) = args.first() else {
            return Err(self.fail("no command".to_owned(), 0));
        };
        self.wait()
            .map_err(|e| self.fail(format!("wait for the agent: {e}"), 0))?;
        self.finish().map_err(|e| self.fail(e, 0))?;
        sys::default_sigpipe();
        let Err(errno) = nix::unistd::execvp(command, &args);
        let name: String = command.to_string_lossy().chars().take(200).collect();
        let message = format!("exec {name}: {}", errno.desc());
        Err(self.fail(message, errno as i32))
    }

    /// Whether the command exists shows when it is executed, and fails the
    /// start, not the creation.
    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        #[source]
        source: Option<Box<Layer>>,
    }

    #[test]
    fn causes_are_joined_without_repeating() {
        let layer = |text, source: Option<Layer>| Layer {
            text,
            source: source.map(Box::new),
        };
        let error = layer(
            "create",
            Some(layer("mount /x: denied", Some(layer("denied", None)))),
        );
        assert_eq!(chain(&error), "create: mount /x: denied");
    }

    #[test]
    fn the_longest_message_fits_a_report() {
        for character in ["\u{1}", "\u{10ffff}", "\""] {
            let message = brief(&character.repeat(2 * MESSAGE_LENGTH));
            let report = Report::ExecFailed { message, errno: -1 };
            let line = serde_json::to_vec(&report).unwrap();
            assert!((line.len() as u64) < REPORT_SIZE, "{}", line.len());
        }
    }
}
