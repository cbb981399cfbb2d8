//! Which pods there are, by id and by name.
//!
//! A name is reserved by an entry and released with it. A request with a name that is taken joins
//! the operation that took it when it asks for the same and its result was not delivered to
//! anybody (a client that timed out and tries again); otherwise it is refused. What a failed start left that could
//! not be undone is removed first.

use std::{
    borrow::Borrow,
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{mpsc, watch};

use hull_base::stages::Call;
use hull_spec::{
    error::{ObjectKind, PodError},
    id::{ContainerId, PodId},
    info::{ContainerInfo, SandboxInfo},
    spec::{SandboxMetadata, SandboxSpec},
};
use hull_vm::{agent::client::Agent, client::VmClient};

use crate::{
    command::{Command, Delivered},
    session::permits::Permits,
};

/// What is known about a pod without asking its task.
#[derive(Debug, Clone)]
pub(crate) struct PodView {
    pub phase: Phase,
    pub sandbox: SandboxInfo,
    pub containers: BTreeMap<ContainerId, ContainerInfo>,
    /// The connection to the VMM, while it runs.
    pub vm: Option<VmClient>,
    /// The agent, while the VM runs.
    pub agent: Option<Agent>,
}

/// Whether a pod is there for callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It is being started.
    Starting,
    /// It is.
    Up,
    /// Nothing is left of it.
    Gone,
}

/// A pod: how to reach its task.
#[derive(Debug, Clone)]
pub(crate) struct PodEntry {
    pub id: PodId,
    pub spec: Arc<SandboxSpec>,
    pub commands: mpsc::Sender<(Command, Call)>,
    /// Outlives the task, for those who wait: another one may take its place.
    pub view: watch::Sender<Arc<PodView>>,
    /// What its start came to; none while it goes on. Outlives the task too.
    pub started: watch::Sender<Option<Result<(), PodError>>>,
    pub delivered: Delivered,
    pub permits: Permits,
}

impl PodEntry {
    /// Whether its start has failed.
    pub(crate) fn has_failed(&self) -> bool {
        matches!(*self.started.borrow(), Some(Err(_)))
    }
}

/// The pods of the node.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Entries>);

/// Both are changed in one step, so that `pod_of` is always what the views of `pods` say.
#[derive(Debug, Default)]
struct Entries {
    pods: BTreeMap<PodId, PodEntry>,
    /// The pod of each container that a view has.
    pod_of: BTreeMap<ContainerId, PodId>,
}

impl Entries {
    fn insert(&mut self, entry: PodEntry) {
        let view = Arc::clone(&entry.view.borrow());
        self.pods.insert(entry.id.clone(), entry);
        self.index(&BTreeMap::new(), &view);
    }

    /// Notes which containers a pod has instead of those that it had.
    fn index(&mut self, had: &BTreeMap<ContainerId, ContainerInfo>, view: &PodView) {
        let pod = &view.sandbox.id;
        for id in had.keys().filter(|id| !view.containers.contains_key(*id)) {
            self.pod_of.remove(id);
        }
        for id in view.containers.keys().filter(|id| !had.contains_key(*id)) {
            self.pod_of.insert(id.clone(), pod.clone());
        }
    }
}

impl Registry {
    /// Reserves the entry's name, or returns the entry that has it and asks for the same.
    ///
    /// # Errors
    /// [`PodError::AlreadyExists`].
    pub(crate) fn reserve(&self, entry: PodEntry) -> Result<Option<PodEntry>, PodError> {
        let mut entries = self.lock();
        let holder = entries
            .pods
            .values()
            .find(|other| other.spec.metadata == entry.spec.metadata);
        match holder {
            None => {
                entries.insert(entry);
                Ok(None)
            }
            Some(holder) if !holder.delivered.is_set() && holder.spec == entry.spec => {
                Ok(Some(holder.clone()))
            }
            Some(holder) => Err(PodError::AlreadyExists {
                name: name(&entry.spec.metadata),
                id: holder.id.to_string(),
            }),
        }
    }

    /// The entry of a pod whose task is gone.
    pub(crate) fn find(&self, id: &PodId) -> Option<PodEntry> {
        self.lock().pods.get(id).cloned()
    }

    /// Puts an entry in the place of the one of the same pod, whose view it has.
    pub(crate) fn replace(&self, entry: PodEntry) {
        self.lock().insert(entry);
    }

    /// Makes what is known of a pod visible, whether or not the pod has an entry.
    pub(crate) fn publish(&self, to: &watch::Sender<Arc<PodView>>, view: PodView) {
        let view = Arc::new(view);
        let mut entries = self.lock();
        let had = to.send_replace(Arc::clone(&view));
        if entries.pods.contains_key(&view.sandbox.id) {
            entries.index(&had.containers, &view);
        }
    }

    /// Gives the name of a pod back.
    pub(crate) fn release(&self, id: &PodId) {
        let mut entries = self.lock();
        if let Some(entry) = entries.pods.remove(id) {
            for container in entry.view.borrow().containers.keys() {
                entries.pod_of.remove(container);
            }
        }
    }

    /// What is known of the pods whose ids begin with `prefix`, by id; empty: of all.
    pub(crate) fn views(&self, prefix: &str) -> Vec<Arc<PodView>> {
        let entries = self.lock();
        let views = from(&entries.pods, prefix).map(|(_, entry)| entry.view.borrow());
        views.map(|view| Arc::clone(&view)).collect()
    }

    /// The sandbox whose id begins with `prefix`.
    pub(crate) fn sandbox(&self, prefix: &str) -> Result<PodEntry, PodError> {
        let entries = self.lock();
        let named = from(&entries.pods, prefix);
        let visible = named.filter(|(_, entry)| matches!(entry.view.borrow().phase, Phase::Up));
        Ok(only(ObjectKind::Sandbox, prefix, visible)?.1.clone())
    }

    /// The container whose id begins with `prefix`, and its pod.
    pub(crate) fn container(&self, prefix: &str) -> Result<(ContainerId, PodEntry), PodError> {
        let entries = self.lock();
        let named = from(&entries.pod_of, prefix);
        let with_pod = named.filter_map(|(id, pod)| Some((id, entries.pods.get(pod)?)));
        let (id, entry) = only(ObjectKind::Container, prefix, with_pod)?;
        Ok((id.clone(), entry.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a sandbox, as it is reserved.
pub(crate) fn name(metadata: &SandboxMetadata) -> String {
    let SandboxMetadata {
        name,
        uid,
        namespace,
        attempt,
    } = metadata;
    format!("{name}_{namespace}_{uid}_{attempt}")
}

/// What has ids that begin with `prefix`. All ids are of one length, so one that is whole stands
/// alone.
fn from<'a, K: Ord + Borrow<str>, V>(
    map: &'a BTreeMap<K, V>,
    prefix: &'a str,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    map.range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
        .take_while(move |(id, _)| (*id).borrow().starts_with(prefix))
}

/// The one that there is.
fn only<T>(
    object: ObjectKind,
    prefix: &str,
    mut named: impl Iterator<Item = T>,
) -> Result<T, PodError> {
    let id = prefix.to_owned();
    let found = named.next().filter(|_| !prefix.is_empty());
    let Some(found) = found else {
        return Err(PodError::NotFound { object, id });
    };
    match named.next() {
        None => Ok(found),
        Some(_) => Err(PodError::Ambiguous { object, id }),
    }
}

#[cfg(test)]
mod tests;
