//! A block request, parsed once from guest memory (virtio 1.2, section 5.2.6).

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable
    )
)]

use vm_memory::{Bytes, VolatileSlice};

use super::super::buffers::{Buffers, total};

/// Bytes per sector, whatever the block size.
pub const SECTOR: u64 = 512;
const HEADER: usize = 16;
/// Bytes of a discard or write-zeroes segment.
const SEGMENT: usize = 16;
/// Bytes of a serial number.
pub const SERIAL: usize = 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Flag of a write-zeroes segment; the only one, and none for discard.
const UNMAP: u32 = 1;

/// The answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Not done.
    IoError = 1,
    /// The device does not know such requests.
    Unsupported = 2,
}

/// The limits of a request.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sectors of the disk.
    pub sectors: u64,
    /// The most bytes of data.
    pub data: u64,
    /// The most segments of a discard or write-zeroes.
    pub segments: usize,
    /// The most sectors of such a segment.
    pub segment_sectors: u32,
}

/// What to do; all ranges are on the disk.
#[derive(Debug)]
pub enum Action<'m> {
    /// Read from this byte to these slices.
    Read(u64, Vec<VolatileSlice<'m>>),
    /// Write from these slices to this byte.
    Write(u64, Vec<VolatileSlice<'m>>),
    /// Make writes durable.
    Flush,
    /// Copy the serial number.
    Id(Vec<VolatileSlice<'m>>),
    /// Make these (start, length) ranges, in bytes, read as zeros.
    Punch(Vec<(u64, u64)>),
    /// Only answer.
    Refuse(Status),
}

/// A request that can be answered.
#[derive(Debug)]
pub struct Request<'m> {
    /// What to do.
    pub action: Action<'m>,
    /// Where the status byte goes.
    pub status: VolatileSlice<'m>,
}

impl<'m> Request<'m> {
    /// Parses a request. None: it has no place for an answer.
    #[must_use]
    pub fn parse(mut buffers: Buffers<'m>, limits: &Limits) -> Option<Self> {
        let status = take_last_byte(&mut buffers.writable)?;
        let action = match take_front(&mut buffers.readable) {
            Some(header) => action(header, buffers, limits),
            None => Action::Refuse(Status::IoError),
        };
        Some(Self { action, status })
    }
}

fn action<'m>(header: [u8; HEADER], buffers: Buffers<'m>, limits: &Limits) -> Action<'m> {
    let [kind, sector @ ..] = header.as_chunks::<4>().0 else {
        return Action::Refuse(Status::IoError);
    };
    let [_reserved, low, high] = sector else {
        return Action::Refuse(Status::IoError);
    };
    let sector = u64::from(u32::from_le_bytes(*low)) | u64::from(u32::from_le_bytes(*high)) << 32;
    let data = |slices: &[VolatileSlice<'_>]| {
        let length = total(slices) as u64;
        let good = length <= limits.data && length.is_multiple_of(SECTOR);
        good.then(|| range(sector, length / SECTOR, limits))
            .flatten()
    };
    match u32::from_le_bytes(*kind) {
        IN => match data(&buffers.writable) {
            Some((start, _)) => Action::Read(start, buffers.writable),
            None => Action::Refuse(Status::IoError),
        },
        OUT => match data(&buffers.readable) {
            Some((start, _)) => Action::Write(start, buffers.readable),
            None => Action::Refuse(Status::IoError),
        },
        FLUSH => Action::Flush,
        GET_ID => Action::Id(buffers.writable),
        DISCARD => punch(&buffers.readable, limits, 0),
        WRITE_ZEROES => punch(&buffers.readable, limits, UNMAP),
        _ => Action::Refuse(Status::Unsupported),
    }
}

/// Returns start and length in bytes if the range is on the disk.
fn range(sector: u64, sectors: u64, limits: &Limits) -> Option<(u64, u64)> {
    let end = sector.checked_add(sectors)?;
    let bytes = (sector.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?);
    (end <= limits.sectors).then_some(bytes)
}

fn punch<'m>(slices: &[VolatileSlice<'m>], limits: &Limits, known_flags: u32) -> Action<'m> {
    let length = total(slices);
    if length == 0 || !length.is_multiple_of(SEGMENT) || length / SEGMENT > limits.segments {
        return Action::Refuse(Status::IoError);
    }
    let mut bytes = vec![0; length];
    let mut rest = bytes.as_mut_slice();
    for slice in slices {
        let (here, after) = rest.split_at_mut(slice.len());
        slice.copy_to(here);
        rest = after;
    }
    let mut ranges = Vec::with_capacity(length / SEGMENT);
    for segment in bytes.as_chunks::<SEGMENT>().0 {
        let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = *segment;
        let sector = u64::from_le_bytes(sector);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !known_flags != 0 {
            return Action::Refuse(Status::Unsupported);
        }
        match range(sector, u64::from(count), limits) {
            Some(range) if count <= limits.segment_sectors => ranges.push(range),
            _ => return Action::Refuse(Status::IoError),
        }
    }
    Action::Punch(ranges)
}

/// Cuts the last byte off.
fn take_last_byte<'m>(slices: &mut Vec<VolatileSlice<'m>>) -> Option<VolatileSlice<'m>> {
    loop {
        let last = slices.pop()?;
        if let Some(rest) = last.len().checked_sub(1) {
            let (rest, byte) = last.split_at(rest).ok()?;
            slices.push(rest);
            return Some(byte);
        }
    }
}

/// Cuts the header off and copies it; it may be spread over descriptors.
fn take_front(slices: &mut Vec<VolatileSlice<'_>>) -> Option<[u8; HEADER]> {
    if total(slices) < HEADER {
        return None;
    }
    let mut header = [0; HEADER];
    let mut rest = header.as_mut_slice();
    while !rest.is_empty() {
        let first = slices.first_mut()?;
        let here = first.len().min(rest.len());
        let (part, after) = rest.split_at_mut(here);
        first.read_slice(part, 0).ok()?;
        rest = after;
        *first = first.offset(here).ok()?;
        if first.is_empty() {
            slices.remove(0);
        }
    }
    Some(header)
}
