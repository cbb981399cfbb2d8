//! The tar stream of a layer on this node, made again by a worker: a recipe is what a worker left.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::runtime::Runtime;

use crate::config::Workers;
use crate::error::StoreError;
use crate::layer::source::BUFFER;
use crate::worker::job::{Failure, Job, file_error};
use crate::worker::pace::Pace;
use crate::worker::pipes::new_pipe;
use crate::worker::process::{Allowance, Worker, WorkerError, event_loop};

/// Memory of the worker: a decompressor's window and buffers, bytes.
const MEMORY: u64 = 64 << 20;
/// Longest answer, bytes.
const SHORT_ANSWER: usize = 16 << 10;

/// Reads the stream, and blocks for it. Whether it is the layer's shows in its digest.
#[derive(Debug)]
pub(crate) struct Remade {
    pipe: pipe::Receiver,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were read.
    position: usize,
    /// Until its answer has come.
    worker: Option<Worker>,
    pace: Pace,
    // The last, as the others are dropped on it.
    events: Runtime,
}

impl Remade {
    pub(crate) fn start(
        workers: &Workers,
        recipe: &File,
        data: &File,
    ) -> Result<Self, WorkerError> {
        let events = event_loop()?;
        let allowance = Allowance {
            memory: MEMORY,
            file_size: 0,
        };
        let (ours, theirs) = new_pipe()?;
        let descriptors = [recipe.as_fd(), data.as_fd(), theirs.as_fd()];
        let (pipe, worker) = events.block_on(async {
            let worker = Worker::start(workers, allowance, &Job::Remake, &descriptors).await?;
            let pipe = pipe::Receiver::from_owned_fd(ours).map_err(WorkerError::Talk)?;
            Ok::<_, WorkerError>((pipe, worker))
        })?;
        Ok(Self {
            pipe,
            buffer: Vec::with_capacity(BUFFER),
            position: 0,
            worker: Some(worker),
            pace: Pace::new(workers.patience),
            events,
        })
    }
}

impl Remade {
    /// Waits for as many bytes as the buffer holds, or the end. Less would let a worker trickle.
    fn refill(&mut self) -> Result<(), Stopped> {
        let Self {
            pipe, pace, buffer, ..
        } = self;
        buffer.clear();
        let filled = pace.keep(async {
            while buffer.len() < BUFFER {
                let count = pipe.read_buf(buffer).await.map_err(WorkerError::Talk)?;
                if count == 0 {
                    break;
                }
                pace.moved(count);
            }
            Ok::<_, WorkerError>(())
        });
        self.events.block_on(filled).map_err(WorkerError::from)??;
        self.position = 0;
        if self.buffer.len() >= BUFFER {
            return Ok(());
        }
        let Some(worker) = self.worker.take() else {
            return Ok(());
        };
        let answer = self.pace.keep(worker.answer::<()>(SHORT_ANSWER));
        match self.events.block_on(answer).map_err(WorkerError::from)?? {
            Ok(_) => Ok(()),
            Err(Failure::File { code, reason, .. }) => {
                Err(file_error("read its recipe".into(), code, reason).into())
            }
            Err(other) => Err(WorkerError::from(other).into()),
        }
    }
}

/// Why there is no more of the stream.
#[derive(Debug, thiserror::Error)]
enum Stopped {
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error(transparent)]
    Files(#[from] StoreError),
}

impl Read for Remade {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.position == self.buffer.len() {
            self.refill().map_err(io::Error::other)?;
        }
        let count = Read::read(&mut &self.buffer[self.position..], into)?;
        self.position += count;
        Ok(count)
    }
}
