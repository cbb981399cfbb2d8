//! When to stop serving: SIGTERM or SIGINT. Pods keep running.

use std::io;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
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

/// Whether the end was asked for, for what would otherwise go on for ever. Clones see the same.
#[derive(Debug, Clone)]
pub(crate) struct Stopping(watch::Receiver<bool>);

/// Tells those who hold the other half.
#[derive(Debug)]
pub(crate) struct Stop(watch::Sender<bool>);

/// Both halves.
pub(crate) fn channel() -> (Stop, Stopping) {
    let (sender, receiver) = watch::channel(false);
    (Stop(sender), Stopping(receiver))
}

impl Stop {
    /// Asks for the end.
    pub(crate) fn request(&self) {
        self.0.send_replace(true);
    }
}

impl Stopping {
    /// Waits until the end is asked for.
    pub(crate) async fn requested(&mut self) {
        // An error means that nobody is there to ask: the daemon is gone.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}
