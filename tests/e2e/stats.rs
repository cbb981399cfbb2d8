//! What containers and pods use, by CRI's statistics and by metrics.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
    time::Duration,
};

use hull_proto_cri::v1::{
    ContainerStats, ContainerStatsRequest, LinuxContainerConfig, LinuxContainerResources,
    LinuxPodSandboxConfig, LinuxPodSandboxStats, ListContainerStatsRequest,
    ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest, ListPodSandboxStatsRequest,
    PodSandboxMetrics, PodSandboxStatsRequest, StatusRequest, UInt64Value,
};
use tonic::{Code, Status};

use crate::harness::{Node, Pod};

async fn container(node: &Node, id: &str) -> Result<ContainerStats, Status> {
    let request = ContainerStatsRequest {
        container_id: id.into(),
    };
    let answer = node.client.runtime.clone().container_stats(request).await?;
    Ok(answer.into_inner().stats.unwrap())
}

async fn listed(node: &Node) -> BTreeSet<String> {
    let request = ListContainerStatsRequest::default();
    let answer = node
        .client
        .runtime
        .clone()
        .list_container_stats(request)
        .await;
    let stats = answer.unwrap().into_inner().stats;
    stats
        .into_iter()
        .map(|s| s.attributes.unwrap().id)
        .collect()
}

async fn sandbox(node: &Node, pod: &Pod) -> Result<LinuxPodSandboxStats, Status> {
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let answer = node
        .client
        .runtime
        .clone()
        .pod_sandbox_stats(request)
        .await?;
    Ok(answer.into_inner().stats.unwrap().linux.unwrap())
}

fn number(value: Option<UInt64Value>) -> u64 {
    value.unwrap().value
}

fn cpu(stats: &ContainerStats) -> u64 {
    number(stats.cpu.as_ref().unwrap().usage_core_nano_seconds)
}

fn memory(stats: &ContainerStats) -> u64 {
    number(stats.memory.as_ref().unwrap().working_set_bytes)
}

fn disk(stats: &ContainerStats) -> (u64, u64) {
    let layer = stats.writable_layer.as_ref().unwrap();
    (number(layer.used_bytes), number(layer.inodes_used))
}

/// Asks until an answer is as wanted: disks are measured now and then.
async fn eventually(node: &Node, id: &str, wanted: impl Fn(&ContainerStats) -> bool) {
    let mut last = None;
    for _ in 0..100 {
        let stats = container(node, id).await.unwrap();
        if wanted(&stats) {
            return;
        }
        last = Some(stats);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("not reached: {last:?}");
}

#[tokio::test]
async fn what_a_container_does_is_counted() {
    let node = Node::start().await;
    let pod = node.pod("work").await;
    let mut config = node.script("main", "sleep 100000");
    config.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let before = container(&node, &id).await.unwrap();
    let pod_before = sandbox(&node, &pod).await.unwrap();
    let attributes = before.attributes.as_ref().unwrap();
    assert_eq!(attributes.id, id);
    assert_eq!(attributes.metadata.as_ref().unwrap().name, "main");
    for psi in [
        before.cpu.as_ref().unwrap().psi.as_ref(),
        before.memory.as_ref().unwrap().psi.as_ref(),
        before.io.as_ref().unwrap().psi.as_ref(),
    ] {
        assert!(psi.unwrap().some.is_some() && psi.unwrap().full.is_some());
    }
    let available = number(before.memory.as_ref().unwrap().available_bytes);
    assert!(available < 64 << 20 && available > 32 << 20, "{available}");

    // CPU.
    let burn = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
    node.exec(&id, burn).await;
    let burnt = container(&node, &id).await.unwrap();
    assert!(
        cpu(&burnt) > cpu(&before) + 10_000_000,
        "{before:?} {burnt:?}"
    );
    let at = |stats: &ContainerStats| stats.cpu.as_ref().unwrap().timestamp;
    assert!(at(&burnt) > at(&before) && at(&before) > 0);
    eventually(&node, &id, |stats| {
        stats.cpu.as_ref().unwrap().usage_nano_cores.is_some()
    })
    .await;

    // Memory: files in the pod's shared memory belong to who wrote them.
    node.exec(&id, "dd if=/dev/zero of=/dev/shm/x bs=1M count=16")
        .await;
    let full = container(&node, &id).await.unwrap();
    assert!(
        memory(&full) > memory(&before) + (12 << 20),
        "{before:?} {full:?}"
    );
    node.exec(&id, "rm /dev/shm/x").await;
    let freed = container(&node, &id).await.unwrap();
    assert!(memory(&freed) + (12 << 20) < memory(&full));

    // Disk.
    let (bytes, inodes) = disk(&container(&node, &id).await.unwrap());
    let write =
        "mkdir /d; for i in 1 2 3 4 5; do dd if=/dev/zero of=/d/$i bs=1M count=1; done; sync";
    node.exec(&id, write).await;
    eventually(&node, &id, |stats| {
        disk(stats).0 >= bytes + (5 << 20) && disk(stats).1 == inodes + 6
    })
    .await;
    node.exec(&id, "rm -r /d").await;
    eventually(&node, &id, |stats| disk(stats) == (bytes, inodes)).await;

    // Network: to the bridge, which answers.
    let ping = node.exec(&id, "ping -c 3 -s 1000 10.86.0.1").await;
    assert_eq!(ping.exit_code, 0, "{ping:?}");
    let after = sandbox(&node, &pod).await.unwrap();
    let traffic = |stats: &LinuxPodSandboxStats| {
        let network = stats.network.as_ref().unwrap();
        let eth0 = network.default_interface.as_ref().unwrap();
        assert_eq!(eth0.name, "eth0");
        (number(eth0.rx_bytes), number(eth0.tx_bytes))
    };
    assert!(traffic(&after).0 >= traffic(&pod_before).0 + 3000);
    assert!(traffic(&after).1 >= traffic(&pod_before).1 + 3000);

    // The pod is the whole VM on the host: more than its container.
    let host_cpu = number(after.cpu.as_ref().unwrap().usage_core_nano_seconds);
    let host_memory = number(after.memory.as_ref().unwrap().working_set_bytes);
    let now = container(&node, &id).await.unwrap();
    assert!(host_cpu > number(pod_before.cpu.unwrap().usage_core_nano_seconds));
    assert!(host_memory > memory(&now), "{host_memory} {now:?}");
    assert!(number(after.process.unwrap().process_count) >= 1);
    assert_eq!(after.containers.len(), 1);

    // What ended keeps its CPU time, and uses nothing.
    let last = cpu(&container(&node, &id).await.unwrap());
    node.stop_container(&id, 0).await.unwrap();
    let stopped = container(&node, &id).await.unwrap();
    assert!(cpu(&stopped) >= last);
    assert_eq!(memory(&stopped), 0);
    assert_eq!(number(stopped.cpu.unwrap().usage_nano_cores), 0);
    node.stop_sandbox(&pod.id).await.unwrap();
    assert!(sandbox(&node, &pod).await.is_err());
    node.remove_sandbox(&pod.id).await.unwrap();
    let gone = sandbox(&node, &pod).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert_eq!(
        container(&node, &id).await.unwrap_err().code(),
        Code::NotFound
    );
    node.finish().await;
}

#[tokio::test]
async fn a_frozen_guest_does_not_hold_up_the_others() {
    let node = Node::start().await;
    let (frozen, well) = (node.pod("frozen").await, node.pod("well").await);
    let a = node.run_script(&frozen, "a", "sleep 1000").await;
    let vmm = node.vmms();
    let b = node.run_script(&well, "b", "sleep 1000").await;
    assert_eq!(listed(&node).await, BTreeSet::from([a.clone(), b.clone()]));
    let vmm = vmm.into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains(&frozen.id))
    });
    let vmm = vmm.unwrap().to_string();
    let signal = |name: &str| {
        assert!(
            Command::new("kill")
                .args([name, &vmm])
                .status()
                .unwrap()
                .success()
        )
    };
    signal("-STOP");
    for _ in 0..2 {
        assert_eq!(listed(&node).await, BTreeSet::from([b.clone()]));
    }
    let refused = container(&node, &a).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    // The host knows what it costs all the same.
    let request = ListPodSandboxStatsRequest::default();
    let all = node
        .client
        .runtime
        .clone()
        .list_pod_sandbox_stats(request)
        .await
        .unwrap();
    let all = all.into_inner().stats;
    assert_eq!(all.len(), 2);
    for stats in all {
        let linux = stats.linux.unwrap();
        assert!(number(linux.memory.unwrap().working_set_bytes) > 0);
        let is_frozen = stats.attributes.unwrap().id == frozen.id;
        assert_eq!(linux.containers.is_empty(), is_frozen);
        assert_eq!(linux.network.is_none(), is_frozen);
    }
    signal("-CONT");
    let mut both = false;
    for _ in 0..150 {
        both = listed(&node).await.len() == 2;
        if both {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(both, "the guest is asked again");

    // One that dies is as one that is gone.
    signal("-KILL");
    node.client
        .wait_exited(&a, Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(memory(&container(&node, &a).await.unwrap()), 0);
    for pod in [&frozen, &well] {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}

/// Values by name and labels.
fn series(metrics: &PodSandboxMetrics, container: &str) -> BTreeMap<String, u64> {
    let of = metrics
        .container_metrics
        .iter()
        .find(|c| c.container_id == container);
    let all = of.unwrap().metrics.iter();
    all.map(|m| {
        let labels = m.label_values[6..].join(",");
        (
            format!("{} {labels}", m.name).trim().to_owned(),
            m.value.unwrap().value,
        )
    })
    .collect()
}

#[tokio::test]
async fn every_metric_that_is_described_has_values() {
    let node = Node::start().await;
    let pod = node.pod("metrics").await;
    let mut config = node.script("main", "sleep 1000");
    config.linux = Some(LinuxContainerConfig {
        resources: Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 20_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; \
                dd if=/dev/zero of=/x bs=1M count=2; sync";
    node.exec(&id, work).await;

    let mut runtime = node.client.runtime.clone();
    let request = ListMetricDescriptorsRequest {};
    let described = runtime.list_metric_descriptors(request).await.unwrap();
    let described = described.into_inner().descriptors;
    assert_eq!(described.len(), 56);
    let request = ListPodSandboxMetricsRequest {};
    let metrics = runtime.list_pod_sandbox_metrics(request).await.unwrap();
    let mut metrics = metrics.into_inner().pod_metrics;
    assert_eq!(metrics.len(), 1);
    let metrics = metrics.remove(0);
    assert_eq!(metrics.pod_sandbox_id, pod.id);
    for descriptor in &described {
        let of_containers = metrics.container_metrics.iter().flat_map(|c| &c.metrics);
        let mut all = metrics.metrics.iter().chain(of_containers);
        let one = all.find(|m| m.name == descriptor.name);
        let one = one.unwrap_or_else(|| panic!("no {}", descriptor.name));
        assert_eq!(one.label_values.len(), descriptor.label_keys.len());
        assert_eq!(one.label_values[3..5], ["e2e", "metrics"]);
    }
    let values = series(&metrics, &id);
    assert_eq!(values["container_spec_cpu_quota"], 20_000);
    assert_eq!(values["container_spec_memory_limit_bytes"], 64 << 20);
    assert_eq!(values["container_processes"], 1);
    assert!(
        values["container_cpu_cfs_throttled_periods_total"] > 0,
        "{values:#?}"
    );
    assert!(
        values["container_fs_usage_bytes scratch"] >= 2 << 20,
        "{values:#?}"
    );
    assert!(values["container_ulimits_soft max_open_files"] > 0);
    assert!(values["container_memory_failures_total pgfault,container"] > 0);
    let written = values
        .iter()
        .filter(|(name, _)| name.starts_with("container_fs_writes_bytes_total"));
    assert!(
        written.map(|(_, bytes)| bytes).sum::<u64>() >= 2 << 20,
        "{values:#?}"
    );
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_vm_is_accounted_below_the_parent_that_its_pod_names() {
    let mut node = Node::start().await;
    let root = std::path::Path::new("/sys/fs/cgroup");
    let mut config = node.sandbox("parent");
    config.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent: "hulltest-besteffort-pod1.slice".into(),
        ..Default::default()
    });
    node.client.pull(crate::harness::BUSYBOX).await.unwrap();
    let pod = node.run_sandbox(config).await.unwrap();
    let parent = "hulltest.slice/hulltest-besteffort.slice/hulltest-besteffort-pod1.slice";
    let cgroup = root.join(parent).join(format!("hull-{}", pod.id));
    let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    assert_eq!(inside.trim(), node.vmms()[0].to_string());
    // All its threads, so its vCPUs, are there, and what they use is counted there.
    let stat = fs::read_to_string(cgroup.join("cpu.stat")).unwrap();
    let usage = stat
        .lines()
        .find_map(|l| l.strip_prefix("usage_usec "))
        .unwrap();
    let told = sandbox(&node, &pod).await.unwrap();
    let told = number(told.cpu.unwrap().usage_core_nano_seconds);
    assert!(told >= usage.parse::<u64>().unwrap() * 1000);
    assert!(cgroup.join("memory.current").exists());

    let other = node.run_sandbox(node.sandbox("default")).await.unwrap();
    let default = root.join("hull").join(&other.id);
    assert!(default.join("cgroup.procs").exists());
    let mut outside = node.sandbox("outside");
    outside.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent: "/../elsewhere".into(),
        ..Default::default()
    });
    let refused = node
        .run_sandbox(outside)
        .await
        .map(|pod| pod.id)
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("cgroup_parent"), "{refused}");

    // The next daemon knows what there is to remove.
    node.client = node.daemon.kill_and_restart().await;
    for pod in [&pod, &other] {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    assert!(!root.join("hulltest.slice").exists() && !default.exists());
    node.finish().await;
}

#[tokio::test]
async fn the_nodes_conditions_follow_reality() {
    let links = tempfile::tempdir().unwrap();
    let dir = links.path().to_owned();
    let node = Node::start_with(|text| {
        let mut file: Vec<String> = text.lines().map(str::to_owned).collect();
        let line = file
            .iter_mut()
            .find(|line| line.starts_with("assets"))
            .unwrap();
        let assets = line.split(['"', '\'']).nth(1).unwrap().to_owned();
        for name in ["hull-vmm", "vmlinux", "root.erofs"] {
            let target = std::path::Path::new(&assets).join(name);
            std::os::unix::fs::symlink(target, dir.join(name)).unwrap();
        }
        *line = format!("assets = {:?}", dir.to_str().unwrap());
        file.join("\n")
    })
    .await;
    let conditions = async || {
        let status = node
            .client
            .runtime
            .clone()
            .status(StatusRequest { verbose: true })
            .await;
        let status = status.unwrap().into_inner();
        assert!(status.info["info"].contains("cgroupDriver"));
        let conditions = status.status.unwrap().conditions;
        conditions.into_iter().map(|c| c.status).collect::<Vec<_>>()
    };
    assert_eq!(conditions().await, [true, true]);
    let (kernel, aside) = (dir.join("vmlinux"), dir.join("aside"));
    fs::rename(&kernel, &aside).unwrap();
    assert_eq!(conditions().await, [false, true]);
    fs::rename(&aside, &kernel).unwrap();
    let network = node.dir.join("net.d/10-test.conflist");
    fs::rename(&network, &aside).unwrap();
    assert_eq!(conditions().await, [true, false]);
    fs::rename(&aside, &network).unwrap();
    assert_eq!(conditions().await, [true, true]);
    node.finish().await;
}
