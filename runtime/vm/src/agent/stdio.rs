//! Output of a process in the guest, byte by byte and to the last one.
//!
//! The agent keeps what is not acknowledged, so a connection that is lost is opened again where
//! the last one ended. The agent marks the end of an output; the end of a connection alone proves
//! nothing. A process may close its output and live on: there is nothing more to come then, but the
//! connection stays, because the agent kills an exec whose streams are lost. Readers are told of the
//! end when the process ends.
//!
//! Where the agent begins is where it was asked to, or before. It would have to begin later if more
//! had been acknowledged than is known here, which can't be: bytes are acknowledged after they were
//! written and noted (`logs` of `hull-pod`), and the note lives exactly as long as the VM, in the memory of
//! the same host. So an agent that begins later lies, or the note was removed under a running pod;
//! either way output is lost, and the pod's VM is ended. The VM is also ended when an output's end
//! marker comes before bytes that were sent, or other bytes come after it.

use std::{fmt::Display, io, ops::Range, path::Path, time::Duration};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use hull_proto_agent::{
    STREAM_PORT,
    stream::{self, ChunkDecoder, StreamHeader, StreamKind, StreamReply},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};

use hull_base::{clock, printable::printable};

use crate::agent::{client::Agent, connect, error::GuestError};

/// How long the agent may take to accept a stream.
const OPEN: Duration = Duration::from_secs(10);
/// Longest pause before a lost connection is opened again. The agent kills an exec that has no
/// connection for 2 s.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// The pauses, which begin anew when bytes come.
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(50))
    .with_max_delay(PAUSE_MAX)
    .without_max_times();
/// How long the last bytes of a process that ended may take.
const STALLED: Duration = Duration::from_secs(10);
/// Longest refusal that is shown.
const MESSAGE_MAX: usize = 1024;

/// Where a process's output ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputEnd {
    /// The process runs.
    Open,
    /// It ended after this many bytes.
    At(u64),
    /// The VM is gone: what can still be read is all there is.
    Gone,
}

/// One of the two outputs of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputKind {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One output of one process.
#[derive(Debug)]
pub struct Output {
    agent: Agent,
    header: StreamHeader,
    /// Bytes received so far.
    received: u64,
    /// How many of them are written and noted, so that the agent may forget them.
    safe: u64,
    end: watch::Receiver<OutputEnd>,
    /// Whether all of it was received, whether its process has ended or not.
    is_complete: bool,
    connection: Option<Connection>,
    pauses: ExponentialBackoff,
}

/// A connection that carries an output.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    decoder: ChunkDecoder,
    /// Bytes to come that were received before.
    known: u64,
}

impl Connection {
    /// Takes apart what was read next. Returns which part of `read` is new output.
    ///
    /// # Errors
    /// How the agent contradicts itself.
    fn decode(&mut self, read: &mut [u8]) -> Result<Range<usize>, &'static str> {
        let length = self.decoder.decode(read);
        let length = length.map_err(|_| "goes on after its end")?;
        let skipped = usize::try_from(self.known).map_or(length, |known| known.min(length));
        self.known = self.known.saturating_sub(skipped as u64);
        if self.decoder.has_ended() && self.known > 0 {
            return Err("ends before bytes that were sent");
        }
        Ok(skipped..length)
    }
}

impl Output {
    /// Output of an exec, or of the container's first process (`exec` is empty), from byte
    /// `offset` on.
    pub fn new(
        agent: &Agent,
        kind: OutputKind,
        container: &str,
        exec: &str,
        offset: u64,
        end: watch::Receiver<OutputEnd>,
    ) -> Self {
        Self {
            agent: agent.clone(),
            header: StreamHeader {
                kind: match kind {
                    OutputKind::Stdout => StreamKind::Stdout,
                    OutputKind::Stderr => StreamKind::Stderr,
                },
                container: agent.names().tell(container),
                exec: exec.into(),
                offset,
            },
            received: offset,
            safe: offset,
            end,
            is_complete: false,
            connection: None,
            pauses: PAUSES.build(),
        }
    }

    /// Opens the stream now, so that the caller hears of a failure.
    ///
    /// # Errors
    /// When the agent refuses or does not answer.
    pub async fn open(&mut self) -> Result<(), GuestError> {
        let opened = timeout(OPEN, self.connect()).await;
        opened.unwrap_or_else(|_| Err(self.failed(io::ErrorKind::TimedOut.into())))
    }

    /// Reads the next bytes; an empty slice is the end of the output.
    ///
    /// Once the process has ended, a guest that sends nothing more for 10 s is not waited for,
    /// whatever total it told.
    pub async fn read<'b>(&mut self, buffer: &'b mut [u8]) -> &'b [u8] {
        let mut deadline = None;
        loop {
            // Looked at before the value: an end that was told before the sender was dropped counts.
            let is_orphan = self.end.has_changed().is_err();
            let end = *self.end.borrow_and_update();
            match end {
                // The sender was dropped: nobody waits for the output any more.
                OutputEnd::Open if is_orphan => return &[],
                OutputEnd::Open => {}
                OutputEnd::At(_) | OutputEnd::Gone if self.is_complete => return &[],
                OutputEnd::At(total) if self.received >= total => return &[],
                OutputEnd::Gone if self.connection.is_none() => return &[],
                OutputEnd::At(_) | OutputEnd::Gone => {
                    let deadline = *deadline.get_or_insert_with(|| clock::after(STALLED));
                    if Instant::now() >= deadline {
                        return &[];
                    }
                }
            }
            let Some(connection) = &mut self.connection else {
                if self.is_complete {
                    let _ = self.end.changed().await;
                } else {
                    self.reopen().await;
                }
                continue;
            };
            let read = connection.stream.read(&mut *buffer);
            let read = match deadline {
                Some(deadline) => match timeout_at(deadline, read).await {
                    Ok(read) => read,
                    Err(_) => return &[],
                },
                None => tokio::select! {
                    biased;
                    read = read => read,
                    _ = self.end.changed() => continue,
                },
            };
            match read {
                Ok(length) if length > 0 => {
                    let read = buffer.get_mut(..length).unwrap_or_default();
                    let output = connection.decode(read);
                    self.is_complete = connection.decoder.has_ended();
                    match output {
                        Ok(output) if output.is_empty() => {}
                        Ok(output) => {
                            self.received = self.received.saturating_add(output.len() as u64);
                            self.pauses = PAUSES.build();
                            return buffer.get(output).unwrap_or_default();
                        }
                        Err(contradiction) => {
                            self.misbehaves(contradiction);
                            // Its VM is about to be gone.
                            self.lose(end).await;
                        }
                    }
                }
                // Unless the output is complete, the event that tells its end may be on its way.
                _ => self.lose(end).await,
            }
        }
    }

    /// Gives the connection up, and waits a moment before the next.
    async fn lose(&mut self, end: OutputEnd) {
        self.connection = None;
        let pause = self.pause();
        match end {
            OutputEnd::Open => drop(timeout(pause, self.end.changed()).await),
            OutputEnd::At(_) => sleep(pause).await,
            // No connection follows.
            OutputEnd::Gone => {}
        }
    }

    /// Has the VM ended, for what its agent sent.
    fn misbehaves(&self, how: impl Display) -> GuestError {
        let what = format!("output of {} {how}", what(&self.header));
        let error = GuestError::Misbehaved { what };
        self.agent.fault().tell(&error);
        error
    }

    /// Tells the agent that the first `total` bytes are safe. A failure has no effect: the agent
    /// keeps the bytes, and the next connection says again where to begin.
    pub async fn acknowledge(&mut self, total: u64) {
        self.safe = total;
        if let Some(connection) = &mut self.connection
            && connection
                .stream
                .write_all(&total.to_le_bytes())
                .await
                .is_err()
        {
            self.connection = None;
        }
    }

    async fn reopen(&mut self) {
        if let Err(error) = self.open().await {
            tracing::debug!(%error, "open output stream again");
            sleep(self.pause()).await;
        }
    }

    fn pause(&mut self) -> Duration {
        self.pauses.next().unwrap_or(PAUSE_MAX)
    }

    async fn connect(&mut self) -> Result<(), GuestError> {
        // Not `received`: the agent forgets all bytes before the offset.
        self.header.offset = self.safe;
        let (stream, offset) = connect_stream(self.agent.vsock(), &self.header).await?;
        let safe = self.safe;
        let known = known(offset, self.received, safe).ok_or_else(|| {
            self.misbehaves(format_args!(
                "begins at byte {offset}, of which {safe} were acknowledged"
            ))
        })?;
        self.connection = Some(Connection {
            stream,
            decoder: ChunkDecoder::default(),
            known,
        });
        Ok(())
    }

    fn failed(&self, source: io::Error) -> GuestError {
        failed(&self.header, source)
    }
}

/// How many of `received` bytes are at `offset` and after it; none: no agent can begin there, because
/// only the first `safe` bytes may be forgotten.
pub(crate) fn known(offset: u64, received: u64, safe: u64) -> Option<u64> {
    received.checked_sub(offset).filter(|_| offset <= safe)
}

/// Opens the input of an exec, or of the container's first process (`exec` is empty).
///
/// # Errors
/// When the agent refuses or does not answer.
pub async fn open_input(
    agent: &Agent,
    container: &str,
    exec: &str,
) -> Result<UnixStream, GuestError> {
    let header = StreamHeader {
        kind: StreamKind::Stdin,
        container: agent.names().tell(container),
        exec: exec.into(),
        offset: 0,
    };
    open(agent, &header).await
}

/// Connects to a TCP port of the guest's loopback.
///
/// # Errors
/// When the agent refuses or does not answer.
pub async fn open_dial(agent: &Agent, port: u16) -> Result<UnixStream, GuestError> {
    let header = StreamHeader {
        kind: StreamKind::Dial { port },
        container: String::new(),
        exec: String::new(),
        offset: 0,
    };
    open(agent, &header).await
}

/// Opens a shell in the guest itself, whose vsock has this socket, with a terminal of these rows and columns or
/// none. It ends with the connection.
///
/// # Errors
/// [`GuestError::StreamRefused`] when the guest is not to be entered.
pub async fn open_shell(
    vsock: &Path,
    terminal: Option<(u16, u16)>,
) -> Result<UnixStream, GuestError> {
    let header = StreamHeader {
        kind: StreamKind::Shell { terminal },
        container: String::new(),
        exec: String::new(),
        offset: 0,
    };
    open_at(vsock, &header).await
}

async fn open(agent: &Agent, header: &StreamHeader) -> Result<UnixStream, GuestError> {
    open_at(agent.vsock(), header).await
}

async fn open_at(vsock: &Path, header: &StreamHeader) -> Result<UnixStream, GuestError> {
    let opened = timeout(OPEN, connect_stream(vsock, header)).await;
    let (stream, _) =
        opened.unwrap_or_else(|_| Err(failed(header, io::ErrorKind::TimedOut.into())))?;
    Ok(stream)
}

/// Connects and asks for a stream; returns it with the offset of its first byte.
async fn connect_stream(
    vsock: &Path,
    header: &StreamHeader,
) -> Result<(UnixStream, u64), GuestError> {
    let deadline = clock::after(OPEN);
    let mut stream = connect::dial_running(vsock, STREAM_PORT, deadline).await?;
    let reply = exchange(&mut stream, header).await;
    match reply.map_err(|source| failed(header, source))? {
        StreamReply::Ok { offset } => Ok((stream, offset)),
        StreamReply::Error { message } => Err(GuestError::StreamRefused {
            what: what(header),
            message: printable(&message, MESSAGE_MAX),
        }),
    }
}

fn failed(header: &StreamHeader, source: io::Error) -> GuestError {
    GuestError::Stream {
        what: what(header),
        source,
    }
}

/// Names the other end of a stream, for messages.
fn what(header: &StreamHeader) -> String {
    match header.kind {
        StreamKind::Dial { port } => format!("port {port}"),
        StreamKind::Shell { .. } => "a shell in the guest".to_owned(),
        _ => header.container.clone(),
    }
}

/// Sends the header of a stream and reads the reply.
///
/// # Errors
/// When the connection fails, or what comes is no reply.
pub(crate) async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    header: &StreamHeader,
) -> io::Result<StreamReply> {
    stream.write_all(&stream::encode(header)?).await?;
    let mut prefix = [0_u8; 4];
    stream.read_exact(&mut prefix).await?;
    let mut body = vec![0_u8; stream::body_length(prefix)?];
    stream.read_exact(&mut body).await?;
    stream::decode(&body)
}
