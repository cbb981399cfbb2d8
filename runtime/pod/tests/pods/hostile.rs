//! Guests that lie, and panics while a guest is dealt with; what becomes of the others: nothing.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

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

#[tokio::test]
async fn answers_that_come_twice_late_or_of_nobody_change_nothing() {
    let node = TestNode::new();
    node.script(r#"{"astray":true}"#);
    let pods = node.open().await;
    for lie in ["twice", "late"] {
        let liar = pods.run_sandbox(node.sandbox(lie)).await.unwrap();
        let lie = format!("lie:wire:{lie}");
        let id = run(&pods, &liar, "liar", &[&lie, "wait"]).await;
        let wanted = HashSet::from([liar.clone()]);
        for _ in 0..3 {
            tokio::join!(
                works(&node, &pods, &liar, &id),
                pods.stats(&wanted, Scope::Pods)
            );
        }
        pods.stop_sandbox(liar.as_str()).await.unwrap();
        pods.remove_sandbox(liar.as_str()).await.unwrap();
    }
}

#[tokio::test]
async fn answers_to_other_calls_and_answers_that_never_come_cost_their_pod_alone() {
    let mut node = TestNode::new();
    node.config.agent_timeout = Duration::from_secs(2);
    node.script(r#"{"astray":true}"#);
    let pods = node.open().await;
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let other = run(&pods, &well, "other", &["wait"]).await;
    for (lie, kinds) in [
        ("crossed", None),
        (
            "mute",
            Some([ErrorKind::Unavailable, ErrorKind::DeadlineExceeded]),
        ),
        (
            "zeros",
            Some([ErrorKind::Unavailable, ErrorKind::DeadlineExceeded]),
        ),
        ("abuse", Some([ErrorKind::Internal; 2])),
    ] {
        let liar = pods.run_sandbox(node.sandbox(lie)).await.unwrap();
        let args = [&format!("lie:wire:{lie}"), "wait"];
        let app = run(&pods, &liar, "app", &["wait"]).await;
        run(&pods, &liar, "liar", &args).await;
        let wanted = HashSet::from([liar.clone(), well.clone()]);
        let begin = Instant::now();
        let exec = |word: &str| pods.exec_sync(&app, vec![word.into()], Some(second()));
        let spec = container("third", &["wait"]);
        let (first, again, created, all, ()) = tokio::join!(
            exec("out:one"),
            exec("out:two"),
            pods.create_container(liar.as_str(), spec),
            pods.stats(&wanted, Scope::Pods),
            works(&node, &pods, &well, &other),
        );
        let well_stats = all.iter().find(|stats| stats.sandbox.id == well).unwrap();
        assert_eq!(well_stats.containers.len(), 1);
        let failures = [first.err(), again.err(), created.err()];
        if let Some(kinds) = kinds {
            for failure in failures {
                let failure = failure.expect(lie);
                assert!(kinds.contains(&failure.kind()), "{lie}: {failure:?}");
                let told = failure.to_string();
                // The guest's word, and that about the clean-up: 2 KiB each.
                assert!(told.len() < 6144 && !told.contains('\u{1b}'), "{told}");
            }
        }
        assert!(
            begin.elapsed() < 12 * second(),
            "{lie}: {:?}",
            begin.elapsed()
        );
        pods.stop_sandbox(liar.as_str()).await.unwrap();
        pods.remove_sandbox(liar.as_str()).await.unwrap();
        works(&node, &pods, &well, &other).await;
    }
}

fn second() -> Duration {
    Duration::from_secs(1)
}

#[tokio::test]
async fn messages_without_an_end_end_their_vm() {
    let node = TestNode::new();
    node.script(r#"{"astray":true}"#);
    let pods = node.open().await;
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let other = run(&pods, &well, "other", &["wait"]).await;
    for (name, lie, text) in [
        (
            "answer",
            "lie:wire:long",
            "misbehaves: it sent an answer of 1073741824 bytes",
        ),
        (
            "event",
            "lie:wire:long-event",
            "misbehaves: it sent an event of 1073741824 bytes",
        ),
    ] {
        let liar = pods.run_sandbox(node.sandbox(name)).await.unwrap();
        let args = [lie, "lie:exited:nobody", "wait"];
        let id = run(&pods, &liar, name, &args).await;
        let _ = pods
            .exec_sync(&id, vec!["wait".into()], Some(second()))
            .await;
        ended(&pods, &liar, &id, text).await;
        works(&node, &pods, &well, &other).await;
    }
}

#[tokio::test]
async fn events_without_an_end_cost_their_pod_alone() {
    let node = TestNode::new();
    let pods = node.open().await;
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let other = run(&pods, &well, "other", &["wait"]).await;
    for kind in ["known", "oom", "strangers"] {
        let liar = pods.run_sandbox(node.sandbox(kind)).await.unwrap();
        let lie = format!("lie:events:{kind}");
        run(&pods, &liar, "liar", &[&lie, "lie:exited:nobody", "wait"]).await;
        let begin = Instant::now();
        while begin.elapsed() < 2 * second() {
            works(&node, &pods, &well, &other).await;
        }
        let info = pods.sandbox(liar.as_str()).await.unwrap();
        let is_ready = info.state == SandboxState::Ready;
        // Those that have to be looked at may come faster than that is done.
        let is_too_fast =
            kind == "strangers" && info.message.contains("it sends events faster than");
        assert!(is_ready || is_too_fast, "{kind}: {info:?}");
        pods.stop_sandbox(liar.as_str()).await.unwrap();
        pods.remove_sandbox(liar.as_str()).await.unwrap();
    }
}

#[tokio::test]
async fn an_agent_that_does_not_answer_its_first_calls_is_given_up() {
    let mut node = TestNode::new();
    node.config.agent_timeout = second();
    let pods = node.open().await;
    for call in ["hello", "configure"] {
        node.script(&format!(r#"{{"hang_once":["{call}"]}}"#));
        let begin = Instant::now();
        let error = pods.run_sandbox(node.sandbox("mute")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        assert!(begin.elapsed() < 10 * second(), "{:?}", begin.elapsed());
        eventually("tidy", async || node.leftovers().is_empty()).await;
    }
}

#[tokio::test]
async fn an_agent_of_another_version_is_refused_and_leaves_nothing() {
    let node = TestNode::new();
    let pods = node.open().await;
    for version in [0, 1, u32::MAX] {
        node.script(&format!(r#"{{"version":{version}}}"#));
        let error = pods.run_sandbox(node.sandbox("other")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        let told = error_reporter::Report::new(error).to_string();
        assert!(told.contains("it has another contract version"), "{told}");
    }
    assert!(pods.sandboxes().await.is_empty());
    eventually("tidy", async || node.leftovers().is_empty()).await;
    node.script("");
    pods.run_sandbox(node.sandbox("other")).await.unwrap();
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
