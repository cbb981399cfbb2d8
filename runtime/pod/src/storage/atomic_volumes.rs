//! Config maps, secrets, projected and downward-API volumes, which kubelet replaces as a whole. The
//! guest has copies, so that programs in it can watch for changes (inotify). Here are those of the
//! host watched, and the agent is told to read them again:
//!
//! ```text
//! kubelet ──rename──▶ ..data ──inotify──▶ Watches ──▶ AtomicVolumes ──RefreshVolumes──▶ agent
//! ```
//!
//! Nothing of it is recorded: what is to be watched follows from a container's mounts, and the agent
//! compares the copies with the host when it is asked to.

use std::{
    collections::HashMap,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use tokio::{
    sync::Notify,
    task::AbortHandle,
    time::{sleep, timeout},
};

use hull_base::beneath;
use hull_spec::{
    id::{ContainerId, PodId},
    spec::{ContainerSpec, MountSource},
};
use hull_vm::agent::client::Agent;

/// How long is waited for the rest of a change: it has several steps.
const SETTLE: Duration = Duration::from_millis(100);
/// The pauses before what failed is tried again, unless there is another change.
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(1))
    .with_max_delay(Duration::from_secs(600))
    .without_max_times();

fn paths(spec: &ContainerSpec) -> impl Iterator<Item = &Path> {
    let live = spec.mounts.iter().filter(|mount| mount.is_atomic_volume());
    live.filter_map(|mount| match &mount.source {
        MountSource::Host(path) => Some(path.as_path()),
        MountSource::Image { .. } => None,
    })
}

/// The directories that are watched, by one inotify instance: a user can't have many. None: not even
/// one.
#[derive(Debug)]
pub(crate) struct Watches(Option<Arc<Table>>);

#[derive(Debug)]
struct Table {
    inotify: Inotify,
    /// What is removed to end the thread that reads.
    end: WatchDescriptor,
    watched: Mutex<HashMap<WatchDescriptor, Vec<Arc<Notify>>>>,
}

impl Watches {
    /// Begins without any.
    pub(crate) fn start() -> Self {
        match Table::start() {
            Ok(table) => Self(Some(table)),
            Err(error) => {
                tracing::warn!(%error, "watch volumes: programs in guests will not be notified");
                Self(None)
            }
        }
    }

    /// Watches the live volumes of a container, as far as they can be watched.
    pub(crate) fn watch(&self, spec: &ContainerSpec, changed: &Arc<Notify>) -> Watched {
        let Some(table) = &self.0 else {
            return Watched::new();
        };
        let watches = paths(spec).filter_map(|path| {
            match Watch::start(table, path, changed) {
                Ok(watch) => Some((path.to_owned(), watch)),
                // What is not there is refused later on.
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "watch a volume");
                    None
                }
            }
        });
        watches.collect()
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        if let Some(table) = &self.0 {
            // Its event is the last one that is read.
            let _ = table.inotify.rm_watch(table.end);
        }
    }
}

impl Table {
    fn start() -> io::Result<Arc<Self>> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
        let end = inotify.add_watch("/", AddWatchFlags::IN_DELETE_SELF)?;
        let table = Arc::new(Self {
            inotify,
            end,
            watched: Mutex::default(),
        });
        let reader = Arc::clone(&table);
        thread::Builder::new()
            .name("watches".into())
            .spawn(move || reader.read())?;
        Ok(table)
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Vec<Arc<Notify>>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) {
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "watch volumes");
                    return;
                }
            };
            let watched = self.watched();
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    watched.values().flatten().for_each(|n| n.notify_one());
                } else if event.wd == self.end {
                    return;
                } else {
                    let those = watched.get(&event.wd);
                    those.into_iter().flatten().for_each(|n| n.notify_one());
                }
            }
        }
    }
}

/// A directory that is watched until this is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    table: Arc<Table>,
    descriptor: WatchDescriptor,
    changed: Arc<Notify>,
}

impl Watch {
    fn start(table: &Arc<Table>, path: &Path, changed: &Arc<Notify>) -> io::Result<Self> {
        let flags = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ATTRIB;
        // A file system that hangs must not hold up others.
        let (parent, name) = beneath::split(path)?;
        let place = parent.enter(name)?;
        // The kernel has one descriptor for a directory: it must not go before this is noted.
        let mut watched = table.watched();
        let descriptor = table
            .inotify
            .add_watch(&beneath::path_of(place.as_fd()), flags)?;
        let changed = Arc::clone(changed);
        let those = watched.entry(descriptor).or_default();
        those.push(Arc::clone(&changed));
        Ok(Self {
            table: Arc::clone(table),
            descriptor,
            changed,
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.table.watched();
        let Some(those) = watched.get_mut(&self.descriptor) else {
            return;
        };
        if let Some(own) = those.iter().position(|n| Arc::ptr_eq(n, &self.changed)) {
            those.swap_remove(own);
        }
        if those.is_empty() {
            watched.remove(&self.descriptor);
            // It may be gone with the directory.
            let _ = self.table.inotify.rm_watch(self.descriptor);
        }
    }
}

/// What is watched for one container, by path.
pub(crate) type Watched = HashMap<PathBuf, Watch>;

/// The volumes of one pod, whose copies in the guest follow them until this is dropped.
#[derive(Debug)]
pub(crate) struct AtomicVolumes {
    changed: Arc<Notify>,
    watched: HashMap<ContainerId, Watched>,
    follower: AbortHandle,
}

impl AtomicVolumes {
    /// Starts to follow. `tell` hears what is wrong, and with an empty text that it is right again.
    pub(crate) fn start(
        pod: PodId,
        agent: Agent,
        tell: impl Fn(String) + Send + Sync + 'static,
    ) -> Self {
        let changed = Arc::new(Notify::new());
        let follow = Box::pin(follow(pod, agent.clone(), Arc::clone(&changed), tell));
        let following = async move {
            // A panic has told the pod's task.
            let _ = agent.guard(follow).await;
        };
        Self {
            changed,
            watched: HashMap::new(),
            follower: tokio::spawn(following).abort_handle(),
        }
    }

    /// What tells of a change.
    pub(crate) fn changed(&self) -> &Arc<Notify> {
        &self.changed
    }

    /// Keeps what is watched for a container.
    pub(crate) fn keep(&mut self, container: ContainerId, watched: Watched) {
        self.watched.insert(container, watched);
    }

    /// Ends what is watched for a container.
    pub(crate) fn forget(&mut self, container: &ContainerId) {
        self.watched.remove(container);
    }
}

impl Drop for AtomicVolumes {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

async fn follow(pod: PodId, agent: Agent, changed: Arc<Notify>, tell: impl Fn(String)) {
    loop {
        changed.notified().await;
        for pause in PAUSES.build() {
            sleep(SETTLE).await;
            match agent.refresh_volumes().await {
                // The agent of an adopted VM may be older, and have no copies.
                Err(error) if error.is_not_found() => break,
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(%pod, %error, "a volume's copy is behind");
                    tell(error.to_string());
                }
            }
            let _ = timeout(pause, changed.notified()).await;
        }
        tell(String::new());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use hull_spec::spec::{MountPropagation, MountSpec};

    use super::*;

    fn mount(path: &str) -> MountSpec {
        MountSpec {
            container_path: "/x".into(),
            source: MountSource::Host(path.into()),
            readonly: true,
            recursive_readonly: false,
            propagation: MountPropagation::Private,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        }
    }

    #[tokio::test]
    async fn a_directory_is_watched_as_long_as_somebody_wants_it() {
        const PATIENCE: Duration = Duration::from_secs(30);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes/kubernetes.io~secret/v");
        fs::create_dir_all(&path).unwrap();
        let spec = ContainerSpec {
            mounts: vec![mount(path.to_str().unwrap()), mount("/absent")],
            ..ContainerSpec::default()
        };
        let watches = Watches::start();
        let [one, other] = [(); 2].map(|()| Arc::new(Notify::new()));
        let (of_one, again) = (watches.watch(&spec, &one), watches.watch(&spec, &one));
        let of_other = watches.watch(&spec, &other);
        fs::write(path.join("a"), "").unwrap();
        for changed in [&one, &other] {
            timeout(PATIENCE, changed.notified()).await.unwrap();
        }
        drop((of_one, of_other));
        fs::write(path.join("b"), "").unwrap();
        timeout(PATIENCE, one.notified()).await.unwrap();
        let table = Arc::downgrade(watches.0.as_ref().unwrap());
        drop(again);
        assert!(table.upgrade().unwrap().watched().is_empty());
        drop(watches);
        while table.strong_count() > 0 {
            sleep(Duration::from_millis(1)).await;
        }
    }
}
