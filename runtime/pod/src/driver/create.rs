//! The creation of a container: refused at once when it is wrong, else made beside the task in
//! stages, each of which is undone when a later one fails.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io::Read,
    path::PathBuf,
    sync::Arc,
};

use hull_image::{Image, ImageId};
use hull_proto_agent::agent::{
    CreateRequest, Device as GuestDevice, PidNamespace, StorageMount, User,
};
use hull_proto_vmm::fs::Share;
use oci_spec::runtime::Spec;
use protobuf::EnumOrUnknown;
use rustix::fs::OFlags;
use tokio::sync::{Mutex, Notify};

use hull_base::{beneath, blocking, clock};
use hull_spec::{
    error::{ObjectKind, PodError},
    id::{ContainerId, PodId},
    info::ContainerUser,
    oci::{Inputs, LOCALHOST_FIELD, ProfileFile, asked_mount, build},
    spec::{ContainerSpec, GroupsPolicy, MountSource, NamespaceMode, Seccomp},
    validate,
};
use hull_vm::{agent::client::Agent, cgroup::PodCgroup, client::VmClient, rundir::RunDir};

use super::{Container, CreatedContainer, Done, Driver, Reply};
use crate::{
    lifecycle::{
        container::{Event, State},
        sandbox,
    },
    logs::{
        file::LogPath,
        pump::{ContainerLog, LogTarget},
    },
    node::Node,
    record::{ContainerRecord, LocalRecord, RecordedState, VolumeRecord},
    registry::Delivered,
    storage::{
        devices::{self, BlockDevice, Device},
        files::{self, FILES_ID, HostFiles, Reach},
        images::{DeviceDisk, ImageDisks, storage_id},
        local::{self, InUse, LocalVolume},
        volumes::Watched,
    },
};

/// Largest seccomp profile of the node, in bytes.
const PROFILE_MAX: u64 = 1 << 20;

/// What the creation of a container made.
#[derive(Debug)]
pub(super) struct Parts {
    user: ContainerUser,
    image_slot: u8,
    volumes: Vec<VolumeRecord>,
    locals: Vec<LocalRecord>,
    devices: Vec<DeviceDisk>,
    watched: Watched,
    log: ContainerLog,
}

/// All that the work beside the task needs.
struct Plan {
    node: Arc<Node>,
    vm: VmClient,
    agent: Agent,
    disks: Arc<Mutex<ImageDisks>>,
    files: Arc<Mutex<HostFiles>>,
    shares: Vec<(usize, Share)>,
    spec: Arc<ContainerSpec>,
    /// What tells that a live volume changed, and those of the container.
    changed: Arc<Notify>,
    watched: Watched,
    /// Where the container's mounts are in its specification.
    mounts: HashMap<usize, u32>,
    pod: PodId,
    cgroup: Option<PodCgroup>,
    id: ContainerId,
    image: ImageId,
    /// Image volumes, by index in the container's mounts.
    volumes: Vec<(usize, ImageId)>,
    /// Volumes that the guest keeps, by index in the container's mounts.
    locals: Vec<(usize, LocalVolume)>,
    /// Block devices of the host and their names in the guest.
    devices: Vec<(String, BlockDevice)>,
    request: CreateRequest,
    log: LogTarget,
}

/// What was attached.
struct Attached {
    image_slot: u8,
    volumes: Vec<VolumeRecord>,
    locals: Vec<LocalRecord>,
    devices: Vec<DeviceDisk>,
}

impl Driver {
    /// Begins to create a container, or joins a creation of the same one.
    pub(super) async fn create_container(
        &mut self,
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
        match self.plan(spec).await {
            Ok((plan, mut container)) => {
                container.creators.push(reply);
                let id = plan.id.clone();
                self.containers.insert(id.clone(), container);
                // Before the guest knows of it: a daemon that is killed finds what to undo.
                if let Err(error) = self.save_container(&id).await {
                    self.container_event(&id, Event::CreateFailed(error)).await;
                    return;
                }
                self.spawn(async move {
                    let id = plan.id.clone();
                    Done::Created(id, plan.carry_out().await)
                });
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    pub(super) async fn created(&mut self, id: ContainerId, result: Result<Parts, PodError>) {
        let event = match (result, self.containers.get_mut(&id)) {
            (Ok(parts), Some(container)) => {
                container.record.user = Some(parts.user);
                container.record.image_slot = Some(parts.image_slot);
                container.record.volumes = parts.volumes;
                container.record.locals = parts.locals;
                container.record.devices = parts.devices;
                container.log = Some(parts.log);
                if let Some(live) = &mut self.live {
                    live.volumes.keep(id.clone(), parts.watched);
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
    }

    /// Checks what was asked for; nothing is made.
    async fn plan(&self, spec: Arc<ContainerSpec>) -> Result<(Plan, Container), PodError> {
        const ACTION: &str = "create the container";
        let live = match (&self.live, self.record.state) {
            (Some(live), sandbox::State::Ready) => live,
            _ => return Err(self.not_ready(ACTION)),
        };
        validate::container(&spec, &self.record.spec)?;
        self.check_target(&spec.security.namespaces.pid)?;
        let image = find_image(&self.node, &spec.image.image).await?;
        let stop_signal = if spec.stop_signal.is_empty() {
            validate::stop_signal(&image.config.stop_signal, "the image's StopSignal")?
        } else {
            validate::stop_signal(&spec.stop_signal, "config.stop_signal")?
        };
        let profile = match &spec.security.seccomp {
            Seccomp::Localhost(path) if !spec.security.privileged => {
                Some(read_profile(path.clone()).await?)
            }
            _ => None,
        };
        let id = ContainerId::random();
        let locals = self.find_locals(&spec).await;
        let kept: Vec<usize> = locals.iter().map(|(index, _)| *index).collect();
        let oci = build(Inputs {
            sandbox: &self.record.spec,
            container: &spec,
            image: &image.config,
            locals: &kept,
            localhost_seccomp: profile.as_ref(),
            seccomp_default: self.node.config.seccomp_default,
        })?;
        let volumes = find_volumes(&self.node, &spec).await?;
        let mounts = asked_mounts(&oci);
        let mut request = create_request(&id, &oci, &spec, &image)?;
        request.storage_mounts = storage_mounts(&mounts, &spec, &volumes, &locals);
        let devices = find_devices(&id, &spec, &mut request).await?;

        let log_directory = &self.record.spec.log_directory;
        let log_path = (!spec.log_path.as_os_str().is_empty()
            && !log_directory.as_os_str().is_empty())
        .then(|| log_directory.join(&spec.log_path));
        let run = RunDir::of(&self.node.config, &self.record.id);
        let plan = Plan {
            node: Arc::clone(&self.node),
            vm: live.vm.clone(),
            agent: live.agent.clone(),
            disks: Arc::clone(&live.disks),
            files: Arc::clone(&self.files),
            shares: files::shares(&spec, |index| kept.contains(&index)).collect(),
            spec: Arc::clone(&spec),
            changed: Arc::clone(live.volumes.changed()),
            watched: Watched::new(),
            mounts,
            pod: self.record.id.clone(),
            cgroup: self.record.cgroup.clone(),
            id: id.clone(),
            image: image.id.clone(),
            volumes: volumes.clone(),
            locals: locals.clone(),
            devices,
            request,
            log: LogTarget {
                container: id.to_string(),
                path: log_path.clone().map(|file| LogPath {
                    directory: log_directory.clone(),
                    file,
                }),
                position: run.log_position(id.as_str()),
                tty: spec.tty,
            },
        };
        let container = Container {
            record: ContainerRecord {
                id,
                pod: self.record.id.clone(),
                spec,
                image_ref: image
                    .repo_digests
                    .first()
                    .cloned()
                    .unwrap_or_else(|| image.id.to_string()),
                image_id: image.id.to_string(),
                state: RecordedState::Creating,
                created_at_ns: clock::now_ns(),
                started_at_ns: 0,
                image_slot: None,
                volumes: volumes
                    .iter()
                    .map(|(mount, image)| VolumeRecord {
                        mount: *mount,
                        image_id: image.to_string(),
                        slot: None,
                    })
                    .collect(),
                locals: locals
                    .into_iter()
                    .map(|(mount, volume)| local_record(mount, volume, None))
                    .collect(),
                devices: Vec::new(),
                log_path,
                stop_signal,
                stopping: None,
                user: None,
                resources: None,
            },
            state: State::Creating,
            log: None,
            waiters: Vec::new(),
            creators: Vec::new(),
            delivered: Delivered::default(),
            updates: VecDeque::new(),
        };
        Ok((plan, container))
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
            let Some(directory) = local::directory(uid, mount) else {
                continue;
            };
            let shared = || {
                self.containers.values().any(|other| {
                    let mut mounts = other.record.spec.mounts.iter().enumerate();
                    mounts.any(|(index, mount)| {
                        !other.record.is_local(index)
                            && local::directory(uid, mount).as_ref() == Some(&directory)
                    })
                })
            };
            let in_use = if kept.contains(&directory) {
                InUse::ByGuest
            } else if kept.len() >= local::MOST || shared() {
                InUse::ByHost
            } else {
                InUse::No
            };
            let (mount, at) = (mount.clone(), directory.clone());
            let volume = blocking(move || local::find(&mount, &at, in_use)).await;
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
            let field = "config.linux.security_context.namespace_options.target_id";
            Err(PodError::invalid(
                field,
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

impl Container {
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

impl Plan {
    /// leases and disks ─▶ files of the host ─▶ container in the guest ─▶ log
    async fn carry_out(mut self) -> Result<Parts, PodError> {
        let attached = match self.attach().await {
            Ok(attached) => attached,
            // Not all of it may have been attached.
            Err(error) => return Err(error.after_undo(self.undo_create().await)),
        };
        if let Err(error) = self.share().await {
            return Err(error.after_undo(self.undo_create().await));
        }
        let user = match self.agent.create(self.request.clone()).await {
            Ok(user) => user,
            Err(error) => {
                // The answer may be lost, not the request.
                let undo = self.undo_create().await;
                return Err(PodError::from(error).after_undo(undo));
            }
        };
        match ContainerLog::start(&self.agent, self.log.clone()).await {
            Ok(log) => Ok(Parts {
                user,
                image_slot: attached.image_slot,
                volumes: attached.volumes,
                locals: attached.locals,
                devices: attached.devices,
                watched: self.watched,
                log,
            }),
            Err(error) => {
                let error = PodError::internal("open the container's log", error);
                Err(error.after_undo(self.undo_create().await))
            }
        }
    }

    /// Leases and attaches all that the container is made of.
    async fn attach(&self) -> Result<Attached, PodError> {
        let image_slot = self.attach_image(&self.image).await?;
        let mut volumes = Vec::with_capacity(self.volumes.len());
        for (mount, image) in &self.volumes {
            volumes.push(VolumeRecord {
                mount: *mount,
                image_id: image.to_string(),
                slot: Some(self.attach_image(image).await?),
            });
        }
        let mut disks = self.disks.lock().await;
        let mut locals = Vec::with_capacity(self.locals.len());
        for (mount, volume) in &self.locals {
            let config = &self.node.config;
            let slot = disks
                .attach_volume(&self.vm, &self.agent, config, volume, &self.id)
                .await?;
            locals.push(local_record(*mount, volume.clone(), slot));
        }
        for (storage, device) in &self.devices {
            disks
                .attach_device(&self.vm, &self.agent, device, storage, &self.id)
                .await?;
        }
        Ok(Attached {
            image_slot,
            volumes,
            locals,
            devices: disks.devices(&self.id),
        })
    }

    async fn attach_image(&self, image: &ImageId) -> Result<u8, PodError> {
        let images = &self.node.images;
        let leased = images.lease(image, self.id.as_str()).await;
        leased.map_err(|e| PodError::internal("lease the container's image", e))?;
        let extents = images.disk(image).await;
        let extents = extents.map_err(|e| PodError::internal("find the image's disk", e))?;
        let mut disks = self.disks.lock().await;
        disks
            .attach(&self.vm, &self.agent, image, &extents, &self.id)
            .await
    }

    /// Shares paths of the host, and tells the agent where they are.
    async fn share(&mut self) -> Result<(), PodError> {
        if self.shares.is_empty() {
            return Ok(());
        }
        let mut files = self.files.lock().await;
        let places = files.add(&self.reach(), &self.id, &self.shares).await?;
        drop(files);
        let (node, spec, changed) = (
            Arc::clone(&self.node),
            Arc::clone(&self.spec),
            Arc::clone(&self.changed),
        );
        // Before they are read.
        self.watched = blocking(move || node.watches.watch(&spec, &changed)).await;
        let shares = self.shares.iter().zip(places);
        let sources = shares.filter_map(|((asked, share), place)| {
            let is_watched = self.watched.contains_key(&share.path);
            let mount = self.spec.mounts.get(*asked);
            let live = mount.filter(|mount| is_watched && mount.is_atomic_volume());
            let name = live.map(|_| share.path.to_string_lossy().into_owned());
            Some(StorageMount {
                mount: *self.mounts.get(asked)?,
                storage: FILES_ID.to_owned(),
                sub_path: place,
                live: name.unwrap_or_default(),
                ..StorageMount::default()
            })
        });
        self.request.storage_mounts.extend(sources);
        Ok(())
    }

    fn reach(&self) -> Reach<'_> {
        Reach {
            node: &self.node,
            pod: &self.pod,
            vm: &self.vm,
            agent: &self.agent,
            cgroup: self.cgroup.as_ref(),
        }
    }

    async fn undo_create(&self) -> Result<(), PodError> {
        if self.vm.is_gone() {
            return self.release().await;
        }
        let deleted = self.agent.delete(self.id.as_str()).await;
        let unshared = if self.shares.is_empty() {
            Ok(())
        } else {
            let mut files = self.files.lock().await;
            files.remove(&self.reach(), &self.id).await
        };
        let mut disks = self.disks.lock().await;
        let detached = disks.release(&self.vm, &self.agent, &self.id).await;
        drop(disks);
        let released = self.release().await;
        let deleted = deleted.map_err(PodError::from);
        deleted.and(unshared).and(detached).and(released)
    }

    async fn release(&self) -> Result<(), PodError> {
        let released = self.node.images.release(self.id.as_str()).await;
        released.map_err(|e| PodError::internal("release the container's image", e))
    }
}

async fn find_image(node: &Node, name: &str) -> Result<Image, PodError> {
    let found = node.images.get(name).await;
    found
        .map_err(|e| PodError::internal("look for the image", e))?
        .ok_or_else(|| PodError::NotFound {
            object: ObjectKind::Image,
            id: name.to_owned(),
        })
}

/// Reads a seccomp profile of the node.
async fn read_profile(path: PathBuf) -> Result<ProfileFile, PodError> {
    let shown = path.display().to_string();
    let refused = |reason: String| PodError::invalid(LOCALHOST_FIELD, reason);
    let read = blocking(move || -> std::io::Result<Vec<u8>> {
        let file = beneath::regular(beneath::hold(&path)?, OFlags::RDONLY)?;
        let mut bytes = Vec::new();
        file.take(PROFILE_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > PROFILE_MAX {
            let reason = format!("it is larger than {PROFILE_MAX} bytes");
            return Err(std::io::Error::other(reason));
        }
        Ok(bytes)
    });
    let bytes = read.await;
    let bytes = bytes.map_err(|e| refused(format!("read {shown}: {e}")))?;
    ProfileFile::parse(&bytes).map_err(|e| refused(format!("parse {shown}: {e}")))
}

/// Finds the images of the container's image volumes, by index in its mounts.
async fn find_volumes(
    node: &Node,
    spec: &ContainerSpec,
) -> Result<Vec<(usize, ImageId)>, PodError> {
    let mut volumes = Vec::new();
    for (index, mount) in spec.mounts.iter().enumerate() {
        if let MountSource::Image { image, .. } = &mount.source {
            volumes.push((index, find_image(node, &image.image).await?.id));
        }
    }
    Ok(volumes)
}

/// Finds out what the container's devices are, and adds them to what the guest is asked.
async fn find_devices(
    id: &ContainerId,
    spec: &ContainerSpec,
    request: &mut CreateRequest,
) -> Result<Vec<(String, BlockDevice)>, PodError> {
    let mut disks = Vec::new();
    for (index, asked) in spec.devices.iter().cloned().enumerate() {
        let mut device = GuestDevice {
            path: asked.container_path.to_string_lossy().into_owned(),
            access: asked.permissions.clone(),
            ..GuestDevice::default()
        };
        match blocking(move || devices::inspect(index, &asked)).await? {
            Device::Own(path) => device.guest_path = path,
            Device::Block(disk) => {
                device.storage = devices::storage_id(id, index);
                disks.push((device.storage.clone(), disk));
            }
        }
        request.devices.push(device);
    }
    Ok(disks)
}

fn create_request(
    id: &ContainerId,
    oci: &Spec,
    spec: &ContainerSpec,
    image: &Image,
) -> Result<CreateRequest, PodError> {
    let spec_json = serde_json::to_vec(oci)
        .map_err(|e| PodError::internal("encode the container's specification", e))?;
    let (pid, pid_target) = match &spec.security.namespaces.pid {
        NamespaceMode::Pod => (PidNamespace::POD, String::new()),
        NamespaceMode::Container => (PidNamespace::CONTAINER, String::new()),
        NamespaceMode::Node => (PidNamespace::NODE, String::new()),
        NamespaceMode::Target(target) => (PidNamespace::TARGET, target.clone()),
    };
    Ok(CreateRequest {
        container_id: id.to_string(),
        spec: spec_json,
        lower: vec![storage_id(&image.id)],
        // Also under a read-only root: mount points are made in the upper layer.
        writable: true,
        user: Some(user(spec, image)).into(),
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        tty: spec.tty,
        pid: EnumOrUnknown::new(pid),
        pid_target,
        guest_devices: spec.security.privileged,
        ..CreateRequest::default()
    })
}

/// Where the mounts that were asked for are in the specification.
fn asked_mounts(oci: &Spec) -> HashMap<usize, u32> {
    let mounts = oci.mounts().iter().flatten().zip(0..);
    mounts
        .filter_map(|(mount, index)| Some((asked_mount(mount)?, index)))
        .collect()
}

fn local_record(mount: usize, volume: LocalVolume, slot: Option<u8>) -> LocalRecord {
    LocalRecord {
        mount,
        directory: volume.directory,
        storage: volume.storage,
        slot,
    }
}

/// Where the agent finds the sources of image volumes and of those that the guest keeps.
fn storage_mounts(
    mounts: &HashMap<usize, u32>,
    spec: &ContainerSpec,
    volumes: &[(usize, ImageId)],
    locals: &[(usize, LocalVolume)],
) -> Vec<StorageMount> {
    let local = |(asked, volume): &(usize, LocalVolume)| {
        Some(StorageMount {
            mount: *mounts.get(asked)?,
            storage: volume.storage.clone(),
            sub_path: volume.sub_path.clone(),
            ..StorageMount::default()
        })
    };
    let of = |(asked, image): &(usize, ImageId)| {
        let MountSource::Image { sub_path, .. } = &spec.mounts.get(*asked)?.source else {
            return None;
        };
        Some(StorageMount {
            mount: *mounts.get(asked)?,
            storage: storage_id(image),
            sub_path: sub_path.clone(),
            ..StorageMount::default()
        })
    };
    let locals = locals.iter().filter_map(local);
    volumes.iter().filter_map(of).chain(locals).collect()
}

/// A number that was asked for comes before a name, and a name before the image's user. The
/// image's group belongs to the image's user alone.
fn user(spec: &ContainerSpec, image: &Image) -> User {
    let security = &spec.security;
    let name = if security.run_as_user.is_some() {
        String::new()
    } else if security.run_as_username.is_empty() {
        image.config.user.clone()
    } else {
        security.run_as_username.clone()
    };
    User {
        user: name,
        uid: security.run_as_user,
        gid: security.run_as_group,
        supplemental_groups: security.supplemental_groups.clone(),
        strict_groups: security.groups_policy == GroupsPolicy::Strict,
        ..User::default()
    }
}
