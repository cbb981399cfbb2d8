//! Limits of containers and pods, changed while they run.

use std::time::Duration;

use hull_proto_cri::v1::{
    ContainerConfig, HugepageLimit, LinuxContainerConfig, LinuxContainerResources, NetworkConfig,
    RuntimeConfig, UpdateContainerResourcesRequest, UpdatePodSandboxResourcesRequest,
    UpdateRuntimeConfigRequest,
};
use tonic::{Code, Status};

use crate::harness::{Node, Pod};

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

#[tokio::test]
async fn a_pod_takes_the_sizes_that_its_vm_has() {
    let node = Node::start().await;
    let pod = node.pod("sizes").await;
    let mut runtime = node.client.runtime.clone();
    let request = |mib| UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: None,
        resources: Some(memory(mib)),
    };
    let resized = runtime.update_pod_sandbox_resources(request(64)).await;
    resized.unwrap();
    let larger = runtime.update_pod_sandbox_resources(request(100_000)).await;
    let larger = larger.unwrap_err();
    assert_eq!(larger.code(), Code::FailedPrecondition, "{larger}");
    assert!(larger.message().contains("MiB"), "{larger}");

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
    end(node, &pod).await;
}
