//! A pod's directories on the host. A VMM that is lost can write in the run directory, so what is
//! there is used as [`hull_base::beneath`] does.

use std::path::{Path, PathBuf};

use hull_spec::{config::PodsConfig, id::PodId};

/// Longest path of a Unix socket (`sun_path` of unix(7), without its NUL).
const SOCKET_PATH_MAX: usize = 107;

/// Where the file server listens; its command line tells it from a VMM by this.
pub const FILES_SOCKET: &str = "fs.sock";

/// What a process is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The VMM, `hull-vmm`.
    Vmm,
    /// The file server, `hull-fs`.
    FileServer,
}

/// `<state>/pods/<id>`: what is gone after a reboot of the host, as the VM is.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    pub fn of(config: &PodsConfig, pod: &PodId) -> Self {
        Self(Self::all(config).join(pod.as_str()))
    }

    /// One of [`RunDir::all`].
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory of all run directories.
    pub fn all(config: &PodsConfig) -> PathBuf {
        config.state.join("pods")
    }

    /// Tells whether sockets fit below a state directory.
    pub fn fits(config: &PodsConfig) -> bool {
        let longest = Self::all(config).join("0".repeat(64)).join("vsock.sock");
        longest.as_os_str().len() <= SOCKET_PATH_MAX
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn control_socket(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }

    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    pub fn exit_report(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    pub fn files_socket(&self) -> PathBuf {
        self.0.join(FILES_SOCKET)
    }

    /// What a process writes to standard output and error.
    pub(super) fn log_of(&self, role: Role) -> PathBuf {
        self.0.join(match role {
            Role::Vmm => "vmm.log",
            Role::FileServer => "fs.log",
        })
    }

    /// Which process it is. Nobody but the daemon may write there.
    pub(super) fn process_of(&self, role: Role) -> PathBuf {
        self.0.join(match role {
            Role::Vmm => "vmm.process",
            Role::FileServer => "fs.process",
        })
    }

    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// How far a container's log file is written; see `logs` of `hull-pod`.
    pub fn log_position(&self, container: &str) -> PathBuf {
        self.0.join(format!("{container}.log-position"))
    }
}

/// `<root>/pods/<id>`: files that are too large for memory.
#[derive(Debug, Clone)]
pub struct DataDir(PathBuf);

impl DataDir {
    pub fn of(config: &PodsConfig, pod: &PodId) -> Self {
        Self(Self::all(config).join(pod.as_str()))
    }

    /// The directory of all data directories.
    pub fn all(config: &PodsConfig) -> PathBuf {
        config.root.join("pods")
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn scratch(&self) -> PathBuf {
        self.0.join("scratch.img")
    }
}
