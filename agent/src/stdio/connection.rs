//! What the host connects with.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use tokio_vsock::VsockStream;

/// A connection from the host, over whichever transport.
pub(crate) type Connection = Box<dyn Duplex>;

/// Bytes both ways.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send + Sync {
    /// Returns one more descriptor of the socket, to look whether the other
    /// side has gone; `None`: it can't be told.
    fn watch(&self) -> io::Result<Option<OwnedFd>>;
}

impl Duplex for VsockStream {
    fn watch(&self) -> io::Result<Option<OwnedFd>> {
        self.as_fd().try_clone_to_owned().map(Some)
    }
}

impl Duplex for UnixStream {
    fn watch(&self) -> io::Result<Option<OwnedFd>> {
        self.as_fd().try_clone_to_owned().map(Some)
    }
}

#[cfg(test)]
impl Duplex for tokio::io::DuplexStream {
    fn watch(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
}
