//! One forwarded connection.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::sleep,
};
use tracing::debug;

use crate::{
    backend::Backend,
    channel::{Input, Lost},
    output::Output,
};

/// How much is read from the pod at a time.
const CHUNK: usize = 16 << 10;
/// How long the client may go on sending after the pod's server has ended, and the other way when
/// the server does not take any more.
const GRACE: Duration = Duration::from_secs(1);

/// The client's side of a forwarded connection.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) input: Input,
    pub(super) output: Output,
    pub(super) error: Output,
}

impl Pair {
    /// Connects to the port and copies both ways until the connection has ended. That there is none
    /// is told on the error stream. That one ends with an error is its client's to see: kubectl and
    /// crictl give all of them up when something is told there.
    pub(super) async fn relay(mut self, backend: &dyn Backend, pod: &str, port: u16) {
        match backend.dial(pod, port).await {
            Ok(connection) => self.copy(connection).await,
            Err(error) => {
                debug!(port, %error, "port-forward failed");
                self.fail(format!("forward port {port} to pod {pod}: {error}"))
                    .await;
            }
        }
        self.end().await;
    }

    /// Tells a failure.
    async fn fail(&mut self, text: String) {
        let _ = self.error.send(Bytes::from(text)).await;
    }

    /// Ends both streams.
    async fn end(&mut self) {
        let _ = self.error.finish().await;
        self.output.reset().await;
        self.error.reset().await;
    }

    async fn copy(&mut self, connection: impl AsyncRead + AsyncWrite) {
        let (reader, writer) = tokio::io::split(connection);
        let up = up(&mut self.input, writer);
        let down = down(reader, &mut self.output);
        tokio::pin!(up, down);
        tokio::select! {
            ended = &mut up => match ended {
                // Half closed: the server may answer for as long as it takes.
                Up::Finished => down.await,
                Up::ClientLost => {}
                Up::ServerLost => tokio::select! {
                    () = down => {}
                    () = sleep(GRACE) => {}
                },
            },
            () = &mut down => tokio::select! {
                _ = up => {}
                () = sleep(GRACE) => {}
            },
        }
    }
}

/// How the direction to the server ended.
enum Up {
    /// The client sends no more, the server knows.
    Finished,
    ClientLost,
    /// It takes no more.
    ServerLost,
}

async fn up(from: &mut Input, mut to: impl AsyncWrite + Unpin) -> Up {
    loop {
        match from.recv().await {
            Ok(Some(bytes)) => {
                if to.write_all(&bytes).await.is_err() {
                    return Up::ServerLost;
                }
            }
            Ok(None) => {
                return match to.shutdown().await {
                    Ok(()) => Up::Finished,
                    Err(_) => Up::ServerLost,
                };
            }
            Err(Lost) => return Up::ClientLost,
        }
    }
}

/// Ends when the server sends no more, or the client takes no more.
async fn down(mut from: impl AsyncRead + Unpin, to: &mut Output) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let read = (&mut from).take(CHUNK as u64).read_buf(&mut buffer).await;
        match read {
            Ok(0) => {
                let _ = to.finish().await;
                return;
            }
            Ok(_) => {
                if to.send(buffer.split().freeze()).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                debug!(%error, "a forwarded connection was lost");
                to.reset().await;
                return;
            }
        }
    }
}
