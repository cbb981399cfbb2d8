use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::Memory;
use crate::virtio::interrupt::CountingInterrupt;
use crate::virtio::test_driver::{DriverQueue, memory, readable, writable};
use crate::virtio::watch::Watcher;

const BUFFERS: u64 = 0x10000;

fn start(memory: &Memory) -> (Rng, DriverQueue, Arc<CountingInterrupt>) {
    let queue = DriverQueue::new(memory, 0, QUEUE_SIZE);
    let interrupt = Arc::new(CountingInterrupt::default());
    let mut rng = Rng::new();
    rng.activate(Activation {
        memory: memory.clone(),
        queues: vec![queue.device_side(false)],
        features: 0,
        interrupt: Arc::clone(&interrupt) as _,
        watcher: Watcher::detached().unwrap(),
    })
    .unwrap();
    (rng, queue, interrupt)
}

fn bytes(memory: &Memory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

#[test]
fn buffers_are_filled_with_random_bytes() {
    let memory = memory(0x20000);
    let (mut rng, mut queue, interrupt) = start(&memory);
    queue.offer(&[writable(BUFFERS, 64), writable(BUFFERS + 0x1000, 32)]);
    assert_eq!(rng.on_kick(0).unwrap(), Progress::Done);
    assert_eq!(queue.used().unwrap().1, 96);
    assert_ne!(bytes(&memory, BUFFERS, 64), vec![0; 64]);
    assert_ne!(bytes(&memory, BUFFERS + 0x1000, 32), vec![0; 32]);
    assert_eq!(bytes(&memory, BUFFERS + 64, 16), vec![0; 16]);
    assert_eq!(interrupt.queue.load(Ordering::SeqCst), 1);
}

#[test]
fn one_request_gets_a_bounded_number_of_bytes() {
    let memory = memory(0x40000);
    let (mut rng, mut queue, _) = start(&memory);
    queue.offer(&[
        writable(BUFFERS, MAX_BYTES + 4096),
        writable(BUFFERS + 0x10000, 100),
    ]);
    rng.on_kick(0).unwrap();
    assert_eq!(queue.used().unwrap().1, MAX_BYTES as u32);
    assert_eq!(
        bytes(&memory, BUFFERS + MAX_BYTES as u64, 4096),
        vec![0; 4096]
    );
}

#[test]
fn malformed_requests_are_returned_empty() {
    let memory = memory(0x20000);
    let (mut rng, mut queue, _) = start(&memory);
    queue.offer(&[readable(BUFFERS, 64)]);
    queue.offer(&[writable(1 << 40, 64)]);
    queue.offer(&[writable(0x1fff0, 64)]);
    queue.offer_loop(writable(BUFFERS, 64));
    rng.on_kick(0).unwrap();
    for _ in 0..4 {
        assert_eq!(queue.used().unwrap().1, 0);
    }
    assert_eq!(rng.counters().errors, 4);
}

#[test]
fn an_idle_device_and_one_after_its_reset_do_nothing() {
    let mut rng = Rng::new();
    assert_eq!(rng.on_kick(0).unwrap(), Progress::Done);
    let memory = memory(0x20000);
    let (mut rng, mut queue, _) = start(&memory);
    queue.offer(&[writable(BUFFERS, 64)]);
    rng.reset();
    rng.on_kick(0).unwrap();
    assert_eq!(queue.used(), None);
}

#[test]
fn the_counters_survive_a_snapshot() {
    let memory = memory(0x20000);
    let (mut rng, mut queue, _) = start(&memory);
    queue.offer(&[writable(BUFFERS, 64)]);
    rng.on_kick(0).unwrap();
    let json = serde_json::to_string(&rng.state()).unwrap();
    let DeviceState::Rng(state) = serde_json::from_str(&json).unwrap() else {
        panic!("{json}")
    };
    assert_eq!(Rng::restore(&state).counters(), rng.counters());
}
