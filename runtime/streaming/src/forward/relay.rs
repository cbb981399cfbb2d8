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
    /// Connects to the port and copies both ways until the connection has ended. A failure is told
    /// on the error stream.
    pub(super) async fn relay(mut self, backend: &dyn Backend, pod: &str, port: u16) {
        let failure = match backend.dial(pod, port).await {
            Ok(connection) => self.copy(connection).await,
            Err(error) => Err(error.to_string()),
        };
        if let Err(reason) = failure {
            debug!(port, reason, "port-forward failed");
            self.fail(format!("forward port {port} to pod {pod}: {reason}"))
                .await;
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

    async fn copy(&mut self, connection: impl AsyncRead + AsyncWrite) -> Result<(), String> {
        let (reader, writer) = tokio::io::split(connection);
        let up = up(&mut self.input, writer);
        let down = down(reader, &mut self.output);
        tokio::pin!(up, down);
        tokio::select! {
            ended = &mut up => match ended {
                // Half closed: the server may answer for as long as it takes.
                Up::Finished => down.await,
                Up::ClientLost => Ok(()),
                Up::ServerLost => tokio::select! {
                    ended = down => ended,
                    () = sleep(GRACE) => Ok(()),
                },
            },
            ended = &mut down => {
                ended?;
                tokio::select! {
                    _ = up => {}
                    () = sleep(GRACE) => {}
                }
                Ok(())
            }
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

async fn down(mut from: impl AsyncRead + Unpin, to: &mut Output) -> Result<(), String> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let read = (&mut from).take(CHUNK as u64).read_buf(&mut buffer).await;
        match read {
            Ok(0) => {
                let _ = to.finish().await;
                return Ok(());
            }
            Ok(_) => {
                if to.send(buffer.split().freeze()).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}
