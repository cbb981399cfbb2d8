//! What is kept from one request to the next: the last CPU times, from which rates are told and
//! which a container that ended keeps, and which guests did not answer.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hull_spec::stats::Filesystem;

/// Shorter times between two measurements say little.
const APART: Duration = Duration::from_millis(500);
/// How long a guest that did not answer is left alone.
const SILENCE: Duration = Duration::from_secs(10);

/// What is kept, by id of the pod or container. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Arc<Mutex<HashMap<String, Sample>>>);

#[derive(Debug, Default)]
struct Sample {
    cpu: Option<CpuSample>,
    writable: Option<Filesystem>,
    /// Not to be asked before.
    silent_until: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct CpuSample {
    at: Instant,
    usage_ns: u64,
    latest_ns: u64,
    rate: Option<u64>,
}

/// What is left of a container that ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Last {
    pub cpu_usage_ns: u64,
    pub writable: Option<Filesystem>,
}

impl Samples {
    /// Notes a CPU time and returns the rate since an earlier one, in billionths of a CPU.
    pub(crate) fn cpu(&self, id: &str, at: Instant, usage_ns: u64) -> Option<u64> {
        let mut samples = self.lock();
        let sample = &mut samples.entry(id.to_owned()).or_default().cpu;
        let next = match *sample {
            // A counter that goes back is another one.
            Some(earlier) if usage_ns < earlier.usage_ns => CpuSample::first(at, usage_ns),
            Some(earlier) => earlier.next(at, usage_ns),
            None => CpuSample::first(at, usage_ns),
        };
        *sample = Some(next);
        next.rate
    }

    /// Notes the size of a writable layer.
    pub(super) fn writable(&self, id: &str, writable: Filesystem) {
        self.lock().entry(id.to_owned()).or_default().writable = Some(writable);
    }

    /// What was last known.
    pub(super) fn last(&self, id: &str) -> Last {
        let samples = self.lock();
        let sample = samples.get(id);
        Last {
            cpu_usage_ns: sample.and_then(|s| s.cpu).map_or(0, |cpu| cpu.latest_ns),
            writable: sample.and_then(|s| s.writable),
        }
    }

    /// Leaves a pod's guest alone for a while.
    pub(super) fn silent(&self, id: &str) {
        let until = Instant::now().checked_add(SILENCE);
        self.lock().entry(id.to_owned()).or_default().silent_until = until;
    }

    /// Whether a pod's guest is to be left alone.
    pub(super) fn is_silent(&self, id: &str) -> bool {
        let until = self.lock().get(id).and_then(|sample| sample.silent_until);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Forgets all others.
    pub(super) fn keep_only(&self, ids: &HashSet<String>) {
        self.lock().retain(|id, _| ids.contains(id));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Sample>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CpuSample {
    fn first(at: Instant, usage_ns: u64) -> Self {
        Self {
            at,
            usage_ns,
            latest_ns: usage_ns,
            rate: None,
        }
    }

    fn next(self, at: Instant, usage_ns: u64) -> Self {
        let time = at.saturating_duration_since(self.at);
        if time < APART {
            return Self {
                latest_ns: usage_ns,
                ..self
            };
        }
        let used = u128::from(usage_ns.saturating_sub(self.usage_ns));
        let rate = used
            .saturating_mul(1_000_000_000)
            .checked_div(time.as_nanos());
        Self {
            at,
            usage_ns,
            latest_ns: usage_ns,
            rate: rate.map(|rate| u64::try_from(rate).unwrap_or(u64::MAX)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rate_needs_two_measurements_that_are_apart() {
        let samples = Samples::default();
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        assert_eq!(samples.cpu("c", begin, 1_000), None);
        assert_eq!(samples.cpu("c", after(100), 2_000), None);
        // Half a CPU for two seconds.
        let used = 1_000 + 1_000_000_000;
        assert_eq!(samples.cpu("c", after(2_000), used), Some(500_000_000));
        // Too soon: the rate stands, the time goes on.
        assert_eq!(samples.cpu("c", after(2_100), used + 7), Some(500_000_000));
        assert_eq!(samples.last("c").cpu_usage_ns, used + 7);
        assert_eq!(samples.cpu("c", after(4_000), used), Some(0));
        // Another counter.
        assert_eq!(samples.cpu("c", after(6_000), 5), None);
        assert_eq!(samples.cpu("d", after(6_000), 5), None);
    }

    proptest! {
        #[test]
        fn no_count_of_a_guest_is_too_large(
            counts in prop::collection::vec((0..=u64::MAX / 1_000_000_000, any::<u64>()), 1..8),
        ) {
            let (samples, mut at) = (Samples::default(), Instant::now());
            for (seconds, usage_ns) in counts {
                at = at.checked_add(Duration::from_secs(seconds)).unwrap_or(at);
                samples.cpu("c", at, usage_ns);
                prop_assert_eq!(samples.last("c").cpu_usage_ns, usage_ns);
            }
        }
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let samples = Samples::default();
        samples.cpu("c", Instant::now(), 9);
        samples.silent("p");
        assert!(samples.is_silent("p") && !samples.is_silent("c"));
        samples.keep_only(&HashSet::from(["p".to_owned()]));
        assert_eq!(samples.last("c"), Last::default());
        assert!(samples.is_silent("p"));
    }
}
