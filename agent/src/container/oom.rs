//! Tells the host when the kernel kills processes of a container for lack of
//! memory.

use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hull_proto_agent::agent::{Oom, event::Kind};
use tokio::io::Interest;

use super::cgroup::Cgroup;
use crate::{events::Events, ident::Id, sys, time};

/// What the kernel killed in one container.
#[derive(Debug)]
pub(crate) struct OomKills {
    id: Id,
    cgroup: Cgroup,
    events: Arc<Events>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// How many kills the host was told.
    told: u64,
    /// How many there were when the container was killed on request.
    at_request: Option<u64>,
}

impl OomKills {
    pub(crate) fn new(id: Id, cgroup: Cgroup, events: Arc<Events>) -> Arc<Self> {
        Arc::new(Self {
            id,
            cgroup,
            events,
            seen: Mutex::default(),
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many kills there were.
    pub(crate) fn count(&self) -> u64 {
        self.cgroup.oom_kills()
    }

    /// Publishes an event for each kill that has none, and returns how many
    /// there were. Called when the kernel tells of a change, and before the end
    /// of a process is published: so the event is never missing, and never after.
    pub(crate) fn tell(&self) -> u64 {
        let mut seen = self.seen();
        let kills = self.count();
        for _ in seen.told..kills {
            self.events.publish(Kind::Oom(Oom {
                container_id: self.id.to_string(),
                at_ns: time::real_ns(),
                ..Oom::default()
            }));
        }
        seen.told = seen.told.max(kills);
        kills
    }

    /// Notes that the container is about to be killed on request: from here on
    /// only a further kill by the kernel makes its end one for lack of memory.
    pub(crate) fn killed_on_request(&self) {
        let mut seen = self.seen();
        seen.at_request.get_or_insert_with(|| self.count());
    }

    /// Returns how many kills do not explain the end of the first process.
    pub(crate) fn before_request(&self) -> u64 {
        self.seen().at_request.unwrap_or(0)
    }

    /// Follows the kernel's counter for as long as that can be read.
    pub(crate) async fn watch(&self) -> io::Result<()> {
        let file = File::open(self.cgroup.path().join("memory.events"))?;
        // The kernel marks the file as exceptional when it changed (poll(2)).
        let changes = sys::register(file.into(), Interest::PRIORITY)?;
        loop {
            self.tell();
            changes.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn each_kill_is_told_once_and_those_before_a_request_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let count = |n: u64| {
            let text = format!("oom {n}\noom_kill {n}\n");
            std::fs::write(dir.path().join("memory.events"), text).unwrap();
        };
        let events = Arc::new(Events::default());
        let id = Id::parse("container id", "c1").unwrap();
        let kills = OomKills::new(id, Cgroup::at(dir.path().to_owned()), Arc::clone(&events));
        assert_eq!((kills.tell(), kills.before_request()), (0, 0));
        count(2);
        assert_eq!((kills.tell(), kills.tell()), (2, 2));
        kills.killed_on_request();
        count(3);
        kills.killed_on_request();
        assert_eq!((kills.tell(), kills.before_request()), (3, 2));
        assert_eq!(events.reader(0).next().await.len(), 3);
    }
}
