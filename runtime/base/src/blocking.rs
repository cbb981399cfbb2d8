//! Work that blocks, kept off the threads of asynchronous tasks.

use std::cell::Cell;

use tokio::task::{spawn_blocking, yield_now};

thread_local! {
    static IN_PLACE: Cell<bool> = const { Cell::new(false) };
}

/// From now on the calling thread itself does the work that it gives to [`blocking`]: a simulation has
/// one thread, so that it can be repeated.
pub fn block_in_place() {
    IN_PLACE.set(true);
}

/// Runs `work` on a thread that may block, and waits for it. A panic in it goes on in the caller. `work`
/// runs to its end even if the caller is dropped.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if IN_PLACE.get() {
        yield_now().await;
        let result = work();
        yield_now().await;
        return result;
    }
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being shut down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}
