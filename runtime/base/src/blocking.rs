//! Work that blocks, kept off the threads of asynchronous tasks.

use tokio::task::spawn_blocking;

/// Runs `work` on a thread that may block, and waits for it. A panic in it goes on in the caller. `work`
/// runs to its end even if the caller is dropped.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being shut down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
