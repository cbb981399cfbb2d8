//! One output stream: from the process into the replay buffer, from there to
//! whichever connection the host has now.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hull_proto_agent::stream::{END_OF_OUTPUT, encode_chunk};
use nix::errno::Errno;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::watch,
    time::timeout,
};
use tracing::debug;

use super::{
    buffer::{BeyondEnd, Replay},
    connection::Connection,
    fd::Fd,
};

/// Most bytes that wait for the host; after that the process blocks.
const CAPACITY: usize = 1 << 20;
/// Bytes moved at once.
const CHUNK: usize = 64 << 10;

/// The output of one process: what it wrote and whether more may come.
#[derive(Debug)]
pub(crate) struct Output {
    state: Mutex<State>,
    /// Counts changes of `state`, for all who wait for one.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    replay: Replay,
    phase: Phase,
    /// Number of the connection that serves the stream; older ones end.
    connection: u64,
}

/// How far the process's side is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// More may come.
    #[default]
    Open,
    /// The process ended: take what is in the pipe even when the buffer is full.
    Draining,
    /// All bytes are here.
    Closed,
}

impl Output {
    /// Returns a stream without an end, fed by [`Self::pump`].
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let result = f(&mut self.state());
        self.changed.send_modify(|n| *n += 1);
        result
    }

    /// Returns how many bytes the process wrote so far.
    pub(crate) fn total(&self) -> u64 {
        self.state().replay.total()
    }

    /// Returns whether the host has everything and nothing more can come.
    pub(crate) fn finished(&self) -> bool {
        let state = self.state();
        state.phase == Phase::Closed && state.replay.len() == 0
    }

    /// Reads `source` until its end. A full buffer stops the reading, and so,
    /// soon after, the process.
    pub(crate) async fn pump(self: Arc<Self>, source: Arc<Fd>) {
        let mut chunk = vec![0; CHUNK];
        let mut changed = self.changed.subscribe();
        loop {
            changed.mark_unchanged();
            let (phase, room) = {
                let state = self.state();
                (state.phase, CAPACITY.saturating_sub(state.replay.len()))
            };
            let room = match phase {
                Phase::Open if room == 0 => {
                    let _ = changed.changed().await;
                    continue;
                }
                Phase::Open => room.min(CHUNK),
                // After the stream's end, read on for those that still hold the
                // pipe: they must neither block nor be killed by SIGPIPE.
                Phase::Draining | Phase::Closed => CHUNK,
            };
            match source.read(&mut chunk[..room]).await {
                Ok(0) => break,
                Ok(n) => self.change(|state| {
                    if state.phase != Phase::Closed {
                        state.replay.push(&chunk[..n]);
                    }
                }),
                // A terminal whose last user is gone (pty(7)).
                Err(e) if e.raw_os_error() == Some(Errno::EIO as i32) => break,
                Err(error) => {
                    debug!(%error, "read output");
                    break;
                }
            }
        }
        self.change(|state| state.phase = Phase::Closed);
    }

    /// Closes a stream that will never have a source.
    pub(crate) fn close(&self) {
        self.change(|state| state.phase = Phase::Closed);
    }

    /// Ends the stream of a process that is gone: takes all that it wrote, then
    /// waits up to `patience` for others that still hold its pipe. Returns the
    /// stream's final length.
    pub(crate) async fn finish(&self, patience: Duration) -> u64 {
        self.change(|state| {
            if state.phase == Phase::Open {
                state.phase = Phase::Draining;
            }
        });
        let mut changed = self.changed.subscribe();
        let closed = changed.wait_for(|_| self.state().phase == Phase::Closed);
        if timeout(patience, closed).await.is_err() {
            self.close();
        }
        self.total()
    }

    /// Takes the stream over for a new connection of a host that has the bytes
    /// before `offset`. Returns the number of the connection and the offset of
    /// the first byte that it will get.
    pub(crate) fn attach(&self, offset: u64) -> Result<(u64, u64), BeyondEnd> {
        self.change(|state| {
            state.replay.ack(offset)?;
            state.connection += 1;
            Ok((state.connection, state.replay.start()))
        })
    }

    /// Serves the connection `number` from `offset` on until the host leaves or
    /// a newer connection replaces it.
    pub(crate) async fn serve(
        &self,
        number: u64,
        offset: u64,
        connection: Connection,
    ) -> io::Result<()> {
        let (mut reader, mut writer) = tokio::io::split(connection);
        let send = async {
            let mut next = offset;
            let mut changed = self.changed.subscribe();
            loop {
                changed.mark_unchanged();
                let (closed, chunk) = {
                    let state = self.state();
                    if state.connection != number {
                        return Ok(());
                    }
                    let (from, bytes) = state.replay.read(next, CHUNK);
                    let length = bytes.iter().map(|part| part.len() as u64).sum::<u64>();
                    next = from + length;
                    let chunk = (length > 0).then(|| encode_chunk(bytes)).transpose()?;
                    (state.phase == Phase::Closed, chunk)
                };
                if let Some(chunk) = chunk {
                    writer.write_all(&chunk).await?;
                } else if closed {
                    writer.write_all(&END_OF_OUTPUT).await?;
                    // The acknowledgements still matter, and that the host is there.
                    return std::future::pending().await;
                } else if changed.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        let receive = async {
            let mut total = [0; 8];
            loop {
                reader.read_exact(&mut total).await?;
                self.change(|state| state.replay.ack(u64::from_le_bytes(total)))
                    .map_err(io::Error::other)?;
            }
        };
        let replaced = async {
            let mut changed = self.changed.subscribe();
            let _ = changed
                .wait_for(|_| self.state().connection != number)
                .await;
            Ok(())
        };
        tokio::select! {
            result = send => result,
            result = receive => result,
            result = replaced => result,
        }
    }
}

/// Makes a pipe and returns the end for the process and the one to pump from.
pub(crate) fn pipe() -> io::Result<(OwnedFd, Arc<Fd>)> {
    let (reader, writer) = io::pipe()?;
    Ok((writer.into(), Arc::new(Fd::new(reader.into())?)))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use hull_proto_agent::stream::ChunkDecoder;

    use super::*;

    async fn read_all(output: &Arc<Output>, offset: u64, ack: bool) -> (u64, Vec<u8>) {
        let (ours, theirs) = tokio::io::duplex(1000);
        let (number, from) = output.attach(offset).unwrap();
        let serving = {
            let output = Arc::clone(output);
            tokio::spawn(async move { output.serve(number, from, Box::new(theirs)).await })
        };
        let (mut reader, mut writer) = tokio::io::split(ours);
        let (mut decoder, mut bytes) = (ChunkDecoder::default(), Vec::new());
        while !decoder.has_ended() {
            let mut read = vec![0; 100];
            let length = reader.read(&mut read).await.unwrap();
            assert_ne!(length, 0, "the connection was lost");
            let length = decoder.decode(&mut read[..length]).unwrap();
            bytes.extend_from_slice(&read[..length]);
        }
        if ack {
            writer
                .write_all(&(from + bytes.len() as u64).to_le_bytes())
                .await
                .unwrap();
        }
        drop((reader, writer));
        let _ = serving.await.unwrap();
        (from, bytes)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn output_outlives_its_process_and_connections() {
        let (process, source) = pipe().unwrap();
        let output = Output::new();
        tokio::spawn(Arc::clone(&output).pump(source));
        File::from(process).write_all(b"hello world").unwrap();
        assert_eq!(output.finish(Duration::from_secs(5)).await, 11);

        assert_eq!(
            read_all(&output, 0, false).await,
            (0, b"hello world".to_vec())
        );
        assert!(!output.finished());
        assert_eq!(read_all(&output, 6, false).await, (6, b"world".to_vec()));
        // The host said that it has the first six bytes.
        assert_eq!(read_all(&output, 2, true).await, (6, b"world".to_vec()));
        assert!(output.finished());
        assert!(output.attach(12).is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_full_buffer_holds_the_process_until_the_host_takes_bytes() {
        let (process, source) = pipe().unwrap();
        let output = Output::new();
        tokio::spawn(Arc::clone(&output).pump(source));
        let total = CAPACITY + (1 << 20);
        let writing = tokio::task::spawn_blocking(move || {
            File::from(process).write_all(&vec![b'x'; total]).unwrap();
        });
        let _ = timeout(Duration::from_millis(200), async {
            loop {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(output.total(), CAPACITY as u64);
        assert!(!writing.is_finished());
        let (_, first) = output.attach(CAPACITY as u64).unwrap();
        assert_eq!(first, CAPACITY as u64);
        writing.await.unwrap();
        assert_eq!(output.finish(Duration::from_secs(5)).await, total as u64);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_background_process_does_not_hold_the_end_back() {
        let (process, source) = pipe().unwrap();
        let output = Output::new();
        tokio::spawn(Arc::clone(&output).pump(source));
        let mut process = File::from(process);
        process.write_all(b"early").unwrap();
        assert_eq!(output.finish(Duration::from_millis(50)).await, 5);
        process.write_all(b"late").unwrap();
        assert_eq!(read_all(&output, 0, true).await, (0, b"early".to_vec()));
        assert_eq!(output.total(), 5);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_output_that_its_process_closed_says_so_to_each_connection() {
        let (process, source) = pipe().unwrap();
        let output = Output::new();
        tokio::spawn(Arc::clone(&output).pump(source));
        let mut process = File::from(process);
        process.write_all(b"all there is").unwrap();
        // The process lives on.
        drop(process);
        let all = b"all there is".to_vec();
        assert_eq!(read_all(&output, 0, false).await, (0, all));
        // The next daemon, and one that had stored all.
        assert_eq!(read_all(&output, 4, false).await, (4, b"there is".to_vec()));
        assert_eq!(read_all(&output, 12, true).await, (12, Vec::new()));
        assert!(output.finished());
        assert_eq!(read_all(&output, 12, false).await, (12, Vec::new()));
        assert_eq!(output.finish(Duration::from_secs(5)).await, 12);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_connection_stays_after_the_end_of_the_output() {
        let output = Output::new();
        output.close();
        let (mut ours, theirs) = tokio::io::duplex(100);
        let (number, from) = output.attach(0).unwrap();
        let serving = output.serve(number, from, Box::new(theirs));
        let looking = async {
            let mut end = [1; 4];
            ours.read_exact(&mut end).await.unwrap();
            assert_eq!(end, END_OF_OUTPUT);
            let more = timeout(Duration::from_millis(100), ours.read(&mut end));
            more.await.unwrap_err();
        };
        tokio::select! {
            ended = serving => panic!("{ended:?}"),
            () = looking => {}
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_newer_connection_ends_an_older_one() {
        let output = Output::new();
        let (_ours, theirs) = tokio::io::duplex(100);
        let (number, from) = output.attach(0).unwrap();
        let old = {
            let output = Arc::clone(&output);
            tokio::spawn(async move { output.serve(number, from, Box::new(theirs)).await })
        };
        tokio::task::yield_now().await;
        output.attach(0).unwrap();
        old.await.unwrap().unwrap();
    }
}
