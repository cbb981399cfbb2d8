//! News of pods, for those who follow them.
//!
//! Each follower has a queue of its own. As long as it is served, it gets every event, in order
//! for each pod. A queue has a limit, since a follower that does not read must not fill the
//! host's memory: one that is too far behind gets what was queued and then the word that it
//! missed something, so that it can list everything anew. It never misses an event unknowingly.
//!
//! Who begins anew and does not read either is cut off again and again; the log says so once a
//! second at most.
//!
//! An event carries what was known of its pod when it happened, not when it is read.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use hull_spec::{
    error::PodError,
    id::{ContainerId, PodId},
    info::{ContainerInfo, SandboxInfo},
};

use crate::registry::PodView;

/// How many events a follower may be behind. Events of one pod share what they know of it.
const QUEUE: usize = 4096;
/// How many may follow.
const FOLLOWERS: usize = 64;
/// How often the log tells that followers are too slow.
const WARN_EVERY: Duration = Duration::from_secs(1);

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It was created.
    Created,
    /// It runs; of a sandbox: it is ready.
    Started,
    /// It ended; of a sandbox: it is no longer ready.
    Stopped,
    /// It is gone.
    Removed,
}

/// One event of a sandbox or of a container in it.
#[derive(Debug, Clone)]
pub struct PodEvent {
    kind: EventKind,
    container: Option<ContainerId>,
    at_ns: i64,
    view: Arc<PodView>,
}

impl PodEvent {
    pub(crate) fn new(
        kind: EventKind,
        container: Option<ContainerId>,
        at_ns: i64,
        view: Arc<PodView>,
    ) -> Self {
        Self {
            kind,
            container,
            at_ns,
            view,
        }
    }

    /// What happened.
    #[must_use]
    pub fn kind(&self) -> EventKind {
        self.kind
    }

    /// The sandbox that it happened to, or to one of whose containers.
    #[must_use]
    pub fn pod(&self) -> &PodId {
        &self.view.sandbox.id
    }

    /// The container that it happened to; none: the sandbox itself.
    #[must_use]
    pub fn container(&self) -> Option<&ContainerId> {
        self.container.as_ref()
    }

    /// When, as Unix time in nanoseconds.
    #[must_use]
    pub fn at_ns(&self) -> i64 {
        self.at_ns
    }

    /// The sandbox right after it happened.
    #[must_use]
    pub fn sandbox(&self) -> &SandboxInfo {
        &self.view.sandbox
    }

    /// The sandbox's containers right after it happened.
    pub fn containers(&self) -> impl Iterator<Item = &ContainerInfo> {
        self.view.containers.values()
    }
}

/// The follower did not read for so long that events were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("events were lost: more than {QUEUE} were waiting to be read")]
pub struct EventsLost;

/// The events from one moment on. Dropping it ends following.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Receiver<Arc<PodEvent>>,
    lost: Arc<AtomicBool>,
}

impl Events {
    /// The next event; none when there will be no more.
    ///
    /// # Errors
    /// [`EventsLost`], once, after the last event that was queued.
    pub async fn next(&mut self) -> Option<Result<Arc<PodEvent>, EventsLost>> {
        match self.queue.recv().await {
            Some(event) => Some(Ok(event)),
            None => self
                .lost
                .swap(false, Ordering::AcqRel)
                .then_some(Err(EventsLost)),
        }
    }
}

/// Where events come together.
#[derive(Debug)]
pub(crate) struct Hub {
    queue: usize,
    followers: Mutex<Vec<Follower>>,
    overruns: Mutex<Overruns>,
}

/// Followers that were cut off.
#[derive(Debug, Default)]
struct Overruns {
    /// Since the last warning.
    untold: u32,
    warned: Option<Instant>,
}

impl Overruns {
    /// Counts one; how many there were, when it is time to tell.
    fn count(&mut self, now: Instant) -> Option<u32> {
        self.untold = self.untold.saturating_add(1);
        let is_time = self.warned.is_none_or(|at| now - at >= WARN_EVERY);
        is_time.then(|| {
            self.warned = Some(now);
            std::mem::take(&mut self.untold)
        })
    }
}

#[derive(Debug)]
struct Follower {
    queue: mpsc::Sender<Arc<PodEvent>>,
    lost: Arc<AtomicBool>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            queue: QUEUE,
            followers: Mutex::default(),
            overruns: Mutex::default(),
        }
    }
}

impl Hub {
    /// Tells those who follow.
    pub(crate) fn announce(&self, event: PodEvent) {
        let event = Arc::new(event);
        self.followers().retain(|follower| {
            match follower.queue.try_send(Arc::clone(&event)) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    self.overrun();
                    // Before its queue is closed: who sees the end sees this.
                    follower.lost.store(true, Ordering::Release);
                    false
                }
                Err(mpsc::error::TrySendError::Closed(_)) => false,
            }
        });
    }

    /// Follows events from now on.
    ///
    /// # Errors
    /// [`PodError::ResourceExhausted`] when too many do.
    pub(crate) fn follow(&self) -> Result<Events, PodError> {
        let mut followers = self.followers();
        followers.retain(|follower| !follower.queue.is_closed());
        if followers.len() >= FOLLOWERS {
            return Err(PodError::ResourceExhausted {
                action: "follow events".into(),
                reason: format!("{FOLLOWERS} clients do already"),
            });
        }
        let (sender, queue) = mpsc::channel(self.queue);
        let lost = Arc::new(AtomicBool::new(false));
        followers.push(Follower {
            queue: sender,
            lost: Arc::clone(&lost),
        });
        Ok(Events { queue, lost })
    }

    fn overrun(&self) {
        let overruns = self.overruns.lock();
        let mut overruns = overruns.unwrap_or_else(PoisonError::into_inner);
        if let Some(clients) = overruns.count(Instant::now()) {
            tracing::warn!(
                clients,
                "clients of events are too slow, they have to begin anew"
            );
        }
    }

    fn followers(&self) -> std::sync::MutexGuard<'_, Vec<Follower>> {
        self.followers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use hull_spec::info::SandboxState;

    use crate::registry::Phase;

    fn event(at_ns: i64) -> PodEvent {
        let view = PodView {
            phase: Phase::Up,
            sandbox: SandboxInfo {
                id: PodId::random(),
                spec: Arc::default(),
                state: SandboxState::Ready,
                message: String::new(),
                created_at_ns: 0,
                ips: Vec::new(),
                vm: None,
                guest: None,
                boot: None,
            },
            containers: BTreeMap::new(),
            vm: None,
            agent: None,
        };
        PodEvent::new(EventKind::Created, None, at_ns, Arc::new(view))
    }

    async fn times(events: &mut Events) -> Vec<Result<i64, EventsLost>> {
        let mut times = Vec::new();
        while let Some(event) = events.next().await {
            times.push(event.map(|event| event.at_ns()));
        }
        times
    }

    #[tokio::test]
    async fn a_follower_that_is_too_slow_is_told_and_costs_the_others_nothing() {
        let hub = Hub {
            queue: 3,
            ..Hub::default()
        };
        let (mut slow, mut fast) = (hub.follow().unwrap(), hub.follow().unwrap());
        let mut seen = Vec::new();
        for at in 0..5 {
            hub.announce(event(at));
            seen.push(fast.next().await.unwrap().unwrap().at_ns());
        }
        assert_eq!(seen, [0, 1, 2, 3, 4]);
        assert_eq!(
            times(&mut slow).await,
            [Ok(0), Ok(1), Ok(2), Err(EventsLost)]
        );
        drop(hub);
        assert_eq!(times(&mut fast).await, []);
    }

    #[tokio::test(start_paused = true)]
    async fn overruns_are_told_once_a_second_and_none_is_left_out() {
        let hub = Hub {
            queue: 1,
            ..Hub::default()
        };
        let untold = || hub.overruns.lock().unwrap().untold;
        let overrun = |times: usize| {
            for _ in 0..times {
                let _follower = hub.follow().unwrap();
                hub.announce(event(1));
                hub.announce(event(2));
            }
        };
        overrun(100);
        assert_eq!(untold(), 99);
        tokio::time::advance(WARN_EVERY).await;
        overrun(1);
        assert_eq!(untold(), 0);
    }

    #[tokio::test]
    async fn the_number_of_followers_is_bounded_and_those_who_left_do_not_count() {
        let hub = Hub::default();
        let mut all: Vec<_> = (0..FOLLOWERS).map(|_| hub.follow().unwrap()).collect();
        let refused = hub.follow().unwrap_err();
        assert!(matches!(refused, PodError::ResourceExhausted { .. }));
        all.pop();
        let mut last = hub.follow().unwrap();
        hub.announce(event(7));
        assert_eq!(last.next().await.unwrap().unwrap().at_ns(), 7);
    }
}
