//! All pods of this node: what callers use.

use std::{sync::Arc, time::Duration};

use tokio::sync::broadcast;

use crate::{
    config::PodsConfig,
    error::PodError,
    id::{ContainerId, PodId},
    info::{ContainerInfo, ExecOutput, PodEvent, SandboxInfo},
    ports::{PodImages, PodNetworking},
    spec::{ContainerSpec, SandboxSpec},
};

/// The pods of this node. Clones share them.
///
/// An id may be shortened to a unique prefix. An operation goes on when its caller goes away; a
/// second call with the same specification then joins it.
#[derive(Debug, Clone)]
pub struct Pods {}

impl Pods {
    /// Opens the records, adopts the pods that still run and removes what nobody owns.
    ///
    /// # Errors
    /// When the directories or records can't be used.
    pub async fn open(
        _config: PodsConfig,
        _images: Arc<dyn PodImages>,
        _network: Arc<dyn PodNetworking>,
    ) -> Result<Self, PodError> {
        unimplemented!("not written yet")
    }

    /// Starts a sandbox and returns when it is ready.
    ///
    /// # Errors
    /// See [`PodError`]; nothing of a sandbox that failed stays.
    pub async fn run_sandbox(&self, _spec: SandboxSpec) -> Result<PodId, PodError> {
        unimplemented!("not written yet")
    }

    /// Ends a sandbox's containers, VM and network. A sandbox that is stopped or unknown is
    /// stopped already.
    ///
    /// # Errors
    /// What could not be ended; may be repeated.
    pub async fn stop_sandbox(&self, _id: &str) -> Result<(), PodError> {
        unimplemented!("not written yet")
    }

    /// Stops a sandbox and forgets it with its containers. One that is unknown is removed already.
    ///
    /// # Errors
    /// What could not be removed; may be repeated.
    pub async fn remove_sandbox(&self, _id: &str) -> Result<(), PodError> {
        unimplemented!("not written yet")
    }

    /// Tells about a sandbox.
    ///
    /// # Errors
    /// [`PodError::NotFound`], [`PodError::Ambiguous`].
    pub async fn sandbox(&self, _id: &str) -> Result<SandboxInfo, PodError> {
        unimplemented!("not written yet")
    }

    /// Tells about all sandboxes, by creation time.
    pub async fn sandboxes(&self) -> Vec<SandboxInfo> {
        unimplemented!("not written yet")
    }

    /// Creates a container in a sandbox; its process waits for [`Pods::start_container`].
    ///
    /// # Errors
    /// See [`PodError`]; nothing of a container that failed stays.
    pub async fn create_container(
        &self,
        _pod: &str,
        _spec: ContainerSpec,
    ) -> Result<ContainerId, PodError> {
        unimplemented!("not written yet")
    }

    /// Starts a container that was created.
    ///
    /// # Errors
    /// When its process can't be started (it is then `Exited`), or it is not `Created`.
    pub async fn start_container(&self, _id: &str) -> Result<(), PodError> {
        unimplemented!("not written yet")
    }

    /// Asks a container to end, kills it after `grace`, and returns when it has ended. One that
    /// does not run or is unknown is stopped already.
    ///
    /// # Errors
    /// When it can't be signalled or does not end after the kill.
    pub async fn stop_container(&self, _id: &str, _grace: Duration) -> Result<(), PodError> {
        unimplemented!("not written yet")
    }

    /// Removes a container, killing it first when it runs. One that is unknown is removed already.
    ///
    /// # Errors
    /// When it can't be removed; may be repeated.
    pub async fn remove_container(&self, _id: &str) -> Result<(), PodError> {
        unimplemented!("not written yet")
    }

    /// Tells about a container.
    ///
    /// # Errors
    /// [`PodError::NotFound`], [`PodError::Ambiguous`].
    pub async fn container(&self, _id: &str) -> Result<ContainerInfo, PodError> {
        unimplemented!("not written yet")
    }

    /// Tells about all containers, by creation time.
    pub async fn containers(&self) -> Vec<ContainerInfo> {
        unimplemented!("not written yet")
    }

    /// Waits until a container has exited and its log is complete.
    ///
    /// # Errors
    /// [`PodError::NotFound`], also when it is removed meanwhile.
    pub async fn wait_container(&self, _id: &str) -> Result<ContainerInfo, PodError> {
        unimplemented!("not written yet")
    }

    /// Runs a command in a running container; its process tree is killed after `timeout`
    /// (none: no limit).
    ///
    /// # Errors
    /// [`PodError::DeadlineExceeded`] after `timeout`; see [`PodError`] for others.
    pub async fn exec_sync(
        &self,
        _id: &str,
        _args: Vec<String>,
        _timeout: Option<Duration>,
    ) -> Result<ExecOutput, PodError> {
        unimplemented!("not written yet")
    }

    /// Counters of a sandbox's VM.
    ///
    /// # Errors
    /// [`PodError::Unavailable`] when the VM is gone; see [`PodError`] for others.
    pub async fn vm_metrics(&self, _id: &str) -> Result<hull_proto_vmm::Metrics, PodError> {
        unimplemented!("not written yet")
    }

    /// News of all pods from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<PodEvent> {
        unimplemented!("not written yet")
    }
}
