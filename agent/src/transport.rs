//! The sockets that the host connects to: vsock in a guest, Unix sockets in tests.

use std::{io, path::Path};

use futures::stream;
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use tracing::debug;

use crate::stdio::connection::Connection;

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    /// The second is the context id of the host, which alone may connect.
    Vsock(VsockListener, u32),
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port for the host, whose context id is `host`.
    pub(crate) fn vsock(port: u32, host: u32) -> io::Result<Self> {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        Ok(Self::Vsock(listener, host))
    }

    /// Listens on a Unix socket; an old one there is replaced.
    pub(crate) fn unix(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => UnixListener::bind(path).map(Self::Unix),
        }
    }

    /// Waits for the next connection of the host.
    pub(crate) async fn accept(&mut self) -> io::Result<Connection> {
        match self {
            Self::Vsock(listener, host) => loop {
                let (connection, peer) = listener.accept().await?;
                if peer.cid() == *host {
                    return Ok(Box::new(connection));
                }
                // Containers get here if the kernel has a transport within the guest.
                debug!(%peer, "refused a connection that is not the host's");
            },
            Self::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }

    /// Turns the socket into what the ttrpc server takes.
    pub(crate) fn into_ttrpc(self) -> ttrpc::r#async::transport::Listener {
        ttrpc::r#async::transport::Listener::new(stream::unfold(self, async |mut listener| {
            let accepted = listener.accept().await;
            Some((accepted, listener))
        }))
    }
}
