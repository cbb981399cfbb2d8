//! VMs that do not answer: they cost their callers a bounded time, and others nothing.

use std::{
    collections::HashSet,
    fs,
    time::{Duration, Instant},
};

use hull_pod::{Pods, stats::Scope};
use hull_spec::{
    error::{ErrorKind, PodError},
    id::PodId,
    info::SandboxState,
    spec::Resources,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::common::{TestNode, container, eventually, kill_pid};

async fn running(pods: &Pods, pod: &PodId) -> String {
    let spec = container("app", &["wait"]);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    id.to_string()
}

async fn signal(pods: &Pods, pod: &PodId, signal: Signal) {
    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
    kill(Pid::from_raw(vm.pid as i32), signal).unwrap();
}

/// Fails in this way, and neither earlier nor later than it should.
async fn fails<T: std::fmt::Debug>(
    what: &str,
    kind: ErrorKind,
    seconds: std::ops::Range<u64>,
    call: impl Future<Output = Result<T, PodError>>,
) {
    let begin = Instant::now();
    let error = call.await.expect_err(what);
    let waited = begin.elapsed();
    assert_eq!(error.kind(), kind, "{what}: {error}");
    let (least, most) = (
        Duration::from_secs(seconds.start),
        Duration::from_secs(seconds.end),
    );
    assert!(waited >= least && waited < most, "{what}: {waited:?}");
}

fn command(word: &str) -> Vec<String> {
    vec![word.to_owned()]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_is_stopped_holds_up_its_callers_for_a_bounded_time_and_no_others() {
    let mut node = TestNode::new();
    node.config.agent_timeout = Duration::from_secs(2);
    let pods = node.open().await;
    let mute = pods.run_sandbox(node.sandbox("mute")).await.unwrap();
    let well = pods.run_sandbox(node.sandbox("well")).await.unwrap();
    let app = running(&pods, &mute).await;
    let other = running(&pods, &well).await;
    signal(&pods, &mute, Signal::SIGSTOP).await;

    let limits = Resources {
        cpu_shares: 512,
        ..Resources::default()
    };
    let (late, absent) = (ErrorKind::DeadlineExceeded, ErrorKind::Unavailable);
    let second = Duration::from_secs(1);
    let wanted = HashSet::from([mute.clone(), well.clone()]);
    tokio::join!(
        fails("counters", absent, 0..4, pods.vm_metrics(mute.as_str())),
        fails(
            "exec",
            late,
            1..4,
            pods.exec_sync(&app, command("wait"), Some(second))
        ),
        fails("update", absent, 0..8, pods.update_container(&app, limits)),
        fails("stop", late, 0..16, pods.stop_container(&app, second)),
        fails("dial", absent, 0..16, pods.dial(mute.as_str(), 80)),
        async {
            let begin = Instant::now();
            let all = pods.stats(&wanted, Scope::Pods).await;
            // A guest that is asked may answer for three seconds.
            let waited = begin.elapsed();
            assert!(waited < Duration::from_millis(2500), "{waited:?}");
            let of = |pod: &PodId| all.iter().find(|s| s.sandbox.id == *pod).unwrap();
            assert!(of(&mute).guest.is_none() && of(&mute).host.is_some());
            assert_eq!(of(&well).containers.len(), 1);
        },
        async {
            let begin = Instant::now();
            let output = pods.exec_sync(&other, command("out:here"), Some(20 * second));
            assert_eq!(output.await.unwrap().stdout, b"here");
            let info = pods.container(&app).await.unwrap();
            assert_eq!(info.exit_code, 0);
            let memory = pods.process_memory(mute.as_str()).await.unwrap();
            assert!(memory.is_some());
            assert!(begin.elapsed() < 3 * second);
        },
    );
    let begin = Instant::now();
    pods.stop_sandbox(mute.as_str()).await.unwrap();
    assert!(begin.elapsed() < 9 * second, "{:?}", begin.elapsed());
    // The pod that made their common cgroup removes it, so it goes last.
    pods.remove_sandbox(well.as_str()).await.unwrap();
    pods.remove_sandbox(mute.as_str()).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_vm_that_goes_on_is_used_again() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let app = running(&pods, &pod).await;
    signal(&pods, &pod, Signal::SIGSTOP).await;
    let second = Duration::from_secs(1);
    for _ in 0..2 {
        let counters = pods.vm_metrics(pod.as_str());
        fails("counters", ErrorKind::Unavailable, 0..4, counters).await;
    }
    let exec = pods.exec_sync(&app, command("wait"), Some(second));
    fails("exec", ErrorKind::DeadlineExceeded, 1..4, exec).await;
    signal(&pods, &pod, Signal::SIGCONT).await;
    eventually("an answer", async || {
        pods.vm_metrics(pod.as_str()).await.is_ok()
    })
    .await;
    let output = pods.exec_sync(&app, command("out:here"), Some(20 * second));
    assert_eq!(output.await.unwrap().stdout, b"here");
    let info = pods.sandbox(pod.as_str()).await.unwrap();
    assert_eq!(info.state, SandboxState::Ready, "{}", info.message);
    // Disks come and go as before.
    running_as(&pods, &pod, "next").await;
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
}

async fn running_as(pods: &Pods, pod: &PodId, name: &str) {
    let spec = container(name, &["wait"]);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
}

/// Starts as many pods whose guests hang as may be brought up at a time; returns when they boot. VMs
/// that are started later boot.
async fn hang(node: &TestNode, pods: &Pods) {
    let turns = std::thread::available_parallelism().unwrap().get() * 2;
    let turns = turns.max(4);
    node.script(r#"{"no_agent":true}"#);
    for n in 0..turns {
        let (pods, spec) = (pods.clone(), node.sandbox(&format!("hung-{n}")));
        tokio::spawn(async move { pods.run_sandbox(spec).await });
    }
    let boots = || {
        let runs = fs::read_dir(node.config.state.join("pods")).unwrap();
        let runs = runs.filter(|run| run.as_ref().unwrap().path().join("configured").exists());
        runs.count()
    };
    eventually("boots", async || boots() == turns).await;
    node.script("");
}

/// Ends all VMs, and waits for what follows.
async fn end(node: &TestNode) {
    node.vmms().into_iter().for_each(|pid| kill_pid(pid as u32));
    eventually("the end", async || node.network.up().len() <= 1).await;
}

async fn comes_up_within(node: &TestNode, pods: &Pods, limit: Duration) {
    let begin = Instant::now();
    pods.run_sandbox(node.sandbox("well")).await.unwrap();
    assert!(begin.elapsed() < limit, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn guests_that_hang_do_not_keep_the_turns_of_others() {
    let mut node = TestNode::new();
    node.config.boot_timeout = Duration::from_secs(16);
    let pods = node.open().await;
    hang(&node, &pods).await;
    comes_up_within(&node, &pods, Duration::from_secs(9)).await;
    end(&node).await;
}

#[tokio::test]
async fn guests_that_may_use_little_of_a_cpu_do_not_keep_the_turns_of_others() {
    let mut node = TestNode::new();
    node.config.boot_timeout = Duration::from_secs(60);
    if node.cgroup_parent().is_empty() {
        println!("SKIPPED: a limit of CPU: no cgroup v2 here");
        return;
    }
    fs::create_dir(node.cgroup()).unwrap();
    let control = node.config.cgroup_root.join("cgroup.subtree_control");
    let has_cpu = fs::write(control, "+cpu").is_ok()
        && fs::write(node.cgroup().join("cpu.max"), "10000 100000").is_ok();
    if !has_cpu {
        fs::remove_dir(node.cgroup()).unwrap();
        println!("SKIPPED: a limit of CPU: no such controller here");
        return;
    }
    let pods = node.open().await;
    hang(&node, &pods).await;
    // Theirs end in 15 seconds.
    fs::write(node.cgroup().join("cpu.max"), "max").unwrap();
    comes_up_within(&node, &pods, Duration::from_secs(9)).await;
    end(&node).await;
}
