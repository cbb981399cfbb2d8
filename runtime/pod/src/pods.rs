//! All pods of this node: what callers use.

use std::{cmp::Reverse, collections::HashSet, path::Path, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::timeout};

use hull_base::{blocking, clock, metrics, stages::Call};
use hull_spec::{
    config::PodsConfig,
    error::{ErrorKind, ObjectKind, PodError},
    field::Field,
    id::{ContainerId, PodId},
    info::{ContainerInfo, ContainerState, ExecOutput, SandboxInfo, SandboxState, TemplateCounts},
    spec::{ContainerSpec, Resources, SandboxSpec},
    stats::{PodStats, ProcessMemory, Processes},
    validate,
};

use crate::{
    command::{Admission, Command, Reply, container_not_found, not_ready},
    container::restored::{Asked, Restore},
    driver::state::Driver,
    events::Events,
    exec,
    lifecycle::sandbox::State,
    node::Node,
    ports::{HostProcesses, PodImages, PodNetworking, PodProcesses},
    record::SandboxRecord,
    recover,
    registry::{Phase, PodEntry},
    sandbox::restore::Checkpoint,
    session::{self, AttachSession, ExecSession, PodConnection, SessionStreams},
    stats::{
        gather::{Scope, gather},
        host,
    },
};

/// How long a VM may take to answer to who wants its state. It is not waited for any longer.
const QUESTION: Duration = Duration::from_secs(1);

/// The pods of this node. Clones share them.
///
/// An id may be shortened to a unique prefix. An operation goes on when its caller goes away; a
/// second call with the same specification then joins it.
#[derive(Debug, Clone)]
pub struct Pods {
    node: Arc<Node>,
}

impl Pods {
    /// Opens the records, adopts the pods that still run and removes what nobody owns.
    ///
    /// # Errors
    /// When the directories or records can't be used.
    pub async fn open(
        config: PodsConfig,
        images: Arc<dyn PodImages>,
        network: Arc<dyn PodNetworking>,
    ) -> Result<Self, PodError> {
        Self::open_with(config, images, network, Arc::new(HostProcesses)).await
    }

    /// As [`Pods::open`], with VMs whose processes may be other than the host's.
    ///
    /// # Errors
    /// As [`Pods::open`].
    pub async fn open_with(
        config: PodsConfig,
        images: Arc<dyn PodImages>,
        network: Arc<dyn PodNetworking>,
        processes: Arc<dyn PodProcesses>,
    ) -> Result<Self, PodError> {
        let node = recover::open(config, images, network, processes).await?;
        let pods = Self { node };
        let is_ready = |info: &SandboxInfo| info.state == SandboxState::Ready;
        let adopted = pods.select_sandboxes(is_ready, |_| ()).await;
        metrics::ADOPTED.set(&[], adopted.len() as f64);
        Ok(pods)
    }

    /// What became of VMs that could be clones of templates.
    #[must_use]
    pub fn templates(&self) -> TemplateCounts {
        self.node.templates.counts()
    }

    /// Starts a sandbox and returns when it is ready.
    ///
    /// # Errors
    /// See [`PodError`]; nothing of a sandbox that failed stays, but for [`PodError::Undo`].
    pub async fn run_sandbox(&self, spec: SandboxSpec) -> Result<PodId, PodError> {
        self.run_sandbox_if(spec, None).await
    }

    /// As [`Pods::run_sandbox`], if `admission` agrees: it is asked when the sandbox is ready, and before
    /// others see it. A call that joins another one does not ask.
    ///
    /// # Errors
    /// As of [`Pods::run_sandbox`], and what `admission` says.
    pub async fn run_sandbox_if(
        &self,
        spec: SandboxSpec,
        admission: Option<Admission>,
    ) -> Result<PodId, PodError> {
        let entry = self.bring_up(spec, None, admission).await?;
        Ok(entry.id)
    }

    /// Starts a sandbox that goes on from a checkpoint, and returns when it is ready, with its containers by
    /// name: each is created, and goes on where it was once it is started. `spec` is that of the checkpoint if
    /// there is none; of it, and of what is asked for containers, only what is not the guest's counts. Paths of the
    /// host are those that are asked for, and no others.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when the checkpoint can't be used, with the reason; see [`PodError`] for
    /// others. Nothing of a sandbox that failed stays, but for [`PodError::Undo`].
    pub async fn restore_sandbox(
        &self,
        checkpoint: &Path,
        spec: Option<SandboxSpec>,
        asked: impl Into<Asked>,
    ) -> Result<(PodId, Vec<(String, ContainerId)>), PodError> {
        let checkpoint = Checkpoint::open(&self.node, checkpoint).await?;
        let spec = checkpoint.spec(spec)?;
        let restore = Restore::plan(checkpoint, &asked.into(), &spec.metadata.uid).await?;
        let entry = self.bring_up(spec, Some(restore), None).await?;
        let view = Arc::clone(&entry.view.borrow());
        let named = view.containers.values();
        let named = named.map(|c| (c.spec.metadata.name.clone(), c.id.clone()));
        Ok((entry.id, named.collect()))
    }

    async fn bring_up(
        &self,
        spec: SandboxSpec,
        restore: Option<Restore>,
        mut admission: Option<Admission>,
    ) -> Result<PodEntry, PodError> {
        validate::sandbox(&spec)?;
        let user = self.node.users.take()?;
        let record = SandboxRecord {
            id: PodId::random(),
            user: user.id(),
            spec: Arc::new(spec),
            state: State::Starting,
            message: String::new(),
            created_at_ns: clock::now_ns(),
            network: None,
            ips: Vec::new(),
            seen_ips: None,
            vm: None,
            cgroup: None,
            guest: None,
            resources: None,
            overhead: None,
            checkpoint: None,
        };
        let (mut driver, new) = Driver::new(Arc::clone(&self.node), record, Phase::Starting);
        driver.restore = restore;
        // The driver holds it.
        drop(user);
        let entry = loop {
            match self.node.registry.reserve(new.clone())? {
                None => {
                    let start = driver.start(Call::current(), admission.take());
                    recover::supervise(&self.node, new.id.clone(), start);
                    break new;
                }
                // Of a start that could not be undone: it has been told why.
                Some(left) if left.has_failed() => {
                    absent_is_done(ask(&left, Command::RemoveSandbox).await)?;
                }
                Some(other) => break other,
            }
        };
        let mut started = entry.started.subscribe();
        let result = match started.wait_for(Option::is_some).await {
            Ok(result) => result.clone(),
            Err(_) => None,
        };
        result.unwrap_or_else(|| {
            Err(PodError::precondition(
                "start the sandbox",
                "it was removed meanwhile",
            ))
        })?;
        entry.delivered.set();
        Ok(entry)
    }

    /// Ends a sandbox's containers, VM and network. A sandbox that is stopped or unknown is
    /// stopped already.
    ///
    /// # Errors
    /// What could not be ended; may be repeated.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), PodError> {
        let entry = self.node.registry.sandbox(id);
        absent_is_done(async { ask(&entry?, Command::StopSandbox).await }.await)
    }

    /// Stops a sandbox and forgets it with its containers. One that is unknown is removed already.
    ///
    /// # Errors
    /// What could not be removed; may be repeated.
    pub async fn remove_sandbox(&self, id: &str) -> Result<(), PodError> {
        let entry = self.node.registry.sandbox(id);
        absent_is_done(async { ask(&entry?, Command::RemoveSandbox).await }.await)
    }

    /// Writes a checkpoint of a sandbox and its containers to a directory that is not there yet, while they
    /// go on. Returns how long the VM stood still.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] names what can't be in a checkpoint; see [`PodError`] for others. The
    /// sandbox goes on, and nothing is at `output`.
    pub async fn checkpoint_sandbox(&self, id: &str, output: &Path) -> Result<Duration, PodError> {
        let entry = self.node.registry.sandbox(id)?;
        let output = output.to_owned();
        ask(&entry, |reply| Command::Checkpoint(output, reply)).await
    }

    /// Tells about a sandbox.
    ///
    /// # Errors
    /// [`PodError::NotFound`], [`PodError::Ambiguous`].
    pub async fn sandbox(&self, id: &str) -> Result<SandboxInfo, PodError> {
        let entry = self.node.registry.sandbox(id)?;
        let info = entry.view.borrow().sandbox.clone();
        Ok(info)
    }

    /// Tells about all sandboxes, the newest first.
    pub async fn sandboxes(&self) -> Vec<SandboxInfo> {
        self.select_sandboxes(|_| true, Clone::clone).await
    }

    /// What `tell` makes of the sandboxes that `selects` wants, the newest first. Nothing else of them is
    /// copied.
    pub async fn select_sandboxes<T>(
        &self,
        selects: impl Fn(&SandboxInfo) -> bool,
        tell: impl Fn(&SandboxInfo) -> T,
    ) -> Vec<T> {
        let views = self.node.registry.views("");
        let mut selected: Vec<&SandboxInfo> = views
            .iter()
            .filter(|view| matches!(view.phase, Phase::Up))
            .map(|view| &view.sandbox)
            .filter(|sandbox| selects(sandbox))
            .collect();
        selected.sort_by_key(|info| Reverse(info.created_at_ns));
        selected.into_iter().map(tell).collect()
    }

    /// Creates a container in a sandbox; its process waits for [`Pods::start_container`].
    ///
    /// # Errors
    /// See [`PodError`]; nothing of a container that failed stays.
    pub async fn create_container(
        &self,
        pod: &str,
        spec: ContainerSpec,
    ) -> Result<ContainerId, PodError> {
        self.create_container_as(pod, ContainerId::random(), spec)
            .await
    }

    /// As [`Pods::create_container`], with an id of the caller's, which nothing else has. Another one is
    /// returned when this call joins one for the same container.
    ///
    /// # Errors
    /// As of [`Pods::create_container`].
    pub async fn create_container_as(
        &self,
        pod: &str,
        id: ContainerId,
        spec: ContainerSpec,
    ) -> Result<ContainerId, PodError> {
        let entry = self.node.registry.sandbox(pod)?;
        let spec = Arc::new(spec);
        let created = ask(&entry, |reply| Command::CreateContainer(id, spec, reply)).await?;
        created.delivered.set();
        Ok(created.id)
    }

    /// Starts a container that was created.
    ///
    /// # Errors
    /// When its process can't be started (it is then `Exited`), or it is not `Created`.
    pub async fn start_container(&self, id: &str) -> Result<(), PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        ask(&entry, |reply| Command::StartContainer(id, reply)).await
    }

    /// Asks a container to end, kills it after `grace`, and returns when it has ended. One that
    /// does not run or is unknown is stopped already.
    ///
    /// # Errors
    /// When it does not end after the kill.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), PodError> {
        let found = self.node.registry.container(id);
        let work = async {
            let (id, entry) = found?;
            ask(&entry, |reply| Command::StopContainer(id, grace, reply)).await
        };
        absent_is_done(work.await)
    }

    /// Removes a container, killing it first when it runs. One that is unknown is removed already.
    ///
    /// # Errors
    /// When it can't be removed; may be repeated.
    pub async fn remove_container(&self, id: &str) -> Result<(), PodError> {
        let found = self.node.registry.container(id);
        let work = async {
            let (id, entry) = found?;
            ask(&entry, |reply| Command::RemoveContainer(id, reply)).await
        };
        absent_is_done(work.await)
    }

    /// Tells about a container.
    ///
    /// # Errors
    /// [`PodError::NotFound`], [`PodError::Ambiguous`].
    pub async fn container(&self, id: &str) -> Result<ContainerInfo, PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        let info = entry.view.borrow().containers.get(&id).cloned();
        info.ok_or_else(|| container_not_found(&id))
    }

    /// Tells about all containers, the newest first.
    pub async fn containers(&self) -> Vec<ContainerInfo> {
        self.select_containers("", |_| true, Clone::clone).await
    }

    /// What `tell` makes of the containers that `selects` wants, of pods whose ids begin with `pod`, the
    /// newest first. Nothing else of them is copied.
    pub async fn select_containers<T>(
        &self,
        pod: &str,
        selects: impl Fn(&ContainerInfo) -> bool,
        tell: impl Fn(&ContainerInfo) -> T,
    ) -> Vec<T> {
        let views = self.node.registry.views(pod);
        let mut selected: Vec<&ContainerInfo> = views
            .iter()
            .flat_map(|view| view.containers.values())
            .filter(|container| selects(container))
            .collect();
        selected.sort_by_key(|info| Reverse(info.created_at_ns));
        selected.into_iter().map(tell).collect()
    }

    /// Tells about a sandbox and its containers at one moment, the newest first.
    ///
    /// # Errors
    /// [`PodError::NotFound`], [`PodError::Ambiguous`].
    pub async fn sandbox_with_containers(
        &self,
        id: &str,
    ) -> Result<(SandboxInfo, Vec<ContainerInfo>), PodError> {
        let entry = self.node.registry.sandbox(id)?;
        let view = Arc::clone(&entry.view.borrow());
        let mut infos: Vec<ContainerInfo> = view.containers.values().cloned().collect();
        infos.sort_by_key(|info| Reverse(info.created_at_ns));
        Ok((view.sandbox.clone(), infos))
    }

    /// Waits until a container has exited and its log is complete.
    ///
    /// # Errors
    /// [`PodError::NotFound`], also when it is removed meanwhile.
    pub async fn wait_container(&self, id: &str) -> Result<ContainerInfo, PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        let mut view = entry.view.subscribe();
        let ended = view
            .wait_for(|view| {
                let container = view.containers.get(&id);
                container.is_none_or(|c| c.state == ContainerState::Exited)
            })
            .await;
        let info = ended
            .ok()
            .and_then(|view| view.containers.get(&id).cloned());
        info.ok_or_else(|| container_not_found(&id))
    }

    /// Changes limits of a container: those that are not zero or empty. They are in force and
    /// recorded when this returns. A container that has exited only records them.
    ///
    /// # Errors
    /// [`PodError::InvalidArgument`] for limits that are wrong in themselves,
    /// [`PodError::FailedPrecondition`] for those above what the VM has. Nothing is changed then.
    pub async fn update_container(&self, id: &str, limits: Resources) -> Result<(), PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        ask(&entry, |reply| {
            Command::UpdateContainer(id, Box::new(limits), reply)
        })
        .await
    }

    /// Takes new sizes for a sandbox; none: as it was. They are recorded when its VM has them.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when its VM is too small, which can't grow, or gone.
    pub async fn update_sandbox(
        &self,
        id: &str,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Result<(), PodError> {
        let entry = self.node.registry.sandbox(id)?;
        let sizes = Box::new((overhead, resources));
        ask(&entry, |reply| Command::UpdateSandbox(sizes, reply)).await
    }

    /// Goes on with a running container's log in a new file at its path, after the old one was
    /// renamed. No byte is lost or doubled.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when the container does not run: its log is complete.
    /// When the file can't be opened; then the old one is gone on with.
    pub async fn reopen_log(&self, id: &str) -> Result<(), PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        let log = ask(&entry, |reply| Command::Log(id, reply)).await?;
        let reopened = log.reopen().await;
        reopened.map_err(|e| PodError::internal("reopen the container's log", e))
    }

    /// Runs a command in a running container; its process tree is killed after `timeout`
    /// (none: no limit), and also when this future is dropped. What it takes to reach the container
    /// is a part of that time, and who waits is told when it is over, whether or not the guest
    /// answers.
    ///
    /// # Errors
    /// [`PodError::DeadlineExceeded`] after `timeout`, [`PodError::ResourceExhausted`] when the pod
    /// runs too many or they write too much; see [`PodError`] for others.
    pub async fn exec_sync(
        &self,
        id: &str,
        args: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput, PodError> {
        if args.is_empty() {
            return Err(PodError::invalid(Field::ExecCommand, "it is empty"));
        }
        let (id, entry) = self.node.registry.container(id)?;
        let _permit = entry.permits.command(exec::ACTION)?;
        let room = exec::Room {
            pod: entry.permits.output(),
            node: Arc::clone(&self.node.exec_output),
        };
        // Unique in the guest, and short.
        let exec_id = ContainerId::random().short().to_owned();
        let command = |reply| Command::Exec(id.clone(), exec_id.clone(), reply);
        let handle = ask(&entry, command);
        exec::sync(handle, &id, &exec_id, args, timeout, &room).await
    }

    /// Starts a command in a running container, with streams and perhaps a terminal.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when the container does not run or the command can't be
    /// executed, [`PodError::ResourceExhausted`] when the pod has too many sessions; see
    /// [`PodError`] for others.
    pub async fn exec(
        &self,
        id: &str,
        args: Vec<String>,
        streams: SessionStreams,
    ) -> Result<ExecSession, PodError> {
        if args.is_empty() {
            return Err(PodError::invalid(Field::ExecCommand, "it is empty"));
        }
        let (id, entry) = self.node.registry.container(id)?;
        let permit = entry.permits.session("run a command in the container")?;
        let exec_id = ContainerId::random().short().to_owned();
        let command = |reply| Command::Exec(id.clone(), exec_id.clone(), reply);
        let handle = ask(&entry, command).await?;
        let agent = handle.agent.clone();
        let work = session::exec::start(handle, permit, id, exec_id, args, streams);
        agent.guard(work).await?
    }

    /// Connects a client to a running container's first process. It sees what the process writes
    /// from now on, and is cut off when it reads much too slowly; the container never waits for
    /// it.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when the container does not run,
    /// [`PodError::InvalidArgument`] when `tty` is not what the container has,
    /// [`PodError::ResourceExhausted`] when the pod has too many sessions; see [`PodError`] for
    /// others.
    pub async fn attach(
        &self,
        id: &str,
        streams: SessionStreams,
    ) -> Result<AttachSession, PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        let permit = entry.permits.session("attach to the container")?;
        let handle = ask(&entry, |reply| Command::Attach(id.clone(), reply)).await?;
        let agent = handle.agent.clone();
        let work = session::attach::start(handle, permit, entry.view.subscribe(), id, streams);
        agent.guard(work).await?
    }

    /// Connects to a TCP port of a sandbox from inside: 127.0.0.1, then ::1.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when nobody listens there or the sandbox is not ready,
    /// [`PodError::ResourceExhausted`] when it has too many connections; see [`PodError`] for
    /// others.
    pub async fn dial(&self, pod: &str, port: u16) -> Result<PodConnection, PodError> {
        let entry = self.node.registry.sandbox(pod)?;
        let permit = entry.permits.dial("connect to the sandbox")?;
        let view = Arc::clone(&entry.view.borrow());
        let agent = view.agent.as_ref();
        let agent = agent.ok_or_else(|| not_ready("reach the guest", &view.sandbox.message))?;
        agent
            .guard(session::dial::dial(agent, permit, port))
            .await?
    }

    /// Counters of a sandbox's VM.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when the VM is gone, [`PodError::Unavailable`] when it does
    /// not answer within a second; see [`PodError`] for others.
    pub async fn vm_metrics(&self, id: &str) -> Result<hull_proto_vmm::Metrics, PodError> {
        let entry = self.node.registry.sandbox(id)?;
        // Its task may be busy with ending a VM that does not answer.
        let view = Arc::clone(&entry.view.borrow());
        let vm = view.vm.as_ref();
        let vm = vm.ok_or_else(|| not_ready("reach the VM", &view.sandbox.message))?;
        Ok(vm.metrics(QUESTION).await?)
    }

    /// The processes of a running container.
    ///
    /// # Errors
    /// [`PodError::FailedPrecondition`] when the sandbox is not ready, [`PodError::Unavailable`] when its guest
    /// does not answer within a second; see [`PodError`] for others.
    pub async fn processes(&self, id: &str) -> Result<Processes, PodError> {
        let (id, entry) = self.node.registry.container(id)?;
        let view = Arc::clone(&entry.view.borrow());
        let agent = view.agent.as_ref();
        let agent = agent.ok_or_else(|| not_ready("reach the guest", &view.sandbox.message))?;
        let told = agent.guard(agent.processes(id.as_str(), QUESTION)).await?;
        Ok(told?)
    }

    /// The memory of a sandbox's processes on the host, looked at page by page; none when its VM
    /// is gone, or that takes more than a second.
    ///
    /// # Errors
    /// [`PodError::NotFound`], [`PodError::Ambiguous`].
    pub async fn process_memory(&self, id: &str) -> Result<Option<ProcessMemory>, PodError> {
        let Some(vm) = self.sandbox(id).await?.vm else {
            return Ok(None);
        };
        let looked = timeout(QUESTION, blocking(move || host::memory(&vm)));
        Ok(looked.await.ok())
    }

    /// What pods use. All are asked at once, and none waits for another.
    pub async fn stats(&self, wanted: &HashSet<PodId>, scope: Scope) -> Vec<PodStats> {
        gather(&self.node, wanted, scope).await
    }

    /// What of the records was lost when this daemon started, for a person; empty: nothing.
    #[must_use]
    pub fn record_faults(&self) -> &[String] {
        &self.node.faults
    }

    /// News of all pods from now on.
    ///
    /// # Errors
    /// [`PodError::ResourceExhausted`] when too many follow them.
    pub fn events(&self) -> Result<Events, PodError> {
        self.node.events.follow()
    }
}

/// Sends a command to a pod's task and waits for the answer.
async fn ask<T>(
    entry: &PodEntry,
    command: impl FnOnce(Reply<T>) -> Command,
) -> Result<T, PodError> {
    // The task ends when the pod is removed, or in a panic, of which the pod tells.
    let ended = || match entry.view.borrow().phase {
        Phase::Gone => PodError::NotFound {
            object: ObjectKind::Sandbox,
            id: entry.id.to_string(),
        },
        Phase::Starting | Phase::Up => PodError::internal("ask the pod's task", TaskEnded),
    };
    let (reply, answer) = oneshot::channel();
    let sent = entry.commands.send((command(reply), Call::current())).await;
    sent.map_err(|_| ended())?;
    answer.await.map_err(|_| ended())?
}

/// What was asked of a pod's task was not done, or it is not known whether.
#[derive(Debug, thiserror::Error)]
#[error("it ended by an internal error")]
struct TaskEnded;

fn absent_is_done(result: Result<(), PodError>) -> Result<(), PodError> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
