//! A connection to a CRI socket.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, Result};
use hull_proto_cri::v1::{
    Container, ContainerConfig, ContainerFilter, ContainerState, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    ListContainersRequest, ListPodSandboxRequest, PodSandbox, PodSandboxConfig, PodSandboxStatus,
    PodSandboxStatusRequest, PullImageRequest, RemoveContainerRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopPodSandboxRequest, VersionRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// The largest answer accepted, bytes: `ExecSync` returns up to 16 MiB per stream.
const MAX_ANSWER: usize = 40 << 20;

/// A sandbox that was run.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: PodSandboxConfig,
}

/// Both CRI services over one connection. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    /// Pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
}

impl Client {
    /// Connects to a Unix socket, given as a path or as `unix:///path`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(endpoint: &str) -> Result<Self> {
        let path = endpoint
            .strip_prefix("unix://")
            .or_else(|| endpoint.strip_prefix("unix:"))
            .unwrap_or(endpoint);
        let channel = Endpoint::from_shared(format!("unix:{path}"))?
            .connect()
            .await
            .with_context(|| format!("connect to {path}"))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_ANSWER),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER),
        })
    }

    /// As [`Client::connect`] to a daemon that answers. A process that a killed daemon was just starting has its
    /// socket until it executes its program, and connections to that are lost.
    ///
    /// # Errors
    /// As [`Client::connect`], and that of the daemon's answer.
    pub async fn connect_to_new(endpoint: &str) -> Result<Self> {
        let client = Self::connect(endpoint).await?;
        let mut runtime = client.runtime.clone();
        let answer = runtime.version(VersionRequest::default()).await;
        answer.context("ask for its version")?;
        Ok(client)
    }

    /// As [`Client::connect_to_new`], but waits for a daemon that is still starting.
    ///
    /// # Errors
    /// The last attempt's, when `patience` has passed.
    pub async fn connect_within(socket: &Path, patience: Duration) -> Result<Self> {
        let endpoint = socket.to_str().context("socket path is not UTF-8")?;
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            match Self::connect_to_new(endpoint).await {
                Ok(client) => return Ok(client),
                Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Pulls an image without credentials and returns its id.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn pull(&self, reference: &str) -> Result<String, Status> {
        let request = PullImageRequest {
            image: Some(image(reference)),
            ..Default::default()
        };
        let answer = self.images.clone().pull_image(request).await?;
        Ok(answer.into_inner().image_ref)
    }

    /// Removes an image.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove_image(&self, reference: &str) -> Result<(), Status> {
        let request = RemoveImageRequest {
            image: Some(image(reference)),
        };
        let answer = self.images.clone().remove_image(request).await;
        answer.map(drop)
    }

    /// Runs a sandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn run_sandbox(&self, config: PodSandboxConfig) -> Result<Pod, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let answer = self.runtime.clone().run_pod_sandbox(request).await?;
        Ok(Pod {
            id: answer.into_inner().pod_sandbox_id,
            config,
        })
    }

    /// Stops a sandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        let answer = self.runtime.clone().stop_pod_sandbox(request).await;
        answer.map(drop)
    }

    /// Removes a sandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: id.into(),
        };
        let answer = self.runtime.clone().remove_pod_sandbox(request).await;
        answer.map(drop)
    }

    /// All sandboxes.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn sandboxes(&self) -> Result<Vec<PodSandbox>, Status> {
        let request = ListPodSandboxRequest { filter: None };
        let answer = self.runtime.clone().list_pod_sandbox(request).await?;
        Ok(answer.into_inner().items)
    }

    /// Creates a container and returns its id.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn create(&self, pod: &Pod, config: ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self.runtime.clone().create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn start_container(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: id.into(),
        };
        let answer = self.runtime.clone().start_container(request).await;
        answer.map(drop)
    }

    /// Stops a container, which has so many seconds to end by itself.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn stop_container(&self, id: &str, grace: i64) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.into(),
            timeout: grace,
        };
        let answer = self.runtime.clone().stop_container(request).await;
        answer.map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn remove_container(&self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest {
            container_id: id.into(),
        };
        let answer = self.runtime.clone().remove_container(request).await;
        answer.map(drop)
    }

    /// The containers that pass a filter; without one, all.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn containers(
        &self,
        filter: Option<ContainerFilter>,
    ) -> Result<Vec<Container>, Status> {
        let request = ListContainersRequest { filter };
        let answer = self.runtime.clone().list_containers(request).await?;
        Ok(answer.into_inner().containers)
    }

    /// Runs a command in a container to its end, or for so many seconds; 0: without limit.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        timeout: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.into(),
            cmd: command,
            timeout,
        };
        let answer = self.runtime.clone().exec_sync(request).await?;
        Ok(answer.into_inner())
    }

    /// The status of a pod sandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn pod_status(&self, id: &str) -> Result<PodSandboxStatus, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.clone().pod_sandbox_status(request).await?;
        answer
            .into_inner()
            .status
            .ok_or_else(|| Status::internal("answer has no status"))
    }

    /// The status of a container.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn container_status(&self, id: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.clone().container_status(request).await?;
        answer
            .into_inner()
            .status
            .ok_or_else(|| Status::internal("answer has no status"))
    }

    /// Waits until a container has exited and returns its last status.
    ///
    /// # Errors
    /// The daemon's, or that it still runs when `patience` has passed.
    pub async fn wait_exited(&self, id: &str, patience: Duration) -> Result<ContainerStatus> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let status = self.container_status(id).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if tokio::time::Instant::now() >= deadline {
                anyhow::bail!("container {id} is still {:?}", status.state());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// An image by its name.
#[must_use]
pub fn image(reference: &str) -> ImageSpec {
    ImageSpec {
        image: reference.to_owned(),
        ..Default::default()
    }
}

/// Labels or annotations from pairs.
#[must_use]
pub fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
