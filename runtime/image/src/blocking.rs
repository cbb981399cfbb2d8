//! Work that blocks, apart from the threads that serve requests.

use crate::error::StoreError;

/// Runs disk and CPU work where it may block. The work starts at once, and goes on when nobody
/// waits for it any more.
pub(crate) fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = Result<T, StoreError>> {
    let task = tokio::task::spawn_blocking(work);
    async { task.await.map_err(StoreError::Task) }
}
