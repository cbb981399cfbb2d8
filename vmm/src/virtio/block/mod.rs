//! virtio-blk (virtio 1.2, section 5.2).
//!
//! [`request`] parses what the guest asks, [`disk`] does it, this file is the device around them.

pub(crate) mod disk;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod request;

use std::ops::ControlFlow;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_memory::{Bytes, VolatileSlice};

use self::disk::Disk;
use self::request::{Action, Limits, Request, SECTOR, SERIAL, Status};
use super::buffers::{Buffers, total};
use super::queue::QueueRecord;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Activation, DeviceError, Kind, Progress, VirtioDevice};
use crate::virtio::state::{BlockState, DeviceState};

const QUEUE_SIZE: u16 = 128;
/// Data segments of a request: a chain has a header and a status byte as well.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a data segment.
const MAX_SEGMENT_BYTES: u32 = 256 << 10;
const MAX_PUNCHES: u32 = 16;
const MAX_PUNCH_SECTORS: u32 = 1 << 21;
/// Bytes moved and requests handled before other devices have their turn. What takes the host's file
/// system long, a flush or holes, is a turn of its own.
const BUDGET_BYTES: u64 = 4 << 20;
const BUDGET_REQUESTS: usize = 64;
/// Bytes of the configuration space.
const CONFIG: usize = 60;

/// Why there is no block device.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number is too long or not printable ASCII.
    #[error("disk serial {0:?} is not up to {SERIAL} printable ASCII characters")]
    Serial(String),
    /// The disk is another one than the saved state's.
    #[error("disk does not match its saved state")]
    Mismatch,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    serial: String,
    active: Option<Activation>,
    counters: Counters,
}

impl Block {
    /// Creates an idle device.
    ///
    /// # Errors
    /// [`BlockError::Serial`]
    pub fn new(disk: Disk, serial: String) -> Result<Self, BlockError> {
        if serial.len() > SERIAL || !serial.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            return Err(BlockError::Serial(serial));
        }
        Ok(Self {
            disk,
            serial,
            active: None,
            counters: Counters::default(),
        })
    }

    /// Creates an idle device from what was saved and the same disk.
    ///
    /// # Errors
    /// [`BlockError`]
    pub fn restore(state: &BlockState, disk: Disk) -> Result<Self, BlockError> {
        if state.length != disk.length() || state.readonly != disk.readonly() {
            return Err(BlockError::Mismatch);
        }
        let mut block = Self::new(disk, state.serial.clone())?;
        block.counters = state.counters;
        Ok(block)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.readonly() {
            common | 1 << VIRTIO_BLK_F_RO
        } else {
            common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG];
        let mut put = |offset: usize, value: u32| {
            config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        };
        let sectors = self.disk.length() / SECTOR;
        put(0, sectors as u32);
        put(4, (sectors >> 32) as u32);
        put(8, MAX_SEGMENT_BYTES);
        put(12, MAX_SEGMENTS);
        put(20, SECTOR as u32);
        // Discard: sectors, segments, alignment; then write zeroes: sectors, segments, may unmap.
        for (offset, value) in [
            (36, MAX_PUNCH_SECTORS),
            (40, MAX_PUNCHES),
            (44, 8),
            (48, MAX_PUNCH_SECTORS),
            (52, MAX_PUNCHES),
            (56, 1),
        ] {
            put(offset, value);
        }
        config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref())
    }

    fn on_kick(&mut self, _queue: u16) -> Result<Progress, DeviceError> {
        self.counters.notifications += 1;
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        let limits = Limits {
            sectors: self.disk.length() / SECTOR,
            data: u64::from(MAX_SEGMENTS) * u64::from(MAX_SEGMENT_BYTES),
            segments: MAX_PUNCHES as usize,
            segment_sectors: MAX_PUNCH_SECTORS,
        };
        let (disk, serial, counters) = (&self.disk, &self.serial, &mut self.counters);
        let start = counters.bytes_in + counters.bytes_out;
        active.serve(BUDGET_REQUESTS, |chain, memory| {
            let request = Buffers::collect(chain, memory, usize::from(QUEUE_SIZE))
                .ok()
                .and_then(|buffers| Request::parse(buffers, &limits));
            let mut is_slow = false;
            let written = match request {
                Some(request) => {
                    is_slow = matches!(request.action, Action::Flush | Action::Punch(_));
                    answer(&request, disk, serial, counters)
                }
                None => {
                    counters.errors += 1;
                    0
                }
            };
            counters.requests += 1;
            if counters.bytes_in + counters.bytes_out - start < BUDGET_BYTES && !is_slow {
                ControlFlow::Continue(written)
            } else {
                ControlFlow::Break(written)
            }
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn state(&self) -> DeviceState {
        DeviceState::Block(BlockState {
            serial: self.serial.clone(),
            readonly: self.disk.readonly(),
            length: self.disk.length(),
            counters: self.counters,
        })
    }
}

/// Does what is asked; returns the number of bytes written to guest memory.
fn answer(request: &Request<'_>, disk: &Disk, serial: &str, counters: &mut Counters) -> u32 {
    let mut written = 0;
    let done = match &request.action {
        Action::Read(start, slices) => disk.read(*start, slices).map(|()| {
            written = total(slices);
            counters.bytes_in += written as u64;
        }),
        Action::Write(start, slices) => disk
            .write(*start, slices)
            .map(|()| counters.bytes_out += total(slices) as u64),
        Action::Flush => disk.flush(),
        Action::Id(slices) => {
            written = copy_serial(serial, slices);
            Ok(())
        }
        Action::Punch(ranges) => ranges
            .iter()
            .try_for_each(|(start, length)| disk.punch(*start, *length)),
        Action::Refuse(status) => return finish(*status, 0, request, counters),
    };
    let status = match done {
        Ok(()) => Status::Ok,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
        Err(error) => {
            crate::log::note(&format!("disk {serial:?}: {error}"));
            Status::IoError
        }
    };
    finish(status, written, request, counters)
}

fn finish(status: Status, written: usize, request: &Request<'_>, counters: &mut Counters) -> u32 {
    if status != Status::Ok {
        counters.errors += 1;
    }
    // One byte of guest memory that was checked when the chain was followed.
    let _ = request.status.write_obj(status as u8, 0);
    written as u32 + 1
}

fn copy_serial(serial: &str, slices: &[VolatileSlice<'_>]) -> usize {
    let mut id = [0; SERIAL];
    id.iter_mut()
        .zip(serial.bytes())
        .for_each(|(byte, value)| *byte = value);
    let mut rest = id.as_slice();
    for slice in slices {
        let (here, after) = rest.split_at(slice.len().min(rest.len()));
        slice.copy_from(here);
        rest = after;
    }
    SERIAL - rest.len()
}

#[cfg(test)]
mod tests;
