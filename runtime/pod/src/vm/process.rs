//! The processes of a pod, its VMM and its file server: started here, or found again after a
//! restart of the daemon.
//!
//! They are never killed with the daemon: each has its own process group, and only
//! [`VmmProcess::kill`] and [`VmmProcess::gone`] deal with them. A pid is used only together with
//! the start time of its process, so a reused pid is never signalled.

use std::{
    fs,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::{
    VmError,
    rundir::{FILES_SOCKET, RunDir},
};
use crate::{beneath, id::PodId};

/// A process that can't be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct VmmProcess {
    pub pid: u32,
    /// Field 22 of proc_pid_stat(5).
    pub start_ticks: u64,
}

impl VmmProcess {
    /// Starts a VMM that listens on the control socket of `run`.
    pub(crate) fn spawn(program: &Path, pod: &PodId, run: &RunDir) -> Result<Self, VmError> {
        let mut command = Command::new(program);
        command
            .args(["run", "--id", pod.as_str(), "--socket"])
            .arg(run.control_socket())
            .arg("--exit-report")
            .arg(run.exit_report())
            .stdin(Stdio::null());
        Self::start(program, command, run, &run.vmm_log())
    }

    /// Starts a file server for the VM that has the other end of `fuse`. It ends with that.
    pub(crate) fn spawn_file_server(
        program: &Path,
        pod: &PodId,
        run: &RunDir,
        cgroup: Option<&Path>,
        fuse: OwnedFd,
    ) -> Result<Self, VmError> {
        let mut command = Command::new(program);
        command
            .args(["run", "--id", pod.as_str(), "--socket"])
            .arg(run.files_socket())
            .stdin(fuse);
        if let Some(cgroup) = cgroup {
            // It enters before it starts others.
            command.arg("--cgroup").arg(cgroup);
        }
        Self::start(program, command, run, &run.files_log())
    }

    fn start(
        program: &Path,
        mut command: Command,
        run: &RunDir,
        log_path: &Path,
    ) -> Result<Self, VmError> {
        let file_error = |source| VmError::File {
            path: log_path.to_owned(),
            source,
        };
        let log = beneath::split(log_path)
            .and_then(|(run, name)| run.replace(name, OFlags::WRONLY, 0o600))
            .map_err(file_error)?;
        let stdout = log.try_clone().map_err(file_error)?;
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
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(spawn_error)?;
        let pid = child.id().unwrap_or(0);
        let identity = Self::of(pid);
        tokio::spawn(async move {
            let status = child.wait().await;
            tracing::debug!(pid, ?status, "process of a pod ended");
        });
        // The process is a zombie at the earliest, so its stat file can be read.
        identity.ok_or_else(|| spawn_error(std::io::ErrorKind::NotFound.into()))
    }

    /// The process that has this pid now.
    fn of(pid: u32) -> Option<Self> {
        let (_, start_ticks) = stat(pid)?;
        Some(Self { pid, start_ticks })
    }

    /// Whether it runs (a zombie does not).
    pub(crate) fn is_alive(&self) -> bool {
        matches!(stat(self.pid), Some((state, ticks)) if ticks == self.start_ticks && state != 'Z')
    }

    /// Kills it; no effect when it is gone.
    pub(crate) fn kill(&self) {
        if self.is_alive()
            && let Ok(pid) = i32::try_from(self.pid)
            && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL)
        {
            tracing::warn!(pid = self.pid, %error, "kill process of a pod");
        }
    }

    /// Waits until it is gone; kills it after `grace`.
    ///
    /// # Errors
    /// [`VmError::Unkillable`].
    pub(crate) async fn gone(&self, grace: Duration) -> Result<(), VmError> {
        // A busy host takes its time to free a guest's memory.
        const AFTER_KILL: Duration = Duration::from_secs(30);
        const LONGEST_PAUSE: Duration = Duration::from_millis(50);
        let asked = Instant::now();
        let mut killed = false;
        // Many pods may end at once: who waits long looks less often.
        let mut pause = Duration::from_millis(2);
        while self.is_alive() {
            if !killed && asked.elapsed() >= grace {
                self.kill();
                killed = true;
            }
            if asked.elapsed() >= grace + AFTER_KILL {
                return Err(VmError::Unkillable {
                    pid: self.pid,
                    seconds: AFTER_KILL.as_secs(),
                });
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    /// VMMs and file servers whose socket is below `state`.
    pub(crate) fn find_all(state: &Path) -> Vec<Found> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|pid: u32| {
                let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let socket = socket_of(&arguments, state)?;
                Some(Found {
                    run: socket.parent()?.to_owned(),
                    is_file_server: socket.ends_with(FILES_SOCKET),
                    process: Self::of(pid)?,
                })
            })
            .collect()
    }
}

/// A process of a pod that runs.
#[derive(Debug)]
pub(crate) struct Found {
    /// The pod's run directory.
    pub run: PathBuf,
    /// Else it is a VMM.
    pub is_file_server: bool,
    pub process: VmmProcess,
}

/// The socket in the argument list of a VMM or file server, when it is below `state`.
fn socket_of(arguments: &[u8], state: &Path) -> Option<PathBuf> {
    let arguments: Vec<&str> = arguments
        .split(|b| *b == 0)
        .map(std::str::from_utf8)
        .collect::<Result<_, _>>()
        .ok()?;
    if arguments.get(1) != Some(&"run") {
        return None;
    }
    let at = arguments.iter().position(|a| *a == "--socket")?;
    let socket = Path::new(arguments.get(at + 1)?);
    socket.starts_with(state).then(|| socket.to_owned())
}

/// State and start time of a process.
fn stat(pid: u32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields count from the last one.
    let rest = text.rsplit_once(')')?.1;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_with_another_start_time_is_not_the_process() {
        let me = VmmProcess::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        let other = VmmProcess {
            start_ticks: me.start_ticks + 1,
            ..me
        };
        assert!(!other.is_alive());
        other.kill();
    }

    #[test]
    fn only_a_vmm_below_our_state_directory_is_found() {
        let line = b"/usr/lib/hull/hull-vmm\0run\0--id\0a\0--socket\0/run/hull/pods/a/vmm.sock\0";
        assert_eq!(
            socket_of(line, Path::new("/run/hull")),
            Some("/run/hull/pods/a/vmm.sock".into())
        );
        assert_eq!(socket_of(line, Path::new("/run/other")), None);
        assert_eq!(
            socket_of(b"cat\0/run/hull/x\0", Path::new("/run/hull")),
            None
        );
        assert_eq!(socket_of(b"x\0run\0--socket\0", Path::new("/")), None);
    }
}
