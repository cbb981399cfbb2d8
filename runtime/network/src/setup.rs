//! Brings a pod's network up and down.
//!
//! ```text
//! plan ──▶ record (the caller makes it durable) ──▶ setup: netns → CNI ADD → tap ⇄ interface
//!                                                      └─ on failure: undone, in reverse
//! teardown(record): CNI DEL → netns removed; may be repeated, also after a crash at any point
//! gc(pods): what plugins still hold for pods that are gone; alone, no ADD or DEL beside it
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hull_base::{
    blocking,
    faults::{self, Point},
    stages::stage,
};
use tokio::sync::{RwLock, watch};

use crate::{
    cache::{self, Cache},
    cni::{self, CniError, Plugins},
    guest::{Dns, GuestNetwork},
    link::{self, PodLink},
    netlink::LinkError,
    netns::{self, NetnsError},
    record::NetworkRecord,
    request::{PodNetworkRequest, RequestError},
    watch as follow,
};

/// Name of the interface that CNI makes in the pod's namespace, as kubelet and
/// every other runtime name it.
const INTERFACE: &str = "eth0";
/// Prefix of the namespaces that are ours.
const NETNS_PREFIX: &str = "hull-";

/// Where CNI and network namespaces are on this host.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Directory of network configurations; the first in name order is used.
    pub conf_dir: PathBuf,
    /// Directories of plugins.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory in which namespaces are kept by name.
    pub netns_dir: PathBuf,
    /// Directory of what plugins answered, for DEL; it outlives a reboot.
    pub cache_dir: PathBuf,
    /// Directory of libcni's cache: the attachments of other runtimes, which GC spares.
    pub foreign_cache_dir: PathBuf,
    /// How long one call of a plugin may take before it is killed.
    pub plugin_timeout: Duration,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            netns_dir: "/run/netns".into(),
            cache_dir: "/var/lib/hull/cni".into(),
            foreign_cache_dir: "/var/lib/cni/results".into(),
            plugin_timeout: Duration::from_secs(60),
        }
    }
}

/// A network that is up.
#[derive(Debug)]
pub struct PodNetwork {
    /// For tear-down and status; replaces the planned record.
    pub record: NetworkRecord,
    /// What to tell the guest.
    pub guest: GuestNetwork,
    /// The pod's interfaces, `eth0` first; never empty.
    pub links: Vec<PodLink>,
    /// DNS settings from CNI; usually empty under Kubernetes.
    pub dns: Dns,
}

/// Why a network could not be set up or torn down.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No usable configuration, or a plugin is missing or failed.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The pod asks for what can't be passed on.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The links inside the namespace.
    #[error("look at the links of pod {pod_id}, or join them to taps")]
    Link {
        /// The sandbox id.
        pod_id: String,
        /// What failed.
        source: LinkError,
    },
    /// Set-up failed, and so did undoing it; the pod's record must be kept.
    #[error("{failure}; and undoing it failed: {undo}")]
    Undo {
        /// The failure.
        #[source]
        failure: Box<NetworkError>,
        /// Why it could not be undone.
        undo: Box<NetworkError>,
    },
    /// The namespaces can't be listed.
    #[error("list network namespaces")]
    List(#[source] io::Error),
    /// The cache of results.
    #[error("{action} the cached CNI result of pod {pod_id}")]
    Cache {
        /// What was tried.
        action: &'static str,
        /// The sandbox id.
        pod_id: String,
        /// Why.
        source: io::Error,
    },
    /// Pods are being attached or detached.
    #[error("collect what plugins hold for pods that are gone: pods come and go just now")]
    Busy,
}

/// The host's side of pod networks.
#[derive(Debug, Clone)]
pub struct Network {
    config: Arc<NetworkConfig>,
    plugins: Plugins,
    cache: Cache,
    /// Held to read by ADD, DEL and CHECK, to write by GC (spec section 3, "locking").
    gate: Arc<RwLock<()>>,
}

impl Network {
    /// Returns a handle; nothing is touched before a call needs it.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self {
            plugins: Plugins {
                dirs: config.bin_dirs.clone(),
                timeout: config.plugin_timeout,
                versions: cni::version::Versions::default(),
            },
            cache: Cache::new(config.cache_dir.clone()),
            config: Arc::new(config),
            gate: Arc::default(),
        }
    }

    /// Tells whether a pod could get a network now.
    ///
    /// # Errors
    /// What is missing: a configuration, a plugin that it names, a version that all speak, or
    /// what a plugin says that it lacks.
    pub async fn status(&self) -> Result<(), NetworkError> {
        Ok(self.plugins.status(self.load().await?).await?)
    }

    /// Chooses the network and names what [`Network::setup`] will make. Nothing
    /// is made yet: store the record first, so that a crash leaks nothing.
    ///
    /// # Errors
    /// When there is no usable network, or it can't do what the pod asks for.
    pub async fn plan(&self, request: &PodNetworkRequest) -> Result<NetworkRecord, NetworkError> {
        let list = self.plugins.negotiate(self.load().await?).await?;
        Ok(NetworkRecord {
            pod_id: request.pod_id.clone(),
            netns: self.netns(&request.pod_id),
            ips: Vec::new(),
            links: 0,
            joined: BTreeMap::new(),
            queues: request.queues,
            attachment: cni::Attachment::new(list, INTERFACE, request)?,
        })
    }

    async fn load(&self) -> Result<cni::NetworkList, NetworkError> {
        let dir = self.config.conf_dir.clone();
        let list = blocking(move || cni::conf::load(&dir)).await;
        Ok(list.map_err(CniError::from)?)
    }

    fn netns(&self, pod_id: &str) -> PathBuf {
        let name = format!("{NETNS_PREFIX}{pod_id}");
        self.config.netns_dir.join(name)
    }

    /// Makes the namespace, runs the CNI plugins and joins their interface to a tap.
    ///
    /// # Errors
    /// What failed; everything was undone but for [`NetworkError::Undo`].
    pub async fn setup(&self, mut record: NetworkRecord) -> Result<PodNetwork, NetworkError> {
        let _gate = self.gate.read().await;
        match self.bring_up(&mut record).await {
            Ok(network) => Ok(network),
            Err(failure) => match self.take_down(&record).await {
                Ok(()) => Err(failure),
                Err(undo) => Err(NetworkError::Undo {
                    failure: Box::new(failure),
                    undo: Box::new(undo),
                }),
            },
        }
    }

    async fn bring_up(&self, record: &mut NetworkRecord) -> Result<PodNetwork, NetworkError> {
        let netns = record.netns.clone();
        stage("namespace", blocking(move || netns::create(&netns))).await?;
        faults::point(Point::NetnsMade);
        self.keep(record).await?;
        let planned = record.clone();
        let call = self.call(&planned);
        let mut result = cni::AddResult::default();
        record.attachment.reset();
        for plugin in planned.attachment.plugins() {
            result = call.add(plugin, &mut record.attachment).await?;
            if let Err(error) = self.keep(record).await {
                // It matters only if the daemon dies before the caller has stored the record.
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, pod = record.pod_id, "cache a CNI result");
            }
        }
        let taps = link::join(record.netns.clone(), INTERFACE, record.queues);
        let joined = stage("taps", taps)
            .await
            .map_err(|source| NetworkError::Link {
                pod_id: record.pod_id.clone(),
                source,
            })?;
        faults::point(Point::TapJoined);
        for what in &joined.guest.unsupported {
            follow::warn_unsupported(&record.netns, what);
        }
        record.join_first(joined.links.iter().map(|link| link.name.clone()));
        record.ips = if result.ips.is_empty() {
            joined.guest.ips()
        } else {
            result.ips
        };
        Ok(PodNetwork {
            record: record.clone(),
            guest: joined.guest,
            links: joined.links,
            dns: result.dns,
        })
    }

    async fn keep(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        let stored = self.cache.store(record).await;
        faults::point(Point::CniKept);
        stored.map_err(cache_error("write", &record.pod_id))
    }

    /// Gives addresses back and removes the namespace. May be repeated.
    ///
    /// # Errors
    /// A plugin that fails to delete: keep the record and try again, otherwise
    /// an address may leak.
    pub async fn teardown(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        let _gate = self.gate.read().await;
        self.take_down(record).await
    }

    async fn take_down(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        // The cached one knows how far ADD came.
        let cached = self.cache.load(&record.pod_id).await;
        let record = cached.as_ref().unwrap_or(record);
        self.call(record).delete(&record.attachment).await?;
        self.forget(&record.pod_id, record.netns.clone()).await
    }

    /// Asks the plugins whether a pod's network is as they made it.
    ///
    /// # Errors
    /// What the first plugin misses.
    pub async fn check(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        let _gate = self.gate.read().await;
        Ok(self.call(record).check(&record.attachment).await?)
    }

    /// Follows what the guest is to have, which plugins may change as long as the pod runs. It has
    /// the interfaces that the record names; others that are there are told by name. The receiver
    /// keeps the namespace alive: drop it before tear-down.
    ///
    /// # Errors
    /// When the namespace can't be read.
    pub async fn watch(
        &self,
        record: &NetworkRecord,
    ) -> Result<watch::Receiver<GuestNetwork>, NetworkError> {
        let joined = record.joined.values().cloned().collect();
        let started = follow::start(&record.netns, INTERFACE, joined).await;
        started.map_err(|source| NetworkError::Link {
            pod_id: record.pod_id.clone(),
            source,
        })
    }

    /// Joins an interface that came after set-up to a tap, which [`NetworkRecord::join`] has given
    /// this number.
    ///
    /// # Errors
    /// When it is gone, or the guest could not tell it from another.
    pub async fn join(&self, record: &NetworkRecord, number: u8) -> Result<PodLink, NetworkError> {
        let name = record.joined.get(&number).cloned().unwrap_or_default();
        let netns = record.netns.clone();
        let joined = link::join_later(netns, INTERFACE, name, number, record.queues).await;
        joined.map_err(|source| NetworkError::Link {
            pod_id: record.pod_id.clone(),
            source,
        })
    }

    /// Lets plugins free what belongs to none of these pods, nor to another runtime's (GC). From
    /// this call on, and until the future ends, no other pod is attached or detached: let it run.
    ///
    /// # Errors
    /// When pods are being attached or detached at the time of the call; the future's: no usable
    /// configuration, or the first plugin that failed.
    pub fn gc(
        &self,
        pods: Vec<String>,
    ) -> Result<impl Future<Output = Result<(), NetworkError>> + Send + 'static, NetworkError> {
        let gate = Arc::clone(&self.gate).try_write_owned();
        let gate = gate.map_err(|_| NetworkError::Busy)?;
        let this = self.clone();
        Ok(async move {
            let _gate = gate;
            let list = this.plugins.negotiate(this.load().await?).await?;
            let (config, name) = (Arc::clone(&this.config), list.name.clone());
            let others = blocking(move || cache::foreign(&config.foreign_cache_dir, &name));
            let others = others.await.map_err(|source| NetworkError::Cache {
                action: "look among other runtimes' for",
                pod_id: "any".into(),
                source,
            })?;
            let ours = pods.into_iter().map(|id| (id, INTERFACE.to_owned()));
            let valid: Vec<_> = ours.chain(others).collect();
            Ok(this.plugins.gc(&list, &valid).await?)
        })
    }

    /// Lists the pod ids that have a namespace or a cached result of ours.
    ///
    /// # Errors
    /// When a directory can't be read.
    pub async fn pods(&self) -> Result<Vec<String>, NetworkError> {
        let cached = self.cache.pods().await.map_err(NetworkError::List)?;
        let mut pods = BTreeSet::from_iter(cached);
        let config = Arc::clone(&self.config);
        let kept = blocking(move || namespaces(&config.netns_dir)).await;
        pods.extend(kept.map_err(NetworkError::List)?);
        Ok(pods.into_iter().collect())
    }

    /// Detaches a pod that nobody has a record of, as far as the cached result tells how, and
    /// removes its namespace.
    ///
    /// # Errors
    /// As [`Network::teardown`].
    pub async fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError> {
        let _gate = self.gate.read().await;
        if let Some(record) = self.cache.load(pod_id).await {
            return self.take_down(&record).await;
        }
        self.forget(pod_id, self.netns(pod_id)).await
    }

    /// Removes the namespace and the cached result of a pod that is detached.
    async fn forget(&self, pod_id: &str, netns: PathBuf) -> Result<(), NetworkError> {
        blocking(move || netns::remove(&netns)).await?;
        faults::point(Point::NetnsRemoved);
        let removed = self.cache.remove(pod_id).await;
        removed.map_err(cache_error("remove", pod_id))
    }

    fn call<'a>(&'a self, record: &'a NetworkRecord) -> cni::Call<'a> {
        cni::Call {
            plugins: &self.plugins,
            container_id: &record.pod_id,
            netns: &record.netns,
        }
    }
}

/// The pods whose namespaces are in this directory.
fn namespaces(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut pods = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let id = name.to_str().and_then(|n| n.strip_prefix(NETNS_PREFIX));
        pods.extend(id.map(str::to_owned));
    }
    Ok(pods)
}

fn cache_error(action: &'static str, pod_id: &str) -> impl FnOnce(io::Error) -> NetworkError {
    let pod_id = pod_id.to_owned();
    move |source| NetworkError::Cache {
        action,
        pod_id,
        source,
    }
}
