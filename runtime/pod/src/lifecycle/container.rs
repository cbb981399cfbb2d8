//! The life of a container.
//!
//! ```text
//!           CreateDone            Start              StartDone
//! Creating ────────────▶ Created ───────▶ Starting ────────────▶ Running
//!    │                                        │                     │ Stop
//!    │ CreateFailed                StartFailed│ Exited              ▼       GraceOver
//!    ▼                            ┌───────────┤                Terminating ──────────▶ Killing
//!  Gone                           │       EndedEarly                └───────┬────────────┘
//!    ▲                            │           │ StartDone                   │ Exited
//!    │                            ▼           └──────────────▶ Draining ◀───┘
//!    │ RemoveDone               Exited ◀────────────────────── (its log is being completed)
//!    │                            │ Remove        Drained
//!    └──────────────── Removing ◀─┘
//! ```
//!
//! * The end of the process may be told before the answer to its start, which alone says whether
//!   the command was executed at all.
//! * A start that is not answered (`StartUnanswered`) leads to `Killing`: what is told to have ended does not run.
//! * `Remove` of a container that runs kills it and then removes it.
//! * `Exited` is reached only when the log is complete, so whoever sees it can read all of it.
//! * Exactly one `Terminate` is sent, however often `Stop` is asked for; a later `Stop` may only
//!   shorten the time until `Kill`.

use std::time::Duration;

pub(crate) use super::sandbox::After;
use hull_spec::error::PodError;

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// The guest is making it.
    Creating,
    /// Its process waits to be started.
    Created,
    /// It is being started.
    Starting,
    /// It ended, but its start was not answered yet.
    EndedEarly(Exit),
    /// Its process runs.
    Running,
    /// It was asked to end.
    Terminating(After),
    /// It was killed.
    Killing(After),
    /// It ended, and its log is being completed.
    Draining(After, Exit),
    /// It ended.
    Exited(Exit),
    /// It is being removed.
    Removing(Option<Exit>),
    /// Nothing is left.
    Gone,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Exit {
    pub code: i32,
    pub reason: Reason,
    pub message: String,
    /// Unix time in nanoseconds.
    pub at_ns: i64,
}

/// Why a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reason {
    /// It exited with 0.
    Completed,
    /// It exited with something else.
    Error,
    /// The kernel killed it for want of memory.
    OomKilled,
    /// It could not be started.
    StartError,
    /// Its VM is gone.
    VmGone,
}

impl Reason {
    /// The word that CRI clients know.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error | Self::VmGone => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
        }
    }
}

/// What happens to a container.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    CreateDone,
    CreateFailed(PodError),
    Start,
    StartDone,
    StartFailed(PodError, Exit),
    /// Nobody knows whether its process was started.
    StartUnanswered(PodError),
    Stop {
        grace: Duration,
    },
    GraceOver,
    /// A kill had no effect for too long.
    KillOver,
    /// The process ended, or its VM did.
    Exited(Exit),
    /// The log is complete.
    Drained,
    Remove,
    /// Nothing of it is left, and its record is deleted.
    RemoveDone,
    RemoveFailed(PodError),
}

/// What follows from an event, in order.
#[derive(Debug, Clone)]
pub(crate) enum Effect {
    /// Write the record.
    Save,
    /// Start the process; answers with `StartDone`, `StartFailed` or `StartUnanswered`.
    Start,
    /// Send the stop signal.
    Terminate,
    /// Answer with `GraceOver` after this time.
    ArmGrace(Duration),
    /// Kill all its processes; `KillOver` comes when that has no effect.
    Kill,
    /// Complete the log; answers with `Drained`.
    Drain,
    /// Remove it from the guest; answers with `RemoveDone` or `RemoveFailed`.
    Delete,
    /// Answer those who wait.
    Answer(Wait, Result<(), PodError>),
    /// Tell those who follow events.
    Announce(News),
    /// Delete record and log position of one that was not made.
    Forget,
}

/// What a caller waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Wait {
    Created,
    Started,
    Stopped,
    Removed,
}

/// News for those who follow events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    Created,
    Started,
    Stopped,
    Removed,
}

/// Decides.
pub(crate) fn step(state: State, event: Event) -> (State, Vec<Effect>) {
    use Effect::{Announce, Answer, ArmGrace, Delete, Drain, Forget, Kill, Save};
    use Event as E;
    use State as S;
    match (state, event) {
        (S::Creating, E::CreateDone) => (
            S::Created,
            vec![Save, Announce(News::Created), Answer(Wait::Created, Ok(()))],
        ),
        (S::Creating, E::CreateFailed(error)) => {
            (S::Gone, vec![Forget, Answer(Wait::Created, Err(error))])
        }

        (S::Created, E::Start) => (S::Starting, vec![Effect::Start]),
        (S::Starting, E::StartDone) => (
            S::Running,
            vec![Save, Announce(News::Started), Answer(Wait::Started, Ok(()))],
        ),
        (S::Starting, E::StartFailed(error, exit)) => (
            S::Exited(exit),
            vec![
                Save,
                Announce(News::Stopped),
                Answer(Wait::Started, Err(error)),
            ],
        ),
        // The answer may be lost, and not the request: it has ended when the guest says so.
        (S::Starting, E::StartUnanswered(error)) => (
            S::Killing(After::Keep),
            vec![Save, Kill, Answer(Wait::Started, Err(error))],
        ),
        (S::EndedEarly(exit), E::StartUnanswered(error)) => (
            S::Draining(After::Keep, exit),
            vec![Save, Answer(Wait::Started, Err(error)), Drain],
        ),
        (S::EndedEarly(exit), E::StartDone) => (
            S::Draining(After::Keep, exit),
            vec![
                Save,
                Announce(News::Started),
                Answer(Wait::Started, Ok(())),
                Drain,
            ],
        ),
        (S::EndedEarly(_), E::StartFailed(error, exit)) => {
            let answer = Answer(Wait::Started, Err(error));
            (S::Exited(exit), vec![Save, Announce(News::Stopped), answer])
        }
        // A second request joins the first.
        (state @ (S::Starting | S::EndedEarly(_)), E::Start) => (state, vec![]),
        (state @ (S::Running | S::Terminating(_) | S::Killing(_)), E::Start) => {
            let refusal = refused("start the container", "it runs already");
            (state, vec![Answer(Wait::Started, Err(refusal))])
        }
        (state, E::Start) => {
            let refusal = refused("start the container", &not_created(&state));
            (state, vec![Answer(Wait::Started, Err(refusal))])
        }

        (S::Running, E::Stop { grace }) => stop(grace, After::Keep),
        (S::Terminating(after), E::Stop { grace }) if grace.is_zero() => {
            (S::Killing(after), vec![Kill])
        }
        (state @ S::Terminating(_), E::Stop { grace }) => (state, vec![ArmGrace(grace)]),
        // The kill may have been lost with an agent that did not answer.
        (S::Killing(after), E::Stop { .. }) => (S::Killing(after), vec![Kill]),
        (state @ (S::Starting | S::EndedEarly(_)), E::Stop { .. }) => {
            let refusal = refused("stop the container", "it is being started");
            (state, vec![Answer(Wait::Stopped, Err(refusal))])
        }
        (state @ S::Draining(..), E::Stop { .. }) => (state, vec![]),
        (state, E::Stop { .. }) => (state, vec![Answer(Wait::Stopped, Ok(()))]),
        (S::Terminating(after), E::GraceOver) => (S::Killing(after), vec![Kill]),
        (state @ S::Killing(_), E::KillOver) => {
            let error = PodError::DeadlineExceeded {
                action: "kill the container".into(),
                seconds: KILL_LIMIT.as_secs(),
            };
            (
                state,
                vec![
                    Answer(Wait::Stopped, Err(error.clone())),
                    Answer(Wait::Removed, Err(error)),
                ],
            )
        }

        (S::Created, E::Exited(exit)) => (S::Draining(After::Keep, exit), vec![Drain]),
        (S::Starting, E::Exited(exit)) => (S::EndedEarly(exit), vec![]),
        (S::Running, E::Exited(exit)) => (S::Draining(After::Keep, exit), vec![Drain]),
        (S::Terminating(after) | S::Killing(after), E::Exited(exit)) => {
            (S::Draining(after, exit), vec![Drain])
        }
        (S::Draining(after, exit), E::Drained) => {
            let mut effects = Vec::new();
            let next = match after {
                After::Keep => S::Exited(exit),
                After::Remove => S::Removing(Some(exit)),
            };
            effects.push(Save);
            effects.push(Announce(News::Stopped));
            effects.push(Answer(Wait::Stopped, Ok(())));
            if matches!(next, S::Removing(_)) {
                effects.push(Delete);
            }
            (next, effects)
        }

        (S::Running | S::Terminating(_) | S::Killing(_), E::Remove) => {
            (S::Killing(After::Remove), vec![Kill])
        }
        (S::Draining(_, exit), E::Remove) => (S::Draining(After::Remove, exit), vec![]),
        (S::Created, E::Remove) => (S::Removing(None), vec![Delete]),
        (S::Exited(exit), E::Remove) => (S::Removing(Some(exit)), vec![Delete]),
        (state @ (S::Starting | S::EndedEarly(_)), E::Remove) => {
            let refusal = refused("remove the container", "it is being started");
            (state, vec![Answer(Wait::Removed, Err(refusal))])
        }
        (S::Removing(_), E::RemoveDone) => (
            S::Gone,
            vec![Announce(News::Removed), Answer(Wait::Removed, Ok(()))],
        ),
        (S::Removing(exit), E::RemoveFailed(error)) => {
            let next = exit.map_or(S::Created, S::Exited);
            (next, vec![Answer(Wait::Removed, Err(error))])
        }
        (S::Gone, E::Remove) => (S::Gone, vec![Answer(Wait::Removed, Ok(()))]),

        // Repetitions, and news that come too late.
        (state, _) => (state, vec![]),
    }
}

/// How long a kill may be without effect.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(10);

fn stop(grace: Duration, after: After) -> (State, Vec<Effect>) {
    if grace.is_zero() {
        (State::Killing(after), vec![Effect::Kill])
    } else {
        (
            State::Terminating(after),
            // Written first: a daemon that starts again must know that it was asked.
            vec![Effect::Save, Effect::Terminate, Effect::ArmGrace(grace)],
        )
    }
}

/// Why a container can't be started: one that ended before it was started says of what.
fn not_created(state: &State) -> String {
    match state {
        State::Draining(_, exit) | State::Exited(exit) => {
            let (reason, code) = (exit.reason.as_str(), exit.code);
            let colon = if exit.message.is_empty() { "" } else { ": " };
            let message = &exit.message;
            format!("it has ended ({reason}, exit code {code}){colon}{message}")
        }
        _ => "it is not in the created state".to_owned(),
    }
}

fn refused(action: &str, reason: &str) -> PodError {
    PodError::precondition(action, reason)
}

#[cfg(test)]
mod tests;
