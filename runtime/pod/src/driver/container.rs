//! A container of a pod, as the pod's task keeps it.

use std::{collections::VecDeque, sync::Arc};

use hull_spec::{
    error::PodError,
    info::{ContainerInfo, ContainerState},
    spec::Resources,
};

use crate::{
    command::{CreatedContainer, Delivered, Reply, container_not_found},
    lifecycle::container::{State, Wait},
    logs::pump::ContainerLog,
    record::{ContainerRecord, RecordedState},
};

/// A container of the pod.
#[derive(Debug)]
pub(crate) struct Container {
    pub record: ContainerRecord,
    pub state: State,
    pub log: Option<ContainerLog>,
    pub waiters: Vec<(Wait, Reply)>,
    pub creators: Vec<Reply<CreatedContainer>>,
    pub delivered: Delivered,
    /// Changes of its limits; the first one is being carried out.
    pub updates: VecDeque<(Resources, Reply)>,
}

impl Container {
    /// One that nobody waits for yet.
    pub(crate) fn new(record: ContainerRecord, state: State) -> Self {
        Self {
            record,
            state,
            log: None,
            waiters: Vec::new(),
            creators: Vec::new(),
            delivered: Delivered::default(),
            updates: VecDeque::new(),
        }
    }

    /// Whether callers may see it: not while its creation is unanswered.
    pub(super) fn is_visible(&self) -> bool {
        !matches!(self.state, State::Creating | State::Gone)
    }

    /// Whether it runs, or its end is not yet complete.
    pub(super) fn is_ending(&self) -> bool {
        matches!(
            self.state,
            State::Starting
                | State::EndedEarly(_)
                | State::Running
                | State::Terminating(_)
                | State::Killing(_)
                | State::Draining(..)
        )
    }

    /// Puts the state into the form that is written.
    pub(super) fn note_state(&mut self) {
        self.record.state = match &self.state {
            State::Creating => RecordedState::Creating,
            State::Created | State::Removing(None) => RecordedState::Created,
            State::Starting
            | State::EndedEarly(_)
            | State::Running
            | State::Terminating(_)
            | State::Killing(_)
            | State::Draining(..) => RecordedState::Running,
            State::Exited(exit) | State::Removing(Some(exit)) => {
                RecordedState::Exited(exit.clone())
            }
            State::Gone => return,
        };
    }

    pub(super) fn info(&self) -> ContainerInfo {
        let record = &self.record;
        let (state, exit) = match &self.state {
            State::Creating
            | State::Created
            | State::Starting
            | State::EndedEarly(_)
            | State::Removing(None) => (ContainerState::Created, None),
            // Until its log is complete, nobody is told that it ended.
            State::Running | State::Terminating(_) | State::Killing(_) | State::Draining(..) => {
                (ContainerState::Running, None)
            }
            State::Exited(exit) | State::Removing(Some(exit)) => {
                (ContainerState::Exited, Some(exit))
            }
            State::Gone => (ContainerState::Unknown, None),
        };
        ContainerInfo {
            id: record.id.clone(),
            pod: record.pod.clone(),
            spec: Arc::clone(&record.spec),
            image_id: record.image_id.clone(),
            image_ref: record.image_ref.clone(),
            state,
            created_at_ns: record.created_at_ns,
            started_at_ns: match state {
                ContainerState::Created => 0,
                _ => record.started_at_ns,
            },
            finished_at_ns: exit.map_or(0, |exit| exit.at_ns),
            exit_code: exit.map_or(0, |exit| exit.code),
            reason: exit.map_or_else(String::new, |exit| exit.reason.as_str().to_owned()),
            message: exit.map_or_else(String::new, |exit| exit.message.clone()),
            log_path: record.log_path.clone().unwrap_or_default(),
            stop_signal: record.stop_signal,
            mount_images: record
                .volumes
                .iter()
                .map(|volume| (volume.mount, volume.image_id.clone()))
                .collect(),
            user: record.user.clone(),
            resources: record
                .resources
                .clone()
                .or_else(|| record.spec.resources.clone()),
        }
    }

    /// Whether the guest has a process of it that may be limited.
    pub(super) fn has_process(&self) -> bool {
        matches!(
            self.state,
            State::Created
                | State::Starting
                | State::Running
                | State::Terminating(_)
                | State::Killing(_)
        )
    }

    /// The limits in force.
    pub(super) fn limits(&self) -> Resources {
        let limits = self.record.resources.as_ref();
        let limits = limits.or(self.record.spec.resources.as_ref());
        limits.cloned().unwrap_or_default()
    }

    /// Tells those who wait for updates that there is nothing to update any more.
    pub(super) fn refuse_updates(&mut self) {
        let id = self.record.id.clone();
        for (_, reply) in self.updates.drain(..) {
            let _ = reply.send(Err(container_not_found(&id)));
        }
    }

    pub(super) fn answer_creators(&mut self, result: &Result<(), PodError>) {
        for creator in self.creators.drain(..) {
            let created = CreatedContainer {
                id: self.record.id.clone(),
                delivered: self.delivered.clone(),
            };
            let _ = creator.send(result.clone().map(|()| created));
        }
    }
}
