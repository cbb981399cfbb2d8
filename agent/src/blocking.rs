//! Work that may wait for a disk or a device, beside the event loop.

use tokio::task::spawn_blocking;

/// Runs `work` on a thread where it may block: the event loop, and with it all streams of the
/// pod, goes on meanwhile. Such a thread may be in other namespaces than the event loop's
/// ([`crate::container::pause`]).
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The event loop ends, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
