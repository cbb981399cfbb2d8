//! Containers of a checkpoint, as they will be here: what the guest has, under ids of their own.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use hull_base::blocking;
use hull_proto_vmm::fs::Share;
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
    storage::{
        empty_dir::{self, InUse, LocalVolume, Medium, directory},
        host_files::shares,
    },
};

/// What a restored pod is asked to have.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// Some of its containers, by name.
    pub containers: Vec<ContainerSpec>,
    /// Paths of the host by where containers have them, for those whose mounts do not say.
    pub paths: BTreeMap<PathBuf, PathBuf>,
}

impl From<Vec<ContainerSpec>> for Asked {
    fn from(containers: Vec<ContainerSpec>) -> Self {
        Self {
            containers,
            paths: BTreeMap::new(),
        }
    }
}

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
    /// Plans the containers of a checkpoint, for the pod that kubelet calls `pod_uid`.
    ///
    /// # Errors
    /// When what is asked for is not what the guest has.
    pub(crate) async fn plan(
        mut checkpoint: Checkpoint,
        asked: &Asked,
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

fn planned(manifest: &Manifest, asked: &Asked) -> Result<Vec<Planned>, PodError> {
    let name = |spec: &ContainerSpec| spec.metadata.name.clone();
    for spec in &asked.containers {
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
        let mut all = asked.containers.iter();
        let own = all.find(|asked| name(asked) == name(&saved.spec));
        let spec = own.map_or_else(|| Ok(saved.spec.clone()), |asked| like(saved, asked))?;
        let mounts = own.map_or(&[][..], |asked| &asked.mounts);
        let spec = ContainerSpec {
            mounts: mounts_of(&saved.spec, mounts, &asked.paths)?,
            ..spec
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

/// The shares of this pod, by what they were. What two containers had as one stays one, and each is what the mounts say
/// that were asked for.
fn moved(containers: &[Planned]) -> Result<Vec<(Share, Share)>, PodError> {
    let mut moved: Vec<(Share, Share)> = Vec::new();
    for Planned { spec, saved, .. } in containers {
        let is_local = |index| saved.locals.iter().any(|local| local.mount == index);
        let (new, old) = (shares(spec, is_local), shares(&saved.spec, is_local));
        for ((_, new), (_, old)) in new.zip(old) {
            let mut before = moved.iter();
            match before.find(|(before, _)| *before == old) {
                Some((_, other)) if *other != new => {
                    let [old, new, other] = [&old, &new, other].map(|share| share.path.display());
                    let reason =
                        format!("containers share {old}, which can't be both {other} and {new}");
                    return Err(PodError::precondition(ACTION, reason));
                }
                Some(_) => {}
                None => moved.push((old, new)),
            }
        }
    }
    Ok(moved)
}

/// The mounts of a container that runs: what it has, from where they are asked for, or from `paths`. It gets no path of
/// the host that it is not given: whoever wrote the checkpoint may have written any.
fn mounts_of(
    saved: &ContainerSpec,
    asked: &[MountSpec],
    paths: &BTreeMap<PathBuf, PathBuf>,
) -> Result<Vec<MountSpec>, PodError> {
    let at = |path: &Path, mounts: &[MountSpec]| {
        let mut mounts = mounts.iter();
        mounts.find(|mount| mount.container_path == path).cloned()
    };
    if !asked
        .iter()
        .all(|asked| at(&asked.container_path, &saved.mounts).is_some())
    {
        return Err(other(saved, "mount"));
    }
    let mounts = saved.mounts.iter().map(|mount| {
        let inside = &mount.container_path;
        // Devices are the guest's own.
        let needs_path =
            matches!(mount.source, MountSource::Host(_)) && mount.of_devices().is_none();
        let given = match (at(inside, asked), paths.get(inside)) {
            (Some(asked), _) => asked,
            (None, Some(path)) if needs_path => MountSpec {
                source: MountSource::Host(path.clone()),
                ..mount.clone()
            },
            (None, _) if needs_path => {
                let (name, inside) = (&saved.metadata.name, inside.display());
                let reason = format!(
                    "container {name:?} has a path of the host at {inside}: say which it gets"
                );
                return Err(PodError::precondition(ACTION, reason));
            }
            (None, _) => mount.clone(),
        };
        let source = match (&mount.source, &given.source) {
            (MountSource::Host(_), MountSource::Host(_))
                if mount.of_devices() == given.of_devices() =>
            {
                given.source.clone()
            }
            (MountSource::Image { .. }, MountSource::Image { .. }) => mount.source.clone(),
            _ => return Err(other(saved, "mount")),
        };
        let wanted = MountSpec {
            source: mount.source.clone(),
            selinux_relabel: mount.selinux_relabel,
            ..given
        };
        if wanted != *mount {
            return Err(other(saved, "mount"));
        }
        Ok(MountSpec {
            source,
            ..mount.clone()
        })
    });
    mounts.collect()
}

fn other(container: &ContainerSpec, what: &str) -> PodError {
    let name = &container.metadata.name;
    let reason = format!("container {name:?} runs, and can't get another {what}");
    PodError::precondition(ACTION, reason)
}

/// What was saved, under another name and with another log: all that can be other, but for its mounts.
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
    } else if asked.devices.len() > saved.devices.len() {
        "device"
    } else {
        ""
    };
    if !what.is_empty() {
        return Err(other(saved, what));
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
