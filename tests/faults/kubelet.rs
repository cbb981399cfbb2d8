//! What kubelet calls, and what it is sure of afterwards.

use std::{
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hull_proto_cri::{RESTORE_MOUNT, v1::*};
use hull_streaming::client::{Dialer, Transport, Wants, command};
use hull_tests::client::{Client, Pod, image};
use rustix::process::Signal;
use tonic::{Code, Status};

use crate::{
    kind::{Kind, PATIENCE},
    left,
    process::signal,
};

/// The image of all containers, but for [`Work::KillsAgent`].
pub const IMAGE: &str = "registry.test/demo/busybox:latest";
/// One that comes and goes.
pub const OTHER: &str = "registry.test/demo/static:latest";
/// That of a container that is there as long as its pod, so that the disk of another image comes and goes.
pub const STAYS: &str = "registry.test/demo/network:latest";
/// Where all containers have a directory of the host.
const SHARED: &str = "/shared";
/// The exit code of a container that ends.
pub const CODE: i32 = 7;
/// The lines of a container that ends.
const LINES: usize = 50;

/// What a container has of CPUs after an update.
const OTHER_SHARES: i64 = 512;
/// Overwrites the program of PID 1, which no signal kills from within: as anything else that is killed by
/// its own faults, it ends, and the kernel panics without it.
const KILL_AGENT: &str = r#"
while ! [ -e /shared/kill ]; do sleep 0.1; done
range=$(grep ' r-xp ' /proc/1/maps | grep -v vdso | head -n 1 | cut -d ' ' -f 1)
begin=$((0x${range%-*} / 4096)) end=$((0x${range#*-} / 4096))
dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$begin count=$((end - begin)) conv=notrunc
exec sleep 100000"#;

/// What a container does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Writes its lines and exits with [`CODE`].
    Ends,
    /// The same, after a moment.
    EndsLater,
    /// Waits.
    Waits,
    /// Writes a line now and then.
    Ticks,
    /// Kills the guest's agent when it is told to.
    KillsAgent,
}

/// A client with the daemon, as kubelet is one. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Kubelet {
    pub kind: Kind,
    /// Of the node.
    pub dir: PathBuf,
    pub client: Client,
}

/// Its client's calls.
impl Deref for Kubelet {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Kubelet {
    /// The configuration of a sandbox.
    pub fn sandbox(&self, name: &str) -> PodSandboxConfig {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            uid: format!("{name}-uid"),
            namespace: "faults".into(),
            attempt: 0,
        };
        let has_cgroups = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        PodSandboxConfig {
            metadata: Some(metadata),
            log_directory: self.dir.join("logs").join(name).display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: if has_cgroups {
                    "/hull-faults/pods".into()
                } else {
                    String::new()
                },
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// The configuration of a container, which mounts a directory of the host.
    pub fn container(&self, name: &str, work: Work) -> ContainerConfig {
        let command: Vec<String> = match (self.kind, work) {
            (Kind::Fake, Work::Ends) => vec![format!("lines:{LINES}"), format!("exit:{CODE}")],
            (Kind::Fake, Work::EndsLater) => {
                vec![
                    "sleep:300".into(),
                    format!("lines:{LINES}"),
                    format!("exit:{CODE}"),
                ]
            }
            (Kind::Fake, Work::Waits) => vec!["wait".into()],
            (Kind::Fake, Work::Ticks) => vec!["ticks:100".into()],
            (Kind::Fake, Work::KillsAgent) => vec!["wait".into()],
            (Kind::Real, work) => {
                let lines = format!(
                    "i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done; exit {CODE}"
                );
                let script = match work {
                    Work::Ends => lines,
                    Work::EndsLater => format!("sleep 1; {lines}"),
                    Work::Waits => "exec sleep 100000".into(),
                    Work::Ticks => {
                        "i=0; while :; do echo line $i; i=$((i+1)); sleep 1; done".into()
                    }
                    Work::KillsAgent => KILL_AGENT.into(),
                };
                vec!["/bin/sh".into(), "-c".into(), script]
            }
        };
        let linux = (work == Work::KillsAgent).then(|| LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                privileged: true,
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Node.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(image(if work == Work::KillsAgent {
                STAYS
            } else {
                IMAGE
            })),
            command,
            log_path: format!("{name}.log"),
            linux,
            mounts: vec![Mount {
                container_path: SHARED.into(),
                host_path: self.shared(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    /// The directory of the host that all containers have.
    fn shared(&self) -> String {
        self.dir.join("shared").display().to_string()
    }

    /// Where the checkpoint of this name is.
    pub fn checkpoint_path(&self, name: &str) -> PathBuf {
        self.dir.join("checkpoints").join(name)
    }

    /// Writes a checkpoint of a pod.
    pub async fn checkpoint(&self, pod: &str, path: &Path) -> Result<(), Status> {
        let request = CheckpointPodRequest {
            pod_sandbox_id: pod.to_owned(),
            output_path: path.display().to_string(),
            ..Default::default()
        };
        self.runtime.clone().checkpoint_pod(request).await.map(drop)
    }

    /// Restores a pod from a checkpoint.
    pub async fn restore(&self, path: &Path, config: PodSandboxConfig) -> Result<Pod, Status> {
        let request = RestorePodRequest {
            checkpoint_path: path.display().to_string(),
            config: Some(config.clone()),
            options: [(format!("{RESTORE_MOUNT}{SHARED}"), self.shared())].into(),
            ..Default::default()
        };
        let restored = self.runtime.clone().restore_pod(request).await?;
        let id = restored.into_inner().pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// A restored pod works: its container goes on when it is started. Then it ends.
    pub async fn goes_on(&self, pod: &Pod) -> Result<()> {
        let containers = self.containers_of(pod).await?;
        ensure!(containers.len() == 1, "it has {containers:?}");
        let id = &containers[0].id;
        self.start_container(id).await.context("let it go on")?;
        self.exec(id).await.context("run a command in it")?;
        self.end(pod).await
    }

    /// Nothing is there but whole checkpoints, of which there are some from now on no more.
    pub fn clear_checkpoints(&self) -> Result<()> {
        let all = self.dir.join("checkpoints");
        for name in left::names(&all) {
            let path = all.join(&name);
            ensure!(
                !name.starts_with('.') && path.join("manifest").exists(),
                "a part of a checkpoint is left: {name}"
            );
            fs::remove_dir_all(path)?;
        }
        Ok(())
    }

    /// A pod whose agent can be killed, if that takes a container of it.
    pub async fn run_mortal(&self, name: &str) -> Result<Pod> {
        let mut config = self.sandbox(name);
        let linux = config.linux.get_or_insert_default();
        linux.security_context = Some(LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        });
        let pod = self.run_sandbox(config).await?;
        if self.kind == Kind::Real {
            let id = self
                .create(&pod, self.container("bomb", Work::KillsAgent))
                .await?;
            self.start_container(&id).await?;
        }
        Ok(pod)
    }

    /// Kills the agent of such a pod, with which its VM ends.
    pub async fn kill_agent(&self, pod: &str) -> Result<()> {
        let vmms = || left::processes_of(&self.dir, pod, "/vmm.sock");
        let word = self.dir.join("shared/kill");
        match self.kind {
            // To a VMM that is none, the signal is that its agent was killed.
            Kind::Fake => vmms()
                .into_iter()
                .try_for_each(|pid| signal(pid, Signal::USR1))?,
            Kind::Real => fs::write(&word, "")?,
        }
        let deadline = Instant::now() + PATIENCE;
        while !vmms().is_empty() {
            ensure!(Instant::now() < deadline, "a VM goes on without its agent");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if self.kind == Kind::Real {
            fs::remove_file(word)?;
        }
        Ok(())
    }

    /// What [`Kubelet::exec`] runs.
    fn says_alive(&self) -> Vec<String> {
        match self.kind {
            Kind::Fake => vec!["out:alive".to_owned()],
            Kind::Real => ["/bin/echo", "-n", "alive"].map(String::from).to_vec(),
        }
    }

    /// Runs a command, which says a word, as a stream.
    pub async fn exec_stream(&self, id: &str) -> Result<()> {
        let request = ExecRequest {
            container_id: id.into(),
            cmd: self.says_alive(),
            stdout: true,
            ..Default::default()
        };
        let url = self.runtime.clone().exec(request).await?.into_inner().url;
        let wants = Wants {
            stdin: false,
            stdout: true,
            stderr: false,
            tty: false,
        };
        let transport = Transport::Spdy(&["v4.channel.k8s.io"]);
        let session = command(&Dialer::default(), &url, wants, transport).await?;
        let ended = session.end().await?;
        let code = ended.status.and_then(|status| status.exit_code());
        ensure!(
            ended.stdout == b"alive" && code == Some(0),
            "the command says {:?} and exits with {code:?}",
            ended.stdout
        );
        Ok(())
    }

    /// Gives a container other limits.
    pub async fn update(&self, id: &str) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: Some(other_limits()),
            ..Default::default()
        };
        let mut runtime = self.runtime.clone();
        runtime.update_container_resources(request).await.map(drop)
    }

    /// A container has the limits of [`Kubelet::update`].
    pub async fn is_updated(&self, id: &str) -> Result<()> {
        let status = self.container_status(id).await?;
        let limits = status.resources.and_then(|resources| resources.linux);
        let shares = limits.map(|limits| limits.cpu_shares);
        ensure!(
            shares == Some(OTHER_SHARES),
            "its shares of CPUs are {shares:?}"
        );
        Ok(())
    }

    /// Gives a sandbox other limits.
    pub async fn update_sandbox(&self, id: &str) -> Result<(), Status> {
        let request = UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.into(),
            resources: Some(other_limits()),
            ..Default::default()
        };
        let mut runtime = self.runtime.clone();
        runtime
            .update_pod_sandbox_resources(request)
            .await
            .map(drop)
    }

    /// Has a container's log go on in a new file.
    pub async fn reopen_log(&self, id: &str) -> Result<(), Status> {
        let request = ReopenContainerLogRequest {
            container_id: id.into(),
        };
        let mut runtime = self.runtime.clone();
        runtime.reopen_container_log(request).await.map(drop)
    }

    /// Runs a command, which says a word.
    pub async fn exec(&self, id: &str) -> Result<(), Status> {
        let answer = self.exec_sync(id, self.says_alive(), 30).await?;
        if answer.stdout == b"alive" {
            Ok(())
        } else {
            Err(Status::internal(format!("the command says {answer:?}")))
        }
    }

    /// The containers of a pod.
    pub async fn containers_of(&self, pod: &Pod) -> Result<Vec<Container>, Status> {
        let filter = ContainerFilter {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        self.containers(Some(filter)).await
    }

    /// The sandboxes with this name.
    pub async fn sandboxes_named(&self, name: &str) -> Result<Vec<PodSandbox>, Status> {
        let mut sandboxes = self.sandboxes().await?;
        sandboxes.retain(|item| item.metadata.as_ref().is_some_and(|m| m.name == name));
        Ok(sandboxes)
    }

    /// Runs a pod whose start may have failed, as kubelet does.
    pub async fn run_again(&self, config: &PodSandboxConfig) -> Result<Pod> {
        if let Some(pod) = self.again(config).await? {
            return Ok(pod);
        }
        let run = self.run_sandbox(config.clone()).await;
        run.context("run the pod again")
    }

    /// The pod if it is there and works; what is there of one that does not is ended.
    pub async fn again(&self, config: &PodSandboxConfig) -> Result<Option<Pod>> {
        let name = &config.metadata.as_ref().context("a name")?.name;
        let listed = self.sandboxes_named(name).await?;
        ensure!(listed.len() <= 1, "the pod is there {} times", listed.len());
        for item in listed {
            let pod = Pod {
                id: item.id,
                config: config.clone(),
            };
            if self.is_ready(&pod).await? {
                return Ok(Some(pod));
            }
            self.end(&pod).await?;
        }
        Ok(None)
    }

    pub async fn is_ready(&self, pod: &Pod) -> Result<bool, Status> {
        let status = self.pod_status(&pod.id).await?;
        Ok(status.state() == PodSandboxState::SandboxReady)
    }

    /// Waits until a pod whose VM has ended is not ready any more, or gone.
    pub async fn wait_ended(&self, pod: &Pod) -> Result<()> {
        let begun = Instant::now();
        loop {
            match self.is_ready(pod).await {
                Ok(true) => ensure!(begun.elapsed() < PATIENCE, "the pod is ready without a VM"),
                Err(status) if status.code() != Code::NotFound => return Err(status.into()),
                _ => return Ok(()),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The files of a container's log, oldest first: one may have been renamed.
    fn log_files(pod: &Pod, name: &str) -> [PathBuf; 2] {
        ["log.old", "log"].map(|extension| {
            Path::new(&pod.config.log_directory).join(format!("{name}.{extension}"))
        })
    }

    /// Renames a container's log.
    pub fn rename_log(&self, pod: &Pod, name: &str) -> Result<()> {
        let [old, log] = Self::log_files(pod, name);
        Ok(fs::rename(log, old)?)
    }

    /// A container's log, line by line, without times and tags.
    pub fn log(&self, pod: &Pod, name: &str) -> Vec<String> {
        let files = Self::log_files(pod, name);
        let text = files.map(|path| fs::read_to_string(path).unwrap_or_default());
        text.iter()
            .flat_map(|text| text.lines())
            .map(|line| line.splitn(4, ' ').nth(3).unwrap_or("").to_owned())
            .collect()
    }

    /// A container that ends has ended as it should have, and each of its lines is in its log once.
    pub async fn ended_well(&self, pod: &Pod, name: &str, id: &str) -> Result<()> {
        let status = self.wait_exited(id, PATIENCE).await?;
        ensure!(
            status.exit_code == CODE,
            "it exited with {}: {}",
            status.exit_code,
            status.message
        );
        let log = self.log(pod, name);
        let expected: Vec<_> = (0..LINES).map(|n| format!("line {n}")).collect();
        ensure!(
            log == expected,
            "its log has {} lines: {:?}",
            log.len(),
            log.last()
        );
        Ok(())
    }

    /// A pod works: a container of it runs to its end.
    pub async fn works(&self, pod: &Pod) -> Result<()> {
        ensure!(self.is_ready(pod).await?, "the pod is not ready");
        let config = self.container("works", Work::Ends);
        let id = self
            .create(pod, config)
            .await
            .context("create a container")?;
        self.start_container(&id).await.context("start it")?;
        self.ended_well(pod, "works", &id).await?;
        self.remove_container(&id).await.context("remove it")?;
        self.forget_log(pod, "works");
        Ok(())
    }

    pub fn forget_log(&self, pod: &Pod, name: &str) {
        for path in Self::log_files(pod, name) {
            let _ = fs::remove_file(path);
        }
    }

    /// Ends a pod, as kubelet does until it succeeds.
    pub async fn end(&self, pod: &Pod) -> Result<()> {
        self.stop_sandbox(&pod.id).await.context("stop the pod")?;
        self.remove_sandbox(&pod.id).await.context("remove the pod")
    }
}

fn other_limits() -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_shares: OTHER_SHARES,
        ..Default::default()
    }
}
