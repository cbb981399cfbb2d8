//! What pods use: guests that answer, and some that do not.

use std::collections::HashSet;

use hull_pod::{Pods, stats::Scope};
use hull_spec::{id::PodId, spec::SandboxSpec, stats::PodStats};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::common::{TestNode, container};

async fn stats(pods: &Pods, of: &[&PodId], scope: Scope) -> Vec<PodStats> {
    let wanted: HashSet<PodId> = of.iter().map(|id| (*id).clone()).collect();
    let all = pods.stats(&wanted, scope).await;
    assert_eq!(all.len(), of.len());
    let find = |id: &PodId| all.iter().find(|s| s.sandbox.id == *id).unwrap().clone();
    of.iter().map(|id| find(id)).collect()
}

async fn running(pods: &Pods, pod: &PodId) -> String {
    let spec = container("app", &["wait"]);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    id.to_string()
}

#[tokio::test]
async fn a_pod_is_counted_on_the_host_and_its_containers_in_the_guest() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = running(&pods, &pod).await;
    let idle = container("idle", &["wait"]);
    let idle = pods.create_container(pod.as_str(), idle).await.unwrap();

    let first = &stats(&pods, &[&pod], Scope::Pods).await[0];
    let host = first.host.as_ref().unwrap();
    assert_eq!(host.processes, 1);
    assert!(host.rss_bytes > 0 && host.memory_usage_bytes > 0);
    assert_eq!(host.nano_cores, None);
    let guest = first.guest.as_ref().unwrap();
    assert_eq!(guest.usage.memory.usage_bytes, 1 << 20);
    let of = |stats: &PodStats, id: &str| {
        let mut all = stats.containers.iter();
        all.find(|c| c.container.id.as_str() == id).unwrap().clone()
    };
    assert_eq!(of(first, &id).usage.cpu.usage_ns, 1_000_000);
    // One that was not started uses nothing.
    assert_eq!(of(first, idle.as_str()).usage.cpu.usage_ns, 0);
    // Nobody asked for the host.
    let second = &stats(&pods, &[&pod], Scope::Containers).await[0];
    assert!(second.host.is_none());
    assert_eq!(of(second, &id).usage.cpu.usage_ns, 2_000_000);

    // A container that ended keeps what it had used, and uses nothing more.
    pods.stop_container(&id, std::time::Duration::ZERO)
        .await
        .unwrap();
    let ended = of(&stats(&pods, &[&pod], Scope::Containers).await[0], &id);
    assert_eq!(ended.usage.cpu.usage_ns, 2_000_000);
    assert_eq!(ended.usage.memory.usage_bytes, 0);
    assert_eq!(ended.nano_cores, Some(0));
    let memory = pods.process_memory(pod.as_str()).await.unwrap().unwrap();
    assert!(memory.rss_bytes >= memory.private_bytes && memory.private_bytes > 0);

    pods.stop_sandbox(pod.as_str()).await.unwrap();
    let stopped = &stats(&pods, &[&pod], Scope::Pods).await[0];
    assert!(stopped.host.is_none() && stopped.guest.is_none());
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    assert!(
        pods.stats(&HashSet::from([pod]), Scope::Pods)
            .await
            .is_empty()
    );
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_frozen_guest_is_left_out_and_the_others_are_not() {
    let node = TestNode::new();
    let pods = node.open().await;
    let frozen = pods.run_sandbox(node.sandbox("frozen")).await.unwrap();
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    for pod in [&frozen, &well] {
        running(&pods, pod).await;
    }
    let vmm = pods.sandbox(frozen.as_str()).await.unwrap().vm.unwrap().pid;
    let vmm = Pid::from_raw(vmm as i32);
    kill(vmm, Signal::SIGSTOP).unwrap();

    for _ in 0..2 {
        let all = stats(&pods, &[&frozen, &well], Scope::Pods).await;
        assert!(all[0].guest.is_none() && all[0].containers.is_empty());
        // The host knows about it all the same.
        assert!(all[0].host.is_some());
        assert!(all[1].guest.is_some());
        assert_eq!(all[1].containers.len(), 1);
    }
    kill(vmm, Signal::SIGCONT).unwrap();
    // The pod that made their common parent removes it, so it goes last.
    for pod in [&well, &frozen] {
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.remove_sandbox(pod.as_str()).await.unwrap();
    }
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_vm_is_in_its_pods_cgroup_and_the_cgroup_goes_with_it() {
    let node = TestNode::new();
    if node.cgroup_parent().is_empty() {
        println!("SKIPPED: the pod's cgroup: no cgroup v2 here");
        return;
    }
    let pods = node.open().await;
    let spec = SandboxSpec {
        cgroup_parent: format!("{}/a-b.slice", node.cgroup_parent()),
        ..node.sandbox("web")
    };
    let pod = pods.run_sandbox(spec).await.unwrap();
    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
    let cgroup = node.cgroup().join(format!("a-b.slice/hull-{pod}"));
    assert_eq!(vm.cgroup.as_ref(), Some(&cgroup));
    let line = std::fs::read_to_string(format!("/proc/{}/cgroup", vm.pid)).unwrap();
    assert!(
        line.trim()
            .ends_with(cgroup.file_name().unwrap().to_str().unwrap()),
        "{line}"
    );

    pods.remove_sandbox(pod.as_str()).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);

    // A start that fails leaves none.
    std::fs::write(&node.config.kernel, r#"{"die_at_start":true}"#).unwrap();
    pods.run_sandbox(node.sandbox("dies")).await.unwrap_err();
    assert_eq!(node.leftovers(), [""; 0]);
    let outside = SandboxSpec {
        cgroup_parent: "/../x".into(),
        ..node.sandbox("outside")
    };
    let error = pods.run_sandbox(outside).await.unwrap_err();
    assert!(error.to_string().contains("cgroup parent"), "{error}");
}
