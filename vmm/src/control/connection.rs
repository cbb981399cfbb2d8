//! A connection of the control socket: length-prefixed JSON, descriptors with a message's first byte.
//!
//! Reads never go beyond a message, so that descriptors can't end up with the message before theirs.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hull_proto_vmm::{CodecError, MAX_FDS, Request, Response, body_length, decode, encode};
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::fds::Fds;

const PREFIX: usize = 4;
/// How long the peer may take to receive the last answers before the process ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The peer closed it.
    #[error("control connection closed")]
    Closed,
    /// The socket failed.
    #[error("use control connection")]
    Io(#[from] io::Error),
    /// The length is impossible, so there is no way to find the next message.
    #[error("frame control message")]
    Frame(#[source] CodecError),
    /// More descriptors than allowed, or in the middle of a message.
    #[error("file descriptors in the wrong place or too many")]
    Descriptors,
}

/// A message of the peer.
#[derive(Debug)]
pub enum Incoming {
    /// A request and its descriptors.
    Request(Box<Request>, Fds),
    /// A whole message that is not a request.
    Garbage(CodecError),
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The message so far, with its prefix.
    message: Vec<u8>,
    /// How long it is to become.
    wanted: usize,
    fds: Vec<OwnedFd>,
    outgoing: Vec<u8>,
    /// Whether the peer said hello.
    pub greeted: bool,
}

impl Connection {
    /// Takes a connection over.
    ///
    /// # Errors
    /// When it can't be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            message: Vec::new(),
            wanted: PREFIX,
            fds: Vec::new(),
            outgoing: Vec::new(),
            greeted: false,
        })
    }

    /// Returns the descriptor to watch.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Tells whether answers wait for the peer to read.
    #[must_use]
    pub fn is_congested(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Reads on; returns a message when it is complete, none when more has to come.
    ///
    /// # Errors
    /// [`ConnectionError`]: close it.
    pub fn receive(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        loop {
            if self.message.len() == PREFIX && self.wanted == PREFIX {
                let prefix = self.message.first_chunk().copied().unwrap_or_default();
                self.wanted += body_length(prefix).map_err(ConnectionError::Frame)?;
            }
            if self.message.len() == self.wanted {
                // An empty body is no JSON, but the message is whole.
                return Ok(Some(self.complete()));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn complete(&mut self) -> Incoming {
        let body = self.message.get(PREFIX..).unwrap_or_default();
        let request = decode(body);
        let fds = std::mem::take(&mut self.fds);
        self.message = Vec::new();
        self.wanted = PREFIX;
        match request {
            Ok(request) => Incoming::Request(Box::new(request), Fds::new(fds)),
            Err(error) => Incoming::Garbage(error),
        }
    }

    /// Reads at most what the message lacks. False: nothing is there now.
    fn fill(&mut self) -> Result<bool, ConnectionError> {
        let mut chunk = [0; 4096];
        let lacking = (self.wanted - self.message.len()).min(chunk.len());
        let Some(place) = chunk.get_mut(..lacking) else {
            return Ok(false);
        };
        let mut fds = Vec::new();
        let received = match receive(&self.stream, place, &mut fds) {
            Ok(Received { bytes: 0, .. }) => return Err(ConnectionError::Closed),
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let misplaced = !fds.is_empty() && !self.message.is_empty();
        if received.truncated || misplaced {
            return Err(ConnectionError::Descriptors);
        }
        self.fds.append(&mut fds);
        self.message
            .extend_from_slice(chunk.get(..received.bytes).unwrap_or_default());
        Ok(true)
    }

    /// Sends an answer, as much of it as the peer takes now.
    ///
    /// # Errors
    /// [`ConnectionError`]: close it.
    pub fn send(&mut self, response: &Response) -> Result<(), ConnectionError> {
        let mut frame = encode(response).map_err(ConnectionError::Frame)?;
        self.outgoing.append(&mut frame);
        self.flush()
    }

    /// Sends what waits, as much as the peer takes now.
    ///
    /// # Errors
    /// [`ConnectionError`]: close it.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(0) => return Err(ConnectionError::Closed),
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Sends the answers that the peer has not taken yet, and closes the connection.
    pub fn close(mut self) {
        // The peer may be gone; there is nothing else to do for it.
        let _ = self
            .stream
            .set_nonblocking(false)
            .and_then(|()| self.stream.set_write_timeout(Some(CLOSE_TIMEOUT)))
            .and_then(|()| self.stream.write_all(&self.outgoing));
    }
}

struct Received {
    bytes: usize,
    /// Some descriptors were lost.
    truncated: bool,
}

/// Receives bytes, and descriptors that are closed on exec from the start.
fn receive(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(bytes)];
    let received = recvmsg(stream, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(Received {
        bytes: received.bytes,
        truncated: received.flags.contains(ReturnFlags::CTRUNC),
    })
}

#[cfg(any(test, fuzzing))]
#[path = "connection/fuzz.rs"]
pub(crate) mod fuzz;
#[cfg(test)]
#[path = "connection/tests.rs"]
mod tests;
