//! Exact semantics of starts, stops and ends.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ContainerConfig, ContainerFilter, ContainerState, ContainerStateValue, ContainerStatus,
    CreateContainerRequest, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, ListContainersRequest, ListPodSandboxRequest, NamespaceMode,
    NamespaceOption, RunPodSandboxRequest, Signal, StopContainerRequest,
};
use hull_tests::client::{image, map};
use tokio::time::timeout;

use crate::harness::{BUSYBOX, Node, Pod};

const PATIENCE: Duration = Duration::from_secs(120);

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

async fn sandboxes(node: &Node) -> Vec<String> {
    let mut runtime = node.client.runtime.clone();
    let answer = runtime.list_pod_sandbox(ListPodSandboxRequest::default());
    let items = answer.await.unwrap().into_inner().items;
    items.into_iter().map(|pod| pod.id).collect()
}

async fn containers(node: &Node, filter: ContainerFilter) -> Vec<String> {
    let request = ListContainersRequest {
        filter: Some(filter),
    };
    let mut runtime = node.client.runtime.clone();
    let answer = runtime.list_containers(request).await.unwrap();
    let found = answer.into_inner().containers;
    found.into_iter().map(|c| c.id).collect()
}

#[tokio::test]
async fn a_client_that_gave_up_gets_the_same_objects_later() {
    let node = Node::start().await;
    node.client.pull(BUSYBOX).await.unwrap();
    let config = node.sandbox("patient");
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    };
    let mut runtime = node.client.runtime.clone();
    // A VM does not boot in this time.
    let short = Duration::from_millis(50);
    let first = timeout(short, runtime.run_pod_sandbox(request.clone())).await;
    assert!(first.is_err(), "{first:?}");
    let second = timeout(short, runtime.run_pod_sandbox(request.clone())).await;
    assert!(second.is_err(), "{second:?}");
    let answer = runtime.run_pod_sandbox(request.clone()).await.unwrap();
    let id = answer.into_inner().pod_sandbox_id;
    assert_eq!(sandboxes(&node).await, [id.as_str()]);
    assert_eq!(node.vmms().len(), 1);
    // The name is taken now: somebody has got it.
    let again = runtime.run_pod_sandbox(request).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::AlreadyExists, "{again}");
    let pod = Pod { id, config };

    let request = CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(node.script("main", "echo once; sleep 1000")),
        sandbox_config: Some(pod.config.clone()),
    };
    let first = timeout(
        Duration::from_millis(2),
        runtime.create_container(request.clone()),
    );
    assert!(first.await.is_err());
    let answer = runtime.create_container(request).await.unwrap();
    let id = answer.into_inner().container_id;
    let all = containers(&node, ContainerFilter::default()).await;
    assert_eq!(all, [id.as_str()]);
    node.start_container(&id).await.unwrap();
    node.wait_log("main", "once\n").await;
    end(node, &pod).await;
}

#[tokio::test]
async fn names_are_free_again_after_a_removal_and_annotations_come_back() {
    let node = Node::start().await;
    let pod = node.pod("names").await;
    let config = || ContainerConfig {
        labels: map(&[("app", "a")]),
        annotations: map(&[("note", "{\"kept\": \"as it is\"}\n")]),
        ..node.script("main", "sleep 1000")
    };
    let first = node.create(&pod, config()).await.unwrap();
    let taken = node.create(&pod, config()).await.unwrap_err();
    assert_eq!(taken.code(), tonic::Code::AlreadyExists, "{taken}");
    let status = node.client.container_status(&first).await.unwrap();
    assert_eq!(status.annotations, config().annotations);
    assert_eq!(status.labels, config().labels);
    node.remove_container(&first).await.unwrap();
    let second = node.create(&pod, config()).await.unwrap();
    assert_ne!(first, second);

    // Filters are joined by "and".
    let other = ContainerConfig {
        labels: map(&[("app", "b")]),
        ..node.script("other", "sleep 1000")
    };
    let other = node.create(&pod, other).await.unwrap();
    node.start_container(&other).await.unwrap();
    let filter = |state: ContainerState, app: &str, id: &str| ContainerFilter {
        id: id.into(),
        state: Some(ContainerStateValue {
            state: state.into(),
        }),
        pod_sandbox_id: pod.id.clone(),
        label_selector: map(&[("app", app)]),
    };
    let (created, running) = (
        ContainerState::ContainerCreated,
        ContainerState::ContainerRunning,
    );
    let found = containers(&node, filter(created, "a", "")).await;
    assert_eq!(found, [second.as_str()]);
    let found = containers(&node, filter(running, "b", &other[..12])).await;
    assert_eq!(found, [other.as_str()]);
    for none in [
        filter(running, "a", ""),
        filter(created, "b", ""),
        filter(created, "a", &other),
    ] {
        assert!(containers(&node, none).await.is_empty());
    }

    // Whatever is not there is stopped and removed already.
    for id in [first.as_str(), "feedfeedfeed"] {
        node.stop_container(id, 1).await.unwrap();
        node.remove_container(id).await.unwrap();
        node.stop_sandbox(id).await.unwrap();
        node.remove_sandbox(id).await.unwrap();
    }
    node.remove_container(&other).await.unwrap();
    end(node, &pod).await;
}

#[tokio::test]
async fn a_grace_is_kept_when_the_client_gives_up_and_the_daemon_dies() {
    let mut node = Node::start().await;
    let pod = node.pod("grace").await;
    let deaf = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done";
    let id = node.run_script(&pod, "deaf", deaf).await;
    node.wait_log("deaf", "ready\n").await;

    let request = StopContainerRequest {
        container_id: id.clone(),
        timeout: 8,
    };
    let begin = Instant::now();
    let mut runtime = node.client.runtime.clone();
    let stop = timeout(Duration::from_millis(500), runtime.stop_container(request));
    assert!(stop.await.is_err());
    node.wait_log("deaf", "ready\nasked\n").await;
    node.client = node.daemon.kill_and_restart().await;
    let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(8));
    assert_eq!((status.exit_code, &*status.reason), (137, "Error"));
    assert_eq!(node.log("deaf"), "ready\nasked\n");
    end(node, &pod).await;
}

#[tokio::test]
async fn a_container_is_stopped_with_its_own_signal() {
    let node = Node::start().await;
    let pod = node.pod("signals").await;
    for (name, signal, number) in [
        ("usr1", Signal::Sigusr1, 10),
        ("rtmin3", Signal::Sigrtminplus3, 37),
    ] {
        let script = format!(
            "trap 'echo got; exit 4' {number}; trap 'echo wrong' TERM; echo ready
             while :; do sleep 0.1; done"
        );
        let config = ContainerConfig {
            stop_signal: signal.into(),
            ..node.script(name, &script)
        };
        let id = node.create(&pod, config).await.unwrap();
        node.start_container(&id).await.unwrap();
        node.wait_log(name, "ready\n").await;
        let status = node.client.container_status(&id).await.unwrap();
        assert_eq!(status.stop_signal(), signal);
        node.stop_container(&id, 100).await.unwrap();
        let status = node.client.container_status(&id).await.unwrap();
        assert_eq!(status.exit_code, 4, "{name}");
        assert_eq!(node.log(name), "ready\ngot\n");
    }

    // Without one in the request it is the image's.
    let static_image = "registry.test/demo/static:latest";
    node.client.pull(static_image).await.unwrap();
    let script = "trap 'echo got; exit 4' 37; echo ready; while :; do sleep 0.1; done";
    let config = ContainerConfig {
        image: Some(image(static_image)),
        command: ["/bin/busybox", "sh", "-c", script]
            .map(String::from)
            .to_vec(),
        ..node.script("image", "")
    };
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    node.wait_log("image", "ready\n").await;
    let status = node.client.container_status(&id).await.unwrap();
    assert_eq!(status.stop_signal(), Signal::Sigrtminplus3);
    node.stop_container(&id, 100).await.unwrap();
    assert_eq!(node.log("image"), "ready\ngot\n");
    end(node, &pod).await;
}

/// A container that sees all processes of the guest.
async fn observer(node: &Node, pod: &Pod) -> String {
    let context = LinuxContainerSecurityContext {
        privileged: true,
        namespace_options: Some(NamespaceOption {
            pid: NamespaceMode::Node.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let config = ContainerConfig {
        linux: Some(LinuxContainerConfig {
            security_context: Some(context),
            ..Default::default()
        }),
        ..node.script("observer", "sleep 1000")
    };
    let id = node.create(pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    id
}

async fn privileged_pod(node: &Node, name: &str) -> Pod {
    use hull_proto_cri::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext};
    node.client.pull(BUSYBOX).await.unwrap();
    let mut config = node.sandbox(name);
    config.linux = Some(LinuxPodSandboxConfig {
        security_context: Some(LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    node.run_sandbox(config).await.unwrap()
}

#[tokio::test]
async fn nothing_outlives_its_container() {
    let node = Node::start().await;
    let pod = privileged_pod(&node, "leftovers").await;
    let observer = observer(&node, &pod).await;
    let script = "(setsid sleep 777 &); sh -c 'trap : TERM HUP; setsid sleep 778 & sleep 779' &
                  trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done";
    let seen = async || {
        let answer = node.exec(&observer, "ps | grep 'sleep 77[789]'").await;
        String::from_utf8(answer.stdout).unwrap()
    };
    for (name, grace) in [("asked", 100), ("killed", 0)] {
        let id = node.run_script(&pod, name, script).await;
        node.wait_log(name, "up\n").await;
        let deadline = Instant::now() + PATIENCE;
        while seen().await.lines().count() < 3 {
            assert!(Instant::now() < deadline, "{}", seen().await);
        }
        node.stop_container(&id, grace).await.unwrap();
        assert_eq!(seen().await, "", "{name}");
        let status = node.client.container_status(&id).await.unwrap();
        let expected = if grace == 0 { 137 } else { 0 };
        assert_eq!(status.exit_code, expected, "{name}");
    }
    end(node, &pod).await;
}

#[tokio::test]
async fn lack_of_memory_is_told_apart_when_much_happens_at_once() {
    let node = Node::start().await;
    let pod = node.pod("memory").await;
    let limited = |name: &str, script: &str| ContainerConfig {
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: 15 << 20,
                memory_swap_limit_in_bytes: 15 << 20,
                ..Default::default()
            }),
            security_context: None,
        }),
        ..node.script(name, script)
    };
    let wait = "until [ -e /dev/shm/go ]; do sleep 0.05; done; ";
    let mut wanted = Vec::new();
    for n in 0..3 {
        for (kind, script, code, reason) in [
            (
                "hungry",
                "dd if=/dev/zero of=/dev/null bs=60M",
                137,
                "OOMKilled",
            ),
            ("killed", "kill -9 $$", 137, "Error"),
            ("fine", "exit 0", 0, "Completed"),
        ] {
            let name = format!("{kind}{n}");
            let config = limited(&name, &format!("{wait}{script}"));
            let id = node.create(&pod, config).await.unwrap();
            node.start_container(&id).await.unwrap();
            wanted.push((id, name, code, reason));
        }
    }
    let trigger = node.run_script(&pod, "trigger", "sleep 1000").await;
    node.exec(&trigger, "touch /dev/shm/go").await;
    for (id, name, code, reason) in wanted {
        let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
        assert_eq!(
            (status.exit_code, &*status.reason),
            (code, reason),
            "{name}"
        );
    }
    end(node, &pod).await;
}

async fn short_container(node: &Node, pod: &Pod, n: usize) -> (String, ContainerStatus) {
    let name = format!("short{n}");
    // The last line has no end.
    let script = format!(
        "i=0; while [ $i -lt 50 ]; do echo {n} line $i; i=$((i+1)); done; \
         echo {n} oops >&2; printf '{n} end'; exit {}",
        n % 7
    );
    let id = node.run_script(pod, &name, &script).await;
    let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
    node.remove_container(&id).await.unwrap();
    (name, status)
}

#[tokio::test]
async fn many_short_containers_lose_nothing() {
    use hull_tests::logs::{Stream, output};
    let node = Node::start().await;
    let pod = node.pod("short").await;
    let mut ids = BTreeSet::new();
    for round in 0..6 {
        let four = (0..4).map(|k| short_container(&node, &pod, round * 4 + k));
        for (k, (name, status)) in futures::future::join_all(four)
            .await
            .into_iter()
            .enumerate()
        {
            let n = round * 4 + k;
            assert_eq!(status.exit_code, (n % 7) as i32);
            assert!(ids.insert(status.id));
            let log = std::fs::read(node.dir.join("logs").join(format!("{name}.log"))).unwrap();
            let mut expected: String = (0..50).map(|i| format!("{n} line {i}\n")).collect();
            expected.push_str(&format!("{n} end"));
            let out = output(&log, Stream::Stdout).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), expected, "{name}");
            let err = output(&log, Stream::Stderr).unwrap();
            assert_eq!(String::from_utf8(err).unwrap(), format!("{n} oops\n"));
        }
    }
    assert_eq!(ids.len(), 24);
    end(node, &pod).await;
}
