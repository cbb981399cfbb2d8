//! The processes of a pod, its VMM and its file server: started here, or found again after a
//! restart of the daemon.
//!
//! The end of the daemon does not end them: each has its own process group, and only
//! [`Process::kill`] and [`Process::end`] kill one. A process is signalled and waited for by its
//! pidfd, because its pid may be another's by then.
//!
//! ```text
//! spawned ──▶ held by pidfd, in its cgroup ──▶ <run>/*.process ──▶ used ──▶ record (VMM)
//!          daemon killed here: it ends by itself   here: found by its file
//! ```
//!
//! What a process has as standard input ends with the daemon until it is used: for a VMM a pipe on which
//! it waits for a byte, for a file server a socket whose other end nobody else has yet.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    pin::Pin,
    process::{Command, ExitStatus},
    sync::Arc,
    time::Duration,
};

use backon::{ConstantBuilder, Retryable};
use hull_proto_vmm::{ExitReason, ExitReport};
use nix::sys::signal::Signal;
use rustix::fs::OFlags;
use tokio::{
    net::UnixStream,
    sync::watch,
    time::{Instant, timeout},
};

use hull_base::{
    beneath,
    faults::{self, Point},
    pidfd::Pidfd,
};
use hull_jail::start_apart;
use hull_spec::{config::PodsConfig, error::PodError, id::PodId};

use crate::{
    cgroup::PodCgroup,
    error::VmError,
    identity::Identity,
    rundir::{Role, RunDir},
};

/// How long a process may take to end after it was killed: a busy host takes its time to free a
/// guest's memory.
const AFTER_KILL: Duration = Duration::from_secs(30);

/// The pauses before a process that was just started listens.
const UNTIL_IT_LISTENS: ConstantBuilder = ConstantBuilder::new()
    .with_delay(Duration::from_millis(1))
    .without_max_times();

/// What a process is held by: a pidfd, or a simulation of one.
pub trait Hold: std::fmt::Debug + Send + Sync {
    /// Whether it has ended.
    fn has_ended(&self) -> bool;

    /// Waits until it has ended.
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// Kills it; no effect when it has ended.
    ///
    /// # Errors
    /// When it is another user's.
    fn kill(&self) -> io::Result<()>;
}

impl Hold for Pidfd {
    fn has_ended(&self) -> bool {
        self.has_ended()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.ended())
    }

    fn kill(&self) -> io::Result<()> {
        self.kill()
    }
}

/// A process that this daemon started, and waits for as its parent.
#[derive(Debug)]
struct Started {
    pidfd: Pidfd,
    /// Closed once it is noted how the process ended.
    noted: watch::Receiver<()>,
}

impl Hold for Started {
    fn has_ended(&self) -> bool {
        self.pidfd.has_ended()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            self.pidfd.ended().await;
            let mut noted = self.noted.clone();
            while noted.changed().await.is_ok() {}
        })
    }

    fn kill(&self) -> io::Result<()> {
        self.pidfd.kill()
    }
}

/// A process of a pod. Clones share it.
#[derive(Debug, Clone)]
pub struct Process {
    identity: Identity,
    hold: Arc<dyn Hold>,
}

impl Process {
    /// The process of this identity, which is held already.
    pub fn held(identity: Identity, hold: Arc<dyn Hold>) -> Self {
        Self { identity, hold }
    }

    /// Starts a VMM that listens on the control socket of `run`, and runs as `user`.
    ///
    /// # Errors
    /// When it can't be started, or put into `cgroup`.
    pub fn spawn_vmm(
        program: &Path,
        pod: &PodId,
        user: u32,
        run: &RunDir,
        cgroup: Option<&PodCgroup>,
    ) -> Result<Self, PodError> {
        let failed = |source| VmError::Spawn {
            program: program.to_owned(),
            source,
        };
        let (known, mut tell) = io::pipe().map_err(failed)?;
        let mut command = Command::new(program);
        command
            .args(["run", "--id", pod.as_str(), "--socket"])
            .arg(run.control_socket())
            .arg("--exit-report")
            .arg(run.exit_report())
            .args(["--user", &user.to_string()])
            .stdin(known);
        // Before the VMM has threads and memory, so that all that it uses is counted.
        let enter = |pid| cgroup.map_or(Ok(()), |cgroup| cgroup.add(pid));
        let vmm = Self::start(program, command, run, Role::Vmm, enter)?;
        match tell.write_all(b"\n") {
            // It has ended; who connects to it is told why.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(failed(error).into()),
            _ => Ok(vmm),
        }
    }

    /// Starts a file server for the VM that has the other end of `fuse`. The file server ends when
    /// that end is closed.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn_file_server(
        program: &Path,
        pod: &PodId,
        run: &RunDir,
        cgroup: Option<&Path>,
        fuse: OwnedFd,
    ) -> Result<Self, PodError> {
        let mut command = Command::new(program);
        command
            .args(["run", "--id", pod.as_str(), "--socket"])
            .arg(run.files_socket())
            .stdin(fuse);
        if let Some(cgroup) = cgroup {
            // The file server enters the cgroup before it starts other processes.
            command.arg("--cgroup").arg(cgroup);
        }
        Self::start(program, command, run, Role::FileServer, |_| Ok(()))
    }

    fn start(
        program: &Path,
        mut command: Command,
        run: &RunDir,
        role: Role,
        prepare: impl Fn(u32) -> Result<(), PodError>,
    ) -> Result<Self, PodError> {
        let log_path = run.log_of(role);
        let file_error = |path: &Path| {
            let path = path.to_owned();
            move |source| VmError::File { path, source }
        };
        let log = beneath::split(&log_path)
            .and_then(|(run, name)| run.replace(name, OFlags::WRONLY, 0o600))
            .map_err(file_error(&log_path))?;
        let stdout = log.try_clone().map_err(file_error(&log_path))?;
        let spawn_error = |source| VmError::Spawn {
            program: program.to_owned(),
            source,
        };
        command
            .current_dir(run.path())
            .env_clear()
            .stdout(stdout)
            .stderr(log)
            .process_group(0);
        // The new process closes its end when it executes the program. Until then `/proc` may show
        // the daemon's program for it, though `spawn` has returned: vfork(2) ends a moment too early.
        let (mut executed, until_executed) = io::pipe().map_err(spawn_error)?;
        let started = match role {
            Role::Vmm => start_apart(&mut command),
            // It makes a pid namespace itself, for the part that faces the guest.
            Role::FileServer => command.spawn(),
        };
        let mut child = started.map_err(spawn_error)?;
        // It has the other end of the pipe, too.
        drop(command);
        drop(until_executed);
        let pid = child.id();
        let (noting, noted) = watch::channel(());
        // Until the process is waited for, its pid is nobody else's, even if it has ended.
        let take = || -> Result<(Identity, Arc<Started>), PodError> {
            // Nothing is ever written to this pipe: reading ends when the new process has closed it.
            executed.read_to_end(&mut Vec::new()).map_err(spawn_error)?;
            prepare(pid)?;
            let gone = || spawn_error(io::ErrorKind::NotFound.into());
            let identity = Identity::of(pid).ok_or_else(gone)?;
            let pidfd = Pidfd::open(pid).map_err(spawn_error)?;
            let path = run.process_of(role);
            faults::point(Point::ProcessStarted);
            faults::write(Point::ProcessWrite).map_err(file_error(&path))?;
            identity.write(&path).map_err(file_error(&path))?;
            faults::point(Point::ProcessNoted);
            Ok((identity, Arc::new(Started { pidfd, noted })))
        };
        match take() {
            Ok((identity, started)) => {
                let hold = Arc::clone(&started);
                let report = (role == Role::Vmm).then(|| run.exit_report());
                tokio::spawn(async move {
                    started.pidfd.ended().await;
                    let status = child.wait();
                    tracing::debug!(pid, ?status, "process of a pod ended");
                    if let (Ok(status), Some(report)) = (status, report)
                        && let Err(error) = note_end(status, &report)
                    {
                        tracing::warn!(pid, %error, "note how a VMM ended");
                    }
                    drop(noting);
                });
                Ok(Self { identity, hold })
            }
            Err(error) => {
                let _ = child.kill();
                tokio::task::spawn_blocking(move || child.wait());
                Err(error)
            }
        }
    }

    /// The process of this identity; none when it has ended.
    #[must_use]
    pub fn find(identity: Identity) -> Option<Self> {
        let hold = Arc::new(Pidfd::open(identity.pid).ok()?);
        let found = Self { identity, hold };
        // If the process that is held has not ended, it is also the one whose identity was compared.
        (identity.is_there() && found.is_alive()).then_some(found)
    }

    /// Tells this process from all others.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether the process runs.
    pub fn is_alive(&self) -> bool {
        !self.hold.has_ended()
    }

    /// Connects to a socket of the process, once it listens. That is asked again and again, because
    /// inotify(7) tells when a socket gets its name and not when it listens, which takes a
    /// process that was just started a few milliseconds.
    ///
    /// # Errors
    /// When the process ends or does not listen by `deadline`.
    pub async fn connect(&self, socket: &Path, deadline: Instant) -> io::Result<UnixStream> {
        let connect = || beneath::connect(socket);
        connect
            .retry(UNTIL_IT_LISTENS)
            .when(|_| self.is_alive() && Instant::now() < deadline)
            .await
    }

    /// Kills the process; no effect when it has ended.
    pub fn kill(&self) {
        if let Err(error) = self.hold.kill() {
            tracing::warn!(pid = self.identity.pid, %error, "kill process of a pod");
        }
        faults::point(Point::ProcessKilled);
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) {
        self.hold.ended().await;
    }

    /// Waits until the process has ended; kills it after `grace`.
    ///
    /// # Errors
    /// When it is still there 30 s after it was killed.
    pub async fn end(&self, grace: Duration) -> Result<(), VmError> {
        if timeout(grace, self.ended()).await.is_ok() {
            return Ok(());
        }
        self.kill();
        let ended = timeout(AFTER_KILL, self.ended()).await;
        ended.map_err(|_| VmError::Unkillable {
            pid: self.identity.pid,
            seconds: AFTER_KILL.as_secs(),
        })
    }
}

/// Writes an exit report for a VMM that was ended before it could: by a system call that is not on its
/// list. The kernel's log has which.
fn note_end(status: ExitStatus, report: &Path) -> io::Result<()> {
    if status.signal() != Some(Signal::SIGSYS as i32) {
        return Ok(());
    }
    let forbidden = ExitReport {
        reason: ExitReason::VmmError,
        message: "killed by SIGSYS: a system call that is not allowed".to_owned(),
    };
    let (run, name) = beneath::split(report)?;
    let mut file = run.replace(name, OFlags::WRONLY, 0o600)?;
    file.write_all(&serde_json::to_vec(&forbidden)?)
}

/// A process of a pod that was found running.
#[derive(Debug)]
pub struct Found {
    /// The pod's run directory.
    pub run: PathBuf,
    /// What it does for the pod.
    pub role: Role,
    /// The process.
    pub process: Process,
}

/// The VMMs and file servers that earlier daemons started: the running processes that run directories
/// name. Blocks.
#[must_use]
pub fn find_all(config: &PodsConfig) -> Vec<Found> {
    let runs = fs::read_dir(RunDir::all(config)).into_iter().flatten();
    let runs = runs.flatten().map(|entry| RunDir::at(entry.path()));
    let find = |run: &RunDir, role| {
        let identity = Identity::read(&run.process_of(role))?;
        Some(Found {
            run: run.path().to_owned(),
            role,
            process: Process::find(identity)?,
        })
    };
    runs.flat_map(|run| [Role::Vmm, Role::FileServer].map(|role| find(&run, role)))
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_vmm_that_made_a_forbidden_call_is_told_from_one_that_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        let report = dir.path().join("exit.json");
        fs::write(&report, "").unwrap();
        note_end(ExitStatus::from_raw(Signal::SIGKILL as i32), &report).unwrap();
        assert_eq!(fs::read(&report).unwrap(), b"");
        // With the bit of a core dump.
        note_end(ExitStatus::from_raw(Signal::SIGSYS as i32 | 0x80), &report).unwrap();
        let told = crate::client::read_report(&report);
        assert!(told.contains("not allowed"), "{told}");
    }

    #[tokio::test]
    async fn a_process_is_waited_for_and_ended() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        let process = Process::find(identity).unwrap();
        assert!(process.is_alive());
        let waiting = timeout(Duration::from_millis(50), process.ended());
        assert!(waiting.await.is_err());
        let grace = Duration::from_millis(50);
        let end = timeout(Duration::from_secs(5), process.end(grace));
        end.await.unwrap().unwrap();
        // A zombie has ended.
        assert!(!process.is_alive() && Process::find(identity).is_none());
        child.wait().unwrap();
        process.kill();
        process.ended().await;
        assert!(Process::find(identity).is_none());
    }

    #[tokio::test]
    async fn a_process_is_known_by_its_own_program_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path().to_owned());
        let program = Path::new("/bin/sleep");
        for _ in 0..100 {
            let mut command = Command::new(program);
            command.arg("1000");
            let process = Process::start(program, command, &run, Role::Vmm, |_| Ok(())).unwrap();
            let executed = fs::metadata(format!("/proc/{}/exe", process.identity.pid)).unwrap();
            let itself = fs::metadata(program).unwrap();
            assert_eq!(
                (executed.dev(), executed.ino()),
                (itself.dev(), itself.ino())
            );
            assert!(process.identity.is_there());
            process.end(Duration::ZERO).await.unwrap();
        }
    }
}
