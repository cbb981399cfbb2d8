//! What kubelet calls, and what it is sure of afterwards.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use hull_proto_cri::v1::*;
use hull_tests::client::{Client, image};
use tonic::Status;

use crate::kind::{Kind, PATIENCE};

/// The image of all containers.
pub const IMAGE: &str = "registry.test/demo/busybox:latest";
/// One that comes and goes.
pub const OTHER: &str = "registry.test/demo/static:latest";
/// The exit code of a container that ends.
pub const CODE: i32 = 7;
/// The lines of a container that ends.
const LINES: usize = 50;

/// A pod.
#[derive(Debug, Clone)]
pub struct Pod {
    pub id: String,
    pub config: PodSandboxConfig,
}

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
}

/// A client with the daemon, as kubelet is one. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Kubelet {
    pub kind: Kind,
    /// Of the node.
    pub dir: PathBuf,
    pub client: Client,
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

    pub async fn run_sandbox(&self, config: &PodSandboxConfig) -> Result<Pod, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let answer = self.client.runtime.clone().run_pod_sandbox(request).await?;
        Ok(Pod {
            id: answer.into_inner().pod_sandbox_id,
            config: config.clone(),
        })
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
            (Kind::Fake, Work::Ticks) => {
                let ticks =
                    (0..3000).flat_map(|n| [format!("out:line {n}\\n"), "sleep:100".into()]);
                ticks.chain(["wait".into()]).collect()
            }
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
                };
                vec!["/bin/sh".into(), "-c".into(), script]
            }
        };
        ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(image(IMAGE)),
            command,
            log_path: format!("{name}.log"),
            mounts: vec![Mount {
                container_path: "/shared".into(),
                host_path: self.dir.join("shared").display().to_string(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    pub async fn create(&self, pod: &Pod, config: &ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self
            .client
            .runtime
            .clone()
            .create_container(request)
            .await?;
        Ok(answer.into_inner().container_id)
    }

    pub async fn start_container(&self, id: &str) -> Result<(), Status> {
        let container_id = id.to_owned();
        let request = StartContainerRequest { container_id };
        self.client
            .runtime
            .clone()
            .start_container(request)
            .await
            .map(drop)
    }

    pub async fn stop_container(&self, id: &str) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.into(),
            timeout: 1,
        };
        self.client
            .runtime
            .clone()
            .stop_container(request)
            .await
            .map(drop)
    }

    pub async fn remove_container(&self, id: &str) -> Result<(), Status> {
        let container_id = id.to_owned();
        let request = RemoveContainerRequest { container_id };
        self.client
            .runtime
            .clone()
            .remove_container(request)
            .await
            .map(drop)
    }

    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Status> {
        let pod_sandbox_id = id.to_owned();
        let request = StopPodSandboxRequest { pod_sandbox_id };
        self.client
            .runtime
            .clone()
            .stop_pod_sandbox(request)
            .await
            .map(drop)
    }

    pub async fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        let pod_sandbox_id = id.to_owned();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        self.client
            .runtime
            .clone()
            .remove_pod_sandbox(request)
            .await
            .map(drop)
    }

    pub async fn remove_image(&self, name: &str) -> Result<(), Status> {
        let request = RemoveImageRequest {
            image: Some(image(name)),
        };
        self.client
            .images
            .clone()
            .remove_image(request)
            .await
            .map(drop)
    }

    /// Runs a command, which says a word.
    pub async fn exec(&self, id: &str) -> Result<(), Status> {
        let command = match self.kind {
            Kind::Fake => vec!["out:alive".to_owned()],
            Kind::Real => ["/bin/echo", "-n", "alive"].map(String::from).to_vec(),
        };
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: command,
            timeout: 30,
        };
        let answer = self
            .client
            .runtime
            .clone()
            .exec_sync(request)
            .await?
            .into_inner();
        if answer.stdout == b"alive" {
            Ok(())
        } else {
            Err(Status::internal(format!("the command says {answer:?}")))
        }
    }

    /// The containers of a pod, by name.
    pub async fn containers(&self, pod: &Pod) -> Result<Vec<Container>, Status> {
        let filter = ContainerFilter {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        let request = ListContainersRequest {
            filter: Some(filter),
        };
        let answer = self.client.runtime.clone().list_containers(request).await?;
        Ok(answer.into_inner().containers)
    }

    /// The sandboxes with this name.
    pub async fn sandboxes(&self, name: &str) -> Result<Vec<PodSandbox>, Status> {
        let request = ListPodSandboxRequest { filter: None };
        let answer = self
            .client
            .runtime
            .clone()
            .list_pod_sandbox(request)
            .await?;
        let mut items = answer.into_inner().items;
        items.retain(|item| item.metadata.as_ref().is_some_and(|m| m.name == name));
        Ok(items)
    }

    pub async fn is_ready(&self, pod: &Pod) -> Result<bool, Status> {
        let status = self.client.pod_status(&pod.id).await?;
        Ok(status.state() == PodSandboxState::SandboxReady)
    }

    /// A container's log, line by line, without times and tags.
    pub fn log(&self, pod: &Pod, name: &str) -> Vec<String> {
        let path = Path::new(&pod.config.log_directory).join(format!("{name}.log"));
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .map(|line| line.splitn(4, ' ').nth(3).unwrap_or("").to_owned())
            .collect()
    }

    /// A container that ends has ended as it should have, and each of its lines is in its log once.
    pub async fn ended_well(&self, pod: &Pod, name: &str, id: &str) -> Result<()> {
        let status = self.client.wait_exited(id, PATIENCE).await?;
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
            .create(pod, &config)
            .await
            .context("create a container")?;
        self.start_container(&id).await.context("start it")?;
        self.ended_well(pod, "works", &id).await?;
        self.remove_container(&id).await.context("remove it")?;
        self.forget_log(pod, "works");
        Ok(())
    }

    pub fn forget_log(&self, pod: &Pod, name: &str) {
        let _ = fs::remove_file(Path::new(&pod.config.log_directory).join(format!("{name}.log")));
    }

    /// Ends a pod, as kubelet does until it succeeds.
    pub async fn end(&self, pod: &Pod) -> Result<()> {
        self.stop_sandbox(&pod.id).await.context("stop the pod")?;
        self.remove_sandbox(&pod.id).await.context("remove the pod")
    }
}
