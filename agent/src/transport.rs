//! The sockets that the host connects to: vsock in a guest, Unix sockets in tests.

use std::{io, path::Path};

use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::stdio::connection::Connection;

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Vsock(VsockListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port.
    pub(crate) fn vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// Listens on a Unix socket; an old one there is replaced.
    pub(crate) fn unix(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => UnixListener::bind(path).map(Self::Unix),
        }
    }

    /// Waits for the next connection.
    pub(crate) async fn accept(&mut self) -> io::Result<Connection> {
        match self {
            Self::Vsock(listener) => Ok(Box::new(listener.accept().await?.0)),
            Self::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }

    /// Turns the socket into what the ttrpc server takes.
    pub(crate) fn into_ttrpc(self) -> ttrpc::r#async::transport::Listener {
        match self {
            Self::Vsock(listener) => listener.into(),
            Self::Unix(listener) => listener.into(),
        }
    }
}
