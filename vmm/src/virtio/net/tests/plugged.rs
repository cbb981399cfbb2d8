//! A card with several pairs of queues behind its registers, served by threads as the VMM's are.

use super::multiqueue::{ANSWER, COMMAND, CONTROL, MULTI, PAIRS, cables, driver_queues, states};
use super::*;
use crate::epolls::Epolls;
use crate::layout::slot_address;
use crate::legacy::ioapic::Ioapic;
use crate::service::serve_ready;
use crate::slots::Slots;
use crate::sync::lock;
use crate::virtio::test_driver::Nothing;
use std::sync::mpsc;
use std::thread;

/// A card in slot 1, as its driver reaches it, and the sets of the threads that serve its pairs.
struct Plugged {
    memory: Memory,
    slots: Slots,
    epolls: Epolls,
    queues: Vec<DriverQueue>,
}

impl Plugged {
    fn new(ports: Vec<Cable>, vcpus: u8) -> Self {
        let memory = memory(0x400_0000);
        let epolls = Epolls::new(Arc::new(Epoll::new().unwrap()), vcpus).unwrap();
        let ioapic = Arc::new(Ioapic::new(Nothing));
        let slots = Slots::new(&ioapic, memory.clone(), epolls.clone()).unwrap();
        let card = Net::new(ports, MAC, None).unwrap();
        slots.attach(1, Box::new(card), &Nothing).unwrap();
        Self {
            queues: Vec::new(),
            memory,
            slots,
            epolls,
        }
    }

    fn write(&self, register: u64, value: u32) {
        let address = slot_address(1) + register;
        self.slots.write(address, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.slots.registers().page(1).get(0x70)
    }

    /// Does what a driver does up to `DRIVER_OK`.
    fn start(&mut self, features: u64, queues: usize) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for (half, bits) in [(0, features as u32), (1, 1)] {
            self.write(0x24, half);
            self.write(0x20, bits);
        }
        self.write(0x70, 11);
        self.queues = driver_queues(&self.memory, queues);
        for index in 0..queues as u32 {
            let base = index * DriverQueue::SPAN as u32;
            let size = if index == 2 * PAIRS as u32 { 64 } else { 256 };
            for (register, value) in [
                (0x30, index),
                (0x38, size),
                (0x80, base),
                (0x90, base + 0x4000),
                (0xa0, base + 0x6000),
                (0x44, 1),
            ] {
                self.write(register, value);
            }
        }
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    /// Serves what the thread of this number would.
    fn serve(&self, thread: usize) {
        serve_ready(&self.slots, &self.epolls.network[thread]).unwrap();
    }

    fn set_pairs(&mut self, count: u8) -> u8 {
        let queue = self.queues.last_mut().unwrap();
        let command = [4, 0, count, 0];
        self.memory
            .write_slice(&command, GuestAddress(COMMAND))
            .unwrap();
        queue
            .offer(&[readable(COMMAND, 4), writable(ANSWER, 1)])
            .unwrap();
        self.write(0x50, self.queues.len() as u32 - 1);
        self.serve(0);
        self.queues.last_mut().unwrap().used().expect("an answer");
        self.memory.read_obj(GuestAddress(ANSWER)).unwrap()
    }
}

#[test]
fn each_pair_has_its_thread_and_a_broken_one_takes_down_the_card() {
    let (ports, mut far, on) = cables();
    let mut card = Plugged::new(ports, PAIRS as u8);
    card.start(MULTI, 7);
    assert_eq!(card.set_pairs(3), 0);
    // Room from before is of no interest.
    (0..3).for_each(|thread| card.serve(thread));
    card.queues[2].offer(&[writable(RX_MEMORY, 2000)]).unwrap();
    card.write(0x50, 2);
    far[1].write_all(&frame(500)).unwrap();
    card.serve(0);
    card.serve(2);
    assert!(card.queues[2].used().is_none(), "another's work");
    card.serve(1);
    assert_eq!(card.queues[2].used().unwrap().1, 500);

    let ring = 3 * DriverQueue::SPAN + 0x4002;
    card.memory.write_obj(1000u16, GuestAddress(ring)).unwrap();
    card.write(0x50, 3);
    card.serve(1);
    assert_eq!(card.status(), 15 | 64);
    assert_eq!(states(&on), [true, false, false]);
    card.queues[0].offer(&[writable(RX_MEMORY, 2000)]).unwrap();
    far[0].write_all(&frame(500)).unwrap();
    card.write(0x50, 0);
    card.serve(0);
    assert!(card.queues[0].used().is_none());

    // It starts over, here with a driver that knows no more than one pair.
    card.start(CONTROL, 3);
    assert_eq!(card.status(), 15);
    card.queues[0].offer(&[writable(RX_MEMORY, 2000)]).unwrap();
    card.write(0x50, 0);
    card.serve(0);
    assert_eq!(card.queues[0].used().unwrap().1, 500);
    // Its control queue would be the second pair's first.
    let queue = &mut card.queues[2];
    queue
        .offer(&[readable(COMMAND, 4), writable(ANSWER, 1)])
        .unwrap();
    card.write(0x50, 2);
    card.serve(1);
    assert_eq!(card.queues[2].used().unwrap().1, 1);
    card.slots.detach(1, &Nothing).unwrap();
    assert!(far[2].write(&[0; 100]).is_err(), "its end is closed");
}

#[test]
fn fewer_threads_than_pairs_serve_them_all() {
    let (ports, mut far, _) = cables();
    let mut card = Plugged::new(ports, 2);
    card.start(MULTI, 7);
    card.serve(0);
    // The control queue counts as the fourth pair's.
    let queue = card.queues.last_mut().unwrap();
    card.memory
        .write_slice(&[4, 0, 3, 0], GuestAddress(COMMAND))
        .unwrap();
    queue
        .offer(&[readable(COMMAND, 4), writable(ANSWER, 1)])
        .unwrap();
    card.write(0x50, 6);
    card.serve(1);
    card.queues[6].used().expect("an answer");
    for (pair, thread) in [(0, 0), (1, 1), (2, 0)] {
        card.queues[2 * pair]
            .offer(&[writable(RX_MEMORY, 2000)])
            .unwrap();
        far[pair].write_all(&frame(500)).unwrap();
        card.serve(thread);
        assert_eq!(card.queues[2 * pair].used().unwrap().1, 500);
    }
}

#[test]
fn metrics_wait_for_no_pair_that_is_busy() {
    let (ports, _far, _) = cables();
    let mut card = Plugged::new(ports, 4);
    card.start(MULTI, 7);
    let pairs = card.slots.find(1, 1).unwrap().pairs;
    let busy = lock(&pairs[1]);
    let slots = &card.slots;
    thread::scope(|scope| {
        let (answers, answer) = mpsc::channel();
        scope.spawn(move || answers.send(slots.metrics()));
        let metrics = answer.recv_timeout(Duration::from_secs(10));
        drop(busy);
        assert_eq!(metrics.expect("it waits").len(), 1);
    });
}
