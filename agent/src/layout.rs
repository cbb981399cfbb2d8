//! Where everything lies in the guest.

use std::path::{Path, PathBuf};

use crate::ident::Id;

/// The agent's directories. The defaults are the guest's; tests move them.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// `/run/hull`: everything that the agent keeps.
    run: PathBuf,
    /// Name of the cgroup above all containers, relative to [`CGROUP_ROOT`].
    pod_cgroup: String,
}

/// Where cgroup2 is mounted; libcgroups knows no other place.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

impl Default for Layout {
    fn default() -> Self {
        Self::new(PathBuf::from("/run/hull"), "hull".to_owned())
    }
}

impl Layout {
    /// Uses `run` for files and `pod_cgroup` as the cgroup above all containers.
    pub(crate) fn new(run: PathBuf, pod_cgroup: String) -> Self {
        Self { run, pod_cgroup }
    }

    /// Where the storage `id` is mounted.
    pub(crate) fn storage(&self, id: &Id) -> PathBuf {
        self.run.join("storage").join(id)
    }

    /// Files of the pod's identity.
    pub(crate) fn files(&self) -> PathBuf {
        self.run.join("files/sandbox")
    }

    /// Copies of volumes.
    pub(crate) fn atomic_volumes(&self) -> PathBuf {
        self.run.join("volumes")
    }

    /// The state of container `id`.
    pub(crate) fn container(&self, id: &Id) -> PathBuf {
        self.run.join("containers").join(id)
    }

    /// Writable layers of a pod without a scratch disk.
    pub(crate) fn memory_scratch(&self) -> PathBuf {
        self.run.join("scratch")
    }

    /// The pod's shared memory, bound to `/dev/shm` of its containers.
    pub(crate) fn shm(&self) -> PathBuf {
        self.run.join("shm")
    }

    /// The cgroup above all containers.
    pub(crate) fn pod_cgroup(&self) -> PathBuf {
        Path::new(CGROUP_ROOT).join(&self.pod_cgroup)
    }

    /// The agent's own cgroup.
    pub(crate) fn agent_cgroup(&self) -> PathBuf {
        Path::new(CGROUP_ROOT).join(format!("{}-agent", self.pod_cgroup))
    }

    /// The cgroup of a shell in the guest itself, which is beside those of the pod and the agent.
    pub(crate) fn shell_cgroup(&self, number: u64) -> PathBuf {
        Path::new(CGROUP_ROOT).join(format!("{}-shell-{number}", self.pod_cgroup))
    }

    /// The cgroup of container `id`.
    pub(crate) fn cgroup(&self, id: &Id) -> PathBuf {
        self.pod_cgroup().join(id)
    }

    /// The cgroup of container `id` as the OCI spec names it.
    pub(crate) fn oci_cgroup(&self, id: &Id) -> PathBuf {
        Path::new("/").join(&self.pod_cgroup).join(id)
    }
}
