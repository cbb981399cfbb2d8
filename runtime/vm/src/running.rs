//! A VM that runs, as what works with it needs it.

use hull_spec::id::PodId;

use crate::{agent::client::Agent, cgroup::PodCgroup, client::VmClient, rundir::RunDir};

/// A VM that runs: who answers for it, and where its files are. Clones share the connections.
#[derive(Debug, Clone)]
pub struct RunningVm {
    /// The pod that it is of.
    pub pod: PodId,
    /// Its directory of sockets and reports.
    pub run: RunDir,
    /// Where the pod's processes are; none: in the daemon's own cgroup.
    pub cgroup: Option<PodCgroup>,
    /// The VMM.
    pub control: VmClient,
    /// The guest's agent.
    pub agent: Agent,
}
