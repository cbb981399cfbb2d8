use std::sync::atomic::{AtomicUsize, Ordering};

use hull_proto_vmm::SLOTS;
use proptest::prelude::*;
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::*;
use crate::layout::SLOT_END;
use crate::legacy::ioapic::Message;
use crate::virtio::rng::Rng;
use crate::virtio::test_driver::memory;
use crate::virtio::watch::{Source, decode};

#[derive(Debug, Default)]
struct Sink(AtomicUsize);

impl MessageSink for Sink {
    fn send(&self, _: Message) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Counts the doorbells that are connected; refuses more than `most`.
#[derive(Debug)]
struct Bells {
    connected: AtomicUsize,
    most: usize,
}

impl Doorbells for Bells {
    fn connect(&self, _: &EventFd, _: u64, _: u32) -> io::Result<()> {
        if self.connected.load(Ordering::SeqCst) == self.most {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.connected.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn disconnect(&self, _: &EventFd, _: u64, _: u32) -> io::Result<()> {
        self.connected.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Machine {
    slots: Slots,
    ioapic: Arc<Ioapic<Arc<Sink>>>,
    sink: Arc<Sink>,
    epoll: Arc<Epoll>,
    bells: Bells,
}

fn machine(most: usize) -> Machine {
    let sink = Arc::new(Sink::default());
    let ioapic = Arc::new(Ioapic::new(Arc::clone(&sink)));
    let epoll = Arc::new(Epoll::new().unwrap());
    let epolls = Epolls::new(Arc::clone(&epoll), 1).unwrap();
    let slots = Slots::new(&ioapic, memory(0x10000), epolls).unwrap();
    Machine {
        slots,
        ioapic,
        sink,
        epoll,
        bells: Bells {
            connected: AtomicUsize::new(0),
            most,
        },
    }
}

impl Machine {
    fn attach(&self, slot: u8) -> Result<(), SlotError> {
        self.slots.attach(slot, Box::new(Rng::new()), &self.bells)
    }

    fn register(&self, slot: u8, offset: u64) -> u32 {
        self.slots.registers().page(slot).get(offset)
    }

    /// Programs an IOAPIC pin as edge-triggered.
    fn unmask(&self, pin: u8) {
        self.ioapic.write(0, &[0x10 + pin * 2, 0, 0, 0]);
        self.ioapic.write(0x10, &0x41u32.to_le_bytes());
    }

    fn event(&self) -> Option<(u8, u16, Source)> {
        let mut events = [EpollEvent::default()];
        (self.epoll.wait(0, &mut events).unwrap() == 1).then(|| decode(events[0].data()))
    }
}

#[test]
fn a_late_error_of_a_device_is_not_its_successors() {
    const STATUS: u64 = 0x70;
    const NEEDS_RESET: u32 = 64;
    let machine = machine(99);
    machine.attach(7).unwrap();
    machine.slots.kick(7, 0);
    let (_, late, _) = machine.event().unwrap();
    machine.slots.detach(7, &machine.bells).unwrap();
    machine.slots.fail(7, late);
    assert_eq!(machine.register(7, STATUS), 0);

    machine.attach(7).unwrap();
    machine.slots.fail(7, late);
    assert_eq!(machine.register(7, STATUS), 0);
    machine.slots.kick(7, 0);
    let (_, present, _) = machine.event().unwrap();
    machine.slots.fail(7, present);
    assert_eq!(machine.register(7, STATUS), NEEDS_RESET);
}

#[test]
fn a_device_comes_and_goes() {
    let machine = machine(99);
    for _ in 0..3 {
        assert_eq!(machine.register(7, 8), 0);
        machine.attach(7).unwrap();
        assert_eq!(machine.register(7, 8), 4);
        assert_eq!(machine.register(6, 8), 0);
        assert!(matches!(machine.attach(7), Err(SlotError::Taken(7))));
        machine.slots.detach(7, &machine.bells).unwrap();
        assert!(matches!(
            machine.slots.detach(7, &machine.bells),
            Err(SlotError::Empty(7))
        ));
    }
    assert_eq!(machine.bells.connected.load(Ordering::SeqCst), 0);
    assert!(matches!(
        machine.attach(SLOTS),
        Err(SlotError::NoSuchSlot(SLOTS))
    ));
    assert!(matches!(
        machine.slots.detach(255, &machine.bells),
        Err(SlotError::NoSuchSlot(255))
    ));
}

#[test]
fn a_device_that_can_not_be_connected_leaves_the_slot_empty() {
    // A queue's, and that of acknowledgements.
    for bells in 0..2 {
        let machine = machine(bells);
        assert!(matches!(
            machine.attach(3),
            Err(SlotError::Connect { slot: 3, .. })
        ));
        assert_eq!(machine.register(3, 8), 0);
        assert_eq!(machine.bells.connected.load(Ordering::SeqCst), 0);
    }
    machine(2).attach(3).unwrap();
}

#[test]
fn events_of_a_device_that_is_gone_are_not_its_successors() {
    let machine = machine(99);
    machine.attach(3).unwrap();
    machine.slots.kick(3, 0);
    let (slot, generation, source) = machine.event().unwrap();
    assert_eq!((slot, source), (3, Source::Kick(0)));
    assert!(machine.slots.find(slot, generation).is_some());
    assert_eq!(machine.event(), None, "an event that was taken is over");
    machine.slots.kick(3, 0);
    machine.slots.detach(3, &machine.bells).unwrap();
    assert_eq!(machine.event(), None);
    assert!(machine.slots.find(slot, generation).is_none());
    machine.attach(3).unwrap();
    assert!(machine.slots.find(slot, generation).is_none());
}

#[test]
fn slots_that_share_a_line_lose_no_interrupt() {
    let machine = machine(99);
    let (one, other) = (2, 21);
    assert_eq!(slot_pin(one), slot_pin(other));
    machine.unmask(slot_pin(one));
    machine.attach(one).unwrap();
    machine.attach(other).unwrap();
    let interrupt = |slot: u8| {
        let place = lock(&machine.slots.slots[usize::from(slot)].slot);
        Arc::clone(place.transport.as_ref().unwrap().interrupt())
    };
    use crate::virtio::interrupt::Interrupt;
    interrupt(one).signal_queue();
    interrupt(other).signal_queue();
    assert_eq!(machine.sink.0.load(Ordering::SeqCst), 2);
    let status = |slot| machine.register(slot, 0x60);
    assert_eq!((status(one), status(other)), (1, 1));
    // A signal after the driver looked has an interrupt of its own, though nobody acknowledged.
    interrupt(one).signal_queue();
    assert_eq!(machine.sink.0.load(Ordering::SeqCst), 3);
}

#[test]
fn addresses_outside_and_between_are_harmless() {
    let machine = machine(99);
    machine.attach(31).unwrap();
    for address in [0, SLOT_BASE - 1, SLOT_END - 1, SLOT_END, u64::MAX] {
        for width in [1, 4, 8] {
            machine.slots.write(address, &vec![0xff; width]);
        }
    }
    assert_eq!(machine.register(31, 8), 4);
}

#[test]
fn metrics_list_what_is_attached() {
    let machine = machine(99);
    machine.attach(1).unwrap();
    machine.attach(30).unwrap();
    let metrics = machine.slots.metrics();
    assert_eq!(
        metrics
            .iter()
            .map(|m| (m.slot, m.kind.as_str()))
            .collect::<Vec<_>>(),
        [(1, "rng"), (30, "rng")]
    );
}

/// A vCPU that resets a busy disk has its slot for as long as the disk is busy.
#[test]
fn the_event_loop_waits_for_no_busy_device() {
    use std::time::{Duration, Instant};

    let machine = machine(99);
    machine.attach(1).unwrap();
    machine.attach(2).unwrap();
    let before = machine.slots.metrics();
    let device = machine.slots.find(1, 1).unwrap().device;
    let busy = lock(&device);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let reset = 0u32.to_le_bytes();
            machine.slots.write(slot_address(1) + 0x70, &reset);
        });
        let begin = Instant::now();
        while try_lock(&machine.slots.slots[1].slot).is_some() {
            assert!(begin.elapsed() < Duration::from_secs(10));
        }
        let begin = Instant::now();
        let (answers, answer) = std::sync::mpsc::channel();
        let machine = &machine;
        scope.spawn(move || {
            let metrics = machine.slots.metrics();
            let taken_out = machine.slots.detach(1, &machine.bells);
            answers.send((metrics, taken_out)).unwrap();
        });
        let answer = answer.recv_timeout(Duration::from_secs(10));
        drop(busy);
        let (metrics, taken_out) = answer.expect("it waits");
        assert_eq!(metrics, before);
        assert!(matches!(taken_out, Err(SlotError::Busy(1))));
        assert!(begin.elapsed() < Duration::from_secs(5));
    });
    machine.slots.detach(1, &machine.bells).unwrap();
}

/// vCPUs reset and set up a device while the event loop serves it and it is taken out and put back:
/// nothing waits for ever, nothing is used after it is gone.
#[test]
fn nobody_waits_for_ever() {
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    let machine = machine(99);
    machine.unmask(slot_pin(4));
    machine.attach(4).unwrap();
    let done = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    let base = slot_address(4);
    let write = |offset: u64, value: u32| machine.slots.write(base + offset, &value.to_le_bytes());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    for (offset, value) in [
                        (0x70, 0),
                        (0x70, 1),
                        (0x70, 3),
                        (0x24, 1),
                        (0x20, 1),
                        (0x70, 11),
                        (0x30, 0),
                        (0x38, 16),
                        (0x80, 0x1000),
                        (0x90, 0x2000),
                        (0xa0, 0x3000),
                        (0x44, 1),
                        (0x70, 15),
                        (0x50, 0),
                        (0x64, 3),
                        (0x60, 0),
                    ] {
                        write(offset, value);
                        machine.register(4, offset);
                        machine.register(4, 0x100);
                    }
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let start = Instant::now();
        let mut serviced = 0;
        while start.elapsed() < Duration::from_millis(500) {
            if let Some((slot, generation, Source::Kick(queue))) = machine.event()
                && let Some(attached) = machine.slots.find(slot, generation)
            {
                let handled = lock(&attached.device).on_kick(queue);
                if handled.is_err() {
                    machine.slots.fail(slot, generation);
                }
                serviced += 1;
            }
            assert!(machine.slots.metrics().len() <= 1);
            if serviced % 16 == 15 {
                serviced += 1;
                // vCPUs may be in the way, but not each time.
                while let Err(error) = machine.slots.detach(4, &machine.bells) {
                    assert!(matches!(error, SlotError::Busy(4)), "{error}");
                }
                while let Err(error) = machine.attach(4) {
                    assert!(matches!(error, SlotError::Busy(4)), "{error}");
                }
            }
        }
        done.store(true, Ordering::SeqCst);
        assert!(serviced > 0);
    });
    assert!(rounds.load(Ordering::SeqCst) > 10);
}

proptest! {
    /// Whatever a guest writes where, at any width: no panic, and an empty slot stays empty.
    #[test]
    fn no_access_breaks_a_slot(
        accesses in prop::collection::vec((0u64..0x200, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()), 0..200),
    ) {
        let machine = machine(99);
        machine.attach(1).unwrap();
        for (offset, width, value) in accesses {
            for slot in [1, 2] {
                let data = value.to_le_bytes();
                machine.slots.write(slot_address(slot) + offset, &data[..width]);
            }
        }
        prop_assert_eq!((machine.register(1, 8), machine.register(2, 8)), (4, 0));
    }
}
