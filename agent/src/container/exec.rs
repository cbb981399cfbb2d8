//! More processes in a running container.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use hull_proto_agent::agent::ExecRequest;
use tokio::time::Instant;

use super::{
    child::Action,
    context::Context,
    create::{Created, owner},
    error::ContainerError,
    launch::{Launch, LaunchError, launch},
    made::{Made, Public},
    process::{Ended, Subject, follow},
    spec,
};
use crate::{
    ident::Id,
    pidfd::Process,
    stdio::{InputEnd, Stdio, Wanted},
};

/// Ended execs whose output the host has not fetched; more are dropped.
const UNFETCHED: usize = 16;
/// Ended execs that are remembered, so that a repeated request does not run
/// the command again.
const REMEMBERED: usize = 256;

/// The execs of one container.
#[derive(Debug, Default)]
pub(crate) struct Execs {
    all: HashMap<Id, Exec>,
    /// Ids of `all` in the order of their start.
    order: VecDeque<Id>,
    /// Ids and pids of execs that are no longer in `all`.
    past: VecDeque<(Id, i32)>,
}

#[derive(Debug)]
struct Exec {
    request: ExecRequest,
    process: Arc<Process>,
    stdio: Arc<Stdio>,
    ended: Ended,
}

impl Exec {
    fn ended(&self) -> bool {
        self.ended.borrow().is_some()
    }
}

impl Execs {
    /// Returns the process of an exec that runs.
    pub(crate) fn process(&self, id: &Id) -> Option<&Arc<Process>> {
        let exec = self.all.get(id).filter(|exec| !exec.ended());
        exec.map(|exec| &exec.process)
    }

    /// Returns whether `id` ran and has ended.
    pub(crate) fn has_ended(&self, id: &Id) -> bool {
        self.all.get(id).is_some_and(Exec::ended) || self.past.iter().any(|(past, _)| past == id)
    }

    /// Starts the command of `request` and returns its pid.
    pub(crate) async fn start(
        &mut self,
        context: &Context,
        container: &Id,
        created: &Created,
        public: &Public,
        request: ExecRequest,
    ) -> Result<i32, ContainerError> {
        let id = Id::parse("exec id", &request.exec_id)?;
        if let Some(known) = self.all.get(&id) {
            return if known.request == request {
                Ok(known.process.pid().as_raw())
            } else {
                Err(ContainerError::ExecExists(id))
            };
        }
        if let Some((_, pid)) = self.past.iter().find(|(past, _)| *past == id) {
            return Ok(*pid);
        }
        self.forget(public);
        let timeout = request.timeout_ms;
        let deadline = (timeout > 0).then(|| Instant::now() + Duration::from_millis(timeout));

        let (process, namespaces) =
            spec::exec_process(&created.spec, request.args.clone(), request.tty)?;
        let Made { init, cgroup, .. } = &created.made;
        let (stdio, ends) = Stdio::new(Wanted {
            tty: request.tty,
            stdin: request.stdin,
            end: InputEnd::Closes,
        })
        .map_err(ContainerError::Stdio)?;
        let launched = launch(
            &context.reaper,
            Launch {
                action: Action::Exec {
                    process: Box::new(process),
                    profile: spec::profile(&created.spec).cloned().map(Box::new),
                    namespaces: namespaces.bits(),
                    init: init.pid().as_raw(),
                },
                cgroup,
                trees: Vec::new(),
                joins: vec![Arc::clone(init)],
                stdio: &stdio,
                ends,
                uid: owner(context, &created.made.user),
            },
        )
        .await;
        let run = async {
            let launched = launched?;
            launched.gate.open().map_err(LaunchError::Talk)?;
            launched.outcome.wait().await?;
            Ok::<_, LaunchError>((launched.process, launched.exit))
        };
        let (process, exit) = match run.await {
            Ok(running) => running,
            Err(source) => {
                stdio.abandon();
                return Err(ContainerError::Exec {
                    id: container.clone(),
                    source: source.into(),
                });
            }
        };
        let (pid, process) = (process.pid().as_raw(), Arc::new(process));
        let ended = follow(
            Subject {
                container: container.clone(),
                exec: Some(id.clone()),
                process: Arc::clone(&process),
                exit,
                executed: None,
                stdio: Arc::clone(&stdio),
                cgroup: cgroup.clone(),
                oom: Arc::clone(&created.oom),
                deadline,
                kill_on_detach: request.kill_on_detach,
            },
            Arc::clone(&context.events),
        );
        public
            .stdio()
            .insert(id.as_str().to_owned(), Arc::clone(&stdio));
        self.order.push_back(id.clone());
        self.all.insert(
            id,
            Exec {
                request,
                process,
                stdio,
                ended,
            },
        );
        Ok(pid)
    }

    /// Drops ended execs that the host has all output of, and the oldest of the
    /// others when there are too many.
    fn forget(&mut self, public: &Public) {
        let ended: Vec<Id> = self
            .order
            .iter()
            .filter(|id| self.all.get(id).is_some_and(Exec::ended))
            .cloned()
            .collect();
        let fetched = |id: &Id| self.all.get(id).is_some_and(|e| e.stdio.finished());
        let (mut gone, unfetched): (Vec<_>, Vec<_>) = ended.into_iter().partition(fetched);
        let excess = unfetched.len().saturating_sub(UNFETCHED);
        gone.extend(unfetched.into_iter().take(excess));
        for id in gone {
            if let Some(exec) = self.all.remove(&id) {
                public.stdio().remove(id.as_str());
                self.past.push_back((id, exec.process.pid().as_raw()));
            }
        }
        self.order.retain(|id| self.all.contains_key(id));
        while self.past.len() > REMEMBERED {
            self.past.pop_front();
        }
    }
}
