//! The device's end of the socket to the file server. Nothing here waits, but [`Socket::wait`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use hull_proto_vmm::fs::SEND_BUFFER;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketType, recv, send, sockopt};

/// A connected seqpacket socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// The result of sending or receiving a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A packet of this length was sent, or received.
    Done(usize),
    /// The socket is full, or empty.
    WouldBlock,
    /// This packet is too large for the socket, or for the buffer.
    TooLarge,
    /// The server is gone.
    Closed,
}

impl Socket {
    /// Takes a descriptor over.
    ///
    /// # Errors
    /// `EPROTOTYPE` when it is no seqpacket socket.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if sockopt::socket_type(&fd)? != SocketType::SEQPACKET {
            return Err(Errno::PROTOTYPE.into());
        }
        // Whoever made the socket gave it more if it could; this is what anybody may have.
        if sockopt::socket_send_buffer_size(&fd)? < SEND_BUFFER {
            let _ = sockopt::set_socket_send_buffer_size(&fd, SEND_BUFFER);
        }
        Ok(Self(fd))
    }

    /// Returns the descriptor to watch.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Sends a packet.
    pub fn send(&self, packet: &[u8]) -> Outcome {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        outcome(send(&self.0, packet, flags))
    }

    /// Receives a packet.
    pub fn receive(&self, buffer: &mut [u8]) -> Outcome {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        let received = recv(&self.0, &mut *buffer, flags);
        match outcome(received.map(|(_, length)| length)) {
            // No packet is empty: this is the end.
            Outcome::Done(0) => Outcome::Closed,
            Outcome::Done(length) if length > buffer.len() => Outcome::TooLarge,
            other => other,
        }
    }

    /// Waits until something is there to receive. False: it took too long.
    pub fn wait(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], limit.as_ref());
        ready.is_ok_and(|count| count > 0)
    }
}

fn outcome(result: rustix::io::Result<usize>) -> Outcome {
    match result {
        Ok(length) => Outcome::Done(length),
        // The host is short of memory for the moment: as if the socket were full.
        Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM) => Outcome::WouldBlock,
        Err(Errno::MSGSIZE) => Outcome::TooLarge,
        Err(_) => Outcome::Closed,
    }
}
