//! A node in a temporary directory: real records, disks and processes; fake images, networks and
//! VMs.

pub mod images;
pub mod network;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hull_pod::Pods;
use hull_spec::{
    config::PodsConfig,
    error::PodError,
    id::PodId,
    spec::{ContainerMetadata, ContainerSpec, ImageRequest, SandboxMetadata, SandboxSpec},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

pub use images::{FakeImages, IMAGE};
pub use network::FakeNetwork;

/// A node.
pub struct TestNode {
    pub dir: TempDir,
    pub config: PodsConfig,
    pub images: Arc<FakeImages>,
    pub network: Arc<FakeNetwork>,
}

impl TestNode {
    pub fn new() -> Self {
        // Short, because sockets are below it.
        let dir = tempfile::Builder::new()
            .prefix("hp")
            .tempdir_in("/tmp")
            .unwrap();
        let path = dir.path();
        let assets = path.join("a");
        fs::create_dir(&assets).unwrap();
        fs::write(assets.join("vmlinux"), "").unwrap();
        fs::write(assets.join("root.erofs"), vec![0; 4096]).unwrap();
        let config = PodsConfig {
            vmm: hull_built::example("fake-vmm"),
            file_server: hull_built::example("fake-vmm"),
            scratch_bytes: 64 << 20,
            memory_mib: 32,
            boot_timeout: Duration::from_secs(20),
            ..PodsConfig::new(path.join("r"), path.join("s"), &assets)
        };
        Self {
            images: Arc::new(FakeImages::new(&path.join("i"))),
            network: Arc::new(FakeNetwork::new(&path.join("n"))),
            config,
            dir,
        }
    }

    /// Says what goes wrong in the VMs started from now on; JSON.
    pub fn script(&self, script: &str) {
        fs::write(&self.config.kernel, script).unwrap();
    }

    /// Opens the pods; a test's former daemon may take a moment to let go of the records.
    pub async fn open(&self) -> Pods {
        for _ in 0..500 {
            match self.try_open().await {
                Err(error) if error.to_string().contains("another daemon") => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                result => return result.unwrap(),
            }
        }
        panic!("the records are not free");
    }

    pub async fn try_open(&self) -> Result<Pods, PodError> {
        let (images, network) = (self.images.clone(), self.network.clone());
        Pods::open(self.config.clone(), images, network).await
    }

    pub fn log_directory(&self) -> PathBuf {
        self.dir.path().join("logs")
    }

    /// Where cgroups of this node's pods are; a name of its own, since tests run side by side.
    pub fn cgroup(&self) -> PathBuf {
        let own = self.dir.path().file_name().unwrap();
        self.config.cgroup_root.join(own)
    }

    /// The parent that sandboxes name: none on a machine without cgroup v2.
    pub fn cgroup_parent(&self) -> String {
        let there = self.config.cgroup_root.join("cgroup.controllers").exists();
        let parent = Path::new("/").join(self.cgroup().file_name().unwrap());
        if there {
            parent.display().to_string()
        } else {
            String::new()
        }
    }

    pub fn sandbox(&self, name: &str) -> SandboxSpec {
        SandboxSpec {
            metadata: SandboxMetadata {
                name: name.into(),
                uid: "uid".into(),
                namespace: "default".into(),
                attempt: 0,
            },
            log_directory: self.log_directory(),
            cgroup_parent: self.cgroup_parent(),
            ..SandboxSpec::default()
        }
    }

    /// The lines of a container's log, without times. One that crosses a page may be there in part while it
    /// is written.
    pub fn log(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.log_directory().join(name)).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines();
        lines
            .map(|line| line.split_once(' ').unwrap().1.to_owned())
            .collect()
    }

    /// What is on the node of pods that are not there: nothing, or a list.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for parent in [
            self.config.state.join("pods"),
            self.config.root.join("pods"),
        ] {
            for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
                left.push(entry.path().display().to_string());
            }
        }
        for entry in fs::read_dir(&self.config.root)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().into_string().unwrap();
            if name.ends_with(".tmp") {
                left.push(name);
            }
        }
        left.extend(
            self.network
                .up()
                .into_iter()
                .map(|id| format!("network {id}")),
        );
        left.extend(
            self.images
                .leases()
                .into_iter()
                .map(|l| format!("lease {l}")),
        );
        if self.cgroup().exists() {
            left.push(self.cgroup().display().to_string());
        }
        left.extend(self.vmms().into_iter().map(|pid| format!("VMM {pid}")));
        left
    }

    /// Whether the fake guest of a pod has noted this: `exec` (a process was begun in a container),
    /// `exited` (one has ended), `hangs` (a call that the script has hang was made).
    pub fn noted(&self, pod: &str, what: &str) -> bool {
        let calls = self.config.state.join("pods").join(pod).join("calls");
        let text = fs::read_to_string(calls).unwrap_or_default();
        text.lines().any(|line| line == what)
    }

    /// Processes of VMMs of this node.
    pub fn vmms(&self) -> Vec<i32> {
        let state = self.config.state.display().to_string();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&state)
            })
            .collect()
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        for pid in self.vmms() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A container that does what `args` say; see the fake VMM.
pub fn container(name: &str, args: &[&str]) -> ContainerSpec {
    ContainerSpec {
        metadata: ContainerMetadata {
            name: name.into(),
            attempt: 0,
        },
        image: ImageRequest {
            image: IMAGE.into(),
            ..ImageRequest::default()
        },
        command: args.iter().map(|a| (*a).to_owned()).collect(),
        log_path: format!("{name}.log").into(),
        ..ContainerSpec::default()
    }
}

/// A daemon's worth of tasks.
pub fn daemon() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Ends a daemon's tasks where they are, as SIGKILL does, and waits until none runs any more.
pub fn end(daemon: Runtime) {
    daemon.shutdown_timeout(Duration::from_secs(10));
}

pub fn kill_pid(pid: u32) {
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
}

/// How many devices the VM has.
pub async fn attached(pods: &Pods, pod: &PodId) -> u64 {
    pods.vm_metrics(pod.as_str()).await.unwrap().exits[0].1
}

/// Waits for something that is about to happen.
pub async fn eventually(what: &str, test: impl AsyncFn() -> bool) {
    for _ in 0..1000 {
        if test().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen");
}
