//! What happens to pods and containers, with plugins of the node (NRI) having their say. Without plugins
//! configured, this is [`Pods`] and nothing else.
//!
//! Plugins hear of an end from whoever sees it first, the client's call or the news of the pods, and once.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use error_reporter::Report;
use futures::{FutureExt, future::join_all};
use hull_image::{Image, ImageStore};
use hull_nri::{
    Command, Config, Node, Plugins, Pod, Refusal, Told,
    describe::{self, image},
};
use hull_pod::{Admission, Asked, EventKind, EventsLost, PodEvent, Pods};
use hull_spec::{
    error::PodError,
    id::{ContainerId, PodId},
    info::{ContainerInfo, ContainerState, SandboxInfo, SandboxState},
    oci::command_line,
    spec::{ContainerSpec, Resources, SandboxSpec},
    validate,
};
use tokio::{net::UnixListener, time::timeout};
use tracing::{info, warn};

/// How long containers may take to end before their pod's end goes on without.
const CONTAINERS_END: Duration = Duration::from_secs(10);
/// How long a container may take to end by itself when a plugin evicts it.
const EVICTION: Duration = Duration::from_secs(10);
/// How long until news of pods are asked for again.
const AGAIN: Duration = Duration::from_secs(1);

/// What happens to pods and containers. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    known: Known,
    /// None: nobody has a say.
    plugins: Option<Plugins>,
}

/// Takes plugins at `listener` from now on.
pub(crate) async fn plugins(listener: UnixListener, pods: &Pods, images: &ImageStore) -> Plugins {
    let known = Known {
        pods: pods.clone(),
        images: images.clone(),
    };
    let plugins = Plugins::new(Config::default(), Arc::new(known.clone()));
    // They were told, or there were none to tell.
    for container in pods.containers().await.iter().filter(|it| has_ended(it)) {
        plugins.has_ended(container.id.as_str());
    }
    let is_over = |pod: &SandboxInfo| pod.state == SandboxState::NotReady;
    for pod in pods.select_sandboxes(is_over, |it| it.id.clone()).await {
        plugins.has_ended(pod.as_str());
    }
    let serves = plugins.clone();
    tokio::spawn(async move { serves.serve(listener).await });
    tokio::spawn(follow(known, plugins.clone()));
    plugins
}

fn has_ended(container: &ContainerInfo) -> bool {
    container.state == ContainerState::Exited
}

/// Tells plugins of containers that end by themselves.
async fn follow(known: Known, plugins: Plugins) {
    loop {
        let Ok(mut events) = known.pods.events() else {
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        // What was missed.
        for container in known
            .pods
            .containers()
            .await
            .iter()
            .filter(|it| has_ended(it))
        {
            if let Ok(sandbox) = known.pods.sandbox(container.pod.as_str()).await {
                let told = known.container(container, &sandbox).await;
                plugins
                    .stop_container(&describe::pod(&sandbox), &told)
                    .await;
            }
        }
        loop {
            match events.next().await {
                Some(Ok(event)) => ended(&known, &plugins, &event).await,
                Some(Err(EventsLost)) => break,
                None => return,
            }
        }
    }
}

async fn ended(known: &Known, plugins: &Plugins, event: &PodEvent) {
    let Some(id) = event
        .container()
        .filter(|_| event.kind() == EventKind::Stopped)
    else {
        return;
    };
    let container = event.containers().find(|it| it.id == *id).cloned();
    if let Some(container) = container {
        let sandbox = event.sandbox();
        let told = known.container(&container, sandbox).await;
        plugins.stop_container(&describe::pod(sandbox), &told).await;
    }
}

fn refused(action: &str) -> impl Fn(Refusal) -> PodError {
    move |refusal| PodError::precondition(action, refusal.to_string())
}

impl Life {
    pub(crate) fn new(pods: Pods, images: ImageStore, plugins: Option<Plugins>) -> Self {
        let known = Known { pods, images };
        Self { known, plugins }
    }

    /// See [`Pods::run_sandbox`].
    pub(crate) async fn run_sandbox(&self, spec: SandboxSpec) -> Result<PodId, PodError> {
        let Some(plugins) = self.plugins.clone() else {
            return self.known.pods.run_sandbox(spec).await;
        };
        // Until others see it.
        let kept = Arc::new(Mutex::new(None));
        let keep = Arc::clone(&kept);
        let admission: Admission = Box::new(move |sandbox| {
            async move {
                let pod = describe::pod(&sandbox);
                match plugins.run_pod(pod.clone()).await {
                    Ok(creation) => {
                        *keep.lock().unwrap_or_else(PoisonError::into_inner) = Some(creation);
                        Ok(())
                    }
                    Err(refusal) => {
                        plugins.remove_pod(&pod).await;
                        Err(refused("start the sandbox")(refusal))
                    }
                }
            }
            .boxed()
        });
        let ran = self.known.pods.run_sandbox_if(spec, Some(admission)).await;
        drop(kept);
        ran
    }

    /// See [`Pods::restore_sandbox`]; refused where plugins are, who could not adjust what runs already.
    pub(crate) async fn restore_sandbox(
        &self,
        checkpoint: &Path,
        spec: Option<SandboxSpec>,
        asked: Asked,
    ) -> Result<(PodId, Vec<(String, ContainerId)>), PodError> {
        if self.plugins.is_some() {
            let reason = "NRI is on, and its plugins can't adjust containers that run already";
            return Err(PodError::precondition("restore the sandbox", reason));
        }
        let pods = &self.known.pods;
        pods.restore_sandbox(checkpoint, spec, asked).await
    }

    /// See [`Pods::stop_sandbox`].
    pub(crate) async fn stop_sandbox(&self, id: &str) -> Result<(), PodError> {
        if let Some(plugins) = &self.plugins {
            self.end_containers(plugins, id).await;
        }
        self.known.pods.stop_sandbox(id).await
    }

    /// Ends the containers of a pod, so that plugins hear of their end before that of the pod; what does not
    /// end is left to the end of the pod. Returns the pod and its containers as they were told of.
    async fn end_containers(&self, plugins: &Plugins, id: &str) -> Option<(Pod, Vec<Told>)> {
        let pods = &self.known.pods;
        let (sandbox, containers) = pods.sandbox_with_containers(id).await.ok()?;
        if sandbox.state == SandboxState::Ready {
            let run = containers.iter().filter(|it| !has_ended(it));
            let end = run.map(|it| pods.stop_container(it.id.as_str(), Duration::ZERO));
            // Whatever is wrong with them, the end of the pod says it.
            let _ = timeout(CONTAINERS_END, join_all(end)).await;
        }
        let (sandbox, containers) = pods.sandbox_with_containers(id).await.ok()?;
        let pod = describe::pod(&sandbox);
        let mut told = Vec::with_capacity(containers.len());
        for container in &containers {
            let container_told = self.known.container(container, &sandbox).await;
            if has_ended(container) {
                plugins.stop_container(&pod, &container_told).await;
            }
            told.push(container_told);
        }
        plugins.stop_pod(&pod).await;
        Some((pod, told))
    }

    /// See [`Pods::remove_sandbox`].
    pub(crate) async fn remove_sandbox(&self, id: &str) -> Result<(), PodError> {
        let Some(plugins) = &self.plugins else {
            return self.known.pods.remove_sandbox(id).await;
        };
        let known = self.end_containers(plugins, id).await;
        self.known.pods.remove_sandbox(id).await?;
        if let Some((pod, containers)) = known {
            for container in &containers {
                plugins.stop_container(&pod, container).await;
                plugins.remove_container(&pod, container).await;
            }
            plugins.remove_pod(&pod).await;
        }
        Ok(())
    }

    /// See [`Pods::update_sandbox`].
    pub(crate) async fn update_sandbox(
        &self,
        id: &str,
        overhead: Option<Resources>,
        limits: Option<Resources>,
    ) -> Result<(), PodError> {
        let pods = &self.known.pods;
        let Some(plugins) = &self.plugins else {
            return pods.update_sandbox(id, overhead, limits).await;
        };
        let pod = describe::pod(&pods.sandbox(id).await?);
        let asked = plugins.update_pod(&pod, overhead.as_ref(), limits.as_ref());
        asked.await.map_err(refused("change the sandbox"))?;
        pods.update_sandbox(id, overhead, limits).await?;
        if let Ok(sandbox) = pods.sandbox(id).await {
            plugins.pod_updated(&describe::pod(&sandbox)).await;
        }
        Ok(())
    }

    /// See [`Pods::create_container`].
    pub(crate) async fn create_container(
        &self,
        pod: &str,
        mut spec: ContainerSpec,
    ) -> Result<ContainerId, PodError> {
        let pods = &self.known.pods;
        let Some(plugins) = &self.plugins else {
            return pods.create_container(pod, spec).await;
        };
        let sandbox = pods.sandbox(pod).await?;
        let found = self.known.images.get(&spec.image.image).await;
        let (SandboxState::Ready, Ok(Some(found))) = (sandbox.state, found) else {
            // It says what is wrong.
            return pods.create_container(pod, spec).await;
        };
        validate::container(&spec, &sandbox.spec)?;
        let id = ContainerId::random();
        let command = command(&sandbox, &spec, Some(&found));
        let mut told = describe::draft(&id, &sandbox, &spec, command);
        let reference = found.repo_digests.first().map_or("", String::as_str);
        image(&mut told, &found.id, reference);
        let pod_told = describe::pod(&sandbox);
        let creation = plugins.create_container(&pod_told, told.clone(), &mut spec);
        let creation = creation.await.map_err(refused("create the container"))?;
        let created = pods.create_container_as(pod, id.clone(), spec).await;
        drop(creation);
        // Another call for the same container was first: that one's id counts.
        if created.as_ref().ok() != Some(&id) {
            plugins.remove_container(&pod_told, &told).await;
        } else if let Ok(container) = pods.container(id.as_str()).await {
            let told = self.known.container(&container, &sandbox).await;
            plugins.container_created(&pod_told, &told).await;
        }
        created
    }

    /// A container and its pod, as plugins are told of them.
    async fn told(&self, id: &str) -> Result<(ContainerInfo, Pod, Told), PodError> {
        let container = self.known.pods.container(id).await?;
        let sandbox = self.known.pods.sandbox(container.pod.as_str()).await?;
        let told = self.known.container(&container, &sandbox).await;
        Ok((container, describe::pod(&sandbox), told))
    }

    /// See [`Pods::start_container`].
    pub(crate) async fn start_container(&self, id: &str) -> Result<(), PodError> {
        let pods = &self.known.pods;
        let Some(plugins) = &self.plugins else {
            return pods.start_container(id).await;
        };
        let (container, pod, told) = self.told(id).await?;
        if container.state != ContainerState::Created {
            return pods.start_container(id).await;
        }
        let asked = plugins.start_container(&pod, &told).await;
        asked.map_err(refused("start the container"))?;
        pods.start_container(id).await?;
        if let Ok((_, pod, told)) = self.told(id).await {
            plugins.container_started(&pod, &told).await;
        }
        Ok(())
    }

    /// See [`Pods::stop_container`].
    pub(crate) async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), PodError> {
        self.known.pods.stop_container(id, grace).await?;
        if let Some(plugins) = &self.plugins
            && let Ok((container, pod, told)) = self.told(id).await
            && has_ended(&container)
        {
            plugins.stop_container(&pod, &told).await;
        }
        Ok(())
    }

    /// See [`Pods::remove_container`].
    pub(crate) async fn remove_container(&self, id: &str) -> Result<(), PodError> {
        let Some(plugins) = &self.plugins else {
            return self.known.pods.remove_container(id).await;
        };
        let known = self.told(id).await;
        self.known.pods.remove_container(id).await?;
        if let Ok((_, pod, told)) = known {
            plugins.stop_container(&pod, &told).await;
            plugins.remove_container(&pod, &told).await;
        }
        Ok(())
    }

    /// See [`Pods::update_container`].
    pub(crate) async fn update_container(
        &self,
        id: &str,
        mut limits: Resources,
    ) -> Result<(), PodError> {
        let pods = &self.known.pods;
        let Some(plugins) = &self.plugins else {
            return pods.update_container(id, limits).await;
        };
        let (_, pod, told) = self.told(id).await?;
        let asked = plugins.update_container(&pod, &told, &mut limits).await;
        asked.map_err(refused("change the container"))?;
        pods.update_container(id, limits).await?;
        if let Ok((_, pod, told)) = self.told(id).await {
            plugins.container_updated(&pod, &told).await;
        }
        Ok(())
    }
}

/// What a container runs. A container that its image says nothing for is told of with what was asked for.
fn command(sandbox: &SandboxInfo, spec: &ContainerSpec, image: Option<&Image>) -> Command {
    let all = image.and_then(|it| command_line(&sandbox.spec, spec, &it.config).ok());
    let (args, env) = all.unwrap_or_else(|| {
        let variable = |(name, value): &(String, String)| format!("{name}={value}");
        let args = [spec.command.as_slice(), &spec.args].concat();
        (args, spec.env.iter().map(variable).collect())
    });
    Command { args, env }
}

/// The pods of this node, as plugins are told of them.
#[derive(Debug, Clone)]
struct Known {
    pods: Pods,
    images: ImageStore,
}

impl Known {
    async fn container(&self, container: &ContainerInfo, sandbox: &SandboxInfo) -> Told {
        let image = self.images.get(container.image_id.as_str()).await;
        let image = image.ok().flatten();
        let command = command(sandbox, &container.spec, image.as_ref());
        describe::container(container, sandbox, command)
    }
}

#[async_trait]
impl Node for Known {
    async fn known(&self) -> (Vec<Pod>, Vec<Told>) {
        let sandboxes = self.pods.sandboxes().await;
        let by_id: HashMap<&PodId, &SandboxInfo> =
            sandboxes.iter().map(|it| (&it.id, it)).collect();
        let mut containers = Vec::new();
        for container in &self.pods.containers().await {
            if let Some(sandbox) = by_id.get(&container.pod) {
                containers.push(self.container(container, sandbox).await);
            }
        }
        (sandboxes.iter().map(describe::pod).collect(), containers)
    }

    async fn update(&self, container: &str, limits: Resources) -> Result<(), PodError> {
        self.pods.update_container(container, limits).await
    }

    fn evict(&self, plugin: &str, container: &str, reason: &str) {
        let (pods, id) = (self.pods.clone(), container.to_owned());
        let reason = hull_base::printable::one_line(reason, 256);
        info!(plugin, container, reason, "a plugin evicts a container");
        tokio::spawn(async move {
            if let Err(error) = pods.stop_container(&id, EVICTION).await {
                warn!(container = id, error = %Report::new(error), "evict a container");
            }
        });
    }
}
