//! What the daemon's pods need from the rest of the node: networks and images, which fail and take their
//! time.

use std::{collections::BTreeMap, io, sync::Mutex};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use hull_image::{DiskExtent, Image, ImageId, StoreError};
use hull_network::{
    GuestNetwork, NetworkError, NetworkRecord, PodLink, PodNetwork, PodNetworkRequest,
};
use hull_pod::{PodImages, PodNetworking};
use tokio::{sync::watch, task::yield_now, time::sleep};

use crate::{
    common::{images::FakeImages, network::FakeNetwork},
    dice, kernel,
    trace::{fault, trace},
};

/// Where a daemon that was killed stays; else some time passes.
async fn pause() {
    yield_now().await;
    if kernel::is_dead() {
        std::future::pending::<()>().await;
    }
    if dice::one_in(8) {
        sleep(dice::ms(1..200)).await;
    }
    if dice::fault_in(200) {
        trace(format_args!("a plugin hangs"));
        sleep(dice::ms(10_000..100_000)).await;
    }
}

fn network_fault() -> NetworkError {
    trace(format_args!("a plugin fails"));
    NetworkError::List(io::Error::other("as the seed says"))
}

/// Networks that are counted.
#[derive(Debug)]
pub struct Networks {
    fake: FakeNetwork,
    /// How often each was added, and removed.
    adds: Mutex<BTreeMap<String, (u32, u32)>>,
}

impl Networks {
    pub fn new(fake: FakeNetwork) -> Self {
        Self {
            fake,
            adds: Mutex::default(),
        }
    }

    /// What is there.
    pub fn up(&self) -> Vec<String> {
        self.fake.up().into_iter().collect()
    }

    /// Networks that were added and never removed.
    pub fn without_removal(&self) -> Vec<String> {
        let adds = self.adds.lock().unwrap();
        let left = adds.iter().filter(|(_, (_, removals))| *removals == 0);
        left.map(|(pod, _)| pod.clone()).collect()
    }

    fn note_removal(&self, pod: &str) {
        if let Some((_, removals)) = self.adds.lock().unwrap().get_mut(pod) {
            *removals += 1;
        }
    }
}

#[async_trait]
impl PodNetworking for Networks {
    async fn plan(&self, request: &PodNetworkRequest) -> Result<NetworkRecord, NetworkError> {
        pause().await;
        self.fake.plan(request).await
    }

    async fn setup(&self, record: NetworkRecord) -> Result<PodNetwork, NetworkError> {
        pause().await;
        if dice::fault_in(20) {
            return Err(network_fault());
        }
        let pod = record.pod_id.clone();
        if self.fake.up().contains(&pod) {
            fault(format!("the network of {pod} is added twice"));
        }
        trace(format_args!("network of {} is added", &pod[..13]));
        self.adds.lock().unwrap().entry(pod).or_default().0 += 1;
        let made = self.fake.setup(record).await;
        pause().await;
        made
    }

    async fn teardown(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        pause().await;
        if dice::fault_in(10) {
            return Err(network_fault());
        }
        trace(format_args!(
            "network of {} is removed",
            &record.pod_id[..13]
        ));
        self.note_removal(&record.pod_id);
        let result = self.fake.teardown(record).await;
        pause().await;
        result
    }

    async fn check(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        self.fake.check(record).await
    }

    async fn watch(
        &self,
        record: &NetworkRecord,
    ) -> Result<watch::Receiver<GuestNetwork>, NetworkError> {
        pause().await;
        self.fake.watch(record).await
    }

    async fn join(&self, record: &NetworkRecord, number: u8) -> Result<PodLink, NetworkError> {
        self.fake.join(record, number).await
    }

    fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<BoxFuture<'static, Result<(), NetworkError>>, NetworkError> {
        let gc = self.fake.gc(pods)?;
        Ok(async move {
            pause().await;
            gc.await
        }
        .boxed())
    }

    async fn pods(&self) -> Result<Vec<String>, NetworkError> {
        pause().await;
        self.fake.pods().await
    }

    async fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError> {
        pause().await;
        self.note_removal(pod_id);
        self.fake.remove_orphan(pod_id).await
    }
}

/// Images whose leases are counted.
#[derive(Debug)]
pub struct Images(pub FakeImages);

fn image_fault() -> StoreError {
    StoreError::Io {
        action: "as the seed says".into(),
        source: io::Error::from_raw_os_error(libc::EIO),
    }
}

#[async_trait]
impl PodImages for Images {
    async fn get(&self, name_or_id: &str) -> Result<Option<Image>, StoreError> {
        pause().await;
        self.0.get(name_or_id).await
    }

    async fn disk(&self, id: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
        pause().await;
        if dice::fault_in(50) {
            return Err(image_fault());
        }
        self.0.disk(id).await
    }

    async fn lease(&self, id: &ImageId, owner: &str) -> Result<(), StoreError> {
        pause().await;
        if dice::fault_in(50) {
            return Err(image_fault());
        }
        self.0.lease(id, owner).await?;
        pause().await;
        Ok(())
    }

    async fn release(&self, owner: &str) -> Result<(), StoreError> {
        pause().await;
        if dice::fault_in(30) {
            return Err(image_fault());
        }
        self.0.release(owner).await?;
        pause().await;
        Ok(())
    }

    async fn lease_owners(&self) -> Result<Vec<String>, StoreError> {
        pause().await;
        self.0.lease_owners().await
    }
}
