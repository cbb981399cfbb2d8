//! The CRI services. CRI's own types stop here.
//!
//! Read [`runtime_service`] and [`image_service`] first: every RPC, each with
//! its span. One file per verb follows in `pod/`, `container/`, `image/` and
//! `node/`; `convert/` translates messages, [`filter`] selects for lists, and
//! [`status_code`] turns errors into statuses, [`times`] measures. [`delegate`] is in front of all that: pods that
//! other runtimes have.

mod container;
mod convert;
pub(crate) mod delegate;
mod error;
mod field;
mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod image;
mod image_service;
mod info;
mod node;
mod pod;
mod runtime_service;
mod status_code;
mod stream;
#[cfg(test)]
mod tests;
mod times;

use std::{future::Future, panic::AssertUnwindSafe, path::PathBuf, sync::Arc, time::Instant};

use futures::FutureExt;
use hull_base::stages;
use hull_image::ImageStore;
use hull_network::Network;
use hull_pod::Pods;
use hull_streaming::Streaming;
use tokio::sync::watch;
use tonic::{Code, Response, Status};
use tracing::{Instrument, Span, debug, warn};

pub(crate) use self::{
    error::CriError,
    status_code::{EXIT_CODE, UNTRUSTED},
    stream::Answer,
    times::Times,
};
use crate::{config::Handlers, host::Probe, life::Life, shutdown::Stopping};

/// What the services work on.
#[derive(Debug)]
pub(crate) struct Backend {
    /// Pods and containers.
    pub(crate) pods: Pods,
    /// What happens to them: plugins of the node may have a say in it.
    pub(crate) life: Life,
    /// Images.
    pub(crate) images: ImageStore,
    /// Networks; asked for its status only.
    pub(crate) network: Network,
    /// The runtime handlers of this node; they can change.
    pub(crate) handlers: watch::Sender<Handlers>,
    /// Makes URLs for exec, attach and port-forward, and serves them.
    pub(crate) streaming: Streaming,
    /// Whether this host can run VMs.
    pub(crate) probe: Probe,
    /// What outlives a reboot.
    pub(crate) root: PathBuf,
    /// What does not.
    pub(crate) state: PathBuf,
    /// Where images are.
    pub(crate) images_dir: PathBuf,
    /// Where pods have their scratch disks.
    pub(crate) pods_dir: PathBuf,
    /// Ends what goes on as long as the daemon does.
    pub(crate) stopping: Stopping,
}

/// Both CRI services. Clones share the backend.
#[derive(Debug, Clone)]
pub(crate) struct Cri(pub(crate) Arc<Backend>);

/// Runs a verb in its span; an error is logged here and nowhere else. A panic is answered too: the
/// client's other calls go on.
pub(crate) async fn answer<T>(
    span: Span,
    verb: impl Future<Output = Result<T, CriError>>,
) -> Result<Response<T>, Status> {
    let started = Instant::now();
    async {
        // What a call shares with others is locked by what does not mind a panic.
        let result = AssertUnwindSafe(verb).catch_unwind().await;
        match result.unwrap_or(Err(CriError::Panicked)) {
            Ok(value) => {
                debug!(ms = started.elapsed().as_millis(), "answered");
                Ok(Response::new(value))
            }
            Err(error) => Err(failed(&error, started)),
        }
    }
    .instrument(span)
    .await
}

/// Logs why a verb failed; returns the status that says so.
pub(crate) fn failed(error: &CriError, started: Instant) -> Status {
    let ms = started.elapsed().as_millis();
    let status = status_code::status(error);
    match status.code() {
        Code::NotFound | Code::Unimplemented => {
            debug!(ms, code = ?status.code(), error = status.message(), "refused");
        }
        code => warn!(ms, ?code, error = status.message(), "failed"),
    }
    status
}

/// An id as the client gave it: whole or shortened, but not empty.
fn id<'a>(field: &str, id: &'a str) -> Result<&'a str, CriError> {
    // An empty text would be the prefix of every id.
    if id.is_empty() {
        return Err(CriError::missing(field));
    }
    let attribute = match field {
        "container_id" => stages::CONTAINER,
        _ => stages::POD,
    };
    stages::attribute(attribute, id);
    Ok(id)
}
