//! A client as kubelet is one: it asks again for what it was not told, and looks at what is there. What it
//! was told must be so from then on; what is not is a fault.

use std::{collections::HashSet, fs, path::PathBuf, time::Duration};

use futures::future::{FutureExt, join_all};
use hull_pod::stats::Scope;
use hull_spec::{
    error::{ErrorKind, PodError},
    id::{ContainerId, PodId},
    info::{ContainerInfo, ContainerState, SandboxInfo, SandboxState},
    spec::{
        ContainerMetadata, ContainerSpec, ImageRequest, MountPropagation, MountSource, MountSpec,
        Resources, SandboxMetadata, SandboxSpec,
    },
};
use tokio::time::sleep;

use crate::{
    common::images::{IMAGE, VOLUME},
    daemon::{Failure, Socket},
    dice, files, logs,
    trace::{fault, trace},
    vms,
};

/// How often something is tried that the guest refuses.
const PATIENCE: u32 = 5;

/// Where a pod's directory has its emptyDirs.
const EMPTY_DIRS: &str = "volumes/kubernetes.io~empty-dir";
/// The emptyDirs of each pod.
const VOLUMES: [&str; 2] = ["a", "b"];
/// Bytes of what stands for a formatted disk.
pub const TEMPLATE_BYTES: u64 = 4096;

/// The client.
#[derive(Clone)]
pub struct Kubelet {
    pub socket: Socket,
    pub logs: PathBuf,
    /// Its own directory, with the volumes of pods.
    pub dir: PathBuf,
}

/// A pod that it was told of.
#[derive(Clone)]
struct Pod {
    kubelet: Kubelet,
    name: String,
    id: PodId,
}

/// What a container does, and how it may end.
#[derive(Clone)]
struct Plan {
    name: String,
    args: Vec<String>,
    /// What it mounts.
    sources: Vec<MountSource>,
    /// The exit code when nobody ends it; none: it runs until somebody does.
    code: Option<i32>,
}

/// What is known of a container.
struct Container {
    pod: Pod,
    plan: Plan,
    id: ContainerId,
    /// The answer to its start was that it was started.
    is_started: bool,
    is_stopped: bool,
    /// The end that was told.
    end: Option<i32>,
}

/// The pod is not there any more, or can't be gone on with.
struct Lost;

async fn backoff() {
    sleep(dice::ms(100..3000)).await;
}

impl Kubelet {
    /// The life of a pod, until nothing is left of it; for some a second one, with the same volumes.
    pub async fn pod(self, name: String) {
        sleep(dice::ms(0..2000)).await;
        for life in 0..1 + u32::from(dice::one_in(6)) {
            let Some(pod) = self.up(&name).await else {
                return;
            };
            let count = dice::within(0..4);
            let names = (0..count).map(|n| format!("{name}-{life}{n}"));
            join_all(names.map(|name| pod.clone().container(name))).await;
            pod.check().await;
            if dice::one_in(4) {
                sleep(dice::ms(0..20_000)).await;
                pod.check().await;
            }
            pod.down().await;
        }
        self.remove_volumes(&name);
    }

    /// Brings a pod up, in as many attempts as it takes.
    async fn up(&self, name: &str) -> Option<Pod> {
        let mut attempt = 0;
        for _ in 0..200 {
            let spec = self.sandbox(name, attempt);
            let call = format!("run {name} {attempt}");
            let run = self
                .socket
                .call(&call, move |pods| {
                    async move { pods.run_sandbox(spec).await }.boxed()
                })
                .await;
            let id = match run {
                Ok(id) => Some(id),
                Err(_) => {
                    backoff().await;
                    match self.find(name).await {
                        Some(found) if found.state == SandboxState::Ready => Some(found.id),
                        Some(found) => {
                            self.remove(&found.id, name).await;
                            attempt += 1;
                            None
                        }
                        None => None,
                    }
                }
            };
            if let Some(id) = id {
                trace(format_args!("{name} is {}", id.short()));
                return Some(Pod {
                    kubelet: self.clone(),
                    name: name.into(),
                    id,
                });
            }
        }
        fault(format!("{name} can't be brought up"));
        None
    }

    fn sandbox(&self, name: &str, attempt: u32) -> SandboxSpec {
        SandboxSpec {
            metadata: SandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt,
            },
            log_directory: self.logs.join(name),
            ..SandboxSpec::default()
        }
    }

    /// Asks until there is an answer.
    async fn sandboxes(&self) -> Vec<SandboxInfo> {
        loop {
            let list = |pods: hull_pod::Pods| async move { Ok(pods.sandboxes().await) }.boxed();
            match self.socket.call("list sandboxes", list).await {
                Ok(list) => return list,
                Err(_) => backoff().await,
            }
        }
    }

    /// The pod of a name that is listed.
    async fn find(&self, name: &str) -> Option<SandboxInfo> {
        let all = self.sandboxes().await;
        let mut found = all
            .into_iter()
            .filter(|info| info.spec.metadata.name == name);
        let first = found.next();
        if let Some(second) = found.next() {
            fault(format!("{name} is there twice: {}", second.id));
        }
        first
    }

    /// Stops and removes a pod, in as many attempts as it takes.
    async fn remove(&self, id: &PodId, name: &str) {
        for stop in [true, false] {
            if stop && dice::one_in(4) {
                continue;
            }
            let what = if stop { "stop" } else { "remove" };
            let mut last = String::new();
            let mut is_done = false;
            for _ in 0..300 {
                let id = id.to_string();
                let work = move |pods: hull_pod::Pods| {
                    async move {
                        match stop {
                            true => pods.stop_sandbox(&id).await,
                            false => pods.remove_sandbox(&id).await,
                        }
                    }
                    .boxed()
                };
                match self.socket.call(&format!("{what} {name}"), work).await {
                    Ok(()) => is_done = true,
                    Err(error) => last = format!("{error:?}"),
                }
                if is_done {
                    break;
                }
                backoff().await;
            }
            if !is_done {
                fault(format!("{what} of {name} never succeeds: {last}"));
                return;
            }
            if vms::lives(id.as_str()) {
                fault(format!("the VM of {name} lives after {what}"));
            }
        }
        if self.sandboxes().await.iter().any(|info| info.id == *id) {
            fault(format!("{name} is there after it was removed"));
        }
    }

    fn pod_dir(&self, name: &str) -> PathBuf {
        self.dir.join("pods").join(format!("uid-{name}"))
    }

    /// Removes the volumes of a pod that is gone. In those that its guest kept is nothing but their image.
    fn remove_volumes(&self, name: &str) {
        for volume in VOLUMES {
            let path = self.pod_dir(name).join(EMPTY_DIRS).join(volume);
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                let length = entry.metadata().map_or(0, |about| about.len());
                if entry.file_name() != ".hull-volume.img" || length != TEMPLATE_BYTES {
                    fault(format!("{entry:?} of {length} bytes in a volume"));
                }
            }
        }
        // It may have had none.
        let _ = fs::remove_dir_all(self.pod_dir(name));
    }

    /// Everything that is listed.
    pub async fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = self
            .sandboxes()
            .await
            .into_iter()
            .map(|info| format!("sandbox {}", info.id))
            .collect();
        loop {
            let list = |pods: hull_pod::Pods| {
                async move {
                    Ok(pods
                        .select_containers("", |_| true, |c| c.id.to_string())
                        .await)
                }
                .boxed()
            };
            match self.socket.call("list containers", list).await {
                Ok(list) => {
                    left.extend(list.into_iter().map(|id| format!("container {id}")));
                    return left;
                }
                Err(_) => backoff().await,
            }
        }
    }
}

impl Pod {
    fn is_harmed(&self) -> bool {
        vms::is_harmed(self.id.as_str())
    }

    /// Whether it can be gone on with. It must be listed, and be ready unless its VM was harmed.
    async fn check(&self) -> bool {
        let Self { kubelet, name, id } = self;
        let found = kubelet.find(name).await;
        match found {
            Some(info) if info.id == *id => {
                let is_ready = info.state == SandboxState::Ready;
                if !is_ready && !self.is_harmed() {
                    fault(format!("{name} is not ready: {}", info.message));
                }
                is_ready
            }
            Some(info) => {
                fault(format!("{name} is another: {}", info.id));
                false
            }
            None => {
                fault(format!("{name} is not listed"));
                false
            }
        }
    }

    async fn down(self) {
        self.kubelet.remove(&self.id, &self.name).await;
    }

    /// An image, a path that the host shares, and two volumes that guests keep by themselves.
    fn all_sources(&self) -> Vec<MountSource> {
        let image = MountSource::Image {
            image: ImageRequest {
                image: VOLUME.into(),
                ..ImageRequest::default()
            },
            sub_path: String::new(),
        };
        let shared = self.kubelet.dir.join("shared");
        let volumes = self.kubelet.pod_dir(&self.name).join(EMPTY_DIRS);
        let volumes = VOLUMES.map(|name| volumes.join(name));
        let paths: Vec<PathBuf> = [shared].into_iter().chain(volumes).collect();
        paths
            .iter()
            .for_each(|path| fs::create_dir_all(path).unwrap());
        let hosts = paths.into_iter().map(MountSource::Host);
        [image].into_iter().chain(hosts).collect()
    }

    /// Some of them, for most containers none.
    fn sources(&self) -> Vec<MountSource> {
        if !dice::one_in(3) {
            return Vec::new();
        }
        let mut sources = self.all_sources();
        sources.retain(|_| dice::one_in(2));
        sources
    }

    /// The containers of a name that are listed.
    async fn list(&self, name: &str) -> Vec<ContainerInfo> {
        loop {
            let (pod, name) = (self.id.to_string(), name.to_owned());
            let list = move |pods: hull_pod::Pods| {
                async move {
                    let is_named = |info: &ContainerInfo| info.spec.metadata.name == name;
                    Ok(pods.select_containers(&pod, is_named, Clone::clone).await)
                }
                .boxed()
            };
            match self.kubelet.socket.call("list containers", list).await {
                Ok(list) => return list,
                Err(_) => backoff().await,
            }
        }
    }

    /// The life of a container.
    async fn container(self, name: String) {
        sleep(dice::ms(0..1000)).await;
        let _: Result<(), Lost> = async {
            let sources = self.sources();
            let mut container = self.create(plan(name, sources)).await?;
            if dice::one_in(8) {
                // Never started.
                return container.remove().await;
            }
            container.start().await?;
            for _ in 0..dice::within(0..5) {
                container.something().await?;
            }
            if container.plan.code.is_some() && !dice::one_in(4) {
                container.wait().await?;
            }
            if dice::one_in(5) {
                // Goes with its pod.
                return Ok(());
            }
            if !dice::one_in(4) {
                container.stop().await?;
                container.wait().await?;
            }
            container.remove().await
        }
        .await;
    }

    /// Creates a container, in as many attempts as it takes.
    async fn create(self, plan: Plan) -> Result<Container, Lost> {
        let mut refusals = 0;
        loop {
            let (pod, spec) = (self.id.to_string(), self.spec(&plan));
            let create = move |pods: hull_pod::Pods| {
                async move { pods.create_container(&pod, spec).await }.boxed()
            };
            let what = format!("create {}", plan.name);
            let id = match self.kubelet.socket.call(&what, create).await {
                Ok(id) => Some(id),
                Err(failure) => {
                    if let Failure::Refused(error) = &failure
                        && error.kind() != ErrorKind::AlreadyExists
                    {
                        refusals += 1;
                    }
                    if refusals > PATIENCE || !self.check().await {
                        return Err(Lost);
                    }
                    backoff().await;
                    let there = self.list(&plan.name).await;
                    there.into_iter().next().map(|info| info.id)
                }
            };
            if let Some(id) = id {
                trace(format_args!("{} is {}", plan.name, id.short()));
                return Ok(Container {
                    pod: self,
                    plan,
                    id,
                    is_started: false,
                    is_stopped: false,
                    end: None,
                });
            }
        }
    }

    fn spec(&self, plan: &Plan) -> ContainerSpec {
        ContainerSpec {
            metadata: ContainerMetadata {
                name: plan.name.clone(),
                attempt: 0,
            },
            image: ImageRequest {
                image: IMAGE.into(),
                ..ImageRequest::default()
            },
            command: plan.args.clone(),
            log_path: format!("{}.log", plan.name).into(),
            mounts: plan.sources.iter().zip(0..).map(mount).collect(),
            ..ContainerSpec::default()
        }
    }
}

impl Container {
    /// What is told of it. It must be listed, once, and be in a state that it can be in.
    async fn look(&mut self) -> Result<ContainerInfo, Lost> {
        let name = &self.plan.name;
        let mut listed = self.pod.list(name).await;
        let Some(info) = listed.pop() else {
            fault(format!("{name} is not listed"));
            return Err(Lost);
        };
        if !listed.is_empty() {
            fault(format!("{name} is there {} times", listed.len() + 1));
        }
        if info.id != self.id {
            fault(format!("{name} is another: {}", info.id));
        }
        match info.state {
            ContainerState::Created if self.is_started => {
                fault(format!("{name} was started and is created"));
            }
            ContainerState::Running if self.end.is_some() => {
                fault(format!("{name} has ended and runs"));
            }
            ContainerState::Exited => {
                self.check_end(&info);
                self.check_ended().await;
            }
            ContainerState::Unknown => fault(format!("{name} is in no state")),
            _ => {}
        }
        self.check_log(&info);
        Ok(info)
    }

    /// An end that was told stays, and is one that there can be.
    fn check_end(&mut self, info: &ContainerInfo) {
        let (name, code) = (&self.plan.name, info.exit_code);
        if let Some(end) = self.end
            && end != code
        {
            fault(format!("{name} ended with {end}, and then with {code}"));
        }
        self.end = Some(code);
        let is_ended = self.is_stopped && [143, 137].contains(&code);
        let is_lost = self.pod.is_harmed() && [137, 255].contains(&code);
        // A daemon that finds one to be ended asks it first, as for any stop.
        let is_unstarted = !self.is_started && [128, 137, 143].contains(&code);
        if self.plan.code != Some(code) && !is_ended && !is_lost && !is_unstarted {
            fault(format!(
                "{name} ended with {code} ({} {}), not {:?}",
                info.reason, info.message, self.plan.code
            ));
        }
    }

    /// What is told to have ended does not run, or not for long: it may be ended after it was told.
    async fn check_ended(&self) {
        let runs = || vms::runs(self.pod.id.as_str(), self.id.as_str()) && !self.pod.is_harmed();
        for _ in 0..60 {
            if !runs() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
        fault(format!("{} is told to have ended and runs", self.plan.name));
    }

    /// The log has what the container wrote: the beginning of it, and all when it ended by itself.
    fn check_log(&self, info: &ContainerInfo) {
        let name = &self.plan.name;
        let directory = self.pod.kubelet.logs.join(&self.pod.name);
        let is_whole = info.state == ContainerState::Exited
            && self.plan.code == Some(info.exit_code)
            && !self.pod.is_harmed();
        if let Err(why) = logs::check(&directory, name, &self.plan.args, is_whole) {
            fault(format!("the log of {name} ({:?}): {why}", info.state));
        }
    }

    async fn start(&mut self) -> Result<(), Lost> {
        for _ in 0..200 {
            let id = self.id.to_string();
            let start =
                move |pods: hull_pod::Pods| async move { pods.start_container(&id).await }.boxed();
            let what = format!("start {}", self.plan.name);
            if self.pod.kubelet.socket.call(&what, start).await.is_ok() {
                self.is_started = true;
                return Ok(());
            }
            backoff().await;
            match self.look().await?.state {
                ContainerState::Created => {}
                _ => return Ok(()),
            }
            if !self.pod.check().await {
                return Err(Lost);
            }
        }
        fault(format!("{} can't be started", self.plan.name));
        Err(Lost)
    }

    /// One of the things that one does with a container that runs.
    #[expect(clippy::collapsible_match, reason = "a guard would wait for an answer")]
    async fn something(&mut self) -> Result<(), Lost> {
        let (id, name) = (self.id.to_string(), self.plan.name.clone());
        let socket = self.pod.kubelet.socket.clone();
        match dice::within(0..6) {
            0 => sleep(dice::ms(0..5000)).await,
            1 => {
                let args = vec!["out:hello".into(), "exit:3".into()];
                let exec = move |pods: hull_pod::Pods| {
                    async move {
                        pods.exec_sync(&id, args, Some(Duration::from_secs(20)))
                            .await
                    }
                    .boxed()
                };
                if let Ok(output) = socket.call(&format!("exec in {name}"), exec).await
                    && (output.stdout != b"hello" || output.exit_code != 3)
                    && !self.pod.is_harmed()
                {
                    fault(format!("a command in {name} ended with {output:?}"));
                }
            }
            2 => {
                let pod = self.pod.id.clone();
                let stats = move |pods: hull_pod::Pods| {
                    async move {
                        let wanted = HashSet::from([pod]);
                        drop(pods.stats(&wanted, Scope::Containers).await);
                        Ok(())
                    }
                    .boxed()
                };
                let _ = socket
                    .call(&format!("stats of {}", self.pod.name), stats)
                    .await;
            }
            3 => {
                if self.look().await?.state == ContainerState::Running {
                    let directory = self.pod.kubelet.logs.join(&self.pod.name);
                    logs::rotate(&directory, &name);
                    let reopen = move |pods: hull_pod::Pods| {
                        async move { pods.reopen_log(&id).await }.boxed()
                    };
                    let _ = socket
                        .call(&format!("reopen the log of {name}"), reopen)
                        .await;
                }
            }
            4 => {
                let limits = Resources {
                    cpu_shares: 100 + dice::within(0..100) as i64,
                    ..Resources::default()
                };
                let update = move |pods: hull_pod::Pods| {
                    async move { pods.update_container(&id, limits).await }.boxed()
                };
                let _ = socket.call(&format!("update {name}"), update).await;
            }
            _ => {}
        }
        self.look().await?;
        Ok(())
    }

    /// Waits until it has ended.
    async fn wait(&mut self) -> Result<(), Lost> {
        for _ in 0..300 {
            if self.look().await?.state == ContainerState::Exited {
                return Ok(());
            }
            backoff().await;
        }
        fault(format!("{} never ends", self.plan.name));
        Err(Lost)
    }

    async fn stop(&mut self) -> Result<(), Lost> {
        self.is_stopped = true;
        self.repeat("stop", |pods, id| {
            let grace = Duration::from_secs(2);
            async move { pods.stop_container(&id, grace).await }.boxed()
        })
        .await
    }

    async fn remove(&mut self) -> Result<(), Lost> {
        self.is_stopped = true;
        self.repeat("remove", |pods, id| {
            async move { pods.remove_container(&id).await }.boxed()
        })
        .await?;
        let name = &self.plan.name;
        if !self.pod.list(name).await.is_empty() {
            fault(format!("{name} is there after it was removed"));
        }
        if let Some(server) = vms::file_server(self.pod.id.as_str())
            && files::has_shares(server, self.id.as_str())
        {
            fault(format!("{name} has shares after it was removed"));
        }
        Ok(())
    }

    /// Asks for something in as many attempts as it takes.
    async fn repeat(
        &self,
        what: &str,
        work: fn(
            hull_pod::Pods,
            String,
        ) -> futures::future::BoxFuture<'static, Result<(), PodError>>,
    ) -> Result<(), Lost> {
        let name = &self.plan.name;
        let mut last = String::new();
        for _ in 0..300 {
            let (id, what) = (self.id.to_string(), format!("{what} {name}"));
            let socket = &self.pod.kubelet.socket;
            match socket.call(&what, move |pods| work(pods, id)).await {
                Ok(()) => return Ok(()),
                Err(error) => last = format!("{error:?}"),
            }
            backoff().await;
        }
        fault(format!("{what} of {name} never succeeds: {last}"));
        Err(Lost)
    }
}

/// What a container does, at random.
fn plan(name: String, sources: Vec<MountSource>) -> Plan {
    let code = dice::pick(&[0, 1, 3, 42]);
    let lines = |most| format!("lines:{}", dice::within(1..most));
    let exit = format!("exit:{code}");
    let (args, code) = match dice::within(0..8) {
        0 => (vec![lines(5), exit], Some(code)),
        1 => (
            vec![
                lines(30),
                format!("sleep:{}", dice::within(1..3000)),
                lines(9),
                exit,
            ],
            Some(code),
        ),
        2 => (
            vec!["out:a\\nb".into(), "err:wrong\\n".into(), exit],
            Some(code),
        ),
        3 => (vec!["oom".into()], Some(137)),
        4 => (
            vec![
                lines(20),
                "close".into(),
                format!("sleep:{}", dice::within(1..900)),
                exit,
            ],
            Some(code),
        ),
        5 => (vec!["trap".into(), lines(9), "wait".into()], None),
        6 => (
            vec![
                lines(60),
                format!("sleep:{}", dice::within(1..30_000)),
                exit,
            ],
            Some(code),
        ),
        _ => (vec!["out:ready\\n".into(), "wait".into()], None),
    };
    Plan {
        name,
        args,
        sources,
        code,
    }
}

fn mount((source, number): (&MountSource, u32)) -> MountSpec {
    MountSpec {
        container_path: format!("/v{number}").into(),
        source: source.clone(),
        readonly: matches!(source, MountSource::Image { .. }),
        recursive_readonly: false,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    }
}

/// A pod that must come and go at the first attempt.
pub async fn probe(kubelet: Kubelet) {
    let refusal =
        |what: &str, failure: Failure| fault(format!("{what} of a last pod: {failure:?}"));
    // The daemon may have been killed a moment before nothing went wrong any more.
    let look = |pods: hull_pod::Pods| async move { Ok(pods.sandboxes().await) }.boxed();
    while let Err(Failure::Gone) = kubelet.socket.call("look for the daemon", look).await {
        backoff().await;
    }
    let spec = kubelet.sandbox("last", 0);
    let run = |pods: hull_pod::Pods| async move { pods.run_sandbox(spec).await }.boxed();
    let id = match kubelet.socket.call("run last", run).await {
        Ok(id) => id,
        Err(failure) => return refusal("run", failure),
    };
    let pod = Pod {
        kubelet: kubelet.clone(),
        name: "last".into(),
        id,
    };
    let plan = Plan {
        name: "last-0".into(),
        args: vec!["lines:3".into(), "exit:7".into()],
        sources: pod.all_sources(),
        code: Some(7),
    };
    if let Ok(mut container) = pod.clone().create(plan).await
        && container.start().await.is_ok()
        && container.wait().await.is_ok()
    {
        let _ = container.remove().await;
    }
    pod.check().await;
    pod.down().await;
    kubelet.remove_volumes("last");
}
