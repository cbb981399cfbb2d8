//! The daemon's end of a worker: it is started, asked, and gone when this value is.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use error_reporter::Report;
use hull_base::pidfd::Pidfd;
use hull_jail::start_apart;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::config::Workers;
use crate::error::PullError;

use super::control::{frame, send};
use super::entry::COMMAND;
use super::job::{Failure, Job};
use super::pace::{Hangs, Pace};

/// What a process may use; its program and buffers come on top of the memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance {
    /// Bytes of memory of its own.
    pub(crate) memory: u64,
    /// Largest file that it may make, bytes.
    pub(crate) file_size: u64,
}

/// Why a worker is of no use. It is ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkerError {
    #[error("can't be started")]
    Start(#[source] io::Error),
    #[error("can't be spoken with")]
    Talk(#[source] io::Error),
    #[error("ended without an answer, {0}")]
    Ended(ExitStatus),
    #[error("did next to nothing for {0} s")]
    Hangs(u64),
    #[error("answered what can't be: {0}")]
    Lies(&'static str),
    #[error("can't give up its powers: {0}")]
    NotLockedIn(String),
    #[error("has a fault")]
    Panicked,
    #[error("was ended: nobody waits for it")]
    Unwanted,
}

/// Of a failure that is no answer to the job.
impl From<Failure> for WorkerError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotLockedIn(reason) => Self::NotLockedIn(reason),
            Failure::Panicked => Self::Panicked,
            _ => Self::Lies("a failure of another job"),
        }
    }
}

impl From<WorkerError> for PullError {
    fn from(error: WorkerError) -> Self {
        Self::Worker {
            what: "an image".into(),
            reason: Report::new(error).to_string(),
        }
    }
}

impl From<Hangs> for WorkerError {
    fn from(hangs: Hangs) -> Self {
        Self::Hangs(hangs.seconds)
    }
}

/// An event loop for the workers of one job, on the thread that waits for them anyway.
pub(crate) fn event_loop() -> Result<Runtime, WorkerError> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().map_err(WorkerError::Start)
}

/// A process with a job.
///
/// It ends when the thread that started it does, so all of a job is one thread's.
#[derive(Debug)]
pub(crate) struct Worker {
    control: UnixStream,
    process: Process,
}

impl Worker {
    /// Starts a worker and hands it its job.
    pub(crate) async fn start(
        workers: &Workers,
        allowance: Allowance,
        job: &Job,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Self, WorkerError> {
        let (ours, theirs) = StdStream::pair().map_err(WorkerError::Start)?;
        ours.set_nonblocking(true).map_err(WorkerError::Start)?;
        let worker = Self {
            control: UnixStream::from_std(ours).map_err(WorkerError::Start)?,
            process: Process::start(workers, allowance, job, theirs).map_err(WorkerError::Start)?,
        };
        let job = postcard::to_stdvec(job)
            .map_err(io::Error::other)
            .and_then(|job| frame(&job));
        let job = job.map_err(WorkerError::Talk)?;
        worker.send(&job, descriptors).await?;
        Ok(worker)
    }

    /// Hands over one more file.
    pub(crate) async fn give(&self, file: BorrowedFd<'_>) -> Result<(), WorkerError> {
        self.send(&[0], &[file]).await
    }

    async fn send(
        &self,
        mut bytes: &[u8],
        mut descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), WorkerError> {
        while !bytes.is_empty() {
            let sent = self.control.async_io(Interest::WRITABLE, || {
                send(&self.control, bytes, descriptors)
            });
            match sent.await {
                Ok(count) => bytes = &bytes[count..],
                // It has ended. Why is in its answer, or in how it ended.
                Err(e) if gone(&e) => return Ok(()),
                Err(e) => return Err(WorkerError::Talk(e)),
            }
            descriptors = &[];
        }
        Ok(())
    }

    /// The answer, of at most so many bytes, and what follows it in these; the process has ended then.
    pub(crate) async fn answer<T: DeserializeOwned>(
        mut self,
        longest: usize,
    ) -> Result<Result<(T, Vec<u8>), Failure>, WorkerError> {
        let mut length = [0; 4];
        if let Err(e) = self.control.read_exact(&mut length).await {
            return Err(self.unanswered(e).await);
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > longest {
            return Err(WorkerError::Lies("too much"));
        }
        let mut answer = vec![0; length];
        if let Err(e) = self.control.read_exact(&mut answer).await {
            return Err(self.unanswered(e).await);
        }
        match self.control.read(&mut [0]).await {
            Ok(0) => {}
            // It has ended before it read all that it was told.
            Err(e) if gone(&e) => {}
            Ok(_) => return Err(WorkerError::Lies("more than an answer")),
            Err(e) => return Err(WorkerError::Talk(e)),
        }
        let status = self.process.ended().await.map_err(WorkerError::Talk)?;
        if !status.success() {
            return Err(WorkerError::Ended(status));
        }
        decoded(&answer)
    }

    async fn unanswered(&mut self, error: io::Error) -> WorkerError {
        if error.kind() != io::ErrorKind::UnexpectedEof && !gone(&error) {
            return WorkerError::Talk(error);
        }
        match self.process.ended().await {
            Ok(status) => WorkerError::Ended(status),
            Err(e) => WorkerError::Talk(e),
        }
    }
}

/// What is in an answer: the result and what follows it, or the reason why there is none.
pub(crate) fn decoded<T: DeserializeOwned>(
    answer: &[u8],
) -> Result<Result<(T, Vec<u8>), Failure>, WorkerError> {
    let (result, rest) = postcard::take_from_bytes::<Result<T, Failure>>(answer)
        .map_err(|_| WorkerError::Lies("no answer"))?;
    match result {
        Ok(result) => Ok(Ok((result, rest.to_vec()))),
        Err(failure) => Ok(Err(failure.shown())),
    }
}

/// Does what takes workers, on an event loop of its own, unless they hang: see [`Pace`] for
/// `patience`. Blocks.
pub(crate) fn supervised<T, E: From<WorkerError>>(
    patience: Duration,
    work: impl AsyncFnOnce(&Pace) -> Result<T, E>,
) -> Result<T, E> {
    let pace = Pace::new(patience);
    let done = event_loop()?.block_on(pace.keep(work(&pace)));
    done.map_err(WorkerError::from)?
}

/// Whether the other end of a pipe or socket is closed.
fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

#[derive(Debug)]
struct Process {
    child: Child,
    pidfd: Pidfd,
}

impl Process {
    fn start(
        workers: &Workers,
        allowance: Allowance,
        job: &Job,
        socket: StdStream,
    ) -> io::Result<Self> {
        let mut command = Command::new(&workers.program);
        command
            .args([COMMAND, job.name()])
            .args(
                [
                    u64::from(workers.user),
                    allowance.memory,
                    allowance.file_size,
                ]
                .map(|n| n.to_string()),
            )
            // It may hold secrets, as of proxies.
            .env_clear()
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(socket)))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = start_apart(&mut command)?;
        match Pidfd::open(child.id()) {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(e) => {
                child.kill()?;
                child.wait()?;
                Err(e)
            }
        }
    }

    async fn ended(&mut self) -> io::Result<ExitStatus> {
        self.pidfd.ended().await;
        self.child.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only for a process that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
