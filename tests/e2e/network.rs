//! Networks of pods as their users see them: across real network namespaces, bridges and nodes.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::Command,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    Capability, ContainerConfig, Device, DnsConfig, LinuxContainerConfig,
    LinuxContainerSecurityContext, PortMapping, Protocol,
};
use hull_tests::client::image;

use crate::harness::{NETWORK_TOOLS, Node, PATIENCE, Place, Pod};

mod queues;

/// A bridge with addresses of both families. Links whose names begin so are no leftovers of pods.
const DUAL: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"hull-e2e1","isGateway":true,"ipMasq":true,"mtu":1500,
     "ipam":{"type":"host-local","dataDir":"LEASES",
             "ranges":[[{"subnet":"10.81.0.0/24"}],[{"subnet":"fd81::/64"}]],
             "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
    {"type":"portmap","capabilities":{"portMappings":true}}]}"#;
/// How much a large transfer is, bytes.
const LARGE: usize = 2 << 20;

/// Runs a shell script on the host that must succeed.
fn host(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Undoes what a test set up on the host, also when it fails.
struct Undo(&'static str);

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = Command::new("sh").args(["-c", self.0]).output();
    }
}

/// A pod that sleeps, with the tools and the right to use them.
struct Tools<'a> {
    node: &'a Node,
    pod: Pod,
    container: String,
    ips: Vec<IpAddr>,
}

impl<'a> Tools<'a> {
    async fn run(node: &'a Node, pod: Pod) -> Self {
        let container = node.create(&pod, tools(node, "tools")).await.unwrap();
        node.start_container(&container).await.unwrap();
        let network = node.client.pod_status(&pod.id).await.unwrap().network;
        let network = network.unwrap();
        let all = std::iter::once(&network.ip).chain(network.additional_ips.iter().map(|a| &a.ip));
        let ips = all.map(|ip| ip.parse().unwrap()).collect();
        Self {
            node,
            pod,
            container,
            ips,
        }
    }

    async fn start(node: &'a Node, name: &str) -> Self {
        node.client.pull(NETWORK_TOOLS).await.unwrap();
        let pod = node.run_sandbox(node.sandbox(name)).await.unwrap();
        Self::run(node, pod).await
    }

    /// Runs a script in it that must succeed, and returns what it says.
    async fn sh(&self, script: &str) -> String {
        let answer = self.node.exec(&self.container, script).await;
        let (out, err) = (answer.stdout, answer.stderr);
        let (out, err) = (
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        );
        assert_eq!(answer.exit_code, 0, "{script}: {out} {err}");
        out
    }

    /// Waits until what a script says fits.
    async fn wait_for(&self, script: &str, what: &str, fits: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.node.exec(&self.container, script).await;
            let said = String::from_utf8_lossy(&answer.stdout).into_owned();
            if fits(&said) {
                return;
            }
            let log = std::fs::read_to_string(self.node.dir.join("hull.log")).unwrap();
            let log: Vec<_> = log.lines().filter(|l| l.contains("network")).collect();
            assert!(
                Instant::now() < deadline,
                "no {what} in {said:?} of {script}; {log:#?}"
            );
        }
    }

    async fn end(self) {
        self.node.stop_sandbox(&self.pod.id).await.unwrap();
        self.node.remove_sandbox(&self.pod.id).await.unwrap();
    }
}

fn tools(node: &Node, name: &str) -> ContainerConfig {
    let mut config = node.script(name, "sleep 10000");
    config.image = Some(image(NETWORK_TOOLS));
    config.linux = Some(LinuxContainerConfig {
        security_context: Some(LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: vec!["NET_ADMIN".into()],
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    config.devices = vec![Device {
        container_path: "/dev/net/tun".into(),
        host_path: "/dev/net/tun".into(),
        permissions: "rwm".into(),
    }];
    config
}

/// Answers each connection with the address that it came from, and each datagram with itself.
const SERVE: &str = "socat TCP4-LISTEN:8080,fork,reuseaddr SYSTEM:'echo $SOCAT_PEERADDR' >/dev/null 2>&1 & \
    socat TCP6-LISTEN:8080,ipv6only,fork,reuseaddr SYSTEM:'echo $SOCAT_PEERADDR' >/dev/null 2>&1 & \
    socat UDP6-RECVFROM:8053,ipv6only=0,fork SYSTEM:cat >/dev/null 2>&1 & \
    until [ $(ss -Hltun | grep -c ':80[58][03]') = 3 ]; do sleep 0.1; done";

/// Asks a server of [`SERVE`], with an address as in URLs.
fn ask(address: &str) -> String {
    format!("socat -t 20 - TCP:{address},retry=20,interval=0.2 </dev/null")
}

fn ask_udp(address: &str) -> String {
    format!("echo datagram | socat -t 3 - UDP:{address}")
}

fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

/// Has `from` send random bytes to `to`, and expects the same to arrive.
async fn transfer(from: &Tools<'_>, to: &Tools<'_>, ip: IpAddr) {
    let (family, address) = (if ip.is_ipv4() { 4 } else { 6 }, bracketed(ip));
    let receive = format!("socat -u TCP{family}-LISTEN:9000,reuseaddr - | md5sum");
    let send = format!(
        "head -c {LARGE} /dev/urandom | tee /dev/shm/sent | \
         socat -u - TCP{family}:{address}:9000,retry=50,interval=0.2; \
         md5sum < /dev/shm/sent; rm /dev/shm/sent"
    );
    let (got, sent) = tokio::join!(to.sh(&receive), from.sh(&send));
    assert_eq!(got, sent, "to {address}");
}

#[tokio::test]
async fn pods_and_their_host_reach_each_other() {
    let _undo = Undo(
        "ip link del hull-e2e-o0; ip netns del hull-e2e-out; ip link del hull-e2e1; \
         iptables -t nat -S POSTROUTING | grep 10.81.0. && iptables -t nat -F POSTROUTING",
    );
    // A machine next to the node.
    host(
        "ip netns add hull-e2e-out; ip link add hull-e2e-o0 type veth peer name eth0 netns hull-e2e-out
         ip addr add 192.0.2.1/24 dev hull-e2e-o0; ip link set hull-e2e-o0 up
         ip -n hull-e2e-out addr add 192.0.2.2/24 dev eth0; ip -n hull-e2e-out link set eth0 up
         ip -n hull-e2e-out link set lo up",
    );
    let node = Node::start().await;
    node.configure_network(DUAL);
    node.client.pull(NETWORK_TOOLS).await.unwrap();
    let mut config = node.sandbox("server");
    config.hostname = "server-1".into();
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.81.0.1".into(), "fd81::1".into()],
        searches: vec!["ns.svc.test".into(), "svc.test".into()],
        options: vec!["ndots:5".into()],
    });
    let port = |protocol: Protocol, container_port, host_port| PortMapping {
        protocol: protocol.into(),
        container_port,
        host_port,
        host_ip: String::new(),
    };
    config.port_mappings = vec![
        port(Protocol::Tcp, 8080, 18080),
        port(Protocol::Udp, 8053, 18053),
    ];
    let server = node.run_sandbox(config).await.unwrap();
    let server = Tools::run(&node, server).await;
    let client = Tools::start(&node, "client").await;

    // What the pod was told about itself.
    assert_eq!(server.ips.len(), 2, "{:?}", server.ips);
    assert!(server.ips[0].is_ipv4() && server.ips[1].is_ipv6());
    let said = server
        .sh("cat /etc/resolv.conf; hostname; cat /etc/hosts")
        .await;
    let resolver = "search ns.svc.test svc.test\nnameserver 10.81.0.1\nnameserver fd81::1\n\
        options ndots:5\nserver-1\n";
    assert!(said.starts_with(resolver), "{said}");
    for ip in &server.ips {
        assert!(said.contains(&format!("{ip}\tserver-1\n")), "{said}");
    }
    let link = server
        .sh("/usr/sbin/ip addr show eth0; ethtool -k eth0")
        .await;
    for part in [
        "mtu 1500",
        &format!("inet {}/24", server.ips[0]),
        &format!("inet6 {}/64", server.ips[1]),
        "rx-checksumming: on",
        "tx-checksumming: on",
        "tcp-segmentation-offload: on",
    ] {
        assert!(link.contains(part), "{part} in {link}");
    }

    // Pod to pod, by both families and all protocols.
    server.sh(SERVE).await;
    for (ip, own) in server.ips.iter().zip(&client.ips) {
        let address = bracketed(*ip);
        let seen = client.sh(&ask(&format!("{address}:8080"))).await;
        assert!(seen.contains(&hextets(*own)), "{seen} is not {own}");
        let echo = client.sh(&ask_udp(&format!("{address}:8053"))).await;
        assert_eq!(echo, "datagram\n", "{ip}");
        client.sh(&format!("/usr/sbin/ping -c 2 -W 20 {ip}")).await;
    }
    // The path takes whole packets, and no larger ones.
    let ip = server.ips[0];
    let sized = |size| format!("/usr/sbin/ping -c 1 -W 20 -M do -s {size} {ip}");
    client.sh(&sized(1472)).await;
    let large = node.exec(&client.container, &sized(1473)).await;
    assert_ne!(large.exit_code, 0);
    for ip in &server.ips {
        transfer(&client, &server, *ip).await;
    }

    // Host to pod and back.
    host(&format!(
        "ping -c 2 -W 20 {}; ping -c 2 -W 20 {}",
        server.ips[0], server.ips[1]
    ));
    assert!(host(&ask(&format!("{ip}:8080"))).contains("10.81.0.1"));
    assert_eq!(host(&ask_udp(&format!("{ip}:8053"))), "datagram\n");
    server
        .sh("/usr/sbin/ping -c 2 -W 20 10.81.0.1; /usr/sbin/ping -c 2 -W 20 fd81::1")
        .await;

    // Host ports lead from the other machine to the pod, which sees who asks.
    let outside = |script: &str| {
        host(&format!(
            "nsenter --net=/run/netns/hull-e2e-out sh -c '{script}'"
        ))
    };
    assert!(outside(&ask("192.0.2.1:18080")).contains("192.0.2.2"));
    assert_eq!(outside(&ask_udp("192.0.2.1:18053")), "datagram\n");
    // To the other machine, the pod is its node.
    let mut listener = Command::new("nsenter")
        .args([
            "--net=/run/netns/hull-e2e-out",
            "socat",
            "TCP-LISTEN:8080,reuseaddr",
        ])
        .arg("SYSTEM:echo $SOCAT_PEERADDR")
        .spawn()
        .unwrap();
    assert_eq!(client.sh(&ask("192.0.2.2:8080")).await, "192.0.2.1\n");
    listener.wait().unwrap();

    client.end().await;
    server.end().await;
    let rules = host("iptables-save; ip6tables-save");
    assert!(
        !rules.contains("18080") && !rules.contains("18053"),
        "{rules}"
    );
    node.finish().await;
}

/// As socat writes it: all of its hextets for an address of IPv6.
fn hextets(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => {
            let parts: Vec<_> = ip.segments().iter().map(|s| format!("{s:04x}")).collect();
            parts.join(":")
        }
    }
}

/// One of two nodes, with bridges of their own and large packets.
fn routed(number: u8) -> String {
    format!(
        r#"{{"cniVersion":"1.0.0","name":"test","plugins":[
        {{"type":"bridge","bridge":"hull-e2e-b{number}","isGateway":true,"mtu":9000,
         "ipam":{{"type":"host-local","dataDir":"LEASES",
                 "ranges":[[{{"subnet":"10.82.{number}.0/24"}}],[{{"subnet":"fd82:0:0:{number}::/64"}}]],
                 "routes":[{{"dst":"0.0.0.0/0"}},{{"dst":"::/0"}}]}}}}]}}"#
    )
}

#[tokio::test]
async fn pods_of_two_nodes_reach_each_other() {
    let _undo =
        Undo("ip link del hull-e2e-c1; ip netns del hull-e2e-node2; ip link del hull-e2e-b1");
    host(
        "ip netns add hull-e2e-node2; ip -n hull-e2e-node2 link set lo up
         ip link add hull-e2e-c1 mtu 9000 type veth peer name eth0 mtu 9000 netns hull-e2e-node2
         ip link set hull-e2e-c1 up; ip -n hull-e2e-node2 link set eth0 up
         ip addr add 192.0.2.1/24 dev hull-e2e-c1
         ip addr add fd80::1/64 dev hull-e2e-c1 nodad
         ip -n hull-e2e-node2 addr add 192.0.2.2/24 dev eth0
         ip -n hull-e2e-node2 addr add fd80::2/64 dev eth0 nodad
         ip route add 10.82.2.0/24 via 192.0.2.2
         ip route add fd82:0:0:2::/64 via fd80::2
         ip -n hull-e2e-node2 route add 10.82.1.0/24 via 192.0.2.1
         ip -n hull-e2e-node2 route add fd82:0:0:1::/64 via fd80::1",
    );
    let one = Node::start().await;
    one.configure_network(&routed(1));
    let place = Place {
        netns: Some("hull-e2e-node2".into()),
        registry: Ipv4Addr::new(192, 0, 2, 1).into(),
    };
    let two = Node::start_at(place, |text| text).await;
    two.configure_network(&routed(2));
    let here = Tools::start(&one, "here").await;
    let there = Tools::start(&two, "there").await;
    assert!(
        there
            .sh("cat /sys/class/net/eth0/mtu")
            .await
            .starts_with("9000")
    );
    there.sh(SERVE).await;
    for (ip, own) in there.ips.iter().zip(&here.ips) {
        let seen = here.sh(&ask(&format!("{}:8080", bracketed(*ip)))).await;
        assert!(seen.contains(&hextets(*own)), "{seen} is not {own}");
    }
    let whole = |ip: IpAddr, size: u32| format!("/usr/sbin/ping -c 2 -W 20 -M do -s {size} {ip}");
    here.sh(&whole(there.ips[0], 8972)).await;
    there.sh(&whole(here.ips[1], 8952)).await;
    transfer(&here, &there, there.ips[0]).await;
    transfer(&there, &here, here.ips[1]).await;
    here.end().await;
    there.end().await;
    two.finish().await;
    one.finish().await;
}

#[tokio::test]
async fn sidecars_redirect_and_policies_hold() {
    let _undo = Undo("ip link del hull-e2e1; nft delete table netdev hull_e2e");
    let node = Node::start().await;
    node.configure_network(DUAL);
    let pod = Tools::start(&node, "mesh").await;
    // What a mesh does: all that others than the proxy send goes to the proxy.
    pod.sh(
        "socat TCP-LISTEN:15001,fork,reuseaddr SYSTEM:'echo proxied' >/dev/null 2>&1 & \
         until ss -ltn | grep -q :15001; do sleep 0.1; done",
    )
    .await;
    let asked = "socat -t 20 - TCP:198.51.100.7:80 </dev/null";
    for iptables in ["iptables", "iptables-legacy"] {
        pod.sh(&format!(
            "{iptables} -t nat -N MESH; \
             {iptables} -t nat -A MESH -m owner --uid-owner 1337 -j RETURN; \
             {iptables} -t nat -A MESH -d 127.0.0.1/32 -j RETURN; \
             {iptables} -t nat -A MESH -p tcp -m multiport --dports 80,443 -m comment --comment mesh \
                -j REDIRECT --to-ports 15001; \
             {iptables} -t nat -A OUTPUT -p tcp -j MESH; \
             {iptables}-save -t nat | grep -q 15001"
        ))
        .await;
        assert_eq!(pod.sh(asked).await, "proxied\n", "{iptables}");
        pod.sh(&format!("{iptables} -t nat -F; {iptables} -t nat -X MESH"))
            .await;
    }
    pod.sh(
        "ip6tables -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 15001; \
         ip6tables-legacy -A INPUT -m conntrack --ctstate INVALID -j DROP; \
         nft add table inet mesh; \
         nft add chain inet mesh out '{ type nat hook output priority -100 ; }'; \
         nft add rule inet mesh out meta skuid != 1337 tcp dport 80 redirect to :15001",
    )
    .await;
    assert_eq!(pod.sh(asked).await, "proxied\n");
    pod.sh("nft delete table inet mesh").await;

    // A VPN's device.
    pod.sh(
        "/usr/sbin/ip tuntap add dev vpn0 mode tun && /usr/sbin/ip addr add 10.99.0.1/24 dev vpn0 && \
         /usr/sbin/ip link set vpn0 up && /usr/sbin/ip route get 10.99.0.7 | grep -q vpn0",
    )
    .await;

    // The node's rules on the pod's interface hold for all that the guest sends and gets.
    let netns = node.netns(&pod.pod);
    let peer = host(&format!(
        "nsenter --net={} ip -o link show eth0 | sed 's/.*@if\\([0-9]*\\):.*/\\1/'",
        netns.display()
    ));
    let veth = host(&format!(
        "ip -o link | sed -n 's/^{}: \\([^@]*\\)@.*/\\1/p'",
        peer.trim()
    ));
    let (veth, ip) = (veth.trim(), pod.ips[0]);
    pod.sh(SERVE).await;
    let reached = || async {
        let script = format!("socat -t 20 - TCP:{ip}:8080,connect-timeout=3 </dev/null");
        Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap()
            .status
            .success()
    };
    assert!(reached().await);
    host(&format!(
        "nft add table netdev hull_e2e
         nft add chain netdev hull_e2e from '{{ type filter hook ingress device {veth} priority 0 ; }}'
         nft add rule netdev hull_e2e from ip saddr != {ip} counter drop
         nft add rule netdev hull_e2e from tcp sport 8080 counter drop"
    ));
    assert!(!reached().await);
    // What it sends under another address does not get out either.
    pod.sh("/usr/sbin/ip addr add 10.81.0.200/32 dev eth0")
        .await;
    let spoofed = "/usr/sbin/ping -c 1 -W 3 -I 10.81.0.200 10.81.0.1";
    assert_ne!(node.exec(&pod.container, spoofed).await.exit_code, 0);
    pod.sh("/usr/sbin/ping -c 1 -W 20 10.81.0.1").await;
    let counters = host("nft list table netdev hull_e2e");
    assert!(!counters.contains("packets 0 "), "{counters}");
    host("nft delete table netdev hull_e2e");
    assert!(reached().await);
    pod.end().await;
    node.finish().await;
}

/// A plugin that adds an interface and what belongs to it; it finds PODS in its directory.
const SECOND: &str = r#"#!/bin/sh
cat > /tmp/hull-e2e-in
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
ADD)
    nsenter --net=$CNI_NETNS sh -ec '
        ip link add net1 mtu 1400 address 02:00:00:00:83:02 type veth peer name hull-e2e-n1 netns 1
        ip link set net1 up; ip addr add 10.83.1.2/24 dev net1
        ip neigh add 10.83.1.9 lladdr 02:00:00:00:83:09 dev net1
        ip route add default via 10.83.1.1 dev net1 table 100
        ip route add unreachable 10.83.9.0/24
        ip addr add fd83:1::2/64 dev net1 nodad
        ip route add 10.86.0.0/16 nexthop via 10.83.0.1 dev eth0 weight 3 nexthop via 10.83.1.1 dev net1
        ip -6 route add fd86::/16 nexthop via fd83:1::1 dev net1 weight 2 nexthop via fd83:1::9 dev net1
        ip rule add ipproto udp dport 81-82 uidrange 5-6 table 100 priority 1003
        ip rule add from 10.83.1.2 table 100 priority 1000' >&2
    ip link set hull-e2e-n1 up mtu 1400; ip addr add 10.83.1.1/24 dev hull-e2e-n1
    sed 's/.*"prevResult"://; s/,"type":.*//' /tmp/hull-e2e-in ;;
esac
"#;

const CHANGING: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"hull-e2e3","isGateway":true,
     "ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.83.0.0/24",
             "routes":[{"dst":"0.0.0.0/0"}]}},
    {"type":"second"}]}"#;

#[tokio::test]
async fn a_guest_has_what_plugins_set_and_change() {
    let _undo = Undo(
        "ip link del hull-e2e3; ip link del hull-e2e-n1; ip link del hull-e2e-far; \
         rm /tmp/hull-e2e-in",
    );
    let mut node = Node::start_with(|text| {
        let dir = text.split('\'').nth(1).unwrap().trim_end_matches("/root");
        let bin = format!("{dir}/bin");
        std::fs::create_dir(&bin).unwrap();
        std::fs::write(format!("{bin}/second"), SECOND).unwrap();
        host(&format!("chmod +x {bin}/second"));
        text.replace("bin_dirs = [", &format!("bin_dirs = ['{bin}', "))
    })
    .await;
    node.configure_network(CHANGING);
    let pod = Tools::start(&node, "changing").await;
    let all = "for what in addr route '-6 route' 'route show table 100' rule neigh link; do \
        /usr/sbin/ip $what; done";
    let said = pod.sh(all).await;
    for part in [
        "inet 10.83.0.2/24",
        "inet 10.83.1.2/24",
        "mtu 1400",
        "02:00:00:00:83:02",
        "default via 10.83.0.1 dev eth0",
        "default via 10.83.1.1 dev net1",
        "unreachable 10.83.9.0/24",
        "nexthop via 10.83.0.1 dev eth0 weight 3",
        "nexthop via 10.83.1.1 dev net1 weight 1",
        "nexthop via fd83:1::1 dev net1 weight 2",
        "nexthop via fd83:1::9 dev net1 weight 1",
        // The image has no names of protocols.
        "1003:\tfrom all uidrange 5-6 ipproto ipproto-17 dport 81-82 lookup 100",
        "1000:\tfrom 10.83.1.2 lookup 100",
        "10.83.1.9 dev net1 lladdr 02:00:00:00:83:09 PERMANENT",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    pod.sh("/usr/sbin/ping -c 1 -W 20 10.83.0.1; /usr/sbin/ping -c 1 -W 20 10.83.1.1")
        .await;

    // What is changed in the namespace reaches the guest, and what the pod set itself stays.
    pod.sh("/usr/sbin/ip route add 10.84.0.0/16 via 10.83.0.1")
        .await;
    let netns = node.netns(&pod.pod);
    let change = |script: &str| {
        let script = script.replace('\n', ";");
        host(&format!(
            "nsenter --net={} sh -ec '{script}'",
            netns.display()
        ));
    };
    change(
        "ip addr add 10.83.0.77/24 dev eth0
         ip addr add fd83::7/64 dev eth0 nodad
         ip route add 10.85.0.0/16 via 10.83.0.1
         ip route replace default via 10.83.0.254 dev eth0
         ip neigh del 10.83.1.9 dev net1
         ip neigh add 10.83.0.9 lladdr 02:00:00:00:83:0a dev eth0
         ip rule del priority 1000
         ip rule del priority 1003
         ip route replace 10.86.0.0/16 via 10.83.1.1
         ip -6 route replace fd86::/16 via fd83:1::9
         ip rule add fwmark 7 table 100 priority 1001
         ip link set net1 mtu 1300",
    );
    pod.wait_for(all, "all that changed", |said| {
        [
            "inet 10.83.0.77/24",
            "inet6 fd83::7/64",
            "10.85.0.0/16 via 10.83.0.1",
            "10.84.0.0/16 via 10.83.0.1",
            "default via 10.83.0.254",
            "10.83.0.9 dev eth0 lladdr 02:00:00:00:83:0a",
            "1001:\tfrom all fwmark 0x7 lookup 100",
            "10.86.0.0/16 via 10.83.1.1 dev net1",
            "fd86::/16 via fd83:1::9 dev net1",
            "mtu 1300",
        ]
        .iter()
        .all(|part| said.contains(part))
            && [
                "10.83.1.9",
                "default via 10.83.0.1 ",
                "from 10.83.1.2",
                "1003:",
                "nexthop",
            ]
            .iter()
            .all(|part| !said.contains(part))
    })
    .await;
    has_addresses(&node, &pod.pod, &["10.83.0.2", "10.83.0.77", "fd83::7"]).await;

    // An interface that comes later leads into the guest too.
    host(&format!(
        "ip link add hull-e2e-far type veth peer name late netns {}
         ip addr add 10.87.0.9/24 dev hull-e2e-far; ip link set hull-e2e-far up",
        netns.display()
    ));
    change("ip link set late up; ip addr add 10.87.0.1/24 dev late");
    pod.wait_for(all, "an interface more", |said| {
        said.contains("inet 10.87.0.1/24")
    })
    .await;
    let far = "/usr/sbin/ping -c 1 -W 20 10.87.0.9";
    pod.sh(far).await;

    // Also what changes while there is no daemon.
    let Tools { pod, container, .. } = pod;
    node.daemon.kill();
    host(&format!(
        "nsenter --net={} sh -ec 'echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries; \
         ip addr add 10.83.0.66/24 dev eth0; ip addr del 10.83.0.2/24 dev eth0; \
         ip route replace default via 10.83.0.1 dev eth0'",
        netns.display()
    ));
    node.client = node.daemon.restart().await;
    let pod = Tools {
        node: &node,
        pod,
        container,
        ips: Vec::new(),
    };
    pod.wait_for(all, "the new address and not the old one", |said| {
        said.contains("inet 10.83.0.66/24")
            && said.contains("inet 10.83.0.77/24")
            && said.contains("default via 10.83.0.1 ")
            && said.contains("10.84.0.0/16 via 10.83.0.1")
            && !said.contains("10.83.0.2/24")
    })
    .await;
    has_addresses(&node, &pod.pod, &["10.83.0.77", "fd83::7", "10.83.0.66"]).await;
    pod.sh(far).await;
    host("ip link del hull-e2e-far");
    pod.wait_for("/usr/sbin/ip link", "end of the interface", |said| {
        said.contains("net1") && !said.contains("late")
    })
    .await;
    pod.sh("/usr/sbin/ping -c 1 -W 20 10.83.0.1").await;
    pod.end().await;
    node.finish().await;
}

/// Waits until the status of a pod tells these addresses.
async fn has_addresses(node: &Node, pod: &Pod, wanted: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = node.client.pod_status(&pod.id).await.unwrap();
        let network = status.network.unwrap();
        let additional = network.additional_ips.into_iter().map(|ip| ip.ip);
        let all: Vec<_> = std::iter::once(network.ip).chain(additional).collect();
        if all == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{all:?} are not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

const PTP: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"ptp","ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.84.0.0/24",
     "routes":[{"dst":"0.0.0.0/0"}]}}]}"#;

/// A configuration whose links share those of the cable `hull-e2e-u0`.
fn on_cable(kind: &str) -> String {
    format!(
        r#"{{"cniVersion":"1.0.0","name":"test","plugins":[{{"type":"{kind}","master":"hull-e2e-u0",
        "ipam":{{"type":"host-local","dataDir":"LEASES","subnet":"10.84.0.0/24"}}}}]}}"#
    )
}

#[tokio::test]
async fn links_of_every_kind_lead_into_a_pod() {
    let _undo = Undo("ip link del hull-e2e-u0");
    host(
        "ip link add hull-e2e-u0 type veth peer name hull-e2e-u1
         ip link set hull-e2e-u0 up; ip link set hull-e2e-u1 up",
    );
    let node = Node::start().await;
    for kind in ["ptp", "macvlan", "ipvlan"] {
        let gateway = if kind == "ptp" {
            node.configure_network(PTP);
            "10.84.0.1"
        } else {
            node.configure_network(&on_cable(kind));
            host("ip addr replace 10.84.0.250/24 dev hull-e2e-u1");
            "10.84.0.250"
        };
        let pod = Tools::start(&node, kind).await;
        pod.sh(SERVE).await;
        let ip = pod.ips[0];
        assert!(
            host(&ask(&format!("{ip}:8080"))).contains(gateway),
            "{kind}"
        );
        pod.sh(&format!("/usr/sbin/ping -c 2 -W 20 {gateway}"))
            .await;
        pod.end().await;
    }
    node.finish().await;
}

/// As many as an emulated host starts in reasonable time.
const MANY: usize = 4;

#[tokio::test]
async fn pods_started_at_once_get_addresses_of_their_own() {
    let node = Node::start_with(|text| text + "[vm]\nmemory_mib = 128\nscratch_mib = 64\n").await;
    let starts = (0..MANY).map(|i| node.run_sandbox(node.sandbox(&format!("pod-{i}"))));
    let pods = futures::future::join_all(starts).await;
    let pods: Vec<Pod> = pods.into_iter().map(|pod| pod.unwrap()).collect();
    let mut ips = std::collections::BTreeSet::new();
    for pod in &pods {
        let status = node.client.pod_status(&pod.id).await.unwrap();
        let ip: IpAddr = status.network.unwrap().ip.parse().unwrap();
        host(&format!("ping -c 1 -W 60 {ip}"));
        ips.insert(ip);
    }
    assert_eq!(ips.len(), MANY, "{ips:?}");
    let ends = pods.iter().map(|pod| async {
        node.stop_sandbox(&pod.id).await?;
        node.remove_sandbox(&pod.id).await
    });
    for end in futures::future::join_all(ends).await {
        end.unwrap();
    }
    node.finish().await;
}
