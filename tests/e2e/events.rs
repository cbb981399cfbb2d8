//! Events of pods and containers, as followers get them.

use std::time::Duration;

use hull_proto_cri::v1::{
    ContainerEventResponse, ContainerEventType as Type, ContainerState, GetEventsRequest,
    PodSandboxState,
};
use tonic::Streaming;

use crate::harness::{Node, Pod};

const PATIENCE: Duration = Duration::from_secs(60);
use Type::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
    ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
};

type Events = Streaming<ContainerEventResponse>;

async fn follow(node: &Node) -> Events {
    let mut client = node.client.runtime.clone();
    let events = client.get_container_events(GetEventsRequest {}).await;
    events.unwrap().into_inner()
}

/// Reads up to the end of a sandbox.
async fn until_deleted(events: &mut Events, pod: &str) -> Vec<ContainerEventResponse> {
    let mut all = Vec::new();
    loop {
        let event = tokio::time::timeout(PATIENCE, events.message()).await;
        let event = event.unwrap().unwrap().unwrap();
        let last = event.container_id == pod && event.container_event_type() == Deleted;
        all.push(event);
        if last {
            return all;
        }
    }
}

fn kinds(events: &[ContainerEventResponse]) -> Vec<(&str, Type)> {
    let kind = |e: &ContainerEventResponse| e.container_event_type();
    events
        .iter()
        .map(|e| (e.container_id.as_str(), kind(e)))
        .collect()
}

async fn life(node: &Node, name: &str) -> (Pod, String) {
    let pod = node.pod(name).await;
    let id = node.run_script(&pod, name, "sleep 1000").await;
    node.stop_container(&id, 0).await.unwrap();
    node.remove_container(&id).await.unwrap();
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    (pod, id)
}

#[tokio::test]
async fn a_life_is_told_in_order_to_every_client_also_to_one_that_is_slow() {
    let node = Node::start().await;
    let (mut fast, mut slow) = (follow(&node).await, follow(&node).await);
    let reader = tokio::spawn(async move {
        let mut all = Vec::new();
        // Ends with the daemon.
        while let Some(event) = fast.message().await.unwrap() {
            all.push(event);
        }
        all
    });
    // One client that leaves costs the others nothing.
    drop(follow(&node).await);
    let (pod, id) = life(&node, "first").await;
    // It reads only now, and what it gets is of the time of the event.
    let seen = until_deleted(&mut slow, &pod.id).await;
    let (p, c) = (pod.id.as_str(), id.as_str());
    assert_eq!(
        kinds(&seen),
        [
            (p, Created),
            (p, Started),
            (c, Created),
            (c, Started),
            (c, Stopped),
            (c, Deleted),
            (p, Stopped),
            (p, Deleted),
        ]
    );
    let states: Vec<_> = seen
        .iter()
        .map(|event| {
            let pod = event.pod_sandbox_status.as_ref().unwrap();
            assert_eq!(pod.metadata, pod_metadata(&pod.id, p, &seen));
            let containers = event.containers_statuses.iter();
            (
                pod.state(),
                containers.map(|c| c.state()).collect::<Vec<_>>(),
            )
        })
        .collect();
    use ContainerState::{ContainerCreated, ContainerExited, ContainerRunning};
    use PodSandboxState::{SandboxNotready, SandboxReady};
    assert_eq!(
        states,
        [
            (SandboxReady, vec![]),
            (SandboxReady, vec![]),
            (SandboxReady, vec![ContainerCreated]),
            (SandboxReady, vec![ContainerRunning]),
            (SandboxReady, vec![ContainerExited]),
            (SandboxReady, vec![]),
            (SandboxNotready, vec![]),
            (SandboxNotready, vec![]),
        ]
    );
    let times: Vec<_> = seen.iter().map(|e| e.created_at).collect();
    assert!(times.is_sorted() && times[0] > 0, "{times:?}");
    let exit = &seen[4].containers_statuses[0];
    assert_eq!((exit.exit_code, &*exit.reason), (137, "Error"));

    // SIGTERM: streams end without an error.
    let pid = node.daemon.pid().to_string();
    let killed = std::process::Command::new("kill")
        .args(["-TERM", &pid])
        .status();
    assert!(killed.unwrap().success());
    assert_eq!(slow.message().await.unwrap(), None);
    let all = reader.await.unwrap();
    assert_eq!(kinds(&all), kinds(&seen));
    assert_eq!(all, seen);
}

fn pod_metadata(
    id: &str,
    pod: &str,
    events: &[ContainerEventResponse],
) -> Option<hull_proto_cri::v1::PodSandboxMetadata> {
    assert_eq!(id, pod);
    events[0]
        .pod_sandbox_status
        .as_ref()
        .unwrap()
        .metadata
        .clone()
}

#[tokio::test]
async fn ends_that_nobody_asked_for_are_told() {
    let node = Node::start().await;
    let mut events = follow(&node).await;
    let pod = node.pod("ends").await;
    let quick = node.run_script(&pod, "quick", "exit 3").await;
    node.client.wait_exited(&quick, PATIENCE).await.unwrap();
    let mut config = node.script("broken", "");
    config.command = vec!["/no/such/program".into()];
    let broken = node.create(&pod, config).await.unwrap();
    node.start_container(&broken).await.unwrap_err();
    let victim = node.run_script(&pod, "victim", "sleep 1000").await;
    let vmm = node.vmms()[0].to_string();
    let killed = std::process::Command::new("kill")
        .args(["-9", &vmm])
        .status();
    assert!(killed.unwrap().success());
    node.client.wait_exited(&victim, PATIENCE).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();

    let seen = until_deleted(&mut events, &pod.id).await;
    let of = |id: &str| {
        let all = kinds(&seen).into_iter().filter(|(of, _)| *of == id);
        all.map(|(_, kind)| kind).collect::<Vec<_>>()
    };
    assert_eq!(of(&quick), [Created, Started, Stopped, Deleted]);
    assert_eq!(of(&broken), [Created, Stopped, Deleted]);
    assert_eq!(of(&victim), [Created, Started, Stopped, Deleted]);
    let sandbox = of(&pod.id);
    assert_eq!(sandbox.first(), Some(&Created));
    assert_eq!(sandbox.last(), Some(&Deleted));
    assert!(sandbox.contains(&Stopped));
    node.finish().await;
}

#[tokio::test]
async fn a_client_follows_the_next_daemon_too() {
    let mut node = Node::start().await;
    let pod = node.pod("again").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let mut before = follow(&node).await;
    node.client = node.daemon.kill_and_restart().await;
    // A daemon that was killed can't say that it ends.
    before.message().await.unwrap_err();
    let mut events = follow(&node).await;
    node.stop_container(&id, 0).await.unwrap();
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    let seen = until_deleted(&mut events, &pod.id).await;
    let (p, c) = (pod.id.as_str(), id.as_str());
    assert_eq!(
        kinds(&seen),
        [(c, Stopped), (p, Stopped), (c, Deleted), (p, Deleted)]
    );
    node.finish().await;
}
