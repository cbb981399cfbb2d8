//! A node: a daemon that can be armed, its registry and its files.

use std::{
    collections::BTreeMap,
    env, fs,
    ops::Deref,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use hull_base::faults::Point;
use hull_proto_cri::v1::{
    VersionRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use hull_tests::client::Client;
use rustix::process::Signal;
use tonic::transport::Endpoint;

use crate::{
    kind::{Kind, PATIENCE},
    kubelet::Kubelet,
    left::{Left, processes_of},
    process::{run, signal},
};

/// A node with a daemon.
pub struct Node {
    kubelet: Kubelet,
    daemon: Option<Child>,
    registry: Child,
    serial: u32,
    _keep: tempfile::TempDir,
}

/// The network of all pods, and one whose first plugin is ours.
const NETWORK: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[HANG
    {"type":"bridge","bridge":"hull-f0","isGateway":true,"ipMasq":false,
     "ipam":{"type":"host-local","dataDir":"DIR/leases",
             "ranges":[[{"subnet":"10.86.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}"#;
/// What that is when it hangs, and when it does not.
pub const HANG: &str = "#!/usr/bin/tail -f\n";
pub const PASSES: &str = "#!/bin/sh\necho '{\"cniVersion\":\"1.0.0\"}'\n";

impl Node {
    /// Starts one.
    pub async fn start() -> Result<Self> {
        let kind = Kind::of_environment();
        // Short, because sockets are below it.
        let keep = tempfile::Builder::new().prefix("hf").tempdir_in("/tmp")?;
        let dir = keep.path().to_owned();
        for name in [
            "net.d",
            "bin",
            "root",
            "logs",
            "shared",
            "certs.d/registry.test",
            "certs.d/mute.test",
        ] {
            fs::create_dir_all(dir.join(name))?;
        }
        // File systems that can be filled.
        for (name, size) in [("root", "400m"), ("logs", "16m")] {
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o700))?;
            let size = format!("size={size},mode=700");
            let path = dir.join(name);
            run(Command::new("mount")
                .args(["-t", "tmpfs", "-o", &size, "faults"])
                .arg(path))?;
        }
        let assets = match kind {
            Kind::Real => PathBuf::from(env::var_os("HULL_ASSETS").context("HULL_ASSETS is set")?),
            Kind::Fake => fake_assets(&dir)?,
        };
        fs::write(dir.join("bin/hang"), HANG)?;
        fs::set_permissions(dir.join("bin/hang"), fs::Permissions::from_mode(0o755))?;
        let registry = registry(&dir)?;
        let small = match kind {
            Kind::Fake => "memory_mib = 32\n",
            Kind::Real => "memory_mib = 128\n",
        };
        let config = format!(
            "root = 'DIR/root'\nstate = 'DIR/state'\nlisten = 'DIR/hull.sock'\nassets = '{}'\n\
             log = 'info'\n[cni]\nconf_dir = 'DIR/net.d'\nbin_dirs = ['DIR/bin', '/usr/lib/cni']\n\
             [registries]\nconfig_dir = 'DIR/certs.d'\n[vm]\nscratch_mib = 64\n{small}",
            assets.display()
        );
        fs::write(
            dir.join("hull.toml"),
            config.replace("DIR", dir.to_str().unwrap()),
        )?;
        let mut node = Self {
            kubelet: Kubelet {
                kind,
                dir,
                client: unconnected(),
            },
            daemon: None,
            registry,
            serial: 0,
            _keep: keep,
        };
        node.hang_plugins(false)?;
        node.start_daemon().await?;
        Ok(node)
    }

    /// Starts a daemon, which has to answer.
    pub async fn start_daemon(&mut self) -> Result<()> {
        self.spawn_daemon()?;
        self.connect().await
    }

    /// Starts a daemon.
    pub fn spawn_daemon(&mut self) -> Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"))?;
        let program = match self.kind {
            Kind::Fake => hull_built::profile_dir().join("hull"),
            Kind::Real => env::var_os("HULL_FAULTS_DAEMON")
                .context("HULL_FAULTS_DAEMON is set")?
                .into(),
        };
        let mut command = Command::new(program);
        command
            .arg("--config")
            .arg(self.dir.join("hull.toml"))
            .arg("serve")
            .env("HULL_FAULTS", self.armed())
            .env_remove("HULL_ASSETS")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.daemon = Some(command.spawn().context("start hull")?);
        Ok(())
    }

    /// Waits until the daemon answers.
    pub async fn connect(&mut self) -> Result<()> {
        let socket = self.dir.join("hull.sock");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(client) = Client::connect(socket.to_str().unwrap()).await
                && client
                    .runtime
                    .clone()
                    .version(VersionRequest::default())
                    .await
                    .is_ok()
            {
                self.kubelet.client = client;
                return Ok(());
            }
            if let Some(status) = self.daemon.as_mut().context("a daemon")?.try_wait()? {
                bail!("the daemon has ended: {status}");
            }
            if Instant::now() > deadline {
                bail!("the daemon does not answer");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn daemon(&self) -> u32 {
        self.daemon.as_ref().map_or(0, Child::id)
    }

    /// Ends the daemon (SIGKILL).
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Kills the daemon and starts the next.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill_daemon();
        self.start_daemon().await
    }

    /// Whether the daemon has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        match &mut self.daemon {
            Some(daemon) => Ok(daemon.try_wait()?.is_some()),
            None => Ok(true),
        }
    }

    fn armed(&self) -> PathBuf {
        self.dir.join("fault")
    }

    /// Has something happen at a point.
    pub fn arm(&mut self, action: &str, point: &str, nth: usize) -> Result<()> {
        self.disarm();
        self.serial += 1;
        let new = self.dir.join("fault.new");
        fs::write(&new, format!("{} {action} {point} {nth}", self.serial))?;
        fs::rename(new, self.armed())?;
        Ok(())
    }

    pub fn disarm(&self) {
        for name in ["fault", "fault.fired", "fault.trace"] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }

    /// Whether what was armed has happened.
    pub fn has_fired(&self) -> bool {
        self.dir.join("fault.fired").exists()
    }

    /// How often each point was reached since `trace` was armed.
    pub fn traced(&self) -> BTreeMap<String, usize> {
        let text = fs::read_to_string(self.dir.join("fault.trace")).unwrap_or_default();
        let mut points = BTreeMap::new();
        for name in text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(_, name)| name)
        {
            *points.entry(name.to_owned()).or_default() += 1;
        }
        points
    }

    /// Sets the clock, which is so many seconds ahead, another number ahead.
    pub fn set_clock(&self, from: i64, to: i64) -> Result<()> {
        match self.kind {
            // This machine's clock is not ours: it is the daemon's alone that is set.
            Kind::Fake => Ok(fs::write(self.dir.join("fault.clock"), to.to_string())?),
            Kind::Real => {
                let by = format!("{} seconds", to - from);
                run(Command::new("date").args(["-s", &by])).map(drop)
            }
        }
    }

    /// Says what goes wrong in fake VMs that are started from now on
    /// (`runtime/pod/examples/fake-vmm/script.rs`).
    pub fn script(&self, script: &str) -> Result<()> {
        Ok(fs::write(self.dir.join("assets/vmlinux"), script)?)
    }

    /// Has the first plugin of the network hang, or not.
    pub fn hang_plugins(&self, hang: bool) -> Result<()> {
        let text = NETWORK.replace("DIR", self.dir.to_str().unwrap());
        let text = text.replace("HANG", if hang { "{\"type\":\"hang\"}," } else { "" });
        Ok(fs::write(self.dir.join("net.d/10-test.conflist"), text)?)
    }

    /// What is there of pods and of work that is not finished.
    pub fn left(&self) -> Left {
        Left::list(&self.dir)
    }

    pub fn vmms(&self, pod: &str) -> Vec<u32> {
        processes_of(&self.dir, pod, "/vmm.sock")
    }

    pub fn file_servers(&self, pod: &str) -> Vec<u32> {
        processes_of(&self.dir, pod, "/fs.sock")
    }

    /// The last lines of the daemon's log that complain.
    pub fn complaints(&self) -> String {
        let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n    ")
    }
}

impl Deref for Node {
    type Target = Kubelet;

    fn deref(&self) -> &Kubelet {
        &self.kubelet
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_daemon();
        let _ = self.registry.kill();
        let _ = self.registry.wait();
        for (pid, _) in crate::left::processes(&self.dir) {
            let _ = signal(pid, Signal::KILL);
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut mounts: Vec<_> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .collect();
        mounts.retain(|mount| Path::new(mount).starts_with(&self.dir));
        for mount in mounts.iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}

/// All points, by their names.
pub fn all_points() -> BTreeMap<String, Point> {
    Point::ALL
        .iter()
        .map(|point| (point.name().to_owned(), *point))
        .collect()
}

/// One of a daemon that does not run yet.
fn unconnected() -> Client {
    let channel = Endpoint::from_static("unix:/none").connect_lazy();
    Client {
        runtime: RuntimeServiceClient::new(channel.clone()),
        images: ImageServiceClient::new(channel),
    }
}

fn fake_assets(dir: &Path) -> Result<PathBuf> {
    let assets = dir.join("assets");
    fs::create_dir(&assets)?;
    fs::write(assets.join("vmlinux"), "")?;
    fs::write(assets.join("root.erofs"), vec![0; 4096])?;
    let newest = hull_built::example("fake-vmm");
    for name in ["hull-vmm", "hull-fs"] {
        symlink(&newest, assets.join(name))?;
    }
    Ok(assets)
}

/// Starts a registry for `registry.test`, and has `mute.test` lead to one that says nothing.
fn registry(dir: &Path) -> Result<Child> {
    let images = PathBuf::from(env::var_os("HULL_TEST_IMAGES").context("HULL_TEST_IMAGES is set")?);
    let text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  \
         maintenance: {{readonly: {{enabled: true}}}}\nhttp: {{addr: '127.0.0.1:5000'}}\n",
        images.display()
    );
    fs::write(dir.join("registry.yml"), text)?;
    for (host, port) in [("registry.test", 5000), ("mute.test", 5001)] {
        let text = format!(
            "[host.\"http://127.0.0.1:{port}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
        );
        fs::write(dir.join("certs.d").join(host).join("hosts.toml"), text)?;
    }
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(dir.join("registry.yml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("docker-registry is installed")?;
    let deadline = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect("127.0.0.1:5000").is_err() {
        if Instant::now() > deadline {
            bail!("docker-registry does not listen");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}
