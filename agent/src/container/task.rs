//! The task that owns one container.
//!
//! ```text
//!   create ──▶ created ──start──▶ running ──┐
//!     │           │                         │ first process ends
//!     ▼           └────── killed ───────────┴──▶ stopped ──delete──▶ gone
//!  gone (undone)
//! ```
//! The state is not stored: whether the first process ended says one half,
//! whether it was let go the other.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use hull_proto_agent::agent::{CreateRequest, ExecRequest};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tracing::{info, warn};

use super::{
    cgroup::Cgroup,
    context::Context,
    create::{Created, create},
    error::ContainerError,
    exec::Execs,
    family,
    launch::Gate,
    made::{Made, Public},
    process::{Ended, StartFailure},
    update::{self, Change},
};
use crate::{blocking::blocking, ident::Id, pidfd::Process};

/// How long a killed container may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the first process may take to execute its command.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Names of signals that are remembered.
const SENT: usize = 16;

/// A signal and who gets it.
#[derive(Debug, Clone)]
pub(crate) struct Sending {
    /// `None`: the container's first process.
    pub(crate) exec: Option<Id>,
    pub(crate) signal: i32,
    /// All that the process started get it too.
    pub(crate) all: bool,
    /// When not empty: it is sent once under this name.
    pub(crate) once: String,
}

/// Where a task sends its answer.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, ContainerError>>;

/// What the host can ask of a container.
#[derive(Debug)]
pub(crate) enum Command {
    /// Answers when the container is made.
    Created(Reply<Made>),
    Start(Reply<()>),
    Signal {
        sending: Sending,
        reply: Reply<()>,
    },
    Delete {
        force: bool,
        reply: Reply<()>,
    },
    Exec {
        request: Box<ExecRequest>,
        reply: Reply<i32>,
    },
    Update {
        change: Box<Change>,
        reply: Reply<()>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    Running,
    Stopped,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// Makes the container and serves `queue` until it is deleted. Returns the
/// queue, so that the caller can close it after giving up the name.
pub(crate) async fn run(
    context: Arc<Context>,
    id: Id,
    request: Arc<CreateRequest>,
    target: Option<Arc<Process>>,
    public: Arc<Public>,
    mut queue: mpsc::Receiver<Command>,
) -> mpsc::Receiver<Command> {
    let created = match create(&context, &id, &request, target).await {
        Ok(created) => created,
        Err(e) => {
            refuse_creation(&mut queue, e).await;
            return queue;
        }
    };
    info!(container = %id, pid = %created.made.init.pid(), "created");
    public
        .stdio()
        .insert(String::new(), Arc::clone(&created.stdio));
    let _ = public.made.set(created.made.clone());
    if context.huge_pages.has(&id) {
        tokio::spawn(release_at_end(&context, &id, created.ended.clone()));
    }
    let mut task = Task {
        context,
        id,
        public,
        created,
        started: None,
        execs: Execs::default(),
        sent: VecDeque::new(),
    };
    while let Some(command) = queue.recv().await {
        if task.serve(command).await == Next::End {
            break;
        }
    }
    queue
}

/// Takes the huge pages of a container away when it ends: the next one of the pod may need them.
fn release_at_end(
    context: &Context,
    id: &Id,
    mut ended: Ended,
) -> impl Future<Output = ()> + use<> {
    let (pages, id) = (Arc::clone(&context.huge_pages), id.clone());
    async move {
        // An error means that nobody can tell, as at the removal.
        let _ = ended.wait_for(Option::is_some).await;
        let container = id.clone();
        if let Err(error) = blocking(move || pages.release(&id)).await {
            warn!(%container, error = &error as &dyn std::error::Error, "release huge pages");
        }
    }
}

/// Gives the reason to the first who asked for the container.
async fn refuse_creation(queue: &mut mpsc::Receiver<Command>, error: ContainerError) {
    warn!(
        error = &error as &dyn std::error::Error,
        "create a container"
    );
    if let Some(Command::Created(reply)) = queue.recv().await {
        let _ = reply.send(Err(error));
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    Serve,
    End,
}

#[derive(Debug)]
struct Task {
    context: Arc<Context>,
    id: Id,
    public: Arc<Public>,
    created: Created,
    /// How the start went, if there was one.
    started: Option<Result<(), StartFailure>>,
    execs: Execs,
    /// Names of the last signals that were to be sent once.
    sent: VecDeque<String>,
}

impl Task {
    /// Serves one command. Who asked may be gone: the effect is what counts.
    async fn serve(&mut self, command: Command) -> Next {
        match command {
            Command::Created(reply) => drop(reply.send(Ok(self.created.made.clone()))),
            Command::Start(reply) => drop(reply.send(self.start().await)),
            Command::Signal { sending, reply } => drop(reply.send(self.signal_once(sending))),
            Command::Exec { request, reply } => drop(reply.send(self.exec(*request).await)),
            Command::Update { change, reply } => {
                drop(reply.send(self.update(*change).await));
            }
            Command::Delete { force, reply } => {
                let result = self.delete(force).await;
                let next = if result.is_ok() {
                    Next::End
                } else {
                    Next::Serve
                };
                let _ = reply.send(result);
                return next;
            }
        }
        Next::Serve
    }

    fn state(&self) -> State {
        if self.created.ended.borrow().is_some() {
            State::Stopped
        } else if self.started.is_some() {
            State::Running
        } else {
            State::Created
        }
    }

    fn want(&self, wanted: State) -> Result<(), ContainerError> {
        let state = self.state();
        if state == wanted {
            return Ok(());
        }
        Err(ContainerError::WrongState {
            id: self.id.clone(),
            state: state.name(),
            wanted: wanted.name(),
        })
    }

    /// Lets the first process execute its command and waits until it did; or lets all processes go on, if it
    /// comes from a snapshot.
    async fn start(&mut self) -> Result<(), ContainerError> {
        let let_go = self.created.made.cgroup.let_go();
        let_go.map_err(|source| ContainerError::Freeze {
            id: self.id.clone(),
            source,
        })?;
        let started = match &self.started {
            Some(started) => started.clone(),
            None => {
                self.want(State::Created)?;
                let started = self.let_go().await?;
                self.started = Some(started.clone());
                started
            }
        };
        started.map_err(|source| ContainerError::Start {
            id: self.id.clone(),
            source,
        })
    }

    async fn let_go(&mut self) -> Result<Result<(), StartFailure>, ContainerError> {
        if let Some(Err(source)) = self.created.gate.take().map(Gate::open) {
            let id = self.id.clone();
            return Err(ContainerError::Notify { id, source });
        }
        let mut executed = self.created.executed.clone();
        let known = async {
            let known = executed.wait_for(Option::is_some).await;
            known.map(|known| known.clone()).ok().flatten()
        };
        let outcome = match timeout(START_TIMEOUT, known).await {
            Ok(Some(outcome)) => outcome,
            Ok(None) | Err(_) => Err(StartFailure {
                message: "the command was not executed in time".to_owned(),
                code: 128,
            }),
        };
        if outcome.is_err() {
            // It ends by itself; a start that failed is a container that stopped.
            let _ = self.created.made.init.signal(libc::SIGKILL);
            let mut ended = self.created.ended.clone();
            let _ = timeout(KILL_TIMEOUT, ended.wait_for(Option::is_some)).await;
            return Ok(outcome);
        }
        info!(container = %self.id, "started");
        Ok(outcome)
    }

    fn signal_once(&mut self, sending: Sending) -> Result<(), ContainerError> {
        let Sending {
            exec,
            signal,
            all,
            once,
        } = sending;
        if self.sent.contains(&once) {
            return Ok(());
        }
        self.signal(exec.as_ref(), signal, all)?;
        if !once.is_empty() {
            self.sent.truncate(SENT - 1);
            self.sent.push_front(once);
        }
        Ok(())
    }

    fn signal(&self, exec: Option<&Id>, signal: i32, all: bool) -> Result<(), ContainerError> {
        let failed = |source| ContainerError::Signal {
            id: self.id.clone(),
            source,
        };
        if exec.is_none() && signal == libc::SIGKILL {
            self.created.oom.killed_on_request();
        }
        let process = match exec {
            None if all => {
                let cgroup = &self.created.made.cgroup;
                return signal_all(cgroup, signal).map_err(failed);
            }
            None => &*self.created.made.init,
            Some(exec) => match self.execs.process(exec) {
                Some(process) if all => {
                    let cgroup = &self.created.made.cgroup;
                    return family::signal(process, cgroup, signal).map_err(failed);
                }
                Some(process) => process,
                None if self.execs.has_ended(exec) => return Ok(()),
                None => {
                    return Err(ContainerError::NoProcess {
                        container: self.id.to_string(),
                        exec: exec.to_string(),
                    });
                }
            },
        };
        process.signal(signal).map_err(failed)
    }

    async fn exec(&mut self, request: ExecRequest) -> Result<i32, ContainerError> {
        self.want(State::Running)?;
        self.execs
            .start(
                &self.context,
                &self.id,
                &self.created,
                &self.public,
                request,
            )
            .await
    }

    async fn update(&mut self, change: Change) -> Result<(), ContainerError> {
        if self.state() == State::Stopped {
            self.want(State::Running)?;
        }
        if let (Some(adjustment), Some(process)) =
            (change.oom_score_adj, self.created.spec.process_mut())
        {
            // For processes that are started later.
            process.set_oom_score_adj(Some(adjustment));
        }
        let (id, cgroup) = (self.id.clone(), self.created.made.cgroup.clone());
        let path = self.context.layout.oci_cgroup(&self.id);
        let pages = Arc::clone(&self.context.huge_pages);
        blocking(move || update::apply(&id, path, &cgroup, &pages, change)).await
    }

    async fn delete(&mut self, force: bool) -> Result<(), ContainerError> {
        if self.state() != State::Stopped {
            if !force {
                self.want(State::Stopped)?;
            }
            self.kill().await?;
        }
        let cgroup = &self.created.made.cgroup;
        if !cgroup.empty().await {
            return Err(ContainerError::Unkillable(self.id.clone()));
        }
        // The streams end with the container.
        self.public.stdio().clear();
        if let Some(mut remains) = self.created.remains.take() {
            let (remains, removed) = blocking(move || {
                let removed = remains.remove();
                (remains, removed)
            })
            .await;
            if removed.is_err() {
                // The next call tries again.
                self.created.remains = Some(remains);
            }
            removed?;
        }
        info!(container = %self.id, "deleted");
        Ok(())
    }

    async fn kill(&mut self) -> Result<(), ContainerError> {
        let failed = |source| ContainerError::Signal {
            id: self.id.clone(),
            source,
        };
        self.created.oom.killed_on_request();
        self.created.made.cgroup.kill().map_err(failed)?;
        self.created
            .made
            .init
            .signal(libc::SIGKILL)
            .map_err(failed)?;
        let mut ended = self.created.ended.clone();
        match timeout(KILL_TIMEOUT, ended.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(ContainerError::Unkillable(self.id.clone())),
        }
    }
}

fn signal_all(cgroup: &Cgroup, signal: i32) -> io::Result<()> {
    if signal == libc::SIGKILL {
        return cgroup.kill();
    }
    for process in cgroup.members()? {
        process.signal(signal)?;
    }
    Ok(())
}
