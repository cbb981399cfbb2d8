//! Panics, kept to the work in which they happen: a guest that causes one must not end other pods.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, resume_unwind},
};

use futures::FutureExt;

use crate::printable::printable;

/// Longest part of a panic's message that is shown.
const MESSAGE_MAX: usize = 512;

/// The message of a panic. The process's panic hook has logged where it happened.
#[derive(Debug, thiserror::Error)]
#[error("internal error while dealing with the guest: {0}")]
pub struct Panic(String);

impl Panic {
    /// Takes the message from what a task or future panicked with.
    #[must_use]
    pub fn new(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        // The message may quote what the guest sent.
        Self(printable(
            text.unwrap_or("a panic without a message"),
            MESSAGE_MAX,
        ))
    }

    /// Goes on panicking, without the panic hook.
    pub fn resume(self) -> ! {
        resume_unwind(Box::new(self.0))
    }
}

/// Runs `work` to its end or its panic.
///
/// After a panic, data that `work` shares with other tasks may be half changed. So the caller has to end
/// the pod that `work` was for; data of all pods is changed in one step each, under locks that ignore
/// poison.
///
/// # Errors
/// When `work` panicked.
pub fn caught<T>(work: impl Future<Output = T>) -> impl Future<Output = Result<T, Panic>> {
    // Moved into futures around it, it would have room in each of them.
    let work = Box::pin(work);
    async move {
        let ended = AssertUnwindSafe(work).catch_unwind().await;
        ended.map_err(|payload| Panic::new(payload.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_told_and_goes_no_further() {
        assert_eq!(caught(async { 7 }).await.unwrap(), 7);
        let later = async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let (empty, at) = (Vec::<u8>::new(), 3);
            empty[at]
        };
        let told = caught(later).await.unwrap_err().to_string();
        assert!(
            told.contains("dealing with the guest: index out of bounds"),
            "{told}"
        );
        let fixed: Result<(), _> = caught(async { panic!("fixed") }).await;
        assert!(fixed.unwrap_err().to_string().ends_with(": fixed"));
    }
}
