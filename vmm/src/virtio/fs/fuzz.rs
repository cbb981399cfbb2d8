//! A virtio-fs device between a guest and a file server, both of which send what they like.

use std::collections::HashSet;

use arbitrary::{Result, Unstructured};
use hull_proto_vmm::fs::MAX_PACKET;
use rustix::fd::OwnedFd;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use super::Fs;
use super::request::{IN_HEADER, OUT_HEADER, unique};
use crate::fuzz::guest::{Guest, World, drive, number, some_bytes};
use crate::virtio::device::VirtioDevice;
use crate::virtio::test_driver::Segment;

struct Files {
    device: Fs,
    /// The server's end; none: it is gone.
    server: Option<OwnedFd>,
    /// The ids of all requests that it got.
    seen: HashSet<u64>,
    /// Of the last one.
    last: u64,
}

/// A guest and its file system. The server gets whole requests, no two of the same id.
pub(crate) fn device(input: &[u8]) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let ends = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (ours, theirs) = ends.expect("make a socket");
    let mut world = Files {
        device: Fs::new("hull", ours).expect("a device"),
        server: Some(theirs),
        seen: HashSet::new(),
        last: 0,
    };
    drive(&mut world, &mut Unstructured::new(input));
}

impl World for Files {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)> {
        let mut packet = vec![0; IN_HEADER];
        packet.extend(some_bytes(input, 64)?);
        if input.int_in_range(0..=9)? == 0 {
            packet.resize(*input.choose(&[4096, MAX_PACKET, MAX_PACKET + 1])?, 7);
        }
        let length = match input.int_in_range(0..=7)? {
            0 => number(input, &[u32::MAX.into()])? as u32,
            _ => packet.len() as u32,
        };
        let opcodes = [1, 2, 3, 15, 16, 26, 36, 42];
        let opcode = *input.choose(&opcodes)?;
        packet[..4].copy_from_slice(&length.to_le_bytes());
        packet[4..8].copy_from_slice(&u32::to_le_bytes(opcode));
        packet[8] = input.arbitrary()?;
        let mut segments = guest.sent(input, &packet)?;
        for _ in 0..input.int_in_range(0..=2)? {
            let lengths = [16, 80, 4096, 1, 0];
            segments.push(guest.room(*input.choose(&lengths)?));
        }
        Ok((input.int_in_range(0..=1)?, segments))
    }

    fn host(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut reply = vec![0; OUT_HEADER];
        reply.extend(some_bytes(input, 100)?);
        let length = match input.int_in_range(0..=7)? {
            0 => number(input, &[u32::MAX.into(), 15])? as u32,
            _ => reply.len() as u32,
        };
        let id = match input.int_in_range(0..=3)? {
            0 => number(input, &[u64::MAX, 0])?,
            1 => self.last.wrapping_sub(input.arbitrary::<u8>()?.into()),
            _ => self.last,
        };
        reply[..4].copy_from_slice(&length.to_le_bytes());
        reply[8..16].copy_from_slice(&id.to_le_bytes());
        match input.int_in_range(0..=30)? {
            0 => self.server = None,
            1 => reply.resize(MAX_PACKET + 1, 0),
            2 => reply.truncate(input.int_in_range(1..=OUT_HEADER)?),
            _ => {}
        }
        if let Some(server) = &self.server {
            // A full socket loses it.
            let _ = send(server, &reply, SendFlags::NOSIGNAL);
        }
        Ok(())
    }

    fn look(&mut self, _: u64) {
        let mut packet = vec![0; MAX_PACKET + 1];
        let Some(server) = &self.server else { return };
        while let Ok((_, length)) = recv(server, packet.as_mut_slice(), RecvFlags::DONTWAIT) {
            let packet = &packet[..length];
            assert!((IN_HEADER..=MAX_PACKET).contains(&length), "{length} bytes");
            assert_eq!(packet[..4], (length as u32).to_le_bytes());
            self.last = unique(packet);
            assert!(
                self.seen.insert(self.last),
                "request {} came twice",
                self.last
            );
        }
    }
}
