//! Plugins over a real socket, in this process: they register, adjust, hang, die and lie.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use async_trait::async_trait;
use hull_proto_nri::{
    ConfigureResponse, ContainerAdjustment, KeyValue, LinuxContainerUpdate, LinuxMemory,
    LinuxResources, OptionalInt64, PLUGIN_CONNECTION, RUNTIME_CONNECTION, RUNTIME_SERVICE,
    RegisterPluginRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
    UpdateContainersRequest, UpdateContainersResponse,
};
use hull_spec::{error::PodError, field::Field};
use tokio::{
    io::AsyncWriteExt,
    sync::mpsc,
    time::{sleep, timeout},
};
use ttrpc::{
    get_status,
    proto::{Code, Status},
};

use super::*;
use crate::{
    node::Times,
    peer::{Peer, Serve},
};

const PATIENCE: Duration = Duration::from_secs(20);
const TIMES: Times = Times {
    registration: Duration::from_secs(2),
    request: Duration::from_millis(700),
};

/// A node with one pod and container, `old`, that takes note of what is asked of it.
#[derive(Debug, Default)]
struct TestNode {
    updates: Mutex<Vec<(String, i64)>>,
    evictions: Mutex<Vec<String>>,
}

#[async_trait]
impl Node for TestNode {
    async fn known(&self) -> (Vec<Pod>, Vec<Told>) {
        (vec![pod("old")], vec![container("old")])
    }

    async fn update(&self, container: &str, limits: Resources) -> Result<(), PodError> {
        if container == "none" {
            return Err(PodError::invalid(
                Field::Image,
                "there is no such container",
            ));
        }
        let update = (container.to_owned(), limits.memory_limit_bytes);
        self.updates.lock().unwrap().push(update);
        Ok(())
    }

    fn evict(&self, _: &str, container: &str, _: &str) {
        self.evictions.lock().unwrap().push(container.to_owned());
    }
}

fn pod(id: &str) -> Pod {
    Pod {
        id: id.into(),
        ..Pod::default()
    }
}

fn container(id: &str) -> Told {
    Told {
        id: id.into(),
        ..Told::default()
    }
}

struct Daemon {
    dir: tempfile::TempDir,
    node: Arc<TestNode>,
    plugins: Plugins,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            plugins: dir.path().join("plugins"),
            configs: dir.path().join("conf.d"),
            times: TIMES,
        };
        let node = Arc::new(TestNode::default());
        let plugins = Plugins::new(config, Arc::clone(&node) as Arc<dyn Node>);
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let serves = plugins.clone();
        tokio::spawn(async move { serves.serve(listener).await });
        Self { dir, node, plugins }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    async fn connected(&self, number: usize) {
        let are = async {
            while self.plugins.turn().await.len() != number {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, are).await.unwrap();
    }

    async fn create(&self, id: &str, spec: &mut ContainerSpec) -> Result<Creation, String> {
        let pod = pod("p");
        let created = self.plugins.create_container(&pod, container(id), spec);
        created.await.map_err(|refusal| refusal.to_string())
    }
}

type Answer = Result<Vec<u8>, Status>;
type Answers = Box<dyn Fn(&str, &[u8]) -> Option<Answer> + Send + Sync>;

/// A plugin that answers with what a test says, else with nothing; and tells of each call.
struct TestPlugin {
    heard: mpsc::UnboundedSender<(String, Vec<u8>)>,
    answers: Answers,
    /// Methods that it takes too long for.
    hangs: &'static str,
}

impl std::fmt::Debug for TestPlugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TestPlugin")
    }
}

#[async_trait]
impl Serve for TestPlugin {
    async fn serve(&self, _: &str, method: &str, payload: &[u8]) -> Answer {
        let _ = self.heard.send((method.to_owned(), payload.to_vec()));
        if self.hangs == method {
            sleep(PATIENCE).await;
        }
        (self.answers)(method, payload).unwrap_or(Ok(Vec::new()))
    }
}

struct Connected {
    peer: Peer,
    heard: mpsc::UnboundedReceiver<(String, Vec<u8>)>,
}

impl Connected {
    async fn next(&mut self) -> (String, Vec<u8>) {
        timeout(PATIENCE, self.heard.recv()).await.unwrap().unwrap()
    }

    async fn heard<M: Message>(&mut self, method: &str) -> M {
        let (next, payload) = self.next().await;
        assert_eq!(next, method);
        M::parse_from_bytes(&payload).unwrap()
    }
}

async fn connect(
    daemon: &Daemon,
    index: &str,
    hangs: &'static str,
    answers: impl Fn(&str, &[u8]) -> Option<Answer> + Send + Sync + 'static,
) -> Connected {
    let (told, heard) = mpsc::unbounded_channel();
    let plugin = TestPlugin {
        heard: told,
        answers: Box::new(answers),
        hangs,
    };
    let stream = UnixStream::connect(daemon.socket()).await.unwrap();
    let calls = RUNTIME_CONNECTION;
    let peer = Peer::start(stream, calls, PLUGIN_CONNECTION, Arc::new(plugin));
    let request = RegisterPluginRequest {
        plugin_name: "test".into(),
        plugin_idx: index.into(),
        ..RegisterPluginRequest::default()
    };
    let registered: Result<hull_proto_nri::Empty, _> = peer
        .call(RUNTIME_SERVICE, "RegisterPlugin", &request, PATIENCE)
        .await;
    registered.unwrap();
    Connected { peer, heard }
}

/// One that has been told what there is.
async fn joined(
    daemon: &Daemon,
    index: &str,
    hangs: &'static str,
    answers: impl Fn(&str, &[u8]) -> Option<Answer> + Send + Sync + 'static,
) -> Connected {
    let before = daemon.plugins.turn().await.len();
    let mut plugin = connect(daemon, index, hangs, answers).await;
    assert_eq!(plugin.next().await.0, "Configure");
    assert_eq!(plugin.next().await.0, "Synchronize");
    daemon.connected(before + 1).await;
    plugin
}

fn ok(message: &impl Message) -> Option<Answer> {
    Some(Ok(message.write_to_bytes().unwrap()))
}

fn sets(key: &'static str, value: &'static str) -> impl Fn(&str, &[u8]) -> Option<Answer> {
    move |method, _| {
        let variable = KeyValue {
            key: key.into(),
            value: value.into(),
            ..KeyValue::default()
        };
        let adjust = ContainerAdjustment {
            env: vec![variable],
            ..ContainerAdjustment::default()
        };
        let response = CreateContainerResponse {
            adjust: Some(adjust).into(),
            ..CreateContainerResponse::default()
        };
        (method == "CreateContainer").then(|| ok(&response))?
    }
}

fn update(container: &str, limit: i64) -> ContainerUpdate {
    let limit = OptionalInt64 {
        value: limit,
        ..OptionalInt64::default()
    };
    let memory = LinuxMemory {
        limit: Some(limit).into(),
        ..LinuxMemory::default()
    };
    let limits = LinuxResources {
        memory: Some(memory).into(),
        ..LinuxResources::default()
    };
    let linux = LinuxContainerUpdate {
        resources: Some(limits).into(),
        ..LinuxContainerUpdate::default()
    };
    ContainerUpdate {
        container_id: container.into(),
        linux: Some(linux).into(),
        ..ContainerUpdate::default()
    }
}

#[tokio::test]
async fn a_plugin_is_configured_told_what_there_is_and_asked_in_the_order_of_indices() {
    let daemon = Daemon::start();
    let mut late = joined(&daemon, "20", "", sets("B", "2")).await;
    let mut early = connect(&daemon, "10", "", sets("A", "1")).await;
    let configured: hull_proto_nri::ConfigureRequest = early.heard("Configure").await;
    assert_eq!(
        (configured.runtime_name.as_str(), configured.request_timeout),
        ("hull", 700)
    );
    let known: SynchronizeRequest = early.heard("Synchronize").await;
    assert_eq!(
        (
            known.pods[0].id.as_str(),
            known.containers[0].id.as_str(),
            known.more
        ),
        ("old", "old", false)
    );
    daemon.connected(2).await;
    let mut spec = ContainerSpec::default();
    let creation = daemon.create("c", &mut spec).await.unwrap();
    let variables = [("A", "1"), ("B", "2")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    assert_eq!(spec.env, variables);
    let asked: CreateContainerRequest = early.heard("CreateContainer").await;
    assert!(asked.container.env.is_empty());
    let asked: CreateContainerRequest = late.heard("CreateContainer").await;
    assert_eq!(asked.container.env, ["A=1"]);
    // Who comes now is told of what is being made.
    let mut third = connect(&daemon, "30", "", |_, _| None).await;
    third.next().await;
    let known: SynchronizeRequest = third.heard("Synchronize").await;
    let ids: Vec<_> = known.containers.iter().map(|it| it.id.as_str()).collect();
    assert_eq!(ids, ["old", "c"]);
    drop(creation);
    assert!(daemon.plugins.shared.making().containers.is_empty());
}

#[tokio::test]
async fn two_that_want_the_same_fail_the_container_and_hear_that_it_is_gone() {
    let daemon = Daemon::start();
    let mut one = joined(&daemon, "10", "", sets("A", "1")).await;
    let _other = joined(&daemon, "20", "", sets("A", "2")).await;
    let refused = daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap_err();
    assert_eq!(
        refused,
        "NRI plugin 20-test: Env A: plugin 10-test sets it too"
    );
    assert_eq!(one.next().await.0, "CreateContainer");
    // All events are wanted, so this too.
    assert_eq!(one.next().await.0, "RemoveContainer");
    daemon.connected(2).await;
}

#[tokio::test]
async fn a_plugin_that_hangs_is_dropped_and_the_others_count() {
    let daemon = Daemon::start();
    let hangs = joined(&daemon, "10", "CreateContainer", |_, _| None).await;
    let _good = joined(&daemon, "20", "", sets("A", "1")).await;
    let mut spec = ContainerSpec::default();
    daemon.create("c", &mut spec).await.unwrap();
    assert_eq!(spec.env.len(), 1);
    daemon.connected(1).await;
    timeout(PATIENCE, hangs.peer.closed()).await.unwrap();
}

#[tokio::test]
async fn a_plugin_that_dies_in_a_call_or_answers_garbage_is_dropped() {
    let daemon = Daemon::start();
    let dies = joined(&daemon, "10", "RunPodSandbox", |_, _| None).await;
    let run = daemon.plugins.run_pod(pod("p"));
    let dies = async move {
        let mut dies = dies;
        assert_eq!(dies.next().await.0, "RunPodSandbox");
        drop(dies);
    };
    let (ran, ()) = tokio::join!(run, dies);
    ran.unwrap();
    daemon.connected(0).await;
    let _garbage = joined(&daemon, "10", "", |method, _| {
        (method == "CreateContainer").then(|| Ok(vec![0xff; 9]))
    })
    .await;
    daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap();
    daemon.connected(0).await;
}

#[tokio::test]
async fn who_does_not_register_or_speaks_something_else_holds_nobody_up() {
    let daemon = Daemon::start();
    let silent = UnixStream::connect(daemon.socket()).await.unwrap();
    let mut other = UnixStream::connect(daemon.socket()).await.unwrap();
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _good = joined(&daemon, "10", "", sets("A", "1")).await;
    daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap();
    for stream in [silent, other] {
        let ended = async {
            let mut byte = [0];
            stream.readable().await.unwrap();
            stream.try_read(&mut byte)
        };
        assert!(!matches!(timeout(PATIENCE, ended).await.unwrap(), Ok(1)));
    }
    daemon.connected(1).await;
}

#[tokio::test]
async fn who_subscribes_to_what_there_is_not_or_does_not_take_parts_is_no_plugin() {
    let daemon = Daemon::start();
    for answer in [1 << 14, 1 << 30] {
        let wrong = move |method: &str, _: &[u8]| {
            let response = ConfigureResponse {
                events: answer,
                ..ConfigureResponse::default()
            };
            (method == "Configure").then(|| ok(&response))?
        };
        let plugin = connect(&daemon, "10", "", wrong).await;
        timeout(PATIENCE, plugin.peer.closed()).await.unwrap();
    }
    let hangs = connect(&daemon, "10", "Synchronize", |_, _| None).await;
    timeout(PATIENCE, hangs.peer.closed()).await.unwrap();
    daemon.connected(0).await;
}

#[tokio::test]
async fn only_what_is_subscribed_to_is_told_and_a_refusal_counts() {
    let daemon = Daemon::start();
    let mut plugin = joined(&daemon, "10", "", |method, _| match method {
        "Configure" => ok(&ConfigureResponse {
            events: 1 << (Event::RUN_POD_SANDBOX as i32 - 1)
                | 1 << (Event::STOP_CONTAINER as i32 - 1),
            ..ConfigureResponse::default()
        }),
        "RunPodSandbox" => Some(Err(get_status(Code::UNKNOWN, "not\nthis one"))),
        _ => None,
    })
    .await;
    daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap();
    let refused = daemon.plugins.run_pod(pod("p")).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "NRI plugin 10-test: RunPodSandbox: not this one"
    );
    assert!(daemon.plugins.shared.making().pods.is_empty());
    assert_eq!(plugin.next().await.0, "RunPodSandbox");
    for _ in 0..2 {
        daemon
            .plugins
            .stop_container(&pod("p"), &container("c"))
            .await;
    }
    daemon
        .plugins
        .remove_container(&pod("p"), &container("c"))
        .await;
    // News that are late.
    daemon
        .plugins
        .stop_container(&pod("p"), &container("c"))
        .await;
    assert_eq!(plugin.next().await.0, "StopContainer");
    drop(daemon);
    assert!(plugin.heard.try_recv().is_err(), "the end is told once");
}

#[tokio::test]
async fn an_older_plugin_hears_of_events_by_its_one_method() {
    let daemon = Daemon::start();
    let mut plugin = joined(&daemon, "10", "", |method, _| {
        let old = ["Configure", "Synchronize", "CreateContainer", "StateChange"];
        (!old.contains(&method)).then(|| Err(get_status(Code::UNIMPLEMENTED, "")))
    })
    .await;
    daemon.plugins.run_pod(pod("p")).await.unwrap();
    assert_eq!(plugin.next().await.0, "RunPodSandbox");
    let change: StateChangeEvent = plugin.heard("StateChange").await;
    assert_eq!(change.event.unwrap(), Event::RUN_POD_SANDBOX);
    // From now on at once.
    daemon.plugins.run_pod(pod("q")).await.unwrap();
    let change: StateChangeEvent = plugin.heard("StateChange").await;
    assert_eq!(change.pod.id, "q");
    // And a method that can answer, it does without.
    daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap();
}

#[tokio::test]
async fn other_containers_are_updated_and_evicted() {
    let daemon = Daemon::start();
    let plugin = joined(&daemon, "10", "", |method, payload| match method {
        "Synchronize" => ok(&SynchronizeResponse {
            update: vec![update("old", 1)],
            ..SynchronizeResponse::default()
        }),
        "CreateContainer" => {
            let asked = CreateContainerRequest::parse_from_bytes(payload).unwrap();
            let other = if asked.container.id == "bad" {
                "none"
            } else {
                "old"
            };
            ok(&CreateContainerResponse {
                update: vec![update(other, 2)],
                ..CreateContainerResponse::default()
            })
        }
        "UpdateContainer" => ok(&UpdateContainerResponse {
            update: vec![update("c", 7), update("old", 3)],
            ..UpdateContainerResponse::default()
        }),
        _ => None,
    })
    .await;
    daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap();
    let refused = daemon
        .create("bad", &mut ContainerSpec::default())
        .await
        .unwrap_err();
    assert!(refused.contains("update of container none"), "{refused}");
    let mut limits = Resources::default();
    let (pod, c) = (pod("p"), container("c"));
    let updated = daemon.plugins.update_container(&pod, &c, &mut limits);
    updated.await.unwrap();
    assert_eq!(limits.memory_limit_bytes, 7);
    // And when it wants to.
    let request = UpdateContainersRequest {
        update: vec![update("old", 4), update("none", 5)],
        evict: vec![hull_proto_nri::ContainerEviction {
            container_id: "old".into(),
            ..Default::default()
        }],
        ..UpdateContainersRequest::default()
    };
    let answer: UpdateContainersResponse = plugin
        .peer
        .call(RUNTIME_SERVICE, "UpdateContainers", &request, PATIENCE)
        .await
        .unwrap();
    let failed: Vec<_> = answer
        .failed
        .iter()
        .map(|it| it.container_id.as_str())
        .collect();
    assert_eq!(failed, ["none"]);
    let old = |limit| ("old".to_owned(), limit);
    assert_eq!(
        *daemon.node.updates.lock().unwrap(),
        [old(1), old(2), old(3), old(4)]
    );
    assert_eq!(*daemon.node.evictions.lock().unwrap(), ["old"]);
}

#[tokio::test]
async fn a_validator_sees_what_all_made_of_it_and_may_refuse() {
    let daemon = Daemon::start();
    let mut adjusts = joined(&daemon, "10", "", sets("A", "1")).await;
    let validates = |method: &str, _: &[u8]| match method {
        "Configure" => ok(&ConfigureResponse {
            events: 1 << (Event::VALIDATE_CONTAINER_ADJUSTMENT as i32 - 1),
            ..ConfigureResponse::default()
        }),
        "ValidateContainerAdjustment" => ok(&ValidateContainerAdjustmentResponse {
            reject: true,
            reason: "not that".into(),
            ..ValidateContainerAdjustmentResponse::default()
        }),
        _ => None,
    };
    let mut validator = joined(&daemon, "20", "", validates).await;
    let refused = daemon
        .create("c", &mut ContainerSpec::default())
        .await
        .unwrap_err();
    assert_eq!(
        refused,
        "NRI plugin 20-test: ValidateContainerAdjustment: not that"
    );
    let asked: ValidateContainerAdjustmentRequest =
        validator.heard("ValidateContainerAdjustment").await;
    assert_eq!(asked.adjust.env[0].key, "A");
    let owner = &asked.owners.owners["c"].compound[&6].owners["A"];
    assert_eq!(
        (owner.as_str(), asked.plugins[0].index.as_str()),
        ("10-test", "10")
    );
    assert_eq!(adjusts.next().await.0, "CreateContainer");
}

#[tokio::test]
async fn an_installed_plugin_is_started_with_its_configuration_and_ends_with_its_connection() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| dir.path().join(name);
    std::fs::create_dir(of("plugins")).unwrap();
    // Says that it is there, and nothing that a plugin would: it is ended.
    let script = format!(
        "#!/bin/sh\necho $NRI_PLUGIN_NAME $NRI_PLUGIN_IDX $NRI_PLUGIN_SOCKET >{0}.new; mv {0}.new {0}; exec /bin/sleep 1000\n",
        of("ran").display()
    );
    let path = of("plugins/05-it");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = Config {
        plugins: of("plugins"),
        configs: of("conf.d"),
        times: TIMES,
    };
    let plugins = Plugins::new(config, Arc::new(TestNode::default()));
    let listener = UnixListener::bind(of("s")).unwrap();
    let serves = plugins.clone();
    tokio::spawn(async move { serves.serve(listener).await });
    let ran = async {
        loop {
            if let Ok(text) = std::fs::read_to_string(of("ran")) {
                return text;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert_eq!(timeout(PATIENCE, ran).await.unwrap(), "it 05 0\n");
    let free = async {
        while plugins.shared.connections.available_permits() < CONNECTIONS {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, free).await.unwrap();
}

/// All of the plugins' calls come in one order, however many ask at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_events_at_once_are_told_in_one_order() {
    let daemon = Daemon::start();
    let mut one = joined(&daemon, "10", "", |_, _| None).await;
    let mut two = joined(&daemon, "20", "", |_, _| None).await;
    let all = (0..20).map(|n| {
        let plugins = daemon.plugins.clone();
        tokio::spawn(async move {
            let container = container(&n.to_string());
            plugins
                .start_container(&pod("p"), &container)
                .await
                .unwrap();
        })
    });
    for task in all.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    let mut orders: HashMap<usize, Vec<String>> = HashMap::new();
    for (n, plugin) in [&mut one, &mut two].into_iter().enumerate() {
        for _ in 0..20 {
            let asked: StartContainerRequest = plugin.heard("StartContainer").await;
            orders
                .entry(n)
                .or_default()
                .push(asked.container.id.clone());
        }
    }
    assert_eq!(orders[&0], orders[&1]);
}
