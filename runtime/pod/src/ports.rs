//! What pods need from the rest of the node: networks, images and processes.

use std::{fmt::Debug, os::fd::OwnedFd, path::Path};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use hull_image::{DiskExtent, Image, ImageId, ImageStore, StoreError};
use hull_network::{
    GuestNetwork, Network, NetworkError, NetworkRecord, PodLink, PodNetwork, PodNetworkRequest,
};
use hull_spec::{config::PodsConfig, error::PodError, id::PodId};
use hull_vm::{
    cgroup::PodCgroup,
    identity::Identity,
    process::{self, Found, Process},
    rundir::RunDir,
};
use tokio::sync::watch;

/// Networks of pods.
#[async_trait]
pub trait PodNetworking: Debug + Send + Sync + 'static {
    /// Chooses the network; makes nothing.
    ///
    /// # Errors
    /// When there is none to choose.
    async fn plan(&self, request: &PodNetworkRequest) -> Result<NetworkRecord, NetworkError>;

    /// Makes what was planned, or nothing.
    async fn setup(&self, record: NetworkRecord) -> Result<PodNetwork, NetworkError>;

    /// Removes it; may be repeated.
    async fn teardown(&self, record: &NetworkRecord) -> Result<(), NetworkError>;

    /// Compares it with what was made.
    async fn check(&self, record: &NetworkRecord) -> Result<(), NetworkError>;

    /// Follows what the guest is to have; drop the receiver before the network is torn down.
    async fn watch(
        &self,
        record: &NetworkRecord,
    ) -> Result<watch::Receiver<GuestNetwork>, NetworkError>;

    /// Joins an interface that came later to a tap of this number, which the record has.
    async fn join(&self, record: &NetworkRecord, number: u8) -> Result<PodLink, NetworkError>;

    /// Frees what plugins hold for other pods than these. Nothing is set up or torn down from
    /// this call on until the future is done.
    ///
    /// # Errors
    /// When pods come and go at the time of the call.
    fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<BoxFuture<'static, Result<(), NetworkError>>, NetworkError>;

    /// Ids of the pods that have something of a network.
    async fn pods(&self) -> Result<Vec<String>, NetworkError>;

    /// Removes what a pod without a record has.
    async fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError>;
}

#[async_trait]
impl PodNetworking for Network {
    async fn plan(&self, request: &PodNetworkRequest) -> Result<NetworkRecord, NetworkError> {
        self.plan(request).await
    }

    async fn setup(&self, record: NetworkRecord) -> Result<PodNetwork, NetworkError> {
        self.setup(record).await
    }

    async fn teardown(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        self.teardown(record).await
    }

    async fn check(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        self.check(record).await
    }

    async fn watch(
        &self,
        record: &NetworkRecord,
    ) -> Result<watch::Receiver<GuestNetwork>, NetworkError> {
        self.watch(record).await
    }

    async fn join(&self, record: &NetworkRecord, number: u8) -> Result<PodLink, NetworkError> {
        self.join(record, number).await
    }

    fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<BoxFuture<'static, Result<(), NetworkError>>, NetworkError> {
        Ok(self.gc(pods)?.boxed())
    }

    async fn pods(&self) -> Result<Vec<String>, NetworkError> {
        self.pods().await
    }

    async fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError> {
        self.remove_orphan(pod_id).await
    }
}

/// Images of containers.
#[async_trait]
pub trait PodImages: Debug + Send + Sync + 'static {
    /// Finds an image by name or id.
    async fn get(&self, name_or_id: &str) -> Result<Option<Image>, StoreError>;

    /// The pieces of its disk.
    async fn disk(&self, id: &ImageId) -> Result<Vec<DiskExtent>, StoreError>;

    /// Keeps its disk until `owner` releases it.
    async fn lease(&self, id: &ImageId, owner: &str) -> Result<(), StoreError>;

    /// Gives up all leases of `owner`.
    async fn release(&self, owner: &str) -> Result<(), StoreError>;

    /// All who hold leases.
    async fn lease_owners(&self) -> Result<Vec<String>, StoreError>;
}

#[async_trait]
impl PodImages for ImageStore {
    async fn get(&self, name_or_id: &str) -> Result<Option<Image>, StoreError> {
        self.get(name_or_id).await
    }

    async fn disk(&self, id: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
        self.disk(id).await
    }

    async fn lease(&self, id: &ImageId, owner: &str) -> Result<(), StoreError> {
        self.lease(id, owner).await
    }

    async fn release(&self, owner: &str) -> Result<(), StoreError> {
        self.release(owner).await
    }

    async fn lease_owners(&self) -> Result<Vec<String>, StoreError> {
        self.lease_owners().await
    }
}

/// The processes of pods.
pub trait PodProcesses: Debug + Send + Sync + 'static {
    /// See [`Process::spawn_vmm`].
    ///
    /// # Errors
    /// When it can't be started, or put into `cgroup`.
    fn spawn_vmm(
        &self,
        program: &Path,
        pod: &PodId,
        user: u32,
        run: &RunDir,
        cgroup: Option<&PodCgroup>,
    ) -> Result<Process, PodError>;

    /// See [`Process::spawn_file_server`].
    ///
    /// # Errors
    /// When it can't be started.
    fn spawn_file_server(
        &self,
        program: &Path,
        pod: &PodId,
        run: &RunDir,
        cgroup: Option<&PodCgroup>,
        fuse: OwnedFd,
    ) -> Result<Process, PodError>;

    /// See [`Process::find`].
    fn find(&self, identity: Identity) -> Option<Process>;

    /// See [`process::find_all`]. Blocks.
    fn find_all(&self, config: &PodsConfig) -> Vec<Found>;
}

/// The processes of this host.
#[derive(Debug)]
pub(crate) struct HostProcesses;

impl PodProcesses for HostProcesses {
    fn spawn_vmm(
        &self,
        program: &Path,
        pod: &PodId,
        user: u32,
        run: &RunDir,
        cgroup: Option<&PodCgroup>,
    ) -> Result<Process, PodError> {
        Process::spawn_vmm(program, pod, user, run, cgroup)
    }

    fn spawn_file_server(
        &self,
        program: &Path,
        pod: &PodId,
        run: &RunDir,
        cgroup: Option<&PodCgroup>,
        fuse: OwnedFd,
    ) -> Result<Process, PodError> {
        Process::spawn_file_server(program, pod, run, cgroup.map(PodCgroup::path), fuse)
    }

    fn find(&self, identity: Identity) -> Option<Process> {
        Process::find(identity)
    }

    fn find_all(&self, config: &PodsConfig) -> Vec<Found> {
        process::find_all(config)
    }
}

/// Tells a network failure in the terms of callers.
pub(crate) fn network_error(error: NetworkError) -> PodError {
    PodError::internal("set up or tear down the pod's network", error)
}
