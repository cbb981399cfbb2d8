//! The plugins that Debian has.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

use hull_network::{NetworkError, PodNetwork, PodNetworkRequest, PortMapping};

use crate::node::{Node, plugins_are_new, request, run, sh, tap_of};

const VNET_HEADER: usize = 10;

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
        let plan = node.network.plan(&request("pod1")).await.unwrap();
        let mut pod = node.network.setup(plan).await.unwrap();

        let ip = pod.record.ips[0];
        let mac = pod.links[0].mac;
        let link = &pod.guest.interfaces[0];
        assert_eq!((link.name.as_str(), link.mtu), ("eth0", 1400));
        assert_eq!(link.addresses, [format!("{ip}/16")]);
        let default = &pod.guest.routes[0];
        assert_eq!(default.destination, "0.0.0.0/0");
        assert_eq!(default.gateway, "10.222.0.1");
        assert_eq!(node.leases().len(), 1);

        // The node asks by ARP who has the pod's address; we answer as the guest would.
        let mut tap = tap_of(pod.links.remove(0));
        let host = UdpSocket::bind("10.222.0.1:0").unwrap();
        host.send_to(b"hello guest", (ip, 4000)).unwrap();
        let asked = frame(&mut tap, |f| f[12..14] == [8, 6] && f[38..42] == octets(ip));
        let mut answer = vec![0; VNET_HEADER];
        answer.extend_from_slice(&asked[6..12]);
        answer.extend_from_slice(&mac);
        answer.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        answer.extend_from_slice(&mac);
        answer.extend_from_slice(&octets(ip));
        answer.extend_from_slice(&asked[22..32]);
        tap.write_all(&answer).unwrap();
        let packet = frame(&mut tap, |f| {
            f[12..14] == [8, 0] && f.ends_with(b"hello guest")
        });
        assert_eq!(packet[..6], mac, "the frame is for the guest");

        drop(tap);
        node.network.teardown(&pod.record).await.unwrap();
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

/// Host-side filters of plugins hold for a guest too, because its frames pass the pod's interface.
#[test]
fn a_guest_that_lies_about_its_mac_is_filtered_by_the_bridge() {
    let checked = BRIDGE.replace("\"isGateway\"", "\"macspoofchk\":true,\"isGateway\"");
    let Some(node) = Node::new(&checked) else {
        return;
    };
    run(async {
        let mut pod = setup(&node, &request("pod1")).await.unwrap();
        let mac = pod.links[0].mac;
        let mut tap = tap_of(pod.links.remove(0));
        let host = UdpSocket::bind("10.222.0.1:4000").unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let bridge = sh("ip -o link show br-test | grep -o 'ether [0-9a-f:]*'");
        let bridge: Vec<u8> = bridge["ether ".len()..]
            .trim()
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        let liar = [2, 0, 0, 0, 0, 0x66];
        for (from, text) in [(liar, b"false"), (mac, b"truth")] {
            let frame = datagram(&bridge, from, octets(pod.record.ips[0]), text);
            tap.write_all(&frame).unwrap();
        }
        let mut text = [0; 16];
        let (length, asker) = host.recv_from(&mut text).unwrap();
        assert_eq!(&text[..length], b"truth");
        assert_eq!(asker.ip(), pod.record.ips[0]);
        drop(tap);
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

/// A frame with a datagram to port 4000 of the gateway, as the tap takes it.
fn datagram(to: &[u8], from: [u8; 6], ip: [u8; 4], text: &[u8]) -> Vec<u8> {
    let length = 28 + text.len() as u8;
    let mut header = vec![0x45, 0, 0, length, 0, 0, 0, 0, 64, 17, 0, 0];
    header.extend_from_slice(&ip);
    header.extend_from_slice(&[10, 222, 0, 1]);
    let words = header
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0; VNET_HEADER];
    frame.extend_from_slice(to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&[8, 0]);
    frame.extend_from_slice(&header);
    // Ports 4000, and no checksum.
    frame.extend_from_slice(&[0x0f, 0xa0, 0x0f, 0xa0, 0, 8 + text.len() as u8, 0, 0]);
    frame.extend_from_slice(text);
    frame
}

#[test]
fn a_lost_namespace_still_gives_its_address_back() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    run(async {
        let plan = node.network.plan(&request("pod1")).await.unwrap();
        let pod = node.network.setup(plan).await.unwrap();
        sh("umount $(ls -d DIR/netns/*); rm DIR/netns/*"
            .replace("DIR", node.dir.path().to_str().unwrap())
            .as_str());
        assert_eq!(node.leases().len(), 1);
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

/// What a reboot leaves: no namespace, no link, /run empty, the records.
#[test]
fn a_reboot_gives_all_addresses_back() {
    let Some(node) = Node::new(CHAIN) else {
        return;
    };
    run(async {
        let pod = setup(&node, &request("pod1")).await.unwrap();
        assert_eq!(node.leases().len(), 2);
        let dir = node.dir.path().to_str().unwrap();
        sh(&format!(
            "umount {dir}/netns/*; rm -r {dir}/netns; ip link del br-test"
        ));
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

const CHAIN: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"br-test","isGateway":true,"ipMasq":true,"mtu":9000,
     "capabilities":{"ips":true,"mac":true},
     "ipam":{"type":"host-local","dataDir":"LEASES",
             "ranges":[[{"subnet":"10.222.0.0/16"}],[{"subnet":"fd22::/64"}]],
             "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
    {"type":"tuning","sysctl":{"net.ipv4.conf.eth0.arp_filter":"1"}},
    {"type":"portmap","capabilities":{"portMappings":true},"snat":true},
    {"type":"bandwidth","capabilities":{"bandwidth":true}},
    {"type":"firewall"}]}"#;

#[test]
fn a_chain_of_all_usual_plugins_comes_and_goes() {
    let Some(node) = Node::new(CHAIN) else {
        return;
    };
    run(async {
        node.network.status().await.unwrap();
        let asked = PodNetworkRequest {
            port_mappings: vec![PortMapping {
                protocol: "udp".into(),
                container_port: 53,
                host_port: 5353,
                host_ip: String::new(),
            }],
            annotations: [
                ("kubernetes.io/ingress-bandwidth", "10M"),
                ("kubernetes.io/egress-bandwidth", "20M"),
                ("network.hull/ips", "10.222.7.7,fd22::77"),
                ("network.hull/mac", "02:00:00:00:07:07"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            ..request("pod1")
        };
        let before = rules();
        let pod = setup(&node, &asked).await.unwrap();
        assert_eq!(
            pod.record.ips,
            ["10.222.7.7", "fd22::77"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        let link = &pod.guest.interfaces[0];
        assert_eq!(link.mac, "02:00:00:00:07:07");
        assert_eq!(link.mtu, 9000);
        assert_eq!(link.addresses, ["10.222.7.7/16", "fd22::77/64"]);
        let defaults: Vec<_> = pod.guest.routes.iter().map(|r| &r.destination).collect();
        assert!(defaults.contains(&&"::/0".to_owned()), "{defaults:?}");
        let during = rules();
        assert!(during.contains("5353"), "{during}");
        assert!(during.contains("10.222.7.7"), "{during}");
        let shaped = sh("tc qdisc");
        assert!(
            shaped.contains("rate 10Mbit") && shaped.contains("rate 20Mbit"),
            "{shaped}"
        );

        node.network.teardown(&pod.record).await.unwrap();
        // Chains of plugins stay, rules of pods do not.
        let after = rules();
        for gone in ["5353", "10.222.7.7", "fd22::77"] {
            assert!(!after.contains(gone), "before {before}, after {after}");
        }
    });
    node.assert_nothing_left();
}

#[test]
fn fifty_pods_at_once_get_fifty_addresses_and_give_them_back() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    run(async {
        let requests: Vec<_> = (0..50).map(|i| request(&format!("pod{i}"))).collect();
        let starts = requests.iter().map(|request| setup(&node, request));
        let pods = futures::future::join_all(starts).await;
        let pods: Vec<_> = pods.into_iter().map(Result::unwrap).collect();
        let ips: BTreeSet<IpAddr> = pods.iter().map(|pod| pod.record.ips[0]).collect();
        assert_eq!((ips.len(), node.leases().len()), (50, 50));
        let ends = pods.iter().map(|pod| node.network.teardown(&pod.record));
        for end in futures::future::join_all(ends).await {
            end.unwrap();
        }
    });
    node.assert_nothing_left();
}

/// Without host ports, because portmap 1.1 looks for their rules in the other family too.
#[test]
fn what_is_missing_of_a_network_is_found() {
    let Some(node) = Node::new(CHAIN) else {
        return;
    };
    run(async {
        let asked = PodNetworkRequest {
            annotations: [("kubernetes.io/egress-bandwidth".into(), "1M".into())].into(),
            ..request("pod1")
        };
        let pod = setup(&node, &asked).await.unwrap();
        node.network.check(&pod.record).await.unwrap();
        // As if somebody had tidied up.
        sh(&format!("rm {}/leases/test/*2", node.dir.path().display()));
        let error = node.network.check(&pod.record).await.unwrap_err();
        assert!(error.to_string().contains("bridge CHECK"), "{error}");
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

const PTP: &str = r#"{"cniVersion":"0.4.0","name":"test","plugins":[
    {"type":"ptp","ipMasq":false,"mtu":1500,
     "ipam":{"type":"host-local","dataDir":"LEASES",
             "ranges":[[{"subnet":"10.222.0.0/24"}],[{"subnet":"fd22::/64"}]],
             "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}]}"#;

#[test]
fn a_point_to_point_link_has_no_neighbours_but_the_node() {
    let Some(node) = Node::new(PTP) else {
        return;
    };
    run(async {
        let pod = setup(&node, &request("pod1")).await.unwrap();
        let link = &pod.guest.interfaces[0];
        // The addresses' own networks are behind the gateway: no route comes with them.
        assert_eq!(link.addresses, Vec::<String>::new());
        assert_eq!(link.lone_addresses, ["10.222.0.2/24", "fd22::2/64"]);
        let route = |destination: &str| {
            let mut routes = pod.guest.routes.iter();
            let route = routes.find(|r| r.destination == destination);
            route.unwrap_or_else(|| panic!("{destination} in {:?}", pod.guest.routes))
        };
        assert_eq!(route("10.222.0.1/32").gateway, "");
        assert_eq!(route("10.222.0.0/24").gateway, "10.222.0.1");
        assert_eq!(route("0.0.0.0/0").gateway, "10.222.0.1");
        assert_eq!(route("fd22::/64").gateway, "fd22::1");
        assert_eq!(route("::/0").gateway, "fd22::1");
        node.network.check(&pod.record).await.unwrap();
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

const MACVLAN: &str = r#"{"cniVersion":"1.0.0","name":"test","type":"macvlan","master":"up0",
     "mtu":1450,"ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.222.0.0/24"}}"#;

#[test]
fn a_macvlan_of_a_single_plugin_configuration_works() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    fs::remove_file(node.conf_file()).unwrap();
    let leases = node.dir.path().join("leases");
    let conf = MACVLAN.replace("LEASES", leases.to_str().unwrap());
    fs::write(node.dir.path().join("net.d/20-test.conf"), conf).unwrap();
    sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip link set up1 up");
    sh("ip addr add 10.222.0.250/24 dev up1");
    run(async {
        let mut pod = setup(&node, &request("pod1")).await.unwrap();
        assert_eq!(pod.guest.interfaces[0].mtu, 1450);
        // From up1 over the wire to up0, its macvlan, and the tap.
        let mut tap = tap_of(pod.links.remove(0));
        let host = UdpSocket::bind("10.222.0.250:0").unwrap();
        host.send_to(b"hello", (pod.record.ips[0], 4000)).unwrap();
        let ip = octets(pod.record.ips[0]);
        frame(&mut tap, |f| f[12..14] == [8, 6] && f[38..42] == ip);
        drop(tap);
        node.network.check(&pod.record).await.unwrap();
        node.network.teardown(&pod.record).await.unwrap();
    });
    sh("ip link del up0");
    node.assert_nothing_left();
}

#[test]
fn readiness_follows_the_configuration() {
    let Some(node) = Node::new(BRIDGE) else {
        return;
    };
    run(async {
        let status = async || match node.network.status().await {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(status().await, "");
        node.configure("{");
        assert!(status().await.contains("10-test.conflist"));
        let newer = BRIDGE.replace("1.0.0", "1.1.0");
        if !plugins_are_new() {
            node.configure(&newer);
            assert!(
                status().await.contains("does not speak"),
                "{}",
                status().await
            );
        }
        node.configure(&BRIDGE.replace("\"bridge\",\"b", "\"absent\",\"b"));
        assert!(status().await.contains("absent"), "{}", status().await);
        fs::remove_file(node.conf_file()).unwrap();
        assert!(status().await.contains("no CNI network configuration"));
        node.configure(BRIDGE);
        assert_eq!(status().await, "");
    });
}

#[test]
fn the_newest_version_that_all_plugins_speak_is_used() {
    let all = r#""cniVersions":["0.3.1","0.4.0","1.0.0","1.1.0"],"name""#;
    let Some(node) = Node::new(&BRIDGE.replace("\"name\"", all)) else {
        return;
    };
    run(async {
        let pod = setup(&node, &request("pod1")).await.unwrap();
        let newest = if plugins_are_new() { "1.1.0" } else { "1.0.0" };
        let record = serde_json::to_value(&pod.record).unwrap();
        assert_eq!(record["attachment"]["list"]["cni_version"], newest);
        assert_eq!(record["attachment"]["result"]["cniVersion"], newest);
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

async fn setup(node: &Node, request: &PodNetworkRequest) -> Result<PodNetwork, NetworkError> {
    let plan = node.network.plan(request).await?;
    node.network.setup(plan).await
}

/// All rules of the node's packet filter.
fn rules() -> String {
    sh("iptables-save; ip6tables-save; nft list ruleset 2>/dev/null || true")
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
