//! Descriptors that go from one process to another over a socket (`SCM_RIGHTS`, unix(7)).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most that go with one byte; the kernel takes 253 (unix(7)).
const MOST: usize = 64;
/// The most lots that go at once.
const LOTS: usize = 64;

/// Sends `fds`, each lot with a byte that tells whether more follow.
pub(super) fn send(socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut lots = fds.chunks(MOST).peekable();
    while let Some(lot) = lots.next() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(lot)) {
            return Err(io::Error::other("no room for the descriptors"));
        }
        let more = [u8::from(lots.peek().is_some())];
        let byte = [IoSlice::new(&more)];
        sendmsg(&socket, &byte, &mut ancillary, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// Receives what was sent at once.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    for _ in 0..LOTS {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut more = [0];
        let mut bytes = [IoSliceMut::new(&mut more)];
        let received = recvmsg(&socket, &mut bytes, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let lot = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        fds.extend(lot.flatten());
        match (received.bytes, more) {
            (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
            (_, [0]) => return Ok(fds),
            _ => {}
        }
    }
    Err(io::Error::other("too many descriptors"))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, thread};

    use super::*;

    #[test]
    fn any_number_goes_and_nothing_of_what_follows() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for number in [1, MOST, MOST + 1, 3 * MOST] {
            let fds = vec![ours.as_fd(); number];
            let received = thread::scope(|scope| {
                scope.spawn(|| send(&ours, &fds).unwrap());
                receive(&theirs).unwrap()
            });
            assert_eq!(received.len(), number);
        }
        drop(ours);
        assert!(receive(&theirs).is_err());
    }
}
