//! The task that owns a pod. Callers send it commands; it alone changes the pod's state, runs
//! the effects that `lifecycle` decides on, and publishes a view that callers read without it.
//!
//! ```text
//! Pods ──Command──▶ ┌────────┐ ──spawn──▶ operation (agent call, timer, log) ──Done──┐
//!                   │ Driver │ ◀────────────────────────────────────────────────────┘
//! guest events ───▶ │        │ ──view──▶ Pods (list, status, wait)
//! VM gone ────────▶ └────────┘ ──record──▶ hull.redb, before every answer
//! ```
//!
//! What takes time in a container runs beside the task, so a stop with a long grace period blocks
//! nothing else. The start, stop and removal of the whole sandbox run in the task itself:
//! commands wait until they are over.
//!
//! A panic of the task or of an operation ends the task, and what it did not answer fails. Then the
//! pod is taken over from its record as after a restart of the daemon, but for its VM, which is
//! killed ([`crate::recover::supervise`]).

mod container;
mod create;
mod sandbox;
mod update;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinSet,
};

use hull_base::{
    clock,
    panics::{Panic, caught},
};
use hull_spec::{
    error::{ObjectKind, PodError},
    id::{ContainerId, PodId},
    info::{BootTimes, ContainerState, SandboxInfo, SandboxState, VmInfo},
    spec::{ContainerSpec, Resources},
};
use hull_vm::{
    agent::{
        client::Agent,
        events::{GuestEvent, ProcessExit},
        stdio::{OutputEnd, OutputKind},
    },
    client::VmClient,
    process::Process,
};

use crate::{
    events::{EventKind, PodEvent},
    lifecycle::{container as container_life, sandbox as sandbox_life},
    logs::{
        fanout::LiveOutput,
        pump::{ContainerLog, LogHandle},
    },
    network::{Follower, NetworkNews},
    node::Node,
    record::{ContainerRecord, SandboxRecord},
    registry::{Delivered, Phase, PodEntry, PodView},
    session::Permits,
    storage::{files::HostFiles, images::ImageDisks, volumes::LiveVolumes},
};

/// How many commands may wait for a pod's task.
const COMMANDS: usize = 256;

/// Where an answer goes; the caller may be gone.
pub(crate) type Reply<T = ()> = oneshot::Sender<Result<T, PodError>>;

/// What a pod is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    StopSandbox(Reply),
    RemoveSandbox(Reply),
    CreateContainer(Arc<ContainerSpec>, Reply<CreatedContainer>),
    StartContainer(ContainerId, Reply),
    StopContainer(ContainerId, Duration, Reply),
    RemoveContainer(ContainerId, Reply),
    /// Announces an exec, so that its end can be waited for.
    Exec(ContainerId, String, Reply<ExecHandle>),
    /// Follows the output of a container's first process.
    Attach(ContainerId, Reply<AttachHandle>),
    /// Changes limits of a container.
    UpdateContainer(ContainerId, Box<Resources>, Reply),
    /// Changes overhead and resources of the sandbox.
    UpdateSandbox(Box<(Option<Resources>, Option<Resources>)>, Reply),
    /// The log of a running container.
    Log(ContainerId, Reply<LogHandle>),
}

/// A container that was created; whoever gets this says so.
#[derive(Debug)]
pub(crate) struct CreatedContainer {
    pub id: ContainerId,
    pub delivered: Delivered,
}

/// What a caller needs to run a command in a container.
#[derive(Debug)]
pub(crate) struct ExecHandle {
    pub agent: Agent,
    pub stdout_end: watch::Receiver<OutputEnd>,
    pub stderr_end: watch::Receiver<OutputEnd>,
    /// Closed without a value when the VM is gone.
    pub exited: oneshot::Receiver<ProcessExit>,
}

/// What a caller needs to attach to a container.
#[derive(Debug)]
pub(crate) struct AttachHandle {
    pub agent: Agent,
    pub tty: bool,
    /// Whether it has an input.
    pub stdin: bool,
    pub stdout: LiveOutput,
    /// None: it has a terminal.
    pub stderr: Option<LiveOutput>,
}

/// The parts of a pod that exist while its VM runs.
#[derive(Debug)]
pub(crate) struct Live {
    pub vm: VmClient,
    pub agent: Agent,
    pub events: mpsc::Receiver<GuestEvent>,
    pub disks: Arc<Mutex<ImageDisks>>,
    pub volumes: LiveVolumes,
    /// None: it has no network.
    _network: Option<Follower>,
}

/// A container of the pod.
#[derive(Debug)]
pub(crate) struct Container {
    pub record: ContainerRecord,
    pub state: container_life::State,
    pub log: Option<ContainerLog>,
    pub waiters: Vec<(container_life::Wait, Reply)>,
    pub creators: Vec<Reply<CreatedContainer>>,
    pub delivered: Delivered,
    /// Changes of its limits; the first one is being carried out.
    pub updates: VecDeque<(Resources, Reply)>,
}

/// What an operation in the background came to.
#[derive(Debug)]
enum Done {
    Created(ContainerId, Result<create::Parts, PodError>),
    Event(ContainerId, container_life::Event),
    Updated(ContainerId, Result<Resources, PodError>),
    FilesEnded,
    Network(NetworkNews),
    /// What is wrong with copies of volumes; empty: nothing.
    Volumes(String),
    /// It has no result, and those who wait for one can't be answered.
    Panicked(Panic),
}

/// What reaches the task besides commands.
#[derive(Debug)]
enum Input {
    Done(Done),
    Guest(GuestEvent),
    VmGone,
}

/// Owns one pod.
#[derive(Debug)]
pub(crate) struct Driver {
    node: Arc<Node>,
    record: SandboxRecord,
    phase: Phase,
    boot: Option<BootTimes>,
    live: Option<Live>,
    /// Ended after the VM, also when there never was a [`Live`] of this daemon.
    files: Arc<Mutex<HostFiles>>,
    /// Whether the end of the file server is waited for, or was seen.
    watches_files: bool,
    /// Its record can't be read, so what it has may be more than its record says.
    stands_in: bool,
    /// What is wrong with the pod although it goes on: the file server, and copies of volumes.
    warning: String,
    volumes_warning: String,
    containers: BTreeMap<ContainerId, Container>,
    execs: HashMap<(ContainerId, String), ExecEnd>,
    commands: mpsc::Receiver<Command>,
    done: mpsc::UnboundedSender<Done>,
    dones: mpsc::UnboundedReceiver<Done>,
    operations: JoinSet<()>,
    view: watch::Sender<Arc<PodView>>,
    started: watch::Sender<Option<Result<(), PodError>>>,
}

#[derive(Debug)]
struct ExecEnd {
    stdout: watch::Sender<OutputEnd>,
    stderr: watch::Sender<OutputEnd>,
    exited: oneshot::Sender<ProcessExit>,
}

impl Driver {
    /// A driver for a sandbox, and the entry by which it is reached.
    pub(crate) fn new(node: Arc<Node>, record: SandboxRecord, phase: Phase) -> (Self, PodEntry) {
        let empty = PodView {
            phase,
            sandbox: sandbox_info(&record, None, ""),
            containers: BTreeMap::new(),
            vm: None,
            agent: None,
        };
        let (commands, _) = mpsc::channel(1);
        let entry = PodEntry {
            id: record.id.clone(),
            spec: Arc::clone(&record.spec),
            commands,
            view: watch::Sender::new(Arc::new(empty)),
            started: watch::Sender::new(None),
            delivered: Delivered::default(),
            permits: Permits::default(),
        };
        Self::behind(entry, node, record, phase)
    }

    /// A driver in the place of one that is gone; who waits for that one's pod goes on waiting.
    pub(crate) fn behind(
        mut entry: PodEntry,
        node: Arc<Node>,
        record: SandboxRecord,
        phase: Phase,
    ) -> (Self, PodEntry) {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let (done, dones) = mpsc::unbounded_channel();
        entry.commands = sender;
        let driver = Self {
            node,
            record,
            phase,
            boot: None,
            live: None,
            files: Arc::default(),
            watches_files: false,
            stands_in: false,
            warning: String::new(),
            volumes_warning: String::new(),
            containers: BTreeMap::new(),
            execs: HashMap::new(),
            commands,
            done,
            dones,
            operations: JoinSet::new(),
            view: entry.view.clone(),
            started: entry.started.clone(),
        };
        (driver, entry)
    }

    /// Tells those who ask for the same sandbox again that it was started before.
    pub(crate) fn adopted(&self) {
        self.started.send_if_modified(|started| {
            let is_news = started.is_none();
            started.get_or_insert(Ok(()));
            is_news
        });
    }

    /// The pod's id.
    pub(crate) fn id(&self) -> &PodId {
        &self.record.id
    }

    /// Runs until the pod is gone.
    pub(crate) async fn run(mut self) {
        while self.record.state != sandbox_life::State::Gone {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    // The registry is gone, and with it the daemon; the pod goes on without.
                    None => return,
                },
                input = next_input(&mut self.live, &mut self.dones) => self.input(input).await,
            }
        }
    }

    async fn command(&mut self, command: Command) {
        match command {
            Command::StopSandbox(reply) => {
                let result = self.sandbox_event(sandbox_life::Event::Stop).await;
                self.publish();
                let _ = reply.send(result);
            }
            Command::RemoveSandbox(reply) => {
                let result = self.sandbox_event(sandbox_life::Event::Remove).await;
                self.publish();
                let _ = reply.send(result);
            }
            Command::CreateContainer(spec, reply) => self.create_container(spec, reply).await,
            Command::StartContainer(id, reply) => {
                let (wait, event) = (container_life::Wait::Started, container_life::Event::Start);
                self.ask_container(&id, wait, event, reply).await;
            }
            Command::StopContainer(id, grace, reply) => {
                let event = container_life::Event::Stop { grace };
                self.ask_container(&id, container_life::Wait::Stopped, event, reply)
                    .await;
            }
            Command::RemoveContainer(id, reply) => {
                let (wait, event) = (container_life::Wait::Removed, container_life::Event::Remove);
                self.ask_container(&id, wait, event, reply).await;
            }
            Command::Exec(id, exec, reply) => {
                // A caller that is gone has no use for the handle.
                let _ = reply.send(self.exec(id, exec));
            }
            Command::UpdateContainer(id, limits, reply) => {
                self.update_container(&id, *limits, reply);
            }
            Command::UpdateSandbox(sizes, reply) => {
                let (overhead, resources) = *sizes;
                let _ = reply.send(self.update_sandbox(overhead, resources).await);
            }
            Command::Log(id, reply) => {
                let _ = reply.send(self.log(&id));
            }
            Command::Attach(id, reply) => {
                let _ = reply.send(self.attach(&id));
            }
        }
    }

    async fn input(&mut self, input: Input) {
        match input {
            Input::VmGone => {
                // Its effects never fail but for the record, which was logged.
                let _ = self.sandbox_event(sandbox_life::Event::VmGone).await;
                self.publish();
            }
            other => self.quiet_input(other).await,
        }
    }

    /// Handles what does not change the sandbox's own state.
    async fn quiet_input(&mut self, input: Input) {
        match input {
            Input::Done(Done::Created(id, result)) => self.created(id, result).await,
            Input::Done(Done::Event(id, event)) => self.container_event(&id, event).await,
            Input::Done(Done::Updated(id, result)) => self.updated(&id, result).await,
            Input::Done(Done::Panicked(panic)) => panic.resume(),
            Input::Done(Done::FilesEnded) => self.files_ended(),
            Input::Done(Done::Network(news)) => self.network_changed(news).await,
            Input::Done(Done::Volumes(warning)) => {
                self.volumes_warning = warning;
                self.publish();
            }
            Input::Guest(GuestEvent::Exited(exit)) => self.process_exited(exit).await,
            Input::Guest(GuestEvent::Failed(why)) => {
                // An agent that can't be heard or believed is as good as none: its VM ends, and
                // that is what is told.
                if let Some(vmm) = self.vmm() {
                    tracing::warn!(pod = %self.id(), %why, "the VM is killed");
                    self.record.message = why;
                    vmm.kill();
                }
            }
            Input::VmGone => self.vm_gone(sandbox::VmEnd::Asked).await,
        }
    }

    fn exec(&mut self, id: ContainerId, exec: String) -> Result<ExecHandle, PodError> {
        const ACTION: &str = "run a command in the container";
        let Some(container) = self.containers.get(&id) else {
            return Err(container_not_found(&id));
        };
        if !matches!(
            container.state,
            container_life::State::Running | container_life::State::Terminating(_)
        ) {
            return Err(PodError::precondition(ACTION, "it is not running"));
        }
        let Some(live) = &self.live else {
            return Err(self.not_ready(ACTION));
        };
        // Those whose callers went away before their command was started.
        self.execs.retain(|_, end| !end.exited.is_closed());
        let (stdout, stdout_end) = watch::channel(OutputEnd::Open);
        let (stderr, stderr_end) = watch::channel(OutputEnd::Open);
        let (exited, receiver) = oneshot::channel();
        let handle = ExecHandle {
            agent: live.agent.clone(),
            stdout_end,
            stderr_end,
            exited: receiver,
        };
        let end = ExecEnd {
            stdout,
            stderr,
            exited,
        };
        self.execs.insert((id, exec), end);
        Ok(handle)
    }

    fn attach(&self, id: &ContainerId) -> Result<AttachHandle, PodError> {
        use container_life::State;
        const ACTION: &str = "attach to the container";
        let Some(container) = self.containers.get(id) else {
            return Err(container_not_found(id));
        };
        if !matches!(
            container.state,
            State::Created | State::Starting | State::Running | State::Terminating(_)
        ) {
            return Err(PodError::precondition(ACTION, "it is not running"));
        }
        let Some(live) = &self.live else {
            return Err(self.not_ready(ACTION));
        };
        let Some(log) = &container.log else {
            return Err(PodError::precondition(ACTION, "its log can't be written"));
        };
        let spec = &container.record.spec;
        Ok(AttachHandle {
            agent: live.agent.clone(),
            tty: spec.tty,
            stdin: spec.stdin,
            stdout: log.follow(OutputKind::Stdout),
            stderr: (!spec.tty).then(|| log.follow(OutputKind::Stderr)),
        })
    }

    fn log(&self, id: &ContainerId) -> Result<LogHandle, PodError> {
        const ACTION: &str = "reopen the container's log";
        let container = self.containers.get(id);
        let container = container.ok_or_else(|| container_not_found(id))?;
        if container.info().state != ContainerState::Running {
            return Err(PodError::precondition(ACTION, "it is not running"));
        }
        let log = container.log.as_ref().map(ContainerLog::file);
        log.ok_or_else(|| PodError::precondition(ACTION, "it can't be written"))
    }

    async fn process_exited(&mut self, exit: ProcessExit) {
        let Ok(id) = ContainerId::try_from(exit.container.clone()) else {
            return;
        };
        if exit.exec.is_empty() {
            self.init_exited(&id, &exit).await;
        } else if let Some(end) = self.execs.remove(&(id, exit.exec.clone())) {
            end.stdout.send_replace(OutputEnd::At(exit.stdout_bytes));
            end.stderr.send_replace(OutputEnd::At(exit.stderr_bytes));
            let _ = end.exited.send(exit);
        }
    }

    /// Waits for the end of the server of files that containers mount. No other can take its
    /// place: it would know nothing of what the guest has open.
    pub(crate) fn watch_files(&mut self) {
        if self.watches_files {
            return;
        }
        self.watches_files = true;
        let files = Arc::clone(&self.files);
        self.spawn(async move {
            // None: it ended before this daemon began.
            let server = files.lock().await.process();
            if let Some(server) = server {
                server.ended().await;
            }
            Done::FilesEnded
        });
    }

    /// The VMM, while it runs.
    fn vmm(&self) -> Option<Process> {
        Process::find(self.record.vm?.process)
    }

    /// Says so. The pod goes on: who needs no files of the host is not hurt.
    fn files_ended(&mut self) {
        if self.live.is_none() || self.vmm().is_none() {
            // It ends with its VM.
            return;
        }
        tracing::warn!(pod = %self.id(), "the pod's file server ended, its host paths fail");
        self.warning = "the file server ended: paths of the host fail with EIO until the pod is \
                        replaced"
            .into();
        self.publish();
    }

    /// Starts work that ends with a `Done`.
    fn spawn(&mut self, work: impl Future<Output = Done> + Send + 'static) {
        while self.operations.try_join_next().is_some() {}
        let done = self.done.clone();
        self.operations.spawn(async move {
            let ended = caught(work).await.unwrap_or_else(Done::Panicked);
            // An error means that the pod's task is gone.
            let _ = done.send(ended);
        });
    }

    /// Makes the present state visible.
    pub(crate) fn publish(&self) {
        let containers = self
            .containers
            .iter()
            .filter(|(_, container)| container.is_visible())
            .map(|(id, container)| (id.clone(), container.info()))
            .collect();
        let mut warnings = vec![self.warning.as_str(), self.volumes_warning.as_str()];
        warnings.retain(|warning| !warning.is_empty());
        self.view.send_replace(Arc::new(PodView {
            phase: self.phase,
            sandbox: sandbox_info(&self.record, self.boot, &warnings.join("; ")),
            containers,
            vm: self.live.as_ref().map(|live| live.vm.clone()),
            agent: self.live.as_ref().map(|live| live.agent.clone()),
        }));
    }

    /// Tells those who follow events, with what is visible now.
    fn tell(&self, kind: EventKind, container: Option<ContainerId>) {
        let view = Arc::clone(&self.view.borrow());
        let event = PodEvent::new(kind, container, clock::now_ns(), view);
        self.node.events.announce(event);
    }

    async fn save(&self) -> Result<(), PodError> {
        let saved = self.node.records.put_sandbox(&self.record).await;
        saved.map_err(|error| {
            let cause = &error as &dyn std::error::Error;
            tracing::error!(pod = %self.id(), error = cause, "write the sandbox's record");
            error.into()
        })
    }

    fn not_ready(&self, action: &str) -> PodError {
        not_ready(action, &self.record.message)
    }
}

/// The refusal of what needs a VM; `message` says why there is none.
pub(crate) fn not_ready(action: &str, message: &str) -> PodError {
    let reason = if message.is_empty() {
        "the sandbox is not ready".to_owned()
    } else {
        format!("the sandbox is not ready: {message}")
    };
    PodError::precondition(action, reason)
}

/// Guest events come before the news that the VM is gone, which come before everything else.
async fn next_input(live: &mut Option<Live>, dones: &mut mpsc::UnboundedReceiver<Done>) -> Input {
    let done = async {
        match dones.recv().await {
            Some(done) => Input::Done(done),
            // The driver holds a sender itself.
            None => std::future::pending().await,
        }
    };
    match live {
        None => done.await,
        Some(live) => tokio::select! {
            biased;
            Some(event) = live.events.recv() => Input::Guest(event),
            () = live.vm.gone() => Input::VmGone,
            input = done => input,
        },
    }
}

fn sandbox_info(record: &SandboxRecord, boot: Option<BootTimes>, warning: &str) -> SandboxInfo {
    let netns = record.network.as_ref().map(|n| n.netns.clone());
    SandboxInfo {
        id: record.id.clone(),
        spec: Arc::clone(&record.spec),
        state: match record.state {
            sandbox_life::State::Ready => SandboxState::Ready,
            _ => SandboxState::NotReady,
        },
        message: record.message.clone(),
        created_at_ns: record.created_at_ns,
        ips: record.ips.clone(),
        vm: record.vm.map(|vm| VmInfo {
            pid: vm.process.pid,
            vcpus: vm.size.vcpus,
            memory_mib: vm.size.memory_mib,
            netns: netns.unwrap_or_default(),
            cgroup: record.cgroup.as_ref().map(|c| c.path().to_owned()),
            warning: warning.to_owned(),
        }),
        guest: record.guest.clone(),
        boot,
    }
}

fn container_not_found(id: &ContainerId) -> PodError {
    PodError::NotFound {
        object: ObjectKind::Container,
        id: id.to_string(),
    }
}

/// Events that follow from each other, in order.
type Queue<T> = VecDeque<T>;
