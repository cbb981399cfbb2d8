//! The file as it is written.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use serde::Deserialize;

use super::streaming::StreamingTable;

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    pub(super) root: Option<PathBuf>,
    pub(super) state: Option<PathBuf>,
    pub(super) listen: Option<PathBuf>,
    pub(super) assets: Option<PathBuf>,
    pub(super) log: Option<String>,
    pub(super) debug_console: bool,
    pub(super) seccomp_default: Option<bool>,
    pub(super) image_volumes: Option<String>,
    pub(super) cni: Cni,
    pub(super) registries: RegistriesTable,
    pub(super) images: ImagesTable,
    pub(super) streaming: StreamingTable,
    pub(super) metrics: MetricsTable,
    pub(super) traces: TracesTable,
    pub(super) nri: NriTable,
    pub(super) vm: Vm,
    pub(super) default_handler: Option<String>,
    pub(super) delegate_host_pods: Option<String>,
    pub(super) handlers: BTreeMap<String, HandlerTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Cni {
    pub(super) conf_dir: Option<PathBuf>,
    pub(super) bin_dirs: Option<Vec<PathBuf>>,
    pub(super) netns_dir: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RegistriesTable {
    pub(super) config_dir: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ImagesTable {
    pub(super) pinned: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct MetricsTable {
    pub(super) address: Option<SocketAddr>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TracesTable {
    pub(super) endpoint: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct NriTable {
    pub(super) socket: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Vm {
    pub(super) memory_mib: Option<u32>,
    pub(super) max_memory_mib: Option<u32>,
    pub(super) overhead_mib: Option<u32>,
    pub(super) vcpus: Option<u8>,
    pub(super) scratch_mib: Option<u64>,
    pub(super) guest_volumes: Option<bool>,
    pub(super) image_device: Option<String>,
    pub(super) template: Option<bool>,
    pub(super) template_scope: Option<String>,
    pub(super) boot_timeout_seconds: Option<u64>,
    pub(super) first_user: Option<u32>,
    pub(super) users: Option<u32>,
    pub(super) debug: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct HandlerTable {
    pub(super) memory_mib: Option<u32>,
    pub(super) vcpus: Option<u8>,
    pub(super) delegate: Option<PathBuf>,
}
