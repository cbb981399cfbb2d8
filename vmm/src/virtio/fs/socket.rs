//! The device's end of the socket to the file server. Nothing here waits, but [`Socket::wait`].

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use hull_proto_vmm::fs::SEND_BUFFER;

/// A connected seqpacket socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// What came of sending or receiving a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A packet of this length was sent, or received.
    Done(usize),
    /// Not now.
    Later,
    /// This packet is too large for the socket, or for the buffer.
    TooLarge,
    /// The server is gone.
    Gone,
}

impl Socket {
    /// Takes a descriptor over.
    ///
    /// # Errors
    /// `EPROTOTYPE` when it is no seqpacket socket.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if option(&fd, libc::SO_TYPE)? != libc::SOCK_SEQPACKET {
            return Err(io::Error::from_raw_os_error(libc::EPROTOTYPE));
        }
        // Whoever made the socket gave it more if it could; this is what anybody may have.
        if option(&fd, libc::SO_SNDBUF)? < SEND_BUFFER as i32 {
            let size: libc::c_int = SEND_BUFFER as libc::c_int;
            // SAFETY: the option's value is an int, and its size is told.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_SNDBUF,
                    (&raw const size).cast(),
                    size_of_val(&size) as libc::socklen_t,
                )
            };
        }
        Ok(Self(fd))
    }

    /// Returns the descriptor to watch.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Sends a packet.
    pub fn send(&self, packet: &[u8]) -> Outcome {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `packet` is readable memory of this length.
        outcome(unsafe { libc::send(self.fd(), packet.as_ptr().cast(), packet.len(), flags) })
    }

    /// Receives a packet.
    pub fn receive(&self, buffer: &mut [u8]) -> Outcome {
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        // SAFETY: `buffer` is memory of this length that is ours to write.
        let received =
            unsafe { libc::recv(self.fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
        match outcome(received) {
            // No packet is empty: this is the end.
            Outcome::Done(0) => Outcome::Gone,
            Outcome::Done(length) if length > buffer.len() => Outcome::TooLarge,
            other => other,
        }
    }

    /// Waits until something is there to receive. False: it took too long.
    pub fn wait(&self, limit: Duration) -> bool {
        let mut poll = libc::pollfd {
            fd: self.fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: `poll` is one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, limit) > 0 }
    }
}

fn option(fd: &OwnedFd, name: libc::c_int) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option's value is an int, and the size says so.
    let got = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut size,
        )
    };
    if got == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn outcome(result: isize) -> Outcome {
    match usize::try_from(result) {
        Ok(length) => Outcome::Done(length),
        Err(_) => match io::Error::last_os_error().raw_os_error() {
            // The host is short of memory for the moment: as if the socket were full.
            Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM) => Outcome::Later,
            Some(libc::EMSGSIZE) => Outcome::TooLarge,
            _ => Outcome::Gone,
        },
    }
}
