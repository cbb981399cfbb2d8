//! Networks that are only counted.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use hull_network::{
    Dns, GuestInterface, GuestNetwork, Network, NetworkConfig, NetworkError, NetworkRecord,
    PodLink, PodNetwork, PodNetworkRequest,
};
use hull_pod::PodNetworking;
use tokio::sync::watch;

/// What goes wrong.
#[derive(Debug, Default)]
pub struct Faults {
    pub setup: bool,
    pub teardown: bool,
    /// It never ends.
    pub join: bool,
    /// The call of this name panics, once.
    pub panic: Option<&'static str>,
}

#[derive(Debug)]
pub struct FakeNetwork {
    real: Network,
    up: Mutex<BTreeSet<String>>,
    /// The pods that the last GC was told of.
    pub valid: Mutex<Option<Vec<String>>>,
    pub faults: Mutex<Faults>,
    /// A call has come to the fault `join`.
    pub joining: AtomicBool,
    /// While it is true, no set-up ends.
    pub held: watch::Sender<bool>,
    /// What the guest is to have.
    pub guest: watch::Sender<GuestNetwork>,
}

impl FakeNetwork {
    /// A network whose plugin exists, but is never run.
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        let conf = r#"{"cniVersion":"1.0.0","name":"fake","plugins":[{"type":"fake"}]}"#;
        fs::write(dir.join("10-fake.conflist"), conf).unwrap();
        fs::write(dir.join("fake"), "").unwrap();
        fs::set_permissions(dir.join("fake"), fs::Permissions::from_mode(0o755)).unwrap();
        let real = Network::new(NetworkConfig {
            conf_dir: dir.into(),
            bin_dirs: vec![dir.into()],
            netns_dir: dir.join("netns"),
            cache_dir: dir.join("cache"),
            ..NetworkConfig::default()
        });
        Self {
            real,
            up: Mutex::default(),
            valid: Mutex::default(),
            faults: Mutex::default(),
            joining: AtomicBool::new(false),
            held: watch::channel(false).0,
            guest: watch::channel(GuestNetwork::default()).0,
        }
    }

    pub fn up(&self) -> BTreeSet<String> {
        self.up.lock().unwrap().clone()
    }

    fn panic_at(&self, call: &str) {
        let mut faults = self.faults.lock().unwrap();
        if faults.panic.take_if(|at| *at == call).is_some() {
            drop(faults);
            panic!("as the test says");
        }
    }

    pub fn add_orphan(&self, pod: &str) {
        self.up.lock().unwrap().insert(pod.into());
    }
}

fn fault() -> NetworkError {
    NetworkError::List(std::io::Error::other("as the test says"))
}

#[async_trait]
impl PodNetworking for FakeNetwork {
    async fn plan(&self, request: &PodNetworkRequest) -> Result<NetworkRecord, NetworkError> {
        self.real.plan(request).await
    }

    async fn setup(&self, mut record: NetworkRecord) -> Result<PodNetwork, NetworkError> {
        self.panic_at("setup");
        match *self.faults.lock().unwrap() {
            Faults {
                setup: true,
                teardown: true,
                ..
            } => {
                return Err(NetworkError::Undo {
                    failure: Box::new(fault()),
                    undo: Box::new(fault()),
                });
            }
            Faults { setup: true, .. } => return Err(fault()),
            Faults { .. } => {}
        }
        self.up.lock().unwrap().insert(record.pod_id.clone());
        let mut held = self.held.subscribe();
        held.wait_for(|held| !held).await.unwrap();
        record.ips = vec!["10.88.0.5".parse().unwrap()];
        record.join_first(["eth0".to_owned()]);
        Ok(PodNetwork {
            record,
            guest: self.guest.borrow().clone(),
            links: vec![PodLink {
                name: "eth0".into(),
                taps: vec![File::open("/dev/null").unwrap().into()],
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
            }],
            dns: Dns::default(),
        })
    }

    async fn teardown(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        self.panic_at("teardown");
        if self.faults.lock().unwrap().teardown {
            return Err(fault());
        }
        self.up.lock().unwrap().remove(&record.pod_id);
        Ok(())
    }

    async fn pods(&self) -> Result<Vec<String>, NetworkError> {
        Ok(self.up().into_iter().collect())
    }

    async fn check(&self, _: &NetworkRecord) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn watch(
        &self,
        _: &NetworkRecord,
    ) -> Result<watch::Receiver<GuestNetwork>, NetworkError> {
        self.panic_at("watch");
        Ok(self.guest.subscribe())
    }

    /// What is joined leads into the guest.
    async fn join(&self, _: &NetworkRecord, number: u8) -> Result<PodLink, NetworkError> {
        if self.faults.lock().unwrap().join {
            self.joining.store(true, Ordering::Relaxed);
            std::future::pending::<()>().await;
        }
        self.guest.send_modify(|guest| {
            let names = guest.unjoined.drain(..);
            let interfaces = names.map(|name| GuestInterface {
                mac: String::new(),
                name,
                mtu: 1500,
                addresses: Vec::new(),
                lone_addresses: Vec::new(),
            });
            guest.interfaces.extend(interfaces);
        });
        Ok(PodLink {
            name: String::new(),
            taps: vec![File::open("/dev/null").unwrap().into()],
            mac: [2, 0, 0, 0, 1, number],
            mtu: 1500,
        })
    }

    fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<BoxFuture<'static, Result<(), NetworkError>>, NetworkError> {
        self.valid.lock().unwrap().replace(pods);
        Ok(async { Ok(()) }.boxed())
    }

    async fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError> {
        self.up.lock().unwrap().remove(pod_id);
        Ok(())
    }
}
