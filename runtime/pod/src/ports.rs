//! What pods need from the rest of the node: networks and images.

use std::fmt::Debug;

use futures::future::{BoxFuture, FutureExt};
use hull_image::{DiskExtent, Image, ImageId, ImageStore, StoreError};
use hull_network::{
    GuestNetwork, Network, NetworkError, NetworkRecord, PodLink, PodNetwork, PodNetworkRequest,
};
use hull_spec::error::PodError;
use tokio::sync::watch;

/// Networks of pods.
pub trait PodNetworking: Debug + Send + Sync + 'static {
    /// Chooses the network; makes nothing.
    ///
    /// # Errors
    /// When there is none to choose.
    fn plan<'a>(
        &'a self,
        request: &'a PodNetworkRequest,
    ) -> BoxFuture<'a, Result<NetworkRecord, NetworkError>>;

    /// Makes what was planned, or nothing.
    fn setup(&self, record: NetworkRecord) -> BoxFuture<'_, Result<PodNetwork, NetworkError>>;

    /// Removes it; may be repeated.
    fn teardown<'a>(&'a self, record: &'a NetworkRecord)
    -> BoxFuture<'a, Result<(), NetworkError>>;

    /// Compares it with what was made.
    fn check<'a>(&'a self, record: &'a NetworkRecord) -> BoxFuture<'a, Result<(), NetworkError>>;

    /// Follows what the guest is to have; drop the receiver before the network is torn down.
    fn watch<'a>(
        &'a self,
        record: &'a NetworkRecord,
    ) -> BoxFuture<'a, Result<watch::Receiver<GuestNetwork>, NetworkError>>;

    /// Joins an interface that came later to a tap of this number, which the record has.
    fn join<'a>(
        &'a self,
        record: &'a NetworkRecord,
        number: u8,
    ) -> BoxFuture<'a, Result<PodLink, NetworkError>>;

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
    fn pods(&self) -> BoxFuture<'_, Result<Vec<String>, NetworkError>>;

    /// Removes what a pod without a record has.
    fn remove_orphan<'a>(&'a self, pod_id: &'a str) -> BoxFuture<'a, Result<(), NetworkError>>;
}

impl PodNetworking for Network {
    fn plan<'a>(
        &'a self,
        request: &'a PodNetworkRequest,
    ) -> BoxFuture<'a, Result<NetworkRecord, NetworkError>> {
        self.plan(request).boxed()
    }

    fn setup(&self, record: NetworkRecord) -> BoxFuture<'_, Result<PodNetwork, NetworkError>> {
        self.setup(record).boxed()
    }

    fn teardown<'a>(
        &'a self,
        record: &'a NetworkRecord,
    ) -> BoxFuture<'a, Result<(), NetworkError>> {
        self.teardown(record).boxed()
    }

    fn check<'a>(&'a self, record: &'a NetworkRecord) -> BoxFuture<'a, Result<(), NetworkError>> {
        self.check(record).boxed()
    }

    fn watch<'a>(
        &'a self,
        record: &'a NetworkRecord,
    ) -> BoxFuture<'a, Result<watch::Receiver<GuestNetwork>, NetworkError>> {
        self.watch(record).boxed()
    }

    fn join<'a>(
        &'a self,
        record: &'a NetworkRecord,
        number: u8,
    ) -> BoxFuture<'a, Result<PodLink, NetworkError>> {
        self.join(record, number).boxed()
    }

    fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<BoxFuture<'static, Result<(), NetworkError>>, NetworkError> {
        Ok(self.gc(pods)?.boxed())
    }

    fn pods(&self) -> BoxFuture<'_, Result<Vec<String>, NetworkError>> {
        self.pods().boxed()
    }

    fn remove_orphan<'a>(&'a self, pod_id: &'a str) -> BoxFuture<'a, Result<(), NetworkError>> {
        self.remove_orphan(pod_id).boxed()
    }
}

/// Images of containers.
pub trait PodImages: Debug + Send + Sync + 'static {
    /// Finds an image by name or id.
    fn get<'a>(&'a self, name_or_id: &'a str) -> BoxFuture<'a, Result<Option<Image>, StoreError>>;

    /// The pieces of its disk.
    fn disk<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<DiskExtent>, StoreError>>;

    /// Keeps its disk until `owner` releases it.
    fn lease<'a>(
        &'a self,
        id: &'a ImageId,
        owner: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Gives up all leases of `owner`.
    fn release<'a>(&'a self, owner: &'a str) -> BoxFuture<'a, Result<(), StoreError>>;

    /// All who hold leases.
    fn lease_owners(&self) -> BoxFuture<'_, Result<Vec<String>, StoreError>>;
}

impl PodImages for ImageStore {
    fn get<'a>(&'a self, name_or_id: &'a str) -> BoxFuture<'a, Result<Option<Image>, StoreError>> {
        self.get(name_or_id).boxed()
    }

    fn disk<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Result<Vec<DiskExtent>, StoreError>> {
        self.disk(id).boxed()
    }

    fn lease<'a>(
        &'a self,
        id: &'a ImageId,
        owner: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        self.lease(id, owner).boxed()
    }

    fn release<'a>(&'a self, owner: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        self.release(owner).boxed()
    }

    fn lease_owners(&self) -> BoxFuture<'_, Result<Vec<String>, StoreError>> {
        self.lease_owners().boxed()
    }
}

/// Tells a network failure in the terms of callers.
pub(crate) fn network_error(error: NetworkError) -> PodError {
    PodError::internal("set up or tear down the pod's network", error)
}
