//! Queues over all of a small space, against models that count without bounds.

use super::*;
use crate::virtio::buffers::{Buffers, ChainError, total};
use crate::virtio::test_driver::memory;

const RAM: usize = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x600;
const SIZE: u16 = 4;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn queue(memory: &Memory, position: u16, event_idx: bool) -> VirtQueue {
    let record = QueueRecord {
        max_size: SIZE,
        size: SIZE,
        ready: true,
        descriptors: 0,
        avail: AVAIL,
        used: USED,
        next_avail: position,
        next_used: position,
        event_idx,
    };
    VirtQueue::new(&record, memory).unwrap()
}

fn put<T: vm_memory::ByteValued>(memory: &Memory, address: u64, value: T) {
    memory.write_obj(value, GuestAddress(address)).unwrap();
}

/// A descriptor of a small space: where it is, what follows.
#[derive(Debug, Clone, Copy)]
struct Small {
    inside: bool,
    write: bool,
    next: Option<u16>,
}

impl Small {
    /// All of them: the next one may be each of the table, and one beyond it.
    fn all() -> Vec<Self> {
        let places = [None].into_iter().chain((0..=SIZE).map(Some));
        let mut all = Vec::new();
        for next in places {
            for bits in 0..4 {
                all.push(Self {
                    inside: bits & 1 == 0,
                    write: bits & 2 == 0,
                    next,
                });
            }
        }
        all
    }

    fn put(self, memory: &Memory, table: u64, id: u64) {
        let address = if self.inside { 0x800 } else { RAM as u64 - 1 };
        let flags = (u16::from(self.next.is_some()) * NEXT) | (u16::from(self.write) * WRITE);
        let next = u64::from(self.next.unwrap_or_default());
        // Address; length 2, flags and next.
        put(memory, table + 16 * id, address);
        put(
            memory,
            table + 16 * id + 8,
            2 | u64::from(flags) << 32 | next << 48,
        );
    }
}

/// What becomes of a chain, by the specification: readable and writable bytes, or what is wrong first.
fn expected(table: &[Small], limit: usize) -> Result<(usize, usize), ChainError> {
    let (mut readable, mut writable) = (0, 0);
    let mut at = Some(0);
    let mut left = table.len();
    let mut followed = 0;
    while let Some(id) = at {
        // A loop is cut off after as many as there are, an index beyond the table at once.
        let Some(descriptor) = table.get(usize::from(id)).filter(|_| left > 0) else {
            return Err(ChainError::Length);
        };
        if followed == limit {
            return Err(ChainError::Length);
        }
        (left, followed) = (left - 1, followed + 1);
        if !descriptor.write && writable > 0 {
            return Err(ChainError::Order);
        }
        if !descriptor.inside {
            return Err(ChainError::Address);
        }
        *(if descriptor.write {
            &mut writable
        } else {
            &mut readable
        }) += 2;
        at = descriptor.next;
    }
    Ok((readable, writable))
}

fn collected(
    queue: &mut VirtQueue,
    memory: &Memory,
    limit: usize,
) -> Result<(usize, usize), ChainError> {
    let chain = queue.pop(memory).unwrap().unwrap();
    queue.undo_pop();
    let buffers = Buffers::collect(chain, memory, limit)?;
    Ok((total(&buffers.readable), total(&buffers.writable)))
}

/// All tables of four descriptors, as far as the chain from the first one sees them.
#[test]
fn each_chain_of_four_descriptors_is_what_the_specification_says() {
    let memory = memory(RAM);
    put(&memory, AVAIL + 2, 1_u16);
    let mut queue = queue(&memory, 0, false);
    let all = Small::all();
    let mut table = [all[0]; SIZE as usize];
    let mut count = 0;
    let mut check = |table: &[Small], queue: &mut VirtQueue| {
        for limit in [2, 3, 4] {
            let (is, wanted) = (collected(queue, &memory, limit), expected(table, limit));
            assert_eq!(is, wanted, "{table:?}, at most {limit}");
        }
        count += 1;
    };
    // Descriptors that a chain can't reach make no difference: those tables are left out.
    for first in &all {
        table[0] = *first;
        first.put(&memory, 0, 0);
        let Some(second_at @ 1..SIZE) = first.next else {
            check(&table, &mut queue);
            continue;
        };
        for second in &all {
            table[usize::from(second_at)] = *second;
            second.put(&memory, 0, second_at.into());
            let third_at = match second.next {
                Some(at) if at < SIZE && at != 0 && at != second_at => at,
                _ => {
                    check(&table, &mut queue);
                    continue;
                }
            };
            for third in &all {
                table[usize::from(third_at)] = *third;
                third.put(&memory, 0, third_at.into());
                let fourth_at = match third.next {
                    Some(at) if at < SIZE && ![0, second_at, third_at].contains(&at) => at,
                    _ => {
                        check(&table, &mut queue);
                        continue;
                    }
                };
                for fourth in &all {
                    table[usize::from(fourth_at)] = *fourth;
                    fourth.put(&memory, 0, fourth_at.into());
                    check(&table, &mut queue);
                }
            }
        }
    }
    assert!(count > 10_000, "{count} tables");
}

/// Indirect tables of up to two descriptors, of any length in bytes near those of one and two.
#[test]
fn each_indirect_table_of_two_descriptors_is_followed_within_it() {
    let memory = memory(RAM);
    put(&memory, AVAIL + 2, 1_u16);
    let mut queue = queue(&memory, 0, false);
    const TABLE: u64 = 0xa00;
    put(&memory, 0, TABLE);
    for length in [0, 1, 15, 16, 17, 31, 32, 33] {
        put(
            &memory,
            8,
            u64::from(length as u32) | u64::from(INDIRECT) << 32,
        );
        for first in Small::all() {
            first.put(&memory, TABLE, 0);
            for second in Small::all() {
                second.put(&memory, TABLE, 1);
                let collected = collected(&mut queue, &memory, 8);
                let entries = length / 16;
                let wanted = match length % 16 {
                    0 => expected(&[first, second][..entries], 8),
                    // No table at all.
                    _ => Err(ChainError::Length),
                };
                assert_eq!(collected, wanted, "{length} bytes: {first:?}, {second:?}");
            }
        }
    }
}

/// Positions near where 16 bits end or change their sign, and some between.
fn positions() -> impl Iterator<Item = u16> {
    (0..=u16::MAX).filter(|at| at % 251 == 0 || (at.wrapping_add(8) & 0x7fff) < 16)
}

#[test]
fn a_ring_is_taken_from_as_far_as_its_index_says_wherever_it_wraps() {
    let memory = memory(RAM);
    for position in positions() {
        for ahead in 0..=SIZE + 1 {
            put(&memory, AVAIL + 2, position.wrapping_add(ahead));
            let mut queue = queue(&memory, position, false);
            let mut taken = 0;
            let broken = loop {
                match queue.pop(&memory) {
                    Ok(Some(_)) => taken += 1,
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            assert_eq!(broken, ahead > SIZE, "{ahead} ahead of {position}");
            assert_eq!(taken, if broken { 0 } else { ahead });
            assert_eq!(queue.record().next_avail, position.wrapping_add(taken));
        }
    }
}

/// Event indices, against positions that are counted without end.
#[test]
fn an_interrupt_is_due_when_the_event_index_is_passed_wherever_it_wraps() {
    let memory = memory(RAM);
    for position in positions() {
        for pushed in 0..=SIZE {
            for event in -3..=i64::from(SIZE) + 1 {
                let before = i64::from(position);
                let event_at = (before + event) as u16;
                put(&memory, AVAIL + 4 + 2 * u64::from(SIZE), event_at);
                let mut queue = queue(&memory, position, true);
                for _ in 0..pushed {
                    queue.push_used(&memory, 0, 0).unwrap();
                }
                let unseen = queue.unseen(&memory).unwrap();
                let beyond = i64::from(pushed) - event;
                let wanted = u16::try_from(beyond).ok().filter(|beyond| *beyond <= SIZE);
                assert_eq!(unseen, Some(wanted.unwrap_or(0)));
                let due = queue.needs_interrupt(&memory).unwrap();
                let passed = (before..before + i64::from(pushed)).contains(&(before + event));
                assert_eq!(due, passed, "{pushed} from {position}, event {event}");
            }
        }
    }
}

#[test]
fn chains_that_are_returned_together_are_where_those_returned_alone_would_be() {
    for position in positions() {
        for count in 0..=usize::from(SIZE) {
            let chains: Vec<(u16, u32)> = (0..count as u16).map(|at| (at, 7)).collect();
            let rings = [memory(RAM), memory(RAM)];
            let mut queues = rings.each_ref().map(|ring| queue(ring, position, false));
            queues[0].push_used_together(&rings[0], &chains).unwrap();
            for (head, length) in &chains {
                queues[1].push_used(&rings[1], *head, *length).unwrap();
            }
            assert_eq!(queues[0].record(), queues[1].record());
            let [mut together, mut alone] = [[0; 64]; 2];
            rings[0]
                .read_slice(&mut together, GuestAddress(USED))
                .unwrap();
            rings[1].read_slice(&mut alone, GuestAddress(USED)).unwrap();
            assert!(together == alone, "{count} at {position}");
        }
    }
}
