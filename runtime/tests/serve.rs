//! `hull serve` with real CNI plugins, over its socket; the VMM and the guest are those of the tests of
//! `hull-pod` (`examples/fake-vmm`), so that many pods fit and no KVM is needed.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod clients;
mod collector;
mod delegate;
mod monitoring;
mod node;
mod nri;
mod prompt;
mod registry;
mod traces;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use futures::future::join_all;
use hull_proto_cri::v1::{
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient, *,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

const PLUGINS: &str = "/usr/lib/cni";
const NETWORK: &str = r#"{"cniVersion":"1.0.0","name":"test","plugins":[
    {"type":"bridge","bridge":"br-test","isGateway":true,
     "ipam":{"type":"host-local","dataDir":"DIR/leases","subnet":"10.222.0.0/16"}},
    {"type":"noter","capabilities":{"dns":true}},{"type":"noter"}]}"#;
/// Keeps what it was given for each pod, the last of two in a chain beside the first.
const NOTER: &str = r#"#!/bin/sh
    cat > DIR/in.$CNI_CONTAINERID
    [ -e DIR/1.$CNI_CONTAINERID ] && n=2 || n=1
    cp DIR/in.$CNI_CONTAINERID DIR/$n.$CNI_CONTAINERID
    [ $CNI_COMMAND != ADD ] || sed 's/.*"prevResult"://; s/,"runtimeConfig":.*//; s/,"type":.*//' \
        DIR/in.$CNI_CONTAINERID"#;

/// The configuration of a pod that has nothing but a name.
fn sandbox(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        ..Default::default()
    }
}

/// The daemon of a node that has no network but its own; what it mounts goes with it.
struct Daemon {
    dir: TempDir,
    child: Child,
    client: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Daemon {
    /// `None` (said on stdout) where it can't be had.
    async fn start() -> Option<Self> {
        Self::start_with("").await
    }

    /// With `settings` at the top of its configuration.
    async fn start_with(settings: &str) -> Option<Self> {
        Self::start_under(settings, &[]).await
    }

    /// With variables of a service manager too.
    async fn start_under(settings: &str, variables: &[(&str, &str)]) -> Option<Self> {
        if !Path::new(PLUGINS).join("bridge").exists() {
            println!("SKIPPED: serve: no {PLUGINS}/bridge");
            return None;
        }
        if !Command::new("unshare")
            .args(["-nm", "true"])
            .status()
            .unwrap()
            .success()
        {
            println!("SKIPPED: serve: no namespaces of our own");
            return None;
        }
        // Short, because sockets are below it.
        let dir = tempfile::Builder::new()
            .prefix("hs")
            .tempdir_in("/tmp")
            .unwrap();
        let path = dir.path();
        let with_dir = |text: &str| text.replace("DIR", path.to_str().unwrap());
        for name in ["assets", "net.d", "bin"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        // As a daemon of old left them.
        for name in ["root", "root/cni", "root/pods", "state"] {
            fs::create_dir(path.join(name)).unwrap();
            fs::set_permissions(path.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(path.join("assets/vmlinux"), "").unwrap();
        fs::write(path.join("assets/root.erofs"), vec![0; 4096]).unwrap();
        for name in ["hull-vmm", "hull-fs"] {
            symlink(
                hull_built::example("fake-vmm"),
                path.join("assets").join(name),
            )
            .unwrap();
        }
        fs::write(path.join("net.d/10-test.conflist"), with_dir(NETWORK)).unwrap();
        let noter = path.join("bin/noter");
        fs::write(&noter, with_dir(NOTER)).unwrap();
        fs::set_permissions(noter, fs::Permissions::from_mode(0o755)).unwrap();
        let config = format!(
            "{settings}root = 'DIR/root'\nstate = 'DIR/state'\nassets = 'DIR/assets'\n\
             [cni]\nconf_dir = 'DIR/net.d'\nbin_dirs = ['DIR/bin', '{PLUGINS}']\n\
             [vm]\nmemory_mib = 32\nscratch_mib = 64\n"
        );
        fs::write(path.join("hull.toml"), with_dir(&config)).unwrap();
        let log = fs::File::create(path.join("log")).unwrap();
        let child = Command::new("unshare")
            .args(["-nm", "sh", "-c", "ip link set lo up; exec \"$@\"", "sh"])
            .args([env!("CARGO_BIN_EXE_hull"), "--config"])
            .arg(path.join("hull.toml"))
            .arg("serve")
            .env_remove("HULL_ASSETS")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let socket = format!("unix:{}", path.join("state/hull.sock").display());
        let endpoint = Endpoint::from_shared(socket).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let channel = loop {
            match endpoint.connect().await {
                Ok(channel) => break channel,
                Err(error) => assert!(
                    Instant::now() < deadline,
                    "{error}; {:?}",
                    fs::read_to_string(path.join("log"))
                ),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        Some(Self {
            client: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
            dir,
            child,
        })
    }

    async fn run(&self, name: &str, dns: Option<DnsConfig>) -> String {
        let config = PodSandboxConfig {
            dns_config: dns,
            ..sandbox(name)
        };
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        let answer = self.client.clone().run_pod_sandbox(request).await;
        answer.unwrap().into_inner().pod_sandbox_id
    }

    async fn ip(&self, id: &str) -> String {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: false,
        };
        let status = self.client.clone().pod_sandbox_status(request).await;
        let status = status.unwrap().into_inner().status.unwrap();
        status.network.unwrap().ip
    }

    /// Pulls an image from a registry in its network.
    async fn pulled(&self) -> ImageSpec {
        let registry = registry::serve(self.child.id(), "user", "password");
        let image = ImageSpec {
            image: format!("{}/app:1", registry.address),
            ..Default::default()
        };
        let request = PullImageRequest {
            image: Some(image.clone()),
            auth: Some(AuthConfig {
                username: "user".into(),
                password: "password".into(),
                ..Default::default()
            }),
            sandbox_config: None,
        };
        self.images.clone().pull_image(request).await.unwrap();
        image
    }

    async fn end(&self, id: &str) {
        let pod_sandbox_id = id.to_owned();
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.client.clone().stop_pod_sandbox(request).await.unwrap();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        let removed = self.client.clone().remove_pod_sandbox(request).await;
        removed.unwrap();
    }

    /// Names in a directory that pods may have left something in.
    fn names(&self, dir: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.dir.path().join(dir))
            .into_iter()
            .flatten();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // What host-local keeps for itself.
        names
            .filter(|name| name != "lock" && !name.starts_with("last_reserved"))
            .collect()
    }

    /// What curl gets by these arguments in the daemon's network.
    fn curl(&self, arguments: &[&str]) -> Output {
        let pid = self.child.id().to_string();
        let mut command = Command::new("nsenter");
        command.args(["-n", "-t", &pid, "curl", "-sS", "--max-time", "20"]);
        command.args(arguments).output().unwrap()
    }

    /// Processes of this node's VMs.
    fn vmms(&self) -> Vec<u32> {
        let state = self.dir.path().join("state").display().to_string();
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&state)
            })
            .collect()
    }

    /// What the noter at this place was given for a pod.
    fn given(&self, place: u8, id: &str) -> Value {
        let path = self.dir.path().join(format!("{place}.{id}"));
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn assert_nothing_left(&self) {
        for dir in [
            "leases/test",
            "state/pods",
            "state/netns",
            "root/pods",
            "root/cni",
        ] {
            assert_eq!(self.names(dir), BTreeSet::new(), "{dir}");
        }
        assert!(self.vmms().is_empty());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.vmms() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_pods_at_once_get_fifty_addresses_and_give_them_back() {
    const PODS: usize = 50;
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    // Twice: what was given back is there to be given again.
    for round in 0..2 {
        let names: Vec<_> = (0..PODS).map(|i| format!("pod-{round}-{i}")).collect();
        let ids = join_all(names.iter().map(|name| daemon.run(name, None))).await;
        let ips: BTreeSet<_> = join_all(ids.iter().map(|id| daemon.ip(id)))
            .await
            .into_iter()
            .collect();
        assert_eq!(ips.len(), PODS, "{ips:?}");
        assert_eq!(daemon.names("leases/test"), ips);
        assert_eq!(daemon.names("state/netns").len(), PODS);
        assert_eq!(daemon.vmms().len(), PODS);
        join_all(ids.iter().map(|id| daemon.end(id))).await;
        daemon.assert_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plugins_with_the_capability_hear_of_the_pods_resolver() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let dns = DnsConfig {
        servers: vec!["10.96.0.10".into(), "fd96::10".into()],
        searches: vec!["default.svc.test".into(), "svc.test".into()],
        options: vec!["ndots:5".into()],
    };
    let id = daemon.run("web", Some(dns)).await;
    let told = json!({
        "servers": ["10.96.0.10", "fd96::10"],
        "searches": ["default.svc.test", "svc.test"],
        "options": ["ndots:5"],
    });
    assert_eq!(daemon.given(1, &id)["runtimeConfig"]["dns"], told);
    assert_eq!(daemon.given(2, &id).get("runtimeConfig"), None);
    // The kubelet leaves it out when the pod asks for none.
    let without = daemon.run("plain", None).await;
    assert_eq!(daemon.given(1, &without).get("runtimeConfig"), None);
    for id in [id, without] {
        daemon.end(&id).await;
    }
    daemon.assert_nothing_left();
}

/// All paths at and below a directory.
fn all_below(path: &Path, into: &mut Vec<PathBuf>) {
    into.push(path.to_owned());
    if !path.is_symlink() && path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            all_below(&entry.unwrap().path(), into);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_gets_at_nothing_that_the_daemon_keeps() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let dir = daemon.dir.path();
    // What is above is not what keeps others out.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let id = daemon.run("secretive", None).await;
    let mut paths = Vec::new();
    for name in ["root", "state"] {
        all_below(&dir.join(name), &mut paths);
    }
    for expected in [
        "root/hull.redb",
        "root/images/images.redb",
        "state/hull.sock",
    ] {
        assert!(
            paths.contains(&dir.join(expected)),
            "{expected} in {paths:?}"
        );
    }
    let record = dir.join(format!("state/records/sandbox-{id}"));
    let socket = dir.join(format!("state/pods/{id}/vmm.sock"));
    assert!(
        paths.contains(&record) && paths.contains(&socket),
        "{paths:?}"
    );
    // The place of a namespace is not a secret, and its file the kernel's.
    let namespaces = dir.join("state/netns");
    let open: Vec<_> = paths
        .iter()
        .filter(|path| !path.starts_with(&namespaces))
        .filter(|path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o077 != 0)
        .collect();
    assert!(open.is_empty(), "{open:?}");

    for process in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.contains(dir.to_str().unwrap()) {
            paths.push(process.path().join("environ"));
        }
    }
    let script = r#"while IFS= read -r path; do
        if [ -r "$path" ] || [ -w "$path" ]; then echo "$path"; fi; done"#;
    let list = dir.join("list");
    let lines: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    fs::write(&list, lines.join("\n")).unwrap();
    let reached = Command::new("sh")
        .args(["-c", script])
        .stdin(fs::File::open(&list).unwrap())
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(reached.status.success());
    assert_eq!(String::from_utf8_lossy(&reached.stdout), "");
    daemon.end(&id).await;
}

/// What no log and no command line may have.
const SECRET: &str = "s3cr3t";

fn secret(what: &str) -> String {
    format!("{SECRET}-{what}")
}

/// The file at `path` has the secret, as it is or as HTTP has it.
fn tells(path: &Path) -> bool {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.contains(SECRET) || text.contains(&registry::basic("user", &secret("password")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_in_no_log_no_trace_and_no_command_line() {
    let settings = format!("log = 'trace'\n{}", collector::ENDPOINT);
    let Some(daemon) = Daemon::start_with(&settings).await else {
        return;
    };
    let dir = daemon.dir.path();
    let collector = collector::Collector::serve(dir);
    let registry = registry::serve(daemon.child.id(), "user", &secret("password"));
    let image = ImageSpec {
        image: format!("{}/app:1", registry.address),
        ..Default::default()
    };
    let annotations = [("note".to_owned(), secret("annotation"))];
    let pod = PodSandboxConfig {
        log_directory: dir.join("logs").display().to_string(),
        annotations: annotations.clone().into(),
        ..sandbox("web")
    };
    let pull = async |password: &str| {
        let request = PullImageRequest {
            image: Some(image.clone()),
            auth: Some(AuthConfig {
                username: "user".into(),
                password: password.into(),
                ..Default::default()
            }),
            sandbox_config: Some(pod.clone()),
        };
        daemon.images.clone().pull_image(request).await
    };
    let refused = pull(&secret("wrong")).await.unwrap_err();
    assert!(!refused.message().contains(SECRET), "{refused}");
    pull(&secret("password")).await.unwrap();
    assert!(registry.was_let_in());

    let mut client = daemon.client.clone();
    let request = RunPodSandboxRequest {
        config: Some(pod.clone()),
        runtime_handler: String::new(),
    };
    let id = client.run_pod_sandbox(request).await.unwrap();
    let id = id.into_inner().pod_sandbox_id;
    let container = |key: &str| CreateContainerRequest {
        pod_sandbox_id: id.clone(),
        config: Some(ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "main".into(),
                attempt: 0,
            }),
            image: Some(image.clone()),
            command: vec!["/file".into()],
            args: vec![secret("argument")],
            envs: vec![KeyValue {
                key: key.into(),
                value: secret("environment").into(),
            }],
            annotations: annotations.clone().into(),
            log_path: "main.log".into(),
            ..Default::default()
        }),
        sandbox_config: Some(pod.clone()),
    };
    let refused = client.create_container(container("a=b")).await.unwrap_err();
    assert!(!refused.message().contains(SECRET), "{refused}");
    let made = client.create_container(container("TOKEN")).await.unwrap();
    let container_id = made.into_inner().container_id;
    let request = StartContainerRequest {
        container_id: container_id.clone(),
    };
    client.start_container(request).await.unwrap();
    let request = ExecSyncRequest {
        container_id: container_id.clone(),
        cmd: vec!["echo".into(), secret("command")],
        timeout: 5,
    };
    // Whatever comes of it.
    let _ = client.exec_sync(request).await;
    collector.span("runtime.v1.RuntimeService/ExecSync").await;
    let names: BTreeSet<_> = collector
        .spans()
        .into_iter()
        .map(|span| span.name)
        .collect();
    for name in [
        "runtime.v1.ImageService/PullImage",
        "resolve",
        "layers",
        "disk",
        "runtime.v1.RuntimeService/CreateContainer",
        "storage",
        "agent: start the container in the guest",
    ] {
        assert!(names.contains(name), "no {name} in {names:?}");
    }
    let traces = format!("{collector:?}");
    assert!(!traces.contains(SECRET), "{traces}");
    assert!(traces.contains(&container_id), "{traces}");

    let mut files = Vec::new();
    all_below(dir, &mut files);
    let telling: Vec<_> = files.iter().filter(|path| tells(path)).collect();
    // The daemon's records have it, so this looks well.
    let record = dir.join(format!("state/records/sandbox-{id}"));
    assert!(telling.contains(&&record), "{telling:?}");
    let records = ["root/hull.redb", "root/cni", "state/records"].map(|name| dir.join(name));
    let logs = telling
        .iter()
        .filter(|path| !records.iter().any(|kept| path.starts_with(kept)));
    let logs: Vec<_> = logs.collect();
    assert!(logs.is_empty(), "{logs:?}");
    let log = fs::read_to_string(dir.join("log")).unwrap();
    assert!(log.contains("TRACE"), "{log}");

    let mut processes = 0;
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(dir.to_str().unwrap()) {
            processes += 1;
            for file in ["cmdline", "environ"] {
                assert!(!tells(&process.path().join(file)), "{process:?} {file}");
            }
        }
    }
    assert!(processes >= 2, "daemon and VMM");
    daemon.end(&id).await;
}

/// The daemon's memory, KiB.
fn memory(daemon: &Daemon) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().split_whitespace().next().unwrap();
    number.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_its_events_costs_little_memory_and_holds_nobody_up() {
    const CONTAINERS: usize = 100;
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let image = daemon.pulled().await;
    // Each event tells them.
    let annotations = [("ballast".to_owned(), "x".repeat(200 << 10))];
    let pod = PodSandboxConfig {
        annotations: annotations.into(),
        ..sandbox("web")
    };
    let request = RunPodSandboxRequest {
        config: Some(pod.clone()),
        runtime_handler: String::new(),
    };
    let mut client = daemon.client.clone();
    let pod_id = client.run_pod_sandbox(request).await.unwrap();
    let pod_id = pod_id.into_inner().pod_sandbox_id;
    // Connections of their own: what one does not read would hold up all calls of its connection.
    let follow = async || {
        let socket = daemon.dir.path().join("state/hull.sock");
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
        let mut client = RuntimeServiceClient::new(endpoint.connect().await.unwrap());
        let events = client.get_container_events(GetEventsRequest {}).await;
        events.unwrap().into_inner()
    };
    let (mut stuck, mut reader) = (follow().await, follow().await);
    let reading = tokio::spawn(async move {
        for _ in 0..2 * CONTAINERS {
            reader.message().await.unwrap().unwrap();
        }
    });
    let before = memory(&daemon);
    let mut ids = Vec::new();
    for n in 0..CONTAINERS {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_id.clone(),
            config: Some(ContainerConfig {
                metadata: Some(ContainerMetadata {
                    name: format!("c{n}"),
                    attempt: 0,
                }),
                image: Some(image.clone()),
                command: vec!["wait".into()],
                ..Default::default()
            }),
            sandbox_config: Some(pod.clone()),
        };
        let container_id = client.create_container(request).await.unwrap();
        let container_id = container_id.into_inner().container_id;
        ids.push(container_id.clone());
        let request = RemoveContainerRequest { container_id };
        client.remove_container(request).await.unwrap();
    }
    reading.await.unwrap();
    let grown = memory(&daemon).saturating_sub(before);
    let told = CONTAINERS * 2 * 200;
    assert!(grown < told / 2, "{grown} KiB for events of {told} KiB");
    // It was told all when it reads at last.
    for id in ids {
        for _ in 0..2 {
            let event = stuck.message().await.unwrap().unwrap();
            assert_eq!(event.container_id, id);
        }
    }
    daemon.end(&pod_id).await;
}

/// Whether people can read a text where events and terminals show it.
fn is_readable(text: &str) -> bool {
    // What Rust's debug output, ttrpc and unread JSON look like.
    const NOT_FOR_PEOPLE: [&str; 7] = [
        "{",
        "Error(",
        "Os {",
        "Some(",
        "ttrpc",
        "rpc status",
        "panicked at",
    ];
    (1..=400).contains(&text.chars().count())
        && !text.contains(char::is_control)
        && !NOT_FOR_PEOPLE.iter().any(|sign| text.contains(sign))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_is_one_line_that_tells_what_failed_and_why() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let registry = registry::serve(daemon.child.id(), "user", "password");
    let image = |name: &str| ImageSpec {
        image: name.replace("REGISTRY", &registry.address.to_string()),
        ..Default::default()
    };
    let mut errors = Vec::new();
    let mut failed = |what: &str, words: &[&str], status: Option<tonic::Status>| {
        let Some(status) = status else {
            errors.push(format!("{what}: no error"));
            return;
        };
        let text = status.message().to_owned();
        let missing = words.iter().find(|word| !text.contains(**word));
        if !is_readable(&text) || missing.is_some() {
            errors.push(format!("{what}: {text} (without {missing:?})"));
        }
    };

    let pull = async |name: &str, password: &str| {
        let auth = AuthConfig {
            username: "user".into(),
            password: password.into(),
            ..Default::default()
        };
        let request = PullImageRequest {
            image: Some(image(name)),
            auth: Some(auth),
            sandbox_config: None,
        };
        daemon.images.clone().pull_image(request).await
    };
    for (name, password, words) in [
        ("Not An Image", "", &["Not An Image", "reference"][..]),
        ("127.0.0.1:1/a:b", "", &["127.0.0.1:1", "refused"]),
        (
            "no-such-registry.invalid/a:b",
            "",
            &["no-such-registry.invalid"],
        ),
        ("REGISTRY/app:1", "wrong", &["app:1", "access denied"]),
        ("REGISTRY/app:2", "password", &["app:2", "not found"]),
    ] {
        failed("pull", words, pull(name, password).await.err());
    }
    pull("REGISTRY/app:1", "password").await.unwrap();

    let metadata = |name: &str| PodSandboxMetadata {
        name: name.into(),
        uid: name.into(),
        namespace: "default".into(),
        attempt: 0,
    };
    let run = async |config: PodSandboxConfig, handler: &str| {
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler.into(),
        };
        daemon.client.clone().run_pod_sandbox(request).await
    };
    let pod = |name: &str| PodSandboxConfig {
        metadata: Some(metadata(name)),
        ..Default::default()
    };
    failed(
        "handler",
        &["default/web", "no\\tsuch"],
        run(pod("web"), "no\tsuch").await.err(),
    );
    let noter = daemon.dir.path().join("bin/noter");
    let plugin = fs::read(&noter).unwrap();
    let page = "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\nprintf 'panic: it\\n\\tgoroutine 1\\n%0900d' 0 >&2; exit 2\n";
    fs::write(&noter, page).unwrap();
    failed(
        "plugin",
        &["default/plugin", "noter ADD", "panic: it"],
        run(pod("plugin"), "").await.err(),
    );
    fs::write(&noter, plugin).unwrap();
    // How the fake VMM is told what goes wrong.
    for (script, words) in [
        (
            json!({"die_at_start": true}),
            &[
                "default/web",
                "boot the guest",
                "kernel panicked: no init found",
            ][..],
        ),
        (json!({"refuse_configure": "kvm"}), &["default/web"]),
        (json!({"version": 7777}), &["default/web", "version"]),
        (
            json!({"refuse": ["configure"]}),
            &["default/web", "configure the guest"],
        ),
    ] {
        fs::write(daemon.dir.path().join("assets/vmlinux"), script.to_string()).unwrap();
        failed(&script.to_string(), words, run(pod("web"), "").await.err());
    }
    let refuses = json!({"refuse": ["start", "exec", "update"]}).to_string();
    fs::write(daemon.dir.path().join("assets/vmlinux"), refuses).unwrap();
    let id = run(pod("web"), "")
        .await
        .unwrap()
        .into_inner()
        .pod_sandbox_id;

    let mut client = daemon.client.clone();
    let container = |name: &str| ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(image("REGISTRY/app:1")),
        command: vec!["/file".into()],
        ..Default::default()
    };
    let mut create = async |config: ContainerConfig| {
        let request = CreateContainerRequest {
            pod_sandbox_id: id.clone(),
            config: Some(config),
            sandbox_config: None,
        };
        client.create_container(request).await
    };
    let mount = |at: &str, from: &str| Mount {
        container_path: at.into(),
        host_path: from.into(),
        ..Default::default()
    };
    let device = Device {
        container_path: "/dev/x".into(),
        host_path: "/dev/null\n".into(),
        permissions: "rw".into(),
    };
    let base = container("main");
    for (config, words) in [
        (
            ContainerConfig {
                image: Some(image("absent:1")),
                ..base.clone()
            },
            &["container main", "absent:1"][..],
        ),
        (
            ContainerConfig {
                command: vec![],
                ..base.clone()
            },
            &["container main", "command"],
        ),
        (
            ContainerConfig {
                mounts: vec![mount("relative", "/tmp")],
                ..base.clone()
            },
            &["container main", "mounts[0]", "relative"],
        ),
        (
            ContainerConfig {
                mounts: vec![mount("/x", "no/absolute\npath")],
                ..base.clone()
            },
            &["container main", "mounts[0]"],
        ),
        (
            ContainerConfig {
                devices: vec![device],
                ..base.clone()
            },
            &["container main", "devices[0]"],
        ),
        (
            ContainerConfig {
                log_path: "../x".into(),
                ..base.clone()
            },
            &["container main", "log_path"],
        ),
    ] {
        failed("create", words, create(config).await.err());
    }
    let made = create(container("last"))
        .await
        .unwrap()
        .into_inner()
        .container_id;
    let request = StartContainerRequest {
        container_id: made.clone(),
    };
    failed(
        "start",
        &["start"],
        client.start_container(request).await.err(),
    );
    let command = |container_id: &str| ExecSyncRequest {
        container_id: container_id.into(),
        cmd: vec!["true".into()],
        timeout: 5,
    };
    failed(
        "exec",
        &["not running"],
        client.exec_sync(command(&made)).await.err(),
    );
    failed(
        "exec",
        &["no such\u{fffd} id", "not found"],
        client.exec_sync(command("no such\u{1b} id")).await.err(),
    );
    let request = PortForwardRequest {
        pod_sandbox_id: "none".into(),
        port: vec![80],
    };
    failed(
        "forward",
        &["sandbox none", "not found"],
        client.port_forward(request).await.err(),
    );
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    daemon.end(&id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hangup_changes_what_can_change_under_pods_that_run() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let pod = daemon.run("goes-on", None).await;
    let file = daemon.dir.path().join("hull.toml");
    let config = fs::read_to_string(&file).unwrap();
    let log = || fs::read_to_string(daemon.dir.path().join("log")).unwrap();
    let reload = async |config: &str, said: &str| {
        fs::write(&file, config).unwrap();
        let pid = nix::unistd::Pid::from_raw(daemon.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !log().contains(said) {
            assert!(Instant::now() < deadline, "no {said:?} in {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let handlers = async || {
        let status = daemon.client.clone().status(StatusRequest::default()).await;
        let handlers = status.unwrap().into_inner().runtime_handlers;
        let names = handlers.into_iter().map(|handler| handler.name);
        names.collect::<BTreeSet<_>>()
    };
    assert!(!handlers().await.contains("late"));

    let wrong = format!("{config}[handlers.late]\nvcpu = 1\n");
    reload(&wrong, "did you mean handlers.small.vcpus?").await;
    assert!(!handlers().await.contains("late"));

    let changed = config.replace("memory_mib = 32", "memory_mib = 64");
    let changed = format!("log = 'debug'\n{changed}[handlers.late]\nvcpus = 1\n");
    reload(&changed, "vm.memory_mib").await;
    assert!(handlers().await.contains("late"));
    // Its own work is logged now.
    reload(&changed, "DEBUG").await;
    assert!(!daemon.ip(&pod).await.is_empty());
    daemon.end(&pod).await;
    daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_what_happened_and_name_nobody() {
    let Some(daemon) = Daemon::start_with("metrics.address = '127.0.0.1:9464'\n").await else {
        return;
    };
    let get = |path: &str| {
        let done = daemon.curl(&["-i", &format!("http://127.0.0.1:9464{path}")]);
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    };
    let pod = daemon.run("secret-name", None).await;
    let missing = PodSandboxStatusRequest {
        pod_sandbox_id: "nope".into(),
        verbose: false,
    };
    let mut client = daemon.client.clone();
    client.pod_sandbox_status(missing).await.unwrap_err();
    let text = get("/metrics");
    assert!(
        text.contains("content-type: text/plain; version=0.0.4"),
        "{text}"
    );
    for line in [
        r#"hull_rpc_seconds_count{code="Ok",method="RunPodSandbox",service="runtime.v1.RuntimeService"} 1"#,
        r#"hull_rpc_seconds_count{code="NotFound",method="PodSandboxStatus",service="runtime.v1.RuntimeService"} 1"#,
        r#"hull_sandbox_start_seconds_count{stage="total",start="boot"} 1"#,
        r#"hull_agent_call_seconds_count{call="configure the guest",result="ok"} 1"#,
        r#"hull_cni_seconds_count{command="ADD",plugin="bridge",result="ok"} 1"#,
        r#"hull_sandboxes{state="ready"} 1"#,
        r#"hull_containers{state="running"} 0"#,
        "hull_adopted_sandboxes 0",
        "hull_images 0",
        "hull_info{",
        r#"hull_vm_memory_bytes{memory="resident"} "#,
        "hull_process_open_fds ",
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
    assert!(
        !text.contains("secret-name") && !text.contains(&pod),
        "{text}"
    );
    assert!(get("/").starts_with("HTTP/1.1 404"));
    daemon.end(&pod).await;
    assert!(get("/metrics").contains(r#"hull_sandboxes{state="ready"} 0"#));
    daemon.assert_nothing_left();
}
