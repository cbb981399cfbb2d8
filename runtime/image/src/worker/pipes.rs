//! Pipes between the daemon and workers.

use std::io;
use std::os::fd::OwnedFd;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::pace::Pace;
use super::process::WorkerError;

/// Bytes that a pipe holds; more only saves switches between processes.
const ROOM: usize = 256 << 10;

/// What came of handing bytes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Handed {
    All,
    /// The worker that they were for reads no more.
    Refused,
}

/// A pipe's end to read from, and the one to write to.
pub(crate) fn new_pipe() -> Result<(OwnedFd, OwnedFd), WorkerError> {
    let ends = pipe_with(PipeFlags::CLOEXEC).map_err(|e| WorkerError::Start(e.into()))?;
    // Refused to who has many pipes.
    let _ = fcntl_setpipe_size(&ends.0, ROOM);
    Ok(ends)
}

/// The end of a pipe to write to, here.
pub(crate) fn sender(pipe: OwnedFd) -> Result<pipe::Sender, WorkerError> {
    pipe::Sender::from_owned_fd(pipe).map_err(WorkerError::Talk)
}

/// Writes all of it, unless nobody reads it.
pub(crate) async fn hand(
    pipe: &mut pipe::Sender,
    mut bytes: &[u8],
    pace: &Pace,
) -> Result<Handed, WorkerError> {
    while !bytes.is_empty() {
        match pipe.write(bytes).await {
            Ok(count) => {
                pace.moved(count);
                bytes = &bytes[count..];
            }
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Handed::Refused),
            Err(e) => return Err(WorkerError::Talk(e)),
        }
    }
    Ok(Handed::All)
}
