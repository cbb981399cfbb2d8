//! What the agent tells: each end of a process is one event with a number of its own.
//!
//! The stream is followed from the last number seen, on a new connection when the old one is
//! lost, so no event is missed or handled twice while this process lives. After a restart of the
//! daemon it begins with the first event that the agent kept; handling an end again has no effect.

use std::time::Duration;

use hull_proto_agent::agent::{Event, event::Kind};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::client::Agent;

/// How many events may wait for the pod's task. A guest that sends faster is cut off: memory of
/// the host is not its to fill.
const BACKLOG: usize = 4096;
/// How long a lost agent is looked for.
const RECONNECT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(100);
/// Longest id that an event may carry.
const ID_MAX: usize = 128;

/// News from the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GuestEvent {
    /// A process ended.
    Exited(ProcessExit),
    /// The agent can't be heard any more, though the VM may run.
    Lost(String),
}

/// The end of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ProcessExit {
    pub container: String,
    /// Empty: the container's first process.
    pub exec: String,
    pub code: i32,
    pub oom_killed: bool,
    pub timed_out: bool,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    /// Unix time of the guest in nanoseconds.
    pub at_ns: u64,
}

/// Follows the events of `agent` until the receiver is dropped.
pub(crate) fn follow(agent: Agent) -> mpsc::Receiver<GuestEvent> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        let why = pump(&agent, &sender).await;
        // Nobody to tell: the pod is gone.
        let _ = sender.send(GuestEvent::Lost(why)).await;
    });
    receiver
}

/// Returns why it can't go on.
async fn pump(agent: &Agent, sender: &mpsc::Sender<GuestEvent>) -> String {
    let mut seen = 0;
    let mut lost_since: Option<Instant> = None;
    loop {
        if sender.is_closed() {
            return String::new();
        }
        let failure = match agent.events(seen).await {
            Ok(mut stream) => loop {
                let event = tokio::select! {
                    event = stream.recv() => event,
                    () = sender.closed() => return String::new(),
                };
                match event {
                    Ok(Some(event)) => {
                        lost_since = None;
                        if let Err(why) = deliver(event, &mut seen, sender) {
                            return why.into();
                        }
                    }
                    Ok(None) => break "the agent ended its event stream".to_owned(),
                    Err(error) => break error.to_string(),
                }
            },
            Err(error) => error.to_string(),
        };
        let since = *lost_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= RECONNECT {
            return failure;
        }
        tracing::debug!(%failure, "event stream of the guest is lost");
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = sender.closed() => return String::new(),
        }
        if let Err(error) = agent.reconnect(since + RECONNECT).await {
            return error.to_string();
        }
    }
}

fn deliver(
    event: Event,
    seen: &mut u64,
    sender: &mpsc::Sender<GuestEvent>,
) -> Result<(), &'static str> {
    if event.seq <= *seen {
        return Ok(());
    }
    *seen = event.seq;
    match event.kind {
        Some(Kind::Exited(exited)) => {
            if exited.container_id.len() > ID_MAX || exited.exec_id.len() > ID_MAX {
                return Err("the agent sent an id that is too long");
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
                .map_err(|_| "the agent sends events faster than they can be handled")
        }
        Some(Kind::Overrun(_)) => {
            tracing::warn!(seq = event.seq, "the agent no longer keeps earlier events");
            Ok(())
        }
        // An OOM kill is told with the end of the process; the event is only news.
        Some(Kind::Oom(oom)) => {
            let container = super::printable(&oom.container_id, ID_MAX);
            tracing::debug!(%container, "out of memory in the guest");
            Ok(())
        }
        _ => Ok(()),
    }
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
        let mut seen = 0;
        for seq in [1, 2, 1, 2, 3] {
            deliver(exited(seq, "c"), &mut seen, &sender).unwrap();
        }
        let mut count = 0;
        while receiver.try_recv().is_ok() {
            count += 1;
        }
        assert_eq!((count, seen), (3, 3));
    }

    #[test]
    fn a_flood_and_a_monster_are_cut_off() {
        let (sender, _receiver) = mpsc::channel(2);
        let mut seen = 0;
        deliver(exited(1, "c"), &mut seen, &sender).unwrap();
        deliver(exited(2, "c"), &mut seen, &sender).unwrap();
        assert!(deliver(exited(3, "c"), &mut seen, &sender).is_err());
        assert!(deliver(exited(4, &"x".repeat(200)), &mut seen, &sender).is_err());
    }
}
