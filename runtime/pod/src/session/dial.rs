//! Connections to servers in a pod.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::OwnedSemaphorePermit,
};

use hull_spec::error::PodError;
use hull_vm::agent::{client::Agent, error::GuestError, stdio};

/// A connection to a TCP port of a pod, made from inside: servers on 127.0.0.1 or ::1 are
/// reached too. Shutting it down ends one direction, dropping it both.
#[derive(Debug)]
pub struct PodConnection {
    stream: UnixStream,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for PodConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PodConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Connects to a port of the guest.
pub(crate) async fn dial(
    agent: &Agent,
    permit: OwnedSemaphorePermit,
    port: u16,
) -> Result<PodConnection, PodError> {
    match stdio::open_dial(agent, port).await {
        Ok(stream) => Ok(PodConnection {
            stream,
            _permit: permit,
        }),
        Err(GuestError::StreamRefused { message, .. }) => {
            let action = format!("connect to port {port} of the sandbox");
            Err(PodError::precondition(action, message))
        }
        Err(error) => Err(error.into()),
    }
}
