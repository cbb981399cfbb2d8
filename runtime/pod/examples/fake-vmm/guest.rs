//! What the guest is made of, and what it tells of itself.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use hull_proto_agent::agent::{Empty, Event, Exited, event::Kind};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use ttrpc::proto::Code;

use crate::{
    process::{End, Process, SavedProcess},
    script::Script,
};

/// The guest.
pub struct Guest {
    pub script: Script,
    /// Where the VMM says how it ended.
    pub report: PathBuf,
    pub containers: Mutex<HashMap<String, Container>>,
    /// Names and slots.
    pub storage: Mutex<HashMap<String, u32>>,
    /// Calls of which one was not answered.
    hung: Mutex<HashSet<String>>,
    /// How many calls there were.
    calls: AtomicU64,
    woken: AtomicBool,
    /// How often its numbers were asked for.
    pub asked: AtomicU64,
    /// How far its clock is ahead of the host's.
    pub clock_ahead_ns: AtomicI64,
    pub events: watch::Sender<Vec<Event>>,
}

/// A container of the guest.
pub struct Container {
    pub init: Arc<Process>,
    /// Whether it was started, or killed before that.
    pub start: Option<bool>,
    pub execs: HashMap<String, Arc<Process>>,
    /// It comes from a snapshot, where its process ran or waited.
    pub restored: bool,
    /// Volumes that it has copies of.
    pub atomic_volumes: Vec<String>,
}

/// What a snapshot keeps of a guest.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct SavedGuest {
    /// By id: the process, and whether it was started.
    containers: Vec<(String, SavedProcess, Option<bool>)>,
    storage: HashMap<String, u32>,
}

impl Guest {
    pub fn saved(&self) -> SavedGuest {
        let containers = self.containers.lock().unwrap();
        let containers = containers
            .iter()
            .map(|(id, container)| (id.clone(), container.init.saved(), container.start));
        SavedGuest {
            containers: containers.collect(),
            storage: self.storage.lock().unwrap().clone(),
        }
    }

    pub fn restore(&self, saved: SavedGuest) {
        *self.storage.lock().unwrap() = saved.storage;
        let mut containers = self.containers.lock().unwrap();
        for (id, process, start) in saved.containers {
            let container = Container {
                init: Process::restored(process),
                start,
                execs: HashMap::new(),
                restored: true,
                atomic_volumes: Vec::new(),
            };
            containers.insert(id, container);
        }
    }

    /// Has the processes of all containers stand still, or go on.
    pub fn hold(&self, held: bool) {
        for container in self.containers.lock().unwrap().values() {
            container.init.held.send_replace(held);
        }
    }

    pub fn new(script: Script, report: PathBuf) -> Self {
        Self {
            clock_ahead_ns: AtomicI64::new(script.clock_ahead_ns),
            script,
            report,
            containers: Mutex::default(),
            storage: Mutex::default(),
            hung: Mutex::default(),
            calls: AtomicU64::new(0),
            woken: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            events: watch::channel(Vec::new()).0,
        }
    }

    pub fn process(&self, container: &str, exec: &str) -> Option<Arc<Process>> {
        let containers = self.containers.lock().unwrap();
        let container = containers.get(container)?;
        match exec {
            "" => Some(Arc::clone(&container.init)),
            exec => container.execs.get(exec).cloned(),
        }
    }

    /// Sees to it that a container that was not started never is; false: it was.
    pub fn never_starts(&self, container: &str) -> bool {
        let mut containers = self.containers.lock().unwrap();
        let container = containers.get_mut(container);
        container.is_some_and(|container| {
            let waits = container.start.is_none();
            container.start.get_or_insert(false);
            waits
        })
    }

    /// What containers that were started have it say that is not so.
    pub fn lies(&self) -> Vec<String> {
        let containers = self.containers.lock().unwrap();
        let started = containers
            .values()
            .filter(|container| container.start == Some(true));
        let lies = started.flat_map(|container| container.init.lies());
        lies.map(str::to_owned).collect()
    }

    /// Tells of the end of a process.
    pub fn exited(
        &self,
        container: &str,
        exec: &str,
        process: &Process,
        end: End,
        timed_out: bool,
    ) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut exited = Exited {
            container_id: container.into(),
            exec_id: exec.into(),
            code: end.code,
            signal: end.signal,
            oom_killed: end.oom,
            timed_out,
            stdout_bytes: process.stdout.total(),
            stderr_bytes: process.stderr.total(),
            at_ns: at.as_nanos() as u64,
            ..Exited::default()
        };
        if process.lies().any(|lie| lie == "end") {
            (exited.stdout_bytes, exited.stderr_bytes) = (u64::MAX, u64::MAX);
            exited.at_ns = u64::MAX;
        }
        self.tell(exited);
        self.note("calls", "exited");
    }

    /// Tells of an end.
    pub fn tell(&self, exited: Exited) {
        self.events.send_modify(|events| {
            events.push(Event {
                seq: events.len() as u64 + 1,
                kind: Some(Kind::Exited(exited)),
                ..Event::default()
            });
        });
    }

    /// Leaves a line in a file beside the exit report.
    pub fn note(&self, file: &str, line: &str) {
        let path = self.report.with_file_name(file);
        let text = fs::read_to_string(&path).unwrap_or_default();
        // The pod may just be removed.
        let _ = fs::write(path, format!("{text}{line}\n"));
    }

    /// Begins a call, unless it is refused or never answered.
    pub async fn begin(&self, call: &str) -> ttrpc::Result<()> {
        if self.script.refuse.iter().any(|refused| refused == call) {
            return Err(refusal(Code::INTERNAL, "as the script says"));
        }
        match call {
            "hello" => {}
            "wake" => self.woken.store(true, Ordering::Relaxed),
            _ if self.script.asleep && !self.woken.load(Ordering::Relaxed) => {
                return Err(refusal(Code::FAILED_PRECONDITION, "the clone sleeps"));
            }
            _ => {}
        }
        if self.script.slow_ms > 0 {
            let number = self.calls.fetch_add(1, Ordering::Relaxed);
            let time = Duration::from_millis(number * 7919 % self.script.slow_ms);
            tokio::time::sleep(time).await;
        }
        self.hang_once(&self.script.hang_once, call).await;
        Ok(())
    }

    /// Answers a call with nothing, or never.
    pub async fn done(&self, call: &str) -> ttrpc::Result<Empty> {
        self.hang_once(&self.script.lose_once, call).await;
        Ok(Empty::new())
    }

    /// Never returns the first time, when it is one of these calls.
    async fn hang_once(&self, calls: &[String], call: &str) {
        let hangs = calls.iter().any(|hung| hung == call);
        if hangs && self.hung.lock().unwrap().insert(call.to_owned()) {
            self.note("calls", "hangs");
            std::future::pending::<()>().await;
        }
    }
}

/// An error that the daemon sees.
pub fn refusal(code: Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

/// There is no such command.
pub fn not_executed() -> ttrpc::Error {
    let mut status = ttrpc::get_status(Code::FAILED_PRECONDITION, "exec /nope: not found");
    hull_proto_agent::not_executed::tell(&mut status, 127);
    ttrpc::Error::RpcStatus(status)
}
