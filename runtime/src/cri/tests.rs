//! The services over a real Unix socket, as far as no VM is needed.

use std::{fs::Permissions, future::Future, os::unix::fs::PermissionsExt, path::PathBuf};

use hull_proto_cri::v1::{
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient, *,
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};

use tracing::Span;

use super::answer;
use crate::{
    app::{App, AppError},
    config::{Flags, Settings},
};

struct Daemon {
    directory: TempDir,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), AppError>>,
}

const CONFIG: &str = "
    [cni]
    conf_dir = 'DIR/cni'
    bin_dirs = ['DIR/bin']
    netns_dir = 'DIR/netns'
    [registries]
    config_dir = 'DIR/certs.d'
    [handlers.small]
    memory_mib = 64
";

fn settings(directory: &TempDir) -> Settings {
    let path = |name: &str| Some(directory.path().join(name));
    let config = directory.path().join("config.toml");
    let text = CONFIG.replace("DIR", directory.path().to_str().unwrap());
    std::fs::write(&config, text).unwrap();
    Settings::load(&Flags {
        config: Some(config),
        root: path("root"),
        state: path("state"),
        assets: path("assets"),
        ..Flags::default()
    })
    .unwrap()
}

impl Daemon {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(directory: TempDir) -> Self {
        let settings = settings(&directory);
        let socket = settings.listen.clone();
        let app = App::start(settings).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(app.serve(async {
            let _ = stopped.await;
        }));
        let channel = Endpoint::from_shared(format!("unix:{}", socket.display()))
            .unwrap()
            .connect()
            .await
            .unwrap();
        Self {
            directory,
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            stop,
            task,
        }
    }

    async fn end(self) -> TempDir {
        drop((self.runtime, self.images, self.stop));
        self.task.await.unwrap().unwrap();
        self.directory
    }

    async fn conditions(&mut self) -> Vec<RuntimeCondition> {
        let status = self.runtime.status(StatusRequest { verbose: true }).await;
        status.unwrap().into_inner().status.unwrap().conditions
    }
}

async fn refused<T: std::fmt::Debug>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> (Code, String) {
    let status = call.await.unwrap_err();
    (status.code(), status.message().to_owned())
}

fn pod_config() -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web".into(),
            uid: "uid".into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        ..Default::default()
    }
}

fn container_config() -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: "c".into(),
            attempt: 0,
        }),
        image: Some(image("busybox")),
        ..Default::default()
    }
}

fn image(name: &str) -> ImageSpec {
    ImageSpec {
        image: name.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn the_node_tells_what_it_is() {
    let mut daemon = Daemon::start().await;
    let version = daemon.runtime.version(VersionRequest::default()).await;
    let version = version.unwrap().into_inner();
    assert_eq!(version.runtime_name, "hull");
    assert_eq!(version.runtime_api_version, "v1");

    let config = daemon.runtime.runtime_config(RuntimeConfigRequest {}).await;
    let linux = config.unwrap().into_inner().linux.unwrap();
    assert_eq!(
        linux.cgroup_driver(),
        super::node::runtime_config::cgroup_driver()
    );

    let status = daemon.runtime.status(StatusRequest { verbose: true }).await;
    let status = status.unwrap().into_inner();
    let handlers: Vec<_> = status.runtime_handlers.iter().map(|h| &h.name).collect();
    assert_eq!(handlers, ["", "hull", "small"]);
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    assert_eq!(info["handlers"][2], "small");
    // critest asks the file system of this directory whether it can map ids.
    let config: serde_json::Value = serde_json::from_str(&status.info["config"]).unwrap();
    let state = daemon.directory.path().join("state");
    assert_eq!(config["stateDir"], state.to_str().unwrap());
    daemon.end().await;
}

#[tokio::test]
async fn conditions_follow_what_is_there() {
    let mut daemon = Daemon::start().await;
    let conditions = daemon.conditions().await;
    assert_eq!(conditions[0].r#type, "RuntimeReady");
    assert!(!conditions[0].status);
    assert!(conditions[0].message.contains("vmlinux"), "{conditions:?}");
    assert_eq!(conditions[1].r#type, "NetworkReady");
    assert!(!conditions[1].status);
    assert!(conditions[1].message.contains("cni"), "{conditions:?}");

    let cni = daemon.directory.path().join("cni");
    std::fs::create_dir(&cni).unwrap();
    let list = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"no-such-plugin"}]}"#;
    std::fs::write(cni.join("10-n.conflist"), list).unwrap();
    let conditions = daemon.conditions().await;
    assert!(
        conditions[1].message.contains("no-such-plugin"),
        "{conditions:?}"
    );

    // It comes and goes with the plugin.
    let bin = daemon.directory.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let plugin = bin.join("no-such-plugin");
    let speaks = r#"{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}"#;
    std::fs::write(&plugin, format!("#!/bin/sh\necho '{speaks}'\n")).unwrap();
    std::fs::set_permissions(&plugin, Permissions::from_mode(0o755)).unwrap();
    let network = daemon.conditions().await.swap_remove(1);
    assert!(network.status && network.reason.is_empty(), "{network:?}");
    std::fs::remove_file(&plugin).unwrap();
    let network = daemon.conditions().await.swap_remove(1);
    assert!(!network.status && !network.reason.is_empty(), "{network:?}");
    daemon.end().await;
}

#[tokio::test]
async fn malformed_sandboxes_are_refused_by_field() {
    let mut daemon = Daemon::start().await;
    let cases = [
        (RunPodSandboxRequest::default(), "config: "),
        (
            RunPodSandboxRequest {
                config: Some(PodSandboxConfig::default()),
                ..Default::default()
            },
            "config.metadata: ",
        ),
        (
            RunPodSandboxRequest {
                config: Some(PodSandboxConfig {
                    log_directory: "logs".into(),
                    ..pod_config()
                }),
                ..Default::default()
            },
            "pod default/web: config.log_directory: ",
        ),
        (
            RunPodSandboxRequest {
                config: Some(pod_config()),
                runtime_handler: "no-such-handler".into(),
            },
            "pod default/web: runtime_handler: ",
        ),
    ];
    for (request, field) in cases {
        let (code, message) = refused(daemon.runtime.run_pod_sandbox(request)).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.starts_with(field), "{message}");
    }
    let list = daemon
        .runtime
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await;
    assert!(list.unwrap().into_inner().items.is_empty());
    daemon.end().await;
}

#[tokio::test]
async fn malformed_containers_are_refused_by_field() {
    let mut daemon = Daemon::start().await;
    let with = |config| CreateContainerRequest {
        pod_sandbox_id: "ab".repeat(32),
        config,
        sandbox_config: Some(pod_config()),
    };
    let cases = [
        (CreateContainerRequest::default(), "pod_sandbox_id: "),
        (with(None), "config: "),
        (with(Some(ContainerConfig::default())), "config.metadata: "),
        (
            with(Some(ContainerConfig {
                image: None,
                ..container_config()
            })),
            "container c: config.image.image: ",
        ),
        (
            with(Some(ContainerConfig {
                log_path: "../../etc/passwd".into(),
                ..container_config()
            })),
            "container c: config.log_path: ",
        ),
    ];
    for (request, field) in cases {
        let (code, message) = refused(daemon.runtime.create_container(request)).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.starts_with(field), "{message}");
    }
    let request = with(Some(container_config()));
    let (code, message) = refused(daemon.runtime.create_container(request)).await;
    assert_eq!(code, Code::NotFound, "{message}");
    daemon.end().await;
}

#[tokio::test]
async fn unknown_ids_are_not_found_but_stopped_and_removed() {
    let mut daemon = Daemon::start().await;
    let runtime = &mut daemon.runtime;
    for id in ["ab".repeat(32), "unknown id".into()] {
        let container_id = id.clone();
        let pod_sandbox_id = id.clone();
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.clone(),
            verbose: false,
        };
        assert_eq!(
            refused(runtime.pod_sandbox_status(request)).await.0,
            Code::NotFound
        );
        let request = ContainerStatusRequest {
            container_id: id.clone(),
            verbose: false,
        };
        assert_eq!(
            refused(runtime.container_status(request)).await.0,
            Code::NotFound
        );
        let request = StartContainerRequest {
            container_id: id.clone(),
        };
        assert_eq!(
            refused(runtime.start_container(request)).await.0,
            Code::NotFound
        );
        let request = ExecSyncRequest {
            container_id: id.clone(),
            cmd: vec!["true".into()],
            timeout: 1,
        };
        assert_eq!(refused(runtime.exec_sync(request)).await.0, Code::NotFound);

        let request = StopPodSandboxRequest {
            pod_sandbox_id: id.clone(),
        };
        runtime.stop_pod_sandbox(request).await.unwrap();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        runtime.remove_pod_sandbox(request).await.unwrap();
        let request = StopContainerRequest {
            container_id: id,
            timeout: 5,
        };
        runtime.stop_container(request).await.unwrap();
        let request = RemoveContainerRequest { container_id };
        runtime.remove_container(request).await.unwrap();
    }
    daemon.end().await;
}

#[tokio::test]
async fn an_empty_id_names_nothing() {
    let mut daemon = Daemon::start().await;
    let runtime = &mut daemon.runtime;
    let answers = [
        refused(runtime.stop_pod_sandbox(StopPodSandboxRequest::default())).await,
        refused(runtime.remove_pod_sandbox(RemovePodSandboxRequest::default())).await,
        refused(runtime.pod_sandbox_status(PodSandboxStatusRequest::default())).await,
        refused(runtime.stop_container(StopContainerRequest::default())).await,
        refused(runtime.remove_container(RemoveContainerRequest::default())).await,
        refused(runtime.start_container(StartContainerRequest::default())).await,
        refused(runtime.container_status(ContainerStatusRequest::default())).await,
        refused(runtime.exec_sync(ExecSyncRequest::default())).await,
    ];
    for (code, message) in answers {
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.ends_with("_id: is missing"), "{message}");
    }
    daemon.end().await;
}

#[tokio::test]
async fn commands_are_checked() {
    let mut daemon = Daemon::start().await;
    let with = |cmd: &[&str], timeout| ExecSyncRequest {
        container_id: "ab".repeat(32),
        cmd: cmd.iter().map(ToString::to_string).collect(),
        timeout,
    };
    let (code, message) = refused(daemon.runtime.exec_sync(with(&[], 0))).await;
    assert_eq!(
        (code, message.as_str()),
        (Code::InvalidArgument, "cmd: is missing")
    );
    let (code, message) = refused(daemon.runtime.exec_sync(with(&["id"], -1))).await;
    assert_eq!(code, Code::InvalidArgument);
    assert!(message.starts_with("timeout: "), "{message}");
    daemon.end().await;
}

#[tokio::test]
async fn images_that_are_absent() {
    let mut daemon = Daemon::start().await;
    let images = &mut daemon.images;
    let request = ImageStatusRequest {
        image: Some(image("busybox")),
        verbose: true,
    };
    let status = images.image_status(request).await.unwrap().into_inner();
    assert_eq!(status.image, None);
    let request = RemoveImageRequest {
        image: Some(image("busybox")),
    };
    images.remove_image(request).await.unwrap();
    let list = images.list_images(ListImagesRequest::default()).await;
    assert!(list.unwrap().into_inner().images.is_empty());
    let info = images.image_fs_info(ImageFsInfoRequest {}).await;
    let info = info.unwrap().into_inner();
    let of_images = info.image_filesystems[0].fs_id.clone().unwrap();
    assert!(of_images.mountpoint.ends_with("root/images"));
    assert!(info.image_filesystems[0].used_bytes.is_some());
    assert_eq!(info.container_filesystems.len(), 1);

    let request = ImageStatusRequest::default();
    let (code, message) = refused(images.image_status(request)).await;
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(message, "image.image: is missing");
    daemon.end().await;
}

#[tokio::test]
async fn bad_pulls_have_clear_statuses() {
    let mut daemon = Daemon::start().await;
    let with = |name: &str| PullImageRequest {
        image: Some(image(name)),
        ..Default::default()
    };
    let pulls = |name: &str| {
        let mut images = daemon.images.clone();
        let request = with(name);
        async move { images.pull_image(request).await }
    };
    let (code, message) = refused(pulls("Not A Reference")).await;
    assert_eq!(code, Code::InvalidArgument, "{message}");
    // Nothing listens on port 1; two pulls of the same image fail alike.
    let (one, two) = tokio::join!(
        refused(pulls("127.0.0.1:1/a/b:c")),
        refused(pulls("127.0.0.1:1/a/b:c"))
    );
    for (code, message) in [one, two] {
        assert_eq!(code, Code::Unavailable, "{message}");
        assert!(message.contains("127.0.0.1:1"), "{message}");
    }
    let list = daemon
        .images
        .list_images(ListImagesRequest::default())
        .await;
    assert!(list.unwrap().into_inner().images.is_empty());
    daemon.end().await;
}

#[tokio::test]
async fn streams_of_what_is_not_there_get_no_url() {
    let mut daemon = Daemon::start().await;
    let r = &mut daemon.runtime;
    for (id, expected) in [
        (String::new(), Code::InvalidArgument),
        ("ab".repeat(32), Code::NotFound),
        ("unknown id".into(), Code::NotFound),
    ] {
        let exec = ExecRequest {
            container_id: id.clone(),
            cmd: vec!["true".into()],
            stdout: true,
            ..Default::default()
        };
        let attach = AttachRequest {
            container_id: id.clone(),
            stdout: true,
            ..Default::default()
        };
        let port_forward = PortForwardRequest {
            pod_sandbox_id: id,
            port: vec![80],
        };
        assert_eq!(refused(r.exec(exec)).await.0, expected);
        assert_eq!(refused(r.attach(attach)).await.0, expected);
        assert_eq!(refused(r.port_forward(port_forward)).await.0, expected);
    }
    daemon.end().await;
}

#[tokio::test]
async fn calls_that_are_not_served_say_so() {
    let mut daemon = Daemon::start().await;
    let r = &mut daemon.runtime;
    macro_rules! refusals {
        ($($client:ident.$method:ident($request:ident)),* $(,)?) => {
            [$((stringify!($method), refused($client.$method($request::default())).await)),*]
        };
    }
    let answers = refusals![r.checkpoint_container(CheckpointContainerRequest),];
    for (method, (code, message)) in answers {
        assert_eq!(code, Code::Unimplemented, "{method}");
        // The generator's own answer would have no text.
        let name = message.split(':').next().unwrap().to_lowercase();
        assert_eq!(name, method.replace('_', ""), "{message}");
        assert!(message.len() > name.len() + 2, "{message}");
    }
    daemon.end().await;
}

#[tokio::test]
async fn checkpoints_need_a_place_and_nothing_that_is_not_known() {
    let mut daemon = Daemon::start().await;
    let r = &mut daemon.runtime;
    let checkpoint = |output: &str| CheckpointPodRequest {
        pod_sandbox_id: "none".into(),
        output_path: output.into(),
        ..Default::default()
    };
    let (code, message) = refused(r.checkpoint_pod(checkpoint("here"))).await;
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(message, "output_path: \"here\" is no absolute path");
    let unknown = CheckpointPodRequest {
        options: [("fast".to_owned(), String::new())].into(),
        ..checkpoint("/x")
    };
    let (code, message) = refused(r.checkpoint_pod(unknown)).await;
    assert_eq!(code, Code::Unimplemented);
    assert!(message.starts_with("options[\"fast\"]"), "{message}");
    let (code, _) = refused(r.checkpoint_pod(checkpoint("/x"))).await;
    assert_eq!(code, Code::NotFound);
    let restore = RestorePodRequest {
        checkpoint_path: "/nonexistent/checkpoint".into(),
        ..Default::default()
    };
    let (code, message) = refused(r.restore_pod(restore.clone())).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert!(
        message.contains("/nonexistent/checkpoint: open it"),
        "{message}"
    );
    let unnamed = RestorePodRequest {
        config: Some(PodSandboxConfig::default()),
        ..restore
    };
    let (code, message) = refused(r.restore_pod(unnamed)).await;
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(message, "config.metadata: is missing");
    daemon.end().await;
}

#[tokio::test]
async fn an_empty_list_is_an_empty_stream() {
    let mut daemon = Daemon::start().await;
    let (r, i) = (&mut daemon.runtime, &mut daemon.images);
    macro_rules! assert_empty {
        ($call:expr) => {
            let mut stream = $call.await.unwrap().into_inner();
            assert_eq!(stream.message().await.unwrap(), None);
        };
    }
    assert_empty!(r.stream_pod_sandboxes(StreamPodSandboxesRequest::default()));
    assert_empty!(r.stream_containers(StreamContainersRequest::default()));
    assert_empty!(r.stream_container_stats(StreamContainerStatsRequest::default()));
    assert_empty!(r.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest::default()));
    assert_empty!(r.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest::default()));
    assert_empty!(i.stream_images(StreamImagesRequest::default()));
    daemon.end().await;
}

#[tokio::test]
async fn clients_of_events_do_not_hold_up_the_end_of_the_daemon() {
    let mut daemon = Daemon::start().await;
    let mut follower = daemon.runtime.clone();
    let events = daemon
        .runtime
        .get_container_events(GetEventsRequest {})
        .await;
    let second = follower.get_container_events(GetEventsRequest {}).await;
    let (mut events, mut second) = (events.unwrap().into_inner(), second.unwrap().into_inner());
    drop(follower);
    // The daemon ends while both are connected, and without the time that it gives to requests.
    let follow = tokio::spawn(async move {
        let ends = (events.message().await, second.message().await);
        (ends.0.unwrap(), ends.1.unwrap())
    });
    let begin = std::time::Instant::now();
    daemon.end().await;
    assert!(begin.elapsed() < crate::app::DRAIN);
    assert_eq!(follow.await.unwrap(), (None, None));
}

#[tokio::test]
async fn one_daemon_per_directory_and_the_next_one_may_follow() {
    let daemon = Daemon::start().await;
    let error = App::start(settings(&daemon.directory)).await.unwrap_err();
    assert!(error.to_string().contains("another hull"), "{error}");
    let other_root = Settings {
        root: daemon.directory.path().join("other"),
        ..settings(&daemon.directory)
    };
    let error = App::start(other_root).await.unwrap_err();
    assert!(error.to_string().contains("state/hull.lock"), "{error}");
    let directory = daemon.end().await;
    let socket: PathBuf = directory.path().join("state/hull.sock");
    assert!(!socket.exists());
    Daemon::start_in(directory).await.end().await;
}

#[tokio::test]
async fn a_call_that_panics_is_answered() {
    let verb = async { panic!("as the test says") };
    let status = answer::<()>(Span::none(), verb).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("the daemon's log"), "{status}");
}
