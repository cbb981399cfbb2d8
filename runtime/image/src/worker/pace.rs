//! Whether a worker gets on. One that was taken over may do nothing, or next to nothing, forever.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Bytes that have to move while a worker is waited for as long as is patience.
const LEAST: u64 = 64 << 10;

/// Counts what moves to and from the workers of one job, and the time that they are waited for.
#[derive(Debug)]
pub(crate) struct Pace {
    patience: Duration,
    moved: Cell<u64>,
    /// Somebody else is waited for, or was since the last look.
    excused: Cell<bool>,
    others: Cell<bool>,
}

struct Waiting<'a>(&'a Pace);

impl<'a> Waiting<'a> {
    fn start(pace: &'a Pace) -> Self {
        pace.others.set(true);
        Self(pace)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.others.set(false);
        self.0.excused.set(true);
    }
}

/// No worker of the job gets on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hangs {
    pub(crate) seconds: u64,
}

impl Pace {
    pub(crate) fn new(patience: Duration) -> Self {
        Self {
            patience,
            moved: Cell::new(0),
            excused: Cell::new(false),
            others: Cell::new(false),
        }
    }

    /// So many bytes went to a worker, or came from one.
    pub(crate) fn moved(&self, bytes: usize) {
        self.moved.set(self.moved.get() + bytes as u64);
    }

    /// Waits for something that no worker does.
    pub(crate) async fn for_others<T>(&self, work: impl Future<Output = T>) -> T {
        // A wait that is given up ends as well.
        let _waiting = Waiting::start(self);
        work.await
    }

    /// Does what takes a worker, unless it hangs.
    pub(crate) async fn keep<T>(&self, work: impl Future<Output = T>) -> Result<T, Hangs> {
        tokio::pin!(work);
        let mut before = self.moved.get();
        let mut next = Instant::now() + self.patience;
        loop {
            tokio::select! {
                result = &mut work => return Ok(result),
                () = tokio::time::sleep_until(next) => {
                    let moved = self.moved.get();
                    let excused = self.excused.take() || self.others.get();
                    if !excused && moved - before < LEAST {
                        return Err(Hangs { seconds: self.patience.as_secs() });
                    }
                    before = moved;
                    next = Instant::now() + self.patience;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    async fn every(pause: Duration, bytes: usize, pace: &Pace) {
        loop {
            tokio::time::sleep(pause).await;
            pace.moved(bytes);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_trickles_hangs_and_who_is_slow_does_not() {
        let pace = Pace::new(PATIENCE);
        let start = Instant::now();
        let trickle = every(Duration::from_secs(1), 1000, &pace);
        assert_eq!(pace.keep(trickle).await, Err(Hangs { seconds: 60 }));
        assert_eq!(start.elapsed().as_secs(), 60);
        let pace = Pace::new(PATIENCE);
        let slow = every(Duration::from_secs(1), 2000, &pace);
        let hour = Duration::from_secs(3600);
        let kept = tokio::time::timeout(hour, pace.keep(slow)).await;
        assert!(kept.is_err(), "{kept:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_hangs_while_others_are_waited_for() {
        let pace = Pace::new(PATIENCE);
        let work = async {
            pace.for_others(tokio::time::sleep(10 * PATIENCE)).await;
            std::future::pending::<()>().await;
        };
        let start = Instant::now();
        assert_eq!(pace.keep(work).await, Err(Hangs { seconds: 60 }));
        let waited = start.elapsed();
        assert!(
            waited > 10 * PATIENCE && waited <= 12 * PATIENCE,
            "{waited:?}"
        );
    }
}
