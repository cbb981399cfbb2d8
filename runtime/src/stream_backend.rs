//! Pods, as the streaming server sees them.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use async_trait::async_trait;
use error_reporter::Report;
use futures::future::BoxFuture;
use hull_pod::{Pods, SessionInput, SessionStreams};
use hull_spec::error::PodError;
use hull_streaming::{
    AttachRequest, Backend, BackendError, Duplex, ExecRequest, Exit, Process, TerminalSize,
};
use tokio::{
    io::AsyncWrite,
    sync::{mpsc, oneshot},
};
use tracing::debug;

/// Gives processes and connections of pods to the streaming server.
#[derive(Debug)]
pub(crate) struct StreamBackend {
    pods: Pods,
}

impl StreamBackend {
    pub(crate) fn new(pods: Pods) -> Self {
        Self { pods }
    }
}

#[async_trait]
impl Backend for StreamBackend {
    async fn exec(&self, request: ExecRequest) -> Result<Process, BackendError> {
        let streams = SessionStreams {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        let session = self.pods.exec(&request.container_id, request.cmd, streams);
        let session = session.await.map_err(|error| told(&error))?;
        let mut control = session.control;
        let (resize, mut sizes) = mpsc::channel(1);
        let exit = async move {
            let code = loop {
                tokio::select! {
                    code = control.exited() => break code,
                    size = next(&mut sizes) => resized(control.resize(size.columns, size.rows).await),
                }
            };
            // The control carries the output, which may end later.
            (code.map(Exit::Code).map_err(|error| told(&error)), control)
        };
        Ok(Process {
            stdin: session.stdin.map(|stdin| Box::new(stdin) as _),
            stdout: session.stdout.map(|stdout| Box::new(stdout) as _),
            stderr: session.stderr.map(|stderr| Box::new(stderr) as _),
            resize: request.tty.then_some(resize),
            exit: Box::pin(Keeping::new(exit)),
        })
    }

    async fn attach(&self, request: AttachRequest) -> Result<Process, BackendError> {
        let streams = SessionStreams {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        let id = &request.container_id;
        let once = self
            .pods
            .container(id)
            .await
            .map_err(|error| told(&error))?
            .spec
            .stdin_once;
        let session = self
            .pods
            .attach(id, streams)
            .await
            .map_err(|error| told(&error))?;
        let mut control = session.control;
        let (resize, mut sizes) = mpsc::channel(1);
        let (stdin, shut_down) = match session.stdin {
            Some(stdin) => {
                let (input, shut_down) = Input::new(stdin);
                (Some(input), Some(shut_down))
            }
            None => (None, None),
        };
        // As other runtimes have it: the end of the input is the end of a client whose container
        // does not get to know it.
        let detached = async move {
            match shut_down {
                Some(shut_down) if !once => {
                    if shut_down.await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
                _ => std::future::pending().await,
            }
        };
        let exit = async move {
            tokio::pin!(detached);
            let exit = loop {
                tokio::select! {
                    () = control.ended() => break Exit::Code(0),
                    () = &mut detached => break Exit::Detached,
                    size = next(&mut sizes) => resized(control.resize(size.columns, size.rows).await),
                }
            };
            (Ok(exit), control)
        };
        Ok(Process {
            stdin: stdin.map(|stdin| Box::new(stdin) as _),
            stdout: session.stdout.map(|stdout| Box::new(stdout) as _),
            stderr: session.stderr.map(|stderr| Box::new(stderr) as _),
            resize: request.tty.then_some(resize),
            exit: Box::pin(Keeping::new(exit)),
        })
    }

    async fn dial(&self, pod_sandbox_id: &str, port: u16) -> Result<Box<dyn Duplex>, BackendError> {
        let connection = self
            .pods
            .dial(pod_sandbox_id, port)
            .await
            .map_err(|error| told(&error))?;
        Ok(Box::new(connection))
    }
}

fn told(error: &PodError) -> BackendError {
    BackendError {
        message: Report::new(error).to_string(),
        exit_code: error.exit_code(),
    }
}

/// The next size; never when there are no more.
async fn next(sizes: &mut mpsc::Receiver<TerminalSize>) -> TerminalSize {
    match sizes.recv().await {
        Some(size) => size,
        None => std::future::pending().await,
    }
}

/// A process that has just ended has no terminal any more.
fn resized(result: Result<(), PodError>) {
    if let Err(error) = result {
        debug!(error = %Report::new(error), "resize a terminal");
    }
}

/// A future that keeps what its work leaves until it is dropped.
struct Keeping<T, K> {
    work: BoxFuture<'static, (T, K)>,
    kept: Option<K>,
}

impl<T, K> Keeping<T, K> {
    fn new(work: impl Future<Output = (T, K)> + Send + 'static) -> Self {
        Self {
            work: Box::pin(work),
            kept: None,
        }
    }
}

impl<T, K: Unpin> Future for Keeping<T, K> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        self.work.as_mut().poll(context).map(|(value, kept)| {
            self.kept = Some(kept);
            value
        })
    }
}

/// Input that tells when it is shut down.
struct Input {
    inner: SessionInput,
    shut_down: Option<oneshot::Sender<()>>,
}

impl Input {
    fn new(inner: SessionInput) -> (Self, oneshot::Receiver<()>) {
        let (shut_down, receiver) = oneshot::channel();
        let input = Self {
            inner,
            shut_down: Some(shut_down),
        };
        (input, receiver)
    }
}

impl AsyncWrite for Input {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = std::task::ready!(Pin::new(&mut self.inner).poll_shutdown(context));
        if let Some(shut_down) = self.shut_down.take() {
            // Nobody waits for it in a container that gets to know it.
            let _ = shut_down.send(());
        }
        Poll::Ready(done)
    }
}
