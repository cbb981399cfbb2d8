//! Another runtime: its services, and what it told last.

use std::{
    error::Error,
    future::Future,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use error_reporter::Report;
use hull_proto_cri::v1::{
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient, *,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint, Uri},
};
use tracing::{info, warn};

/// How long another runtime may take to answer what all of them are asked.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// The largest answer that is read, in bytes: a list of all containers of a node.
const MAX_ANSWER: usize = 256 << 20;

/// Another runtime.
#[derive(Debug)]
pub(super) struct Delegate {
    socket: PathBuf,
    /// The name of a handler that leads here, which its pods have that name none of its own.
    handler: String,
    channel: Channel,
    told: Mutex<Told>,
    /// It did not answer in time, and one that asked still waits.
    late: AtomicBool,
    /// It did not answer last.
    away: AtomicBool,
}

/// What it told last.
#[derive(Debug, Default)]
struct Told {
    pods: Vec<PodSandbox>,
    containers: Vec<Container>,
}

impl Delegate {
    /// Connects when it is needed, and again when the connection is lost.
    pub(super) fn new(socket: &Path, handler: &str) -> Arc<Self> {
        let path = socket.to_owned();
        // The address is not looked at: the connector knows the socket.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(
            tower::service_fn(move |_: Uri| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }),
        );
        Arc::new(Self {
            socket: socket.to_owned(),
            handler: handler.to_owned(),
            channel,
            told: Mutex::default(),
            late: AtomicBool::new(false),
            away: AtomicBool::new(false),
        })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn handler(&self) -> &str {
        &self.handler
    }

    /// Gives a pod that names none a handler of the node that leads here.
    pub(super) fn name_handler(&self, told: &mut String) {
        if told.is_empty() {
            told.clone_from(&self.handler);
        }
    }

    pub(super) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(super) fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// Its answer to a call that was passed on.
    pub(super) fn answer<T>(
        &self,
        answer: Result<Response<T>, Status>,
    ) -> Result<Response<T>, Status> {
        answer
            .map(|answer| Response::new(answer.into_inner()))
            .map_err(|status| self.status(&status))
    }

    /// Its status, or why there is none.
    fn status(&self, status: &Status) -> Status {
        let socket = self.socket.display();
        let reason = match status.source() {
            Some(source) => Report::new(source).to_string(),
            None => status.message().to_owned(),
        };
        Status::new(status.code(), format!("{socket}: {reason}"))
    }

    /// What it answers, if it does in time.
    pub(super) async fn within<T>(
        &self,
        time: Duration,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        match timeout(time, answer).await {
            Ok(answer) => answer.map_err(|status| self.status(&status)),
            Err(_) => {
                let socket = self.socket.display();
                let seconds = time.as_secs();
                Err(Status::unavailable(format!(
                    "{socket}: no answer in {seconds} s"
                )))
            }
        }
    }

    /// Whether it is known not to answer.
    pub(super) fn is_late(&self) -> bool {
        self.late.load(Ordering::Relaxed)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_told_of_pod(&self, id: &str) -> bool {
        self.told().pods.iter().any(|pod| pod.id.starts_with(id))
    }

    pub(super) fn has_told_of_container(&self, id: &str) -> bool {
        let told = self.told();
        told.containers.iter().any(|one| one.id.starts_with(id))
    }

    /// Whether a pod is its own, by what kubelet named it.
    pub(super) fn has_pod_named(&self, metadata: &PodSandboxMetadata) -> bool {
        let told = self.told();
        let mut pods = told.pods.iter();
        pods.any(|pod| pod.metadata.as_ref() == Some(metadata))
    }

    /// Notes a pod that it has now.
    pub(super) fn note(&self, pod: PodSandbox) {
        self.told().pods.push(pod);
    }

    /// Its pods, or those that it told last.
    pub(super) async fn pods(self: &Arc<Self>) -> Vec<PodSandbox> {
        let this = Arc::clone(self);
        self.refresh(async move {
            let request = ListPodSandboxRequest::default();
            let mut pods = this
                .runtime()
                .list_pod_sandbox(request)
                .await?
                .into_inner()
                .items;
            for pod in &mut pods {
                this.name_handler(&mut pod.runtime_handler);
            }
            this.told().pods = pods;
            Ok(())
        })
        .await;
        self.told().pods.clone()
    }

    /// Its containers, or those that it told last, as unknown.
    pub(super) async fn containers(self: &Arc<Self>) -> Vec<Container> {
        let this = Arc::clone(self);
        let fresh = self
            .refresh(async move {
                let request = ListContainersRequest::default();
                let listed = this.runtime().list_containers(request).await?;
                this.told().containers = listed.into_inner().containers;
                Ok(())
            })
            .await;
        let mut containers = self.told().containers.clone();
        if !fresh {
            for container in &mut containers {
                container.set_state(ContainerState::ContainerUnknown);
            }
        }
        containers
    }

    /// Whether it tells what is asked for. One that does not in time is heard later, and nobody else waits for it
    /// until then.
    async fn refresh(
        self: &Arc<Self>,
        ask: impl Future<Output = Result<(), Status>> + Send + 'static,
    ) -> bool {
        if self.is_late() {
            return false;
        }
        let this = Arc::clone(self);
        let asked = tokio::spawn(async move {
            let told = ask.await;
            this.late.store(false, Ordering::Relaxed);
            this.heard(told)
        });
        if let Ok(told) = timeout(PATIENCE, asked).await {
            return told.unwrap_or(false);
        }
        self.late.store(true, Ordering::Relaxed);
        self.heard(Err(Status::unavailable("it takes too long to answer")))
    }

    /// Logs that it went or came back.
    fn heard(&self, told: Result<(), Status>) -> bool {
        let socket = self.socket.display();
        let was_away = self.away.swap(told.is_err(), Ordering::Relaxed);
        match told {
            Err(status) if !was_away => {
                let error = status.message();
                warn!(%socket, error, "another runtime does not answer: its pods are told as they were last");
            }
            Ok(()) if was_away => info!(%socket, "another runtime answers again"),
            _ => {}
        }
        !self.away.load(Ordering::Relaxed)
    }
}
