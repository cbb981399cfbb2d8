//! Pods that another runtime has, which is another `hull serve` here.

use std::time::{Duration, Instant};

use hull_proto_cri::v1::*;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tonic::{Code, Status};

use crate::{Daemon, registry, sandbox};

/// A node with another runtime behind the handler `other`, and an image that only the node has, though both could.
struct Node {
    node: Daemon,
    other: Daemon,
    image: String,
    registry: registry::Registry,
}

impl Node {
    async fn start() -> Option<Self> {
        Self::start_with("", "").await
    }

    /// With settings of the other one and of the node.
    async fn start_with(theirs: &str, ours: &str) -> Option<Self> {
        let other = Daemon::start_with(theirs).await?;
        let socket = other.dir.path().join("state/hull.sock");
        let settings = format!(
            "{ours}delegate_host_pods = 'other'\nhandlers.other.delegate = '{}'\n",
            socket.display()
        );
        let node = Daemon::start_with(&settings).await?;
        let own = registry::serve(node.child.id(), "user", "password");
        let registry = registry::serve_at(other.child.id(), own.address, "user", "password");
        let image = format!("{}/app:1", own.address);
        Some(Self {
            node,
            other,
            image,
            registry,
        })
    }

    fn signal(&self, signal: Signal) {
        let pid = self.other.child.id().try_into().unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    async fn run(&self, name: &str, handler: &str) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(sandbox(name)),
            runtime_handler: handler.into(),
        };
        let run = self.node.client.clone().run_pod_sandbox(request).await;
        Ok(run?.into_inner().pod_sandbox_id)
    }

    /// Names and handlers of the pods, and states of the containers.
    async fn listed(&self, daemon: &Daemon) -> Vec<String> {
        let mut client = daemon.client.clone();
        let pods = client.list_pod_sandbox(ListPodSandboxRequest::default());
        let pods = pods.await.unwrap().into_inner().items;
        let name =
            |pod: PodSandbox| format!("{} {}", pod.metadata.unwrap().name, pod.runtime_handler);
        let mut all: Vec<_> = pods.into_iter().map(name).collect();
        let containers = client.list_containers(ListContainersRequest::default());
        let containers = containers.await.unwrap().into_inner().containers;
        all.extend(
            containers
                .iter()
                .map(|one| one.state().as_str_name().to_owned()),
        );
        all
    }

    async fn pull(&self, sandbox_config: Option<PodSandboxConfig>) {
        let request = PullImageRequest {
            image: Some(named(&self.image)),
            auth: Some(AuthConfig {
                username: "user".into(),
                password: "password".into(),
                ..Default::default()
            }),
            sandbox_config,
        };
        self.node.images.clone().pull_image(request).await.unwrap();
    }

    async fn images(&self, daemon: &Daemon) -> usize {
        let mut client = daemon.images.clone();
        let listed = client.list_images(ListImagesRequest::default()).await;
        listed.unwrap().into_inner().images.len()
    }

    /// A container that runs; the id is how kubelet names an image that it found.
    async fn container(&self, pod: &str, name: &str, id: &str, args: &[&str]) -> String {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "main".into(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                user_specified_image: self.image.clone(),
                ..named(id)
            }),
            args: args.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config: Some(sandbox(name)),
        };
        let mut client = self.node.client.clone();
        let created = client.create_container(request).await.unwrap();
        let container_id = created.into_inner().container_id;
        let request = StartContainerRequest {
            container_id: container_id.clone(),
        };
        client.start_container(request).await.unwrap();
        container_id
    }

    async fn image_id(&self) -> String {
        let request = ImageStatusRequest {
            image: Some(named(&self.image)),
            verbose: false,
        };
        let status = self.node.images.clone().image_status(request).await;
        status.unwrap().into_inner().image.unwrap().id
    }

    async fn delegates_are_ready(&self) -> bool {
        let mut client = self.node.client.clone();
        let status = client.status(StatusRequest::default()).await;
        let conditions = status.unwrap().into_inner().status.unwrap().conditions;
        let mut conditions = conditions.into_iter();
        conditions
            .find(|one| one.r#type == "DelegatesReady")
            .unwrap()
            .status
    }
}

fn named(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_socket_has_the_pods_of_two_runtimes() {
    let Some(it) = Node::start().await else {
        return;
    };
    let mut client = it.node.client.clone();
    let events = client.get_container_events(GetEventsRequest {}).await;
    let mut events = events.unwrap().into_inner();
    let vm = it.run("vm", "").await.unwrap();
    let system = it.run("system", "other").await.unwrap();
    assert_eq!(it.listed(&it.node).await, ["vm ", "system other"]);
    assert_eq!(it.listed(&it.other).await, ["system "]);
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: system[..12].into(),
        verbose: true,
    };
    let status = client
        .pod_sandbox_status(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(status.status.unwrap().runtime_handler, "other");
    assert!(status.info["delegate"].contains("hull.sock"));
    let filter = PodSandboxFilter {
        id: system.clone(),
        ..Default::default()
    };
    let request = ListPodSandboxRequest {
        filter: Some(filter),
    };
    let found = client
        .list_pod_sandbox(request)
        .await
        .unwrap()
        .into_inner()
        .items;
    assert_eq!(found.len(), 1);
    let mut told = Vec::new();
    while told.len() < 2 {
        let event = events.message().await.unwrap().unwrap();
        let status = event.pod_sandbox_status.unwrap();
        if !told.contains(&status.id) {
            told.push(status.id);
        }
    }
    assert!(told.contains(&vm) && told.contains(&system), "{told:?}");

    // The image is the node's; the other runtime pulls it as it was pulled when it needs it.
    it.pull(Some(sandbox("vm"))).await;
    assert_eq!(
        (it.images(&it.node).await, it.images(&it.other).await),
        (1, 0)
    );
    let id = it.image_id().await;
    let mine = it.container(&vm, "vm", &id, &["out:vm", "wait"]).await;
    let theirs = it
        .container(&system, "system", &id, &["out:system", "wait"])
        .await;
    assert!(it.registry.was_let_in());
    assert_eq!(
        (it.images(&it.node).await, it.images(&it.other).await),
        (1, 1)
    );
    let running = "CONTAINER_RUNNING";
    let all = ["vm ", "system other", running, running];
    assert_eq!(it.listed(&it.node).await, all);
    for (container, word) in [(&mine, "a"), (&theirs, "b")] {
        let request = ExecSyncRequest {
            container_id: container.clone(),
            cmd: vec![format!("out:{word}")],
            timeout: 30,
        };
        let said = client.exec_sync(request).await.unwrap().into_inner();
        assert_eq!(said.stdout, word.as_bytes());
    }
    let stats = client
        .list_container_stats(ListContainerStatsRequest::default())
        .await;
    assert_eq!(stats.unwrap().into_inner().stats.len(), 2);
    let stats = client
        .list_pod_sandbox_stats(ListPodSandboxStatsRequest::default())
        .await;
    assert_eq!(stats.unwrap().into_inner().stats.len(), 2);
    let info = it
        .node
        .images
        .clone()
        .image_fs_info(ImageFsInfoRequest {})
        .await;
    assert_eq!(info.unwrap().into_inner().image_filesystems.len(), 2);
    let url = |daemon: &Daemon, container_id: String| {
        let mut client = daemon.client.clone();
        let request = ExecRequest {
            container_id,
            cmd: vec!["cat".into()],
            stdout: true,
            ..Default::default()
        };
        async move { client.exec(request).await.unwrap().into_inner().url }
    };
    let address = |url: String| url.split('/').nth(2).unwrap().to_owned();
    assert_eq!(
        address(url(&it.node, theirs.clone()).await),
        address(url(&it.other, theirs.clone()).await)
    );

    // An image that the pod of the other runtime needs is that one's.
    let request = RemoveImageRequest {
        image: Some(named(&id)),
    };
    for container_id in [mine, theirs.clone()] {
        let request = RemoveContainerRequest { container_id };
        client.remove_container(request).await.unwrap();
    }
    it.node.images.clone().remove_image(request).await.unwrap();
    assert_eq!(
        (it.images(&it.node).await, it.images(&it.other).await),
        (0, 0)
    );
    it.pull(Some(sandbox("system"))).await;
    assert_eq!(
        (it.images(&it.node).await, it.images(&it.other).await),
        (1, 1)
    );
    let handler = |handler: &str| {
        let image = ImageSpec {
            runtime_handler: handler.into(),
            ..named(&it.image)
        };
        let request = ImageStatusRequest {
            image: Some(image),
            verbose: false,
        };
        let mut images = it.node.images.clone();
        async move { images.image_status(request).await }
    };
    let here = handler("hull").await.unwrap().into_inner().image;
    let there = handler("other").await.unwrap().into_inner().image;
    assert!(here.is_none() && there.is_some());
    let refused = handler("none").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    // And the other way round.
    let id = there.unwrap().id;
    it.container(&vm, "vm", &id, &["wait"]).await;

    // What asks for the host goes there, where it is refused here.
    let mut host = sandbox("host");
    host.linux = Some(LinuxPodSandboxConfig {
        security_context: Some(LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption {
                network: NamespaceMode::Node.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    });
    let request = RunPodSandboxRequest {
        config: Some(host),
        runtime_handler: String::new(),
    };
    let refused = client.run_pod_sandbox(request).await.unwrap_err();
    let socket = it.other.dir.path().join("state/hull.sock");
    let told = refused.message();
    assert!(told.starts_with(socket.to_str().unwrap()), "{refused}");

    for pod in [&vm, &system] {
        it.node.end(pod).await;
    }
    let nobody = PodSandboxStatusRequest {
        pod_sandbox_id: system,
        verbose: false,
    };
    let nobody = client.pod_sandbox_status(nobody).await.unwrap_err();
    assert_eq!(nobody.code(), Code::NotFound, "{nobody}");
    it.node.assert_nothing_left();
    it.other.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_that_the_default_runtime_alone_knows_are_its_own() {
    let theirs = "handlers.small.memory_mib = 64\n";
    let Some(it) = Node::start_with(theirs, "default_handler = 'other'\n").await else {
        return;
    };
    it.run("vm", "hull").await.unwrap();
    it.run("system", "").await.unwrap();
    let small = it.run("small", "small").await.unwrap();
    let told = ["vm hull", "small small", "system other"];
    assert_eq!(it.listed(&it.node).await, told);
    assert_eq!(it.listed(&it.other).await, ["small small", "system "]);
    let refused = it.run("none", "none").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("hull.sock: "), "{refused}");
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: small,
        verbose: false,
    };
    let mut client = it.node.client.clone();
    let status = client.pod_sandbox_status(request).await.unwrap();
    let status = status.into_inner().status.unwrap();
    assert_eq!(status.runtime_handler, "small");
    let status = client.status(StatusRequest { verbose: false }).await;
    let handlers = status.unwrap().into_inner().runtime_handlers;
    let mut names: Vec<_> = handlers.into_iter().map(|handler| handler.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["", "hull", "other", "small"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_runtime_that_is_away_holds_up_its_own_pods_alone() {
    let Some(it) = Node::start().await else {
        return;
    };
    let mut client = it.node.client.clone();
    it.pull(None).await;
    let id = it.image_id().await;
    let vm = it.run("vm", "").await.unwrap();
    let system = it.run("system", "other").await.unwrap();
    it.container(&system, "system", &id, &["wait"]).await;
    let all = ["vm ", "system other", "CONTAINER_RUNNING"];
    assert_eq!(it.listed(&it.node).await, all);
    assert!(it.delegates_are_ready().await);

    it.signal(Signal::SIGSTOP);
    let unknown = ["vm ", "system other", "CONTAINER_UNKNOWN"];
    assert_eq!(it.listed(&it.node).await, unknown);
    // Whoever asks next does not wait for it.
    let start = Instant::now();
    assert_eq!(it.listed(&it.node).await, unknown);
    it.container(&vm, "vm", &id, &["wait"]).await;
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert!(!it.delegates_are_ready().await);

    it.signal(Signal::SIGCONT);
    let deadline = Instant::now() + Duration::from_secs(30);
    let running = "CONTAINER_RUNNING";
    while it.listed(&it.node).await != ["vm ", "system other", running, running] {
        assert!(Instant::now() < deadline, "{:?}", it.listed(&it.node).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(it.delegates_are_ready().await);

    it.signal(Signal::SIGKILL);
    let unknown = ["vm ", "system other", running, "CONTAINER_UNKNOWN"];
    while it.listed(&it.node).await != unknown {
        assert!(Instant::now() < deadline, "{:?}", it.listed(&it.node).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let request = StopPodSandboxRequest {
        pod_sandbox_id: system,
    };
    let gone = client.stop_pod_sandbox(request).await.unwrap_err();
    assert_eq!(gone.code(), Code::Unavailable, "{gone}");
    assert!(gone.message().contains("onnection refused"), "{gone}");
    it.node.end(&vm).await;
    it.node.assert_nothing_left();
}
