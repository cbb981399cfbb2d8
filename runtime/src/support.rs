//! `hull support`: one archive of what is asked for when something goes wrong.
//!
//! It has no secrets: of containers there is neither environment nor annotation, of registries the names of
//! their files alone. What comes from a pod's run directory is bounded, and opened without following links: a
//! VMM that its guest has taken over may write there.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use flate2::{Compression, write::GzEncoder};
use hull_base::{beneath::Directory, clock};
use hull_pod::FORMATS;
use hull_proto_cri::v1::{
    ListPodSandboxRequest, PodSandbox, PodSandboxStatusRequest, StatusRequest, VersionRequest,
};
use rustix::fs::OFlags;
use serde_json::{Value, json};
use tar::{Builder, Header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    time::timeout,
};

use crate::{
    check,
    client::{self, Client, refused},
    config::{Flags, Settings},
    containers, table,
};

/// Most bytes of a file: the end of a log, the beginning of anything else.
const MOST: u64 = 4 << 20;
/// Most pods whose files are taken.
const PODS: usize = 500;
/// What is taken of a pod's run directory.
const FILES: [&str; 4] = ["exit.json", "vmm.log", "fs.log", "console.log"];
/// What is told of a sandbox beside its state.
const TOLD: [&str; 7] = [
    "message",
    "pid",
    "vm",
    "guest",
    "bootMicroseconds",
    "cloned",
    "metrics",
];
/// How long anything that is asked may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much of the journal is taken.
const LINES: &str = "20000";

/// What `hull support` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SupportArgs {
    /// The archive (.tar.gz) [default: hull-support-TIME.tar.gz here]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Writes the archive; what can't be had is told in it.
pub(crate) async fn support(
    settings: &Settings,
    flags: &Flags,
    arguments: &SupportArgs,
) -> Result<()> {
    let seconds = clock::now_ns() / 1_000_000_000;
    let name = || format!("hull-support-{seconds}.tar.gz");
    let path = arguments.output.clone().unwrap_or_else(|| name().into());
    let failed = || format!("write {}", path.display());
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    // It may not be what was there, which others may have open.
    let file = options.write(true).create_new(true).open(&path);
    let mut bundle = Bundle {
        tar: Builder::new(GzEncoder::new(
            file.with_context(failed)?,
            Compression::default(),
        )),
        missing: Vec::new(),
        seconds: u64::try_from(seconds).unwrap_or(0),
    };
    bundle.fill(settings, flags).await.with_context(failed)?;
    let finished = bundle.finish().and_then(|file| file.sync_all());
    finished.with_context(failed)?;
    table::print(&format!("{}\n", path.display()))
}

struct Bundle<W: Write> {
    tar: Builder<GzEncoder<W>>,
    /// What could not be had, and why.
    missing: Vec<String>,
    seconds: u64,
}

impl<W: Write> Bundle<W> {
    async fn fill(&mut self, settings: &Settings, flags: &Flags) -> io::Result<()> {
        self.add("versions.txt", Ok(versions()))?;
        self.add("check.txt", Ok(check::text(settings).await))?;
        self.add(
            "configuration.txt",
            Settings::show(flags).map_err(Into::into),
        )?;
        self.add("registries.txt", registries(settings))?;
        match client::serving(settings).await {
            Ok(daemon) => self.fill_by(&daemon.client()).await?,
            Err(error) => self.missing.push(format!("daemon: {error:#}")),
        }
        if let Some(address) = settings.metrics {
            self.add("metrics.txt", within(metrics(address)).await)?;
        }
        self.add("log.txt", within(journal()).await)?;
        self.fill_with_pods(&settings.state.join("pods"))
    }

    /// What the daemon tells.
    async fn fill_by(&mut self, client: &Client) -> io::Result<()> {
        self.add("daemon.json", within(daemon(client)).await)?;
        self.add("pods.json", within(pods(client)).await)?;
        let listed = containers::listed(client);
        self.add("containers.json", within(listed).await)
    }

    /// What VMMs wrote.
    fn fill_with_pods(&mut self, directory: &Path) -> io::Result<()> {
        let names = Directory::open(directory).and_then(|pods| Ok((pods.names()?, pods)));
        let (names, pods) = match names {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                self.missing.push(format!("pods: {error}"));
                return Ok(());
            }
        };
        for pod in names.filter_map(Result::ok).take(PODS) {
            for file in FILES {
                let name = pod.join(file);
                match pods.file(&name, OFlags::RDONLY).and_then(last) {
                    Ok(bytes) => self.append(&Path::new("pods").join(name), &bytes)?,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => self.missing.push(format!("{}: {error}", name.display())),
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &str, text: Result<String>) -> io::Result<()> {
        match text {
            Ok(text) => self.append(Path::new(name), text.as_bytes()),
            Err(error) => {
                self.missing.push(format!("{name}: {error:#}"));
                Ok(())
            }
        }
    }

    fn append(&mut self, name: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_size(bytes.len() as u64);
        header.set_mtime(self.seconds);
        self.tar
            .append_data(&mut header, Path::new("hull-support").join(name), bytes)
    }

    fn finish(mut self) -> io::Result<W> {
        let missing = table::lines(std::mem::take(&mut self.missing));
        self.append(Path::new("missing.txt"), missing.as_bytes())?;
        self.tar.into_inner()?.finish()
    }
}

/// The end of a file.
fn last(mut file: File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
    let mut bytes = Vec::new();
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

async fn within(work: impl Future<Output = Result<String>>) -> Result<String> {
    timeout(PATIENCE, work).await.context("it takes too long")?
}

fn versions() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let formats = FORMATS.map(|(name, version)| format!("{name} {version}\n"));
    format!(
        "hull {}\n{}\n{}\n{}\n{}",
        env!("CARGO_PKG_VERSION"),
        formats.concat(),
        read("/proc/version"),
        read("/proc/cmdline"),
        read("/etc/os-release"),
    )
}

/// Which registries have files; what is in them may be secret.
fn registries(settings: &Settings) -> Result<String> {
    let Some(directory) = &settings.images.registries.config_dir else {
        return Ok(String::new());
    };
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        entries => entries.with_context(|| format!("read {}", directory.display()))?,
    };
    let names = entries.filter_map(Result::ok);
    Ok(table::lines(names.map(|entry| {
        entry.file_name().to_string_lossy().into_owned()
    })))
}

async fn daemon(client: &Client) -> Result<String> {
    let mut runtime = client.runtime.clone();
    let version = runtime.version(VersionRequest::default()).await;
    let version = version
        .map_err(refused("ask for the version"))?
        .into_inner();
    let status = runtime.status(StatusRequest { verbose: true }).await;
    let status = status.map_err(refused("ask for the status"))?.into_inner();
    let conditions = status.status.unwrap_or_default().conditions;
    let conditions = conditions.into_iter().map(|condition| {
        json!({
            "type": condition.r#type, "status": condition.status,
            "reason": condition.reason, "message": condition.message,
        })
    });
    Ok(format!(
        "{:#}\n",
        json!({
            "version": version.runtime_version,
            "conditions": conditions.collect::<Value>(),
            "info": client::info(&status.info),
        })
    ))
}

async fn pods(client: &Client) -> Result<String> {
    let request = ListPodSandboxRequest::default();
    let listed = client.runtime.clone().list_pod_sandbox(request).await;
    let listed = listed.map_err(refused("list the pods"))?.into_inner().items;
    let mut pods = Vec::new();
    for pod in listed.into_iter().take(PODS) {
        pods.push(known(client, &pod).await);
    }
    Ok(format!("{:#}\n", Value::from(pods)))
}

async fn known(client: &Client, pod: &PodSandbox) -> Value {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let metadata = pod.metadata.clone().unwrap_or_default();
    let mut known = json!({
        "id": pod.id, "namespace": metadata.namespace, "name": metadata.name, "uid": metadata.uid,
        "state": pod.state().as_str_name(), "created_at": table::time(pod.created_at),
        "runtime": pod.runtime_handler,
    });
    match client.runtime.clone().pod_sandbox_status(request).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            let info = client::info(&answer.info);
            for key in TOLD {
                known[key] = info.as_ref().map_or(Value::Null, |info| info[key].clone());
            }
        }
        Err(status) => known["error"] = status.message().into(),
    }
    known
}

async fn metrics(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    let request = format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.context("ask")?;
    let mut answer = String::new();
    stream
        .take(MOST)
        .read_to_string(&mut answer)
        .await
        .context("read")?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("it is no answer of HTTP")?;
    anyhow::ensure!(
        head.split(' ').nth(1) == Some("200"),
        "{}",
        head.lines().next().unwrap_or_default()
    );
    Ok(body.to_owned())
}

/// The unit's log.
async fn journal() -> Result<String> {
    let mut command = Command::new("journalctl");
    command
        .args(["-u", "hull", "-n", LINES, "--no-pager", "-o", "short-iso"])
        .kill_on_drop(true);
    let output = command.output().await.context("run journalctl")?;
    anyhow::ensure!(output.status.success(), "journalctl: {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let most = usize::try_from(MOST).unwrap_or(usize::MAX);
    let start = text.len().saturating_sub(most);
    Ok(text[text.ceil_char_boundary(start)..].to_owned())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::unix::fs::symlink};

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn of_a_pods_directory_only_files_of_its_own_are_taken_and_only_their_ends() {
        let state = tempfile::tempdir().unwrap();
        let pods = state.path().join("pods");
        fs::create_dir_all(pods.join("a/b")).unwrap();
        fs::create_dir(pods.join("b")).unwrap();
        fs::write(pods.join("a/exit.json"), "{}").unwrap();
        fs::write(pods.join("a/other"), "no").unwrap();
        symlink("/etc/passwd", pods.join("a/console.log")).unwrap();
        let log = File::create(pods.join("b/vmm.log")).unwrap();
        log.set_len(1 << 40).unwrap();
        let mut bundle = Bundle {
            tar: Builder::new(GzEncoder::new(Vec::new(), Compression::fast())),
            missing: Vec::new(),
            seconds: 1,
        };
        bundle.fill_with_pods(&pods).unwrap();
        bundle.add("odd.txt", Err(anyhow::anyhow!("why"))).unwrap();
        let bytes = bundle.finish().unwrap();
        let mut archive = tar::Archive::new(GzDecoder::new(&bytes[..]));
        let seen: BTreeMap<_, _> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (entry.path().unwrap().display().to_string(), bytes)
            })
            .collect();
        let names: Vec<_> = seen.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "hull-support/missing.txt",
                "hull-support/pods/a/exit.json",
                "hull-support/pods/b/vmm.log"
            ]
        );
        assert_eq!(seen["hull-support/pods/b/vmm.log"].len() as u64, MOST);
        let missing = String::from_utf8_lossy(&seen["hull-support/missing.txt"]);
        assert!(
            missing.contains("a/console.log: ") && missing.contains("odd.txt: why"),
            "{missing}"
        );
    }
}
