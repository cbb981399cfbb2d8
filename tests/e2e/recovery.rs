//! What happens when a process of the host dies.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ContainerConfig, ContainerState, CreateContainerRequest, LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxState,
};
use tonic::Code;

use crate::{
    harness::{BUSYBOX, Node, PATIENCE},
    volumes::mount,
};

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
    let files = || fs::read_dir(format!("/proc/{vmm}/fd")).unwrap().count();
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
    // In the host's eyes the container ends where it leaves a file.
    let shared = node.dir.join("shared");
    fs::create_dir(&shared).unwrap();
    let (wait, leave) = (
        "while ! [ -e /shared/go ]; do sleep 0.1; done",
        "touch /shared/gone",
    );
    let config = ContainerConfig {
        mounts: vec![mount("/shared", &shared)],
        ..node.script("main", &format!("{wait}; echo bye; {leave}; exit 6"))
    };
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    node.daemon.kill();
    fs::write(shared.join("go"), "").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !shared.join("gone").exists() {
        assert!(Instant::now() < deadline, "the container does not go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.client = node.daemon.restart().await;
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
async fn a_guest_that_shuts_down_ends_its_pod_alone() {
    let node = Node::start().await;
    node.client.pull(BUSYBOX).await.unwrap();
    let mut config = node.sandbox("one");
    config.linux.get_or_insert_default().security_context = Some(LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    let one = node.run_sandbox(config).await.unwrap();
    let two = node.pod("two").await;
    // In the guest's own PID namespace; from another the kernel would end that alone (reboot(2)).
    let mut shut_down = node.script("a", "reboot -f");
    shut_down.linux.get_or_insert_default().security_context =
        Some(LinuxContainerSecurityContext {
            privileged: true,
            namespace_options: Some(NamespaceOption {
                pid: NamespaceMode::Node.into(),
                ..Default::default()
            }),
            ..Default::default()
        });
    let a = node.create(&one, shut_down).await.unwrap();
    let b = node.run_script(&two, "b", "sleep 1000").await;
    node.start_container(&a).await.unwrap();
    let status = node.client.wait_exited(&a, PATIENCE).await.unwrap();
    assert_eq!(status.exit_code, 137);
    let status = node.client.pod_status(&one.id).await.unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxNotready);
    assert_eq!(node.exec(&b, "echo fine").await.stdout, b"fine\n");
    for pod in [&one, &two] {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}
