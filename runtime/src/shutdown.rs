//! When to stop serving: SIGTERM or SIGINT. Pods keep running.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Installs the handlers; the future ends with the first signal.
pub(crate) fn requested() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let signal = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        info!(signal, "stop serving; pods keep running");
    })
}
