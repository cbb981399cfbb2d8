//! Which pods there are, by id and by name.
//!
//! A name is reserved by an entry and released with it. A request with a name that is taken joins
//! the operation that took it when it asks for the same and its result was not delivered to
//! anybody (a client that timed out and tries again); otherwise it is refused.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{mpsc, watch};

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
    pub commands: mpsc::Sender<Command>,
    /// Outlives the task, for those who wait: another one may take its place.
    pub view: watch::Sender<Arc<PodView>>,
    /// What its start came to; none while it goes on. Outlives the task too.
    pub started: watch::Sender<Option<Result<(), PodError>>>,
    pub delivered: Delivered,
    pub permits: Permits,
}

/// The pods of the node.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<BTreeMap<PodId, PodEntry>>);

impl Registry {
    /// Reserves the entry's name, or returns the entry that has it and asks for the same.
    ///
    /// # Errors
    /// [`PodError::AlreadyExists`].
    pub(crate) fn reserve(&self, entry: PodEntry) -> Result<Option<PodEntry>, PodError> {
        let mut pods = self.lock();
        let holder = pods
            .values()
            .find(|other| other.spec.metadata == entry.spec.metadata);
        match holder {
            None => {
                pods.insert(entry.id.clone(), entry);
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
        self.lock().get(id).cloned()
    }

    /// Puts an entry in the place of the one of the same pod.
    pub(crate) fn replace(&self, entry: PodEntry) {
        self.lock().insert(entry.id.clone(), entry);
    }

    /// Gives the name of a pod back.
    pub(crate) fn release(&self, id: &PodId) {
        self.lock().remove(id);
    }

    /// All pods, by id.
    pub(crate) fn all(&self) -> Vec<PodEntry> {
        self.lock().values().cloned().collect()
    }

    /// The sandbox whose id begins with `prefix`.
    pub(crate) fn sandbox(&self, prefix: &str) -> Result<PodEntry, PodError> {
        let visible = self
            .all()
            .into_iter()
            .filter(|entry| matches!(entry.view.borrow().phase, Phase::Up));
        let named = visible.map(|entry| (entry.id.to_string(), entry));
        Ok(only(ObjectKind::Sandbox, prefix, named)?.1)
    }

    /// The container whose id begins with `prefix`, and its pod.
    pub(crate) fn container(&self, prefix: &str) -> Result<(ContainerId, PodEntry), PodError> {
        let mut named = Vec::new();
        for entry in self.all() {
            let view = Arc::clone(&entry.view.borrow());
            for id in view.containers.keys() {
                named.push((id.to_string(), (id.clone(), entry.clone())));
            }
        }
        Ok(only(ObjectKind::Container, prefix, named)?.1)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodId, PodEntry>> {
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

fn only<T>(
    object: ObjectKind,
    prefix: &str,
    named: impl IntoIterator<Item = (String, T)>,
) -> Result<(String, T), PodError> {
    let not_found = || PodError::NotFound {
        object,
        id: prefix.to_owned(),
    };
    if prefix.is_empty() {
        return Err(not_found());
    }
    let mut found = None;
    for (id, value) in named {
        if id == prefix {
            return Ok((id, value));
        }
        if id.starts_with(prefix) {
            if found.is_some() {
                return Err(PodError::Ambiguous {
                    object,
                    id: prefix.to_owned(),
                });
            }
            found = Some((id, value));
        }
    }
    found.ok_or_else(not_found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_may_be_shortened_while_it_is_unique() {
        let named = || [("abc1".to_owned(), 1), ("abd2".to_owned(), 2)];
        let of = |prefix| only(ObjectKind::Container, prefix, named()).map(|(_, n)| n);
        assert_eq!(of("abc").unwrap(), 1);
        assert_eq!(of("abd2").unwrap(), 2);
        assert!(matches!(of("ab"), Err(PodError::Ambiguous { .. })));
        assert!(matches!(of("x"), Err(PodError::NotFound { .. })));
        assert!(matches!(of(""), Err(PodError::NotFound { .. })));
    }
}
