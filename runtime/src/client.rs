//! The daemon behind the commands for people: the one that serves the socket, or for `hull run` and
//! `hull images` one in this process with the same directories. So pods and images have one owner at a
//! time.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use error_reporter::Report;
use hull_proto_cri::v1::{
    ListPodSandboxRequest, VersionRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};
use hull_proto_images::v1::images_client::ImagesClient;
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tracing::warn;

use crate::{
    app::{App, AppError},
    config::Settings,
    cri::EXIT_CODE,
    socket::keep_private,
};

/// The largest answer that is read, bytes: a list of all containers of a node.
const MAX_ANSWER: usize = 256 << 20;

/// The services of a daemon.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    /// CRI's pods and containers.
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    /// CRI's images.
    pub(crate) cri_images: ImageServiceClient<Channel>,
    /// Images as a person handles them.
    pub(crate) images: ImagesClient<Channel>,
}

/// Why the daemon did not do what it was asked for, in words.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    pub(crate) message: String,
    /// Its kind.
    pub(crate) code: Code,
    /// Set when a command could not be executed: what a shell would end with; and when a certificate is not trusted.
    pub(crate) exit_code: Option<u8>,
}

/// A failed call in words; tonic's own text is made for programs.
pub(crate) fn refused(action: &str) -> impl FnOnce(Status) -> anyhow::Error {
    move |status| {
        let code = status.metadata().get(EXIT_CODE);
        let refusal = Refusal {
            message: format!("{action}: {} ({:?})", status.message(), status.code()),
            code: status.code(),
            exit_code: code.and_then(|code| code.to_str().ok()?.parse().ok()),
        };
        refusal.into()
    }
}

/// What a verbose status tells under `info`.
pub(crate) fn info(told: &BTreeMap<String, String>) -> Option<serde_json::Value> {
    serde_json::from_str(told.get("info")?).ok()
}

/// A connection to a daemon, with the daemon itself when it is ours.
#[derive(Debug)]
pub(crate) struct Daemon {
    client: Client,
    own: Option<Own>,
}

/// A daemon in this process.
#[derive(Debug)]
struct Own {
    /// Dropped to end it.
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), AppError>>,
}

/// Connects to the daemon of the configured socket, or starts one.
pub(crate) async fn connect(mut settings: Settings) -> Result<Daemon> {
    if let Ok(client) = dial(&settings.listen).await {
        return Ok(Daemon { client, own: None });
    }
    let served = settings.listen;
    settings.listen = settings
        .state
        .join(format!("own-{}.sock", std::process::id()));
    let socket = settings.listen.clone();
    // Of the whole process: what it writes for its user has modes of its own.
    keep_private();
    let app = App::start(settings).await.with_context(|| {
        format!(
            "no daemon serves {}, and none could be started",
            served.display()
        )
    })?;
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(app.serve(async {
        // A sender that is dropped asks for the same.
        let _ = stopped.await;
    }));
    let client = dial(&socket).await?;
    Ok(Daemon {
        client,
        own: Some(Own { stop, task }),
    })
}

/// No daemon serves the socket.
#[derive(Debug, thiserror::Error)]
#[error("no daemon serves {}: start one (`systemctl start hull`, or `hull serve`)", .0.display())]
pub(crate) struct NoDaemon(pub(crate) PathBuf);

/// Connects to the daemon of the configured socket, which has to be there.
pub(crate) async fn serving(settings: &Settings) -> Result<Daemon> {
    let client = dial(&settings.listen).await;
    let client = client.with_context(|| NoDaemon(settings.listen.clone()))?;
    Ok(Daemon { client, own: None })
}

/// Whether the daemon of this socket answers a call that looks at all pods.
pub(crate) async fn answers(socket: &Path) -> Result<()> {
    let mut client = dial(socket).await?;
    let request = ListPodSandboxRequest::default();
    let listed = client.runtime.list_pod_sandbox(request).await;
    listed.map_err(refused("list the pods"))?;
    Ok(())
}

/// Who answers the socket, as it calls itself, if anybody does.
pub(crate) async fn runtime_name(socket: &Path) -> Result<String> {
    let mut client = dial(socket).await?;
    let version = client.runtime.version(VersionRequest::default()).await?;
    Ok(version.into_inner().runtime_name)
}

async fn dial(socket: &Path) -> Result<Client> {
    let channel = Endpoint::from_shared(format!("unix:{}", socket.display()))?
        .connect()
        .await
        .with_context(|| format!("connect to {}", socket.display()))?;
    let mut client = Client {
        runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER),
        cri_images: ImageServiceClient::new(channel.clone()),
        images: ImagesClient::new(channel),
    };
    client.runtime.version(VersionRequest::default()).await?;
    Ok(client)
}

impl Daemon {
    /// The way to it.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Whether it goes on when this process ends.
    pub(crate) fn goes_on(&self) -> bool {
        self.own.is_none()
    }

    /// Ends the daemon if it is ours.
    pub(crate) async fn close(self) {
        // An idle connection would keep the server waiting.
        drop(self.client);
        let Some(Own { stop, task }) = self.own else {
            return;
        };
        drop(stop);
        match task.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(error = %Report::new(error), "stop the daemon"),
            Err(error) => warn!(%error, "stop the daemon"),
        }
    }
}
