//! How far a pull is.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::info;

/// How often the log tells about a pull that takes long.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How far a pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullProgress {
    /// Layers of the image; 0 until the manifest is known.
    pub layers: usize,
    /// Layers that are complete on this node.
    pub layers_done: usize,
    /// Compressed bytes of all layers that had to be transferred.
    pub bytes: u64,
    /// Compressed bytes received.
    pub bytes_done: u64,
}

/// Logs now and then how far a long pull is.
pub(super) async fn told<T>(
    work: impl Future<Output = T>,
    reference: &str,
    progress: &watch::Sender<PullProgress>,
) -> T {
    let mut tick = tokio::time::interval_at(Instant::now() + TELL_EVERY, TELL_EVERY);
    tokio::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => return result,
            _ = tick.tick() => {
                let PullProgress { layers, layers_done, bytes, bytes_done } = *progress.borrow();
                info!(%reference, layers, layers_done, bytes, bytes_done, "pulling");
            }
        }
    }
}
