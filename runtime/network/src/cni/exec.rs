//! Calls one plugin (CNI spec section 2).

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, process::Command, time::timeout};

/// The most that is read from a plugin: far above any honest result.
const MAX_OUTPUT: u64 = 1 << 20;

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
    /// It reported an error.
    #[error("CNI plugin {program} {command}: {message}")]
    Failed {
        /// Its file.
        program: PathBuf,
        /// What it was asked for.
        command: &'static str,
        /// Its own words.
        message: String,
    },
}

/// Finds a plugin's program.
///
/// # Errors
/// [`ExecError::NotFound`].
pub fn find(dirs: &[PathBuf], name: &str) -> Result<PathBuf, ExecError> {
    dirs.iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| ExecError::NotFound {
            name: name.to_owned(),
            dirs: join(dirs, ", "),
        })
}

/// One call.
#[derive(Debug)]
pub struct Invocation<'a> {
    /// The plugin's file.
    pub program: &'a Path,
    /// CNI_COMMAND.
    pub command: &'static str,
    /// CNI_CONTAINERID.
    pub container_id: &'a str,
    /// CNI_NETNS; empty when the namespace is gone.
    pub netns: &'a Path,
    /// CNI_IFNAME.
    pub interface: &'a str,
    /// CNI_ARGS.
    pub args: &'a str,
    /// CNI_PATH.
    pub path: &'a [PathBuf],
    /// Standard input.
    pub conf: &'a Value,
    /// When to kill it.
    pub timeout: Duration,
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
    /// As [`ExecError`] says; the plugin's process is gone in every case.
    pub async fn run(&self) -> Result<Vec<u8>, ExecError> {
        match timeout(self.timeout, self.run_to_end()).await {
            Ok(done) => done,
            Err(_) => Err(ExecError::Timeout {
                program: self.program.to_owned(),
                command: self.command,
                limit: self.timeout,
            }),
        }
    }

    async fn run_to_end(&self) -> Result<Vec<u8>, ExecError> {
        let failed = |source| ExecError::Run {
            program: self.program.to_owned(),
            source,
        };
        let mut child = Command::new(self.program)
            .env("CNI_COMMAND", self.command)
            .env("CNI_CONTAINERID", self.container_id)
            .env("CNI_NETNS", self.netns)
            .env("CNI_IFNAME", self.interface)
            .env("CNI_ARGS", self.args)
            .env("CNI_PATH", join(self.path, ":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let input = self.conf.to_string();
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(failed(io::Error::other("no pipes")));
        };
        let (mut stdout, mut stderr) = (stdout.take(MAX_OUTPUT), stderr.take(MAX_OUTPUT));
        let mut output = Vec::new();
        let mut complaint = Vec::new();
        let feed = async {
            // A plugin that does not read its input says why by its exit code.
            let _ = stdin.write_all(input.as_bytes()).await;
            drop(stdin);
        };
        let (_, read, also_read) = tokio::join!(
            feed,
            stdout.read_to_end(&mut output),
            stderr.read_to_end(&mut complaint),
        );
        read.and(also_read).map_err(failed)?;
        let status = child.wait().await.map_err(failed)?;
        if status.success() {
            return Ok(output);
        }
        let message = match serde_json::from_slice::<PluginError>(&output) {
            Ok(e) if !e.msg.is_empty() && e.details.is_empty() => {
                format!("{} (code {})", e.msg, e.code)
            }
            Ok(e) if !e.msg.is_empty() => format!("{}: {} (code {})", e.msg, e.details, e.code),
            _ => format!("{status}: {}", String::from_utf8_lossy(&complaint).trim()),
        };
        Err(ExecError::Failed {
            program: self.program.to_owned(),
            command: self.command,
            message,
        })
    }
}

fn join(dirs: &[PathBuf], separator: &str) -> String {
    let dirs: Vec<_> = dirs.iter().map(|d| d.to_string_lossy()).collect();
    dirs.join(separator)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

    use serde_json::json;

    use super::*;

    async fn call(script: &str) -> Result<Vec<u8>, ExecError> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("plugin");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Invocation {
            program: &program,
            command: "ADD",
            container_id: "pod",
            netns: Path::new("/run/netns/x"),
            interface: "eth0",
            args: "A=b",
            path: &["/opt/cni/bin".into()],
            conf: &json!({"name": "n"}),
            timeout: Duration::from_millis(1500),
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
    async fn a_plugins_own_words_reach_the_caller() {
        let error = call(r#"echo '{"code":7,"msg":"no address","details":"pool full"}'; exit 1"#);
        let text = error.await.unwrap_err().to_string();
        assert!(text.contains("no address: pool full (code 7)"), "{text}");
        let error = call("echo oops >&2; exit 3").await.unwrap_err().to_string();
        assert!(error.contains("oops"), "{error}");
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let start = Instant::now();
        let error = call(&format!("echo $$ > {}; exec sleep 100", pid.display())).await;
        assert!(matches!(error, Err(ExecError::Timeout { .. })));
        assert!(start.elapsed() < Duration::from_secs(30));
        let pid = fs::read_to_string(pid).unwrap();
        let alive = || {
            fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
                .is_ok_and(|stat| !stat.contains(") Z "))
        };
        for _ in 0..100 {
            if !alive() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the plugin still runs");
    }
}
