//! A command run in a container, with its output collected.
//!
//! Each command may collect a little without asking, which is more than kubelet reads of a probe;
//! for more it takes room of its pod's and of the node's. So a pod whose commands write much or
//! never end can refuse others the room for much, and nobody a probe.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, timeout},
};

use hull_spec::{error::PodError, id::ContainerId, info::ExecOutput};
use hull_vm::agent::{
    client::{Agent, Exec},
    stdio::{Output, OutputEnd, OutputKind},
};

use crate::{
    command::ExecHandle,
    session::{exec::kill_left, permits::OUTPUT_MAX},
};

/// What a command may collect of each kind without taking room.
const OUTPUT_FREE: usize = 16 << 10;
/// For errors.
pub(crate) const ACTION: &str = "run a command in the container";
/// How much longer than its time limit the agent is waited for: it has to kill the command, and to
/// say so.
const KILL_MARGIN: Duration = Duration::from_millis(500);
const BUFFER: usize = 64 * 1024;

/// Runs a command to its end. Dropping the future closes its streams, and has it killed.
pub(crate) async fn sync(
    handle: impl Future<Output = Result<ExecHandle, PodError>>,
    container: &ContainerId,
    exec_id: &str,
    args: Vec<String>,
    limit: Option<Duration>,
    room: &Room,
) -> Result<ExecOutput, PodError> {
    let late = || PodError::DeadlineExceeded {
        action: ACTION.into(),
        seconds: limit.unwrap_or_default().as_secs(),
    };
    let begin = Instant::now();
    let work = async {
        let handle = handle.await?;
        let left = limit.map(|limit| limit.saturating_sub(begin.elapsed()));
        let agent = handle.agent.clone();
        let work = run(handle, container, exec_id, args, left, room);
        agent.guard(work).await?
    };
    let ended = match limit {
        Some(limit) => timeout(limit.saturating_add(KILL_MARGIN), work).await,
        None => Ok(work.await),
    };
    match ended {
        Ok(Ok(Ended::ByItself(output))) => Ok(output),
        Ok(Ok(Ended::TimedOut)) | Err(_) => Err(late()),
        Ok(Err(error)) => Err(error),
    }
}

enum Ended {
    ByItself(ExecOutput),
    TimedOut,
}

/// A command that is killed when it is left before its end.
struct Left {
    agent: Agent,
    container: ContainerId,
    exec: String,
    ended: bool,
}

impl Drop for Left {
    fn drop(&mut self) {
        if !self.ended {
            kill_left(&self.agent, &self.container, std::mem::take(&mut self.exec));
        }
    }
}

async fn run(
    handle: ExecHandle,
    container: &ContainerId,
    exec_id: &str,
    args: Vec<String>,
    limit: Option<Duration>,
    room: &Room,
) -> Result<Ended, PodError> {
    let exec = Exec {
        container: container.as_str(),
        id: exec_id,
        args,
        timeout: limit,
        tty: false,
        stdin: false,
    };
    let mut left = Left {
        agent: handle.agent.clone(),
        container: container.clone(),
        exec: exec_id.to_owned(),
        ended: false,
    };
    if let Err(error) = handle.agent.exec(exec).await {
        // It was not started, unless nobody knows.
        left.ended = error.is_refusal();
        return Err(error.into());
    }
    let collect = |kind, end: watch::Receiver<OutputEnd>| {
        let output = Output::new(&handle.agent, kind, container.as_str(), exec_id, 0, end);
        collect(output, room)
    };
    let (stdout, stderr, exit) = tokio::try_join!(
        collect(OutputKind::Stdout, handle.stdout_end),
        collect(OutputKind::Stderr, handle.stderr_end),
        async { Ok(handle.exited.await) },
    )?;
    left.ended = true;
    let Ok(exit) = exit else {
        return Err(PodError::precondition(ACTION, "the VM ended meanwhile"));
    };
    if exit.timed_out {
        return Ok(Ended::TimedOut);
    }
    Ok(Ended::ByItself(ExecOutput {
        stdout: stdout.bytes,
        stderr: stderr.bytes,
        exit_code: exit.code,
    }))
}

/// Where commands take room for their output.
#[derive(Debug)]
pub(crate) struct Room {
    pub pod: Arc<Semaphore>,
    pub node: Arc<Semaphore>,
}

impl Room {
    fn take(&self, bytes: usize) -> Result<[OwnedSemaphorePermit; 2], PodError> {
        let take = |from: &Arc<Semaphore>, whose: &str| {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            let permit = Arc::clone(from).try_acquire_many_owned(bytes);
            permit.map_err(|_| PodError::ResourceExhausted {
                action: ACTION.into(),
                reason: format!("commands of {whose} write too much at a time"),
            })
        };
        Ok([take(&self.pod, "the pod")?, take(&self.node, "all pods")?])
    }
}

/// Output that was collected, with the room that it takes.
#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    room: Vec<[OwnedSemaphorePermit; 2]>,
}

impl Collected {
    /// Keeps as much as it may; the rest is dropped.
    fn append(&mut self, bytes: &[u8], room: &Room) -> Result<(), PodError> {
        let left = OUTPUT_MAX.saturating_sub(self.bytes.len());
        let bytes = bytes.get(..left).unwrap_or(bytes);
        let needed = self.bytes.len().saturating_add(bytes.len());
        let has = self.bytes.capacity().max(OUTPUT_FREE);
        let mut wanted = has;
        if needed > has {
            wanted = needed.max(has.saturating_mul(2)).min(OUTPUT_MAX);
            self.room.push(room.take(wanted.saturating_sub(has))?);
        }
        if needed > self.bytes.capacity() {
            let more = wanted.saturating_sub(self.bytes.len());
            self.bytes.reserve_exact(more);
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

async fn collect(mut output: Output, room: &Room) -> Result<Collected, PodError> {
    let mut collected = Collected::default();
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let bytes = output.read(&mut buffer).await;
        if bytes.is_empty() {
            return Ok(collected);
        }
        collected.append(bytes, room)?;
        total = u64::saturating_add(total, bytes.len() as u64);
        output.acknowledge(total).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::permits::{NODE_OUTPUT, POD_OUTPUT};

    fn room(pod: usize, node: usize) -> Room {
        Room {
            pod: Arc::new(Semaphore::new(pod)),
            node: Arc::new(Semaphore::new(node)),
        }
    }

    #[test]
    fn output_takes_the_room_that_it_needs_and_gives_it_back() {
        let room = room(POD_OUTPUT, NODE_OUTPUT);
        let mut collected = Collected::default();
        let piece = vec![7; BUFFER];
        for _ in 0..OUTPUT_MAX / BUFFER + 10 {
            collected.append(&piece, &room).unwrap();
        }
        assert_eq!(collected.bytes.len(), OUTPUT_MAX);
        assert_eq!(collected.bytes.capacity(), OUTPUT_MAX);
        let taken = OUTPUT_MAX - OUTPUT_FREE;
        assert_eq!(room.pod.available_permits(), POD_OUTPUT - taken);
        assert_eq!(room.node.available_permits(), NODE_OUTPUT - taken);
        drop(collected);
        assert_eq!(room.node.available_permits(), NODE_OUTPUT);
    }

    #[test]
    fn without_room_there_is_still_enough_for_a_probe() {
        for room in [room(0, 1 << 30), room(1 << 30, 0)] {
            let mut collected = Collected::default();
            collected.append(&[7; OUTPUT_FREE], &room).unwrap();
            let refused = collected.append(&[7], &room).unwrap_err();
            assert!(matches!(refused, PodError::ResourceExhausted { .. }));
        }
    }
}
