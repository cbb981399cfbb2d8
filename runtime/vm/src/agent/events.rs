//! What the agent tells: each end of a process is one event with a number of its own.
//!
//! The stream is followed from the last number seen, on a new connection when the old one is
//! lost, so no event is missed or handled twice while this process lives. After a restart of the
//! daemon it begins with the first event that the agent kept; handling an end again has no effect.

use std::{ops::RangeInclusive, time::Duration};

use hull_proto_agent::agent::{Event, event::Kind};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use hull_base::{clock, panics::caught, printable::printable};

use crate::agent::{client::Agent, error::GuestError};

/// How many events may wait for the pod's task. A guest that sends faster is cut off: memory of
/// the host is not its to fill.
const BACKLOG: usize = 4096;
/// How long a lost agent is looked for.
const RECONNECT: Duration = Duration::from_secs(30);
/// How long a stream holds of an agent that is there.
const HELD: Duration = Duration::from_secs(10);
/// Pause before a lost agent is looked for. One length is enough: after [`RECONNECT`] the VM is ended.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest id that an event may carry.
const ID_MAX: usize = 128;
/// Longest failure of the stream that is shown.
const MESSAGE_MAX: usize = 1024;
/// The exit codes that there are (wait(2)); 128 + signal is among them.
const EXIT_CODES: RangeInclusive<i32> = 0..=255;

/// News from the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// A process ended.
    Exited(ProcessExit),
    /// The guest can't be dealt with any more, though the VM may run; why.
    Failed(String),
}

/// The end of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessExit {
    /// Id of the container.
    pub container: String,
    /// Id of the exec; empty: it was the container's first process.
    pub exec: String,
    /// The exit code, 0 to 255; 128 + signal when a signal ended it.
    pub code: i32,
    /// Whether the guest's kernel killed it for want of memory.
    pub oom_killed: bool,
    /// Whether the agent killed it because the exec's time was over.
    pub timed_out: bool,
    /// All that it wrote to standard output, in bytes.
    pub stdout_bytes: u64,
    /// All that it wrote to standard error, in bytes.
    pub stderr_bytes: u64,
    /// Unix time of the guest in nanoseconds.
    pub at_ns: u64,
}

/// How far the events of an agent have been handled.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Number of the last event that was handled.
    pub(crate) seen: u64,
    /// Whether the agent has said that events are missing.
    overran: bool,
}

impl Progress {
    /// Whether this is the first time that events are missing. A guest can say so as often as it
    /// likes, and must not fill the log.
    fn is_first_overrun(&mut self) -> bool {
        !std::mem::replace(&mut self.overran, true)
    }
}

/// How long the stream has not held. An agent that is there for a moment, again and again, is not there.
#[derive(Debug, Default)]
struct Loss {
    /// When the agent is given up; none: the stream is not lost.
    until: Option<Instant>,
}

impl Loss {
    /// Takes note of an event. One that is known proves nothing: a guest can repeat it on each connection.
    fn heard(&mut self, is_new: bool) {
        if is_new {
            self.until = None;
        }
    }

    /// Takes note of a stream that was open for so long, with or without events.
    fn ended_after(&mut self, open: Duration) {
        if open >= HELD {
            self.until = None;
        }
    }

    /// Returns until when the agent is looked for.
    fn deadline(&mut self) -> Instant {
        *self.until.get_or_insert_with(|| clock::after(RECONNECT))
    }
}

/// Follows the events of `agent` until the receiver is dropped.
pub fn follow(agent: Agent) -> mpsc::Receiver<GuestEvent> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        let why = tokio::select! {
            why = caught(pump(&agent, &sender)) => why.unwrap_or_else(|panic| panic.to_string()),
            why = agent.fault().told() => why,
        };
        // An error means that nobody is to be told: the pod is gone.
        let _ = sender.send(GuestEvent::Failed(why)).await;
    });
    receiver
}

/// Sends the events of `agent` until that fails, and returns why; nothing: nobody receives them.
async fn pump(agent: &Agent, sender: &mpsc::Sender<GuestEvent>) -> String {
    let mut progress = Progress::default();
    let mut loss = Loss::default();
    loop {
        if sender.is_closed() {
            return String::new();
        }
        let failure = match agent.events(progress.seen).await {
            Ok(mut stream) => {
                let opened = Instant::now();
                let failure = loop {
                    let event = tokio::select! {
                        event = stream.recv() => event,
                        () = sender.closed() => return String::new(),
                    };
                    match event {
                        Ok(Some(mut event)) => {
                            if let Some(Kind::Exited(exited)) = &mut event.kind {
                                agent.names().hear(&mut exited.container_id);
                            }
                            loss.heard(event.seq > progress.seen);
                            if let Err(error) = deliver(event, &mut progress, sender) {
                                return error.to_string();
                            }
                        }
                        Ok(None) => break "the agent ended its event stream".to_owned(),
                        Err(error) => break error.to_string(),
                    }
                };
                loss.ended_after(opened.elapsed());
                failure
            }
            Err(error) => error.to_string(),
        };
        let deadline = loss.deadline();
        if Instant::now() >= deadline {
            return lost(&failure);
        }
        tracing::debug!(%failure, "event stream of the guest is lost");
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = sender.closed() => return String::new(),
        }
        if let Err(error) = agent.reconnect(deadline).await {
            return lost(&error.to_string());
        }
    }
}

fn lost(failure: &str) -> String {
    // The text may be the guest's.
    let failure = printable(failure, MESSAGE_MAX);
    format!("the guest's agent is lost: {failure}")
}

/// Sends an event that is not known yet.
///
/// # Errors
/// [`GuestError::Misbehaved`].
pub(crate) fn deliver(
    event: Event,
    progress: &mut Progress,
    sender: &mpsc::Sender<GuestEvent>,
) -> Result<(), GuestError> {
    if event.seq <= progress.seen {
        return Ok(());
    }
    progress.seen = event.seq;
    match event.kind {
        Some(Kind::Exited(exited)) => {
            if exited.container_id.len() > ID_MAX || exited.exec_id.len() > ID_MAX {
                return Err(misbehaved("it sent an id that is too long"));
            }
            if !EXIT_CODES.contains(&exited.code) {
                return Err(misbehaved(format!("it sent the exit code {}", exited.code)));
            }
            let exit = ProcessExit {
                container: exited.container_id,
                exec: exited.exec_id,
                code: exited.code,
                oom_killed: exited.oom_killed,
                timed_out: exited.timed_out,
                stdout_bytes: exited.stdout_bytes,
                stderr_bytes: exited.stderr_bytes,
                at_ns: exited.at_ns,
            };
            sender
                .try_send(GuestEvent::Exited(exit))
                .map_err(|_| misbehaved("it sends events faster than they can be handled"))
        }
        Some(Kind::Overrun(_)) => {
            if progress.is_first_overrun() {
                tracing::warn!(seq = event.seq, "the agent no longer keeps earlier events");
            }
            Ok(())
        }
        // An OOM kill is told with the end of the process; the event is only news.
        Some(Kind::Oom(oom)) => {
            let container = printable(&oom.container_id, ID_MAX);
            tracing::debug!(%container, "out of memory in the guest");
            Ok(())
        }
        _ => Ok(()),
    }
}

fn misbehaved(what: impl Into<String>) -> GuestError {
    GuestError::Misbehaved { what: what.into() }
}

#[cfg(test)]
mod tests {
    use hull_proto_agent::agent::Exited;

    use super::*;

    fn exited(seq: u64, container: &str) -> Event {
        Event {
            seq,
            kind: Some(Kind::Exited(Exited {
                container_id: container.into(),
                ..Exited::default()
            })),
            ..Event::default()
        }
    }

    #[test]
    fn an_event_is_delivered_once() {
        let (sender, mut receiver) = mpsc::channel(8);
        let mut progress = Progress::default();
        for seq in [1, 2, 1, 2, 3] {
            deliver(exited(seq, "c"), &mut progress, &sender).unwrap();
        }
        let mut count = 0;
        while receiver.try_recv().is_ok() {
            count += 1;
        }
        assert_eq!((count, progress.seen), (3, 3));
    }

    #[test]
    fn an_agent_is_given_up_that_only_repeats_itself_and_one_that_was_there_is_not() {
        let mut loss = Loss::default();
        let first = loss.deadline();
        std::thread::sleep(Duration::from_millis(2));
        // A known event on each connection, which ends at once.
        loss.heard(false);
        loss.ended_after(Duration::from_secs(1));
        assert_eq!(loss.deadline(), first);
        loss.heard(true);
        let second = loss.deadline();
        assert!(second > first);
        std::thread::sleep(Duration::from_millis(2));
        // A stream without events, but for long.
        loss.ended_after(HELD);
        assert!(loss.deadline() > second);
    }

    #[test]
    fn missing_events_are_told_once() {
        let mut progress = Progress::default();
        assert!(progress.is_first_overrun());
        assert!(!progress.is_first_overrun());
    }

    #[test]
    fn a_flood_and_a_monster_are_cut_off() {
        let (sender, _receiver) = mpsc::channel(2);
        let mut progress = Progress::default();
        deliver(exited(1, "c"), &mut progress, &sender).unwrap();
        deliver(exited(2, "c"), &mut progress, &sender).unwrap();
        assert!(deliver(exited(3, "c"), &mut progress, &sender).is_err());
        assert!(deliver(exited(4, &"x".repeat(200)), &mut progress, &sender).is_err());
    }

    #[test]
    fn an_exit_code_is_one_of_a_process() {
        let (sender, mut receiver) = mpsc::channel(8);
        for (seq, code) in [(1, i32::MIN), (2, -1), (3, 256), (4, 0), (u64::MAX, 255)] {
            let mut event = exited(seq, "c");
            event.mut_exited().code = code;
            event.mut_exited().at_ns = u64::MAX;
            assert_eq!(
                deliver(event, &mut Progress::default(), &sender).is_ok(),
                (0..256).contains(&code)
            );
        }
        assert_eq!(receiver.len(), 2);
        assert!(receiver.try_recv().is_ok());
    }
}
