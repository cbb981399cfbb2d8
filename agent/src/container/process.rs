//! Follows one process of a container from its start to its `Exited` event.

use std::{sync::Arc, time::Duration};

use error_reporter::Report;
use hull_proto_agent::agent::{Exited, event::Kind};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, warn};

use super::{
    cgroup::Cgroup,
    family,
    launch::{ExecOutcome, LaunchError},
    oom::OomKills,
};
use crate::{
    blocking::blocking,
    events::Events,
    ident::Id,
    pidfd::Process,
    reaper::{Exit, ExitStatus},
    stdio::Stdio,
    time,
};

/// How long others may hold the pipes of a process that ended.
const DRAIN: Duration = Duration::from_secs(2);
/// How long an exec may be without any connection before it counts as left.
const DETACH_GRACE: Duration = Duration::from_secs(2);
/// How long the host may take to open the first one.
const ATTACH_LIMIT: Duration = Duration::from_secs(30);

/// The end of a process; `None` while it runs.
pub(crate) type Ended = watch::Receiver<Option<Exited>>;

/// Whether a process executed its command; `None` while it waits for its start.
pub(crate) type Executed = watch::Receiver<Option<Result<(), StartFailure>>>;

/// Why a command was not executed.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{message}")]
pub(crate) struct StartFailure {
    pub(crate) message: String,
    /// The exit code that a shell gives in this case.
    pub(crate) code: i32,
}

impl From<LaunchError> for StartFailure {
    fn from(error: LaunchError) -> Self {
        let code = match error {
            LaunchError::Exec {
                errno: libc::ENOENT,
                ..
            } => 127,
            LaunchError::Exec { .. } => 126,
            _ => 128,
        };
        Self {
            message: Report::new(&error).to_string(),
            code,
        }
    }
}

/// Passes the outcome of a start on to all who ask.
pub(crate) fn watch_outcome(outcome: ExecOutcome) -> Executed {
    let (tx, rx) = watch::channel(None);
    tokio::spawn(async move {
        let result = outcome.wait().await.map_err(StartFailure::from);
        tx.send_replace(Some(result));
    });
    rx
}

/// A process to follow.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) container: Id,
    /// `None`: the container's first process.
    pub(crate) exec: Option<Id>,
    pub(crate) exit: Exit,
    pub(crate) executed: Option<Executed>,
    pub(crate) stdio: Arc<Stdio>,
    pub(crate) process: Arc<Process>,
    /// The container's.
    pub(crate) cgroup: Cgroup,
    /// What the kernel killed in the container for lack of memory.
    pub(crate) oom: Arc<OomKills>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) kill_on_detach: bool,
}

/// Follows `subject` in a task of its own.
pub(crate) fn follow(subject: Subject, events: Arc<Events>) -> Ended {
    let (tx, rx) = watch::channel(None);
    if subject.exec.is_none() {
        tokio::spawn(watch_oom_kills(Arc::clone(&subject.oom), rx.clone()));
    }
    tokio::spawn(async move {
        let exited = subject.wait().await;
        debug!(?exited, "process ended");
        // State first: who reacts to the event must see it.
        tx.send_replace(Some(exited.clone()));
        events.publish(Kind::Exited(exited));
    });
    rx
}

/// Has the host told of kills for lack of memory until the container's end.
async fn watch_oom_kills(oom: Arc<OomKills>, mut ended: Ended) {
    let result = tokio::select! {
        result = oom.watch() => result,
        _ = ended.wait_for(Option::is_some) => Ok(()),
    };
    if let Err(error) = result {
        debug!(%error, "watch memory events");
    }
}

impl Subject {
    async fn wait(mut self) -> Exited {
        let oom_before = self.oom.count();
        let (status, timed_out) = self.end().await;
        let at_ns = time::real_ns();
        if self.exec.is_none() {
            // Nothing of a container outlives its first process, also in a
            // shared pid namespace, where the kernel does not see to it.
            if let Err(error) = self.cgroup.kill() {
                warn!(container = %self.container, %error, "kill what is left of a container");
            }
            self.cgroup.empty().await;
        }
        let (stdout_bytes, stderr_bytes) = self.stdio.finish(DRAIN).await;
        let unrelated = if self.exec.is_none() {
            self.oom.before_request()
        } else {
            oom_before
        };
        let oom_killed = self.oom.tell() > unrelated && status.code() == 137;
        // The signal that ended a process that did not start is ours.
        let (code, signal) = match self.start_failure().await {
            Some(failure) => (failure.code, 0),
            None => (status.code(), status.signal()),
        };
        Exited {
            container_id: self.container.to_string(),
            exec_id: self.exec.as_ref().map(Id::to_string).unwrap_or_default(),
            code,
            signal,
            oom_killed,
            timed_out,
            stdout_bytes,
            stderr_bytes,
            at_ns,
            ..Exited::default()
        }
    }

    /// Waits for the end, or brings it about.
    async fn end(&mut self) -> (ExitStatus, bool) {
        let deadline = async {
            match self.deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let detached = async {
            if self.kill_on_detach {
                self.stdio.detached(DETACH_GRACE, ATTACH_LIMIT).await;
            } else {
                std::future::pending().await
            }
        };
        let lost = ExitStatus::Exited(255);
        let timed_out = tokio::select! {
            status = &mut self.exit => return (status.unwrap_or(lost), false),
            () = deadline => true,
            () = detached => false,
        };
        let (process, cgroup) = (Arc::clone(&self.process), self.cgroup.clone());
        if let Err(error) = blocking(move || family::kill(&process, &cgroup)).await {
            warn!(container = %self.container, exec = ?self.exec, %error, "kill an exec");
            let _ = self.process.signal(libc::SIGKILL);
        }
        ((&mut self.exit).await.unwrap_or(lost), timed_out)
    }

    /// The process is gone, so its outcome is known now.
    async fn start_failure(&mut self) -> Option<StartFailure> {
        let executed = self.executed.as_mut()?;
        let known = timeout(DRAIN, executed.wait_for(Option::is_some)).await;
        let known = known.ok()?.ok()?.clone();
        known.and_then(Result::err)
    }
}
