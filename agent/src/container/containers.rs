//! All containers of the pod, by their ids.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hull_proto_agent::agent::{CreateRequest, ExecRequest, PidNamespace};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep},
};

use super::{
    context::Context,
    error::ContainerError,
    made::{Made, Public},
    task::{self, Command, Reply, Sending},
    update::Change,
};
use crate::{
    ident::Id,
    pidfd::Process,
    stdio::{Directory, Stdio},
};

/// Commands that may wait for a container's task.
const QUEUE: usize = 64;
/// How long processes may take to come to a stand: one in the middle of a system call that can't be
/// interrupted goes on.
const STAND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it takes until it is looked again whether they do.
const STAND_PAUSE: Duration = Duration::from_millis(1);

/// All containers of the pod.
#[derive(Debug)]
pub(crate) struct Containers {
    context: Arc<Context>,
    /// Held for look-ups only.
    all: Arc<Mutex<HashMap<Id, Handle>>>,
    /// Those that stand still for a snapshot.
    frozen: tokio::sync::Mutex<HashSet<Id>>,
}

/// The way to a container's task.
#[derive(Debug, Clone)]
struct Handle {
    request: Arc<CreateRequest>,
    commands: mpsc::Sender<Command>,
    public: Arc<Public>,
}

impl Containers {
    /// Starts without containers.
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            all: Arc::default(),
            frozen: tokio::sync::Mutex::default(),
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Id, Handle>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a container; a repeated request gets the first one's answer.
    pub(crate) async fn create(&self, request: CreateRequest) -> Result<Made, ContainerError> {
        let id = Id::parse("container id", &request.container_id)?;
        let request = Arc::new(request);
        let target = self.target(&request)?;
        let handle = {
            let mut all = self.all();
            match all.get(&id) {
                Some(known) if *known.request == *request => known.clone(),
                Some(_) => return Err(ContainerError::Exists(id)),
                None => {
                    let handle = self.spawn(&id, &request, target);
                    all.insert(id.clone(), handle.clone());
                    handle
                }
            }
        };
        ask(&id, &handle, Command::Created).await
    }

    /// Starts the task that makes and then owns the container.
    fn spawn(&self, id: &Id, request: &Arc<CreateRequest>, target: Option<Arc<Process>>) -> Handle {
        let (commands, queue) = mpsc::channel(QUEUE);
        let public = Arc::new(Public::default());
        let run = task::run(
            Arc::clone(&self.context),
            id.clone(),
            Arc::clone(request),
            target,
            Arc::clone(&public),
            queue,
        );
        let (all, own) = (Arc::clone(&self.all), id.clone());
        tokio::spawn(async move {
            let queue = run.await;
            // Only then may the name be used again. What still waits in the
            // queue is answered by its closing.
            all.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&own);
            drop(queue);
        });
        Handle {
            request: Arc::clone(request),
            commands,
            public,
        }
    }

    /// Returns the process whose pid namespace a container wants to join.
    fn target(&self, request: &CreateRequest) -> Result<Option<Arc<Process>>, ContainerError> {
        if request.pid.enum_value() != Ok(PidNamespace::TARGET) {
            return Ok(None);
        }
        let target = Id::parse("target container", &request.pid_target)?;
        let handle = self.all().get(&target).cloned();
        let made = handle.as_ref().and_then(|h| h.public.made.get());
        match made {
            Some(made) => Ok(Some(Arc::clone(&made.init))),
            None => Err(ContainerError::NotFound(target)),
        }
    }

    /// Lets a made container run.
    pub(crate) async fn start(&self, id: &str) -> Result<(), ContainerError> {
        self.ask(id, Command::Start).await
    }

    /// Signals a process, or with `all` every process of the container.
    pub(crate) async fn signal(&self, id: &str, sending: Sending) -> Result<(), ContainerError> {
        self.ask(id, |reply| Command::Signal { sending, reply })
            .await
    }

    /// Removes a container; an unknown one is as good as removed.
    pub(crate) async fn delete(&self, id: &str, force: bool) -> Result<(), ContainerError> {
        match self.ask(id, |reply| Command::Delete { force, reply }).await {
            Err(ContainerError::NotFound(_)) => Ok(()),
            result => result,
        }
    }

    /// Starts one more process in a running container and returns its pid.
    pub(crate) async fn exec(&self, request: ExecRequest) -> Result<i32, ContainerError> {
        let id = request.container_id.clone();
        self.ask(&id, |reply| Command::Exec {
            request: Box::new(request),
            reply,
        })
        .await
    }

    /// Sets the size of a process's terminal.
    pub(crate) fn resize(
        &self,
        id: &str,
        exec: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), ContainerError> {
        let stdio = self.stdio(id, exec);
        let stdio = stdio.ok_or_else(|| ContainerError::NoProcess {
            container: id.to_owned(),
            exec: exec.to_owned(),
        })?;
        stdio.resize(rows, columns).map_err(ContainerError::Resize)
    }

    /// Changes a container's limits.
    pub(crate) async fn update(&self, id: &str, change: Change) -> Result<(), ContainerError> {
        self.ask(id, |reply| Command::Update {
            change: Box::new(change),
            reply,
        })
        .await
    }

    /// Has all containers stand still until [`Self::thaw`]. None does if one can't.
    pub(crate) async fn freeze(&self) -> Result<(), ContainerError> {
        let mut frozen = self.frozen.lock().await;
        let still = self.stand_still(&mut frozen).await;
        if still.is_err() {
            self.let_go(&mut frozen)?;
        }
        still
    }

    /// Lets containers go on that [`Self::freeze`] stopped.
    pub(crate) async fn thaw(&self) -> Result<(), ContainerError> {
        self.let_go(&mut *self.frozen.lock().await)
    }

    /// Leaves those as they are that stood still for the snapshot that this guest comes from: each waits for
    /// its start.
    pub(crate) async fn restored(&self) {
        self.frozen.lock().await.clear();
    }

    async fn stand_still(&self, frozen: &mut HashSet<Id>) -> Result<(), ContainerError> {
        let made = self.made(&[]);
        for (id, Made { cgroup, .. }) in &made {
            let failed = |source| ContainerError::Freeze {
                id: id.clone(),
                source,
            };
            // Before it is tried, so that a half is undone.
            let is_new = frozen.insert(id.clone());
            // Who waits for its start does so afterwards, too.
            if !cgroup.hold().map_err(failed)? && is_new {
                frozen.remove(id);
            }
        }
        let deadline = Instant::now() + STAND_TIMEOUT;
        for (id, Made { cgroup, .. }) in made {
            while !cgroup.is_still() {
                if Instant::now() > deadline {
                    return Err(ContainerError::Restless(id));
                }
                sleep(STAND_PAUSE).await;
            }
        }
        Ok(())
    }

    fn let_go(&self, frozen: &mut HashSet<Id>) -> Result<(), ContainerError> {
        let mut result = Ok(());
        for (id, Made { cgroup, .. }) in self.made(&[]) {
            if frozen.remove(&id)
                && let Err(source) = cgroup.let_go()
            {
                result = result.and(Err(ContainerError::Freeze { id, source }));
            }
        }
        frozen.clear();
        result
    }

    /// Returns the made containers, all or those of `ids`.
    pub(crate) fn made(&self, ids: &[String]) -> Vec<(Id, Made)> {
        self.all()
            .iter()
            .filter(|(id, _)| ids.is_empty() || ids.iter().any(|i| i == id.as_str()))
            .filter_map(|(id, handle)| Some((id.clone(), handle.public.made.get()?.clone())))
            .collect()
    }

    /// Returns a container that was made.
    pub(crate) fn one_made(&self, id: &str) -> Result<Made, ContainerError> {
        let id = Id::parse("container id", id)?;
        let handle = self.all().get(&id).cloned();
        let made = handle.and_then(|handle| handle.public.made.get().cloned());
        made.ok_or(ContainerError::NotFound(id))
    }

    /// Kills and removes all containers, as far as that works in `limit`.
    pub(crate) async fn shutdown(&self, limit: Duration) {
        let ids: Vec<_> = self.all().keys().cloned().collect();
        let removals = ids.iter().map(|id| self.delete(id.as_str(), true));
        let _ = tokio::time::timeout(limit, futures::future::join_all(removals)).await;
    }

    async fn ask<T>(
        &self,
        id: &str,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, ContainerError> {
        let id = Id::parse("container id", id)?;
        let handle = self.all().get(&id).cloned();
        let handle = handle.ok_or_else(|| ContainerError::NotFound(id.clone()))?;
        ask(&id, &handle, command).await
    }
}

impl Directory for Containers {
    fn stdio(&self, container: &str, exec: &str) -> Option<Arc<Stdio>> {
        let id = Id::parse("container id", container).ok()?;
        let handle = self.all().get(&id)?.clone();
        handle.public.stdio().get(exec).cloned()
    }
}

async fn ask<T>(
    id: &Id,
    handle: &Handle,
    command: impl FnOnce(Reply<T>) -> Command,
) -> Result<T, ContainerError> {
    let (reply, answer) = oneshot::channel();
    let gone = || ContainerError::NotFound(id.clone());
    handle
        .commands
        .send(command(reply))
        .await
        .map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}
