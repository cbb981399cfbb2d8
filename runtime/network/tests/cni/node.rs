//! A node without pods.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use hull_network::{Network, NetworkConfig, PodLink, PodNetworkRequest};
use nix::sched::{CloneFlags, unshare};

pub const PLUGINS: &str = "/usr/lib/cni";

pub struct Node {
    pub dir: tempfile::TempDir,
    pub network: Network,
}

impl Node {
    /// A node with this configuration, in which LEASES stands for the directory of leases;
    /// `None` (said on stdout) where it can't be had.
    pub fn new(conf: &str) -> Option<Self> {
        if !Path::new(PLUGINS).join("bridge").exists() {
            println!(
                "SKIPPED: cni: no {PLUGINS}/bridge (apt-get install containernetworking-plugins)"
            );
            return None;
        }
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("SKIPPED: cni: no network namespace of our own: {error}");
            return None;
        }
        sh("ip link set lo up");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("net.d")).unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        let network = Network::new(NetworkConfig {
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec![dir.path().join("bin"), PLUGINS.into()],
            netns_dir: dir.path().join("netns"),
            cache_dir: dir.path().join("cache"),
            foreign_cache_dir: dir.path().join("foreign"),
            plugin_timeout: Duration::from_secs(20),
        });
        let node = Self { dir, network };
        node.configure(conf);
        Some(node)
    }

    /// Replaces the configuration.
    pub fn configure(&self, conf: &str) {
        let leases = self.dir.path().join("leases");
        let conf = conf.replace("LEASES", leases.to_str().unwrap());
        fs::write(self.conf_file(), conf).unwrap();
    }

    pub fn conf_file(&self) -> PathBuf {
        self.dir.path().join("net.d/10-test.conflist")
    }

    /// Installs a plugin that is a shell script. It finds its directory in $DIR.
    pub fn plugin(&self, name: &str, script: &str) {
        let path = self.dir.path().join("bin").join(name);
        let dir = self.dir.path().display();
        fs::write(&path, format!("#!/bin/sh\nDIR={dir}\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Addresses that host-local has given out.
    pub fn leases(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("leases/test")) else {
            return Vec::new();
        };
        let mut leases: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "lock" && !name.starts_with("last_reserved"))
            .collect();
        leases.sort();
        leases
    }

    pub fn assert_nothing_left(&self) {
        // On another thread: the caller's may be within a runtime.
        let pods = std::thread::scope(|scope| scope.spawn(|| run(self.network.pods())).join());
        assert_eq!(pods.unwrap().unwrap(), Vec::<String>::new());
        assert_eq!(self.leases(), Vec::<String>::new());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()));
        // A bridge belongs to the network, not to a pod.
        let mut links = String::new();
        for _ in 0..100 {
            links = sh("ip -o link | grep 'veth\\|hull\\|bwp\\|macvlan' || true");
            if links.is_empty() {
                return;
            }
            // The kernel ends a namespace, and the links in it, on its own time.
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("left: {links}");
    }
}

pub fn request(pod_id: &str) -> PodNetworkRequest {
    PodNetworkRequest {
        pod_id: pod_id.into(),
        namespace: "default".into(),
        name: "pod".into(),
        uid: "uid".into(),
        ..PodNetworkRequest::default()
    }
}

/// The VM's end of an interface, which has one queue.
pub fn tap_of(mut link: PodLink) -> fs::File {
    let tap = link.taps.pop().unwrap();
    assert!(link.taps.is_empty());
    tap.into()
}

pub fn run<T>(work: impl Future<Output = T>) -> T {
    // On this thread, because it is the one in the node's namespace.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// Whether the installed plugins know the newest version.
pub fn plugins_are_new() -> bool {
    sh(&format!("echo {{}} | CNI_COMMAND=VERSION {PLUGINS}/bridge")).contains("\"1.1.0\"")
}

/// Runs a shell command that must succeed.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
