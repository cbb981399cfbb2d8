//! Whose turn it is to be brought up.
//!
//! Of many sandboxes that are asked for at once, the first are up when the last begin: side by side,
//! all would take as long as the whole, and exceed the time that a network plugin or a guest's boot
//! may take. A turn is a CPU's worth of that work. A VM that boots keeps of it what its cgroup lets
//! it use, so pods with tiny limits, whose boot takes for ever, hold up nobody else.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use hull_base::host;

/// What a turn is, in thousandths of a CPU.
const TURN: u32 = 1000;

/// The turns of a node.
#[derive(Debug)]
pub(crate) struct Starts(Arc<Semaphore>);

/// Leave to bring a sandbox up; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Option<OwnedSemaphorePermit>);

impl Starts {
    /// As many turns as this host has CPUs for.
    pub(crate) fn new() -> Self {
        Self::with((2 * host::cpus()).max(4))
    }

    fn with(turns: usize) -> Self {
        let turn = TURN as usize;
        // What is left of turns takes no whole one from others before it is one itself.
        Self(Arc::new(Semaphore::new(turns * turn + turn - 1)))
    }

    /// Waits for a turn.
    pub(crate) async fn turn(&self) -> Turn {
        // It is never closed, so this is never an error.
        Turn(Arc::clone(&self.0).acquire_many_owned(TURN).await.ok())
    }
}

impl Turn {
    /// Gives back what a VM can't use that may use so many thousandths of a CPU; none: any number.
    pub(crate) fn keep(&mut self, millicpus: Option<u32>) {
        let unused = TURN.saturating_sub(millicpus.unwrap_or(TURN));
        if let Some(permit) = &mut self.0 {
            drop(permit.split(unused as usize));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn gets_one(starts: &Starts) -> Option<Turn> {
        timeout(Duration::from_millis(50), starts.turn()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn turns_are_limited_and_given_back() {
        let starts = Starts::with(2);
        let one = starts.turn().await;
        let _other = starts.turn().await;
        assert!(gets_one(&starts).await.is_none());
        drop(one);
        assert!(gets_one(&starts).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_holds_up_others_as_far_as_it_may_use_a_cpu() {
        let starts = Starts::with(2);
        let mut slow = Vec::new();
        for _ in 0..999 {
            let mut turn = starts.turn().await;
            turn.keep(Some(1));
            slow.push(turn);
        }
        let both = (starts.turn().await, starts.turn().await);
        assert!(gets_one(&starts).await.is_none());
        drop(both);
        // Together they use a CPU.
        let mut last = starts.turn().await;
        last.keep(Some(1));
        let _one = starts.turn().await;
        assert!(gets_one(&starts).await.is_none());
        drop(slow);
        for millicpus in [None, Some(1000), Some(u32::MAX)] {
            let mut turn = starts.turn().await;
            turn.keep(millicpus);
            assert!(gets_one(&starts).await.is_none());
        }
    }
}
