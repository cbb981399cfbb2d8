//! Panics, kept to the work that has them: one that a guest brings about must not end the others.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, resume_unwind},
};

use futures::FutureExt;

use crate::printable::printable;

/// Longest part of a panic's message that is shown.
const MESSAGE_MAX: usize = 512;

/// What a panic said; where it was, the process's panic hook has logged.
#[derive(Debug, thiserror::Error)]
#[error("internal error while dealing with the guest: {0}")]
pub struct Panic(String);

impl Panic {
    /// That of a task or future that panicked.
    pub fn new(payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        // It may quote what the guest sent.
        Self(printable(
            text.unwrap_or("a panic without a message"),
            MESSAGE_MAX,
        ))
    }

    /// Goes on panicking, without telling of it again.
    pub fn resume(self) -> ! {
        resume_unwind(Box::new(self.0))
    }
}

/// Runs `work` to its end or its panic.
///
/// What `work` shares with others may be left halfway changed. So the caller has to end the pod that
/// it was for; what all pods share is changed in one step each, under locks that ignore poison.
pub async fn caught<T>(work: impl Future<Output = T>) -> Result<T, Panic> {
    let ended = AssertUnwindSafe(work).catch_unwind().await;
    ended.map_err(|payload| Panic::new(payload.as_ref()))
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
