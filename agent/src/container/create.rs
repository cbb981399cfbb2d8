//! How a container comes to be, stage by stage; each stage can be undone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use hull_proto_agent::agent::{CreateRequest, PidNamespace};
use oci_spec::runtime::{LinuxDeviceCgroup, Spec};
use tracing::warn;

use super::{
    cgroup::Cgroup,
    child::Action,
    context::Context,
    declared, devices,
    error::ContainerError,
    huge_pages::HugePages,
    launch::{Gate, Launch, launch},
    limits,
    made::Made,
    make::Ids,
    nodes,
    oom::OomKills,
    pause::PodUser,
    process::{Ended, Executed, Subject, follow, watch_outcome},
    rootfs::{Layers, Rootfs},
    spec::{self, Additions, PidNamespaceOf},
    update,
    user::{self, User},
    volumes,
};
use crate::{
    atomic_volumes::AtomicVolumes,
    blocking::blocking,
    ident::Id,
    pidfd::Process,
    stdio::{InputEnd, Stdio, Wanted},
};

/// A container with its first process, which waits for the start.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) made: Made,
    pub(crate) spec: Spec,
    /// Where its first process waits; `None`: it was let go.
    pub(crate) gate: Option<Gate>,
    pub(crate) executed: Executed,
    pub(crate) ended: Ended,
    pub(crate) oom: Arc<OomKills>,
    pub(crate) stdio: Arc<Stdio>,
    /// `None` while they are being removed.
    pub(crate) remains: Option<Remains>,
}

/// What a container leaves in the guest besides processes.
#[derive(Debug)]
pub(crate) struct Remains {
    id: Id,
    dir: PathBuf,
    rootfs: Option<Rootfs>,
    cgroup: Option<Cgroup>,
    atomic_volumes: Arc<AtomicVolumes>,
    huge_pages: Arc<HugePages>,
}

impl Remains {
    /// Removes all of it. Its processes must be gone. May be tried again.
    pub(crate) fn remove(&mut self) -> Result<(), ContainerError> {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| ContainerError::File {
                action,
                path,
                source,
            }
        };
        if let Some(cgroup) = &self.cgroup {
            cgroup
                .remove()
                .map_err(failed("remove cgroup", cgroup.path()))?;
            self.cgroup = None;
        }
        if let Some(rootfs) = &self.rootfs {
            rootfs
                .remove()
                .map_err(failed("remove root file system", rootfs.path()))?;
            self.rootfs = None;
        }
        self.atomic_volumes.remove(&self.id);
        self.huge_pages.release(&self.id)?;
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove directory", &self.dir)(e))
            }
            _ => Ok(()),
        }
    }

    /// Undoes a creation that failed, whatever stage it had reached.
    async fn undo(mut self) {
        if let Some(cgroup) = &self.cgroup {
            if let Err(error) = cgroup.kill() {
                warn!(container = %self.id, %error, "undo a failed creation");
            }
            cgroup.empty().await;
        }
        let id = self.id.clone();
        if let Err(error) = blocking(move || self.remove()).await {
            warn!(container = %id, error = &error as &dyn std::error::Error, "undo a failed creation");
        }
    }
}

/// Makes the container that `request` describes; after a failure nothing of
/// it is left. `target` is the process whose pid namespace it joins.
pub(crate) async fn create(
    context: &Context,
    id: &Id,
    request: &CreateRequest,
    target: Option<Arc<Process>>,
) -> Result<Created, ContainerError> {
    let mut remains = Remains {
        id: id.clone(),
        dir: context.layout.container(id),
        rootfs: None,
        cgroup: None,
        atomic_volumes: Arc::clone(&context.atomic_volumes),
        huge_pages: Arc::clone(&context.huge_pages),
    };
    match stages(context, id, request, target, &mut remains).await {
        Ok(stage) => Ok(stage.into_created(remains)),
        Err(e) => {
            remains.undo().await;
            Err(e)
        }
    }
}

/// All but the remains of [`Created`].
struct Launched {
    made: Made,
    spec: Spec,
    gate: Gate,
    executed: Executed,
    ended: Ended,
    oom: Arc<OomKills>,
    stdio: Arc<Stdio>,
}

impl Launched {
    fn into_created(self, remains: Remains) -> Created {
        Created {
            made: self.made,
            spec: self.spec,
            gate: Some(self.gate),
            executed: self.executed,
            ended: self.ended,
            oom: self.oom,
            stdio: self.stdio,
            remains: Some(remains),
        }
    }
}

async fn stages(
    context: &Context,
    id: &Id,
    request: &CreateRequest,
    target: Option<Arc<Process>>,
    remains: &mut Remains,
) -> Result<Launched, ContainerError> {
    let mut asked = spec::parse(&request.spec)?;
    if let Some(profile) = spec::apparmor_profile(&asked).map(str::to_owned) {
        let (apparmor, policy) = (
            Arc::clone(&context.apparmor),
            request.apparmor_policy.clone(),
        );
        blocking(move || apparmor.provide(&profile, &policy)).await?;
    }
    let sources = volumes::Sources {
        wanted: request.storage_mounts.clone(),
        storages: Arc::clone(&context.storages),
        atomic: Arc::clone(&context.atomic_volumes),
        container: id.clone(),
    };
    let (mut asked, held) = blocking(move || {
        let held = sources.locate(&mut asked)?;
        Ok::<_, ContainerError>((asked, held))
    })
    .await?;
    let pod_user = context.pod.user().cloned();
    nodes::add(&mut asked, request, &context.storages, pod_user.is_some())?;
    let lower = layers(context, request)?;
    let scratch = request.writable.then(|| writable_dir(context, id));
    let (pid, joined) = pid_namespace(context, request, target).await?;
    let (dir, upper, user) = (remains.dir.clone(), scratch.clone(), pod_user.clone());
    let rootfs = blocking(move || {
        make_dir(&dir)?;
        let layers = Layers {
            lower,
            writable: upper,
            user,
        };
        let rootfs = Rootfs::assemble(dir.join("rootfs"), layers)?;
        Ok::<_, ContainerError>(rootfs)
    })
    .await?;
    let root = rootfs.path().to_owned();
    let own = rootfs.own();
    remains.rootfs = Some(rootfs);

    let cgroup_path = context.layout.cgroup(id);
    let cgroup = Cgroup::create(cgroup_path.clone()).map_err(|source| ContainerError::File {
        action: "make cgroup",
        path: cgroup_path,
        source,
    })?;
    remains.cgroup = Some(cgroup.clone());
    let failed = |action| {
        let path = cgroup.path().to_owned();
        move |source| ContainerError::File {
            action,
            path,
            source,
        }
    };
    cgroup
        .limit_depth()
        .map_err(failed("limit the depth of cgroups below"))?;
    let ids = pod_user.as_ref().and_then(|user| {
        let (uid, gid) = (user.uid(0)?, user.gid(0)?);
        Some(Ids { uid, gid })
    });
    if let Some(Ids { uid, gid }) = ids.filter(|_| divides_cgroup(&asked)) {
        cgroup
            .delegate(uid, gid)
            .map_err(failed("give the container"))?;
    }
    limits::leave_threads(cgroup.path(), &context.layout.pod_cgroup())
        .map_err(failed("limit the threads of"))?;
    let limits = asked.linux().as_ref();
    if let Some(limits) = limits.and_then(|linux| linux.resources().clone()) {
        let (of, path, cgroup) = (id.clone(), context.layout.oci_cgroup(id), cgroup.clone());
        let pages = Arc::clone(&context.huge_pages);
        blocking(move || update::limit(&of, path, &cgroup, &pages, limits)).await?;
    }
    let rules = device_rules(&asked);
    devices::apply(cgroup.path(), &rules).map_err(failed("limit the devices of"))?;

    let wanted_user = request.user.clone().unwrap_or_default();
    let tty = request.tty;
    let (declared, volumes_in) = (request.volumes.clone(), own.clone());
    let in_user = pod_user.clone();
    let (spec, user, trees) = blocking(move || {
        let user = user::resolve(&root, &wanted_user)?;
        if let Some(pod) = &in_user {
            check_mapped(&user, pod)?;
        }
        let mut trees = volumes::copy(&mut asked, in_user.as_ref(), &held)?;
        if let Some(own) = volumes_in {
            let made = declared::make(&declared, &root, &own, in_user.as_ref())?;
            // All that is asked for comes to lie on them, wherever links of the image lead.
            let before = made.len();
            let asked = asked.mounts_mut().get_or_insert_default();
            asked.splice(0..0, made);
            trees = trees
                .into_iter()
                .map(|(index, tree)| (index + before, tree))
                .collect();
        }
        let add = Additions {
            rootfs: &root,
            user: &user,
            tty,
            pid,
            user_namespace: in_user.is_some(),
        };
        let spec = spec::complete(asked, &add)?;
        Ok::<_, ContainerError>((spec, user, trees))
    })
    .await?;

    let end = if request.stdin_once {
        InputEnd::Closes
    } else {
        InputEnd::Stays
    };
    let (stdio, ends) = Stdio::new(Wanted {
        tty: request.tty,
        stdin: request.stdin,
        end,
    })
    .map_err(ContainerError::Stdio)?;
    let launched = launch(
        &context.reaper,
        Launch {
            action: Action::Create {
                spec: Box::new(spec.clone()),
                dir: remains.dir.clone(),
                user: ids,
                pid: joined.is_some(),
                trees: trees.keys().copied().collect(),
            },
            cgroup: &cgroup,
            trees: trees.into_values().collect(),
            joins: user_init(context).into_iter().chain(joined).collect(),
            stdio: &stdio,
            ends,
            uid: owner(context, &user),
        },
    )
    .await;
    let launched = match launched {
        Ok(launched) => launched,
        Err(e) => {
            stdio.abandon();
            return Err(ContainerError::Create(e));
        }
    };
    let executed = watch_outcome(launched.outcome);
    let oom = OomKills::new(id.clone(), cgroup.clone(), Arc::clone(&context.events));
    let init = Arc::new(launched.process);
    let ended = follow(
        Subject {
            container: id.clone(),
            exec: None,
            process: Arc::clone(&init),
            exit: launched.exit,
            executed: Some(executed.clone()),
            stdio: Arc::clone(&stdio),
            cgroup: cgroup.clone(),
            oom: Arc::clone(&oom),
            deadline: None,
            kill_on_detach: false,
        },
        Arc::clone(&context.events),
    );
    let made = Made {
        init,
        user,
        cgroup,
        own,
    };
    Ok(Launched {
        made,
        spec,
        gate: launched.gate,
        executed,
        ended,
        oom,
        stdio,
    })
}

/// Who owns the streams, as seen outside of a user namespace.
pub(crate) fn owner(context: &Context, user: &User) -> u32 {
    let mapped = context.pod.user().and_then(|pod| pod.uid(user.uid));
    mapped.unwrap_or(user.uid)
}

/// Whether all ids of a container's user are there in the pod's user namespace.
fn check_mapped(user: &User, pod: &PodUser) -> Result<(), ContainerError> {
    if pod.uid(user.uid).is_none() {
        return Err(ContainerError::Unmapped(user.uid));
    }
    let mut groups = std::iter::once(&user.gid).chain(&user.groups);
    match groups.find(|gid| pod.gid(**gid).is_none()) {
        Some(gid) => Err(ContainerError::Unmapped(*gid)),
        None => Ok(()),
    }
}

fn layers(context: &Context, request: &CreateRequest) -> Result<Vec<PathBuf>, ContainerError> {
    let mounted = |name: &String| {
        let id = Id::parse("storage id", name)?;
        let path = context.storages.mount_point(&id);
        path.ok_or_else(|| ContainerError::NoStorage(name.clone()))
    };
    request.lower.iter().map(mounted).collect()
}

fn writable_dir(context: &Context, id: &Id) -> PathBuf {
    let scratch = context.storages.scratch();
    scratch
        .unwrap_or_else(|| context.layout.memory_scratch())
        .join("containers")
        .join(id)
}

/// Returns the pid namespace of the container, and the process that it is another's by.
async fn pid_namespace(
    context: &Context,
    request: &CreateRequest,
    target: Option<Arc<Process>>,
) -> Result<(PidNamespaceOf, Option<Arc<Process>>), ContainerError> {
    let process = match (request.pid.enum_value_or_default(), target) {
        (PidNamespace::CONTAINER, _) => return Ok((PidNamespaceOf::Own, None)),
        (PidNamespace::NODE, _) => return Ok((PidNamespaceOf::Guest, None)),
        (PidNamespace::TARGET, Some(target)) => target,
        (PidNamespace::TARGET, None) => {
            return Err(ContainerError::NoStorage(request.pid_target.clone()));
        }
        (PidNamespace::POD, _) => {
            let init = context.pod.init(&context.reaper).await;
            init.map_err(ContainerError::PodPid)?
        }
    };
    Ok((PidNamespaceOf::Process, Some(process)))
}

/// The process that holds the pod's user namespace, if it has one.
pub(crate) fn user_init(context: &Context) -> Option<Arc<Process>> {
    context.pod.user().map(|user| Arc::clone(user.init()))
}

/// Whether a container has its cgroup as a file system that can be written to.
fn divides_cgroup(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(|mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        mount.typ().as_deref() == Some("cgroup") && !options.iter().any(|option| option == "ro")
    })
}

fn device_rules(spec: &Spec) -> Vec<LinuxDeviceCgroup> {
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    resources
        .and_then(|r| r.devices().clone())
        .unwrap_or_default()
}

fn make_dir(path: &Path) -> Result<(), ContainerError> {
    fs::create_dir_all(path).map_err(|source| ContainerError::File {
        action: "make directory",
        path: path.to_owned(),
        source,
    })
}
