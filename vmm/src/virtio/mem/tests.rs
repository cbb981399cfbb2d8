use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;
use vmm_sys_util::epoll::Epoll;

use super::*;
use crate::memory::{Backing, Memory};
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::test_driver::{DriverQueue, memory, readable, serve_ready, writable};
use crate::virtio::watch::Watcher;

const REQUEST_AT: u64 = 0x10000;
const RESPONSE_AT: u64 = 0x11000;
const PORT: u32 = 0x1000_0000;
const MIB: u64 = 1 << 20;

struct Setup {
    memory: Memory,
    pluggable: Arc<Pluggable>,
    device: Mem,
    queue: DriverQueue,
    interrupt: Arc<CountingInterrupt>,
    epoll: Arc<Epoll>,
}

/// A guest of which so much of 512 MiB is requested.
fn start(requested_mib: u64) -> Setup {
    let config = hull_proto_vmm::Pluggable {
        mib: 512,
        port: PORT,
    };
    let (memory, pluggable) = Pluggable::new(&memory(0x20000), config, Backing::Own).unwrap();
    pluggable.bound(requested_mib, requested_mib);
    let queue = DriverQueue::new(&memory, 0, QUEUE_SIZE);
    let interrupt = Arc::new(CountingInterrupt::default());
    let epoll = Arc::new(Epoll::new().unwrap());
    let mut device = Mem::new(&pluggable).unwrap();
    device
        .activate(Activation {
            memory: memory.clone(),
            queues: vec![queue.device_side(false)],
            features: UNPLUGGED_INACCESSIBLE,
            interrupt: Arc::clone(&interrupt) as _,
            watcher: Watcher::new([Arc::clone(&epoll)].into(), 0, 0),
        })
        .unwrap();
    Setup {
        memory,
        pluggable,
        device,
        queue,
        interrupt,
        epoll,
    }
}

impl Setup {
    /// Asks for something about `count` blocks from the one with this number on; returns answer and state.
    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        let address = self
            .pluggable
            .start()
            .wrapping_add(block.wrapping_mul(BLOCK));
        self.ask_at(kind, address, count)
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let request = [u64::from(kind), address, u64::from(count)];
        self.memory
            .write_obj(request, GuestAddress(REQUEST_AT))
            .unwrap();
        let pieces = [
            readable(REQUEST_AT, REQUEST),
            writable(RESPONSE_AT, RESPONSE),
        ];
        self.queue.offer(&pieces).unwrap();
        assert_eq!(self.device.on_kick(0).unwrap(), Progress::Done);
        assert_eq!(self.queue.used().unwrap().1, RESPONSE as u32);
        let response: [u16; 5] = self.memory.read_obj(GuestAddress(RESPONSE_AT)).unwrap();
        (response[0], response[4])
    }

    /// Plugged and requested size, as the guest reads them.
    fn sizes(&self) -> [u64; 2] {
        let config = self.device.config();
        let word = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
        [word(40) / MIB, word(48) / MIB]
    }

    fn byte(&self, block: u64) -> u8 {
        let at = GuestAddress(self.pluggable.start() + block * BLOCK + 5);
        self.memory.read_obj(at).unwrap()
    }

    fn touch(&self, block: u64) {
        let at = GuestAddress(self.pluggable.start() + block * BLOCK + 5);
        self.memory.write_obj(7u8, at).unwrap();
    }
}

#[test]
fn the_configuration_says_where_memory_can_be() {
    let setup = start(128);
    let config = setup.device.config();
    assert_eq!(config.len(), 56);
    let word = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!(word(0), BLOCK);
    assert_eq!(word(16), setup.pluggable.start());
    assert_eq!((word(24), word(32)), (512 * MIB, 512 * MIB));
    assert_eq!(setup.sizes(), [0, 128]);
}

#[test]
fn blocks_are_plugged_up_to_what_is_requested() {
    let mut setup = start(128);
    assert_eq!(setup.ask(PLUG, 0, 60), (ACK, 0));
    assert_eq!(setup.ask(PLUG, 60, 5), (NACK, 0), "more than requested");
    assert_eq!(setup.ask(PLUG, 252, 4), (ACK, 0), "anywhere");
    assert_eq!(setup.sizes(), [128, 128]);
    assert_eq!(setup.pluggable.metrics(), (128, 128));
    assert_eq!(setup.ask(PLUG, 60, 1), (NACK, 0));
    assert_eq!(setup.ask(UNPLUG, 59, 1), (ACK, 0));
    assert_eq!(setup.ask(PLUG, 60, 1), (ACK, 0));
    assert_eq!(setup.interrupt.config.load(Ordering::SeqCst), 0);
}

#[test]
fn what_is_plugged_already_or_nowhere_is_refused() {
    let mut setup = start(512);
    assert_eq!(setup.ask(PLUG, 8, 8), (ACK, 0));
    let start = setup.pluggable.start();
    for (kind, address, count) in [
        (PLUG, start + 8 * BLOCK, 1),
        (PLUG, start + 4 * BLOCK, 8),
        (PLUG, start + 15 * BLOCK, 2),
        (UNPLUG, start + 7 * BLOCK, 2),
        (UNPLUG, start, 1),
        (UNPLUG, start + 8 * BLOCK, 9),
        (PLUG, start, 0),
        (PLUG, start + 4096, 1),
        (PLUG, start - BLOCK, 1),
        (PLUG, start + 512 * MIB, 1),
        (PLUG, start + 511 * MIB - MIB, 2),
        (PLUG, start, u16::MAX),
        (PLUG, 0, 1),
        (PLUG, u64::MAX - BLOCK + 1, 1),
        (STATE, start, 257),
        (9, start, 1),
        (u16::MAX, start, 1),
    ] {
        let answer = setup.ask_at(kind, address, count);
        assert_eq!(answer, (ERROR, 0), "{kind} {address:#x} {count}");
    }
    assert_eq!(setup.sizes(), [16, 512]);
}

#[test]
fn unplugged_memory_is_the_hosts_again() {
    let mut setup = start(128);
    assert_eq!(setup.ask(PLUG, 0, 4), (ACK, 0));
    for block in 0..4 {
        setup.touch(block);
    }
    assert_eq!(setup.ask(UNPLUG, 1, 2), (ACK, 0));
    let bytes = [0, 1, 2, 3].map(|block| setup.byte(block));
    assert_eq!(bytes, [7, 0, 0, 7]);
    assert_eq!(setup.ask(STATE, 0, 1), (ACK, PLUGGED));
    assert_eq!(setup.ask(STATE, 1, 2), (ACK, UNPLUGGED));
    assert_eq!(setup.ask(STATE, 0, 4), (ACK, MIXED));
    // What a guest touches without plugging it goes with all else.
    setup.touch(100);
    assert_eq!(setup.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    let bytes = [0, 3, 100].map(|block| setup.byte(block));
    assert_eq!(bytes, [0, 0, 0]);
    assert_eq!(setup.sizes(), [0, 128]);
    assert_eq!(setup.ask(STATE, 0, 256), (ACK, UNPLUGGED));
}

#[test]
fn the_driver_hears_of_another_size_once() {
    let mut setup = start(0);
    assert_eq!(
        serve_ready(&mut setup.device, &setup.epoll),
        Vec::<u32>::new()
    );
    setup.pluggable.bound(0, 256);
    assert_eq!(serve_ready(&mut setup.device, &setup.epoll), [CHANGED]);
    assert_eq!(
        setup.interrupt.config.load(Ordering::SeqCst),
        0,
        "nothing is wanted"
    );
    setup.pluggable.hear(PORT + 130);
    setup.pluggable.hear(PORT + 140);
    assert_eq!(serve_ready(&mut setup.device, &setup.epoll), [CHANGED]);
    assert_eq!(
        serve_ready(&mut setup.device, &setup.epoll),
        Vec::<u32>::new()
    );
    assert_eq!(setup.interrupt.config.load(Ordering::SeqCst), 1);
    assert_eq!(setup.sizes(), [0, 256]);
    // A smaller size takes nothing: the driver unplugs what it can.
    assert_eq!(setup.ask(PLUG, 0, 128), (ACK, 0));
    setup.pluggable.hear(PORT);
    serve_ready(&mut setup.device, &setup.epoll);
    assert_eq!(setup.sizes(), [256, 0]);
    assert_eq!(setup.ask(UNPLUG, 0, 64), (ACK, 0));
    assert_eq!(setup.ask(PLUG, 0, 1), (NACK, 0));
}

#[test]
fn malformed_requests_are_returned_untouched() {
    let mut setup = start(128);
    let request = [u64::from(PLUG), setup.pluggable.start(), 1];
    setup
        .memory
        .write_obj(request, GuestAddress(REQUEST_AT))
        .unwrap();
    let room = writable(RESPONSE_AT, RESPONSE);
    for pieces in [
        vec![readable(REQUEST_AT, REQUEST)],
        vec![readable(REQUEST_AT, REQUEST - 1), room],
        vec![readable(REQUEST_AT, REQUEST), writable(RESPONSE_AT, 9)],
        vec![readable(1 << 40, REQUEST), room],
        vec![room],
        vec![readable(REQUEST_AT, 8), readable(REQUEST_AT + 8, 16), room],
    ] {
        setup.queue.offer(&pieces).unwrap();
        setup.device.on_kick(0).unwrap();
        assert_eq!(setup.queue.used().unwrap().1, 0, "{pieces:?}");
    }
    assert_eq!(setup.sizes(), [0, 128]);
    assert_eq!(setup.device.counters().errors, 6);
}

#[test]
fn a_reset_leaves_memory_where_it_is_and_there_is_one_device() {
    let mut setup = start(128);
    assert_eq!(setup.ask(PLUG, 0, 2), (ACK, 0));
    setup.touch(1);
    setup.device.reset();
    setup.device.on_kick(0).unwrap();
    assert_eq!((setup.byte(1), setup.sizes()), (7, [4, 128]));
    assert!(Mem::new(&setup.pluggable).is_err());
}

#[test]
fn what_was_saved_is_plugged_and_what_is_unplugged_then_is_zeros() {
    use crate::memory::{self, Beside};

    let mut setup = start(128);
    setup.pluggable.bound(0, 128);
    setup.pluggable.hear(PORT + 100);
    assert_eq!(setup.ask(PLUG, 1, 2), (ACK, 0));
    assert_eq!(setup.ask(PLUG, 7, 1), (ACK, 0));
    // What it touches beside that is not kept.
    for block in [1, 2, 3, 7] {
        setup.touch(block);
    }
    let DeviceState::Memory(state) = setup.device.state() else {
        panic!("another device's state");
    };
    assert_eq!(state.bounds, (100, 0, 128));
    let parts = parts(&state.plugged);
    assert_eq!(parts, [BLOCK..3 * BLOCK, 7 * BLOCK..8 * BLOCK]);
    let file = tempfile::tempfile().unwrap();
    let beside = Beside {
        start: setup.pluggable.start(),
        mib: 512,
        parts: parts.clone(),
    };
    // A guest without RAM, for once.
    memory::save(&setup.memory, 0, &beside, &file, None).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 512 * MIB);

    let config = hull_proto_vmm::Pluggable {
        mib: 512,
        port: PORT,
    };
    let restored = || {
        let ram = memory(0x20000);
        let (memory, pluggable) = Pluggable::new(&ram, config, Backing::Snapshot).unwrap();
        pluggable.restore(&parts, &file, 0).unwrap();
        let device = Mem::restore(&state, &pluggable).unwrap();
        assert_eq!(pluggable.metrics(), (6, 128));
        (memory, pluggable, device)
    };
    for _ in 0..2 {
        let (memory, pluggable, mut device) = restored();
        assert_eq!(device.state(), DeviceState::Memory(state.clone()));
        let byte = |block: u64| {
            let at = GuestAddress(pluggable.start() + block * BLOCK + 5);
            memory.read_obj::<u8>(at).unwrap()
        };
        assert_eq!([1, 2, 3, 7].map(byte), [7, 7, 0, 7]);
        assert_eq!(device.blocks.unplug(pluggable.start() + BLOCK, 2), ACK);
        assert_eq!([1, 2, 7].map(byte), [0, 0, 7]);
    }
    let (_, taken, _) = restored();
    assert!(matches!(
        Mem::restore(&state, &taken),
        Err(RestoreError::Taken(_))
    ));
    for wrong in [
        MemoryState {
            plugged: vec![true],
            ..state.clone()
        },
        MemoryState {
            requested: 1024 * MIB,
            ..state.clone()
        },
        MemoryState {
            requested: 1,
            ..state.clone()
        },
    ] {
        let ram = memory(0x20000);
        let (_, pluggable) = Pluggable::new(&ram, config, Backing::Snapshot).unwrap();
        let refused = Mem::restore(&wrong, &pluggable);
        assert!(matches!(refused, Err(RestoreError::Mismatch)));
    }
}
