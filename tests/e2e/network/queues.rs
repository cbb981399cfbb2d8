//! Pods with more than one vCPU: their cards have as many pairs of queues.

use hull_proto_cri::v1::{LinuxContainerResources, LinuxPodSandboxConfig};

use super::*;

/// Flows in each direction, and bytes in each.
const FLOWS: usize = 4;
const BYTES: usize = 1 << 18;
/// The ports of flows into the pod, and of those out of it.
const INTO: usize = 9100;
const OUT_OF: usize = 9200;

/// Sends a file of random bytes over each flow to `address`.
fn send(address: &str, first_port: usize) -> String {
    format!(
        "i=0; while [ $i -lt {FLOWS} ]; do f=$DIR/sent.$i; head -c {BYTES} /dev/urandom >$f
         timeout 100 socat -u OPEN:$f TCP:{address}:$(({first_port} + i)),retry=200,interval=0.2 & i=$((i + 1)); done; wait
         cd $DIR; md5sum sent.* | sed s/sent//"
    )
}

/// Receives what [`send`] sends. Ends when all of it has come.
fn receive(first_port: usize) -> String {
    format!(
        "i=0; while [ $i -lt {FLOWS} ]; do
         timeout 100 socat -u TCP4-LISTEN:$(({first_port} + i)),reuseaddr CREATE:$DIR/got.$i & i=$((i + 1)); done; wait
         cd $DIR; md5sum got.* | sed s/got//"
    )
}

async fn on_host(script: String) -> String {
    tokio::task::spawn_blocking(move || host(&script))
        .await
        .unwrap()
}

/// Shows how many packets an interface sent by each of its first two queues, as its queueing
/// discipline counts.
fn sent_by_queue(interface: &str) -> String {
    format!(
        "tc -s class show dev {interface} | sed -nE 's/^ Sent .* bytes ([0-9]+) pkt.*/\\1/p' | head -n 2"
    )
}

#[tokio::test]
async fn the_card_of_a_pod_with_two_cpus_has_two_pairs_of_queues() {
    let _undo = Undo(
        "ip link del hull-e2e1; rm -rf /tmp/hull-e2e-flows; \
         iptables -t nat -S POSTROUTING | grep 10.81.0. && iptables -t nat -F POSTROUTING",
    );
    let node = Node::start().await;
    node.configure_network(DUAL);
    node.client.pull(NETWORK_TOOLS).await.unwrap();
    let mut config = node.sandbox("pairs");
    config.linux = Some(LinuxPodSandboxConfig {
        resources: Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 200_000,
            ..Default::default()
        }),
        ..config.linux.unwrap_or_default()
    });
    let pod = node.run_sandbox(config).await.unwrap();
    let pod = Tools::run(&node, pod).await;
    // A VM has no more vCPUs than the host has CPUs.
    let pairs = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2));
    let queues = "cd /sys/class/net/eth0/queues; echo $(ls)";
    let expected = ["rx-0 tx-0\n", "rx-0 rx-1 tx-0 tx-1\n"];
    assert_eq!(pod.sh("nproc").await, format!("{pairs}\n"));
    assert_eq!(pod.sh(queues).await, expected[pairs - 1]);
    let netns = node.netns(&pod.pod);
    let tap = format!("nsenter --net={} ip -d link show hulltap0", netns.display());
    let has_queues = || host(&tap).contains("multi_queue numqueues 2");
    assert_eq!(has_queues(), pairs == 2);

    // What many flows carry at the same time arrives as it was sent.
    let ip = pod.ips[0].to_string();
    let work = |script: &str, dir: &str| format!("DIR={dir}; mkdir -p $DIR; {script}");
    let (ours, theirs) = ("/tmp/hull-e2e-flows", "/dev/shm/flows");
    let (sent_in, got_in, sent_out, got_out) = tokio::join!(
        on_host(work(&send(&ip, INTO), ours)),
        async { pod.sh(&work(&receive(INTO), theirs)).await },
        async { pod.sh(&work(&send("10.81.0.1", OUT_OF), theirs)).await },
        on_host(work(&receive(OUT_OF), ours)),
    );
    assert_eq!(sent_in.lines().count(), FLOWS);
    assert_eq!((sent_in, sent_out), (got_in, got_out));

    if pairs == 2 {
        // Each queue has its share of flows, which are as many as it takes for that.
        pod.sh(SERVE).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let into = format!(
                "nsenter --net={} {}",
                netns.display(),
                sent_by_queue("hulltap0")
            );
            let counts = [host(&into), pod.sh(&sent_by_queue("eth0")).await];
            let mut queues = counts.iter().flat_map(|counts| counts.lines());
            if queues.clone().count() == 4 && queues.all(|count| count.parse::<u64>().unwrap() > 10)
            {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{counts:?} {}",
                pod.sh("tc -s qdisc; tc -s class show dev eth0; ethtool -S eth0")
                    .await
            );
            on_host(ask(&format!("{ip}:8080"))).await;
        }
        // The driver may use fewer, and all again.
        for (count, expected) in [(1, expected[0]), (2, expected[1])] {
            pod.sh(&format!("ethtool -L eth0 combined {count}")).await;
            assert_eq!(pod.sh(queues).await, expected);
            for _ in 0..8 {
                let from = on_host(ask(&format!("{ip}:8080"))).await;
                assert_eq!(from, "10.81.0.1\n");
            }
        }
        let refused = node
            .exec(&pod.container, "ethtool -L eth0 combined 3")
            .await;
        assert_ne!(refused.exit_code, 0);
    } else {
        println!(
            "SKIPPED: two pairs of queues in a pod: this host has one CPU; vmm/linux has them in a guest"
        );
    }
    pod.end().await;
    node.finish().await;
}
