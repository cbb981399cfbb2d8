//! A queue in memory that is anything.

use arbitrary::{Result, Unstructured};
use vm_memory::{Bytes, GuestAddress};

use super::{QueueRecord, VirtQueue};
use crate::fuzz::guest::{number, some_bytes};
use crate::virtio::buffers::{Buffers, total};
use crate::virtio::test_driver::memory;

const RAM: usize = 0x3000;
const STEPS: usize = 100;

/// Registers, memory, and what a device does with a queue, all as the input says: chains stay in memory and
/// below their limits, and positions move by one.
pub(crate) fn ring(input: &[u8]) {
    // An input that ends is at its end.
    let _ = steps(&mut Unstructured::new(input));
}

fn steps(input: &mut Unstructured<'_>) -> Result<()> {
    let memory = memory(RAM);
    let place = |input: &mut Unstructured<'_>| {
        let edges = [RAM as u64 - 16, u64::MAX, u64::MAX - 15, 1 << 63];
        Ok(match input.int_in_range(0..=3_u8)? {
            0 => number(input, &edges)?,
            page => u64::from(page) * 0x800,
        })
    };
    let sizes = [1, 2, 4, 8, 16, 128, 0, 3, 256, 0x8000];
    let record = QueueRecord {
        max_size: *input.choose(&sizes)?,
        size: *input.choose(&sizes)?,
        ready: input.int_in_range(0..=9)? > 0,
        descriptors: place(input)?,
        avail: place(input)?,
        used: place(input)?,
        next_avail: *input.choose(&[0, 0, 0xffff, 7])?,
        next_used: *input.choose(&[0, 0, 0xffff, 7])?,
        event_idx: input.arbitrary()?,
    };
    let Ok(mut queue) = VirtQueue::new(&record, &memory) else {
        return Ok(());
    };
    assert!(queue.size().is_power_of_two() && queue.size() <= record.max_size);
    let mut head = 0;
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let before = queue.record();
        match input.int_in_range(0..=7)? {
            0 | 1 => {
                let at = input.int_in_range(0..=RAM as u64)?;
                // What is outside of memory is nowhere.
                let _ = memory.write_slice(some_bytes(input, 32)?, GuestAddress(at));
            }
            2 | 3 => {
                let limit = input.int_in_range(0..=20)?;
                let Ok(Some(chain)) = queue.pop(&memory) else {
                    continue;
                };
                head = chain.head_index();
                if let Ok(buffers) = Buffers::collect(chain, &memory, limit) {
                    assert!(buffers.readable.len() + buffers.writable.len() <= limit);
                    let all = total(&buffers.readable).checked_add(total(&buffers.writable));
                    assert!(all.is_some_and(|all| all <= limit * RAM));
                }
                assert_eq!(queue.record().next_avail, before.next_avail.wrapping_add(1));
                if input.int_in_range(0..=4)? == 0 {
                    queue.undo_pop();
                    assert_eq!(queue.record(), before);
                }
            }
            4 => {
                let pushed = queue.push_used(&memory, head, input.arbitrary()?);
                let by = u16::from(pushed.is_ok());
                assert_eq!(queue.record().next_used, before.next_used.wrapping_add(by));
            }
            5 => {
                let count = input.int_in_range(0..=4)?;
                let chains = vec![(head, input.arbitrary()?); count];
                if queue.push_used_together(&memory, &chains).is_ok() {
                    let after = before.next_used.wrapping_add(count as u16);
                    assert_eq!(queue.record().next_used, after);
                }
            }
            6 => {
                let _ = queue.needs_interrupt(&memory);
                if let Ok(Some(unseen)) = queue.unseen(&memory) {
                    assert!(record.event_idx && unseen <= queue.size());
                }
            }
            _ => {
                let _ = queue.disable_notification(&memory);
                let _ = queue.enable_notification(&memory);
            }
        }
    }
    Ok(())
}
