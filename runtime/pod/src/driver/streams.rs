//! Execs, attachments and logs: what their callers need, and the ends of processes.

use tokio::sync::{oneshot, watch};

use hull_spec::{error::PodError, id::ContainerId, info::ContainerState};
use hull_vm::agent::{
    events::ProcessExit,
    stdio::{OutputEnd, OutputKind},
};

use super::state::{Driver, ExecEnd};
use crate::{
    command::{AttachHandle, ExecHandle, container_not_found},
    lifecycle::container::State,
    logs::pump::{ContainerLog, LogHandle},
};

impl Driver {
    pub(super) fn exec(&mut self, id: ContainerId, exec: String) -> Result<ExecHandle, PodError> {
        const ACTION: &str = "run a command in the container";
        let Some(container) = self.containers.get(&id) else {
            return Err(container_not_found(&id));
        };
        if !matches!(container.state, State::Running | State::Terminating(_)) {
            return Err(PodError::precondition(ACTION, "it is not running"));
        }
        let Some(running) = &self.running else {
            return Err(self.not_ready(ACTION));
        };
        // Those whose callers went away before their command was started.
        self.execs.retain(|_, end| !end.exited.is_closed());
        let (stdout, stdout_end) = watch::channel(OutputEnd::Open);
        let (stderr, stderr_end) = watch::channel(OutputEnd::Open);
        let (exited, receiver) = oneshot::channel();
        let handle = ExecHandle {
            agent: running.vm().agent.clone(),
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

    pub(super) fn attach(&self, id: &ContainerId) -> Result<AttachHandle, PodError> {
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
        let Some(running) = &self.running else {
            return Err(self.not_ready(ACTION));
        };
        let Some(log) = &container.log else {
            return Err(PodError::precondition(ACTION, "its log can't be written"));
        };
        let spec = &container.record.spec;
        Ok(AttachHandle {
            agent: running.vm().agent.clone(),
            tty: spec.tty,
            stdin: spec.stdin,
            stdout: log.follow(OutputKind::Stdout),
            stderr: (!spec.tty).then(|| log.follow(OutputKind::Stderr)),
        })
    }

    pub(super) fn log(&self, id: &ContainerId) -> Result<LogHandle, PodError> {
        const ACTION: &str = "reopen the container's log";
        let container = self.containers.get(id);
        let container = container.ok_or_else(|| container_not_found(id))?;
        if container.info().state != ContainerState::Running {
            return Err(PodError::precondition(ACTION, "it is not running"));
        }
        let log = container.log.as_ref().map(ContainerLog::file);
        log.ok_or_else(|| PodError::precondition(ACTION, "it can't be written"))
    }

    pub(super) async fn process_exited(&mut self, exit: ProcessExit) {
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
}
