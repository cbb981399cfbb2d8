//! Containers of a checkpoint, as they will be here: what the guest has, under ids of their own.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use hull_base::blocking;
use hull_spec::{
    error::PodError,
    id::ContainerId,
    spec::{ContainerMetadata, ContainerSecurity, ContainerSpec, MountSource, MountSpec},
};
use hull_vm::agent::client::Agent;

use crate::{
    checkpoint::manifest::{EndedContainer, Manifest, SavedContainer},
    record::LocalRecord,
    sandbox::restore::{ACTION, Checkpoint},
    storage::empty_dir::{self, InUse, LocalVolume, Medium, directory},
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
    /// emptyDirs that the guest keeps, by where they are for this pod.
    pub locals: Vec<LocalRecord>,
}

impl Restore {
    /// Plans the containers of a checkpoint; `asked` has some of them, by name, or none. They are for the pod that
    /// kubelet calls `pod_uid`.
    ///
    /// # Errors
    /// When what is asked for is not what the guest has.
    pub(crate) async fn plan(
        mut checkpoint: Checkpoint,
        asked: &[ContainerSpec],
        pod_uid: &str,
    ) -> Result<Self, PodError> {
        let mut containers = planned(&checkpoint.manifest, asked)?;
        checkpoint.move_shares(&moved(&containers)?);
        for planned in &mut containers {
            for saved in &planned.saved.locals {
                let (local, volume) = local(&planned.spec, saved, pod_uid).await?;
                planned.locals.push(local);
                if let Some(slot) = saved.slot {
                    checkpoint.volumes.insert(slot, volume);
                }
            }
        }
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
            locals: Vec::new(),
        });
    }
    Ok(planned)
}

/// Where an emptyDir is for this pod, which has nothing in it yet.
async fn local(
    spec: &ContainerSpec,
    saved: &LocalRecord,
    pod_uid: &str,
) -> Result<(LocalRecord, LocalVolume), PodError> {
    let refused = |reason: &str| {
        let volume = saved.directory.display();
        PodError::precondition(ACTION, format!("the emptyDir that was {volume} {reason}"))
    };
    let mount = spec.mounts.get(saved.mount);
    let place = mount.and_then(|mount| Some((mount.clone(), directory(pod_uid, mount)?)));
    let Some((mount, directory)) = place else {
        return Err(refused("needs one of this pod"));
    };
    if directory.file_name() != saved.directory.file_name() {
        return Err(refused("has another name in this pod"));
    }
    if directory == saved.directory && saved.slot.is_some() {
        return Err(refused("is the source's"));
    }
    let at = directory.clone();
    let found = blocking(move || empty_dir::find(&mount, &at, InUse::No)).await;
    let found = found.filter(|found| (found.medium == Medium::Disk) == saved.slot.is_some());
    let Some(volume) = found else {
        let here = directory.display();
        return Err(refused(&format!(
            "can't be in {here}, which is of another kind or in use"
        )));
    };
    let local = LocalRecord {
        directory,
        ..saved.clone()
    };
    Ok((local, volume))
}

/// Where paths of the host are for this pod, by where they were. What two containers had as one stays one.
fn moved(containers: &[Planned]) -> Result<HashMap<PathBuf, PathBuf>, PodError> {
    let mut moved: HashMap<PathBuf, PathBuf> = HashMap::new();
    for Planned { spec, saved, .. } in containers {
        for (new, old) in spec.mounts.iter().zip(&saved.spec.mounts) {
            let (MountSource::Host(new), MountSource::Host(old)) = (&new.source, &old.source)
            else {
                continue;
            };
            let before = moved.insert(old.clone(), new.clone());
            if let Some(other) = before.filter(|before| before != new) {
                let [old, new, other] = [old, new, &other].map(|path| path.display());
                let reason =
                    format!("containers share {old}, which can't be both {other} and {new}");
                return Err(PodError::precondition(ACTION, reason));
            }
        }
    }
    Ok(moved)
}

/// The mounts of a container that runs: what it has, from where it is asked for. Those that are not asked for are
/// from where they were; none: it would be another mount.
fn mounts(saved: &[MountSpec], asked: &[MountSpec]) -> Option<Vec<MountSpec>> {
    let is_known = |asked: &MountSpec| {
        let mut saved = saved.iter();
        saved.any(|saved| saved.container_path == asked.container_path)
    };
    let mount = |saved: &MountSpec| {
        let mut asked = asked.iter();
        let Some(asked) = asked.find(|asked| asked.container_path == saved.container_path) else {
            return Some(saved.clone());
        };
        let source = match (&saved.source, &asked.source) {
            // What stands for a directory of devices is the guest's.
            (MountSource::Host(_), MountSource::Host(_))
                if saved.of_devices() == asked.of_devices() =>
            {
                asked.source.clone()
            }
            (MountSource::Image { .. }, MountSource::Image { .. }) => saved.source.clone(),
            _ => return None,
        };
        let mount = MountSpec {
            source,
            ..saved.clone()
        };
        let wanted = MountSpec {
            source: mount.source.clone(),
            selinux_relabel: saved.selinux_relabel,
            ..asked.clone()
        };
        (mount == wanted).then_some(mount)
    };
    let is_all_known = asked.iter().all(is_known);
    saved
        .iter()
        .map(mount)
        .collect::<Option<_>>()
        .filter(|_| is_all_known)
}

/// What was saved, under another name, with another log and other paths of the host: all that can be other.
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
    let mounts = mounts(&saved.mounts, &asked.mounts);
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
    } else if mounts.is_none() {
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
        mounts: mounts.unwrap_or_default(),
        ..saved.clone()
    })
}
