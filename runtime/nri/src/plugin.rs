//! One plugin: how it comes to be one, and what is asked of it.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use hull_base::printable::one_line;
use hull_proto_nri::{
    ConfigureRequest, ConfigureResponse, Container, Empty, Event, PLUGIN_CONNECTION,
    PLUGIN_SERVICE, PodSandbox, RUNTIME_CONNECTION, RUNTIME_SERVICE, RegisterPluginRequest,
    StateChangeEvent, SynchronizeRequest, SynchronizeResponse, UpdateContainersRequest,
    UpdateContainersResponse,
};
use protobuf::{EnumOrUnknown, Message};
use tokio::{
    net::UnixStream,
    process::Child,
    sync::oneshot,
    time::{Instant, timeout},
};
use tracing::{info, warn};
use ttrpc::{
    get_status,
    proto::{Code, Status},
};

use crate::{
    limits::limits,
    node::{Node, Refusal, Times},
    peer::{CallError, Peer, Serve},
};

/// What of the contract this speaks, as the reference's versions are called.
const NRI_VERSION: &str = "v0.12.0";
/// All events that there are, one bit for each.
const ALL_EVENTS: i32 = (1 << (Event::LAST as i32 - 1)) - 1;
/// The longest name.
const NAME_MAX: usize = 128;
/// The longest reason that is passed on.
const REASON_MAX: usize = 512;
/// How much of a message of 4 MiB pods and containers may be.
const SYNC_MAX: u64 = 3 << 20;

/// Why a program did not become a plugin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    /// It did not say who it is in time, or was gone.
    #[error("it did not register within {} s", .0.as_secs())]
    Silent(Duration),
    /// The connection ended.
    #[error("its connection ended before it was registered")]
    Gone,
    /// It did not take its configuration, or what there is.
    #[error("{method}")]
    Call {
        /// What was called.
        method: &'static str,
        /// Why it failed.
        source: CallError,
    },
    /// It subscribed to what there is not.
    #[error("it subscribes to events that do not exist (mask {0:#x})")]
    Events(i32),
    /// It can't take more than one message of pods and containers.
    #[error("it does not take pods and containers in several messages")]
    Split,
}

/// Who a plugin is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// Two digits; plugins are called in their order.
    pub(crate) index: String,
    pub(crate) base: String,
}

impl Name {
    /// A name that can be one.
    pub(crate) fn parse(index: &str, base: &str) -> Result<Self, &'static str> {
        if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
            return Err("a plugin's index is two digits");
        }
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"-_.+".contains(&b);
        if base.is_empty() || base.len() > NAME_MAX || !base.bytes().all(fits) {
            return Err("a plugin's name is letters, digits, and -_.+");
        }
        Ok(Self {
            index: index.to_owned(),
            base: base.to_owned(),
        })
    }

    /// As it is logged, and as files of pre-installed plugins are called.
    pub(crate) fn whole(&self) -> String {
        format!("{}-{}", self.index, self.base)
    }
}

/// A pre-installed plugin that was started.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) name: Name,
    /// What it is configured with.
    pub(crate) config: String,
    /// Killed with the value.
    pub(crate) process: Child,
}

/// A plugin that has registered.
#[derive(Debug)]
pub(crate) struct Plugin {
    pub(crate) name: Name,
    whole: String,
    peer: Peer,
    /// The events that it wants, a bit each.
    events: i32,
    /// Those that it has no method of its own for.
    by_state_change: AtomicI32,
    times: Times,
    _process: Option<Child>,
}

impl Plugin {
    /// Waits until a program says who it is, and configures it.
    pub(crate) async fn register(
        stream: UnixStream,
        launched: Option<Launched>,
        node: Arc<dyn Node>,
        times: Times,
    ) -> Result<Self, JoinError> {
        let (told, registered) = oneshot::channel();
        let runtime = Arc::new(Runtime {
            node,
            stage: Mutex::new(Stage::New(
                told,
                launched.as_ref().map(|it| it.name.clone()),
            )),
        });
        let peer = Peer::start(
            stream,
            PLUGIN_CONNECTION,
            RUNTIME_CONNECTION,
            Arc::clone(&runtime) as Arc<dyn Serve>,
        );
        let registered = tokio::select! {
            registered = timeout(times.registration, registered) => registered,
            () = peer.closed() => return Err(JoinError::Gone),
        };
        let name = registered
            .map_err(|_| JoinError::Silent(times.registration))?
            .map_err(|_| JoinError::Gone)?;
        let (config, process) = match launched {
            Some(launched) => (launched.config, Some(launched.process)),
            None => (String::new(), None),
        };
        let configure = ConfigureRequest {
            config,
            runtime_name: "hull".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            registration_timeout: milliseconds(times.registration),
            request_timeout: milliseconds(times.request),
            NRI_version: NRI_VERSION.into(),
            ..ConfigureRequest::default()
        };
        let configured: ConfigureResponse = peer
            .call(PLUGIN_SERVICE, "Configure", &configure, times.request)
            .await
            .map_err(call("Configure"))?;
        let events = match configured.events {
            0 => ALL_EVENTS,
            events if events & !ALL_EVENTS != 0 => return Err(JoinError::Events(events)),
            events => events,
        };
        let whole = name.whole();
        *runtime.stage() = Stage::Registered(whole.clone());
        Ok(Self {
            name,
            whole,
            peer,
            events,
            by_state_change: AtomicI32::new(0),
            times,
            _process: process,
        })
    }

    /// Its index and name.
    pub(crate) fn whole(&self) -> &str {
        &self.whole
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.peer.is_closed()
    }

    pub(crate) fn close(&self) {
        self.peer.close();
    }

    /// Returns what was given to it when it is gone. It need not live as long.
    pub(crate) fn gone<T>(&self, with: T) -> impl Future<Output = T> + use<T> {
        let closed = self.peer.closing();
        async move {
            closed.cancelled().await;
            with
        }
    }

    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & bit(event) != 0
    }

    /// Tells it what there is, in as many messages as that takes; returns what it wants to be changed.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<SynchronizeResponse, JoinError> {
        let deadline = Instant::now() + self.times.registration;
        let mut parts = parts(pods, containers).into_iter().peekable();
        let mut answer = SynchronizeResponse::default();
        while let Some(mut part) = parts.next() {
            part.more = parts.peek().is_some();
            let left = deadline.saturating_duration_since(Instant::now());
            let called = self.peer.call(PLUGIN_SERVICE, "Synchronize", &part, left);
            answer = called.await.map_err(call("Synchronize"))?;
            if part.more && !(answer.more && answer.update.is_empty()) {
                return Err(JoinError::Split);
            }
        }
        Ok(answer)
    }

    /// Asks it about an event. None: it does not want the event, has no method for it, or was dropped just now.
    ///
    /// # Errors
    /// When it refuses.
    pub(crate) async fn ask<A: Message>(
        &self,
        event: Event,
        method: &str,
        request: &impl Message,
    ) -> Result<Option<A>, Refusal> {
        if !self.wants(event) {
            return Ok(None);
        }
        let limit = self.times.request;
        let called = self.peer.call(PLUGIN_SERVICE, method, request, limit).await;
        self.answered(method, called)
    }

    /// Tells it of an event that it can't change; older plugins have one method for all of those.
    ///
    /// # Errors
    /// When it refuses.
    pub(crate) async fn tell(
        &self,
        event: Event,
        method: &str,
        request: &impl Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), Refusal> {
        if !self.wants(event) {
            return Ok(());
        }
        let limit = self.times.request;
        if self.by_state_change.load(Ordering::Relaxed) & bit(event) == 0 {
            let called: Result<Empty, _> =
                self.peer.call(PLUGIN_SERVICE, method, request, limit).await;
            match called {
                Err(error) if error.is_unknown_method() => {
                    let bit = bit(event);
                    self.by_state_change.fetch_or(bit, Ordering::Relaxed);
                }
                called => return self.answered(method, called).map(drop),
            }
        }
        let change = StateChangeEvent {
            event: EnumOrUnknown::new(event),
            pod: Some(pod.clone()).into(),
            container: container.cloned().into(),
            ..StateChangeEvent::default()
        };
        let called: Result<Empty, _> = self
            .peer
            .call(PLUGIN_SERVICE, "StateChange", &change, limit)
            .await;
        self.answered(method, called).map(drop)
    }

    fn answered<A>(
        &self,
        method: &str,
        called: Result<A, CallError>,
    ) -> Result<Option<A>, Refusal> {
        match called {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.is_unknown_method() => Ok(None),
            Err(CallError::Refused(status)) => Err(self.refusal(method, status.message())),
            Err(error) if error.is_fatal() => {
                let error = &error as &dyn std::error::Error;
                warn!(plugin = self.whole, method, error, "plugin is dropped");
                self.close();
                Ok(None)
            }
            Err(error) => Err(self.refusal(method, &error.to_string())),
        }
    }

    pub(crate) fn refusal(&self, what: &str, reason: &str) -> Refusal {
        Refusal {
            plugin: self.whole.clone(),
            what: what.to_owned(),
            reason: one_line(reason, REASON_MAX),
        }
    }
}

fn call(method: &'static str) -> impl FnOnce(CallError) -> JoinError {
    move |source| JoinError::Call { method, source }
}

fn bit(event: Event) -> i32 {
    1 << (event as i32 - 1)
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// Pods and containers in messages that are not too long; one at least.
fn parts(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<SynchronizeRequest> {
    let mut parts = vec![SynchronizeRequest::default()];
    let mut size = 0;
    let mut next = |parts: &mut Vec<SynchronizeRequest>, more: u64| {
        size += more;
        if size > SYNC_MAX && size > more {
            parts.push(SynchronizeRequest::default());
            size = more;
        }
    };
    for pod in pods {
        next(&mut parts, pod.compute_size() + 16);
        if let Some(part) = parts.last_mut() {
            part.pods.push(pod);
        }
    }
    for container in containers {
        next(&mut parts, container.compute_size() + 16);
        if let Some(part) = parts.last_mut() {
            part.containers.push(container);
        }
    }
    parts
}

/// What a plugin may ask of the daemon.
#[derive(Debug)]
struct Runtime {
    node: Arc<dyn Node>,
    stage: Mutex<Stage>,
}

#[derive(Debug)]
enum Stage {
    /// It has to say who it is, unless it was started as somebody.
    New(oneshot::Sender<Name>, Option<Name>),
    /// It said so, and is not configured yet.
    Named,
    Registered(String),
}

impl Runtime {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, request: &RegisterPluginRequest) -> Result<Empty, Status> {
        let mut stage = self.stage();
        match std::mem::replace(&mut *stage, Stage::Named) {
            Stage::New(told, started) => {
                let named = || Name::parse(&request.plugin_idx, &request.plugin_name);
                let name = started.map_or_else(named, Ok);
                // Without the sender, who waits is told that there is no plugin.
                let name = name.map_err(|why| get_status(Code::INVALID_ARGUMENT, why))?;
                let version = one_line(&request.NRI_version, NAME_MAX);
                info!(plugin = name.whole(), version, "plugin registers");
                let _ = told.send(name);
                Ok(Empty::default())
            }
            other => {
                *stage = other;
                Err(get_status(Code::ALREADY_EXISTS, "it is registered"))
            }
        }
    }

    async fn update(&self, request: UpdateContainersRequest) -> Result<Vec<u8>, Status> {
        let plugin = match &*self.stage() {
            Stage::Registered(plugin) => plugin.clone(),
            _ => {
                let reason = "it is not registered";
                return Err(get_status(Code::FAILED_PRECONDITION, reason));
            }
        };
        let mut response = UpdateContainersResponse::default();
        for update in request.update {
            let asked = limits(update.linux.resources.get_or_default());
            let done = match asked {
                Ok((asked, _)) => {
                    let updated = self.node.update(&update.container_id, asked).await;
                    updated.map_err(|error| error.to_string())
                }
                Err(refused) => Err(refused.to_string()),
            };
            if let Err(error) = done {
                let container = one_line(&update.container_id, NAME_MAX);
                warn!(plugin, container, error, "update a container for a plugin");
                response.failed.push(update);
            }
        }
        for eviction in request.evict {
            self.node
                .evict(&plugin, &eviction.container_id, &eviction.reason);
        }
        let encoded = response.write_to_bytes();
        encoded.map_err(|_| get_status(Code::INTERNAL, "encode the answer"))
    }
}

#[async_trait]
impl Serve for Runtime {
    async fn serve(&self, service: &str, method: &str, payload: &[u8]) -> Result<Vec<u8>, Status> {
        let wrong = |_| {
            get_status(
                Code::INVALID_ARGUMENT,
                "the request is no message of its kind",
            )
        };
        match (service, method) {
            (RUNTIME_SERVICE, "RegisterPlugin") => {
                let request = RegisterPluginRequest::parse_from_bytes(payload).map_err(wrong)?;
                self.register(&request).map(|_| Vec::new())
            }
            (RUNTIME_SERVICE, "UpdateContainers") => {
                let request = UpdateContainersRequest::parse_from_bytes(payload).map_err(wrong)?;
                self.update(request).await
            }
            _ => Err(get_status(Code::UNIMPLEMENTED, "there is no such method")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_nri() {
        assert_eq!(
            Name::parse("05", "a-b_c.d+1").unwrap().whole(),
            "05-a-b_c.d+1"
        );
        for (index, base) in [
            ("5", "a"),
            ("005", "a"),
            ("ab", "a"),
            ("05", ""),
            ("05", "a/b"),
        ] {
            assert!(Name::parse(index, base).is_err(), "{index} {base}");
        }
        assert!(Name::parse("05", &"a".repeat(129)).is_err());
    }

    #[test]
    fn all_that_there_is_comes_in_messages_that_are_not_too_long() {
        let pod = |n: usize| PodSandbox {
            id: n.to_string(),
            name: "x".repeat(1 << 20),
            ..PodSandbox::default()
        };
        let containers = vec![Container::default(); 3];
        let all = parts((0..7).map(pod).collect(), containers);
        let sizes: Vec<_> = all
            .iter()
            .map(|part| (part.pods.len(), part.containers.len()))
            .collect();
        assert_eq!(sizes, [(2, 0), (2, 0), (2, 0), (1, 3)]);
        let ids = all
            .iter()
            .flat_map(|part| &part.pods)
            .map(|pod| pod.id.as_str());
        assert_eq!(ids.collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "5", "6"]);
        assert_eq!(parts(Vec::new(), Vec::new()).len(), 1);
    }
}
