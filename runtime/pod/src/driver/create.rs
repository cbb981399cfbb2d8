//! The creation of a container: refused at once when it is wrong, else made beside the task in
//! stages, each of which is undone when a later one fails.

use std::{collections::VecDeque, path::PathBuf, sync::Arc};

use hull_image::{Image, ImageId};
use hull_proto_agent::agent::{CreateRequest, PidNamespace, User};
use hull_proto_vmm::fs::Share;
use oci_spec::runtime::{LinuxSeccomp, Spec};
use protobuf::EnumOrUnknown;
use tokio::sync::Mutex;

use super::{Container, CreatedContainer, Done, Driver, Reply};
use crate::{
    blocking::blocking,
    cgroup::PodCgroup,
    clock,
    error::{ObjectKind, PodError},
    guest::client::Agent,
    id::{ContainerId, PodId},
    info::ContainerUser,
    lifecycle::{
        container::{Event, State},
        sandbox,
    },
    logs::pump::{ContainerLog, LogTarget},
    node::Node,
    oci_spec::{Inputs, build},
    record::{ContainerRecord, RecordedState},
    registry::Delivered,
    resources,
    spec::{ContainerSpec, GroupsPolicy, NamespaceMode, Seccomp},
    storage::{
        files::{self, HostFiles, Reach},
        images::{ImageDisks, storage_id},
    },
    validate,
    vm::{client::VmClient, rundir::RunDir},
};

/// Largest seccomp profile of the node, in bytes.
const PROFILE_MAX: u64 = 1 << 20;

/// What the creation of a container made.
#[derive(Debug)]
pub(super) struct Parts {
    user: ContainerUser,
    image_slot: u8,
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
    pod: PodId,
    cgroup: Option<PodCgroup>,
    id: ContainerId,
    image: ImageId,
    request: CreateRequest,
    log: LogTarget,
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
                container.log = Some(parts.log);
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
        if let (Some(limits), Some(vm)) = (&spec.resources, self.record.vm) {
            resources::check_cpuset(limits, vm, validate::RESOURCES)?;
        }
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
        let oci = build(Inputs {
            id: &id,
            sandbox: &self.record.spec,
            container: &spec,
            image: &image.config,
            localhost_seccomp: profile.as_ref(),
        })?;

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
            shares: files::shares(&spec),
            pod: self.record.id.clone(),
            cgroup: self.record.cgroup.clone(),
            id: id.clone(),
            image: image.id.clone(),
            request: create_request(&id, &oci, &spec, &image)?,
            log: LogTarget {
                container: id.to_string(),
                path: log_path.clone(),
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
    /// lease ─▶ disk ─▶ files of the host ─▶ container in the guest ─▶ log
    async fn carry_out(self) -> Result<Parts, PodError> {
        let leased = self.node.images.lease(&self.image, self.id.as_str()).await;
        leased.map_err(|e| PodError::internal("lease the container's image", e))?;

        let image_slot = match self.attach().await {
            Ok(slot) => slot,
            Err(error) => return Err(error.after_undo(self.release().await)),
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
                image_slot,
                log,
            }),
            Err(error) => {
                let error = PodError::internal("open the container's log", error);
                Err(error.after_undo(self.undo_create().await))
            }
        }
    }

    async fn attach(&self) -> Result<u8, PodError> {
        let extents = self.node.images.disk(&self.image).await;
        let extents = extents.map_err(|e| PodError::internal("find the image's disk", e))?;
        let mut disks = self.disks.lock().await;
        disks
            .attach(&self.vm, &self.agent, &self.image, &extents, &self.id)
            .await
    }

    async fn share(&self) -> Result<(), PodError> {
        if self.shares.is_empty() {
            return Ok(());
        }
        let mut files = self.files.lock().await;
        files.add(&self.reach(), &self.id, &self.shares).await
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
async fn read_profile(path: PathBuf) -> Result<LinuxSeccomp, PodError> {
    const FIELD: &str = "config.linux.security_context.seccomp.localhost_ref";
    let shown = path.display().to_string();
    let read = blocking(move || -> std::io::Result<Vec<u8>> {
        let length = std::fs::metadata(&path)?.len();
        if length > PROFILE_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        std::fs::read(&path)
    });
    let bytes = read
        .await
        .map_err(|e| PodError::invalid(FIELD, format!("read {shown}: {e}")))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| PodError::invalid(FIELD, format!("parse {shown}: {e}")))
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
        ..CreateRequest::default()
    })
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
