//! Guests that lie, and panics while a guest is dealt with; what becomes of the others: nothing.

use std::{collections::HashSet, time::Duration};

use hull_pod::{Pods, stats::Scope};
use hull_spec::{
    error::ErrorKind,
    id::PodId,
    info::{ContainerState, SandboxState},
    stats::PodStats,
};

use crate::common::{TestNode, container, daemon, eventually};

async fn run(pods: &Pods, pod: &PodId, name: &str, args: &[&str]) -> String {
    let spec = container(name, args);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    // A guest that is ended meanwhile does not answer any more.
    let _ = pods.start_container(id.as_str()).await;
    id.to_string()
}

/// The pod is not ready, for a reason with this text, which its container tells too.
async fn ended(pods: &Pods, pod: &PodId, id: &str, text: &str) {
    let waited = tokio::time::timeout(Duration::from_secs(20), pods.wait_container(id)).await;
    let container = waited.unwrap().unwrap();
    assert!(container.message.contains(text), "{}", container.message);
    eventually("not ready", async || {
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        info.state == SandboxState::NotReady && info.vm.is_none()
    })
    .await;
    let sandbox = pods.sandbox(pod.as_str()).await.unwrap();
    assert!(sandbox.message.contains(text), "{}", sandbox.message);
}

/// The pod does what pods do.
async fn works(node: &TestNode, pods: &Pods, pod: &PodId, running: &str) {
    let info = pods.container(running).await.unwrap();
    assert_eq!(info.state, ContainerState::Running, "{}", info.message);
    let said = pods.exec_sync(running, vec!["out:well".into()], None).await;
    assert_eq!(said.unwrap().stdout, b"well");
    let name = "more";
    let id = run(pods, pod, name, &["out:more\\n"]).await;
    let info = pods.wait_container(&id).await.unwrap();
    assert_eq!((info.exit_code, info.message.as_str()), (0, ""));
    assert_eq!(node.log("more.log"), ["stdout F more"]);
    pods.remove_container(&id).await.unwrap();
    std::fs::remove_file(node.log_directory().join("more.log")).unwrap();
}

#[test]
fn a_guest_that_says_what_can_not_be_ends_with_a_reason_and_alone() {
    let node = TestNode::new();
    let first = daemon();
    let (well, other, told) = first.block_on(async {
        let pods = node.open().await;
        let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
        let other = run(&pods, &well, "other", &["wait"]).await;
        let mut told = Vec::new();
        for (name, lie, text) in [
            ("offset", "lie:offset", "misbehaves: output of"),
            ("code", "exit:256", "it sent the exit code 256"),
            ("negative", "exit:4294967295", "it sent the exit code -1"),
            ("after", "lie:after-end", "goes on after its end"),
            ("twice", "lie:ends", "goes on after its end"),
        ] {
            let pod = pods.run_sandbox(node.sandbox(name)).await.unwrap();
            let more: &[&str] = match name {
                "offset" => &["wait"],
                "after" | "twice" => &["out:some", "close", "wait"],
                _ => &[],
            };
            let args = [&[lie], more].concat();
            let id = run(&pods, &pod, name, &args).await;
            ended(&pods, &pod, &id, text).await;
            works(&node, &pods, &well, &other).await;
            told.push(pods.sandbox(pod.as_str()).await.unwrap());
        }
        // An exec's output is no better than a container's.
        let pod = pods.run_sandbox(node.sandbox("exec")).await.unwrap();
        let id = run(&pods, &pod, "exec", &["wait"]).await;
        let args = vec!["lie:offset".into(), "wait".into()];
        let error = pods.exec_sync(&id, args, None).await.unwrap_err();
        assert!(error.to_string().contains("the VM ended"), "{error}");
        ended(&pods, &pod, &id, "byte 18446744073709551615, of which 0").await;
        works(&node, &pods, &well, &other).await;
        (well, other, told)
    });
    // The next daemon knows why, and the guest that works goes on in it.
    drop(first);
    daemon().block_on(async {
        let pods = node.open().await;
        for before in told {
            let id = before.id.as_str();
            let info = pods.sandbox(id).await.unwrap();
            assert_eq!(info.state, SandboxState::NotReady);
            assert_eq!(info.message, before.message);
            pods.remove_sandbox(id).await.unwrap();
        }
        works(&node, &pods, &well, &other).await;
    });
}

#[test]
fn a_guest_that_lies_to_the_next_daemon_ends_with_a_reason_too() {
    let node = TestNode::new();
    let begins = "begins at byte 18446744073709551615, of which 6 were acknowledged";
    let ends = "ends before bytes that were sent";
    let first = daemon();
    let (well, other, liars) = first.block_on(async {
        let pods = node.open().await;
        let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
        let other = run(&pods, &well, "other", &["wait"]).await;
        let mut liars = Vec::new();
        for (name, lie, text) in [
            ("late", "lie:late-offset", begins),
            ("early", "lie:early-end", ends),
        ] {
            let liar = pods.run_sandbox(node.sandbox(name)).await.unwrap();
            let id = run(&pods, &liar, name, &[lie, "out:hello\\n", "wait"]).await;
            let log = format!("{name}.log");
            eventually("output", async || !node.log(&log).is_empty()).await;
            liars.push((liar, id, text));
        }
        (well, other, liars)
    });
    drop(first);
    daemon().block_on(async {
        let pods = node.open().await;
        for (liar, id, text) in liars {
            ended(&pods, &liar, &id, text).await;
            works(&node, &pods, &well, &other).await;
        }
    });
}

#[tokio::test]
async fn absurd_times_totals_and_ids_harm_nobody() {
    let node = TestNode::new();
    let pods = node.open().await;
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let other = run(&pods, &well, "other", &["wait"]).await;
    let liar = pods.run_sandbox(node.sandbox("liar")).await.unwrap();

    // It names a container of another pod, and what no container can be called.
    let ends = format!("lie:exited:{other}");
    let args = [
        "out:hello\\n",
        &ends,
        "lie:exited:../x",
        "lie:end",
        "exit:3",
    ];
    let before = pods.sandbox(liar.as_str()).await.unwrap().created_at_ns;
    let id = run(&pods, &liar, "liar", &args).await;
    let waited = tokio::time::timeout(Duration::from_secs(30), pods.wait_container(&id)).await;
    let info = waited.unwrap().unwrap();
    assert_eq!((info.exit_code, info.message.as_str()), (3, ""));
    let age_ns = info.finished_at_ns - before;
    assert!((0..60_000_000_000).contains(&age_ns), "{age_ns}");
    assert_eq!(node.log("liar.log"), ["stdout F hello"]);
    works(&node, &pods, &well, &other).await;
}

#[tokio::test]
async fn a_guest_that_uses_all_there_is_counts_as_what_its_vm_has() {
    let node = TestNode::new();
    let pods = node.open().await;
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let other = run(&pods, &well, "other", &["wait"]).await;
    let liar = pods.run_sandbox(node.sandbox("liar")).await.unwrap();
    let id = run(&pods, &liar, "liar", &["lie:stats", "wait"]).await;

    let wanted = HashSet::from([liar.clone(), well.clone()]);
    for _ in 0..2 {
        let all = pods.stats(&wanted, Scope::Pods).await;
        let of = |pod: &PodId| -> &PodStats {
            all.iter().find(|stats| stats.sandbox.id == *pod).unwrap()
        };
        let stats = of(&liar);
        assert_eq!(stats.containers.len(), 1);
        let container = &stats.containers[0];
        assert_eq!(container.container.id.as_str(), id);
        // The fake VM has 32 MiB.
        assert!(container.usage.memory.usage_bytes <= 64 << 20);
        let age_ns = container.at_ns - stats.sandbox.created_at_ns;
        let cpus = u64::from(stats.sandbox.vm.as_ref().unwrap().vcpus);
        assert!(container.usage.cpu.usage_ns <= age_ns as u64 * cpus);
        assert!(container.usage.io.len() <= 64);
        assert_eq!(of(&well).containers.len(), 1);
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    assert_eq!(
        pods.sandbox(liar.as_str()).await.unwrap().state,
        SandboxState::Ready
    );
    works(&node, &pods, &well, &other).await;
}

const PANIC: &str = "internal error while dealing with the guest: as the test says";

#[tokio::test]
async fn a_panic_in_a_pods_task_ends_its_vm_and_nothing_else() {
    let node = TestNode::new();
    let pods = node.open().await;
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let other = run(&pods, &well, "other", &["wait"]).await;
    let panic_at = |call| node.network.faults.lock().unwrap().panic = Some(call);

    // One that follows something of the pod.
    panic_at("watch");
    let pod = pods.run_sandbox(node.sandbox("follower")).await.unwrap();
    eventually("the end", async || {
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        info.state == SandboxState::NotReady && info.vm.is_none()
    })
    .await;
    let info = pods.sandbox(pod.as_str()).await.unwrap();
    assert_eq!(info.message, PANIC);
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    works(&node, &pods, &well, &other).await;

    // An operation: nobody who waits for it is left waiting.
    let pod = pods.run_sandbox(node.sandbox("operation")).await.unwrap();
    let id = run(&pods, &pod, "running", &["out:before\\n", "wait"]).await;
    eventually("output", async || !node.log("running.log").is_empty()).await;
    let exec = {
        let (pods, id) = (pods.clone(), id.clone());
        tokio::spawn(async move { pods.exec_sync(&id, vec!["wait".into()], None).await })
    };
    node.images
        .panic
        .store(true, std::sync::atomic::Ordering::Relaxed);
    let spec = container("new", &["wait"]);
    let failed = pods.create_container(pod.as_str(), spec).await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Internal, "{failed:?}");
    ended(&pods, &pod, &id, PANIC).await;
    assert!(exec.await.unwrap().is_err());
    assert_eq!(pods.containers().await.len(), 2);
    assert_eq!(node.log("running.log"), ["stdout F before"]);
    pods.remove_container(&id).await.unwrap();
    pods.stop_sandbox(pod.as_str()).await.unwrap();
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    works(&node, &pods, &well, &other).await;

    // The task that owns the pod: what was not done is not told to be.
    let pod = pods.run_sandbox(node.sandbox("owner")).await.unwrap();
    panic_at("teardown");
    let failed = pods.stop_sandbox(pod.as_str()).await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Internal, "{failed:?}");
    let stopped = async || pods.stop_sandbox(pod.as_str()).await.is_ok();
    eventually("the stop", stopped).await;
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    works(&node, &pods, &well, &other).await;

    // Its start, of which nothing stays.
    panic_at("setup");
    let failed = pods.run_sandbox(node.sandbox("start")).await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Internal, "{failed:?}");
    let again = async || pods.run_sandbox(node.sandbox("start")).await.is_ok();
    eventually("the start", again).await;
    works(&node, &pods, &well, &other).await;
    for info in pods.sandboxes().await {
        pods.remove_sandbox(info.id.as_str()).await.unwrap();
    }
    eventually("tidy", async || node.leftovers().is_empty()).await;
}
