//! Changes of limits.

use std::time::Duration;

use hull_pod::Pods;
use hull_spec::{
    error::ErrorKind,
    id::{ContainerId, PodId},
    spec::{ContainerSpec, Resources},
};

use crate::common::{TestNode, container, daemon, end};

const MIB: i64 = 1 << 20;

fn limits(cpu_shares: i64, memory_mib: i64) -> Resources {
    Resources {
        cpu_shares,
        memory_limit_bytes: memory_mib * MIB,
        ..Resources::default()
    }
}

/// What the guest was told, in order.
async fn told(pods: &Pods, id: &str) -> Vec<String> {
    let output = pods.exec_sync(id, vec!["limits".into()], None).await;
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

async fn in_force(pods: &Pods, id: &str) -> Resources {
    pods.container(id).await.unwrap().resources.unwrap()
}

#[test]
fn limits_change_in_every_state_and_survive_a_restart() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, id, recorded) = first.block_on(change_limits(&node));
    end(first);
    daemon().block_on(async {
        let pods = node.open().await;
        let id = id.as_str();
        assert_eq!(in_force(&pods, id).await, recorded);
        pods.stop_container(id, Duration::ZERO).await.unwrap();
        pods.update_container(id, limits(500, 0)).await.unwrap();
        assert_eq!(in_force(&pods, id).await.cpu_shares, 500);
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.update_container(id, limits(501, 0)).await.unwrap();
        assert_eq!(in_force(&pods, id).await.cpu_shares, 501);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        let gone = pods.update_container(id, limits(1, 0)).await.unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    });
}

async fn change_limits(node: &TestNode) -> (PodId, ContainerId, Resources) {
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let spec = ContainerSpec {
        resources: Some(limits(100, 16)),
        ..container("app", &["wait"])
    };
    let container = pods.create_container(pod.as_str(), spec).await.unwrap();
    let id = container.as_str();
    assert_eq!(in_force(&pods, id).await, limits(100, 16));

    pods.update_container(id, limits(200, 0)).await.unwrap();
    assert_eq!(in_force(&pods, id).await, limits(200, 16));
    pods.start_container(id).await.unwrap();
    let asked = Resources {
        oom_score_adj: -7,
        ..limits(0, 8)
    };
    pods.update_container(id, asked.clone()).await.unwrap();
    let wanted = Resources {
        oom_score_adj: -7,
        ..limits(200, 8)
    };
    assert_eq!(in_force(&pods, id).await, wanted);
    assert_eq!(
        told(&pods, id).await,
        [
            "{\"shares\":200} {\"limit\":16777216} None",
            "{\"shares\":200} {\"limit\":8388608} Some(-7)",
        ]
    );

    // Many at a time: one after another, and what is recorded is what is in force.
    let updates = (20..40).map(|shares| pods.update_container(id, limits(shares, 0)));
    for result in futures::future::join_all(updates).await {
        result.unwrap();
    }
    let last = told(&pods, id).await.pop().unwrap();
    let recorded = in_force(&pods, id).await;
    assert!(last.contains(&format!("\"shares\":{}}}", recorded.cpu_shares)));
    (pod, container, recorded)
}

#[tokio::test]
async fn a_refused_change_changes_nothing() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let spec = ContainerSpec {
        resources: Some(limits(100, 0)),
        ..container("app", &["wait"])
    };
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    let id = id.as_str();
    pods.start_container(id).await.unwrap();
    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();

    let kind = async |limits| pods.update_container(id, limits).await.unwrap_err().kind();
    assert_eq!(kind(limits(-1, 0)).await, ErrorKind::InvalidArgument);
    let too_large = limits(0, vm.memory_mib as i64);
    assert_eq!(kind(too_large).await, ErrorKind::FailedPrecondition);
    assert_eq!(told(&pods, id).await, [""; 0]);
    // The guest fails half-way: it gets the old limits again.
    assert_eq!(kind(limits(13, 4)).await, ErrorKind::Internal);
    assert_eq!(
        told(&pods, id).await,
        [
            "{\"shares\":13} {\"limit\":4194304} None",
            "{\"shares\":100} {\"limit\":-1} None",
        ]
    );
    assert_eq!(in_force(&pods, id).await, limits(100, 0));

    // At the creation, a set of the node's processors is the guest's to fit.
    let spec = ContainerSpec {
        resources: Some(Resources {
            cpuset_cpus: "200".into(),
            ..Resources::default()
        }),
        ..container("pinned", &["wait"])
    };
    pods.create_container(pod.as_str(), spec).await.unwrap();
}

#[test]
fn a_sandbox_takes_sizes_that_its_vm_has() {
    let node = TestNode::new();
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let mut spec = node.sandbox("web");
        spec.resources = Some(limits(0, 64));
        spec.overhead = Some(limits(0, 32));
        let pod = pods.run_sandbox(spec.clone()).await.unwrap();
        let id = pod.as_str();
        let memory = pods.sandbox(id).await.unwrap().vm.unwrap().memory_mib;
        assert_eq!(memory, 96);

        let smaller = Some(limits(0, 32));
        pods.update_sandbox(id, None, smaller).await.unwrap();
        let (resources, overhead) = (limits(0, 60), limits(0, 36));
        pods.update_sandbox(id, Some(overhead), Some(resources))
            .await
            .unwrap();
        let larger = pods.update_sandbox(id, None, Some(limits(0, 64))).await;
        let larger = larger.unwrap_err();
        assert_eq!(larger.kind(), ErrorKind::FailedPrecondition);
        assert!(larger.to_string().contains("100 MiB"), "{larger}");
        let invalid = pods.update_sandbox(id, None, Some(limits(-1, 0))).await;
        assert_eq!(invalid.unwrap_err().kind(), ErrorKind::InvalidArgument);
        pod
    });
    end(first);
    daemon().block_on(async {
        let (pods, id) = (node.open().await, pod.as_str());
        // The new overhead outlived the daemon.
        let larger = pods.update_sandbox(id, None, Some(limits(0, 64))).await;
        assert!(larger.unwrap_err().to_string().contains("100 MiB"));
        pods.stop_sandbox(id).await.unwrap();
        let stopped = pods.update_sandbox(id, None, None).await.unwrap_err();
        assert_eq!(stopped.kind(), ErrorKind::FailedPrecondition);
    });
}

#[test]
fn a_vm_gets_more_memory_and_gives_it_back_with_its_limits() {
    let mut node = TestNode::new();
    node.config.max_memory_mib = 32 + 1024;
    let first = daemon();
    let (pod, id) = first.block_on(async {
        let pods = node.open().await;
        let plugged = async |id: &str| pods.vm_metrics(id).await.unwrap().plugged_mib;
        let unlimited = pods.run_sandbox(node.sandbox("grows")).await.unwrap();
        assert_eq!(plugged(unlimited.as_str()).await, (0, 1024));
        let vm = pods.sandbox(unlimited.as_str()).await.unwrap().vm.unwrap();
        assert_eq!((vm.memory_mib, vm.max_memory_mib), (32, 1056));

        let mut spec = node.sandbox("web");
        spec.resources = Some(limits(0, 64));
        spec.overhead = Some(limits(0, 32));
        let pod = pods.run_sandbox(spec).await.unwrap();
        let pod = pod.as_str().to_owned();
        let id = pods
            .create_container(&pod, container("main", &["wait"]))
            .await
            .unwrap();
        pods.start_container(id.as_str()).await.unwrap();
        assert_eq!(plugged(&pod).await, (0, 0));
        // A container first, then the pod, as kubelet does.
        let large = limits(0, 300);
        pods.update_container(id.as_str(), large).await.unwrap();
        assert_eq!(plugged(&pod).await, (236, 236));
        let resize = async |mib| pods.update_sandbox(&pod, None, Some(limits(0, mib))).await;
        resize(500).await.unwrap();
        assert_eq!(plugged(&pod).await, (436, 436));
        let too_large = resize(2000).await.unwrap_err();
        assert!(too_large.to_string().contains("992 MiB"), "{too_large}");
        assert_eq!(plugged(&pod).await, (436, 436));
        resize(150).await.unwrap();
        assert_eq!(plugged(&pod).await, (86, 86));
        (pod, id)
    });
    end(first);
    daemon().block_on(async {
        let pods = node.open().await;
        let vm = pods.sandbox(&pod).await.unwrap().vm.unwrap();
        assert_eq!((vm.memory_mib, vm.max_memory_mib), (96, 182));
        let more = pods.update_sandbox(&pod, None, Some(limits(0, 64))).await;
        more.unwrap();
        assert_eq!(pods.vm_metrics(&pod).await.unwrap().plugged_mib, (0, 0));
        pods.update_container(id.as_str(), limits(0, 60))
            .await
            .unwrap();
    });
}
