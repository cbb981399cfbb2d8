//! One container: what follows from the events of its life.

use std::{sync::Arc, time::Duration};

use error_reporter::Report;
use tokio::time::{Instant, sleep, timeout_at};

use hull_base::clock;
use hull_spec::{error::PodError, id::ContainerId, signal::Signal};
use hull_vm::{
    agent::{client::SignalTarget, events::ProcessExit, stdio::OutputEnd},
    rundir::RunDir,
};

use super::{
    operations::Done,
    state::{Driver, Queue},
};
use crate::{
    command::{Reply, container_not_found},
    container::unmake::{OnFailure, unmake},
    events::EventKind,
    lifecycle::container::{Effect, Event, Exit, KILL_LIMIT, News, Reason, State, Wait, step},
    record::Stopping,
};

/// How long a log may take to be completed after its process ended.
const DRAIN: Duration = Duration::from_secs(10);
/// How long it takes until what failed is tried again: to delete a record, to kill.
const RETRY: Duration = Duration::from_secs(1);
/// How long a kill is repeated that is not answered: a guest that stands still may go on.
const KILL_REPEATED: Duration = Duration::from_secs(300);
/// Exit code of a container that could not be started, as others report it.
const START_ERROR: i32 = 128;
/// Names the stop signal to the agent, which sends it once.
const STOP: &str = "stop";

impl Driver {
    /// Lets a caller wait for what an event leads to.
    pub(super) async fn ask_container(
        &mut self,
        id: &ContainerId,
        wait: Wait,
        event: Event,
        reply: Reply,
    ) {
        let Some(container) = self.containers.get_mut(id) else {
            let _ = reply.send(Err(container_not_found(id)));
            return;
        };
        container.waiters.push((wait, reply));
        self.container_event(id, event).await;
    }

    /// Lets an event happen to a container, and what follows from it.
    pub(super) async fn container_event(&mut self, id: &ContainerId, event: Event) {
        let mut queue = Queue::from([event]);
        while let Some(mut event) = queue.pop_front() {
            // With its record it would come back with the next daemon, so it is not gone before that is.
            if matches!(event, Event::RemoveDone)
                && let Err(error) = self.forget(id).await
            {
                event = Event::RemoveFailed(error);
            }
            let Some(container) = self.containers.get_mut(id) else {
                return;
            };
            match (&container.state, &event) {
                (State::Created, Event::Start) => container.record.started_at_ns = clock::now_ns(),
                (State::Starting | State::EndedEarly(_), Event::StartFailed(..)) => {
                    container.record.started_at_ns = 0;
                }
                // For the next daemon too: it has to be ended.
                (State::Starting, Event::StartUnanswered(_)) => {
                    container.record.stopping = Some(Stopping::now(Duration::ZERO));
                }
                (State::Running, Event::Stop { grace }) if !grace.is_zero() => {
                    container.record.stopping = Some(Stopping::now(*grace));
                }
                _ => {}
            }
            let was = container.state.clone();
            let (next, effects) = step(was.clone(), event);
            if std::mem::discriminant(&next) != std::mem::discriminant(&was) {
                tracing::info!(pod = %self.record.id, container = %id, state = ?next, "container");
            }
            container.state = next;
            container.note_state();
            // Before anybody sees it: the next daemon knows what is written, and no more.
            let is_saved = effects.iter().any(|effect| matches!(effect, Effect::Save));
            let saved = if is_saved {
                self.save_container(id).await
            } else {
                Ok(())
            };
            if let Err(error) = &saved
                && self.take_back(id, &was, error)
            {
                continue;
            }
            self.publish();
            for effect in effects {
                match effect {
                    Effect::Save => {}
                    Effect::Answer(wait, result) => {
                        // What could not be written is not answered as done.
                        let saved = saved.clone();
                        self.answer(id, wait, &result.and(saved));
                    }
                    Effect::Announce(news) => self.announce_container(id, news),
                    Effect::Forget => {
                        // One that was not answered is unmade by the next daemon.
                        let _ = self.forget(id).await;
                    }
                    Effect::Start => queue.extend(self.start_process(id)),
                    Effect::Terminate => self.signal(id, SignalTarget::Init(STOP)),
                    Effect::Kill => self.kill(id),
                    Effect::ArmGrace(grace) => self.after(id, grace, Event::GraceOver),
                    Effect::Drain => self.drain(id),
                    Effect::Delete => self.delete_container(id),
                }
            }
        }
    }

    /// What began and could not be written has not begun, as for the next daemon. False: there is no way back
    /// from this.
    fn take_back(&mut self, id: &ContainerId, was: &State, error: &PodError) -> bool {
        let Some(container) = self.containers.get_mut(id) else {
            return false;
        };
        match was {
            State::Creating => {
                container.state = State::Creating;
                container.note_state();
                container.log = None;
                container.answer_creators(&Err(error.clone()));
                self.undo_creation(id.clone(), error.clone());
            }
            // The guest starts nothing twice, so it can be asked for again.
            State::Starting => {
                container.state = State::Created;
                container.note_state();
                container.record.started_at_ns = 0;
                self.publish();
                self.answer(id, Wait::Started, &Err(error.clone()));
            }
            _ => return false,
        }
        true
    }

    /// Undoes a creation, and then forgets it. It may have been written all the same, so that the next daemon
    /// would show it: its name is free when it is not.
    fn undo_creation(&mut self, id: ContainerId, error: PodError) {
        let attachments = self.running.as_ref().map(|r| r.attachments.clone());
        let node = Arc::clone(&self.node);
        self.operations.spawn(async move {
            let undo = unmake(&*node.images, attachments.as_ref(), &id, OnFailure::GoOn).await;
            while let Err(error) = node.records.delete_container(&id).await {
                tracing::error!(container = %id, %error, "delete the container's record");
                sleep(RETRY).await;
            }
            Done::Event(id, Event::CreateFailed(error.after_undo(undo)))
        });
    }

    /// The end of a container's first process, as the guest tells it.
    pub(super) async fn init_exited(&mut self, id: &ContainerId, exit: &ProcessExit) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        if let Some(log) = &container.log {
            log.end(
                OutputEnd::At(exit.stdout_bytes),
                OutputEnd::At(exit.stderr_bytes),
            );
        }
        let code = exit.code.clamp(0, 255);
        let now = clock::now_ns();
        let earliest = container.record.started_at_ns.min(now);
        let exit = Exit {
            code,
            reason: match code {
                _ if exit.oom_killed => Reason::OomKilled,
                0 => Reason::Completed,
                _ => Reason::Error,
            },
            message: String::new(),
            // The guest's clock may be off, or lie.
            at_ns: i64::try_from(exit.at_ns)
                .unwrap_or(now)
                .clamp(earliest, now),
        };
        self.container_event(id, Event::Exited(exit)).await;
    }

    fn start_process(&mut self, id: &ContainerId) -> Option<Event> {
        let Some(running) = &self.running else {
            return Some(start_failed(self.not_ready("start the container")));
        };
        let (agent, id) = (running.vm().agent.clone(), id.clone());
        self.operations.spawn(async move {
            let event = match agent.start(id.as_str()).await {
                Ok(()) => Event::StartDone,
                Err(error) if error.is_unanswered() => Event::StartUnanswered(error.into()),
                Err(error) => start_failed(error.into()),
            };
            Done::Event(id, event)
        });
        None
    }

    /// Goes on with the stops that an earlier daemon began: the agent sends no second signal, and
    /// the grace is not longer than it was.
    pub(crate) fn resume_stops(&mut self) {
        let now = clock::now_ns();
        let stopping: Vec<_> = self
            .containers
            .iter()
            .filter(|(_, container)| matches!(container.state, State::Terminating(_)))
            .filter_map(|(id, c)| Some((id.clone(), c.record.stopping.as_ref()?.left(now))))
            .collect();
        for (id, left) in stopping {
            self.signal(&id, SignalTarget::Init(STOP));
            self.after(&id, left, Event::GraceOver);
        }
    }

    fn kill(&mut self, id: &ContainerId) {
        self.signal(id, SignalTarget::All);
        self.after(id, KILL_LIMIT, Event::KillOver);
    }

    fn signal(&mut self, id: &ContainerId, target: SignalTarget) {
        let (Some(running), Some(container)) = (&self.running, self.containers.get(id)) else {
            return;
        };
        let signal = match target {
            SignalTarget::Init(_) => container.record.stop_signal,
            SignalTarget::All | SignalTarget::Exec(_) => Signal::KILL,
        };
        let (agent, id) = (running.vm().agent.clone(), id.clone());
        // A kill that was not answered is repeated: whoever waits for the end has no other way to it.
        let repeats = matches!(target, SignalTarget::All);
        let deadline = clock::after(KILL_REPEATED);
        // The result is the event of the process's end, not the answer to the signal.
        self.operations.spawn_silent(async move {
            let mut is_told = false;
            loop {
                let sent = agent.signal(id.as_str(), signal, target.clone());
                let error = match agent.guard(sent).await {
                    Ok(Err(error)) if !error.is_not_found() => error,
                    _ => return,
                };
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(container = %id, %signal, %error, "signal a container");
                }
                if !repeats || !error.is_unanswered() || Instant::now() > deadline {
                    return;
                }
                sleep(RETRY).await;
            }
        });
    }

    fn after(&mut self, id: &ContainerId, time: Duration, event: Event) {
        let id = id.clone();
        self.operations.spawn(async move {
            sleep(time).await;
            Done::Event(id, event)
        });
    }

    fn drain(&mut self, id: &ContainerId) {
        let log = self.containers.get_mut(id).and_then(|c| c.log.as_mut());
        let pumps = log.map(|log| log.take_pumps()).unwrap_or_default();
        let id = id.clone();
        self.operations.spawn(async move {
            let deadline = Instant::now() + DRAIN;
            for mut pump in pumps {
                if timeout_at(deadline, &mut pump).await.is_err() {
                    tracing::warn!(container = %id, "log could not be completed in time");
                    pump.abort();
                }
            }
            Done::Event(id, Event::Drained)
        });
    }

    fn delete_container(&mut self, id: &ContainerId) {
        let attachments = self.running.as_ref().map(|r| r.attachments.clone());
        let (images, id) = (Arc::clone(&self.node.images), id.clone());
        self.operations.spawn(async move {
            let unmade = unmake(&*images, attachments.as_ref(), &id, OnFailure::Stop).await;
            let event = match unmade {
                Ok(()) => Event::RemoveDone,
                Err(error) => Event::RemoveFailed(error),
            };
            Done::Event(id, event)
        });
    }

    async fn forget(&mut self, id: &ContainerId) -> Result<(), PodError> {
        let run = RunDir::of(&self.node.config, &self.record.id);
        // Before the record, by which alone it is known. A file that stays goes with the directory.
        let _ = std::fs::remove_file(run.log_position(id.as_str()));
        if let Err(error) = self.node.records.delete_container(id).await {
            tracing::error!(container = %id, %error, "delete the container's record");
            return Err(error.into());
        }
        if let Some(running) = &mut self.running {
            running.volumes.forget(id);
        }
        Ok(())
    }

    fn answer(&mut self, id: &ContainerId, wait: Wait, result: &Result<(), PodError>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if wait == Wait::Created {
            container.answer_creators(result);
        }
        for (waits_for, reply) in std::mem::take(&mut container.waiters) {
            if waits_for == wait {
                // The caller may be gone; the work is done all the same.
                let _ = reply.send(result.clone());
            } else {
                container.waiters.push((waits_for, reply));
            }
        }
        if container.state == State::Gone {
            container.refuse_updates();
            self.containers.remove(id);
            self.publish();
        }
    }

    pub(super) async fn save_container(&self, id: &ContainerId) -> Result<(), PodError> {
        let Some(container) = self.containers.get(id) else {
            return Ok(());
        };
        let saved = self.node.records.put_container(&container.record).await;
        saved.map_err(|error| {
            let cause = &error as &dyn std::error::Error;
            tracing::error!(container = %id, error = cause, "write the container's record");
            error.into()
        })
    }

    pub(super) fn announce_container(&self, id: &ContainerId, news: News) {
        let kind = match news {
            News::Created => EventKind::Created,
            News::Started => EventKind::Started,
            News::Stopped => EventKind::Stopped,
            News::Removed => EventKind::Removed,
        };
        self.tell(kind, Some(id.clone()));
    }
}

fn start_failed(error: PodError) -> Event {
    let exit = Exit {
        code: START_ERROR,
        reason: Reason::StartError,
        message: Report::new(&error).to_string(),
        at_ns: clock::now_ns(),
    };
    Event::StartFailed(error, exit)
}
