//! Containers: their end, their output, their files, commands run in them.

use std::time::{Duration, Instant};

use hull_proto_cri::v1::{
    ContainerFilter, ContainerState, ContainerStateValue, KeyValue, ListContainersRequest,
};
use tonic::Code;

use crate::harness::{Node, Pod};

const PATIENCE: Duration = Duration::from_secs(60);

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn exit_codes_and_reasons_are_told() {
    let node = Node::start().await;
    let pod = node.pod("exits").await;
    for (name, script, code, reason) in [
        ("zero", "exit 0", 0, "Completed"),
        ("three", "exit 3", 3, "Error"),
        ("killed", "kill -9 $$", 137, "Error"),
    ] {
        let id = node.create(&pod, node.script(name, script)).await.unwrap();
        let created = node.client.container_status(&id).await.unwrap();
        assert_eq!(created.state(), ContainerState::ContainerCreated);
        node.start_container(&id).await.unwrap();
        let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
        assert_eq!(
            (status.exit_code, &*status.reason),
            (code, reason),
            "{name}"
        );
        assert!(status.created_at > 0 && status.started_at >= status.created_at);
        assert!(status.finished_at >= status.started_at, "{status:?}");
    }
    end(node, &pod).await;
}

#[tokio::test]
async fn output_is_complete_and_streams_are_told_apart() {
    let node = Node::start().await;
    let pod = node.pod("output").await;
    let script =
        "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; echo oops >&2; printf end";
    let id = node.run_script(&pod, "talk", script).await;
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    let text = std::fs::read_to_string(node.dir.join("logs/talk.log")).unwrap();
    let (out, err): (Vec<_>, Vec<_>) = text.lines().partition(|l| l.contains(" stdout "));
    assert_eq!(out.len(), 2001);
    assert!(out[1999].ends_with(" stdout F line 1999"), "{}", out[1999]);
    // The last line has no newline: its tag says so.
    assert!(out[2000].ends_with(" stdout P end"), "{}", out[2000]);
    assert_eq!(err.len(), 1);
    assert!(err[0].ends_with(" stderr F oops"));
    end(node, &pod).await;
}

#[tokio::test]
async fn configuration_reaches_the_process() {
    let node = Node::start().await;
    let pod = node.pod("settings").await;
    let mut config = node.script(
        "main",
        "echo $GREETING; pwd; id -u; cat /etc/hostname; sleep 1000",
    );
    config.envs = vec![KeyValue {
        key: "GREETING".into(),
        value: "hello there".into(),
    }];
    config.working_dir = "/tmp".into();
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    // A command that is run in it has the same surroundings.
    let seen = node.exec(&id, "echo $GREETING; pwd").await;
    assert_eq!(String::from_utf8_lossy(&seen.stdout), "hello there\n/tmp\n");
    node.wait_log("main", "hello there\n/tmp\n0\nsettings\n")
        .await;
    end(node, &pod).await;
}

#[tokio::test]
async fn writes_stay_in_their_container() {
    let node = Node::start().await;
    let pod = node.pod("writes").await;
    let one = node
        .run_script(&pod, "one", "echo mine > /etc/mine; sleep 1000")
        .await;
    let two = node.run_script(&pod, "two", "sleep 1000").await;
    assert_eq!(node.exec(&one, "cat /etc/mine").await.stdout, b"mine\n");
    assert_ne!(node.exec(&two, "cat /etc/mine").await.exit_code, 0);
    // Written files are on a disk, not in the guest's memory.
    let df = node
        .exec(
            &one,
            "dd if=/dev/zero of=/big bs=1M count=400 2>&1 && rm /big",
        )
        .await;
    assert_eq!(df.exit_code, 0, "{}", String::from_utf8_lossy(&df.stdout));
    end(node, &pod).await;
}

#[tokio::test]
async fn exec_returns_streams_code_and_ends_in_time() {
    let node = Node::start().await;
    let pod = node.pod("exec").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let answer = node.exec(&id, "echo out; echo err >&2; exit 7").await;
    assert_eq!(answer.stdout, b"out\n");
    assert_eq!(answer.stderr, b"err\n");
    assert_eq!(answer.exit_code, 7);
    let large = node
        .exec(&id, "dd if=/dev/zero bs=1M count=3 2>/dev/null")
        .await;
    assert_eq!(large.stdout.len(), 3 << 20);

    let start = Instant::now();
    let late = node.exec_for(&id, "sleep 600 & sleep 600", 1).await;
    assert_eq!(late.unwrap_err().code(), Code::DeadlineExceeded);
    assert!(start.elapsed() < Duration::from_secs(30));
    // Its children are gone too; the container goes on.
    let left = node.exec(&id, "ps | grep -c 'sleep [6]00'").await;
    assert_eq!(String::from_utf8_lossy(&left.stdout), "0\n");

    let missing = node.exec_for(&id, "exit 0", 0).await;
    assert!(missing.is_ok());
    node.stop_container(&id, 0).await.unwrap();
    let error = node.exec_for(&id, "true", 0).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    end(node, &pod).await;
}

#[tokio::test]
async fn a_stop_asks_once_and_then_kills() {
    let node = Node::start().await;
    let pod = node.pod("stop").await;
    let polite = node
        .run_script(
            &pod,
            "polite",
            "trap 'echo asked; exit 5' TERM; echo ready; while :; do sleep 0.1; done",
        )
        .await;
    let deaf = node
        .run_script(
            &pod,
            "deaf",
            "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done",
        )
        .await;
    for name in ["polite", "deaf"] {
        node.wait_log(name, "ready\n").await;
    }
    node.stop_container(&polite, 60).await.unwrap();
    let status = node.client.container_status(&polite).await.unwrap();
    assert_eq!(
        (status.exit_code, status.state()),
        (5, ContainerState::ContainerExited)
    );
    assert_eq!(node.log("polite"), "ready\nasked\n");

    node.stop_container(&deaf, 2).await.unwrap();
    let status = node.client.container_status(&deaf).await.unwrap();
    assert_eq!(status.exit_code, 137);
    assert_eq!(node.log("deaf"), "ready\nasked\n");
    node.stop_container(&deaf, 2).await.unwrap();
    end(node, &pod).await;
}

#[tokio::test]
async fn a_sandbox_outlives_its_containers() {
    let node = Node::start().await;
    let pod = node.pod("again").await;
    for attempt in 0..3 {
        let mut config = node.script("main", "echo again");
        config.metadata.as_mut().unwrap().attempt = attempt;
        config.log_path = format!("again{attempt}.log");
        let id = node.create(&pod, config).await.unwrap();
        node.start_container(&id).await.unwrap();
        node.client.wait_exited(&id, PATIENCE).await.unwrap();
        assert_eq!(node.log(&format!("again{attempt}")), "again\n");
        node.remove_container(&id).await.unwrap();
        node.remove_container(&id).await.unwrap();
    }
    // A start that fails leaves the sandbox and the name usable.
    let mut broken = node.script("main", "");
    broken.command = vec!["/no/such/program".into()];
    let id = node.create(&pod, broken).await.unwrap();
    let error = node.start_container(&id).await.unwrap_err();
    assert!(error.message().contains("/no/such/program"), "{error}");
    let status = node.client.container_status(&id).await.unwrap();
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_eq!((status.exit_code, &*status.reason), (128, "StartError"));
    assert!(status.message.contains("/no/such/program"), "{status:?}");
    node.remove_container(&id).await.unwrap();
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    assert_eq!(node.exec(&id, "echo well").await.stdout, b"well\n");
    end(node, &pod).await;
}

#[tokio::test]
async fn containers_are_listed_by_state_and_sandbox() {
    let node = Node::start().await;
    let pod = node.pod("list").await;
    let running = node.run_script(&pod, "running", "sleep 1000").await;
    let created = node
        .create(&pod, node.script("created", "true"))
        .await
        .unwrap();
    let list = |filter: ContainerFilter| {
        let mut runtime = node.client.runtime.clone();
        async move {
            let request = ListContainersRequest {
                filter: Some(filter),
            };
            let answer = runtime.list_containers(request).await.unwrap();
            let containers = answer.into_inner().containers;
            containers.into_iter().map(|c| c.id).collect::<Vec<_>>()
        }
    };
    let in_state = |state: ContainerState| ContainerFilter {
        state: Some(ContainerStateValue {
            state: state.into(),
        }),
        ..Default::default()
    };
    assert_eq!(
        list(in_state(ContainerState::ContainerRunning)).await,
        [running]
    );
    assert_eq!(
        list(in_state(ContainerState::ContainerCreated)).await,
        [created]
    );
    let of_pod = ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    };
    assert_eq!(list(of_pod).await.len(), 2);
    end(node, &pod).await;
}
