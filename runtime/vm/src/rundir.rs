//! A pod's directories on the host. A VMM that its guest has taken over can write in the run
//! directory, so files there are opened by [`hull_base::beneath`] alone.

use std::path::{Path, PathBuf};

use hull_spec::{config::PodsConfig, id::PodId};

/// Longest path of a Unix socket (`sun_path` of unix(7), without its NUL).
const SOCKET_PATH_MAX: usize = 107;

/// What a process does for its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The VMM, `hull-vmm`.
    Vmm,
    /// The file server, `hull-fs`.
    FileServer,
}

/// `<state>/pods/<id>`: files that a reboot of the host removes, as it ends the VM.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The run directory of a pod.
    pub fn of(config: &PodsConfig, pod: &PodId) -> Self {
        Self(Self::all(config).join(pod.as_str()))
    }

    /// The run directory that was found at `path`, in [`RunDir::all`].
    pub(crate) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory of all run directories.
    pub fn all(config: &PodsConfig) -> PathBuf {
        config.state.join("pods")
    }

    /// Whether the paths of sockets below the state directory are short enough.
    pub fn fits(config: &PodsConfig) -> bool {
        let longest = Self::all(config).join("0".repeat(64)).join("vsock.sock");
        longest.as_os_str().len() <= SOCKET_PATH_MAX
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where the VMM listens.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }

    /// The socket that stands for the guest's vsock.
    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// Where the VMM writes why it ended.
    pub fn exit_report(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// Where the file server listens.
    pub fn files_socket(&self) -> PathBuf {
        self.0.join("fs.sock")
    }

    /// The standard output and error of a process.
    pub(crate) fn log_of(&self, role: Role) -> PathBuf {
        self.0.join(match role {
            Role::Vmm => "vmm.log",
            Role::FileServer => "fs.log",
        })
    }

    /// The [`Identity`](crate::identity::Identity) of a process, which the daemon alone may write.
    pub(crate) fn process_of(&self, role: Role) -> PathBuf {
        self.0.join(match role {
            Role::Vmm => "vmm.process",
            Role::FileServer => "fs.process",
        })
    }

    /// What the guest's kernel writes to its console.
    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// Where it is noted how far a container's log file is written; see `logs` of `hull-pod`.
    pub fn log_position(&self, container: &str) -> PathBuf {
        self.0.join(format!("{container}.log-position"))
    }
}

/// `<root>/pods/<id>`: files that are too large for memory.
#[derive(Debug, Clone)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The data directory of a pod.
    pub fn of(config: &PodsConfig, pod: &PodId) -> Self {
        Self(Self::all(config).join(pod.as_str()))
    }

    /// The directory of all data directories.
    pub fn all(config: &PodsConfig) -> PathBuf {
        config.root.join("pods")
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The file behind the guest's scratch disk.
    pub fn scratch(&self) -> PathBuf {
        self.0.join("scratch.img")
    }
}
