//! The creation of a container: refused at once when it is wrong, else recorded and made beside the task.

use std::{collections::HashSet, path::PathBuf, sync::Arc};

use hull_base::{blocking, clock};
use hull_spec::{
    error::PodError,
    field::Field,
    id::ContainerId,
    oci::{Inputs, build, declared_volumes},
    signal::{self, Signal},
    spec::{ContainerSpec, NamespaceMode, Seccomp},
    validate,
};
use hull_vm::rundir::RunDir;

use super::{container::Container, operations::Done, state::Driver};
use crate::{
    command::{CreatedContainer, Reply},
    container::{
        apparmor::confinement,
        create::{Created, Creation, Sources},
        find::{find_devices, find_image, find_volumes, read_profile},
        request::{asked_mounts, create_request, storage_mounts},
    },
    lifecycle::{
        container::{Event, State},
        sandbox,
    },
    logs::{
        file::{LogPath, log_path},
        pump::LogTarget,
    },
    record::{ContainerRecord, RecordedState, VolumeRecord},
    storage::{
        empty_dir::{self, InUse, LocalVolume},
        host_files,
    },
};

impl Driver {
    /// Begins to create a container, or joins a creation of the same one.
    pub(super) async fn create_container(
        &mut self,
        id: ContainerId,
        spec: Arc<ContainerSpec>,
        reply: Reply<CreatedContainer>,
    ) {
        let holder = self
            .containers
            .values_mut()
            .find(|c| c.record.spec.metadata == spec.metadata);
        if let Some(holder) = holder {
            if holder.record.spec == spec && !holder.delivered.is_set() {
                holder.creators.push(reply);
                if holder.is_visible() {
                    holder.answer_creators(&Ok(()));
                }
            } else {
                let _ = reply.send(Err(PodError::AlreadyExists {
                    name: format!("{}_{}", spec.metadata.name, spec.metadata.attempt),
                    id: holder.record.id.to_string(),
                }));
            }
            return;
        }
        match self.plan(id, spec).await {
            Ok((plan, mut container)) => {
                container.creators.push(reply);
                let id = plan.id.clone();
                self.containers.insert(id.clone(), container);
                // Before the guest knows of it: a daemon that is killed finds what to undo.
                if let Err(error) = self.save_container(&id).await {
                    self.container_event(&id, Event::CreateFailed(error)).await;
                    return;
                }
                self.operations.spawn(async move {
                    let id = plan.id.clone();
                    Done::Created(id, plan.carry_out().await)
                });
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    pub(super) async fn created(
        &mut self,
        id: ContainerId,
        result: Result<Box<Created>, PodError>,
    ) {
        let event = match (result, self.containers.get_mut(&id)) {
            (Ok(created), Some(container)) => {
                let Created {
                    user,
                    attached,
                    watched,
                    log,
                } = *created;
                let record = &mut container.record;
                record.user = Some(user);
                record.image_slot = Some(attached.image_slot);
                record.volumes = attached.volumes;
                record.locals = attached.locals;
                record.devices = attached.devices;
                container.log = Some(log);
                if let Some(running) = &mut self.running {
                    running.volumes.keep(id.clone(), watched);
                }
                if container.record.has_shares() {
                    self.watch_files();
                }
                Event::CreateDone
            }
            (Err(error), _) => Event::CreateFailed(error),
            (Ok(_), None) => return,
        };
        self.container_event(&id, event).await;
        self.end_what_came_late().await;
    }

    /// Checks what was asked for; nothing is made.
    async fn plan(
        &self,
        id: ContainerId,
        spec: Arc<ContainerSpec>,
    ) -> Result<(Creation, Container), PodError> {
        const ACTION: &str = "create the container";
        let running = match (&self.running, self.record.state) {
            (Some(running), sandbox::State::Ready) => running,
            _ => return Err(self.not_ready(ACTION)),
        };
        validate::container(&spec, &self.record.spec)?;
        self.check_target(&spec.security.namespaces.pid)?;
        let image = find_image(&self.node, &spec.image.image).await?;
        let stop_signal = match spec.stop_signal {
            Some(signal) => signal,
            None => {
                let text = &image.config.stop_signal;
                Signal::of_image(text).map_err(|signal::Unknown| {
                    PodError::invalid(
                        Field::Image,
                        format!("its StopSignal {text:?} is no signal"),
                    )
                })?
            }
        };
        let profile = match &spec.security.seccomp {
            Seccomp::Localhost(path) if !spec.security.privileged => {
                Some(read_profile(path.clone()).await?)
            }
            _ => None,
        };
        let in_guest = self.record.guest.as_ref().is_some_and(|it| it.apparmor);
        let host = self.node.config.apparmor.as_deref();
        let confined = confinement(&spec.security, host, in_guest).await?;
        let locals = self.find_locals(&spec).await;
        let kept: Vec<usize> = locals.iter().map(|(index, _)| *index).collect();
        let oci = build(Inputs {
            sandbox: &self.record.spec,
            container: &spec,
            image: &image.config,
            locals: &kept,
            localhost_seccomp: profile.as_ref(),
            apparmor: confined.as_ref().map(|it| it.profile.as_str()),
            seccomp_default: self.node.config.seccomp_default,
        })?;
        let volumes = find_volumes(&self.node, &spec).await?;
        let mounts = asked_mounts(&oci);
        let mut request = create_request(&id, &oci, &spec, &image)?;
        request.storage_mounts = storage_mounts(&mounts, &spec, &volumes, &locals);
        request.apparmor_policy = confined.map(|it| it.policy).unwrap_or_default();
        if self.node.config.image_volumes {
            request.volumes = declared_volumes(&image.config, &oci)?;
        }
        let devices = find_devices(&id, &spec, &mut request).await?;

        let log_directory = &self.record.spec.log_directory;
        let log_path = log_path(&self.record.spec, &spec);
        let run = RunDir::of(&self.node.config, &self.record.id);
        let record = ContainerRecord {
            id: id.clone(),
            guest_id: None,
            pod: self.record.id.clone(),
            spec: Arc::clone(&spec),
            image_ref: image
                .repo_digests
                .first()
                .cloned()
                .unwrap_or_else(|| image.id.to_string()),
            image_id: image.id.clone(),
            state: RecordedState::Creating,
            created_at_ns: clock::now_ns(),
            started_at_ns: 0,
            image_slot: None,
            volumes: volumes
                .iter()
                .map(|(mount, image)| VolumeRecord {
                    mount: *mount,
                    image_id: image.clone(),
                    slot: None,
                })
                .collect(),
            locals: locals
                .iter()
                .map(|(mount, volume)| volume.record(*mount, None))
                .collect(),
            devices: Vec::new(),
            log_path: log_path.clone(),
            stop_signal,
            stopping: None,
            user: None,
            resources: None,
        };
        let creation = Creation {
            node: Arc::clone(&self.node),
            attachments: running.attachments.clone(),
            sources: Sources {
                image: image.id.clone(),
                volumes,
                shares: host_files::shares(&spec, |index| kept.contains(&index)).collect(),
                locals,
                devices,
            },
            pod_uid: self.record.spec.metadata.uid.clone(),
            mounts,
            request,
            log: LogTarget {
                container: id.to_string(),
                path: log_path.map(|file| LogPath {
                    directory: log_directory.clone(),
                    file,
                }),
                position: run.log_position(id.as_str()),
                tty: spec.tty,
                share: self.log_share.clone(),
            },
            changed: Arc::clone(running.volumes.changed()),
            id,
            spec,
        };
        Ok((creation, Container::new(record, State::Creating)))
    }

    /// Finds the mounts of a container that the guest keeps by itself. What other containers of the
    /// pod share with the host, this one shares too.
    async fn find_locals(&self, spec: &ContainerSpec) -> Vec<(usize, LocalVolume)> {
        let mut found = Vec::new();
        if !self.node.config.guest_volumes {
            return found;
        }
        let others = self.containers.values().flat_map(|c| &c.record.locals);
        let mut kept: HashSet<PathBuf> = others.map(|local| local.directory.clone()).collect();
        let uid = self.record.spec.metadata.uid.as_str();
        for (index, mount) in spec.mounts.iter().enumerate() {
            let Some(directory) = empty_dir::directory(uid, mount) else {
                continue;
            };
            let shared = || {
                self.containers.values().any(|other| {
                    let mut mounts = other.record.spec.mounts.iter().enumerate();
                    mounts.any(|(index, mount)| {
                        !other.record.is_local(index)
                            && empty_dir::directory(uid, mount).as_ref() == Some(&directory)
                    })
                })
            };
            let in_use = if kept.contains(&directory) {
                InUse::ByGuest
            } else if kept.len() >= empty_dir::MOST || shared() {
                InUse::ByHost
            } else {
                InUse::No
            };
            let (mount, at) = (mount.clone(), directory.clone());
            let volume = blocking(move || empty_dir::find(&mount, &at, in_use)).await;
            if let Some(volume) = volume {
                found.push((index, volume));
                kept.insert(directory);
            }
        }
        found
    }

    /// A container whose processes another one wants to see must run.
    fn check_target(&self, pid: &NamespaceMode) -> Result<(), PodError> {
        let NamespaceMode::Target(target) = pid else {
            return Ok(());
        };
        let refused = |reason: &str| {
            Err(PodError::invalid(
                Field::TargetContainer,
                format!("container {target} {reason}"),
            ))
        };
        let found = ContainerId::try_from(target.clone());
        match found.ok().and_then(|id| self.containers.get(&id)) {
            None => refused("is not in this sandbox"),
            Some(container) if container.state != State::Running => refused("is not running"),
            Some(_) => Ok(()),
        }
    }
}
