//! Plugins that do what the test says: all that the real ones do only on a bad day.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use hull_network::{
    GuestRange, Network, NetworkConfig, NetworkError, NetworkRecord, PodNetwork, PodNetworkRequest,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::Value;

use crate::node::{Node, request, run, sh, tap_of};

/// Two plugins behind a real bridge.
const CHAIN: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"br-test","isGateway":true,
     "ipam":{"type":"host-local","dataDir":"LEASES","subnet":"10.222.0.0/16"}},
    {"type":"first"},{"type":"second"}]}"#;

/// Notes the call and keeps what it was given.
const NOTE: &str = r#"cat > $DIR/in; echo "$CNI_COMMAND ${0##*/}" >> $DIR/calls
    cp $DIR/in $DIR/${0##*/}.$CNI_COMMAND"#;
/// Answers ADD with the result before it.
const PASS: &str =
    r#"[ $CNI_COMMAND != ADD ] || sed 's/.*"prevResult"://; s/,"type":.*//' $DIR/in"#;

fn good() -> String {
    format!("{NOTE}\n{PASS}")
}

fn chain() -> Option<Node> {
    let node = Node::new(CHAIN)?;
    node.plugin("first", &good());
    node.plugin("second", &good());
    Some(node)
}

async fn setup(node: &Node) -> Result<PodNetwork, NetworkError> {
    let plan = node.network.plan(&request("pod1")).await?;
    node.network.setup(plan).await
}

fn calls(node: &Node) -> Vec<String> {
    let path = node.dir.path().join("calls");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let _ = fs::remove_file(path);
    text.lines().map(str::to_owned).collect()
}

/// What a plugin was given at its last call of a command.
fn given(node: &Node, call: &str) -> Value {
    let text = fs::read(node.dir.path().join(call)).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn plugins_are_called_in_order_and_told_what_was_before() {
    let Some(node) = chain() else { return };
    run(async {
        let pod = setup(&node).await.unwrap();
        assert_eq!(calls(&node), ["ADD first", "ADD second"]);
        let before = given(&node, "second.ADD")["prevResult"].clone();
        assert_eq!(before["cniVersion"], "1.0.0");
        assert!(before["ips"][0]["address"].is_string());
        node.network.check(&pod.record).await.unwrap();
        assert_eq!(calls(&node), ["CHECK first", "CHECK second"]);
        node.network.teardown(&pod.record).await.unwrap();
        assert_eq!(calls(&node), ["DEL second", "DEL first"]);
        assert_eq!(given(&node, "first.DEL")["prevResult"], before);
    });
    node.assert_nothing_left();
}

#[test]
fn whatever_fails_is_rolled_back() {
    let Some(node) = chain() else { return };
    let fail = |what: &str| format!("{NOTE}\n[ $CNI_COMMAND = DEL ] || {what}");
    for (what, said) in [
        ("{ echo not today >&2; exit 1; }", "not today"),
        (
            r#"{ echo '{"code":11,"msg":"later"}'; exit 1; }"#,
            "later (code 11)",
        ),
        ("kill -SEGV $$", "signal: 11"),
        ("echo garbage", "garbage"),
        ("true", "no JSON"),
        (r#"echo '{"cniVersion":"1.0.0","ips":[{"addr'"#, "no JSON"),
        (
            r#"echo '{"ips":[{"address":"10.222.0.2/16","interface":9}]}'"#,
            "interface 9",
        ),
        ("exec yes", "more than"),
    ] {
        node.plugin("second", &fail(what));
        run(async {
            let error = setup(&node).await.unwrap_err();
            assert!(!matches!(error, NetworkError::Undo { .. }));
            let error = error.to_string();
            assert!(error.contains(said), "{what}: {error}");
            assert!(error.contains("second"), "{what}: {error}");
        });
        let order = ["ADD first", "ADD second", "DEL second", "DEL first"];
        assert_eq!(calls(&node), order, "{what}");
        // DEL is told how far ADD came.
        assert!(given(&node, "first.DEL")["prevResult"]["ips"].is_array());
        node.assert_nothing_left();
    }
}

#[test]
fn a_network_without_an_interface_is_rolled_back() {
    let Some(node) = chain() else { return };
    node.plugin(
        "second",
        &format!(
            "{NOTE}\n[ $CNI_COMMAND = DEL ] || nsenter --net=$CNI_NETNS ip link del eth0; {PASS}"
        ),
    );
    run(async {
        let error = setup(&node).await.unwrap_err();
        let error = format!("{error:?}");
        assert!(error.contains("eth0"), "{error}");
    });
    node.assert_nothing_left();
}

/// All that a plugin sets in the namespace counts, whether its result tells of it or not.
#[test]
fn everything_in_the_namespace_reaches_the_guest() {
    let Some(node) = chain() else { return };
    let script = r#"[ $CNI_COMMAND != ADD ] || nsenter --net=$CNI_NETNS sh -ec '
        ip link add net1 type veth peer name down1
        ip link set net1 up address 02:00:00:00:00:11 mtu 9000
        ip addr add 10.9.0.5/24 dev net1; ip addr add 10.9.0.6/32 dev net1
        ip addr add 10.8.0.5/24 dev net1 noprefixroute
        ip addr add fd09::5/64 dev net1 nodad
        ip neigh add 10.222.0.99 lladdr 02:00:00:00:00:99 dev eth0
        ip neigh add fd09::99 lladdr 02:00:00:00:00:98 dev net1
        ip neigh add 10.222.0.98 lladdr 02:00:00:00:00:97 dev eth0 nud stale
        ip route add 10.50.0.0/16 via 10.222.0.99 dev eth0 mtu 1300 metric 77
        ip route add 10.51.0.0/16 via 192.168.9.9 dev net1 onlink
        ip route add 10.52.0.0/16 dev net1 src 10.9.0.6
        ip route add default via 10.222.0.1 dev eth0
        ip route add default via 10.9.0.1 dev net1 table 100
        ip -6 route add default via fd09::1 dev net1 table 1000
        ip rule add from 10.9.0.5 table 100 priority 1000
        ip rule add not fwmark 0x7/0xff iif lo table main suppress_prefixlength 0 priority 900
        ip -6 rule add to fd77::/64 table 1000 priority 1001
        ip rule add ipproto tcp dport 80 sport 1000-2000 table 100 priority 1002
        ip rule add uidrange 0-1000 table 100 priority 1003
        ip rule add tun_id 5 table 100 priority 1004
        ip rule add ipproto udp dport 53-54 table 100 priority 1005
        ip route add 10.54.0.0/16 nexthop via 10.222.0.1 dev eth0 weight 3 nexthop via 10.9.0.1 dev net1
        ip -6 route add fd54::/16 nexthop via fd09::1 dev net1 weight 2 nexthop via fd09::2 dev net1
        ip route add 10.55.0.0/16 via inet6 fd09::1 dev net1
        ip route add 10.56.0.0/16 via 10.9.0.1 initcwnd 9
        ip route add throw 10.57.0.0/16 table 100
        ip route add unreachable 10.53.0.0/16
        ip -6 route add blackhole fd53::/16'"#;
    node.plugin(
        "second",
        &format!(
            "{NOTE}
{script}
{PASS}"
        ),
    );
    run(async {
        let pod = setup(&node).await.unwrap();
        let names: Vec<&str> = pod.links.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1"]);
        assert_eq!((pod.record.links, pod.links[1].mtu), (2, 9000));
        let net1 = &pod.guest.interfaces[1];
        assert_eq!(net1.mac, "02:00:00:00:00:11");
        assert_eq!(net1.addresses, ["10.9.0.5/24", "10.9.0.6/32", "fd09::5/64"]);
        assert_eq!(net1.lone_addresses, ["10.8.0.5/24"]);
        let mut neighbors = pod.guest.neighbors.clone();
        neighbors.sort_by(|a, b| a.address.cmp(&b.address));
        let neighbors: Vec<_> = neighbors
            .iter()
            .map(|n| (n.address.as_str(), n.interface.as_str()))
            .collect();
        assert_eq!(neighbors, [("10.222.0.99", "eth0"), ("fd09::99", "net1")]);
        let to = |destination: &str| {
            let mut routes = pod.guest.routes.iter();
            let route = routes.find(|r| r.destination == destination && r.table == 0);
            route.cloned()
        };
        let route = to("10.50.0.0/16").unwrap();
        assert_eq!((route.mtu, route.metric, route.onlink), (1300, 77, false));
        assert!(to("10.51.0.0/16").unwrap().onlink);
        let route = to("10.52.0.0/16").unwrap();
        assert_eq!((route.source.as_str(), route.scope), ("10.9.0.6", 253));
        assert_eq!(to("0.0.0.0/0").unwrap().gateway, "10.222.0.1");
        let route = to("10.53.0.0/16").unwrap();
        assert_eq!((route.kind, route.interface.as_str()), (7, ""));
        assert_eq!(to("fd53::/16").unwrap().kind, 6);
        let hops = |destination: &str| {
            let route = to(destination).unwrap();
            assert_eq!((route.gateway.as_str(), route.interface.as_str()), ("", ""));
            let hops = route.next_hops.iter();
            hops.map(|h| format!("{} {} {}", h.gateway, h.interface, h.weight))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            hops("10.54.0.0/16"),
            ["10.222.0.1 eth0 3", "10.9.0.1 net1 1"]
        );
        let mut v6 = hops("fd54::/16");
        v6.sort();
        assert_eq!(v6, ["fd09::1 net1 2", "fd09::2 net1 1"]);
        assert_eq!(to("10.56.0.0/16").unwrap().gateway, "10.9.0.1");
        let mut routes = pod.guest.routes.iter();
        let route = routes
            .find(|r| r.table == 100 && r.destination == "10.57.0.0/16")
            .unwrap();
        assert_eq!(route.kind, 9);
        // What is left out is named.
        assert_eq!(to("10.55.0.0/16"), None);
        let unsupported = pod.guest.unsupported.join("; ");
        assert_eq!(pod.guest.unsupported.len(), 3, "{unsupported}");
        for part in [
            "route 10.55.0.0/16 (table 254): its gateway is of the other family",
            "the metric InitCwnd(9) of route 10.56.0.0/16",
            "rule 1004: its attribute TunId",
        ] {
            assert!(unsupported.contains(part), "{part} in {unsupported}");
        }
        let mut routes = pod.guest.routes.iter();
        let route = routes
            .find(|r| r.table == 100 && r.destination == "0.0.0.0/0")
            .unwrap();
        assert_eq!(
            (route.gateway.as_str(), route.interface.as_str()),
            ("10.9.0.1", "net1")
        );
        assert_eq!(routes.find(|r| r.table == 1000).unwrap().gateway, "fd09::1");
        let rules = &pod.guest.rules;
        // One that is told by halves would mean something else.
        assert_eq!(
            rules.iter().map(|r| r.priority).collect::<Vec<_>>(),
            [900, 1000, 1002, 1003, 1005, 1001]
        );
        let range = |first, last| Some(GuestRange { first, last });
        assert_eq!(rules[2].protocol, 6);
        assert_eq!(rules[2].source_ports, range(1000, 2000));
        assert_eq!(rules[2].destination_ports, range(80, 80));
        assert_eq!(rules[3].users, range(0, 1000));
        assert_eq!((rules[4].protocol, rules[4].users), (17, None));
        assert_eq!(rules[4].destination_ports, range(53, 54));
        assert_eq!(
            (rules[0].mark, rules[0].mask, rules[0].invert),
            (7, 0xff, true)
        );
        assert_eq!(
            (rules[0].input.as_str(), rules[0].suppress_prefix),
            ("lo", Some(0))
        );
        assert_eq!(
            (rules[1].source.as_str(), rules[1].table),
            ("10.9.0.5/32", 100)
        );
        assert_eq!(rules[5].destination, "fd77::/64");
        assert!(rules[5].ipv6 && rules[5].table == 1000);
        assert_eq!(to("10.9.0.0/24"), None);
        node.network.teardown(&pod.record).await.unwrap();

        // More than a VM takes.
        let more = r#"[ $CNI_COMMAND != ADD ] || for i in 1 2 3 4; do nsenter --net=$CNI_NETNS             sh -ec "ip link add net$i type veth peer name down$i; ip link set net$i up"; done"#;
        node.plugin(
            "second",
            &format!(
                "{NOTE}
{more}
{PASS}"
            ),
        );
        let error = setup(&node).await.unwrap_err();
        assert!(
            format!("{error:?}").contains("TooMany { found: 5"),
            "{error:?}"
        );
    });
    node.assert_nothing_left();
}

/// Makes a tap as the plugin `tap` does; when asked to, it returns only after somebody has opened it.
const TAPS: &str = r#"cat > $DIR/in
    if [ $CNI_COMMAND = ADD ]; then
        nsenter --net=$CNI_NETNS sh -ec '
            ip tuntap add eth0 mode tap '$(cat $DIR/kind)'
            ip link set eth0 up mtu 1400 address 02:00:00:00:00:55
            ip addr add 10.222.0.7/24 dev eth0' >&2
        touch $DIR/made
        while [ -e $DIR/wait ]; do sleep 0.01; done
        echo '{"cniVersion":"1.0.0"}'
    fi"#;

/// Reads frames from `to` until one fits, while `from` sends one again and again: a link takes its time
/// to know of its carrier.
fn passes(from: &fs::File, to: &fs::File, sent: &[u8], fits: impl Fn(&[u8]) -> bool) {
    const VNET_HEADER: usize = 10;
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut got = vec![0; 65536];
    let (mut from, mut to) = (from, to);
    while Instant::now() < deadline {
        from.write_all(&[&[0; VNET_HEADER], sent].concat()).unwrap();
        thread::sleep(Duration::from_millis(5));
        while let Ok(length) = to.read(&mut got) {
            if got[..length].get(VNET_HEADER..).is_some_and(&fits) {
                return;
            }
        }
    }
    panic!("no frame passed");
}

/// Asks by ARP who has an address.
fn who_has(own_ip: [u8; 4], ip: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    let own = [2, 0, 0, 0, 0, 0x99];
    frame.extend_from_slice(&own);
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&own);
    frame.extend_from_slice(&own_ip);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&ip);
    frame
}

/// Whether a frame says by ARP who has it.
fn answers(frame: &[u8], ip: [u8; 4]) -> bool {
    frame.get(12..14) == Some(&[8, 6])
        && frame.get(20..22) == Some(&[0, 2])
        && frame.get(28..32) == Some(&ip)
}

#[test]
fn a_tap_of_a_plugin_leads_to_who_has_it_open() {
    let Some(node) = taps("") else { return };
    fs::write(node.dir.path().join("wait"), "").unwrap();
    run(async {
        let opened = async {
            let made = node.dir.path().join("made");
            while !made.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let netns = node.dir.path().join("netns/hull-pod1");
            let open = || -> Result<_, hull_network::netns::NetnsError> {
                Ok(hull_network::tap::open("eth0", 1).unwrap().remove(0))
            };
            let far = hull_network::netns::within(netns, open).await.unwrap();
            fs::remove_file(node.dir.path().join("wait")).unwrap();
            fs::File::from(far)
        };
        let (pod, far) = tokio::join!(setup(&node), opened);
        let mut pod = pod.unwrap();
        let link = &pod.guest.interfaces[0];
        assert_eq!((link.mac.as_str(), link.mtu), ("02:00:00:00:00:55", 1400));
        assert_eq!(link.addresses, ["10.222.0.7/24"]);
        let tap = tap_of(pod.links.remove(0));
        // The guest stands where the namespace stood, which does not answer.
        let frame = who_has([10, 222, 0, 9], [10, 222, 0, 7]);
        passes(&tap, &far, &frame, |got| got == frame);
        passes(&far, &tap, &frame, |got| got == frame);
        drop((tap, far));
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

#[test]
fn a_tap_that_nobody_has_open_is_the_vms_end_of_it() {
    for kind in ["", "multi_queue"] {
        let Some(node) = taps(kind) else { return };
        run(async {
            let mut pod = setup(&node).await.unwrap();
            let tap = tap_of(pod.links.remove(0));
            // What is at its other end answers: here the namespace itself.
            let asked = who_has([10, 222, 0, 9], [10, 222, 0, 7]);
            passes(&tap, &tap, &asked, |got| answers(got, [10, 222, 0, 7]));
            drop(tap);
            node.network.teardown(&pod.record).await.unwrap();
        });
        node.assert_nothing_left();
    }
}

/// A VM with more than one CPU reads and writes a tap by as many queues.
#[test]
fn a_tap_has_the_queues_that_are_asked_for_where_it_can() {
    for (kind, expected) in [("", 1), ("multi_queue", 3)] {
        let Some(node) = taps(kind) else { return };
        run(async {
            let mut pod = setup_with_queues(&node, 3).await;
            let mut taps = pod.links.remove(0).taps;
            assert_eq!(taps.len(), expected);
            let asked = who_has([10, 222, 0, 9], [10, 222, 0, 7]);
            let last = fs::File::from(taps.pop().unwrap());
            drop(taps);
            passes(&last, &last, &asked, |got| answers(got, [10, 222, 0, 7]));
            node.network.teardown(&pod.record).await.unwrap();
        });
        node.assert_nothing_left();
    }
    let Some(node) = chain() else { return };
    run(async {
        let pod = setup_with_queues(&node, 2).await;
        assert_eq!(pod.links[0].taps.len(), 2);
        let netns = node.dir.path().join("netns/hull-pod1");
        let inside = |command: &str| sh(&format!("nsenter --net={} {command}", netns.display()));
        let shown = inside("ip -d link show hulltap0");
        assert!(shown.contains("multi_queue numqueues 2"), "{shown}");
        // Also one that comes later, and then to a daemon that has only the record.
        inside(
            "sh -c 'ip link add late type veth peer name far; ip link set far up; ip link set late up; ip addr add 10.77.0.1/24 dev late'",
        );
        let record = serde_json::to_string(&pod.record).unwrap();
        let mut record: NetworkRecord = serde_json::from_str(&record).unwrap();
        let number = record.join("late").unwrap();
        let link = node.network.join(&record, number).await.unwrap();
        assert_eq!(link.taps.len(), 2);
        // A record of a daemon that knew of no queues means one.
        let mut old = serde_json::to_value(&record).unwrap();
        old.as_object_mut().unwrap().remove("queues").unwrap();
        let old: NetworkRecord = serde_json::from_value(old).unwrap();
        drop(link);
        let link = node.network.join(&old, number).await.unwrap();
        assert_eq!(link.taps.len(), 1);
        drop(link);
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

async fn setup_with_queues(node: &Node, queues: u8) -> PodNetwork {
    let request = PodNetworkRequest {
        queues,
        ..request("pod1")
    };
    let plan = node.network.plan(&request).await.unwrap();
    node.network.setup(plan).await.unwrap()
}

/// A node whose pods have a tap of this kind.
fn taps(kind: &str) -> Option<Node> {
    let conf = r#"{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"taps"}]}"#;
    let node = Node::new(conf)?;
    node.plugin("taps", TAPS);
    fs::write(node.dir.path().join("kind"), kind).unwrap();
    Some(node)
}

/// What is changed later is told as it is then.
#[test]
fn changes_in_the_namespace_are_followed() {
    let Some(node) = chain() else { return };
    run(async {
        let pod = setup(&node).await.unwrap();
        let mut watch = node.network.watch(&pod.record).await.unwrap();
        assert_eq!(*watch.borrow_and_update(), pod.guest);
        let netns = node.dir.path().join("netns/hull-pod1");
        let change = |script: &str| {
            sh(&format!(
                "nsenter --net={} sh -ec '{script}'",
                netns.display()
            ));
        };
        change(
            "ip addr add 10.222.9.9/16 dev eth0; ip rule add table 100 priority 5; \
                ip route add 10.60.0.0/16 via 10.222.0.1; \
                ip neigh add 10.222.0.77 lladdr 02:00:00:00:00:77 dev eth0; ip link set eth0 mtu 1400",
        );
        let limit = Duration::from_secs(20);
        let all = watch.wait_for(|now| {
            let link = &now.interfaces[0];
            link.mtu == 1400
                && link.addresses.contains(&"10.222.9.9/16".to_owned())
                && now.rules.len() == 1
                && now.neighbors.len() == 1
                && now.routes.iter().any(|r| r.destination == "10.60.0.0/16")
        });
        drop(tokio::time::timeout(limit, all).await.unwrap().unwrap());
        change(
            "ip addr del 10.222.9.9/16 dev eth0; ip rule del priority 5; ip route del 10.60.0.0/16; \
                ip neigh del 10.222.0.77 dev eth0; ip link set eth0 mtu 1500",
        );
        let as_before = watch.wait_for(|now| *now == pod.guest);
        drop(
            tokio::time::timeout(limit, as_before)
                .await
                .unwrap()
                .unwrap(),
        );
        // An interface that comes later does not lead into the guest by itself, and holds up nothing.
        sh(&format!(
            "ip link add far type veth peer name late; ip link set late netns {}; \
                ip link set far up; ip addr add 10.77.0.9/24 dev far",
            netns.display()
        ));
        change(
            "ip link set late up; ip addr add 10.77.0.1/24 dev late; ip route add 10.78.0.0/16 via 10.77.0.2; ip addr add 10.222.9.8/16 dev eth0",
        );
        let all = watch.wait_for(|now| {
            let link = &now.interfaces[0];
            link.addresses.contains(&"10.222.9.8/16".to_owned()) && !now.unsupported.is_empty()
        });
        let now = tokio::time::timeout(limit, all)
            .await
            .unwrap()
            .unwrap()
            .clone();
        assert_eq!((now.interfaces.len(), &now.routes), (1, &pod.guest.routes));
        assert_eq!(now.unjoined, ["late"]);
        assert!(now.unsupported[0].contains("route 10.78.0.0/16"), "{now:?}");

        // When it is joined, it does; also when a daemon died right after it had done so before.
        drop(watch);
        let mut record = pod.record.clone();
        let number = record.join("late").unwrap();
        let mut full = record.clone();
        let more = ["a", "b", "c"].map(|name| full.join(name));
        assert_eq!((number, more), (1, [Some(2), Some(3), None]));
        for _ in 0..2 {
            let link = node.network.join(&record, number).await.unwrap();
            let tap = tap_of(link);
            let asked = who_has([10, 77, 0, 1], [10, 77, 0, 9]);
            passes(&tap, &tap, &asked, |got| answers(got, [10, 77, 0, 9]));
        }
        let mut watch = node.network.watch(&record).await.unwrap();
        let now = watch.borrow_and_update().clone();
        assert_eq!(now.interfaces[1].addresses, ["10.77.0.1/24"]);
        assert_eq!((now.unjoined.len(), now.unsupported.len()), (0, 0));
        change("ip link del late; ip addr del 10.222.9.8/16 dev eth0");
        let gone = watch.wait_for(|now| record.gone(now) == [number]);
        drop(tokio::time::timeout(limit, gone).await.unwrap().unwrap());
        record.part(number);
        assert_eq!(record, pod.record);
        // A plugin's work is done when its interface is gone; that is no news for the guest.
        change("ip link del eth0");
        let nothing = tokio::time::timeout(Duration::from_millis(300), watch.changed());
        nothing.await.unwrap_err();
        drop(watch);
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

#[test]
fn del_is_tried_again_and_its_failure_keeps_the_address() {
    let Some(node) = chain() else { return };
    run(async {
        let pod = setup(&node).await.unwrap();
        // Once is no failure.
        node.plugin(
            "second",
            &format!("{NOTE}\n[ -e $DIR/once ] || {{ touch $DIR/once; exit 1; }}"),
        );
        calls(&node);
        node.network.teardown(&pod.record).await.unwrap();
        assert_eq!(calls(&node), ["DEL second", "DEL second", "DEL first"]);
        node.assert_nothing_left();

        node.plugin("second", &good());
        let pod = setup(&node).await.unwrap();
        node.plugin("second", "echo '{\"msg\":\"never\"}'; exit 1");
        for _ in 0..2 {
            let error = node.network.teardown(&pod.record).await.unwrap_err();
            assert!(error.to_string().contains("never"), "{error}");
            assert_eq!(node.leases().len(), 1);
            assert_eq!(node.network.pods().await.unwrap(), ["pod1"]);
        }
        // A plugin that is no longer there is as bad.
        fs::remove_file(node.dir.path().join("bin/second")).unwrap();
        node.network.teardown(&pod.record).await.unwrap_err();
        node.plugin("second", &good());
        node.network.teardown(&pod.record).await.unwrap();
    });
    node.assert_nothing_left();
}

#[test]
fn a_failed_undo_is_told_with_the_failure() {
    let Some(node) = chain() else { return };
    node.plugin(
        "second",
        "echo \"{\\\"msg\\\":\\\"no $CNI_COMMAND\\\"}\"; exit 1",
    );
    run(async {
        let plan = node.network.plan(&request("pod1")).await.unwrap();
        let error = node.network.setup(plan.clone()).await.unwrap_err();
        let NetworkError::Undo { failure, undo } = error else {
            panic!("{error}");
        };
        assert!(failure.to_string().contains("no ADD"), "{failure}");
        assert!(undo.to_string().contains("no DEL"), "{undo}");
        // The plan is enough for another try, though it knows no result.
        node.plugin("second", &good());
        node.network.teardown(&plan).await.unwrap();
        assert!(given(&node, "second.DEL")["prevResult"]["ips"].is_array());
    });
    node.assert_nothing_left();
}

/// A daemon that dies during ADD has the plan on disk, and what plugins answered so far.
#[test]
fn a_crash_in_the_middle_of_add_leaves_nothing() {
    let Some(node) = chain() else { return };
    node.plugin(
        "second",
        &format!("{NOTE}\n[ $CNI_COMMAND = DEL ] || exec sleep 1000"),
    );
    let plan = run(async {
        let plan = node.network.plan(&request("pod1")).await.unwrap();
        let stored = serde_json::to_string(&plan).unwrap();
        let setup = node.network.setup(plan);
        let reached = async {
            while !node.dir.path().join("second.ADD").exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            _ = setup => panic!("it hangs"),
            () = reached => {}
        }
        serde_json::from_str::<NetworkRecord>(&stored).unwrap()
    });
    assert_eq!(node.leases().len(), 1);
    run(async { node.network.teardown(&plan).await.unwrap() });
    assert!(given(&node, "first.DEL")["prevResult"]["ips"].is_array());
    node.assert_nothing_left();
}

#[test]
fn an_orphan_gives_its_address_back() {
    let Some(node) = chain() else { return };
    run(async {
        setup(&node).await.unwrap();
        assert_eq!(node.network.pods().await.unwrap(), ["pod1"]);
        node.network.remove_orphan("pod1").await.unwrap();
        node.assert_nothing_left();
        // A half-written result tells nothing, but goes.
        fs::write(node.dir.path().join("cache/pod2.json"), "{").unwrap();
        node.network.remove_orphan("pod2").await.unwrap();
    });
    node.assert_nothing_left();
}

const NEW: &str = r#"{"cniVersion":"1.1.0","name":"test","plugins":[
    {"type":"first"},{"type":"second"}]}"#;
const SPEAKS: &str = r#"[ $CNI_COMMAND != VERSION ] || {
    echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0","7.0.0"]}'; exit; }"#;

#[test]
fn plugins_of_1_1_say_whether_they_are_ready_and_collect_garbage() {
    let Some(node) = Node::new(NEW) else { return };
    for name in ["first", "second"] {
        node.plugin(name, &format!("{SPEAKS}\n{NOTE}"));
    }
    run(async {
        node.network.status().await.unwrap();
        assert_eq!(calls(&node), ["STATUS first", "STATUS second"]);
        let given_status = given(&node, "first.STATUS");
        assert_eq!(given_status["name"], "test");
        assert_eq!(given_status["cniVersion"], "1.1.0");

        // Another runtime's pod of this network is spared.
        let foreign = node.dir.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        let entry = r#"{"kind":"cniCacheV1","containerId":"theirs","ifName":"net0",
            "networkName":"test"}"#;
        fs::write(foreign.join("test-theirs-net0"), entry).unwrap();
        let gc = node.network.gc(vec!["pod1".into()]).unwrap();
        // Nobody comes or goes meanwhile.
        assert!(matches!(
            node.network.gc(Vec::new()),
            Err(NetworkError::Busy)
        ));
        gc.await.unwrap();
        assert_eq!(calls(&node), ["GC first", "GC second"]);
        let valid = &given(&node, "second.GC")["cni.dev/valid-attachments"];
        let text = r#"[{"containerID":"pod1","ifname":"eth0"},
            {"containerID":"theirs","ifname":"net0"}]"#;
        assert_eq!(*valid, serde_json::from_str::<Value>(text).unwrap());

        let full =
            r#"[ $CNI_COMMAND = GC ] || { echo '{"code":50,"msg":"pool is empty"}'; exit 1; }"#;
        node.plugin("second", &format!("{SPEAKS}\n{full}"));
        let error = node.network.status().await.unwrap_err().to_string();
        assert!(error.contains("pool is empty (code 50)"), "{error}");

        // 1.0.0 knows neither.
        node.configure(&NEW.replace("1.1.0", "1.0.0"));
        calls(&node);
        node.network.status().await.unwrap();
        node.network.gc(Vec::new()).unwrap().await.unwrap();
        node.configure(&NEW.replace("\"name\"", "\"disableGC\":true,\"name\""));
        node.network.gc(Vec::new()).unwrap().await.unwrap();
        assert_eq!(calls(&node), Vec::<String>::new());
    });
}

#[test]
fn nothing_is_left_of_a_plugin_that_hangs() {
    let Some(node) = Node::new(NEW) else { return };
    node.plugin("first", "echo $$ > $DIR/pid; sleep 1000 & wait");
    node.plugin("second", "true");
    run(async {
        let plan = node.network.plan(&request("pod1")).await.unwrap();
        let setup = tokio::time::timeout(Duration::from_millis(500), node.network.setup(plan));
        setup.await.unwrap_err();
    });
    let pid = fs::read_to_string(node.dir.path().join("pid")).unwrap();
    let left = sh(&format!("ps -o pid= -g {} || true", pid.trim()));
    assert_eq!(left.trim(), "");
    sh(&format!(
        "umount {0}/netns/*; rm {0}/netns/*",
        node.dir.path().display()
    ));
}

/// Runs `work` on one thread that has one more for what blocks, which is busy until `free` is sent to.
fn with_busy_pool<T>(work: impl AsyncFnOnce(mpsc::Sender<()>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(async {
        let (free, freed) = mpsc::channel();
        tokio::task::spawn_blocking(move || freed.recv());
        work(free).await
    })
}

#[test]
fn namespaces_are_made_and_removed_beside_the_tasks() {
    let Some(node) = chain() else { return };
    let moment = Duration::from_millis(200);
    let plan = run(node.network.plan(&request("pod1"))).unwrap();
    let netns = plan.netns.clone();
    let pod = with_busy_pool(async |free| {
        let setup = node.network.setup(plan);
        tokio::pin!(setup);
        tokio::time::timeout(moment, &mut setup).await.unwrap_err();
        assert!(!netns.exists());
        free.send(()).unwrap();
        setup.await.unwrap()
    });
    assert!(netns.exists());
    with_busy_pool(async |free| {
        let teardown = node.network.teardown(&pod.record);
        tokio::pin!(teardown);
        tokio::time::timeout(moment, &mut teardown)
            .await
            .unwrap_err();
        // No plugin was started either.
        assert_eq!(calls(&node), ["ADD first", "ADD second"]);
        free.send(()).unwrap();
        teardown.await.unwrap();
    });
    node.assert_nothing_left();
}

/// Has `work` read a file that is not there yet, on a runtime of one thread whose other task brings it:
/// a file of a slow disk. Its result, if that task could run.
fn with_slow_file<T: Send + 'static>(
    file: &Path,
    text: &'static str,
    work: impl AsyncFnOnce() -> T + Send + 'static,
) -> T {
    mkfifo(file, Mode::S_IRWXU).unwrap();
    let (sender, receiver) = mpsc::channel();
    let path = file.to_owned();
    thread::spawn(move || {
        let bring = async {
            let mut options = fs::OpenOptions::new();
            options.write(true).custom_flags(nix::libc::O_NONBLOCK);
            // Until it has a reader it can't be opened.
            let mut pipe = loop {
                match options.open(&path) {
                    Ok(pipe) => break pipe,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            };
            pipe.write_all(text.as_bytes()).unwrap();
        };
        let done = run(async { tokio::join!(work(), bring) });
        sender.send(done.0)
    });
    let done = receiver.recv_timeout(Duration::from_secs(20));
    done.expect("reading a file holds up the other task")
}

#[test]
fn a_slow_disk_holds_up_no_other_task() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("net.d")).unwrap();
    fs::create_dir(at("cache")).unwrap();
    let network = Network::new(NetworkConfig {
        conf_dir: at("net.d"),
        bin_dirs: vec![at("bin")],
        netns_dir: at("netns"),
        cache_dir: at("cache"),
        foreign_cache_dir: at("foreign"),
        plugin_timeout: Duration::from_secs(20),
    });
    let other = network.clone();
    let status = with_slow_file(&at("net.d/a.conflist"), "{", async move || {
        other.status().await
    });
    assert!(matches!(status, Err(NetworkError::Cni(_))), "{status:?}");
    let removed = with_slow_file(&at("cache/pod1.json"), "{", async move || {
        network.remove_orphan("pod1").await
    });
    removed.unwrap();
}
