//! What happens when a process of the host dies.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{ContainerState, CreateContainerRequest, PodSandboxState};
use tonic::Code;

use crate::harness::Node;

const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_pod_survives_the_daemon() {
    let mut node = Node::start().await;
    let pod = node.pod("survivor").await;
    let script = "i=0; while [ $i -lt 60 ]; do echo tick $i; i=$((i+1)); sleep 0.1; done; exit 4";
    let ticking = node.run_script(&pod, "ticking", script).await;
    let idle = node.run_script(&pod, "idle", "sleep 1000").await;
    let vmms = node.vmms();

    node.client = node.daemon.kill_and_restart().await;
    assert_eq!(node.vmms(), vmms);
    let status = node.client.pod_status(&pod.id).await.unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(node.exec(&idle, "echo here").await.stdout, b"here\n");

    let status = node.client.wait_exited(&ticking, PATIENCE).await.unwrap();
    assert_eq!(status.exit_code, 4);
    let expected: String = (0..60).map(|i| format!("tick {i}\n")).collect();
    assert_eq!(node.log("ticking"), expected);

    // A VM that is stopped costs its callers no more than they asked for, and goes on.
    let signal = |name: &str| {
        let pid = vmms[0].to_string();
        let kill = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(kill.success());
    };
    signal("-STOP");
    let begin = Instant::now();
    let warning = node.warning(&pod).await;
    assert!(warning.contains("did not answer"), "{warning:?}");
    let late = node.exec_for(&idle, "true", 1).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    let waited = begin.elapsed();
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    signal("-CONT");
    assert_eq!(node.exec(&idle, "echo here").await.stdout, b"here\n");
    assert_eq!(node.vmms(), vmms);

    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_creation_that_the_daemon_did_not_live_to_finish_can_be_repeated() {
    let mut node = Node::start().await;
    let pod = node.pod("cut-off").await;
    let vmm = node.vmms()[0];
    let files = || {
        std::fs::read_dir(format!("/proc/{vmm}/fd"))
            .unwrap()
            .count()
    };
    let before = files();
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(node.script("first", "true")),
        sandbox_config: Some(pod.config.clone()),
    };
    let mut client = node.client.runtime.clone();
    let first = tokio::spawn(async move { client.create_container(request).await });
    // The VM has the image's disk, and nothing says so yet.
    let deadline = Instant::now() + PATIENCE;
    while files() == before {
        assert!(Instant::now() < deadline, "nothing was attached");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    node.client = node.daemon.kill_and_restart().await;
    let _ = first.await;
    let id = node.run_script(&pod, "second", "echo here").await;
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    assert_eq!(node.log("second"), "here\n");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn an_exit_while_the_daemon_is_away_is_reported() {
    let mut node = Node::start().await;
    let pod = node.pod("away").await;
    let id = node
        .run_script(&pod, "main", "sleep 1; echo bye; exit 6")
        .await;
    let config = node.dir.join("hull.toml");
    let pid = node.daemon.pid().to_string();
    assert!(
        Command::new("kill")
            .args(["-9", &pid])
            .status()
            .unwrap()
            .success()
    );
    std::thread::sleep(Duration::from_secs(4));
    assert!(config.exists());
    node.client = node.daemon.kill_and_restart().await;
    let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
    assert_eq!(status.exit_code, 6);
    assert_eq!(node.log("main"), "bye\n");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_vm_that_dies_leaves_a_pod_that_can_be_removed() {
    let node = Node::start().await;
    let pod = node.pod("victim").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let pid = node.vmms()[0].to_string();
    assert!(
        Command::new("kill")
            .args(["-9", &pid])
            .status()
            .unwrap()
            .success()
    );

    let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_ne!(status.exit_code, 0);
    let status = node.client.pod_status(&pod.id).await.unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    let error = node.exec_for(&id, "true", 0).await.unwrap_err();
    assert!(!error.message().is_empty());

    node.stop_container(&id, 10).await.unwrap();
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_guest_that_powers_off_ends_its_pod_alone() {
    let node = Node::start().await;
    let one = node.pod("one").await;
    let two = node.pod("two").await;
    let a = node.run_script(&one, "a", "sleep 1000").await;
    let b = node.run_script(&two, "b", "sleep 1000").await;
    // The kernel of the guest dies under its container.
    let victim = std::fs::read_dir(node.dir.join("state/pods"))
        .unwrap()
        .count();
    assert_eq!(victim, 2);
    let vmm = node.vmms().into_iter().find(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.contains(&one.id))
    });
    let pid = vmm
        .expect("the VMM's command line has the pod's id")
        .to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    node.client.wait_exited(&a, PATIENCE).await.unwrap();
    assert_eq!(node.exec(&b, "echo fine").await.stdout, b"fine\n");
    for pod in [&one, &two] {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}
