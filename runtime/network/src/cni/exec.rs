//! Calls one plugin (CNI spec section 2).

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use backon::{ConstantBuilder, Retryable};
use hull_base::{blocking, metrics, pidfd::Pidfd, stages::stage};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, killpg},
        stat::{Mode, umask},
    },
    unistd::Pid,
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    runtime::Handle,
    time::timeout,
};

/// The most that a plugin may answer: far above any honest result.
const MAX_OUTPUT: u64 = 1 << 20;
/// The most that is kept of its standard error.
const MAX_COMPLAINT: u64 = 1 << 14;
/// How many characters of its words go into a message.
const EXCERPT: usize = 500;
/// How long the pipes of a plugin that has ended may stay open.
const PIPES_CLOSE: Duration = Duration::from_secs(2);
/// How often, and after what time, a program that is open for writing is tried again.
const BUSY_TRIES: usize = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
/// What plugins' files are not for others: to be written.
const PLUGIN_MASK: Mode = Mode::from_bits_truncate(0o022);

/// Why a plugin could not be called, or what it complained of.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It isn't installed.
    #[error("CNI plugin {name} is not in {dirs}")]
    NotFound {
        /// The plugin.
        name: String,
        /// Where it was looked for.
        dirs: String,
    },
    /// It can't be run.
    #[error("run CNI plugin {program}")]
    Run {
        /// Its file.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It took too long and was killed.
    #[error("CNI plugin {program} {command} took longer than {} s and was killed", limit.as_secs())]
    Timeout {
        /// Its file.
        program: PathBuf,
        /// What it was asked for.
        command: &'static str,
        /// The time it had.
        limit: Duration,
    },
    /// It answered without end and was killed.
    #[error("CNI plugin {program} {command} wrote more than {MAX_OUTPUT} bytes and was killed")]
    TooMuch {
        /// Its file.
        program: PathBuf,
        /// What it was asked for.
        command: &'static str,
    },
    /// It reported an error, or died.
    #[error("CNI plugin {program} {command}: {message}")]
    Failed {
        /// Its file.
        program: PathBuf,
        /// What it was asked for.
        command: &'static str,
        /// The code of its error object; 0 without one.
        code: u32,
        /// Its own words.
        message: String,
    },
}

/// Finds a plugin's program.
///
/// # Errors
/// [`ExecError::NotFound`].
pub fn find(dirs: &[PathBuf], name: &str) -> Result<PathBuf, ExecError> {
    let executable = |path: &PathBuf| {
        path.metadata()
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    dirs.iter()
        .map(|dir| dir.join(name))
        .find(executable)
        .ok_or_else(|| ExecError::NotFound {
            name: name.to_owned(),
            dirs: join(dirs, ", "),
        })
}

/// One call.
#[derive(Debug, Clone, Copy)]
pub struct Invocation<'a> {
    /// The plugin's file.
    pub program: &'a Path,
    /// CNI_COMMAND.
    pub command: &'static str,
    /// The pod that it is about; none for commands that are about the network.
    pub target: Option<Target<'a>>,
    /// CNI_PATH.
    pub path: &'a [PathBuf],
    /// Standard input.
    pub conf: &'a Value,
    /// When to kill it.
    pub timeout: Duration,
}

/// The pod that a call is about.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// CNI_CONTAINERID.
    pub container_id: &'a str,
    /// CNI_NETNS; empty when the namespace is gone.
    pub netns: &'a Path,
    /// CNI_IFNAME.
    pub interface: &'a str,
    /// CNI_ARGS.
    pub args: &'a str,
}

/// A plugin's error object (spec section 5).
#[derive(Deserialize)]
struct PluginError {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Invocation<'_> {
    /// Runs the plugin to its end and returns its standard output.
    ///
    /// # Errors
    /// As [`ExecError`] says; the plugin and what it started in its process group are gone in
    /// every case.
    pub async fn run(&self) -> Result<Vec<u8>, ExecError> {
        let begun = Instant::now();
        let plugin = self.program.file_name().unwrap_or_default();
        let plugin = plugin.to_string_lossy();
        let run = async {
            match timeout(self.timeout, self.run_to_end()).await {
                Ok(result) => result,
                Err(_) => Err(ExecError::Timeout {
                    program: self.program.to_owned(),
                    command: self.command,
                    limit: self.timeout,
                }),
            }
        };
        let result = stage(format!("cni: {plugin} {}", self.command), run).await;
        let labels = [&plugin, self.command, metrics::result(&result)];
        metrics::CNI.observe(&labels, begun.elapsed());
        result
    }

    async fn run_to_end(&self) -> Result<Vec<u8>, ExecError> {
        let failed = |source| ExecError::Run {
            program: self.program.to_owned(),
            source,
        };
        let (mut group, mut child) = self.spawn().await.map_err(failed)?;
        let plugin = Pidfd::open(child.id().unwrap_or(0)).map_err(failed)?;
        let input = self.conf.to_string();
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(failed(io::Error::other("no pipes")));
        };
        let (mut output, mut complaint) = (Vec::new(), Vec::new());
        let abandoned = {
            let feed = async {
                // A plugin that does not read its input says why by its exit code.
                let _ = stdin.write_all(input.as_bytes()).await;
                drop(stdin);
                Ok(())
            };
            let pipes = async {
                tokio::try_join!(
                    feed,
                    read(stdout, &mut output, MAX_OUTPUT),
                    // The rest of an endless complaint is of no use, but the plugin may go on.
                    drain(stderr, &mut complaint),
                )
            };
            tokio::pin!(pipes);
            tokio::select! {
                biased;
                all = &mut pipes => {
                    self.bounded(all)?;
                    false
                }
                () = plugin.ended() => {
                    // What it wrote is in the pipes. Only a process that it left behind can
                    // keep them open for longer.
                    let all = timeout(PIPES_CLOSE, &mut pipes).await.ok();
                    all.map(|all| self.bounded(all)).transpose()?.is_none()
                }
            }
        };
        if abandoned {
            group.kill();
        }
        // Not before: once it is waited for, its pid and group may be another's.
        let status = child.wait().await.map_err(failed)?;
        group.leave();
        self.judge(status, output, &complaint)
    }

    /// Starts it; a program that is just being installed is given a moment.
    async fn spawn(&self) -> io::Result<(Group, Child)> {
        let spawn = || {
            let command = self.command();
            // Until the program is executed, which a slow disk may hold up.
            blocking(move || spawn_with_usual_mask(command))
        };
        spawn
            .retry(
                ConstantBuilder::new()
                    .with_delay(BUSY_PAUSE)
                    .with_max_times(BUSY_TRIES),
            )
            .when(|error| error.kind() == io::ErrorKind::ExecutableFileBusy)
            .await
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command
            .env("CNI_COMMAND", self.command)
            .env("CNI_PATH", join(self.path, ":"))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        if let Some(target) = self.target {
            command
                .env("CNI_CONTAINERID", target.container_id)
                .env("CNI_NETNS", target.netns)
                .env("CNI_IFNAME", target.interface)
                .env("CNI_ARGS", target.args);
        }
        command
    }

    fn bounded<T>(&self, read: io::Result<T>) -> Result<T, ExecError> {
        read.map_err(|source| match source.kind() {
            io::ErrorKind::FileTooLarge => ExecError::TooMuch {
                program: self.program.to_owned(),
                command: self.command,
            },
            _ => ExecError::Run {
                program: self.program.to_owned(),
                source,
            },
        })
    }

    /// Tells an answer from a failure.
    fn judge(
        &self,
        status: ExitStatus,
        output: Vec<u8>,
        complaint: &[u8],
    ) -> Result<Vec<u8>, ExecError> {
        if status.success() {
            return Ok(output);
        }
        let (code, message) = match serde_json::from_slice::<PluginError>(&output) {
            Ok(e) if !e.msg.is_empty() => {
                let details = Some(e.details).filter(|d| !d.is_empty());
                let details = details.map(|d| format!(": {d}")).unwrap_or_default();
                let text = excerpt(format!("{}{details}", e.msg).as_bytes());
                (e.code, format!("{text} (code {})", e.code))
            }
            _ if complaint.is_empty() => (0, format!("{status}: {}", excerpt(&output))),
            _ => (0, format!("{status}: {}", excerpt(complaint))),
        };
        Err(ExecError::Failed {
            program: self.program.to_owned(),
            command: self.command,
            code,
            message,
        })
    }
}

/// Starts a plugin with the file mode mask that it has under other runtimes: what it makes is for
/// its own agents too, which may be other users, and the daemon's mask is for the daemon's files.
///
/// The group comes first, so that dropping both kills what the plugin may have started.
fn spawn_with_usual_mask(mut command: Command) -> io::Result<(Group, Child)> {
    let runtime = Handle::current();
    // The mask is inherited from a thread, and this one is of our own.
    let spawn = move || {
        let _guard = runtime.enter();
        unshare(CloneFlags::CLONE_FS)?;
        umask(PLUGIN_MASK);
        let child = command.spawn()?;
        Ok((Group::of(&child), child))
    };
    let spawned = thread::Builder::new().spawn(spawn)?.join();
    spawned.unwrap_or_else(|_| Err(io::Error::other("the thread that starts it panicked")))
}

/// The beginning of what a plugin wrote, fit for a message.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * EXCERPT)]);
    let mut short: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(EXCERPT)
        .collect();
    if text.trim().chars().count() > EXCERPT || bytes.len() > 4 * EXCERPT {
        short.push_str("...");
    }
    short
}

/// Reads to the end, or fails with `FileTooLarge`.
async fn read(from: impl AsyncRead + Unpin, to: &mut Vec<u8>, limit: u64) -> io::Result<()> {
    from.take(limit + 1).read_to_end(to).await?;
    if to.len() as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(())
}

/// Keeps the beginning and reads on to the end.
async fn drain(mut from: impl AsyncRead + Unpin, to: &mut Vec<u8>) -> io::Result<()> {
    (&mut from).take(MAX_COMPLAINT).read_to_end(to).await?;
    tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    Ok(())
}

/// The process group of a plugin; killed when a call ends early.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        Self(pid.map(Pid::from_raw))
    }

    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // ESRCH: nobody is left.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }

    /// Lets go of a group whose leader has ended as it should.
    fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

fn join(dirs: &[PathBuf], separator: &str) -> String {
    let dirs: Vec<_> = dirs.iter().map(|d| d.to_string_lossy()).collect();
    dirs.join(separator)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    async fn call(script: &str) -> Result<Vec<u8>, ExecError> {
        call_with(script, &json!({"name": "n"})).await
    }

    async fn call_with(script: &str, conf: &Value) -> Result<Vec<u8>, ExecError> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("plugin");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Invocation {
            program: &program,
            command: "ADD",
            target: Some(Target {
                container_id: "pod",
                netns: Path::new("/run/netns/x"),
                interface: "eth0",
                args: "A=b",
            }),
            path: &["/opt/cni/bin".into()],
            conf,
            timeout: Duration::from_secs(5),
        }
        .run()
        .await
    }

    #[tokio::test]
    async fn a_plugin_gets_its_parameters_and_input() {
        let script = r#"read conf; echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $CNI_PATH $conf""#;
        let output = call(script).await.unwrap();
        assert_eq!(
            String::from_utf8(output).unwrap(),
            "ADD pod /run/netns/x eth0 A=b /opt/cni/bin {\"name\":\"n\"}\n"
        );
    }

    #[tokio::test]
    async fn a_plugin_has_the_usual_mask_and_this_process_keeps_its_own() {
        let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
        let output = call("umask").await;
        let after = umask(before);
        assert_eq!(output.unwrap(), b"0022\n");
        assert_eq!(after, Mode::S_IRWXG | Mode::S_IRWXO);
    }

    #[tokio::test]
    async fn a_plugins_own_words_reach_the_caller() {
        let error = call(r#"echo '{"code":7,"msg":"no address","details":"pool full"}'; exit 1"#);
        let text = error.await.unwrap_err().to_string();
        assert!(text.contains("no address: pool full (code 7)"), "{text}");
        let error = call("echo oops >&2; exit 3").await.unwrap_err().to_string();
        assert!(error.contains("oops"), "{error}");
    }

    #[tokio::test]
    async fn what_a_plugin_says_is_kept_short_and_printable() {
        let error = call("head -c 100000 /dev/zero | tr '\\0' '\\001' >&2; exit 1").await;
        let error = error.unwrap_err().to_string();
        assert!(error.len() < 1000 && !error.contains('\u{1}'), "{error}");
        assert_eq!(
            excerpt("ä".repeat(EXCERPT + 1).as_bytes()).chars().count(),
            EXCERPT + 3
        );
        assert_eq!(excerpt(b" a\nb "), "a b");
    }

    #[tokio::test]
    async fn a_plugin_that_dies_by_a_signal_is_told_so() {
        let error = call("kill -9 $$").await.unwrap_err().to_string();
        assert!(error.contains("signal: 9"), "{error}");
    }

    #[tokio::test]
    async fn a_plugin_that_never_stops_writing_is_killed() {
        let error = call("exec cat /dev/zero").await;
        assert!(matches!(error, Err(ExecError::TooMuch { .. })), "{error:?}");
        // Standard error has no end either, but the answer is there.
        let output = call("head -c 1000000 /dev/zero >&2; echo yes").await;
        assert_eq!(output.unwrap(), b"yes\n");
    }

    #[tokio::test]
    async fn a_plugin_need_not_read_its_input() {
        let conf = json!({"name": "n".repeat(1 << 20)});
        assert_eq!(call_with("echo yes", &conf).await.unwrap(), b"yes\n");
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!("sleep 1000 & echo $! $$ > {}; wait", pids.display());
        let error = call(&script).await;
        assert!(matches!(error, Err(ExecError::Timeout { .. })));
        gone(&pids).await;
    }

    #[tokio::test]
    async fn what_a_plugin_leaves_behind_does_not_hold_up_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!("sleep 1000 & echo $! > {}; echo yes", pids.display());
        assert_eq!(call(&script).await.unwrap(), b"yes\n");
        gone(&pids).await;
    }

    #[tokio::test]
    async fn a_call_that_is_given_up_leaves_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!("sleep 1000 & echo $! $$ > {}; wait", pids.display());
        let task = tokio::spawn(async move { call(&script).await });
        while fs::read_to_string(&pids).unwrap_or_default().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        task.abort();
        gone(&pids).await;
    }

    /// Waits until the processes named in a file are gone.
    async fn gone(pids: &Path) {
        let pids = fs::read_to_string(pids).unwrap();
        let alive = |pid: &str| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
        };
        for _ in 0..500 {
            if !pids.split_whitespace().any(alive) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{pids} still run");
    }
}
