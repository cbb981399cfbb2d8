//! The pod's identity: everything that `Configure` gives the guest.

pub(crate) mod sysctl;

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use hull_proto_agent::agent::{ConfigureRequest, UpdateNetworkRequest, WakeRequest};
use nix::{
    mount::{MsFlags, mount},
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
    unistd::Pid,
};
use tokio::sync::Mutex;

use self::sysctl::SysctlError;
use crate::{
    container::pause::{NewUser, PodNamespaces},
    layout::Layout,
    network::{Network, NetworkError},
    reaper::Reaper,
    sys,
};

/// Size of `/dev/shm` when the host names none, in bytes.
const DEFAULT_SHM: u64 = 64 << 20;

/// What a pod's network has unless it asks otherwise: no port takes powers, and everybody may ping. Both
/// are containerd's defaults, for networks that are no host's and belong to no user namespace.
const NETWORK_DEFAULTS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Bytes of entropy without which a clone is not another one: a key of the kernel's generator.
const LEAST_ENTROPY: usize = 32;

/// Room for the files of the pod's identity, in bytes.
const FILES_SIZE: u64 = 1 << 20;

/// Why the guest could not be given its identity.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error("this guest is sandbox {known}, not {asked}")]
    OtherSandbox { known: String, asked: String },
    #[error("this guest has no network yet")]
    NotConfigured,
    #[error("set the clock")]
    Clock(#[source] nix::Error),
    #[error("{0} bytes of entropy are too few for a clone, it needs {LEAST_ENTROPY}")]
    LittleEntropy(usize),
    #[error("seed the random number generator")]
    Entropy(#[source] io::Error),
    #[error("set the host name")]
    Hostname(#[source] nix::Error),
    #[error("write {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("mount {name}")]
    Mount {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("make the pod's user namespace")]
    UserNamespace(#[from] io::Error),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("set up the network")]
    Network(#[from] NetworkError),
}

/// Gives a clone of a guest its own randomness, and the time. Repeating it is harmless.
pub(crate) fn wake(request: &WakeRequest) -> Result<(), SandboxError> {
    if request.entropy.len() < LEAST_ENTROPY {
        return Err(SandboxError::LittleEntropy(request.entropy.len()));
    }
    seed(&request.entropy).map_err(SandboxError::Entropy)?;
    set_clock(request.realtime_ns)
}

/// Who this guest is.
#[derive(Debug)]
pub(crate) struct Sandbox {
    layout: Layout,
    pod: Arc<PodNamespaces>,
    reaper: Arc<Reaper>,
    /// One configuration at a time.
    configured: Mutex<Configured>,
}

/// What the guest has of its identity.
#[derive(Debug, Default)]
struct Configured {
    /// Id of the sandbox, once it is known.
    id: Option<String>,
    /// What the host set last.
    network: Network,
}

impl Sandbox {
    /// A guest without identity.
    pub(crate) fn new(layout: Layout, pod: Arc<PodNamespaces>, reaper: Arc<Reaper>) -> Self {
        Self {
            layout,
            pod,
            reaper,
            configured: Mutex::default(),
        }
    }

    /// Makes the guest the sandbox of `request`. Repeating it is harmless.
    pub(crate) async fn configure(&self, request: &ConfigureRequest) -> Result<(), SandboxError> {
        let mut configured = self.configured.lock().await;
        let other = configured.id.as_ref();
        if let Some(known) = other.filter(|known| **known != request.sandbox_id) {
            return Err(SandboxError::OtherSandbox {
                known: known.clone(),
                asked: request.sandbox_id.clone(),
            });
        }
        let network = Network::parse(
            &request.interfaces,
            &request.routes,
            &request.neighbors,
            &request.rules,
        )?;
        set_clock(request.realtime_ns)?;
        seed(&request.entropy).map_err(SandboxError::Entropy)?;
        // First of all that belongs to it.
        if let Some(map) = request.user_namespace.as_ref() {
            let devices = async |pid: Pid| Ok(network.move_links(pid.as_raw()).await?);
            let sysctls: Vec<_> = request
                .sysctls
                .iter()
                .filter(|(name, _)| sysctl::is_ipc(name))
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
            let user = NewUser { map, sysctls };
            let made = self.pod.make_user(&self.reaper, user, devices).await;
            made.map_err(|e: SandboxError| e)?;
        }
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname).map_err(SandboxError::Hostname)?;
        }
        self.write_files(request)?;
        self.mount_shm(request.shm_size)?;
        // Interfaces first: some sysctls are theirs.
        network.apply(&configured.network).await?;
        configured.network = network;
        let in_user = request.user_namespace.is_some();
        if !in_user {
            for (name, value) in NETWORK_DEFAULTS {
                sysctl::set(name, value)?;
            }
        }
        let own = |name: &str| !(in_user && sysctl::is_ipc(name));
        for (name, value) in request.sysctls.iter().filter(|(name, _)| own(name)) {
            sysctl::set(name, value)?;
        }
        configured.id = Some(request.sandbox_id.clone());
        Ok(())
    }

    /// Has the guest, which comes from a snapshot of a pod, take another identity. What it has of the network
    /// goes with the next one.
    pub(crate) async fn forget(&self) {
        self.configured.lock().await.id = None;
    }

    /// Makes the network what `request` says. What could not be done is tried again by the next.
    pub(crate) async fn update_network(
        &self,
        request: &UpdateNetworkRequest,
    ) -> Result<(), SandboxError> {
        let mut configured = self.configured.lock().await;
        if configured.id.is_none() {
            return Err(SandboxError::NotConfigured);
        }
        let network = Network::parse(
            &request.interfaces,
            &request.routes,
            &request.neighbors,
            &request.rules,
        )?;
        network.apply(&configured.network).await?;
        configured.network = network;
        Ok(())
    }

    fn write_files(&self, request: &ConfigureRequest) -> Result<(), SandboxError> {
        let dir = self.layout.files();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| SandboxError::File { path, source }
        };
        // Containers write to these files: what they leave must not take the agent's room.
        mount_tmpfs("files", &dir, &format!("mode=755,size={FILES_SIZE}"))?;
        let hostname = format!("{}\n", request.hostname);
        let files = [
            ("resolv.conf", &request.resolv_conf),
            ("hosts", &request.hosts),
            ("hostname", &hostname),
        ];
        for (name, text) in files {
            let path = dir.join(name);
            write_in_place(&path, text.as_bytes()).map_err(failed(&path))?;
        }
        Ok(())
    }

    fn mount_shm(&self, size: u64) -> Result<(), SandboxError> {
        let size = if size == 0 { DEFAULT_SHM } else { size };
        let options = format!("mode=1777,size={size}");
        mount_tmpfs("shm", &self.layout.shm(), &options)
    }
}

/// Mounts a file system in memory on `path`, or gives the one that is there these options.
fn mount_tmpfs(name: &'static str, path: &Path, options: &str) -> Result<(), SandboxError> {
    let failed = |source| SandboxError::Mount { name, source };
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if is_mounted(path).map_err(failed)? {
        flags |= MsFlags::MS_REMOUNT;
    }
    fs::create_dir_all(path).map_err(failed)?;
    mount(Some(name), path, Some("tmpfs"), flags, Some(options)).map_err(|e| failed(e.into()))
}

/// Returns whether something is mounted on `path`.
fn is_mounted(path: &Path) -> io::Result<bool> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let on = |line: &str| line.split(' ').nth(4).map(Path::new) == Some(path);
    Ok(table.lines().any(on))
}

/// Containers have these files bound, so their inodes must stay.
fn write_in_place(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(bytes)
}

fn set_clock(realtime_ns: u64) -> Result<(), SandboxError> {
    if realtime_ns == 0 {
        return Ok(());
    }
    let seconds = i64::try_from(realtime_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanos = i64::try_from(realtime_ns % 1_000_000_000).unwrap_or(0);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanos))
        .map_err(SandboxError::Clock)
}

fn seed(entropy: &[u8]) -> io::Result<()> {
    if entropy.is_empty() {
        return Ok(());
    }
    let random = File::options().write(true).open("/dev/random")?;
    sys::add_entropy(&random, entropy)?;
    sys::reseed(&random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_is_not_woken_with_too_little_entropy() {
        let wake_with = |bytes| {
            wake(&WakeRequest {
                entropy: vec![7; bytes],
                ..WakeRequest::default()
            })
        };
        for bytes in [0, 1, LEAST_ENTROPY - 1] {
            let refused = wake_with(bytes).unwrap_err();
            assert!(matches!(refused, SandboxError::LittleEntropy(n) if n == bytes));
        }
    }
}
