//! Signals that ask a command at a prompt to end.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Does it, unless a signal asks for our end: then what it holds is dropped, a terminal restored with
/// it, and the exit code is a shell's.
pub(crate) async fn until_signal(work: impl Future<Output = Result<u8>>) -> Result<u8> {
    let handler = |kind| signal(kind).context("install signal handlers");
    let mut interrupt = handler(SignalKind::interrupt())?;
    let mut terminate = handler(SignalKind::terminate())?;
    let mut hang_up = handler(SignalKind::hangup())?;
    tokio::select! {
        code = work => code,
        _ = interrupt.recv() => Ok(130),
        _ = terminate.recv() => Ok(143),
        _ = hang_up.recv() => Ok(129),
    }
}
