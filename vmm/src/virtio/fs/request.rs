//! FUSE requests in descriptor chains: only what a carrier has to know of them.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use hull_proto_vmm::fs::MAX_PACKET;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{Memory, is_writable};
use crate::virtio::buffers::ChainError;
use crate::virtio::queue::Chain;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER: usize = 16;

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Why a chain is not a FUSE request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The chain is not well-formed.
    #[error("descriptor chain of a FUSE request")]
    Chain(#[from] ChainError),
    /// The header's length is not that of what can be read.
    #[error("FUSE request's length is wrong")]
    Length,
    /// There is no room for an answer.
    #[error("no room for the answer to a FUSE request")]
    NoRoom,
}

/// The server's packet is no reply, does not fit, or its room is outside of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("reply can't be given to the guest")]
pub struct ReplyError;

/// What is to be done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling {
    /// The server answers the request.
    Answered,
    /// The server gets the request and sends no reply.
    Unanswered,
    /// The request ends here: interrupting is up to the server, and ours finishes what it began.
    Dropped,
}

/// A request, copied out of guest memory.
#[derive(Debug)]
pub struct Request {
    /// The packet for the server.
    pub packet: Vec<u8>,
    /// Where the answer goes.
    pub room: Room,
    /// What is to be done with the request.
    pub handling: Handling,
}

impl Request {
    /// Copies the request in `chain`.
    ///
    /// # Errors
    /// [`RequestError`], with the room for an answer when there is one.
    pub fn read(
        chain: Chain<'_>,
        memory: &Memory,
        limit: usize,
    ) -> Result<Self, (RequestError, Room)> {
        let mut packet = Vec::new();
        let mut room = Room::default();
        if let Err(error) = follow(chain, memory, limit, &mut packet, &mut room) {
            return Err((error.into(), Room::default()));
        }
        let length = word(&packet, 0).map(|length| length as usize);
        if packet.len() < IN_HEADER || length != Some(packet.len()) {
            room.unique = unique(&packet);
            return Err((RequestError::Length, room));
        }
        let handling = match word(&packet, 4) {
            Some(FORGET | BATCH_FORGET) => Handling::Unanswered,
            Some(INTERRUPT) => Handling::Dropped,
            _ => Handling::Answered,
        };
        room.unique = unique(&packet);
        if handling == Handling::Answered && room.length < OUT_HEADER {
            return Err((RequestError::NoRoom, Room::default()));
        }
        Ok(Self {
            packet,
            room,
            handling,
        })
    }

    /// Gives the packet another `unique`.
    pub fn set_unique(&mut self, unique: u64) {
        put_unique(&mut self.packet, unique);
    }
}

/// Follows the chain: reads what is readable, notes what is writable.
fn follow(
    chain: Chain<'_>,
    memory: &Memory,
    limit: usize,
    packet: &mut Vec<u8>,
    room: &mut Room,
) -> Result<(), ChainError> {
    let mut complete = false;
    for (count, descriptor) in chain.enumerate() {
        if count == limit {
            return Err(ChainError::Length);
        }
        complete = !descriptor.has_next();
        let length = descriptor.len() as usize;
        if descriptor.is_write_only() {
            if !is_writable(memory, descriptor.addr()) {
                return Err(ChainError::Address);
            }
            room.segments.push((descriptor.addr(), length));
            room.length = room.length.saturating_add(length);
        } else if room.segments.is_empty() {
            let start = packet.len();
            let end = start.checked_add(length).filter(|end| *end <= MAX_PACKET);
            packet.resize(end.ok_or(ChainError::Length)?, 0);
            memory
                .read_slice(
                    packet.get_mut(start..).unwrap_or_default(),
                    descriptor.addr(),
                )
                .map_err(|_| ChainError::Address)?;
        } else {
            return Err(ChainError::Order);
        }
    }
    if complete {
        Ok(())
    } else {
        Err(ChainError::Length)
    }
}

/// The part of a chain that the device writes. Whether there is memory to the end of each segment shows
/// when it does.
#[derive(Debug, Default)]
pub struct Room {
    segments: Vec<(GuestAddress, usize)>,
    length: usize,
    /// The request's `unique`, as the guest chose it.
    unique: u64,
}

impl Room {
    /// Writes a reply of the server; returns its length.
    ///
    /// # Errors
    /// [`ReplyError`]
    pub fn answer(&self, memory: &Memory, reply: &mut [u8]) -> Result<u32, ReplyError> {
        let length = word(reply, 0).map(|length| length as usize);
        if reply.len() < OUT_HEADER || length != Some(reply.len()) || reply.len() > self.length {
            return Err(ReplyError);
        }
        put_unique(reply, self.unique);
        let mut rest: &[u8] = reply;
        for (address, length) in &self.segments {
            let (here, after) = rest.split_at(rest.len().min(*length));
            memory.write_slice(here, *address).map_err(|_| ReplyError)?;
            rest = after;
        }
        Ok(reply.len() as u32)
    }

    /// Writes an error of the device's own; returns the number of bytes written.
    pub fn refuse(&self, memory: &Memory, error: i32) -> u32 {
        let length = (OUT_HEADER as u32).to_le_bytes();
        let error = error.wrapping_neg().to_le_bytes();
        let mut reply = [0; OUT_HEADER];
        for (place, byte) in reply.iter_mut().zip(length.into_iter().chain(error)) {
            *place = byte;
        }
        self.answer(memory, &mut reply).unwrap_or(0)
    }
}

/// Returns a packet's `unique`; 0 when it is too short. It is at the same place in both headers.
pub fn unique(packet: &[u8]) -> u64 {
    packet
        .get(8..16)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn put_unique(packet: &mut [u8], unique: u64) {
    if let Some(place) = packet.get_mut(8..16) {
        place.copy_from_slice(&unique.to_le_bytes());
    }
}

fn word(packet: &[u8], offset: usize) -> Option<u32> {
    let bytes = packet.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}
