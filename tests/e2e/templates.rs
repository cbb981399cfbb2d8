//! Pods whose VMs are clones of one that was booted.

use std::{
    collections::HashSet,
    time::{Duration, Instant, UNIX_EPOCH},
};

use hull_proto_cri::v1::{PodSandboxStatusRequest, StatusRequest};
use serde_json::Value;

use crate::harness::{Node, PATIENCE, Pod};

/// What the kernel chose for a process and for the guest, a line each: bytes that it gives to all, two ids, the
/// bytes that it starts a program with and where it puts its stack, and readings of the clock.
const CHOSEN: &str = "\
    head -c 4096 /dev/urandom | od -An -v -tx8 | tr -d '\\n'; echo
    cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid
    grep -h stack /proc/self/maps | cut -d ' ' -f 1
    hostname
    for i in $(seq 20); do adjtimex; done
    echo end
    exec sleep 1000";

/// What a reading says of the clock's unit (adjtimex(2), `STA_NANO`).
const NANOSECONDS: i128 = 0x2000;
/// Nanoseconds that a guest's clock may be ahead of the host's.
const AHEAD: i128 = 10_000_000;
/// How long a line may take from the guest's clock to the log in an emulated host, at best.
const ARRIVAL: i128 = 250_000_000;
const MINUTE: i128 = 60_000_000_000;

/// What a pod's verbose status tells.
pub async fn info(node: &Node, pod: &Pod) -> Value {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let mut runtime = node.client.runtime.clone();
    let answer = runtime.pod_sandbox_status(request).await.unwrap();
    serde_json::from_str(&answer.into_inner().info["info"]).unwrap()
}

async fn is_clone(node: &Node, pod: &Pod) -> bool {
    info(node, pod).await["cloned"].as_bool().unwrap()
}

pub async fn templates(node: &Node) -> Value {
    let mut runtime = node.client.runtime.clone();
    let status = runtime.status(StatusRequest { verbose: true }).await;
    let info: Value = serde_json::from_str(&status.unwrap().into_inner().info["info"]).unwrap();
    info["templates"].clone()
}

/// The lines of a container's log, with the host's time of each: nanoseconds of its minute.
fn timed_log(node: &Node, name: &str) -> Vec<(i128, String)> {
    let text = std::fs::read_to_string(node.dir.join(format!("logs/{name}.log"))).unwrap();
    let line = |line: &str| {
        let mut parts = line.splitn(4, ' ');
        // 2026-11-26T10:20:30.123456789Z
        let time = parts.next().unwrap();
        let seconds: i128 = time[17..19].parse().unwrap();
        let nanos: i128 = time[20..29].parse().unwrap();
        let text = parts.nth(2).unwrap().to_owned();
        (seconds * 1_000_000_000 + nanos, text)
    };
    // The last line may not be there as a whole yet.
    let lines = text.split_inclusive('\n');
    lines
        .filter_map(|l| l.strip_suffix('\n'))
        .map(line)
        .collect()
}

/// Readings of a guest's clock, each with the host's time: what `adjtimex` says of its state, seconds, and parts
/// of one.
fn readings(lines: &[(i128, String)]) -> Vec<(i128, i128)> {
    let number = |line: &str, name: &str| {
        let (_, value) = line.split_once(name)?;
        value.split_whitespace().next()?.parse::<i128>().ok()
    };
    let (mut status, mut seconds) = (0, 0);
    let reading = |(host, line): &(i128, String)| {
        status = number(line, "status:").unwrap_or(status);
        seconds = number(line, "time.tv_sec:").unwrap_or(seconds);
        let part = number(line, "time.tv_usec:")?;
        let unit = if status & NANOSECONDS == 0 { 1000 } else { 1 };
        Some((*host, seconds * 1_000_000_000 + part * unit))
    };
    lines.iter().filter_map(reading).collect()
}

/// By how much a time of the guest's is behind one of the host's, of which only the place in its minute is
/// known, nanoseconds.
fn behind(host: i128, guest: i128) -> i128 {
    (host - guest + MINUTE / 2).rem_euclid(MINUTE) - MINUTE / 2
}

#[tokio::test]
async fn clones_share_nothing_that_tells_a_guest_from_another() {
    let mut node = Node::start_with(|text| text + "[vm]\ntemplate = true\n").await;
    let first = node.pod("first").await;
    assert!(!is_clone(&node, &first).await);
    let begun = Instant::now();
    while templates(&node).await["ready"] != 1 {
        assert!(begun.elapsed() < PATIENCE, "{}", templates(&node).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    node.stop_sandbox(&first.id).await.unwrap();
    node.remove_sandbox(&first.id).await.unwrap();

    let mut pods = Vec::new();
    let mut seen = HashSet::new();
    for name in ["one", "two"] {
        let mut config = node.sandbox(name);
        config.hostname = format!("host-{name}");
        let pod = node.run_sandbox(config).await.unwrap();
        assert!(is_clone(&node, &pod).await, "{}", templates(&node).await);
        let id = node.run_script(&pod, name, CHOSEN).await;
        let begun = Instant::now();
        let lines = loop {
            let lines = timed_log(&node, name);
            if lines.last().is_some_and(|(_, line)| line == "end") {
                break lines;
            }
            assert!(begun.elapsed() < PATIENCE, "{lines:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        for (_, line) in &lines[..4] {
            for word in line.split_whitespace() {
                assert!(seen.insert(word.to_owned()), "{name} has {word} too");
            }
        }
        assert_eq!(lines[4].1, format!("host-{name}"));
        let readings = readings(&lines[5..]);
        assert_eq!(readings.len(), 20);
        let off = readings.iter().map(|(host, guest)| behind(*host, *guest));
        let off = off.min().unwrap();
        assert!((-AHEAD..ARRIVAL).contains(&off), "{off} ns behind the host");
        let now = UNIX_EPOCH.elapsed().unwrap().as_nanos() as i128;
        let (_, last) = readings[19];
        assert!((now - last).abs() < MINUTE / 2, "{last} at {now}");
        pods.push((pod, id));
    }
    // As many words as there are.
    assert_eq!(seen.len(), 2 * (512 + 3));

    // Clones outlive their template, which is the daemon's.
    node.client = node.daemon.kill_and_restart().await;
    assert_eq!(templates(&node).await["ready"], 0);
    let gateway = "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'";
    for (pod, id) in pods {
        let ip = node.pod_status(&pod.id).await.unwrap().network.unwrap().ip;
        let script = format!("ip -4 addr show eth0; ping -c 1 -W 60 $({gateway}) >&2");
        let answer = node.exec(&id, &script).await;
        assert_eq!(answer.exit_code, 0, "{answer:?}");
        assert!(String::from_utf8(answer.stdout).unwrap().contains(&ip));
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}
