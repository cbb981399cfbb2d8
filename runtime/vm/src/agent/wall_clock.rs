//! The guest's clock follows the host's.
//!
//! The host's runs at a pace that its time server keeps changing, and may be set. The guest has neither: it
//! counts the processor's ticks. So it is asked for its time now and then, and at once when the host's
//! was set, and told how far it is off; half of the way there and back is taken off. Its kernel could ask KVM
//! (`ptp_kvm`), but not where the host is a virtual machine itself, and nothing would tell it of a step.

use std::time::{Duration, Instant};

use tokio::{task::AbortHandle, time::sleep};

use hull_base::clock::{self, Steps};

use crate::agent::{client::Agent, error::GuestError};

/// How often the guest is asked. A clock that is 500 ppm off, the most that time servers make of it in the
/// long run, is 5 ms off then.
const INTERVAL: Duration = Duration::from_secs(10);
/// How often, when it was further off than that: a guest makes up for 500 ppm and no more.
const CLOSELY: Duration = Duration::from_secs(2);
const NEAR_NS: u64 = 2_000_000;
/// Pause before a guest that did not answer is asked again.
const RETRY: Duration = Duration::from_secs(1);
/// An answer that is known so well is good enough.
const GOOD_NS: i64 = 1_000_000;
/// How often the guest is asked for a better one.
const TRIES: u32 = 4;

/// Keeps a guest's clock with the host's, until it is dropped.
#[derive(Debug)]
pub struct WallClock(AbortHandle);

impl WallClock {
    /// Begins, after a while when it was `just_set`.
    pub fn keep(agent: Agent, steps: Steps, just_set: bool) -> Self {
        let first = if just_set { INTERVAL } else { Duration::ZERO };
        let keeping = Box::pin(keep(agent.clone(), steps, first));
        let keeping = async move {
            // A panic has told the pod's task.
            let _ = agent.guard(keeping).await;
        };
        Self(tokio::spawn(keeping).abort_handle())
    }
}

impl Drop for WallClock {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn keep(agent: Agent, mut steps: Steps, first: Duration) {
    let mut pause = first;
    loop {
        tokio::select! {
            () = sleep(pause) => {}
            () = steps.next() => {}
        }
        pause = match set_right(&agent).await {
            Ok(found) => found.pause(),
            // The agent of an adopted VM may be older.
            Err(error) if error.is_not_found() => return,
            Err(error) => {
                tracing::debug!(%error, "the guest's clock is not followed");
                RETRY
            }
        };
    }
}

/// How far the guest's clock is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Offset {
    /// How far it is ahead of the host's.
    ahead_ns: i64,
    /// How wrong that can be.
    error_ns: i64,
}

impl Offset {
    /// From the guest's time, and when on the host it was asked for and how long the answer took. What
    /// the guest says may be anything.
    fn of(guest_ns: u64, asked_ns: i64, took: Duration) -> Self {
        let guest_ns = i64::try_from(guest_ns).unwrap_or(i64::MAX);
        let error_ns = i64::try_from(took.as_nanos() / 2).unwrap_or(i64::MAX);
        Self {
            ahead_ns: guest_ns.saturating_sub(asked_ns.saturating_add(error_ns)),
            error_ns,
        }
    }

    /// What is to be added to the guest's clock; nothing while it may be right.
    fn correction_ns(self) -> Option<i64> {
        let off = self.ahead_ns.unsigned_abs() > self.error_ns.unsigned_abs();
        off.then(|| self.ahead_ns.saturating_neg())
    }

    /// How long it may be before the guest is asked again.
    fn pause(self) -> Duration {
        if self.ahead_ns.unsigned_abs() > NEAR_NS {
            CLOSELY
        } else {
            INTERVAL
        }
    }
}

/// Sets the guest's clock right, and returns how far it was off.
async fn set_right(agent: &Agent) -> Result<Offset, GuestError> {
    let mut best = ask(agent).await?;
    for _ in 1..TRIES {
        if best.error_ns <= GOOD_NS {
            break;
        }
        let again = ask(agent).await?;
        if again.error_ns < best.error_ns {
            best = again;
        }
    }
    if let Some(by_ns) = best.correction_ns() {
        agent.adjust_clock(by_ns).await?;
    }
    Ok(best)
}

async fn ask(agent: &Agent) -> Result<Offset, GuestError> {
    let (asked_ns, began) = (clock::now_ns(), Instant::now());
    let guest_ns = agent.adjust_clock(0).await?;
    Ok(Offset::of(guest_ns, asked_ns, began.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    #[test]
    fn half_of_the_way_is_taken_off() {
        let took = Duration::from_millis(4);
        let right = Offset::of(1002 * MS as u64, 1000 * MS, took);
        assert_eq!((right.ahead_ns, right.error_ns), (0, 2 * MS));
        assert_eq!(right.correction_ns(), None);
        let ahead = Offset::of(1005 * MS as u64, 1000 * MS, took);
        assert_eq!(ahead.correction_ns(), Some(-3 * MS));
        let behind = Offset::of(0, 3_600_000 * MS, took);
        assert_eq!(behind.correction_ns(), Some(3_600_002 * MS));
    }

    #[test]
    fn what_may_be_due_to_the_way_is_left() {
        let offset =
            |guest_ms: u64| Offset::of(guest_ms * MS as u64, 1000 * MS, Duration::from_millis(40));
        assert_eq!(offset(1000).correction_ns(), None);
        assert_eq!(offset(1040).correction_ns(), None);
        assert_eq!(offset(1041).correction_ns(), Some(-21 * MS));
    }

    #[test]
    fn a_clock_that_runs_away_is_looked_at_more_often() {
        let offset = |guest_ms: u64| Offset::of(guest_ms * MS as u64, 1000 * MS, Duration::ZERO);
        for (guest_ms, pause) in [
            (1000, INTERVAL),
            (1002, INTERVAL),
            (998, INTERVAL),
            (1003, CLOSELY),
            (997, CLOSELY),
            (0, CLOSELY),
        ] {
            assert_eq!(offset(guest_ms).pause(), pause, "{guest_ms}");
        }
    }

    #[test]
    fn a_guest_may_say_anything() {
        for guest_ns in [0, u64::MAX] {
            for took in [Duration::ZERO, Duration::MAX] {
                for asked_ns in [0, i64::MAX] {
                    Offset::of(guest_ns, asked_ns, took).correction_ns();
                }
            }
        }
    }
}
