//! The socket between the daemon and a worker: one frame with the job, descriptors, one frame with
//! the answer. A frame is its length in 4 bytes, and so many bytes.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors that are sent at once.
const MAX_DESCRIPTORS: usize = 4;
/// Longest job: the lengths of the data of some hundred layers.
const LONGEST_JOB: usize = 64 << 10;

/// Sends bytes with descriptors. Returns how many of the bytes went; the descriptors are with the
/// first.
pub(super) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let bytes = [IoSlice::new(bytes)];
    Ok(sendmsg(
        socket,
        &bytes,
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?)
}

/// A frame of these bytes.
pub(super) fn frame(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    Ok([&length.to_le_bytes(), bytes].concat())
}

/// The worker's end. A file, as such is read and written with the calls that pipes take.
#[derive(Debug)]
pub(super) struct Control(File);

impl Control {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket.into())
    }

    /// Takes the job, and the descriptors that came with it.
    pub(super) fn job(&mut self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut length = [0; 4];
        let descriptors = self.receive(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST_JOB {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut job = vec![0; length];
        self.0.read_exact(&mut job)?;
        Ok((job, descriptors))
    }

    /// Takes one more descriptor.
    pub(super) fn descriptor(&mut self) -> io::Result<OwnedFd> {
        let mut descriptors = self.receive(&mut [0])?;
        descriptors
            .pop()
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    pub(super) fn answer(mut self, answer: &[u8]) -> io::Result<()> {
        self.0.write_all(&frame(answer)?)
    }

    /// Fills `bytes`; descriptors come with the first of them.
    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = {
            let bytes = &mut [IoSliceMut::new(bytes)];
            recvmsg(&self.0, bytes, &mut ancillary, flags)?.bytes
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(sent) = message {
                descriptors.extend(sent);
            }
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.0.read_exact(&mut bytes[count..])?;
        Ok(descriptors)
    }
}
