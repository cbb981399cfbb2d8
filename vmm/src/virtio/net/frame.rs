//! Frames for the guest: read from the port straight into the guest's buffers, if they are large
//! enough, else kept until they are.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};

use vm_memory::VolatileSlice;

use super::header::{HEADER_SIZE, NUM_BUFFERS};
use super::tap::{Port, read_frame};
use crate::memory::Memory;
use crate::virtio::buffers::{Buffers, total};
use crate::virtio::queue::{QueueError, VirtQueue};

/// A header and the largest frame that segmentation makes (virtio 1.2, 5.1.6.3.1).
pub(super) const MAX_FRAME: usize = 65562;
/// A header and an Ethernet header.
pub(super) const MIN_FRAME: usize = HEADER_SIZE + 14;
/// The most descriptors of a frame. Linux uses at most 2 + `MAX_SKB_FRAGS` (45).
pub(super) const MAX_DESCRIPTORS: usize = 64;

/// The frame that was read last.
#[derive(Debug, Default)]
pub(super) struct Frame {
    /// Its header, and what of it is not in buffers of the guest.
    bytes: Vec<u8>,
    /// Bytes of it, all in `bytes`, that wait for buffers; 0: none.
    pub len: usize,
    /// How long the next one may be, from those before.
    pub expected: usize,
}

/// The result of reading a frame.
pub(super) enum Reading {
    /// The frame is in the guest's buffers, which were returned; its length without header.
    Delivered(usize),
    /// The frame was larger than the buffers at hand and waits in the [`Frame`] for more.
    Buffered,
    /// What was read is shorter than a frame.
    TooShort,
}

/// The result of giving a frame that waits to the guest.
pub(super) enum Delivery {
    Done,
    /// The guest must offer more buffers first.
    NoBuffers,
    /// No buffers that the guest can offer will do.
    Impossible,
}

/// What the receive queue's driver has negotiated.
#[derive(Debug, Clone, Copy)]
pub(super) struct RxOptions {
    /// The most chains that a frame may take.
    pub max_chains: usize,
    /// The driver knows the header's checksum flags.
    pub checksums: bool,
}

/// A chain of the receive queue, without its slices.
#[derive(Debug)]
struct RxChain {
    head: u16,
    slices: usize,
    len: usize,
}

/// Chains that were taken from the receive queue to read frames into. What is left of them at the
/// end of a turn goes back.
#[derive(Debug, Default)]
pub(super) struct RxBuffers<'m> {
    chains: VecDeque<RxChain>,
    /// The memory of all chains, in order.
    slices: VecDeque<VolatileSlice<'m>>,
    len: usize,
    /// The chains of the frame that was read last, with the number of bytes in each.
    used: Vec<(u16, u32)>,
    /// Reused for each chain.
    buffers: Buffers<'m>,
}

/// Why no frame was read.
pub(super) enum ReadError {
    Port(io::Error),
    Ring(QueueError),
}

impl<'m> RxBuffers<'m> {
    /// Takes chains until there is room for `wanted` bytes, or no chain is left. False: the guest
    /// has none at all, and will notify. A chain of no use stays where it is, and so do those after
    /// it: [`Frame::deliver`] sees to them, without any room here.
    pub fn fill(
        &mut self,
        wanted: usize,
        options: RxOptions,
        queue: &mut VirtQueue,
        memory: &'m Memory,
    ) -> Result<bool, QueueError> {
        while self.chains.is_empty()
            || (self.len < wanted && self.chains.len() < options.max_chains)
        {
            let Some(chain) = queue.pop(memory)? else {
                if self.chains.is_empty() && queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(!self.chains.is_empty());
            };
            let head = chain.head_index();
            let proper = self.buffers.refill(chain, memory, MAX_DESCRIPTORS).is_ok();
            let len = total(&self.buffers.writable);
            if !proper || !self.buffers.readable.is_empty() || len == 0 {
                queue.undo_pop();
                break;
            }
            self.chains.push_back(RxChain {
                head,
                slices: self.buffers.writable.len(),
                len,
            });
            self.slices.extend(self.buffers.writable.drain(..));
            self.len += len;
        }
        Ok(true)
    }

    /// Returns the memory after the first `skip` bytes.
    fn after(&self, skip: usize) -> Vec<VolatileSlice<'m>> {
        let mut skip = skip;
        let mut rest = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            let now = skip.min(slice.len());
            skip -= now;
            rest.extend(slice.offset(now).ok().filter(|it| !it.is_empty()));
        }
        rest
    }

    /// Takes away the first chains, as many as a frame of `len` bytes fills, into `used`. Returns
    /// the number of their slices.
    fn use_up(&mut self, len: usize) -> usize {
        self.used.clear();
        let (mut left, mut slices) = (len, 0);
        while left > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let here = left.min(chain.len);
            left -= here;
            self.len -= chain.len;
            slices += chain.slices;
            self.used.push((chain.head, here as u32));
        }
        slices
    }

    /// Forgets the first slices, and writes the header to their start.
    fn finish(&mut self, slices: usize, mut header: &[u8]) {
        for slice in self.slices.drain(..slices) {
            let (now, later) = header.split_at(header.len().min(slice.len()));
            slice.copy_from(now);
            header = later;
        }
    }

    /// Puts all chains back.
    pub fn give_back(&mut self, queue: &mut VirtQueue) {
        for _ in 0..self.chains.len() {
            queue.undo_pop();
        }
        *self = Self::default();
    }
}

impl Frame {
    /// Reads the next frame, into `room` if it is large enough.
    pub fn read<'m>(
        &mut self,
        port: &impl Port,
        room: &mut RxBuffers<'m>,
        options: RxOptions,
        queue: &mut VirtQueue,
        memory: &'m Memory,
    ) -> Result<Reading, ReadError> {
        self.bytes.resize(MAX_FRAME, 0);
        let (header, rest) = self.bytes.split_at_mut(HEADER_SIZE);
        let inside = room.len.clamp(HEADER_SIZE, MAX_FRAME) - HEADER_SIZE;
        let body = room.after(HEADER_SIZE);
        let count =
            read_frame(port.file(), header, &body, &mut rest[inside..]).map_err(ReadError::Port)?;
        if count == 0 {
            return Err(ReadError::Port(ErrorKind::UnexpectedEof.into()));
        }
        if count < MIN_FRAME {
            return Ok(Reading::TooShort);
        }
        self.expected = count.max(self.expected / 2);
        if count > room.len {
            // What is in the guest's buffers joins the rest; whether the guest has changed it
            // meanwhile is the guest's affair.
            let mut at = 0;
            for slice in &body {
                let len = slice.len().min(inside - at);
                slice.copy_to(&mut rest[at..at + len]);
                at += len;
            }
            room.give_back(queue);
            self.len = count;
            return Ok(Reading::Buffered);
        }
        let slices = room.use_up(count);
        self.set_header(room.used.len() as u16, options);
        room.finish(slices, &self.bytes[..HEADER_SIZE]);
        queue
            .push_used_together(memory, &room.used)
            .map_err(ReadError::Ring)?;
        Ok(Reading::Delivered(count - HEADER_SIZE))
    }

    /// Fills in what the tap does not know: the number of buffers that the frame takes.
    fn set_header(&mut self, buffers: u16, options: RxOptions) {
        self.bytes[NUM_BUFFERS..HEADER_SIZE].copy_from_slice(&buffers.to_le_bytes());
        if !options.checksums {
            // A driver that knows no checksum offload must see no flags (5.1.6.4.1).
            self.bytes[0] = 0;
        }
    }

    /// Copies the frame to the guest, in as many buffers as it takes when the
    /// driver merges buffers, else in one.
    pub fn deliver(
        &mut self,
        options: RxOptions,
        queue: &mut VirtQueue,
        memory: &Memory,
    ) -> Result<Delivery, QueueError> {
        let most = options.max_chains;
        let mut taken: Vec<(u16, Vec<VolatileSlice<'_>>)> = Vec::with_capacity(1);
        let mut useless = 0;
        let mut room = 0;
        while room < self.len {
            let chain = match queue.pop(memory)? {
                Some(chain) if taken.len() < most => chain,
                Some(_) => {
                    // Go back over this chain and all those that do not suffice.
                    for _ in 0..=taken.len() {
                        queue.undo_pop();
                    }
                    return Ok(Delivery::Impossible);
                }
                // Notifications count from what was taken, so this precedes the undoing.
                None if queue.enable_notification(memory)? => continue,
                None => {
                    for _ in 0..taken.len() {
                        queue.undo_pop();
                    }
                    let impossible = taken.len() == most;
                    return Ok(if impossible {
                        Delivery::Impossible
                    } else {
                        Delivery::NoBuffers
                    });
                }
            };
            let head = chain.head_index();
            // A chain that can't be used counts as one without room.
            let slices = Buffers::collect(chain, memory, MAX_DESCRIPTORS)
                .ok()
                .filter(|it| it.readable.is_empty())
                .map(|it| it.writable)
                .unwrap_or_default();
            let here = total(&slices);
            useless += usize::from(here == 0);
            room += here;
            taken.push((head, slices));
        }
        let count = (taken.len() - useless) as u16;
        self.set_header(count, options);
        // The buffers of a frame follow one another in the used ring, and a driver that polls
        // it must find all of them as soon as it finds the first (5.1.6.4).
        taken.sort_by_key(|(_, slices)| total(slices) > 0);
        let mut rest = &self.bytes[..self.len];
        let mut used = Vec::with_capacity(taken.len());
        for (head, slices) in &taken {
            let before = rest.len();
            for slice in slices {
                let (now, later) = rest.split_at(rest.len().min(slice.len()));
                slice.copy_from(now);
                rest = later;
            }
            used.push((*head, (before - rest.len()) as u32));
        }
        queue.push_used_together(memory, &used)?;
        Ok(Delivery::Done)
    }
}
