//! Wires the parts together and serves them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use hull_image::{ImageStore, StoreError};
use hull_network::Network;
use hull_pod::Pods;
use hull_proto_cri::v1::{
    image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer,
};
use hull_proto_images::v1::images_server::ImagesServer;
use hull_spec::error::PodError;
use hull_streaming::{StartError, Streaming};
use opentelemetry_otlp::ExporterBuildError;
use tokio::{net::UnixListener, sync::watch};
use tokio_stream::{StreamExt, wrappers::UnixListenerStream};
use tonic::transport::Server;
use tracing::{info, warn};

use crate::{
    authority::WithAuthority,
    config::Settings,
    cri::{Backend, Cri, Times, delegate::Router},
    host::{Probe, apparmor_policies},
    images::service::ImagesService,
    life::{self, Life},
    metrics,
    shutdown::{self, Stop},
    socket::{DirectoryLock, SocketError, listen},
    stream_backend::StreamBackend,
};

/// Requests that are under way when serving stops may take this long to end.
pub(crate) const DRAIN: Duration = Duration::from_secs(10);
/// The largest request accepted, bytes (kubelet's own limit).
const MAX_REQUEST: usize = 16 << 20;

/// Why the daemon could not start or go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppError {
    /// Lock or socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The image store.
    #[error("open the image store")]
    Images(#[source] StoreError),
    /// The pods.
    #[error("open the pods' records")]
    Pods(#[source] PodError),
    /// The streaming server.
    #[error(transparent)]
    Streaming(#[from] StartError),
    /// The export of traces.
    #[error("export traces")]
    Traces(#[from] ExporterBuildError),
    /// The metrics.
    #[error(transparent)]
    Metrics(#[from] metrics::ListenError),
    /// The server broke.
    #[error("serve CRI")]
    Serve(#[source] tonic::transport::Error),
}

/// A daemon that is ready to serve.
#[derive(Debug)]
pub(crate) struct App {
    cri: Cri,
    listener: UnixListener,
    socket: PathBuf,
    stop: Stop,
    /// Whether calls are traced.
    traced: bool,
    _locks: [DirectoryLock; 2],
}

impl App {
    /// Takes the directories, opens stores, adopts running pods and listens
    /// on the socket. Nobody can connect before all that is done.
    pub(crate) async fn start(mut settings: Settings) -> Result<Self, AppError> {
        settings.pods.apparmor = apparmor_policies();
        // Both: what has no record in this root is removed from this state directory.
        let locks = [
            DirectoryLock::take(&settings.root)?,
            DirectoryLock::take(&settings.state)?,
        ];
        let images = ImageStore::open(settings.images.clone())
            .await
            .map_err(AppError::Images)?;
        let network = Network::new(settings.network);
        let probe = Probe::new(
            settings.pods.vmm.clone(),
            vec![
                settings.pods.kernel.clone(),
                settings.pods.guest_root.clone(),
                settings.pods.vmm.clone(),
            ],
        );
        let pods = Pods::open(
            settings.pods,
            Arc::new(images.clone()),
            Arc::new(network.clone()),
        )
        .await
        .map_err(AppError::Pods)?;
        let streams = StreamBackend::new(pods.clone());
        let streaming = Streaming::start(settings.streaming, Arc::new(streams)).await?;
        let (stop, stopping) = shutdown::channel();
        let plugins = match &settings.nri {
            Some(socket) => {
                let listener = listen(socket)?;
                info!(socket = %socket.display(), "serving NRI plugins");
                Some(life::plugins(listener, &pods, &images).await)
            }
            None => None,
        };
        let life = Life::new(pods.clone(), images.clone(), plugins);
        let backend = Arc::new(Backend {
            pods,
            life,
            images,
            network,
            handlers: watch::Sender::new(settings.handlers),
            probe,
            streaming,
            images_dir: settings.images.root,
            pods_dir: settings.root.join("pods"),
            root: settings.root,
            state: settings.state,
            stopping,
        });
        let first = Arc::clone(&backend);
        tokio::spawn(async move {
            if let Err(reason) = first.probe.ready().await {
                warn!(reason, "this host can't run microVMs now");
            }
        });
        if let Some(address) = settings.metrics {
            metrics::serve(address, Arc::clone(&backend)).await?;
        }
        let listener = listen(&settings.listen)?;
        info!(socket = %settings.listen.display(), root = %backend.root.display(), "serving CRI");
        Ok(Self {
            cri: Cri(backend),
            listener,
            socket: settings.listen,
            stop,
            traced: settings.traces.is_some(),
            _locks: locks,
        })
    }

    /// What it works on.
    pub(crate) fn backend(&self) -> Arc<Backend> {
        Arc::clone(&self.cri.0)
    }

    /// Serves until `stop` ends, then lets requests under way come to an end.
    pub(crate) async fn serve(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), AppError> {
        let (stopped, mut late) = watch::channel(());
        let backend = self.backend();
        let streams = self.stop;
        let stop = async move {
            stop.await;
            streams.request();
            let _ = stopped.send(());
        };
        let router = Router::new(self.cri);
        let runtime = RuntimeServiceServer::new(router.clone());
        let images = ImagesServer::new(ImagesService(backend.images.clone()));
        let cri_images = ImageServiceServer::new(router);
        let connections = UnixListenerStream::new(self.listener);
        let connections = connections.map(|stream| stream.map(WithAuthority::new));
        let server = Server::builder()
            .layer(Times {
                traced: self.traced,
            })
            .add_service(runtime.max_decoding_message_size(MAX_REQUEST))
            .add_service(cri_images.max_decoding_message_size(MAX_REQUEST))
            .add_service(images)
            .serve_with_incoming_shutdown(connections, stop);
        let drained = async {
            // An error means that the server is gone, and with it this wait.
            let _ = late.changed().await;
            tokio::time::sleep(DRAIN).await;
        };
        let result = tokio::select! {
            result = server => result.map_err(AppError::Serve),
            () = drained => {
                warn!("requests under way are dropped; their pods go on");
                Ok(())
            }
        };
        backend.streaming.shutdown().await;
        // Absent when somebody removed it; nothing is lost either way.
        let _ = std::fs::remove_file(&self.socket);
        result
    }
}
