//! A command run in a container, with its output collected.

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

use std::time::Duration;

use tokio::{sync::watch, time::timeout};

use crate::{
    driver::ExecHandle,
    error::PodError,
    guest::{
        client::{Agent, Exec},
        stdio::{Output, OutputEnd, OutputKind},
    },
    id::ContainerId,
    info::ExecOutput,
};

/// Most output of each kind that is returned; the rest is read and dropped.
const OUTPUT_MAX: usize = 16 << 20;
/// How much longer than its own time limit a command may take: the agent has to kill it.
const KILL_MARGIN: Duration = Duration::from_secs(15);
const BUFFER: usize = 64 * 1024;

/// Runs a command to its end. Dropping the future closes its streams, and the agent kills it.
pub(crate) async fn sync(
    handle: ExecHandle,
    container: &ContainerId,
    exec_id: &str,
    args: Vec<String>,
    limit: Option<Duration>,
) -> Result<ExecOutput, PodError> {
    let late = || PodError::DeadlineExceeded {
        action: "run a command in the container".into(),
        seconds: limit.unwrap_or_default().as_secs(),
    };
    let work = run(handle, container, exec_id, args, limit);
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

async fn run(
    handle: ExecHandle,
    container: &ContainerId,
    exec_id: &str,
    args: Vec<String>,
    limit: Option<Duration>,
) -> Result<Ended, PodError> {
    let exec = Exec {
        container: container.as_str(),
        id: exec_id,
        args,
        timeout: limit,
        tty: false,
        stdin: false,
    };
    handle.agent.exec(exec).await?;
    let collect = |kind, end| collect(&handle.agent, kind, container, exec_id, end);
    let (stdout, stderr, exit) = tokio::join!(
        collect(OutputKind::Stdout, handle.stdout_end),
        collect(OutputKind::Stderr, handle.stderr_end),
        handle.exited,
    );
    let Ok(exit) = exit else {
        return Err(PodError::precondition(
            "run a command in the container",
            "the VM ended meanwhile",
        ));
    };
    if exit.timed_out {
        return Ok(Ended::TimedOut);
    }
    Ok(Ended::ByItself(ExecOutput {
        stdout,
        stderr,
        exit_code: exit.code,
    }))
}

async fn collect(
    agent: &Agent,
    kind: OutputKind,
    container: &ContainerId,
    exec_id: &str,
    end: watch::Receiver<OutputEnd>,
) -> Vec<u8> {
    let mut output = Output::new(agent, kind, container.as_str(), exec_id, 0, end);
    let mut collected = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let bytes = output.read(&mut buffer).await;
        if bytes.is_empty() {
            return collected;
        }
        let room = OUTPUT_MAX.saturating_sub(collected.len());
        collected.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        total = u64::saturating_add(total, bytes.len() as u64);
        output.acknowledge(total).await;
    }
}
