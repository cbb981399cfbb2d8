//! Pod networks with the real CNI plugins (Debian: containernetworking-plugins),
//! in a network namespace of the test's own that plays the node.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hull_network::{Network, NetworkConfig, NetworkError, PodNetworkRequest};
use nix::sched::{CloneFlags, unshare};

const PLUGINS: &str = "/usr/lib/cni";
const VNET_HEADER: usize = 10;

struct Node {
    dir: tempfile::TempDir,
    network: Network,
}

impl Node {
    /// A node without pods; `None` (said on stdout) where it can't be had.
    fn new(conf: &str) -> Option<Self> {
        if !Path::new(PLUGINS).join("bridge").exists() {
            println!(
                "SKIPPED: real_cni: no {PLUGINS}/bridge (apt-get install containernetworking-plugins)"
            );
            return None;
        }
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("SKIPPED: real_cni: no network namespace of our own: {error}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let leases = dir.path().join("leases");
        fs::create_dir(dir.path().join("net.d")).unwrap();
        let conf = conf.replace("LEASES", leases.to_str().unwrap());
        fs::write(dir.path().join("net.d/10-test.conflist"), conf).unwrap();
        let network = Network::new(NetworkConfig {
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec![PLUGINS.into(), dir.path().join("bin")],
            netns_dir: dir.path().join("netns"),
            plugin_timeout: Duration::from_secs(60),
        });
        Some(Self { dir, network })
    }

    fn leases(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.dir.path().join("leases/test")) else {
            return Vec::new();
        };
        entries
            .map(|e| e.unwrap().path())
            .filter(|p| p.file_name().unwrap().to_str().unwrap().contains("10.222."))
            .collect()
    }

    fn assert_nothing_left(&self) {
        assert!(self.network.pods().unwrap().is_empty());
        assert_eq!(self.leases(), Vec::<PathBuf>::new());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()));
    }
}

fn request(pod_id: &str) -> PodNetworkRequest {
    PodNetworkRequest {
        pod_id: pod_id.into(),
        namespace: "default".into(),
        name: "pod".into(),
        uid: "uid".into(),
        port_mappings: Vec::new(),
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    // On this thread, because it is the one in the node's namespace.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

const BRIDGE: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"br-test","isGateway":true,"ipMasq":false,"mtu":1400,
     "ipam":{"type":"host-local","dataDir":"LEASES",
             "ranges":[[{"subnet":"10.222.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}"#;

#[test]
fn frames_pass_between_the_bridge_and_the_tap() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    run(async {
        let plan = node.network.plan(&request("pod1")).unwrap();
        let pod = node.network.setup(plan).await.unwrap();

        let ip = pod.record.ips[0];
        let link = &pod.guest.interfaces[0];
        assert_eq!((link.name.as_str(), link.mtu), ("eth0", 1400));
        assert_eq!(link.addresses, [format!("{ip}/16")]);
        let default = &pod.guest.routes[0];
        assert_eq!(default.destination, "0.0.0.0/0");
        assert_eq!(default.gateway, "10.222.0.1");
        assert_eq!(node.leases().len(), 1);

        // The node asks by ARP who has the pod's address; we answer as the guest would.
        let mut tap = fs::File::from(pod.tap);
        let host = UdpSocket::bind("10.222.0.1:0").unwrap();
        host.send_to(b"hello guest", (ip, 4000)).unwrap();
        let asked = frame(&mut tap, |f| f[12..14] == [8, 6] && f[38..42] == octets(ip));
        let mut answer = vec![0; VNET_HEADER];
        answer.extend_from_slice(&asked[6..12]);
        answer.extend_from_slice(&pod.mac);
        answer.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        answer.extend_from_slice(&pod.mac);
        answer.extend_from_slice(&octets(ip));
        answer.extend_from_slice(&asked[22..32]);
        tap.write_all(&answer).unwrap();
        let packet = frame(&mut tap, |f| {
            f[12..14] == [8, 0] && f.ends_with(b"hello guest")
        });
        assert_eq!(packet[..6], pod.mac, "the frame is for the guest");

        drop(tap);
        node.network.teardown(&pod.record).await.unwrap();
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

#[test]
fn a_failing_plugin_leaves_nothing() {
    let chain = BRIDGE.replace("}}]}", "}},{\"type\":\"broken\"}]}");
    let Some(node) = Node::new(&chain) else {
        return;
    };
    let missing = node.network.plan(&request("pod1")).unwrap_err().to_string();
    assert!(missing.contains("broken"), "{missing}");

    let bin = node.dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let script = "#!/bin/sh\n[ $CNI_COMMAND = DEL ] || { echo not today >&2; exit 1; }\n";
    fs::write(bin.join("broken"), script).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bin.join("broken"), executable).unwrap();
    run(async {
        let plan = node.network.plan(&request("pod1")).unwrap();
        let error = node.network.setup(plan).await.unwrap_err().to_string();
        assert!(error.contains("not today"), "{error}");
    });
    node.assert_nothing_left();
}

#[test]
fn a_lost_namespace_still_gives_its_address_back() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    run(async {
        let plan = node.network.plan(&request("pod1")).unwrap();
        let pod = node.network.setup(plan).await.unwrap();
        node.network.remove_orphan("pod1").unwrap();
        assert_eq!(node.leases().len(), 1);
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

#[test]
fn without_a_configuration_there_is_no_network() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    assert!(node.network.status().is_ok());
    fs::remove_file(node.dir.path().join("net.d/10-test.conflist")).unwrap();
    assert!(matches!(node.network.status(), Err(NetworkError::Cni(_))));
}

fn octets(ip: IpAddr) -> [u8; 4] {
    match ip {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED.octets(),
    }
}

/// Reads frames from the tap until one fits, without its virtio-net header.
fn frame(tap: &mut fs::File, fits: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut buffer = vec![0; 65536];
    while Instant::now() < deadline {
        match tap.read(&mut buffer) {
            Ok(length) if length >= VNET_HEADER + 42 => {
                let frame = &buffer[VNET_HEADER..length];
                if fits(frame) {
                    return frame.to_vec();
                }
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    panic!("no such frame reached the tap");
}
