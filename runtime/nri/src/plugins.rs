//! All plugins: how they come, and who is called when.
//!
//! One event is told at a time, to one plugin after the other by their indices, so all of them see events in
//! one order. A plugin that joins is told what there is in the same turn in which it is added: what is being
//! made at that moment is among it, what comes later is told as an event, so it misses nothing.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use error_reporter::Report;
use hull_base::blocking;
use hull_proto_nri::{
    ContainerUpdate, CreateContainerRequest, CreateContainerResponse, Event, PluginInstance,
    PostCreateContainerRequest, PostStartContainerRequest, PostUpdateContainerRequest,
    PostUpdatePodSandboxRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopContainerResponse,
    StopPodSandboxRequest, UpdateContainerRequest, UpdateContainerResponse,
    UpdatePodSandboxRequest, UpdatePodSandboxResponse, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use hull_spec::spec::{ContainerSpec, Resources};
use protobuf::Message;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Mutex as AsyncMutex, Semaphore},
};
use tracing::{info, warn};

use crate::{
    apply::apply,
    describe::{Pod, Told, resources},
    launch::{installed, launch},
    limits::Refused,
    node::{Config, Node, Refusal},
    outcome::{Outcome, Update},
    plugin::{Launched, Plugin},
};

/// Connections, those that have not registered yet included.
const CONNECTIONS: usize = 64;
/// Whose fault it is when all plugins together want what can't be.
const ALL: &str = "(all)";
/// How many that are gone are remembered: more than news of pods can be late (`hull_pod::events`).
const GONE: usize = 8192;

/// The plugins of this node. Clones share them.
#[derive(Debug, Clone)]
pub struct Plugins {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    node: Arc<dyn Node>,
    config: Config,
    /// In the order in which they are called. Locked as long as an event is told.
    plugins: AsyncMutex<Vec<Plugin>>,
    /// One joins at a time, so that who comes again and again holds up each event once at most.
    joining: AsyncMutex<()>,
    connections: Arc<Semaphore>,
    making: Mutex<Making>,
}

/// What plugins were told of, and is not there for others yet; and what they were told the end of.
#[derive(Debug, Default)]
struct Making {
    pods: BTreeMap<String, Pod>,
    containers: BTreeMap<String, Told>,
    ended: BTreeSet<String>,
    /// Those among them that are gone, the oldest first: news of their end may still be on the way.
    gone: VecDeque<String>,
}

impl Making {
    fn forget(&mut self, id: &str) {
        self.gone.push_back(id.to_owned());
        if self.gone.len() > GONE
            && let Some(oldest) = self.gone.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }
}

/// A pod or container that plugins know of and others don't yet.
#[derive(Debug)]
pub struct Creation {
    shared: Arc<Shared>,
    id: String,
}

impl Drop for Creation {
    fn drop(&mut self) {
        let mut making = self.shared.making();
        making.pods.remove(&self.id);
        making.containers.remove(&self.id);
    }
}

impl Shared {
    fn making(&self) -> MutexGuard<'_, Making> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plugins {
    /// Starts the plugins that are installed, and takes those that come to `listener`, for as long as this is
    /// polled.
    pub async fn serve(&self, listener: UnixListener) {
        self.start_installed().await;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => self.connect(stream, None),
                Err(error) => {
                    warn!(%error, "accept an NRI plugin");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// No plugins yet.
    #[must_use]
    pub fn new(config: Config, node: Arc<dyn Node>) -> Self {
        Self {
            shared: Arc::new(Shared {
                node,
                config,
                plugins: AsyncMutex::default(),
                joining: AsyncMutex::default(),
                connections: Arc::new(Semaphore::new(CONNECTIONS)),
                making: Mutex::default(),
            }),
        }
    }

    async fn start_installed(&self) {
        let config = self.shared.config.clone();
        for plugin in blocking(move || installed(&config)).await {
            match launch(plugin) {
                Ok((stream, launched)) => self.connect(stream, Some(launched)),
                Err(error) => warn!(%error, "start an installed NRI plugin"),
            }
        }
    }

    fn connect(&self, stream: UnixStream, launched: Option<Launched>) {
        let Ok(seat) = Arc::clone(&self.shared.connections).try_acquire_owned() else {
            warn!("an NRI plugin is refused: there are {CONNECTIONS} already");
            return;
        };
        let plugins = self.clone();
        tokio::spawn(async move {
            let installed = launched.as_ref().map(|it| it.name.whole());
            if let Err(error) = plugins.join(stream, launched, seat).await {
                warn!(installed, error = %Report::new(error), "an NRI plugin does not come to be one");
            }
        });
    }

    async fn join(
        &self,
        stream: UnixStream,
        launched: Option<Launched>,
        seat: tokio::sync::OwnedSemaphorePermit,
    ) -> Result<(), crate::plugin::JoinError> {
        let shared = &self.shared;
        let times = shared.config.times;
        let node = Arc::clone(&shared.node);
        let plugin = Plugin::register(stream, launched, node, times).await?;
        let whole = plugin.whole().to_owned();
        let joining = shared.joining.lock().await;
        let mut plugins = shared.plugins.lock().await;
        let (pods, containers) = self.known().await;
        let answer = plugin.synchronize(pods, containers).await?;
        let gone = plugin.gone(seat);
        let place = plugins.partition_point(|it| it.name.index <= plugin.name.index);
        plugins.insert(place, plugin);
        info!(
            plugin = whole,
            plugins = plugins.len(),
            "plugin is connected"
        );
        drop(plugins);
        drop(joining);
        // Its process is to end with its connection, whether or not something happens on the node.
        let this = self.clone();
        tokio::spawn(async move {
            let _seat = gone.await;
            this.shared
                .plugins
                .lock()
                .await
                .retain(|it| !it.is_closed());
        });
        let mut outcome = Outcome::default();
        if let Err(refused) = outcome.update(&whole, answer.update, None, None) {
            warn!(plugin = whole, %refused, "change containers for a plugin");
        }
        if let Err(refusal) = self.update_others(&whole, outcome.updates).await {
            warn!(plugin = whole, %refusal, "change containers for a plugin");
        }
        Ok(())
    }

    /// What there is, with what is being made.
    async fn known(&self) -> (Vec<Pod>, Vec<Told>) {
        // Before: what is done meanwhile is in both.
        let (making_pods, making_containers) = {
            let making = self.shared.making();
            (making.pods.clone(), making.containers.clone())
        };
        let (mut pods, mut containers) = self.shared.node.known().await;
        let known: BTreeSet<String> = pods.iter().map(|pod| pod.id.clone()).collect();
        let more = making_pods
            .into_values()
            .filter(|it| !known.contains(&it.id));
        pods.extend(more);
        let known: BTreeSet<String> = containers.iter().map(|it| it.id.clone()).collect();
        let more = making_containers.into_values();
        containers.extend(more.filter(|it| !known.contains(&it.id)));
        (pods, containers)
    }

    /// Locks the plugins for an event; those that are gone are left out.
    async fn turn(&self) -> tokio::sync::MutexGuard<'_, Vec<Plugin>> {
        let mut plugins = self.shared.plugins.lock().await;
        plugins.retain(|it| !it.is_closed());
        plugins
    }

    async fn tell(
        &self,
        plugins: &[Plugin],
        (event, method): (Event, &str),
        request: &impl Message,
        pod: &Pod,
        container: Option<&Told>,
    ) -> Result<(), Refusal> {
        for plugin in plugins {
            plugin.tell(event, method, request, pod, container).await?;
        }
        Ok(())
    }

    /// As [`Plugins::tell`], of what has happened: who refuses is logged, and the others are told.
    async fn tell_all(
        &self,
        what: (Event, &str),
        request: &impl Message,
        pod: &Pod,
        container: Option<&Told>,
    ) {
        for plugin in self.turn().await.iter() {
            let told = plugin.tell(what.0, what.1, request, pod, container).await;
            if let Err(refusal) = told {
                warn!(%refusal, "a plugin refuses what has happened");
            }
        }
    }

    /// A pod is about to be there for others.
    ///
    /// # Errors
    /// When a plugin refuses it. Those before it know of it, until they are told of its end.
    pub async fn run_pod(&self, pod: Pod) -> Result<Creation, Refusal> {
        let plugins = self.turn().await;
        self.shared
            .making()
            .pods
            .insert(pod.id.clone(), pod.clone());
        let creation = Creation {
            shared: Arc::clone(&self.shared),
            id: pod.id.clone(),
        };
        let request = RunPodSandboxRequest {
            pod: Some(pod.clone()).into(),
            ..RunPodSandboxRequest::default()
        };
        let what = (Event::RUN_POD_SANDBOX, "RunPodSandbox");
        self.tell(&plugins, what, &request, &pod, None).await?;
        Ok(creation)
    }

    /// A pod's sizes are about to change: the overhead, and the sum of its containers.
    ///
    /// # Errors
    /// When a plugin refuses that.
    pub async fn update_pod(
        &self,
        pod: &Pod,
        overhead: Option<&Resources>,
        limits: Option<&Resources>,
    ) -> Result<(), Refusal> {
        let request = UpdatePodSandboxRequest {
            pod: Some(pod.clone()).into(),
            overhead_linux_resources: overhead.map(resources).into(),
            linux_resources: limits.map(resources).into(),
            ..UpdatePodSandboxRequest::default()
        };
        for plugin in self.turn().await.iter() {
            let event = Event::UPDATE_POD_SANDBOX;
            let _: Option<UpdatePodSandboxResponse> =
                plugin.ask(event, "UpdatePodSandbox", &request).await?;
        }
        Ok(())
    }

    /// A pod's sizes have changed.
    pub async fn pod_updated(&self, pod: &Pod) {
        let request = PostUpdatePodSandboxRequest {
            pod: Some(pod.clone()).into(),
            ..PostUpdatePodSandboxRequest::default()
        };
        let what = (Event::POST_UPDATE_POD_SANDBOX, "PostUpdatePodSandbox");
        self.tell_all(what, &request, pod, None).await;
    }

    /// Whether plugins are to be told that this ended; only once.
    fn ends(&self, id: &str) -> bool {
        self.shared.making().ended.insert(id.to_owned())
    }

    /// Takes note of what ended before there were plugins.
    pub fn has_ended(&self, id: &str) {
        self.ends(id);
    }

    /// A pod's containers have ended, and the pod is about to. Told once for each pod.
    pub async fn stop_pod(&self, pod: &Pod) {
        if !self.ends(&pod.id) {
            return;
        }
        let request = StopPodSandboxRequest {
            pod: Some(pod.clone()).into(),
            ..StopPodSandboxRequest::default()
        };
        let what = (Event::STOP_POD_SANDBOX, "StopPodSandbox");
        self.tell_all(what, &request, pod, None).await;
    }

    /// A pod is gone.
    pub async fn remove_pod(&self, pod: &Pod) {
        let request = RemovePodSandboxRequest {
            pod: Some(pod.clone()).into(),
            ..RemovePodSandboxRequest::default()
        };
        let what = (Event::REMOVE_POD_SANDBOX, "RemovePodSandbox");
        self.tell_all(what, &request, pod, None).await;
        self.shared.making().forget(&pod.id);
    }

    /// A container is about to be created; `spec` becomes what plugins make of it.
    ///
    /// # Errors
    /// When a plugin refuses it, wants what can't be, or wants what another one wants otherwise. Plugins are told
    /// then that it is gone.
    pub async fn create_container(
        &self,
        pod: &Pod,
        container: Told,
        spec: &mut ContainerSpec,
    ) -> Result<Creation, Refusal> {
        let mut plugins = self.turn().await;
        let id = container.id.clone();
        self.shared
            .making()
            .containers
            .insert(id.clone(), container.clone());
        let creation = Creation {
            shared: Arc::clone(&self.shared),
            id,
        };
        let mut outcome = Outcome::default();
        let mut told = container.clone();
        let made = self.adjust(&plugins, pod, &mut told, &mut outcome).await;
        let made = match made {
            Ok(()) => self.validate(&plugins, pod, container, &outcome).await,
            refused => refused,
        };
        let made = made.and_then(|()| {
            let applied = apply(spec, &outcome.adjust, &outcome.limits);
            applied.map_err(|refused| of(ALL, refused))
        });
        plugins.retain(|it| !it.is_closed());
        drop(plugins);
        let made = match made {
            Ok(()) => self.update_others(ALL, outcome.updates).await,
            refused => refused,
        };
        if let Err(refusal) = made {
            drop(creation);
            self.remove_container(pod, &told).await;
            return Err(refusal);
        }
        if let Some(making) = self.shared.making().containers.get_mut(&told.id) {
            *making = told;
        }
        Ok(creation)
    }

    async fn adjust(
        &self,
        plugins: &[Plugin],
        pod: &Pod,
        told: &mut Told,
        outcome: &mut Outcome,
    ) -> Result<(), Refusal> {
        for plugin in plugins {
            let request = CreateContainerRequest {
                pod: Some(pod.clone()).into(),
                container: Some(told.clone()).into(),
                ..CreateContainerRequest::default()
            };
            let event = Event::CREATE_CONTAINER;
            let answer = plugin.ask(event, "CreateContainer", &request).await?;
            let Some(answer): Option<CreateContainerResponse> = answer else {
                continue;
            };
            let name = plugin.whole();
            if let Some(asked) = answer.adjust.into_option() {
                let adjusted = outcome.adjust(name, asked, told);
                adjusted.map_err(|refused| of(name, refused))?;
            }
            let updated = outcome.update(name, answer.update, Some(&told.id), None);
            updated.map_err(|refused| of(name, refused))?;
            for eviction in answer.evict {
                let node = &self.shared.node;
                node.evict(name, &eviction.container_id, &eviction.reason);
            }
        }
        Ok(())
    }

    /// Has those plugins look at it that want to see what all of them make of a container.
    async fn validate(
        &self,
        plugins: &[Plugin],
        pod: &Pod,
        container: Told,
        outcome: &Outcome,
    ) -> Result<(), Refusal> {
        let event = Event::VALIDATE_CONTAINER_ADJUSTMENT;
        let called = |event| plugins.iter().filter(move |plugin| plugin.wants(event));
        let validators: Vec<&Plugin> = called(event).filter(|it| !it.is_closed()).collect();
        if validators.is_empty() {
            return Ok(());
        }
        let updates = outcome.updates.iter().map(|update| {
            let mut told = ContainerUpdate {
                container_id: update.container.clone(),
                ignore_failure: update.ignore_failure,
                ..ContainerUpdate::default()
            };
            let linux = told.linux.mut_or_insert_default();
            linux.resources = Some(resources(&update.limits)).into();
            told
        });
        let instances = called(Event::CREATE_CONTAINER).map(|plugin| PluginInstance {
            name: plugin.name.base.clone(),
            index: plugin.name.index.clone(),
            ..PluginInstance::default()
        });
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod.clone()).into(),
            container: Some(container).into(),
            adjust: Some(outcome.adjust.clone()).into(),
            update: updates.collect(),
            owners: Some(outcome.owners()).into(),
            plugins: instances.collect(),
            ..ValidateContainerAdjustmentRequest::default()
        };
        for plugin in validators {
            let method = "ValidateContainerAdjustment";
            let answer = plugin.ask(event, method, &request).await?;
            match answer {
                // Who was to look at it and did not has not agreed.
                None if plugin.is_closed() => {
                    return Err(plugin.refusal(method, "it did not answer, and is dropped"));
                }
                Some(ValidateContainerAdjustmentResponse { reject, reason, .. }) if reject => {
                    return Err(plugin.refusal(method, &reason));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A container was created.
    pub async fn container_created(&self, pod: &Pod, container: &Told) {
        let request = PostCreateContainerRequest {
            pod: Some(pod.clone()).into(),
            container: Some(container.clone()).into(),
            ..PostCreateContainerRequest::default()
        };
        let what = (Event::POST_CREATE_CONTAINER, "PostCreateContainer");
        self.tell_all(what, &request, pod, Some(container)).await;
    }

    /// A container is about to be started.
    ///
    /// # Errors
    /// When a plugin refuses that.
    pub async fn start_container(&self, pod: &Pod, container: &Told) -> Result<(), Refusal> {
        let request = StartContainerRequest {
            pod: Some(pod.clone()).into(),
            container: Some(container.clone()).into(),
            ..StartContainerRequest::default()
        };
        let plugins = self.turn().await;
        let what = (Event::START_CONTAINER, "StartContainer");
        let told = self.tell(&plugins, what, &request, pod, Some(container));
        told.await
    }

    /// A container was started.
    pub async fn container_started(&self, pod: &Pod, container: &Told) {
        let request = PostStartContainerRequest {
            pod: Some(pod.clone()).into(),
            container: Some(container.clone()).into(),
            ..PostStartContainerRequest::default()
        };
        let what = (Event::POST_START_CONTAINER, "PostStartContainer");
        self.tell_all(what, &request, pod, Some(container)).await;
    }

    /// Limits of a container are about to change; `limits` becomes what plugins make of them.
    ///
    /// # Errors
    /// As of [`Plugins::create_container`].
    pub async fn update_container(
        &self,
        pod: &Pod,
        container: &Told,
        limits: &mut Resources,
    ) -> Result<(), Refusal> {
        let mut outcome = Outcome::default();
        for plugin in self.turn().await.iter() {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()).into(),
                container: Some(container.clone()).into(),
                linux_resources: Some(resources(limits)).into(),
                ..UpdateContainerRequest::default()
            };
            let event = Event::UPDATE_CONTAINER;
            let answer = plugin.ask(event, "UpdateContainer", &request).await?;
            let Some(answer): Option<UpdateContainerResponse> = answer else {
                continue;
            };
            let name = plugin.whole();
            let of_it = Some((container.id.as_str(), &mut *limits));
            let updated = outcome.update(name, answer.update, None, of_it);
            updated.map_err(|refused| of(name, refused))?;
            for eviction in answer.evict {
                let node = &self.shared.node;
                node.evict(name, &eviction.container_id, &eviction.reason);
            }
        }
        self.update_others(ALL, outcome.updates).await
    }

    /// Limits of a container have changed.
    pub async fn container_updated(&self, pod: &Pod, container: &Told) {
        let request = PostUpdateContainerRequest {
            pod: Some(pod.clone()).into(),
            container: Some(container.clone()).into(),
            ..PostUpdateContainerRequest::default()
        };
        let what = (Event::POST_UPDATE_CONTAINER, "PostUpdateContainer");
        self.tell_all(what, &request, pod, Some(container)).await;
    }

    /// A container has ended. Told once for each container.
    pub async fn stop_container(&self, pod: &Pod, container: &Told) {
        let mut outcome = Outcome::default();
        {
            let plugins = self.turn().await;
            // In the turn: who is told of the removal was told of the end before.
            if !self.ends(&container.id) {
                return;
            }
            let request = StopContainerRequest {
                pod: Some(pod.clone()).into(),
                container: Some(container.clone()).into(),
                ..StopContainerRequest::default()
            };
            for plugin in plugins.iter() {
                let event = Event::STOP_CONTAINER;
                let answer = plugin.ask(event, "StopContainer", &request).await;
                let name = plugin.whole();
                let updated = answer.and_then(|answer: Option<StopContainerResponse>| {
                    let update = answer.map(|answer| answer.update).unwrap_or_default();
                    let updated = outcome.update(name, update, None, None);
                    updated.map_err(|refused| of(name, refused))
                });
                if let Err(refusal) = updated {
                    warn!(%refusal, "a plugin refuses what has happened");
                }
            }
        }
        if let Err(refusal) = self.update_others(ALL, outcome.updates).await {
            warn!(%refusal, "change containers for a plugin");
        }
    }

    /// A container is gone.
    pub async fn remove_container(&self, pod: &Pod, container: &Told) {
        let request = RemoveContainerRequest {
            pod: Some(pod.clone()).into(),
            container: Some(container.clone()).into(),
            ..RemoveContainerRequest::default()
        };
        let what = (Event::REMOVE_CONTAINER, "RemoveContainer");
        self.tell_all(what, &request, pod, Some(container)).await;
        self.shared.making().forget(&container.id);
    }

    /// Changes containers that no client asked about.
    async fn update_others(&self, plugin: &str, updates: Vec<Update>) -> Result<(), Refusal> {
        for update in updates {
            let updated = self.shared.node.update(&update.container, update.limits);
            if let Err(error) = updated.await {
                let error = Report::new(error).to_string();
                if !update.ignore_failure {
                    let field = format!("update of container {}", update.container);
                    return Err(of(plugin, Refused::new(field, error)));
                }
                info!(
                    container = update.container,
                    error, "change a container for a plugin"
                );
            }
        }
        Ok(())
    }
}

fn of(plugin: &str, refused: Refused) -> Refusal {
    Refusal {
        plugin: plugin.to_owned(),
        what: refused.field,
        reason: refused.reason,
    }
}

#[cfg(test)]
mod tests;
