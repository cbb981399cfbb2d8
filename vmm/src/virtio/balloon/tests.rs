use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use super::*;
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::test_driver::{DriverQueue, kick, memory, readable, writable};
use crate::virtio::watch::Watcher;

const FREE: u64 = 0x20000;
const PAGE: u64 = 4096;

struct Setup {
    memory: Memory,
    balloon: Balloon,
    queues: Vec<DriverQueue>,
    interrupt: Arc<CountingInterrupt>,
}

fn start(backing: Backing) -> Setup {
    let memory = memory(0x30000);
    for page in 0..16 {
        let at = GuestAddress(FREE + page * PAGE);
        memory.write_obj(7u8, at).unwrap();
    }
    let queues: Vec<_> = (0..)
        .zip(QUEUE_SIZES)
        .map(|(queue, size)| DriverQueue::new(&memory, queue * DriverQueue::SPAN, size))
        .collect();
    let interrupt = Arc::new(CountingInterrupt::default());
    let mut balloon = Balloon::new(backing);
    balloon
        .activate(Activation {
            memory: memory.clone(),
            queues: queues.iter().map(|q| q.device_side(false)).collect(),
            features: F_REPORTING,
            interrupt: Arc::clone(&interrupt) as _,
            watcher: Watcher::detached().unwrap(),
        })
        .unwrap();
    Setup {
        memory,
        balloon,
        queues,
        interrupt,
    }
}

impl Setup {
    fn used(&self) -> Vec<u64> {
        let byte = |page: &u64| {
            let at = GuestAddress(FREE + page * PAGE);
            self.memory.read_obj::<u8>(at).unwrap() == 7
        };
        (0..16).filter(byte).collect()
    }
}

#[test]
fn free_pages_are_the_hosts() {
    for backing in [Backing::Own, Backing::Snapshot] {
        let mut setup = start(backing);
        let pieces = [
            writable(FREE + PAGE, 2 * PAGE as usize),
            writable(FREE + 8 * PAGE, 8 * PAGE as usize),
        ];
        setup.queues[REPORTING].offer(&pieces).unwrap();
        kick(&mut setup.balloon, REPORTING as u16);
        assert_eq!(setup.queues[REPORTING].used().unwrap().1, 0);
        assert_eq!(setup.used(), [0, 3, 4, 5, 6, 7]);
        assert_eq!(setup.balloon.counters().bytes_in, 10 * PAGE);
        assert_eq!(setup.interrupt.queue.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn what_is_no_page_of_ram_is_left_alone() {
    let mut setup = start(Backing::Own);
    for piece in [
        readable(FREE, PAGE as usize),
        writable(FREE + 1, PAGE as usize),
        writable(FREE, 100),
        writable(FREE, 0),
        writable(FREE + 15 * PAGE, 2 * PAGE as usize),
        writable(1 << 40, PAGE as usize),
        writable(u64::MAX - PAGE + 1, PAGE as usize),
    ] {
        setup.queues[REPORTING].offer(&[piece]).unwrap();
        kick(&mut setup.balloon, REPORTING as u16);
        assert_eq!(setup.queues[REPORTING].used().unwrap().1, 0);
    }
    assert_eq!(setup.used().len(), 16);
    assert_eq!(setup.balloon.counters().errors, 7);
}

#[test]
fn the_balloon_takes_nothing() {
    let mut setup = start(Backing::Own);
    assert_eq!(setup.balloon.config(), [0; 16]);
    for queue in [0, 1] {
        setup.queues[queue]
            .offer(&[writable(FREE, PAGE as usize)])
            .unwrap();
        kick(&mut setup.balloon, queue as u16);
        assert_eq!(setup.queues[queue].used().unwrap().1, 0);
    }
    assert_eq!(setup.used().len(), 16);
    assert_eq!(setup.balloon.on_kick(9).unwrap(), Progress::Done);
}

#[test]
fn a_turn_is_bounded_and_the_counters_survive_a_snapshot() {
    let mut setup = start(Backing::Own);
    for _ in 0..BUDGET + 1 {
        let queue = &mut setup.queues[REPORTING];
        queue.offer(&[writable(FREE, PAGE as usize)]).unwrap();
    }
    let more = Progress::More(REPORTING as u16);
    assert_eq!(setup.balloon.on_kick(REPORTING as u16).unwrap(), more);
    kick(&mut setup.balloon, REPORTING as u16);
    let DeviceState::Balloon(state) = setup.balloon.state() else {
        panic!("another device");
    };
    assert_eq!(state.counters.requests, BUDGET as u64 + 1);
    let restored = Balloon::restore(&state, Backing::Snapshot);
    assert_eq!(restored.counters(), setup.balloon.counters());
    setup.balloon.reset();
    assert!(setup.balloon.queues().is_empty());
    setup.balloon.on_kick(REPORTING as u16).unwrap();
}
