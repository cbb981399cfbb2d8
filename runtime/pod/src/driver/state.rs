//! The state of a pod's task, and what all of its parts do with it: start work, write the record, and
//! publish.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use tokio::sync::{Mutex, mpsc, oneshot, watch};

use hull_base::{blocking, clock, stages::Call};
use hull_spec::{
    error::PodError,
    id::{ContainerId, PodId},
    info::{BootTimes, SandboxInfo, SandboxState, VmInfo},
};
use hull_vm::{
    agent::{
        events::{GuestEvent, ProcessExit},
        stdio::OutputEnd,
        wall_clock::WallClock,
    },
    process::Process,
    running::RunningVm,
};

use super::{
    container::Container,
    operations::{Done, Input, Operations},
};
use crate::{
    command::{Command, Delivered, not_ready},
    container::restored::Restore,
    events::{EventKind, PodEvent},
    lifecycle::sandbox as lifecycle,
    logs::{pump::ContainerLog, share::Share},
    network::Follower,
    node::Node,
    record::SandboxRecord,
    registry::{Phase, PodEntry, PodView},
    session::permits::Permits,
    storage::{atomic_volumes::AtomicVolumes, attachments::Attachments, host_files::HostFiles},
    users::User,
};

/// How many commands may wait for a pod's task.
const COMMANDS: usize = 256;

/// The parts of a pod that exist while its VM runs.
#[derive(Debug)]
pub(super) struct Running {
    pub attachments: Attachments,
    pub events: mpsc::Receiver<GuestEvent>,
    pub volumes: AtomicVolumes,
    pub _clock: WallClock,
    /// Follows the pod's network; none: it has none.
    pub _network: Option<Follower>,
}

impl Running {
    pub(super) fn vm(&self) -> &RunningVm {
        &self.attachments.vm
    }
}

/// What is wrong with a pod although it goes on; empty: nothing.
#[derive(Debug, Default)]
pub(super) struct Warnings {
    pub file_server: String,
    /// Of the copies of volumes.
    pub volumes: String,
}

/// What callers see without the task.
#[derive(Debug)]
pub(super) struct Public {
    pub view: watch::Sender<Arc<PodView>>,
    pub started: watch::Sender<Option<Result<(), PodError>>>,
}

/// Owns one pod.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(super) node: Arc<Node>,
    pub(super) record: SandboxRecord,
    /// The VMM's, as long as the pod exists.
    pub(super) user: Option<User>,
    pub(super) phase: Phase,
    pub(super) boot: Option<BootTimes>,
    pub(super) running: Option<Running>,
    /// Ended after the VM, also when this daemon never had its connections.
    pub(super) files: Arc<Mutex<HostFiles>>,
    /// Whether the end of the file server is waited for, or was seen.
    pub(super) watches_files: bool,
    /// What it goes on from when it is brought up; none: from nothing.
    pub(crate) restore: Option<Restore>,
    /// Whether a checkpoint of it is being written.
    pub(super) is_saving: bool,
    /// Its record can't be read, so what it has may be more than its record says.
    pub(super) stands_in: bool,
    pub(super) warnings: Warnings,
    pub(super) containers: BTreeMap<ContainerId, Container>,
    /// Of its containers' outputs.
    pub(super) log_share: Share,
    pub(super) execs: HashMap<(ContainerId, String), ExecEnd>,
    pub(super) commands: mpsc::Receiver<(Command, Call)>,
    pub(super) operations: Operations,
    pub(super) public: Public,
}

/// Who waits for the end of an exec.
#[derive(Debug)]
pub(super) struct ExecEnd {
    pub stdout: watch::Sender<OutputEnd>,
    pub stderr: watch::Sender<OutputEnd>,
    pub exited: oneshot::Sender<ProcessExit>,
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
        entry.commands = sender;
        let driver = Self {
            user: Some(node.users.claim(record.user)),
            node,
            record,
            phase,
            boot: None,
            running: None,
            files: Arc::default(),
            watches_files: false,
            restore: None,
            is_saving: false,
            stands_in: false,
            warnings: Warnings::default(),
            containers: BTreeMap::new(),
            log_share: Share::default(),
            execs: HashMap::new(),
            commands,
            operations: Operations::default(),
            public: Public {
                view: entry.view.clone(),
                started: entry.started.clone(),
            },
        };
        (driver, entry)
    }

    /// Tells those who ask for the same sandbox again that it was started before.
    pub(crate) fn adopted(&self) {
        self.public.started.send_if_modified(|started| {
            let is_news = started.is_none();
            started.get_or_insert(Ok(()));
            is_news
        });
    }

    /// The pod's id.
    pub(crate) fn id(&self) -> &PodId {
        &self.record.id
    }

    /// Waits for the end of the server of files that containers mount. No other can take its
    /// place: it would know nothing of what the guest has open.
    pub(crate) fn watch_files(&mut self) {
        if self.watches_files {
            return;
        }
        self.watches_files = true;
        let files = Arc::clone(&self.files);
        self.operations.spawn(async move {
            // None: it ended before this daemon began.
            let server = files.lock().await.process();
            if let Some(server) = server {
                server.ended().await;
            }
            Done::FilesEnded
        });
    }

    /// The VMM, while it runs.
    pub(super) fn vmm(&self) -> Option<Process> {
        self.node.processes.find(self.record.vm?.process)
    }

    /// Makes the present state visible.
    pub(crate) fn publish(&self) {
        let containers = self
            .containers
            .iter()
            .filter(|(_, container)| container.is_visible())
            .map(|(id, container)| (id.clone(), container.info()))
            .collect();
        let Warnings {
            file_server,
            volumes,
        } = &self.warnings;
        let mut warnings = vec![file_server.as_str(), volumes.as_str()];
        warnings.retain(|warning| !warning.is_empty());
        let vm = self.running.as_ref().map(Running::vm);
        let view = PodView {
            phase: self.phase,
            sandbox: sandbox_info(&self.record, self.boot.clone(), &warnings.join("; ")),
            containers,
            vm: vm.map(|vm| vm.control.clone()),
            agent: vm.map(|vm| vm.agent.clone()),
        };
        self.node.registry.publish(&self.public.view, view);
    }

    /// Tells those who follow events, with what is visible now.
    pub(super) fn tell(&self, kind: EventKind, container: Option<ContainerId>) {
        let view = Arc::clone(&self.public.view.borrow());
        let event = PodEvent::new(kind, container, clock::now_ns(), view);
        self.node.events.announce(event);
    }

    pub(super) async fn save(&self) -> Result<(), PodError> {
        let saved = self.node.records.put_sandbox(&self.record).await;
        saved.map_err(|error| {
            let cause = &error as &dyn std::error::Error;
            tracing::error!(pod = %self.id(), error = cause, "write the sandbox's record");
            error.into()
        })
    }

    pub(super) fn not_ready(&self, action: &str) -> PodError {
        not_ready(action, &self.record.message)
    }

    /// Adds a container that an earlier daemon made.
    pub(crate) fn insert(&mut self, container: Container) {
        self.containers
            .insert(container.record.id.clone(), container);
    }

    /// What the outputs of the pod's containers share.
    pub(crate) fn log_share(&self) -> Share {
        self.log_share.clone()
    }

    /// Adds the log of a container that an earlier daemon made.
    pub(crate) fn insert_log(&mut self, id: &ContainerId, log: ContainerLog) {
        if let Some(container) = self.containers.get_mut(id) {
            container.log = Some(log);
        }
    }

    /// Watches the volumes of containers that an earlier daemon made. What changed since then is
    /// looked for at once.
    pub(crate) async fn watch_volumes(&mut self) {
        let Some(running) = &mut self.running else {
            return;
        };
        for (id, container) in &self.containers {
            let (node, spec) = (Arc::clone(&self.node), Arc::clone(&container.record.spec));
            let changed = Arc::clone(running.volumes.changed());
            let watched = blocking(move || node.watches.watch(&spec, &changed)).await;
            running.volumes.keep(id.clone(), watched);
        }
        running.volumes.changed().notify_one();
    }

    /// The files of the host that its containers mount.
    pub(crate) fn files(&self) -> &Arc<Mutex<HostFiles>> {
        &self.files
    }

    /// Lets the sandbox stand in for one whose record can't be read.
    pub(crate) fn stands_in(&mut self) {
        self.stands_in = true;
    }

    /// Notes why the sandbox is not ready.
    pub(crate) fn note(&mut self, message: String) {
        self.record.message = message;
    }
}

/// Waits for what comes next besides commands. Guest events come before the news that the VM is gone, which
/// come before everything else.
pub(super) async fn next_input(
    running: &mut Option<Running>,
    operations: &mut Operations,
) -> (Input, Call) {
    let of_done = |(done, call)| (Input::Done(done), call);
    let Some(running) = running else {
        return of_done(operations.next().await);
    };
    let control = &running.attachments.vm.control;
    tokio::select! {
        biased;
        Some(event) = running.events.recv() => (Input::Guest(event), Call::none()),
        () = control.gone() => (Input::VmGone, Call::none()),
        done = operations.next() => of_done(done),
    }
}

fn sandbox_info(record: &SandboxRecord, boot: Option<BootTimes>, warning: &str) -> SandboxInfo {
    let netns = record.network.as_ref().map(|n| n.netns.clone());
    SandboxInfo {
        id: record.id.clone(),
        spec: Arc::clone(&record.spec),
        state: match record.state {
            lifecycle::State::Ready => SandboxState::Ready,
            _ => SandboxState::NotReady,
        },
        message: record.message.clone(),
        created_at_ns: record.created_at_ns,
        ips: record.ips.clone(),
        vm: record.vm.map(|vm| VmInfo {
            pid: vm.process.pid,
            vcpus: vm.size.vcpus,
            memory_mib: vm.size.memory_mib,
            max_memory_mib: vm.size.max_memory_mib(),
            netns: netns.unwrap_or_default(),
            cgroup: record.cgroup.as_ref().map(|c| c.path().to_owned()),
            warning: warning.to_owned(),
        }),
        guest: record.guest.clone(),
        boot,
    }
}

/// Events that follow from each other, in order.
pub(super) type Queue<T> = VecDeque<T>;
