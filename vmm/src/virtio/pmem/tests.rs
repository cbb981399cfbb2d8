use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::file_regions::tests::{extent, pages, regions};
use crate::memory::Memory;
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::queue::VirtQueue;
use crate::virtio::test_driver::{DriverQueue, memory, readable, writable};
use crate::virtio::watch::Watcher;

const REQUEST: u64 = 0x10000;
const RESPONSE: u64 = 0x11000;

struct Setup {
    memory: Memory,
    pmem: Pmem,
    queue: DriverQueue,
    interrupt: Arc<CountingInterrupt>,
}

fn start() -> Setup {
    let (_, regions, memory) = regions(&memory(0x20000));
    let region = regions.map(&[extent(&pages(&[7, 8]), 0, 2)]).unwrap();
    let queue = DriverQueue::new(&memory, 0, QUEUE_SIZE);
    let interrupt = Arc::new(CountingInterrupt::default());
    let mut pmem = Pmem::new(region);
    pmem.activate(Activation {
        memory: memory.clone(),
        queues: vec![queue.device_side(false)],
        features: 0,
        interrupt: Arc::clone(&interrupt) as _,
        watcher: Watcher::detached().unwrap(),
    })
    .unwrap();
    Setup {
        memory,
        pmem,
        queue,
        interrupt,
    }
}

impl Setup {
    /// Has the device serve one request; returns the used length and the response.
    fn ask(&mut self, kind: u32, pieces: &[crate::virtio::test_driver::Segment]) -> (u32, u32) {
        let at = |address| GuestAddress(address);
        self.memory.write_obj(kind, at(REQUEST)).unwrap();
        self.memory.write_obj(0xaaaa_aaaau32, at(RESPONSE)).unwrap();
        self.queue.offer(pieces).unwrap();
        assert_eq!(self.pmem.on_kick(0).unwrap(), Progress::Done);
        let used = self.queue.used().unwrap().1;
        (used, self.memory.read_obj(at(RESPONSE)).unwrap())
    }
}

#[test]
fn the_configuration_says_where_the_region_is() {
    let pmem = start().pmem;
    let config = pmem.config();
    let (start, length) = config.split_at(8);
    assert_eq!(start, pmem.region.start().to_le_bytes());
    assert_eq!(length, (2u64 << 20).to_le_bytes());
}

#[test]
fn there_is_never_anything_to_flush_and_nothing_else_to_ask_for() {
    let mut setup = start();
    let pieces = [readable(REQUEST, 4), writable(RESPONSE, 4)];
    assert_eq!(setup.ask(FLUSH, &pieces), (4, OK));
    assert_eq!(setup.pmem.counters().errors, 0);
    assert_eq!(setup.ask(1, &pieces), (4, FAILED));
    assert_eq!(setup.pmem.counters().errors, 1);
    assert_eq!(setup.interrupt.queue.load(Ordering::SeqCst), 2);
}

#[test]
fn malformed_requests_are_returned_untouched() {
    let mut setup = start();
    let region = setup.pmem.region.start();
    for pieces in [
        &[readable(REQUEST, 4)][..],
        &[writable(RESPONSE, 4)],
        &[readable(REQUEST, 3), writable(RESPONSE, 4)],
        &[readable(REQUEST, 5), writable(RESPONSE, 4)],
        &[readable(REQUEST, 4), writable(RESPONSE, 3)],
        &[
            readable(REQUEST, 2),
            readable(REQUEST + 2, 2),
            writable(RESPONSE, 4),
        ],
        &[readable(1 << 45, 4), writable(RESPONSE, 4)],
        // The device may not write there either.
        &[readable(REQUEST, 4), writable(region, 4)],
    ] {
        assert_eq!(setup.ask(FLUSH, pieces), (0, 0xaaaa_aaaa), "{pieces:?}");
    }
    assert_eq!(setup.pmem.counters().errors, 8);
}

#[test]
fn a_device_reads_from_a_file_region_as_from_ram() {
    let mut setup = start();
    let region = setup.pmem.region.start();
    // Behind the files: zeros, that is a flush.
    let request = readable(region + 2 * 4096, 4);
    assert_eq!(setup.ask(1, &[request, writable(RESPONSE, 4)]), (4, OK));
    let request = readable(region, 4);
    assert_eq!(setup.ask(0, &[request, writable(RESPONSE, 4)]), (4, FAILED));
}

#[test]
fn a_ring_that_the_device_writes_is_not_in_a_file_region() {
    let setup = start();
    let mut record = setup.pmem.queues()[0];
    VirtQueue::new(&record, &setup.memory).unwrap();
    record.used = setup.pmem.region.start();
    VirtQueue::new(&record, &setup.memory).unwrap_err();
}

#[test]
fn an_idle_device_and_one_after_its_reset_do_nothing() {
    let mut setup = start();
    setup
        .queue
        .offer(&[readable(REQUEST, 4), writable(RESPONSE, 4)]);
    setup.pmem.reset();
    assert_eq!(setup.pmem.on_kick(0).unwrap(), Progress::Done);
    assert_eq!(setup.queue.used(), None);
}

#[test]
fn a_file_region_of_another_place_does_not_match_a_snapshot() {
    let mut setup = start();
    setup.ask(FLUSH, &[readable(REQUEST, 4), writable(RESPONSE, 4)]);
    let json = serde_json::to_string(&setup.pmem.state()).unwrap();
    let DeviceState::Pmem(state) = serde_json::from_str(&json).unwrap() else {
        panic!("{json}")
    };
    let (_, regions, _) = regions(&memory(0x20000));
    let open = || regions.map(&[extent(&pages(&[7, 8]), 0, 2)]).unwrap();
    let restored = Pmem::restore(&state, open()).unwrap();
    assert_eq!(restored.counters(), setup.pmem.counters());
    let (_, elsewhere) = (open(), open());
    assert!(Pmem::restore(&state, elsewhere).is_err());
}
