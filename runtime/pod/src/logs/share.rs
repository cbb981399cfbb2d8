//! How much of the daemon's time the output of one pod gets.
//!
//! The daemon is in no pod's cgroup, so what it does for the output of one costs all others. A pod that
//! writes without end is slowed down: for a while nothing more is taken from its streams, so their credit
//! and then the agent's buffers are used up, and its processes block where they write. No byte is lost.
//!
//! Time of a processor is counted, not bytes: a byte in a line of its own costs as much as a hundred in a
//! long one, and hosts differ.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use hull_vm::agent::stdio::OutputEnd;

/// A pod's outputs get one in so many parts of a processor.
const PARTS: u32 = 10;
/// What a pod that was silent may take at once.
const BURST: Duration = Duration::from_millis(100);

/// The share of one pod, for all of its outputs together. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Share(Arc<Mutex<Option<Instant>>>);

impl Share {
    /// Counts work that was done, and waits until there is time for more. It does not wait for a process
    /// that has ended: what is left of its output is bounded, and its end waits for it.
    pub(crate) async fn spend(&self, work: Duration, end: &mut watch::Receiver<OutputEnd>) {
        let Some(until) = self.count(work, Instant::now()) else {
            return;
        };
        tokio::select! {
            () = sleep_until(until) => {}
            _ = end.wait_for(|end| *end != OutputEnd::Open) => {}
        }
    }

    /// Counts work that was done, and tells until when there is time for no more.
    fn count(&self, work: Duration, now: Instant) -> Option<Instant> {
        let mut paid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = now.checked_sub(BURST.saturating_mul(PARTS));
        let from = (*paid).max(saved).unwrap_or(now);
        let until = from.checked_add(work.saturating_mul(PARTS)).unwrap_or(from);
        *paid = Some(until);
        (until > now).then_some(until)
    }
}

/// Does work, and tells what it took of a processor.
pub(crate) fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    // It fails on no Linux.
    let now =
        || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    let begin = now();
    let result = work();
    (result, now().saturating_sub(begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Duration = Duration::from_millis(3);

    /// Spends for as long, and returns how much.
    async fn spent_within(time: Duration, share: &Share) -> Duration {
        let (_open, mut end) = watch::channel(OutputEnd::Open);
        let deadline = Instant::now() + time;
        let mut spent = Duration::ZERO;
        while Instant::now() < deadline {
            share.spend(WORK, &mut end).await;
            spent += WORK;
        }
        spent
    }

    #[tokio::test(start_paused = true)]
    async fn all_outputs_of_a_pod_together_get_its_share_and_no_other_pod_waits() {
        let (flooding, other) = (Share::default(), Share::default());
        let time = Duration::from_secs(60);
        let clone = flooding.clone();
        let (one, two, lone) = tokio::join!(
            spent_within(time, &flooding),
            spent_within(time, &clone),
            spent_within(time, &other),
        );
        let most = time / PARTS + BURST + 4 * WORK;
        for spent in [one + two, lone] {
            assert!(spent <= most && spent >= time / PARTS, "{spent:?}");
        }
        // The first has the burst.
        assert!(one.abs_diff(two) <= BURST + WORK, "{one:?} {two:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_silent_does_not_wait_and_saves_no_more_than_a_burst() {
        let (_open, mut end) = watch::channel(OutputEnd::Open);
        let share = Share::default();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            let start = Instant::now();
            share.spend(BURST, &mut end).await;
            assert_eq!(start.elapsed(), Duration::ZERO);
            share.spend(WORK, &mut end).await;
            let waited = start.elapsed();
            // To the timer's millisecond.
            assert!(
                waited >= WORK * PARTS && waited < WORK * (PARTS + 1),
                "{waited:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_a_process_is_not_waited_for() {
        let share = Share::default();
        let (ends, mut end) = watch::channel(OutputEnd::Open);
        let start = Instant::now();
        let long = Duration::from_secs(100);
        let ending = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            ends.send_replace(OutputEnd::At(7));
        };
        tokio::join!(share.spend(long, &mut end), ending);
        share.spend(long, &mut end).await;
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn only_work_is_counted() {
        let (_, slept) = timed(|| std::thread::sleep(Duration::from_millis(50)));
        assert!(slept < Duration::from_millis(25), "{slept:?}");
        let (turns, worked) = timed(|| {
            let begin = std::time::Instant::now();
            let mut turns = 0_u64;
            while begin.elapsed() < Duration::from_millis(50) {
                turns += 1;
            }
            turns
        });
        assert!(turns > 0 && worked > Duration::ZERO);
    }
}
