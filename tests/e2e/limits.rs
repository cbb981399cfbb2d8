//! Limits of containers and pods, changed while they run.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ContainerConfig, HugepageLimit, LinuxContainerConfig, LinuxContainerResources,
    LinuxPodSandboxConfig, NetworkConfig, RuntimeConfig, UpdateContainerResourcesRequest,
    UpdatePodSandboxResourcesRequest, UpdateRuntimeConfigRequest,
};
use tonic::{Code, Status};

use crate::{
    harness::{BUSYBOX, Node, Pod},
    templates::{info, templates},
    volumes::{HostDir, mount},
};

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: i64 = 1 << 20;

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

async fn update(node: &Node, id: &str, linux: LinuxContainerResources) -> Result<(), Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: Some(linux),
        ..Default::default()
    };
    let mut runtime = node.client.runtime.clone();
    runtime.update_container_resources(request).await.map(drop)
}

async fn told(node: &Node, id: &str) -> LinuxContainerResources {
    let status = node.client.container_status(id).await.unwrap();
    status.resources.unwrap().linux.unwrap()
}

fn memory(mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    }
}

#[tokio::test]
async fn limits_of_a_container_change_in_every_state() {
    let mut node = Node::start().await;
    let pod = node.pod("limits").await;
    let asked = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 * MIB,
        memory_swap_limit_in_bytes: 64 * MIB,
        oom_score_adj: 100,
        cpuset_cpus: "0".into(),
        cpuset_mems: "0".into(),
        // As kubelet does: every size of the node is forbidden.
        hugepage_limits: ["2MB", "1GB", "64KB"]
            .map(|page_size| HugepageLimit {
                page_size: page_size.into(),
                limit: 0,
            })
            .to_vec(),
        unified: [("pids.max".to_owned(), "40".to_owned())].into(),
    };
    let config = ContainerConfig {
        linux: Some(LinuxContainerConfig {
            resources: Some(asked.clone()),
            security_context: None,
        }),
        ..node.script("main", "sleep 1000")
    };
    let id = node.create(&pod, config).await.unwrap();
    assert_eq!(told(&node, &id).await.memory_limit_in_bytes, 64 * MIB);
    update(&node, &id, memory(48)).await.unwrap();
    node.start_container(&id).await.unwrap();
    let files = async |node: &Node| {
        let show = "cd /sys/fs/cgroup; cat cpu.max memory.max memory.swap.max pids.max; \
                    cat cpuset.cpus /proc/$(pidof sleep)/oom_score_adj";
        String::from_utf8(node.exec(&id, show).await.stdout).unwrap()
    };
    let expected = format!("50000 100000\n{}\n0\n40\n0\n100\n", 48 * MIB);
    assert_eq!(files(&node).await, expected);

    let more = LinuxContainerResources {
        cpu_quota: 80_000,
        oom_score_adj: 200,
        unified: [("pids.max".to_owned(), "50".to_owned())].into(),
        ..memory(32)
    };
    update(&node, &id, more).await.unwrap();
    let expected = format!("80000 100000\n{}\n0\n50\n0\n200\n", 32 * MIB);
    assert_eq!(files(&node).await, expected);
    let now = told(&node, &id).await;
    assert_eq!(
        (now.cpu_quota, now.cpu_shares, now.oom_score_adj),
        (80_000, 512, 200)
    );
    assert_eq!(now.memory_swap_limit_in_bytes, 32 * MIB);

    // What the VM does not have is refused by name, and nothing changes.
    let cpuset = LinuxContainerResources {
        cpuset_cpus: "0-63".into(),
        ..memory(16)
    };
    for (wrong, code, field) in [
        (
            memory(1 << 20),
            Code::FailedPrecondition,
            "memory_limit_in_bytes",
        ),
        (cpuset, Code::FailedPrecondition, "cpuset_cpus"),
        (memory(-5), Code::InvalidArgument, "memory_limit_in_bytes"),
    ] {
        let error = update(&node, &id, wrong).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(field), "{error}");
    }
    assert_eq!(files(&node).await, expected);

    node.client = node.daemon.kill_and_restart().await;
    assert_eq!(told(&node, &id).await, now);
    assert_eq!(files(&node).await, expected);
    node.stop_container(&id, 0).await.unwrap();
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    update(&node, &id, memory(24)).await.unwrap();
    assert_eq!(told(&node, &id).await.memory_limit_in_bytes, 24 * MIB);
    node.remove_container(&id).await.unwrap();
    let gone = update(&node, &id, memory(24)).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
    end(node, &pod).await;
}

/// A pod's cgroup as kubelet makes it; removed when dropped.
struct PodCgroup(PathBuf);

impl PodCgroup {
    fn new(name: &str, mib: i64) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
        fs::create_dir(root.join(name)).unwrap();
        let cgroup = Self(root.join(name));
        cgroup.limit(mib);
        cgroup
    }

    fn limit(&self, mib: i64) {
        fs::write(self.0.join("memory.max"), (mib * MIB).to_string()).unwrap();
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[tokio::test]
async fn a_pod_takes_the_sizes_that_its_cgroup_and_its_vm_have() {
    let node = Node::start().await;
    let cgroup = PodCgroup::new("hulltest-sizes", 160);
    let dir = HostDir::new(&node, "data");
    let large = fs::File::create(dir.path("large")).unwrap();
    large.set_len(250 << 20).unwrap();
    node.client.pull(BUSYBOX).await.unwrap();
    let mut config = node.sandbox("sizes");
    config.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent: "/hulltest-sizes".into(),
        resources: Some(memory(160)),
        ..Default::default()
    });
    let pod = node.run_sandbox(config).await.unwrap();
    let mut config = node.script("main", "sleep 1000");
    config.mounts = vec![mount("/data", &dir.0)];
    config.linux = Some(LinuxContainerConfig {
        resources: Some(memory(160)),
        security_context: None,
    });
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let total = async || {
        let told = node.exec(&id, "grep MemTotal /proc/meminfo").await.stdout;
        let told = String::from_utf8(told).unwrap();
        let mut numbers = told.split_whitespace().filter_map(|word| word.parse().ok());
        numbers.next().map(|kib: i64| kib / 1024).unwrap()
    };
    // A container that fills its memory, with files or with what it is killed for, is no reason for the host to
    // kill the VMM: the guest has no more than fits beside that.
    let full = "cat /data/large /data/large > /dev/null; exec tail /dev/zero";
    assert_eq!(node.exec(&id, full).await.exit_code, 137);
    let before = total().await;
    let events = fs::read_to_string(cgroup.0.join("memory.events")).unwrap();
    assert!(events.contains("oom_kill 0\n"), "{events}");

    let mut runtime = node.client.runtime.clone();
    let request = |mib| UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(memory(mib)),
    };
    let resized = runtime.update_pod_sandbox_resources(request(64)).await;
    resized.unwrap();
    cgroup.limit(224);
    let resized = runtime.update_pod_sandbox_resources(request(224)).await;
    resized.unwrap();
    let start = Instant::now();
    while total().await < before + 60 {
        assert!(start.elapsed() < PATIENCE, "it has {}", total().await);
    }
    update(&node, &id, memory(224)).await.unwrap();
    let used = node
        .exec(&id, "dd if=/dev/zero of=/dev/null bs=120M count=1")
        .await;
    assert_eq!(used.exit_code, 0, "{used:?}");
    cgroup.limit(1_000_000);
    let larger = runtime.update_pod_sandbox_resources(request(100_000)).await;
    let larger = larger.unwrap_err();
    assert_eq!(larger.code(), Code::FailedPrecondition, "{larger}");
    assert!(larger.message().contains("MiB"), "{larger}");

    // Without an overhead, small limits leave a VM no room: it is beside the cgroup then, and its container has all
    // that it may have.
    let small = PodCgroup::new("hulltest-small", 40);
    let mut config = node.sandbox("small");
    config.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent: "/hulltest-small".into(),
        resources: Some(memory(40)),
        ..Default::default()
    });
    let beside = node.run_sandbox(config).await.unwrap();
    let mut config = node.script("main", "sleep 1000");
    config.linux = Some(LinuxContainerConfig {
        resources: Some(memory(40)),
        security_context: None,
    });
    let id = node.create(&beside, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let used = "dd if=/dev/zero of=/dev/null bs=30M count=1";
    assert_eq!(node.exec(&id, used).await.exit_code, 0);
    let full = node.exec(&id, "exec tail /dev/zero").await;
    assert_eq!(full.exit_code, 137);
    assert_eq!(
        fs::read_dir(&small.0)
            .unwrap()
            .filter_map(Result::ok)
            .filter(|e| e.path().is_dir())
            .count(),
        0
    );
    node.stop_sandbox(&beside.id).await.unwrap();
    node.remove_sandbox(&beside.id).await.unwrap();
    drop(small);

    let with = |pod_cidr: &str| UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig {
            network_config: Some(NetworkConfig {
                pod_cidr: pod_cidr.into(),
            }),
        }),
    };
    let taken = runtime.update_runtime_config(with("10.1.0.0/24")).await;
    taken.unwrap();
    let wrong = runtime.update_runtime_config(with("nonsense")).await;
    assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument);
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    drop(cgroup);
    node.finish().await;
}

/// A number of MiB of a process.
fn mib(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() / 1024
}

/// Waits until a VMM has no more memory than this.
async fn wait_small(pid: u32, most_mib: u64) -> Duration {
    let start = Instant::now();
    while mib(pid, "VmRSS:") > most_mib {
        assert!(start.elapsed() < PATIENCE, "{} MiB", mib(pid, "VmRSS:"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    start.elapsed()
}

#[tokio::test]
async fn a_pod_without_limits_gets_what_it_needs_and_gives_it_back() {
    let mut node = Node::start_with(|text| text + "[vm]\ntemplate = true\n").await;
    let large = "echo up; sleep 3; dd if=/dev/zero of=/dev/null bs=600M count=1 2>/dev/null \
                 && echo done; exec sleep 1000";
    let pod = node.pod("grows").await;
    let vmm = info(&node, &pod).await["pid"].as_u64().unwrap() as u32;
    let idle = mib(vmm, "VmRSS:");
    let id = node.run_script(&pod, "large", large).await;
    node.wait_log("large", "up\n").await;
    // It takes no daemon.
    node.daemon.kill();
    let start = Instant::now();
    while mib(vmm, "VmHWM:") < 600 {
        assert!(start.elapsed() < PATIENCE, "{} MiB", mib(vmm, "VmHWM:"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let grown = start.elapsed();
    node.client = node.daemon.restart().await;
    node.wait_log("large", "up\ndone\n").await;
    let back = wait_small(vmm, idle + 32).await;
    println!(
        "{idle} MiB idle, {} at the peak {:?} after the start, {} after {back:?}",
        mib(vmm, "VmHWM:"),
        grown,
        mib(vmm, "VmRSS:")
    );

    // A limit is a container's own, whether the VM was as large before or not.
    for (name, limit, script) in [
        ("small", 16, "dd if=/dev/zero of=/dev/null bs=50M"),
        ("medium", 300, "dd if=/dev/zero of=/dev/null bs=350M"),
    ] {
        let config = ContainerConfig {
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources {
                    memory_swap_limit_in_bytes: limit * MIB,
                    ..memory(limit)
                }),
                security_context: None,
            }),
            ..node.script(name, script)
        };
        let limited = node.create(&pod, config).await.unwrap();
        node.start_container(&limited).await.unwrap();
        let status = node.client.wait_exited(&limited, PATIENCE).await.unwrap();
        let told = (status.exit_code, &*status.reason);
        assert_eq!(told, (137, "OOMKilled"), "{name}");
    }
    let alive = node.exec(&id, "echo alive").await;
    assert_eq!(String::from_utf8(alive.stdout).unwrap(), "alive\n");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();

    // The template went with the daemon.
    let pod = node.pod("first").await;
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    let start = Instant::now();
    while templates(&node).await["ready"] != 1 {
        assert!(start.elapsed() < PATIENCE, "no template");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let pod = node.pod("clone").await;
    let told = info(&node, &pod).await;
    assert_eq!(told["cloned"], true);
    let vmm = told["pid"].as_u64().unwrap() as u32;
    let idle = mib(vmm, "VmRSS:");
    let large = large.replace("600M", "300M");
    node.run_script(&pod, "cloned", &large).await;
    node.wait_log("cloned", "up\ndone\n").await;
    let back = wait_small(vmm, idle + 32).await;
    println!("the clone has {idle} MiB, and again after {back:?}");
    end(node, &pod).await;
}
