//! A guest that does to a device what the input says: requests that make sense, chains that do not, changes
//! of its memory, notifications, resets.
//!
//! ```text
//! 0x0000  canary: no descriptor says that the device may write here
//! 0x1000  indirect tables
//! 0x2000  descriptor tables
//! 0x4000  rings
//! 0x8000  data, to the end of RAM
//! ```
//! Everything above the canary may be wrong in any way. What never is: the canary changes, more chains are
//! returned than were offered, or a device has more to do for ever.

use std::io;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::memory::Memory;
use crate::virtio::device::{Activation, DeviceError, Progress, VirtioDevice};
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::queue::{QueueRecord, VirtQueue};
use crate::virtio::test_driver::{Segment, memory, readable, writable};
use crate::virtio::watch::{Source, Watcher, decode};

/// Bytes of RAM.
const RAM: u64 = 0x6_0000;
const CANARY: usize = 0x1000;
const UNTOUCHED: u8 = 0xc5;
const INDIRECT_TABLES: u64 = 0x1000;
const DESCRIPTOR_TABLES: u64 = 0x2000;
const RINGS: u64 = 0x4000;
const DATA: u64 = 0x8000;
/// Entries of each queue: few, so that they wrap.
const SIZE: u16 = 16;
/// Steps of an input, turns of a step.
const STEPS: usize = 200;
const TURNS: usize = 1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A device and what is on its other side.
pub(crate) trait World {
    /// The device.
    fn device(&mut self) -> &mut dyn VirtioDevice;

    /// Writes a request that makes sense, mostly, to the guest's memory; returns its queue and its parts.
    fn request(
        &mut self,
        input: &mut Unstructured<'_>,
        guest: &mut Guest,
    ) -> Result<(u16, Vec<Segment>)>;

    /// Does something on the other side.
    fn host(&mut self, _input: &mut Unstructured<'_>) -> Result<()> {
        Ok(())
    }

    /// Looks at what came out on the other side, with the features that the driver last had.
    fn look(&mut self, _features: u64) {}
}

/// The guest.
#[derive(Debug)]
pub(crate) struct Guest {
    memory: Memory,
    epoll: Arc<Epoll>,
    /// How many chains were offered in each queue, modulo 2¹⁶.
    added: Vec<u16>,
    /// Where they started to count.
    start: u16,
    features: u64,
    next_descriptor: u16,
    next_data: u64,
    next_table: u64,
}

/// Has a guest work with a device until the input ends.
pub(crate) fn drive(world: &mut impl World, input: &mut Unstructured<'_>) {
    drive_in(world, input, memory(RAM as usize));
}

/// As [`drive`], with RAM that begins as that of [`ram`].
pub(crate) fn drive_in(world: &mut impl World, input: &mut Unstructured<'_>, memory: Memory) {
    let Ok(epoll) = Epoll::new() else { return };
    let canary = [UNTOUCHED; CANARY];
    put(&memory, 0, &canary);
    let mut guest = Guest {
        memory,
        epoll: Arc::new(epoll),
        added: Vec::new(),
        start: 0,
        features: 0,
        next_descriptor: 0,
        next_data: DATA,
        next_table: 0,
    };
    // An input that ends in the middle of a step is at its end.
    let _ = guest.steps(world, input);
    for queue in 0..guest.added.len() as u16 {
        guest.kick(world, queue);
    }
    let mut rounds = 0;
    while guest.serve(world) > 0 {
        rounds += 1;
        assert!(rounds < TURNS, "events without end");
    }
    guest.check(world);
    world.device().reset();
    let mut now = [0; CANARY];
    let read = guest.memory.read_slice(&mut now, GuestAddress(0));
    assert!(
        read.is_ok() && now == canary,
        "the device wrote where it may not"
    );
}

/// RAM of the size that [`drive_in`] wants.
pub(crate) fn ram() -> Memory {
    memory(RAM as usize)
}

/// Bytes from the input, at most `most`.
pub(crate) fn some_bytes<'i>(input: &mut Unstructured<'i>, most: usize) -> Result<&'i [u8]> {
    let length = input.int_in_range(0..=most)?;
    input.bytes(length.min(input.len()))
}

/// A number that is small, or at an edge, or anything.
pub(crate) fn number(input: &mut Unstructured<'_>, edges: &[u64]) -> Result<u64> {
    Ok(match input.int_in_range(0..=3)? {
        0 | 1 => u64::from(input.arbitrary::<u8>()?),
        2 => *input.choose(edges)?,
        _ => input.arbitrary()?,
    })
}

fn put(memory: &Memory, address: u64, bytes: &[u8]) {
    // What is outside of RAM is nowhere.
    let _ = memory.write_slice(bytes, GuestAddress(address));
}

impl Guest {
    /// Takes room for data, 64 KiB at most, and writes `bytes` to it. It overlaps with what was used long ago.
    pub(crate) fn place(&mut self, bytes: &[u8], length: usize) -> u64 {
        let length = (length.max(bytes.len()) as u64).min(RAM - DATA);
        if self.next_data + length > RAM {
            self.next_data = DATA;
        }
        let at = self.next_data;
        self.next_data += length.max(1);
        put(&self.memory, at, bytes);
        at
    }

    /// Places bytes for the device to read, in one piece or more.
    pub(crate) fn sent(
        &mut self,
        input: &mut Unstructured<'_>,
        bytes: &[u8],
    ) -> Result<Vec<Segment>> {
        let at = self.place(bytes, bytes.len());
        let cut = match input.int_in_range(0..=2)? {
            0 => input.int_in_range(0..=bytes.len())?,
            _ => bytes.len(),
        };
        let pieces = [
            readable(at, cut),
            readable(at + cut as u64, bytes.len() - cut),
        ];
        let filled = pieces.into_iter().filter(|piece| piece.len > 0);
        Ok(filled.collect())
    }

    /// Makes room for the device to write.
    pub(crate) fn room(&mut self, length: usize) -> Segment {
        let at = self.place(&[], length);
        writable(at, length)
    }

    fn steps(&mut self, world: &mut impl World, input: &mut Unstructured<'_>) -> Result<()> {
        self.activate(world, input)?;
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            match input.int_in_range(0..=15)? {
                0..=4 => {
                    let (queue, segments) = world.request(input, self)?;
                    self.offer(queue, &segments, input)?;
                    self.kick(world, queue);
                }
                5 => {
                    let (queue, segments) = world.request(input, self)?;
                    self.offer(queue, &segments, input)?;
                }
                6 | 7 => {
                    let segments = self.segments(input)?;
                    let queue = input.arbitrary::<u8>()?;
                    self.offer(queue.into(), &segments, input)?;
                }
                8 => {
                    let address = input.int_in_range(RINGS..=RAM)?;
                    put(&self.memory, address, some_bytes(input, 32)?);
                }
                9 | 10 => {
                    let queue = input.int_in_range(0..=20)?;
                    self.kick(world, queue);
                }
                11 | 12 => drop(self.serve(world)),
                13 | 14 => {
                    world.host(input)?;
                    self.serve(world);
                }
                _ => {
                    world.device().reset();
                    self.activate(world, input)?;
                }
            }
            self.check(world);
            world.look(self.features);
        }
        Ok(())
    }

    /// Sets up the queues and takes the device into use. A device may refuse.
    fn activate(&mut self, world: &mut impl World, input: &mut Unstructured<'_>) -> Result<()> {
        let device = world.device();
        self.features = device.features() & input.arbitrary::<u64>()?;
        let event_idx = input.arbitrary()?;
        if event_idx {
            self.features |= 1 << VIRTIO_RING_F_EVENT_IDX;
        }
        // A driver starts at 0; a queue that has been used for a while is about to wrap.
        self.start = *input.choose(&[0, 0xfff8])?;
        let count = device.queues_for(self.features);
        self.added = vec![self.start; count];
        let queues: Vec<_> = (0..count as u64)
            .map(|queue| {
                let record = QueueRecord {
                    max_size: SIZE,
                    size: SIZE,
                    ready: true,
                    descriptors: descriptors(queue),
                    avail: avail(queue),
                    used: used(queue),
                    next_avail: self.start,
                    next_used: self.start,
                    event_idx,
                };
                put(&self.memory, avail(queue) + 2, &self.start.to_le_bytes());
                put(&self.memory, used(queue) + 2, &self.start.to_le_bytes());
                VirtQueue::new(&record, &self.memory).expect("a queue in RAM")
            })
            .collect();
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            features: self.features,
            interrupt: Arc::new(CountingInterrupt::default()),
            watcher: Watcher::new([Arc::clone(&self.epoll)].into(), 0, 0),
        };
        if device.activate(activation).is_err() {
            device.reset();
        }
        Ok(())
    }

    /// Segments that make no sense.
    fn segments(&self, input: &mut Unstructured<'_>) -> Result<Vec<Segment>> {
        let count = input.int_in_range(0..=6)?;
        let one = |input: &mut Unstructured<'_>| {
            let edges = [RAM - 1, RAM, RAM - 8, RINGS, 1 << 40, u64::MAX, 1 << 63];
            let at = match input.int_in_range(0..=2)? {
                0 => *input.choose(&edges)?,
                1 => input.int_in_range(DATA..=RAM)?,
                // What the canary is not: a descriptor may say anything else.
                _ => input.arbitrary::<u64>()?.max(CANARY as u64),
            };
            let lengths = [
                0,
                1,
                44,
                4096,
                0x1_0000,
                0x1_0001,
                RAM,
                1 << 31,
                0xffff_ffff,
            ];
            Ok(Segment {
                address: at,
                len: number(input, &lengths)? as u32,
                writable: input.arbitrary()?,
            })
        };
        (0..count).map(|_| one(input)).collect()
    }

    /// Makes a chain of the segments and adds it to a queue, if there is that queue.
    fn offer(
        &mut self,
        queue: u16,
        segments: &[Segment],
        input: &mut Unstructured<'_>,
    ) -> Result<()> {
        let Some(added) = self.added.get_mut(usize::from(queue)) else {
            return Ok(());
        };
        let (queue, position) = (u64::from(queue), *added);
        *added = added.wrapping_add(1);
        // 0: as it should be; else what is wrong with the chain, or with the ring.
        let how = input.int_in_range(0..=15)?;
        let first = self.next_descriptor;
        let mut head = first % SIZE;
        if how == 1 || how == 2 {
            let table = INDIRECT_TABLES + self.next_table * 0x100;
            self.next_table = (self.next_table + 1) % 16;
            let length = segments.len().min(16) as u16;
            for (at, segment) in (0..length).zip(segments) {
                let next = (at + 1 < length).then_some(at + 1);
                self.describe(table, at, segment, 0, next);
            }
            let length = u32::from(length) * 16 + u32::from(how == 2) * 8;
            let segment = Segment {
                address: table,
                len: length,
                writable: false,
            };
            self.describe(descriptors(queue), head, &segment, INDIRECT, None);
            self.next_descriptor = first.wrapping_add(1);
        } else {
            for (at, segment) in (0..).zip(segments) {
                let last = usize::from(at) + 1 == segments.len();
                let next = match (last, how) {
                    (false, _) => Some(first.wrapping_add(at + 1) % SIZE),
                    (true, 3) => Some(head),
                    (true, 4) => Some(u16::MAX),
                    (true, 5) => Some(first.wrapping_add(at + 1) % SIZE),
                    (true, _) => None,
                };
                let id = first.wrapping_add(at) % SIZE;
                self.describe(descriptors(queue), id, segment, 0, next);
            }
            self.next_descriptor = first.wrapping_add(segments.len() as u16);
        }
        if how == 6 {
            head = input.arbitrary()?;
        }
        let entry = avail(queue) + 4 + 2 * u64::from(position % SIZE);
        put(&self.memory, entry, &head.to_le_bytes());
        let mut index = position.wrapping_add(1);
        if how == 7 {
            index = index.wrapping_add(input.arbitrary()?);
        }
        put(&self.memory, avail(queue) + 2, &index.to_le_bytes());
        Ok(())
    }

    fn describe(&self, table: u64, id: u16, segment: &Segment, flags: u16, next: Option<u16>) {
        let write = if segment.writable { WRITE } else { 0 };
        let more = if next.is_some() { NEXT } else { 0 };
        let mut descriptor = segment.address.to_le_bytes().to_vec();
        descriptor.extend(segment.len.to_le_bytes());
        descriptor.extend((flags | write | more).to_le_bytes());
        descriptor.extend(next.unwrap_or_default().to_le_bytes());
        put(&self.memory, table + 16 * u64::from(id), &descriptor);
    }

    fn kick(&mut self, world: &mut impl World, queue: u16) {
        let result = world.device().on_kick(queue);
        finish(world.device(), result);
    }

    /// Has the device handle what its descriptors are ready for; returns the number of them.
    fn serve(&mut self, world: &mut impl World) -> usize {
        let mut events = [EpollEvent::default(); 64];
        let ready = loop {
            match self.epoll.wait(0, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                ready => break ready.expect("wait for events"),
            }
        };
        for event in &events[..ready] {
            if let (_, _, Source::Device(token)) = decode(event.data()) {
                let result = world.device().on_event(token, event.event_set());
                finish(world.device(), result);
            }
        }
        ready
    }

    /// No chain is returned that was not taken.
    fn check(&self, world: &mut impl World) {
        for record in world.device().queues() {
            let taken = record.next_avail.wrapping_sub(self.start);
            let returned = record.next_used.wrapping_sub(self.start);
            assert!(returned <= taken, "{returned} chains returned of {taken}");
        }
    }
}

fn descriptors(queue: u64) -> u64 {
    DESCRIPTOR_TABLES + queue * 0x100
}

fn avail(queue: u64) -> u64 {
    RINGS + queue * 0x200
}

fn used(queue: u64) -> u64 {
    RINGS + queue * 0x200 + 0x100
}

/// Gives a device the turns that it asks for, and resets it if it breaks, as the event loop does.
fn finish(device: &mut dyn VirtioDevice, mut result: std::result::Result<Progress, DeviceError>) {
    for _ in 0..TURNS {
        match result {
            Ok(Progress::Done) => return,
            Ok(Progress::More(queue)) => result = device.on_kick(queue),
            Err(_) => return device.reset(),
        }
    }
    panic!("a device has more to do for ever");
}
