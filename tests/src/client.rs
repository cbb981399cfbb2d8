//! A connection to a CRI socket.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, Result};
use hull_proto_cri::v1::{
    ContainerState, ContainerStatus, ContainerStatusRequest, ImageSpec, PodSandboxStatus,
    PodSandboxStatusRequest, PullImageRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use tonic::transport::{Channel, Endpoint};

/// The largest answer accepted, bytes: `ExecSync` returns up to 16 MiB per stream.
const MAX_ANSWER: usize = 40 << 20;

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

    /// As [`Client::connect`], but waits for a daemon that is still starting.
    ///
    /// # Errors
    /// The last attempt's, when `patience` has passed.
    pub async fn connect_within(socket: &Path, patience: Duration) -> Result<Self> {
        let endpoint = socket.to_str().context("socket path is not UTF-8")?;
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            match Self::connect(endpoint).await {
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
    pub async fn pull(&self, reference: &str) -> Result<String, tonic::Status> {
        let request = PullImageRequest {
            image: Some(image(reference)),
            ..Default::default()
        };
        let answer = self.images.clone().pull_image(request).await?;
        Ok(answer.into_inner().image_ref)
    }

    /// The status of a pod sandbox.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn pod_status(&self, id: &str) -> Result<PodSandboxStatus, tonic::Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.clone().pod_sandbox_status(request).await?;
        answer
            .into_inner()
            .status
            .ok_or_else(|| tonic::Status::internal("answer has no status"))
    }

    /// The status of a container.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn container_status(&self, id: &str) -> Result<ContainerStatus, tonic::Status> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer = self.runtime.clone().container_status(request).await?;
        answer
            .into_inner()
            .status
            .ok_or_else(|| tonic::Status::internal("answer has no status"))
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
