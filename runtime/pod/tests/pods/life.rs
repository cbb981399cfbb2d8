//! The lives of pods and containers, without faults.

use std::time::{Duration, Instant};

use hull_pod::{EventKind, Pods};
use hull_spec::{
    error::ErrorKind,
    id::{ContainerId, PodId},
    info::{ContainerState, SandboxState},
};

use crate::common::{IMAGE, TestNode, container, eventually};

async fn started(pods: &Pods, pod: &PodId, name: &str, args: &[&str]) -> String {
    let id = pods
        .create_container(pod.as_str(), container(name, args))
        .await
        .unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    id.to_string()
}

#[tokio::test]
async fn a_pod_runs_a_container_and_leaves_nothing() {
    let node = TestNode::new();
    let pods = node.open().await;
    let mut events = pods.events().unwrap();

    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let info = pods.sandbox(pod.as_str()).await.unwrap();
    assert_eq!(info.state, SandboxState::Ready);
    assert_eq!(info.ips, ["10.88.0.5".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(info.guest.unwrap().kernel_release, "6.0-fake");
    assert!(info.boot.unwrap().total_us > 0);
    assert_eq!(node.vmms(), [info.vm.unwrap().pid as i32]);

    let args = ["out:hello\\nworld", "err:oops\\n", "exit:3"];
    let spec = container("app", &args);
    let id = pods
        .create_container(pod.as_str(), spec.clone())
        .await
        .unwrap();
    let created = pods.container(id.as_str()).await.unwrap();
    assert_eq!(created.state, ContainerState::Created);
    assert_eq!(
        created.image_ref,
        format!("registry.test/app@{}", created.image_id)
    );
    pods.start_container(id.as_str()).await.unwrap();
    let ended = pods.wait_container(id.as_str()).await.unwrap();
    assert_eq!(ended.state, ContainerState::Exited);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    assert!(ended.started_at_ns > 0 && ended.finished_at_ns >= ended.started_at_ns);
    let mut log = node.log("app.log");
    log.sort();
    assert_eq!(log, ["stderr F oops", "stdout F hello", "stdout P world"]);

    // A stopped container can't be started again, but another be made in its place.
    let again = pods.start_container(id.as_str()).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::FailedPrecondition);
    pods.remove_container(id.as_str()).await.unwrap();
    assert!(pods.containers().await.is_empty());
    assert_eq!(pods.vm_metrics(pod.as_str()).await.unwrap().exits[0].1, 5);
    let second = pods.create_container(pod.as_str(), spec).await.unwrap();
    assert_eq!(pods.vm_metrics(pod.as_str()).await.unwrap().exits[0].1, 6);
    assert_ne!(second, id);

    pods.stop_sandbox(pod.as_str()).await.unwrap();
    let info = pods.sandbox(pod.as_str()).await.unwrap();
    assert_eq!(info.state, SandboxState::NotReady);
    assert!(info.vm.is_none() && info.ips.is_empty());
    pods.stop_sandbox(pod.as_str()).await.unwrap();
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);

    let mut news = Vec::new();
    loop {
        let event = events.next().await.unwrap().unwrap();
        assert_eq!(event.pod(), &pod);
        // What is told with an event is of its time.
        let seen = event
            .containers()
            .find(|c| Some(&c.id) == event.container());
        news.push((
            event.kind(),
            event.container().cloned(),
            seen.map(|c| c.state),
        ));
        if event.kind() == Removed && event.container().is_none() {
            break;
        }
    }
    use ContainerState as State;
    use EventKind::{Created, Removed, Started, Stopped};
    let of = |id: &ContainerId, kind, state| (kind, Some(id.clone()), state);
    assert_eq!(
        news,
        [
            (Created, None, None),
            (Started, None, None),
            of(&id, Created, Some(State::Created)),
            of(&id, Started, Some(State::Running)),
            of(&id, Stopped, Some(State::Exited)),
            of(&id, Removed, None),
            of(&second, Created, Some(State::Created)),
            of(&second, Stopped, Some(State::Exited)),
            (Stopped, None, None),
            of(&second, Removed, None),
            (Removed, None, None),
        ]
    );
}

#[tokio::test]
async fn exec_returns_output_and_code_and_knows_its_limits() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = started(&pods, &pod, "app", &["wait"]).await;
    let words = |args: &[&str]| args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();

    let args = words(&["out:a", "err:b", "exit:7"]);
    let output = pods.exec_sync(&id, args, None).await.unwrap();
    assert_eq!(
        (output.stdout, output.stderr),
        (b"a".to_vec(), b"b".to_vec())
    );
    assert_eq!(output.exit_code, 7);

    let args = words(&["flood:17000000"]);
    let output = pods.exec_sync(&id, args, None).await.unwrap();
    assert_eq!(output.stdout.len(), 16 << 20);

    // A guest that is slow, and goes on after the end of its process was told.
    let args = words(&["flood:1000000", "sleep:300", "out:end"]);
    let output = pods.exec_sync(&id, args, None).await.unwrap();
    assert!(output.stdout.ends_with(b"xend") && output.stdout.len() == 1_000_003);

    let limit = Some(Duration::from_millis(200));
    let late = pods.exec_sync(&id, words(&["wait"]), limit).await;
    assert_eq!(late.unwrap_err().kind(), ErrorKind::DeadlineExceeded);

    let empty = pods.exec_sync(&id, Vec::new(), None).await;
    assert_eq!(empty.unwrap_err().kind(), ErrorKind::InvalidArgument);
    let unknown = pods.exec_sync("feed", words(&["x"]), None).await;
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::NotFound);

    pods.stop_container(&id, Duration::ZERO).await.unwrap();
    let stopped = pods.exec_sync(&id, words(&["x"]), None).await;
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn stop_terminates_once_and_kills_after_the_grace() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();

    let polite = started(&pods, &pod, "polite", &["wait"]).await;
    pods.stop_container(&polite, Duration::from_secs(30))
        .await
        .unwrap();
    let info = pods.container(&polite).await.unwrap();
    assert_eq!(info.exit_code, 143);

    let deaf = started(&pods, &pod, "deaf", &["trap", "wait"]).await;
    let begin = Instant::now();
    let first = pods.stop_container(&deaf, Duration::from_millis(500));
    // A client that gives up early, and two that wait.
    let gave_up = tokio::time::timeout(
        Duration::from_millis(50),
        pods.stop_container(&deaf, Duration::from_millis(400)),
    );
    let (first, gave_up) = tokio::join!(first, gave_up);
    first.unwrap();
    assert!(gave_up.is_err());
    assert!(begin.elapsed() >= Duration::from_millis(400));
    let info = pods.container(&deaf).await.unwrap();
    assert_eq!((info.exit_code, info.reason.as_str()), (137, "Error"));
    assert_eq!(node.log("deaf.log"), ["stdout F TERM"]);
    pods.stop_container(&deaf, Duration::ZERO).await.unwrap();

    let running = started(&pods, &pod, "running", &["wait"]).await;
    pods.remove_container(&running).await.unwrap();
    assert!(pods.container(&running).await.is_err());

    // A long grace period of one container does not hold up the rest of the pod.
    let slow = started(&pods, &pod, "slow", &["trap", "wait"]).await;
    let stopper = {
        let (pods, slow) = (pods.clone(), slow.clone());
        tokio::spawn(async move { pods.stop_container(&slow, Duration::from_secs(60)).await })
    };
    eventually("SIGTERM", async || {
        node.log("slow.log") == ["stdout F TERM"]
    })
    .await;
    let output = pods
        .exec_sync(&slow, vec!["out:x".into()], None)
        .await
        .unwrap();
    assert_eq!(output.stdout, b"x");
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    stopper.await.unwrap().unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn an_oom_kill_is_told_apart() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = started(&pods, &pod, "hungry", &["oom"]).await;
    let info = pods.wait_container(&id).await.unwrap();
    assert_eq!((info.exit_code, info.reason.as_str()), (137, "OOMKilled"));
    let id = started(&pods, &pod, "fine", &["exit:0"]).await;
    let info = pods.wait_container(&id).await.unwrap();
    assert_eq!((info.exit_code, info.reason.as_str()), (0, "Completed"));
}

#[tokio::test]
async fn nothing_of_a_short_and_loud_container_is_lost() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    for round in 0..20 {
        let name = format!("loud{round}");
        let id = started(&pods, &pod, &name, &["flood:100000", "out:\\nend"]).await;
        pods.wait_container(&id).await.unwrap();
        let log = node.log(&format!("{name}.log"));
        let bytes: usize = log.iter().map(|l| l.len() - "stdout F ".len()).sum();
        assert_eq!(bytes, 100_000 + 3);
        assert_eq!(log.last().unwrap(), "stdout P end");
        pods.remove_container(&id).await.unwrap();
    }
}

#[tokio::test]
async fn of_many_pods_at_once_the_first_do_not_wait_for_the_last() {
    let node = TestNode::new();
    let pods = node.open().await;
    let host_cpus = std::thread::available_parallelism().unwrap().get();
    let at_once = (2 * host_cpus).max(4);
    node.network.held.send_replace(true);
    let starts = (0..at_once + 3).map(|number| {
        let (pods, spec) = (pods.clone(), node.sandbox(&format!("pod{number}")));
        tokio::spawn(async move { pods.run_sandbox(spec).await })
    });
    let starts: Vec<_> = starts.collect();
    eventually("pods that start", async || {
        node.network.up().len() == at_once
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(node.network.up().len(), at_once);
    node.network.held.send_replace(false);
    for start in starts {
        let id = start.await.unwrap().unwrap();
        pods.remove_sandbox(id.as_str()).await.unwrap();
    }
    assert!(node.network.up().is_empty());
}

#[tokio::test]
async fn names_are_unique_and_a_retry_gets_the_same_object() {
    let node = TestNode::new();
    let pods = node.open().await;

    // The client gives up while the sandbox starts, and tries again.
    let spec = node.sandbox("web");
    let gave_up = tokio::time::timeout(Duration::from_millis(1), pods.run_sandbox(spec.clone()));
    assert!(gave_up.await.is_err());
    let mut other = spec.clone();
    other.labels.insert("a".into(), "b".into());
    let refused = pods.run_sandbox(other).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
    let (first, second) = tokio::join!(
        pods.run_sandbox(spec.clone()),
        pods.run_sandbox(spec.clone())
    );
    let pod = first.unwrap();
    assert_eq!(second.unwrap(), pod);
    assert_eq!(pods.sandboxes().await.len(), 1);
    assert_eq!(node.vmms().len(), 1);
    // Once somebody has it, the same request is a duplicate.
    let duplicate = pods.run_sandbox(spec.clone()).await.unwrap_err();
    assert_eq!(duplicate.kind(), ErrorKind::AlreadyExists);
    assert!(duplicate.to_string().contains(pod.as_str()));

    // The same for containers.
    let app = container("app", &["wait"]);
    let gave_up = tokio::time::timeout(
        Duration::from_micros(1),
        pods.create_container(pod.as_str(), app.clone()),
    );
    let _ = gave_up.await;
    let id = pods
        .create_container(pod.as_str(), app.clone())
        .await
        .unwrap();
    assert_eq!(pods.containers().await.len(), 1);
    let duplicate = pods
        .create_container(pod.as_str(), app.clone())
        .await
        .unwrap_err();
    assert_eq!(duplicate.kind(), ErrorKind::AlreadyExists);
    pods.remove_container(id.as_str()).await.unwrap();
    pods.create_container(pod.as_str(), app).await.unwrap();

    pods.remove_sandbox(pod.as_str()).await.unwrap();
    pods.run_sandbox(spec).await.unwrap();
}

#[tokio::test]
async fn ids_may_be_shortened_and_unknown_ones_are_stopped_already() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let short = &pod.as_str()[..10];
    assert_eq!(pods.sandbox(short).await.unwrap().id, pod);
    let id = started(&pods, &pod, "app", &["wait"]).await;
    assert_eq!(pods.container(&id[..8]).await.unwrap().id.as_str(), id);

    let unknown = "0123456789abcdef";
    pods.stop_sandbox(unknown).await.unwrap();
    pods.remove_sandbox(unknown).await.unwrap();
    pods.stop_container(unknown, Duration::ZERO).await.unwrap();
    pods.remove_container(unknown).await.unwrap();
    for kind in [
        pods.sandbox(unknown).await.unwrap_err().kind(),
        pods.container(unknown).await.unwrap_err().kind(),
        pods.start_container(unknown).await.unwrap_err().kind(),
        pods.create_container(unknown, container("x", &[]))
            .await
            .unwrap_err()
            .kind(),
    ] {
        assert_eq!(kind, ErrorKind::NotFound);
    }
    pods.stop_sandbox(short).await.unwrap();
    let late = pods
        .create_container(short, container("late", &["wait"]))
        .await;
    assert_eq!(late.unwrap_err().kind(), ErrorKind::FailedPrecondition);
    assert_eq!(container("x", &[]).image.image, IMAGE);
}
