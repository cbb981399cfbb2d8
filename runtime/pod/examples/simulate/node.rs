//! What the daemon's pods need from the rest of the node: networks and images, which fail and take their
//! time.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Mutex,
};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use hull_image::{DiskExtent, Image, ImageId, StoreError};
use hull_network::{
    GuestInterface, GuestNetwork, NetworkError, NetworkRecord, PodLink, PodNetwork,
    PodNetworkRequest,
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

/// An interface that comes later.
const LATER: &str = "net1";

/// Networks that are counted.
#[derive(Debug)]
pub struct Networks {
    fake: FakeNetwork,
    /// How often each was added, and removed.
    adds: Mutex<BTreeMap<String, (u32, u32)>>,
    /// What is in each.
    guests: Mutex<BTreeMap<String, watch::Sender<GuestNetwork>>>,
}

impl Networks {
    pub fn new(fake: FakeNetwork) -> Self {
        Self {
            fake,
            adds: Mutex::default(),
            guests: Mutex::default(),
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

    /// Something on the node adds an interface to a pod, or removes it.
    pub fn change_links(&self) {
        let guests = self.guests.lock().unwrap();
        let pods: Vec<&String> = guests.keys().collect();
        if pods.is_empty() {
            return;
        }
        let pod = dice::pick(&pods);
        guests[pod].send_modify(|guest| {
            let before = guest.interfaces.len();
            guest.interfaces.retain(|link| link.name != LATER);
            if guest.interfaces.len() < before {
                trace(format_args!("{LATER} of {} goes", &pod[..13]));
                guest.missing.push(LATER.into());
            } else if guest.unjoined.is_empty() {
                trace(format_args!("{LATER} of {} comes", &pod[..13]));
                guest.missing.clear();
                guest.unjoined.push(LATER.into());
            } else {
                trace(format_args!("{LATER} of {} goes again", &pod[..13]));
                guest.unjoined.clear();
            }
        });
    }

    fn note_removal(&self, pod: &str) {
        self.guests.lock().unwrap().remove(pod);
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
        let plan = record.clone();
        if self.fake.up().contains(&pod) {
            fault(format!("the network of {pod} is added twice"));
        }
        trace(format_args!("network of {} is added", &pod[..13]));
        let guest = watch::channel(GuestNetwork::default()).0;
        self.guests.lock().unwrap().insert(pod.clone(), guest);
        self.adds.lock().unwrap().entry(pod).or_default().0 += 1;
        let made = self.fake.setup(record).await;
        pause().await;
        if dice::fault_in(20) {
            // It undoes what it did, as well as it can.
            return Err(match self.teardown(&plan).await {
                Ok(()) => network_fault(),
                Err(undo) => NetworkError::Undo {
                    failure: Box::new(network_fault()),
                    undo: Box::new(undo),
                },
            });
        }
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
        if dice::fault_in(20) {
            // All of it is gone, and a plugin says that it failed.
            return Err(network_fault());
        }
        result
    }

    /// It is as it was, whatever a plugin says.
    async fn check(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        pause().await;
        if dice::fault_in(4) {
            return Err(network_fault());
        }
        self.fake.check(record).await
    }

    async fn watch(
        &self,
        record: &NetworkRecord,
    ) -> Result<watch::Receiver<GuestNetwork>, NetworkError> {
        pause().await;
        if dice::fault_in(20) {
            return Err(network_fault());
        }
        let guests = self.guests.lock().unwrap();
        let guest = guests.get(&record.pod_id).ok_or_else(network_fault)?;
        Ok(guest.subscribe())
    }

    async fn join(&self, record: &NetworkRecord, number: u8) -> Result<PodLink, NetworkError> {
        pause().await;
        if dice::fault_in(10) {
            return Err(network_fault());
        }
        trace(format_args!(
            "link {number} of {} is joined",
            &record.pod_id[..13]
        ));
        if let Some(guest) = self.guests.lock().unwrap().get(&record.pod_id) {
            guest.send_modify(|guest| {
                let names = guest.unjoined.drain(..);
                guest.interfaces.extend(names.map(link));
            });
        }
        self.fake.join(record, number).await
    }

    fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<BoxFuture<'static, Result<(), NetworkError>>, NetworkError> {
        if dice::fault_in(8) {
            return Err(NetworkError::Busy);
        }
        let gc = self.fake.gc(pods)?;
        Ok(async move {
            pause().await;
            if dice::fault_in(8) {
                return Err(network_fault());
            }
            gc.await
        }
        .boxed())
    }

    async fn pods(&self) -> Result<Vec<String>, NetworkError> {
        pause().await;
        if dice::fault_in(20) {
            return Err(network_fault());
        }
        self.fake.pods().await
    }

    async fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError> {
        pause().await;
        if dice::fault_in(10) {
            return Err(network_fault());
        }
        self.note_removal(pod_id);
        self.fake.remove_orphan(pod_id).await
    }
}

fn link(name: String) -> GuestInterface {
    GuestInterface {
        mac: String::new(),
        name,
        mtu: 1500,
        addresses: Vec::new(),
        lone_addresses: Vec::new(),
    }
}

/// Images whose leases are counted.
#[derive(Debug)]
pub struct Images {
    fake: FakeImages,
    /// Whose leases were refused to be given up: the next daemon's start tries that again.
    kept: Mutex<BTreeSet<String>>,
}

impl Images {
    pub fn new(fake: FakeImages) -> Self {
        Self {
            fake,
            kept: Mutex::default(),
        }
    }

    /// Who has leases, but for those that were to be given up and could not.
    pub fn leases(&self) -> Vec<String> {
        let kept = self.kept.lock().unwrap();
        let leases = self.fake.leases().into_iter();
        leases.filter(|owner| !kept.contains(owner)).collect()
    }
}

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
        self.fake.get(name_or_id).await
    }

    async fn disk(&self, id: &ImageId) -> Result<Vec<DiskExtent>, StoreError> {
        pause().await;
        if dice::fault_in(50) {
            return Err(image_fault());
        }
        self.fake.disk(id).await
    }

    async fn lease(&self, id: &ImageId, owner: &str) -> Result<(), StoreError> {
        pause().await;
        if dice::fault_in(50) {
            return Err(image_fault());
        }
        self.fake.lease(id, owner).await?;
        pause().await;
        Ok(())
    }

    async fn release(&self, owner: &str) -> Result<(), StoreError> {
        pause().await;
        if dice::fault_in(30) {
            self.kept.lock().unwrap().insert(owner.into());
            return Err(image_fault());
        }
        self.kept.lock().unwrap().remove(owner);
        self.fake.release(owner).await?;
        pause().await;
        Ok(())
    }

    async fn lease_owners(&self) -> Result<Vec<String>, StoreError> {
        pause().await;
        self.fake.lease_owners().await
    }
}
