//! The listener, and the life of what it accepted.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::sleep,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::{debug, info, warn};

use crate::{
    backend::{AttachRequest, Backend, ExecRequest, PortForwardRequest},
    config::Config,
    http,
    request::{Command, Request, RequestError},
    shared::Shared,
    strangers::{Stranger, Strangers},
    tls::{self, TlsError},
    tokens::Tokens,
};

/// HTTP headers before an upgrade, bytes.
const HEADERS: usize = 16 << 10;
/// After a failed accept: most often descriptors are short, and sessions must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address can't be had.
    #[error("listen on {address} for streaming")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Certificate or key.
    #[error("set up TLS for streaming")]
    Tls(#[from] TlsError),
}

/// A streaming server. Dropping it ends the listener and all sessions.
#[derive(Debug)]
pub struct Streaming {
    shared: Arc<Shared>,
    address: SocketAddr,
    base_url: String,
    _stop: DropGuard,
}

impl Streaming {
    /// Listens and serves.
    ///
    /// # Errors
    /// When the address or the TLS files can't be used.
    pub async fn start(config: Config, backend: Arc<dyn Backend>) -> Result<Self, StartError> {
        let listen = |source| StartError::Listen {
            address: config.address,
            source,
        };
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;
        let listener = TcpListener::bind(config.address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let host = config
            .advertise
            .clone()
            .unwrap_or_else(|| reachable(address).to_string());
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            tokens: Tokens::new(config.limits.tokens, config.token_ttl),
            connections: Arc::new(Semaphore::new(config.limits.connections)),
            config,
            backend,
            tasks: TaskTracker::new(),
            stop: stop.clone(),
        });
        let accepting = accept(listener, tls, Arc::clone(&shared));
        let stopped = stop.clone();
        shared.tasks.spawn(async move {
            stopped.run_until_cancelled(accepting).await;
        });
        let base_url = format!("{scheme}://{host}");
        info!(%address, base_url, "serving streams");
        Ok(Self {
            shared,
            address,
            base_url,
            _stop: stop.drop_guard(),
        })
    }

    /// Where the server listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A URL for a command in a container.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn exec(&self, request: ExecRequest) -> Result<String, RequestError> {
        self.url(Request::Command(Command::Exec(request)))
    }

    /// A URL for the streams of a container.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn attach(&self, request: AttachRequest) -> Result<String, RequestError> {
        self.url(Request::Command(Command::Attach(request)))
    }

    /// A URL for connections into a pod.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String, RequestError> {
        self.url(Request::PortForward(request))
    }

    fn url(&self, request: Request) -> Result<String, RequestError> {
        request.check()?;
        let verb = request.verb();
        let token = self.shared.tokens.put(request)?;
        Ok(format!("{}/{verb}/{token}", self.base_url))
    }

    /// How many tasks there are: the listener's, and those of connections and sessions.
    #[cfg(test)]
    pub(crate) fn tasks(&self) -> usize {
        self.shared.tasks.len()
    }

    /// Ends the listener and all sessions, and waits for them.
    pub async fn shutdown(&self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

/// An address that a client on this host can use.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let strangers = Strangers::new(shared.config.limits.strangers);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept a streaming client");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let stranger = Arc::new(strangers.admit());
        let connection = connect(stream, tls.clone(), Arc::clone(&shared), stranger);
        let stop = shared.stop.clone();
        shared.tasks.spawn(async move {
            stop.run_until_cancelled(connection).await;
        });
    }
}

/// Serves a connection up to its upgrade, for as long as its client may take for that.
async fn connect(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    stranger: Arc<Stranger>,
) {
    // Keystrokes are small; a failure changes only how quick they are.
    let _ = stream.set_nodelay(true);
    let limit = shared.config.handshake_timeout;
    let work = async {
        let Some(tls) = tls else {
            return serve(stream, shared, Arc::clone(&stranger)).await;
        };
        match tls.accept(stream).await {
            Ok(stream) => serve(stream, shared, Arc::clone(&stranger)).await,
            Err(error) => debug!(%error, "TLS handshake failed"),
        }
    };
    tokio::select! {
        () = work => {}
        () = stranger.turned_away() => debug!("too many streaming clients without a token"),
        () = sleep(limit) => debug!("a streaming client took too long for its handshake"),
    }
}

/// Serves the one request of a connection.
pub(crate) async fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    shared: Arc<Shared>,
    stranger: Arc<Stranger>,
) {
    let limit = shared.config.handshake_timeout;
    let service = service_fn(move |request| {
        let response = http::respond(request, Arc::clone(&shared), &stranger);
        async { Ok::<_, std::convert::Infallible>(response) }
    });
    // Not `keep_alive(false)`: that puts `close` beside `Upgrade` (see `switch`). Refusals have it.
    let connection = http1::Builder::new()
        .max_buf_size(HEADERS)
        .timer(TokioTimer::new())
        .header_read_timeout(limit)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        debug!(%error, "HTTP of a streaming client failed");
    }
}
