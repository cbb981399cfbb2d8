//! A runtime in memory.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex},
    net::UnixStream,
    sync::mpsc,
};

use super::{pattern, wait};
use crate::{
    AttachRequest, Backend, BackendError, Duplex, ExecRequest, Exit, Process, TerminalSize,
};

/// How much a pipe holds.
const PIPE: usize = 64 << 10;

/// Echoes until its input ends.
pub(super) const ECHO: u16 = 7;
/// Reads to the end, then tells how much it was, a while later.
pub(super) const COUNT: u16 = 81;
/// Greets and hangs up.
pub(super) const GREET: u16 = 80;
/// Answers the first byte with `part`, then resets the connection if there are more.
pub(super) const RESET: u16 = 82;
/// Never reads or writes.
pub(super) const STUCK: u16 = 99;
/// Nobody listens.
pub(super) const REFUSED: u16 = 9;

/// Processes that live while somebody holds them, and servers.
#[derive(Debug, Default)]
pub(super) struct Memory {
    alive: Arc<AtomicUsize>,
    /// Bytes that processes could write.
    pub(super) written: Arc<AtomicUsize>,
    pub(super) sizes: Arc<Mutex<Vec<TerminalSize>>>,
    /// Input that the container of `attach` got.
    pub(super) attached: Arc<Mutex<Vec<u8>>>,
}

/// Counts what is alive.
struct Alive(Arc<AtomicUsize>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Memory {
    fn live(&self) -> Alive {
        self.alive.fetch_add(1, Ordering::SeqCst);
        Alive(Arc::clone(&self.alive))
    }

    pub(super) fn alive(&self) -> usize {
        self.alive.load(Ordering::SeqCst)
    }

    pub(super) async fn assert_none_left(&self) {
        wait("processes end", || self.alive() == 0).await;
    }

    /// A process whose life is `work`; dropped with it.
    fn process<W>(
        &self,
        request: &ExecRequest,
        work: impl FnOnce(DuplexStream, Out, Out, mpsc::Receiver<TerminalSize>) -> W,
    ) -> Process
    where
        W: Future<Output = Result<Exit, BackendError>> + Send + 'static,
    {
        let (stdin, their_stdin) = duplex(PIPE);
        let (stdout, their_stdout) = duplex(PIPE);
        let (stderr, their_stderr) = duplex(PIPE);
        let (resize, sizes) = mpsc::channel(1);
        let alive = self.live();
        let work = work(their_stdin, Some(their_stdout), Some(their_stderr), sizes);
        Process {
            stdin: request.stdin.then(|| Box::new(stdin) as _),
            stdout: request.stdout.then(|| Box::new(stdout) as _),
            stderr: request.stderr.then(|| Box::new(stderr) as _),
            resize: request.tty.then_some(resize),
            exit: Box::pin(async move {
                let _alive = alive;
                work.await
            }),
        }
    }
}

type Out = Option<DuplexStream>;

async fn write(to: &mut Out, bytes: &[u8]) {
    // Who does not want the output has dropped it.
    let _ = to.as_mut().unwrap().write_all(bytes).await;
}

#[async_trait]
impl Backend for Memory {
    async fn exec(&self, request: ExecRequest) -> Result<Process, BackendError> {
        let args: Vec<&str> = request.cmd.iter().map(String::as_str).collect();
        let number = |text: &str| text.parse::<usize>().unwrap();
        Ok(match args[..] {
            // Copies its input to its output.
            ["cat"] => self.process(&request, async |mut i, mut o, e, _| {
                drop(e);
                tokio::io::copy(&mut i, o.as_mut().unwrap()).await.unwrap();
                Ok(Exit::Code(0))
            }),
            // Copies so many bytes, then exits.
            ["echo", count, code] => {
                let (count, code) = (number(count), number(code));
                self.process(&request, async move |i, mut o, mut e, _| {
                    write(&mut e, b"begin").await;
                    let mut i = i.take(count as u64);
                    tokio::io::copy(&mut i, o.as_mut().unwrap()).await.unwrap();
                    Ok(Exit::Code(code as i32))
                })
            }
            ["print", out, err, code] => {
                let (out, err) = (out.to_owned(), err.to_owned());
                let code = number(code) as i32;
                self.process(&request, async move |_i, mut o, mut e, _| {
                    write(&mut o, out.as_bytes()).await;
                    write(&mut e, err.as_bytes()).await;
                    Ok(Exit::Code(code))
                })
            }
            // Exits at once; its output is slower.
            ["late", count] => {
                let count = number(count);
                self.process(&request, async move |_i, mut o, e, _| {
                    drop(e);
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        write(&mut o, &pattern(count)).await;
                    });
                    Ok(Exit::Code(0))
                })
            }
            // Prints without end.
            ["yes"] => {
                let written = Arc::clone(&self.written);
                self.process(&request, async move |_i, mut o, _e, _| {
                    loop {
                        write(&mut o, &[b'y'; 1024]).await;
                        written.fetch_add(1024, Ordering::SeqCst);
                    }
                })
            }
            // Never reads, never ends.
            ["hang"] => self.process(&request, async |_i, _o, _e, _s| {
                std::future::pending().await
            }),
            // Closes its input and goes on until somebody resizes its terminal so many times.
            ["sizes", count] => {
                let count = number(count);
                let all = Arc::clone(&self.sizes);
                self.process(&request, async move |i, mut o, e, mut sizes| {
                    drop((i, e));
                    for _ in 0..count {
                        let size = sizes.recv().await.unwrap();
                        all.lock().unwrap().push(size);
                        let text = format!("{} {}\n", size.rows, size.columns);
                        write(&mut o, text.as_bytes()).await;
                    }
                    Ok(Exit::Code(0))
                })
            }
            // Lost while it runs.
            ["lost"] => self.process(&request, async |_i, mut o, e, _| {
                drop(e);
                write(&mut o, b"before").await;
                drop(o);
                Err(BackendError::new("the VM is gone"))
            }),
            _ => {
                return Err(BackendError::new(format!(
                    "no such program: {}",
                    args.join(" ")
                )));
            }
        })
    }

    async fn attach(&self, request: AttachRequest) -> Result<Process, BackendError> {
        let request = ExecRequest {
            container_id: request.container_id,
            cmd: Vec::new(),
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let got = Arc::clone(&self.attached);
        Ok(self.process(&request, async move |mut i, mut o, _e, _| {
            write(&mut o, b"attached\n").await;
            let mut text = Vec::new();
            loop {
                let mut byte = [0];
                match i.read(&mut byte).await.unwrap() {
                    // Its input stays open for others.
                    0 => return Ok(Exit::Detached),
                    _ => text.push(byte[0]),
                }
                got.lock().unwrap().push(byte[0]);
                if text.ends_with(b"exit") {
                    return Ok(Exit::Code(9));
                }
            }
        }))
    }

    async fn dial(&self, pod: &str, port: u16) -> Result<Box<dyn Duplex>, BackendError> {
        assert_eq!(pod, "pod");
        if port == RESET {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            tokio::spawn(async move {
                let _ = theirs.read_u8().await;
                let _ = theirs.write_all(b"part").await;
            });
            return Ok(Box::new(ours));
        }
        let (ours, theirs) = duplex(PIPE);
        let alive = self.live();
        match port {
            ECHO | COUNT | GREET | STUCK => {}
            _ => return Err(BackendError::new("connection refused")),
        }
        tokio::spawn(async move {
            // Ends when the other side is dropped.
            let (mut reader, mut writer) = tokio::io::split(theirs);
            match port {
                ECHO => {
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                }
                COUNT => {
                    let mut all = Vec::new();
                    let _ = reader.read_to_end(&mut all).await;
                    tokio::time::sleep(Duration::from_millis(1500)).await;
                    let _ = writer.write_all(all.len().to_string().as_bytes()).await;
                }
                GREET => {
                    let _ = writer.write_all(b"hello").await;
                }
                // STUCK
                _ => std::future::pending().await,
            }
        });
        Ok(Box::new(Connection {
            io: ours,
            _alive: alive,
        }))
    }
}

/// A connection that is counted.
struct Connection {
    io: DuplexStream,
    _alive: Alive,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.io).poll_shutdown(context)
    }
}
