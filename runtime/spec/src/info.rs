//! What callers are told.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};

use hull_base::stages::Stage;
use hull_image::ImageId;
use serde::{Deserialize, Serialize};

use crate::{
    id::{ContainerId, PodId},
    signal::Signal,
    spec::{ContainerSpec, Resources, SandboxSpec},
};

/// Whether a sandbox can run containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Its VM runs and its agent answers.
    Ready,
    /// It was stopped, or its VM is gone.
    NotReady,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxInfo {
    /// Its id.
    pub id: PodId,
    /// What was asked for.
    pub spec: Arc<SandboxSpec>,
    /// Its state.
    pub state: SandboxState,
    /// Why it is not ready, for a person; empty when it is, or was stopped on request.
    pub message: String,
    /// When it was created, Unix time in nanoseconds.
    pub created_at_ns: i64,
    /// Addresses, the primary one first; empty once the network is torn down.
    pub ips: Vec<IpAddr>,
    /// The VM; none once it is gone.
    pub vm: Option<VmInfo>,
    /// What the agent told about the guest.
    pub guest: Option<GuestInfo>,
    /// How long the parts of its start took; none after a restart of the daemon.
    pub boot: Option<BootTimes>,
}

/// The VM of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Process id of its VMM on the host.
    pub pid: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory at its start, in MiB.
    pub memory_mib: u64,
    /// The most that it may have, in MiB.
    #[serde(default)]
    pub max_memory_mib: u64,
    /// The network namespace that its tap is in.
    pub netns: PathBuf,
    /// Its cgroup on the host; none on a host without cgroup v2.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// What is wrong with it although it goes on, for a person; empty: nothing is known.
    #[serde(default)]
    pub warning: String,
}

/// What the agent told about the guest when it was greeted, before a container was in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// `uname -r`.
    pub kernel_release: String,
    /// The agent's version.
    pub agent_version: String,
    /// From the kernel's start to the agent's, in nanoseconds.
    pub kernel_ns: u64,
    /// From the kernel's start to the agent's socket, in nanoseconds.
    pub ready_ns: u64,
    /// Its kernel has AppArmor on, so containers get profiles. A guest that lies confines its own pod less, or can't
    /// make its containers.
    #[serde(default)]
    pub apparmor: bool,
}

/// How long a sandbox's start took, and its stages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// All stages, in the order of their begin. They overlap.
    pub stages: Arc<[Stage]>,
    /// The whole, in microseconds.
    pub total_us: u64,
    /// The VM is a clone of a template.
    pub cloned: bool,
}

impl BootTimes {
    /// The stages that each start has: network namespace, CNI and tap; scratch disk; start of the VMM process to
    /// its answer to `Hello`; `Configure` and `Start` of the VM; from then to the agent's answer to `Hello`;
    /// scratch mount and `Configure` of the guest.
    const PARTS: [&str; 6] = ["network", "scratch", "spawn", "vm", "agent", "configure"];

    /// The stages that each start has, and the `total`, in microseconds. What was done again counts as it was
    /// done the last time.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let time = |name: &'static str| {
            let part = |stage: &&Stage| stage.within.is_none() && stage.name == name;
            let us = self.stages.iter().rev().find(part).map_or(0, |it| it.us);
            (name, us)
        };
        let total = ("total", self.total_us);
        Self::PARTS.into_iter().map(time).chain([total])
    }
}

/// What became of VMs that could be clones, since the daemon started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TemplateCounts {
    /// Templates that are there.
    pub ready: usize,
    /// VMs that are clones.
    pub clones: u64,
    /// VMs that booted, by the reason.
    pub cold: BTreeMap<&'static str, u64>,
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// It was never started.
    Created,
    /// Its process runs.
    Running,
    /// Its process ended, or could not be started.
    Exited,
    /// It can't be told.
    Unknown,
}

/// A container.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerInfo {
    /// Its id.
    pub id: ContainerId,
    /// Its sandbox.
    pub pod: PodId,
    /// What was asked for.
    pub spec: Arc<ContainerSpec>,
    /// Id of the image.
    pub image_id: ImageId,
    /// The image by digest when it has one, else its id.
    pub image_ref: String,
    /// Its state.
    pub state: ContainerState,
    /// Unix time in nanoseconds.
    pub created_at_ns: i64,
    /// Unix time in nanoseconds; 0: not started.
    pub started_at_ns: i64,
    /// Unix time in nanoseconds; 0: not finished.
    pub finished_at_ns: i64,
    /// Exit code of the process, or 128 + signal.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`; empty while it has not exited.
    pub reason: String,
    /// Details for a person.
    pub message: String,
    /// Whole path of the log file; empty: none.
    pub log_path: PathBuf,
    /// The signal that asks it to end.
    pub stop_signal: Signal,
    /// Ids of the images that are mounted, by index in the specification's mounts.
    pub mount_images: BTreeMap<usize, ImageId>,
    /// Who its first process runs as; none before it was created.
    pub user: Option<ContainerUser>,
    /// The limits in force; none: it has none.
    pub resources: Option<Resources>,
}

/// Who a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
}

/// The end of a command run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// What it wrote, up to 16 MiB.
    pub stdout: Vec<u8>,
    /// What it wrote to its error output, up to 16 MiB.
    pub stderr: Vec<u8>,
    /// Exit code, or 128 + signal.
    pub exit_code: i32,
}
