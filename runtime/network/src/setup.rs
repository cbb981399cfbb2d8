//! Brings a pod's network up and down.
//!
//! ```text
//! plan ──▶ record (the caller makes it durable) ──▶ setup: netns → CNI ADD → tap ⇄ interface
//!                                                      └─ on failure: undone, in reverse
//! teardown(record): CNI DEL → netns removed; may be repeated, also after a crash at any point
//! ```

use std::{
    io,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    cni::{self, CniError},
    guest::{Dns, GuestNetwork},
    link::{self, LinkError},
    netns::{self, NetnsError},
};

/// Name of the interface that CNI makes in the pod's namespace, as kubelet and
/// every other runtime name it.
const INTERFACE: &str = "eth0";
/// Name of the tap beside it.
const TAP: &str = "hulltap0";
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
    /// How long one call of a plugin may take before it is killed.
    pub plugin_timeout: Duration,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            netns_dir: "/run/netns".into(),
            plugin_timeout: Duration::from_secs(60),
        }
    }
}

/// The pod that a network is for.
#[derive(Debug, Clone, Default)]
pub struct PodNetworkRequest {
    /// The sandbox id.
    pub pod_id: String,
    /// Kubernetes namespace, name and uid of the pod (CNI_ARGS).
    pub namespace: String,
    /// See `namespace`.
    pub name: String,
    /// See `namespace`.
    pub uid: String,
    /// Host ports (capability `portMappings`).
    pub port_mappings: Vec<PortMapping>,
}

/// A host port that leads to the pod (CNI capability `portMappings`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the host.
    pub host_port: u16,
    /// Host address; empty for all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// What tear-down needs to know; the caller keeps it for the life of the pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// The sandbox id (CNI_CONTAINERID).
    pub pod_id: String,
    /// The namespace's file.
    pub netns: PathBuf,
    /// The pod's addresses, the primary one first; empty before set-up.
    pub ips: Vec<IpAddr>,
    /// How CNI was called.
    attachment: cni::Attachment,
}

/// A network that is up.
#[derive(Debug)]
pub struct PodNetwork {
    /// For tear-down and status; replaces the planned record.
    pub record: NetworkRecord,
    /// What to tell the guest.
    pub guest: GuestNetwork,
    /// The VM's end of the network, opened with `IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// Hardware address of the guest's interface.
    pub mac: [u8; 6],
    /// Largest packet in bytes.
    pub mtu: u16,
    /// DNS settings from CNI; usually empty under Kubernetes.
    pub dns: Dns,
}

/// Why a network could not be set up or torn down.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No usable configuration, or a plugin is missing or failed.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The links inside the namespace.
    #[error("join the network of pod {pod_id} to a tap")]
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
}

/// The host's side of pod networks.
#[derive(Debug, Clone)]
pub struct Network {
    config: NetworkConfig,
}

impl Network {
    /// Returns a handle; nothing is touched before a call needs it.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self { config }
    }

    /// Tells whether a pod could get a network now.
    ///
    /// # Errors
    /// What is missing: a configuration, or a plugin that it names.
    pub fn status(&self) -> Result<(), NetworkError> {
        self.network().map(drop)
    }

    /// The network of new pods, all of whose plugins are installed.
    fn network(&self) -> Result<cni::NetworkList, NetworkError> {
        let list = cni::conf::load(&self.config.conf_dir).map_err(CniError::from)?;
        for plugin in &list.plugins {
            cni::exec::find(&self.config.bin_dirs, &plugin.kind).map_err(CniError::from)?;
        }
        Ok(list)
    }

    /// Chooses the network and names what [`Network::setup`] will make. Nothing
    /// is made yet: store the record first, so that a crash leaks nothing.
    ///
    /// # Errors
    /// As [`Network::status`].
    pub fn plan(&self, request: &PodNetworkRequest) -> Result<NetworkRecord, NetworkError> {
        let list = self.network()?;
        Ok(NetworkRecord {
            pod_id: request.pod_id.clone(),
            netns: self
                .config
                .netns_dir
                .join(format!("{NETNS_PREFIX}{}", request.pod_id)),
            ips: Vec::new(),
            attachment: cni::Attachment::new(list, INTERFACE, request),
        })
    }

    /// Makes the namespace, runs the CNI plugins and joins their interface to a tap.
    ///
    /// # Errors
    /// What failed; everything was undone but for [`NetworkError::Undo`].
    pub async fn setup(&self, record: NetworkRecord) -> Result<PodNetwork, NetworkError> {
        match self.bring_up(record.clone()).await {
            Ok(network) => Ok(network),
            Err(failure) => match self.teardown(&record).await {
                Ok(()) => Err(failure),
                Err(undo) => Err(NetworkError::Undo {
                    failure: Box::new(failure),
                    undo: Box::new(undo),
                }),
            },
        }
    }

    async fn bring_up(&self, mut record: NetworkRecord) -> Result<PodNetwork, NetworkError> {
        netns::create(&record.netns)?;
        let call = self.call(&record.pod_id, &record.netns);
        let result = call.add(&mut record.attachment).await?;
        let joined = link::join(record.netns.clone(), INTERFACE, TAP)
            .await
            .map_err(|source| NetworkError::Link {
                pod_id: record.pod_id.clone(),
                source,
            })?;
        record.ips = if result.ips.is_empty() {
            joined.ips()
        } else {
            result.ips
        };
        Ok(PodNetwork {
            record,
            guest: joined.guest,
            tap: joined.tap,
            mac: joined.mac,
            mtu: joined.mtu,
            dns: result.dns,
        })
    }

    /// Gives addresses back and removes the namespace. May be repeated.
    ///
    /// # Errors
    /// A plugin that fails to delete: keep the record and try again, otherwise
    /// an address may leak.
    pub async fn teardown(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        self.call(&record.pod_id, &record.netns)
            .delete(&record.attachment)
            .await?;
        netns::remove(&record.netns)?;
        Ok(())
    }

    /// Lists the pod ids that have a namespace of ours.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn pods(&self) -> Result<Vec<String>, NetworkError> {
        let entries = match std::fs::read_dir(&self.config.netns_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(NetworkError::List(error)),
        };
        let mut pods = Vec::new();
        for entry in entries {
            let name = entry.map_err(NetworkError::List)?.file_name();
            if let Some(id) = name.to_str().and_then(|n| n.strip_prefix(NETNS_PREFIX)) {
                pods.push(id.to_owned());
            }
        }
        Ok(pods)
    }

    /// Removes the namespace of a pod that nobody has a record of.
    ///
    /// # Errors
    /// When it can't be unmounted or unlinked.
    pub fn remove_orphan(&self, pod_id: &str) -> Result<(), NetworkError> {
        netns::remove(
            &self
                .config
                .netns_dir
                .join(format!("{NETNS_PREFIX}{pod_id}")),
        )?;
        Ok(())
    }

    fn call(&self, pod_id: &str, netns: &Path) -> cni::Call<'_> {
        cni::Call {
            bin_dirs: &self.config.bin_dirs,
            timeout: self.config.plugin_timeout,
            container_id: pod_id.to_owned(),
            netns: netns.to_owned(),
        }
    }
}
