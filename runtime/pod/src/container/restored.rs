//! Containers of a checkpoint, as they will be here: what the guest has, under ids of their own.

use std::sync::Arc;

use hull_spec::{
    error::PodError,
    id::ContainerId,
    spec::{ContainerMetadata, ContainerSecurity, ContainerSpec},
};
use hull_vm::agent::client::Agent;

use crate::{
    checkpoint::manifest::{EndedContainer, Manifest, SavedContainer},
    sandbox::restore::{ACTION, Checkpoint},
};

/// What a sandbox goes on from.
#[derive(Debug, Clone)]
pub(crate) struct Restore {
    pub checkpoint: Arc<Checkpoint>,
    pub containers: Vec<Planned>,
    /// What is left of others, by names that they get here.
    pub ended: Vec<(ContainerId, EndedContainer)>,
}

/// A container that will be there.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    pub id: ContainerId,
    pub spec: Arc<ContainerSpec>,
    pub saved: SavedContainer,
}

impl Restore {
    /// Plans the containers of a checkpoint; `asked` has some of them, by name, or none.
    ///
    /// # Errors
    /// When what is asked for is not what the guest has.
    pub(crate) fn plan(checkpoint: Checkpoint, asked: &[ContainerSpec]) -> Result<Self, PodError> {
        let containers = planned(&checkpoint.manifest, asked)?;
        let ended = checkpoint.manifest.ended.iter();
        let ended = ended.map(|ended| (ContainerId::random(), ended.clone()));
        Ok(Self {
            ended: ended.collect(),
            containers,
            checkpoint: Arc::new(checkpoint),
        })
    }

    /// Tells who speaks with the agent what the guest calls them.
    pub(crate) fn name(&self, agent: &Agent) {
        for planned in &self.containers {
            agent.note_name(planned.id.as_str(), planned.saved.guest_id.as_str());
        }
        for (id, ended) in &self.ended {
            agent.note_name(id.as_str(), ended.guest_id.as_str());
        }
    }
}

fn planned(manifest: &Manifest, asked: &[ContainerSpec]) -> Result<Vec<Planned>, PodError> {
    let name = |spec: &ContainerSpec| spec.metadata.name.clone();
    for spec in asked {
        let mut saved = manifest.containers.iter();
        if !saved.any(|saved| name(&saved.spec) == name(spec)) {
            let known: Vec<String> = manifest.containers.iter().map(|c| name(&c.spec)).collect();
            let reason = format!(
                "the checkpoint has no container {:?}; it has {known:?}",
                name(spec)
            );
            return Err(PodError::precondition(ACTION, reason));
        }
    }
    let mut planned = Vec::new();
    for saved in &manifest.containers {
        let mut asked = asked.iter();
        let spec = match asked.find(|asked| name(asked) == name(&saved.spec)) {
            Some(asked) => like(saved, asked)?,
            None => saved.spec.clone(),
        };
        planned.push(Planned {
            id: ContainerId::random(),
            spec: Arc::new(spec),
            saved: saved.clone(),
        });
    }
    Ok(planned)
}

/// What was saved, under another name and with another log: all that can be other.
fn like(container: &SavedContainer, asked: &ContainerSpec) -> Result<ContainerSpec, PodError> {
    let saved = &container.spec;
    let image = asked.image.image.as_str();
    let names = [
        "",
        saved.image.image.as_str(),
        container.image_ref.as_str(),
        container.image_id.as_str(),
    ];
    // What is not said is as it was.
    let is_other = |asked: &[String], saved: &[String]| !asked.is_empty() && asked != saved;
    let is_guarded_otherwise =
        asked.security != saved.security && asked.security != ContainerSecurity::default();
    let what = if !names.contains(&image) {
        "image"
    } else if is_other(&asked.command, &saved.command) || is_other(&asked.args, &saved.args) {
        "command"
    } else if !asked.working_dir.is_empty() && asked.working_dir != saved.working_dir {
        "working directory"
    } else if !asked.env.is_empty() && asked.env != saved.env {
        "environment"
    } else if is_guarded_otherwise {
        "security context"
    } else if asked.tty != saved.tty {
        "terminal"
    } else if asked.stdin != saved.stdin {
        "input"
    } else if asked.mounts.len() > saved.mounts.len() {
        "mount"
    } else if asked.devices.len() > saved.devices.len() {
        "device"
    } else {
        ""
    };
    if !what.is_empty() {
        let name = &saved.metadata.name;
        let reason = format!("container {name:?} runs, and can't get another {what}");
        return Err(PodError::precondition(ACTION, reason));
    }
    Ok(ContainerSpec {
        metadata: ContainerMetadata {
            attempt: asked.metadata.attempt,
            ..saved.metadata.clone()
        },
        labels: asked.labels.clone(),
        annotations: asked.annotations.clone(),
        log_path: asked.log_path.clone(),
        ..saved.clone()
    })
}
