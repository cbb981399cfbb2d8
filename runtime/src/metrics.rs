//! `/metrics`: what the daemon measured ([`hull_base::metrics`]), for Prometheus, over HTTP where `metrics.address`
//! says. Whoever reaches the address may read it: it names no pod, image or user.

use std::{
    collections::BTreeMap, convert::Infallible, fs, io, net::SocketAddr, sync::Arc, time::Duration,
};

use bytes::Bytes;
use futures::future::join_all;
use http::{HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hull_base::{blocking, metrics};
use hull_spec::info::{ContainerState, SandboxState};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::{Mutex, Semaphore},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::cri::Backend;

/// Most connections at a time: a scraper needs one.
const CONNECTIONS: usize = 16;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// After a failed accept: most often descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Most reasons of exits that are told apart; a VMM has half as many.
const REASONS: usize = 32;
/// Longest of their names, bytes.
const NAME_MAX: usize = 32;

/// Why nothing can be scraped.
#[derive(Debug, thiserror::Error)]
#[error("listen on {address} for metrics")]
pub(crate) struct ListenError {
    address: SocketAddr,
    source: io::Error,
}

/// Serves at an address until the daemon ends.
///
/// # Errors
/// When the address can't be had.
pub(crate) async fn serve(address: SocketAddr, backend: Arc<Backend>) -> Result<(), ListenError> {
    let failed = |source| ListenError { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    info!(address = %listener.local_addr().map_err(failed)?, "serving metrics");
    metrics::INFO.set(&[env!("CARGO_PKG_VERSION")], 1.0);
    tokio::spawn(accept(listener, backend));
    Ok(())
}

async fn accept(listener: TcpListener, backend: Arc<Backend>) {
    // One scrape at a time: it asks all VMs.
    let turn = Arc::new(Mutex::new(()));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // It is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "accept a connection for metrics");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (backend, turn) = (Arc::clone(&backend), Arc::clone(&turn));
        let service = service_fn(move |request| {
            let (backend, turn) = (Arc::clone(&backend), Arc::clone(&turn));
            async move { Ok::<_, Infallible>(answer(&request, &backend, &turn).await) }
        });
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false);
            let served = http.serve_connection(TokioIo::new(stream), service);
            // A client that went away, or never reads, has no metrics.
            let _ = timeout(PATIENCE, served).await;
            drop(place);
        });
    }
}

async fn answer<B>(
    request: &Request<B>,
    backend: &Backend,
    turn: &Mutex<()>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    if request.uri().path() != "/metrics" {
        *response.status_mut() = StatusCode::NOT_FOUND;
    } else if request.method() != Method::GET {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    } else {
        let _turn = turn.lock().await;
        look(backend).await;
        let (text, media_type) = metrics::text();
        let media_type = HeaderValue::from_static(media_type);
        response.headers_mut().insert(CONTENT_TYPE, media_type);
        *response.body_mut() = Full::new(text.into());
    }
    response
}

/// Looks at what is not counted when it happens.
async fn look(backend: &Backend) {
    pods(backend).await;
    metrics::TEMPLATES.set(&[], backend.pods.templates().ready as f64);
    // What can't be told is not shown as none.
    for metric in [&metrics::IMAGES, &metrics::IMAGE_BYTES] {
        metric.clear();
    }
    if let Ok(images) = backend.images.list().await {
        metrics::IMAGES.set(&[], images.len() as f64);
    }
    if let Ok(usage) = backend.images.usage().await {
        metrics::IMAGE_BYTES.set(&[], usage.bytes as f64);
    }
    if let Ok((descriptors, resident)) = blocking(daemon).await {
        metrics::DESCRIPTORS.set(&[], descriptors as f64);
        metrics::MEMORY.set(&[], resident as f64);
    }
}

async fn pods(backend: &Backend) {
    let sandboxes = backend.pods.sandboxes().await;
    let (mut ready, mut others) = (0, 0);
    for sandbox in &sandboxes {
        match sandbox.state {
            SandboxState::Ready => ready += 1,
            SandboxState::NotReady => others += 1,
        }
    }
    metrics::SANDBOXES.set(&["ready"], f64::from(ready));
    metrics::SANDBOXES.set(&["not_ready"], f64::from(others));
    let states = [
        (ContainerState::Created, "created"),
        (ContainerState::Running, "running"),
        (ContainerState::Exited, "exited"),
        (ContainerState::Unknown, "unknown"),
    ];
    let containers = backend
        .pods
        .select_containers("", |_| true, |c| c.state)
        .await;
    for (state, name) in states {
        let number = containers.iter().filter(|other| **other == state).count();
        metrics::CONTAINERS.set(&[name], number as f64);
    }

    let ids = sandboxes.iter().map(|sandbox| sandbox.id.as_str());
    let asked = ids.map(|id| async move {
        let memory = backend.pods.process_memory(id).await.ok().flatten();
        (memory, backend.pods.vm_metrics(id).await.ok())
    });
    let (mut resident, mut private) = (0, 0);
    metrics::VM_EXITS.clear();
    let mut exits = BTreeMap::<String, u64>::new();
    for (memory, counters) in join_all(asked).await {
        let memory = memory.unwrap_or_default();
        resident += memory.rss_bytes;
        private += memory.private_bytes;
        for (reason, number) in counters.into_iter().flat_map(|counters| counters.exits) {
            // A VMM may say anything, when its guest has taken it over.
            if reason.len() <= NAME_MAX && (exits.len() < REASONS || exits.contains_key(&reason)) {
                let sum = exits.entry(reason).or_default();
                *sum = sum.saturating_add(number);
            }
        }
    }
    metrics::VM_MEMORY.set(&["resident"], resident as f64);
    metrics::VM_MEMORY.set(&["private"], private as f64);
    for (reason, number) in exits {
        metrics::VM_EXITS.set(&[&reason], number as f64);
    }
}

/// Descriptors and resident bytes of this process.
fn daemon() -> io::Result<(usize, u64)> {
    let descriptors = fs::read_dir("/proc/self/fd")?.count();
    // proc_pid_status(5): "VmRSS:     1234 kB".
    let status = fs::read_to_string("/proc/self/status")?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok((
        descriptors,
        resident.unwrap_or_default().saturating_mul(1024),
    ))
}
