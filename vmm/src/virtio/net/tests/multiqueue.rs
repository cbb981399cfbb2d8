//! A card with several pairs of queues.

use std::thread;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

use super::super::rate_limit::RateLimit;
use super::tap::{ethernet, interface_flags, open_tap, ours, with_namespace};
use super::*;
use crate::sync::lock;
use crate::virtio::device::SharedQueuePair;

pub(super) const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
pub(super) const MULTI: u64 = MERGING | CONTROL | 1 << VIRTIO_NET_F_MQ;
/// Where commands are written to, and where their answers come.
pub(super) const COMMAND: u64 = 0x9_0000;
pub(super) const ANSWER: u64 = 0x9_1000;
const OK: Option<u8> = Some(0);
const ERR: Option<u8> = Some(1);

/// A card, its driver and the far ends of its cables.
struct Card<P> {
    memory: Memory,
    queues: Vec<DriverQueue>,
    device: Net<P>,
    interrupt: Arc<CountingInterrupt>,
    epoll: Arc<Epoll>,
}

impl<P: Port + 'static> Card<P> {
    fn new(ports: Vec<P>, features: u64) -> Self {
        let memory = memory(0x400_0000);
        let mut card = Self {
            queues: Vec::new(),
            device: Net::new(ports, MAC, None).unwrap(),
            interrupt: Arc::default(),
            epoll: Arc::new(Epoll::new().unwrap()),
            memory,
        };
        card.activate(features);
        card
    }

    fn activate(&mut self, features: u64) {
        self.try_activate(features).unwrap();
    }

    fn try_activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.queues = driver_queues(&self.memory, self.device.queues_for(features));
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues: self.queues.iter().map(|it| it.device_side(true)).collect(),
            features,
            interrupt: Arc::clone(&self.interrupt) as _,
            watcher: Watcher::new([Arc::clone(&self.epoll)].into(), 0, 0),
        })
    }

    /// Sends a command whose descriptors are these on the last queue; returns the answer.
    fn offer(&mut self, pieces: &[Segment]) -> Option<u8> {
        self.memory.write_obj(0xffu8, GuestAddress(ANSWER)).unwrap();
        let index = self.queues.len() - 1;
        let queue = &mut self.queues[index];
        queue.offer(pieces).unwrap();
        let progress = self.device.on_kick(index as u16).unwrap();
        assert_eq!(progress, Progress::Done);
        let (_, len) = queue.used().expect("the chain comes back");
        let answer: u8 = self.memory.read_obj(GuestAddress(ANSWER)).unwrap();
        (len == 1).then_some(answer)
    }

    fn command(&mut self, bytes: &[u8]) -> Option<u8> {
        self.memory
            .write_slice(bytes, GuestAddress(COMMAND))
            .unwrap();
        self.offer(&[readable(COMMAND, bytes.len()), writable(ANSWER, 1)])
    }

    /// Asks for this many pairs.
    fn set_pairs(&mut self, count: u16) -> Option<u8> {
        let [low, high] = count.to_le_bytes();
        self.command(&[4, 0, low, high])
    }

    /// Handles all events of ports; returns the tokens.
    fn run(&mut self) -> Vec<u32> {
        let mut tokens = Vec::new();
        loop {
            let ready = driver::serve_ready(&mut self.device, &self.epoll);
            if ready.is_empty() {
                return tokens;
            }
            tokens.extend(ready);
        }
    }
}

pub(super) fn driver_queues(memory: &Memory, count: usize) -> Vec<DriverQueue> {
    (0..count as u64)
        .map(|at| {
            let base = at * DriverQueue::SPAN;
            // Those of an earlier activation are not empty.
            for ring in [base + 0x4002, base + 0x6002] {
                memory.write_obj(0u16, GuestAddress(ring)).unwrap();
            }
            DriverQueue::new(memory, base, if at == 2 * PAIRS { 64 } else { 256 })
        })
        .collect()
}

pub(super) const PAIRS: u64 = 3;

pub(super) fn cables() -> (Vec<Cable>, Vec<File>, Vec<Arc<AtomicBool>>) {
    let (cables, far): (Vec<_>, Vec<_>) = (0..PAIRS).map(|_| cable()).unzip();
    let on = cables.iter().map(|cable| Arc::clone(&cable.on)).collect();
    (cables, far, on)
}

pub(super) fn states(on: &[Arc<AtomicBool>]) -> Vec<bool> {
    on.iter().map(|on| on.load(Ordering::SeqCst)).collect()
}

/// The addresses of the buffers of a pair.
fn buffers(pair: usize) -> (u64, u64) {
    let at = pair as u64 * 0x10_0000;
    (RX_MEMORY + at, TX_MEMORY + at)
}

/// Passes a frame to the guest and one back, by what `kick` and `ready` do.
fn exchange(
    memory: &Memory,
    pair: usize,
    [rx, tx]: &mut [DriverQueue; 2],
    far: &mut File,
    mut serve: impl FnMut(Source),
) {
    let (down, up) = (frame(300 + pair), frame(700 + pair));
    let (to, from) = buffers(pair);
    rx.offer(&[writable(to, 2000)]).unwrap();
    far.write_all(&down).unwrap();
    serve(Source::Device(2 * pair as u32));
    let (_, len) = rx.used().expect("a frame");
    let mut bytes = vec![0; len as usize];
    memory.read_slice(&mut bytes, GuestAddress(to)).unwrap();
    assert_eq!(bytes, arrived(down, 1));
    memory.write_slice(&up, GuestAddress(from)).unwrap();
    tx.offer(&[readable(from, up.len())]).unwrap();
    serve(Source::Kick(2 * pair as u16 + TX as u16));
    tx.used().expect("the chain comes back");
    assert_eq!(read_frame(far).unwrap(), up);
}

#[test]
fn a_card_with_one_pair_has_no_control_queue() {
    let (cable, _far) = cable();
    let one = Net::new(vec![cable], MAC, None).unwrap();
    assert_eq!(one.features() & (MULTI & !MERGING), 0);
    assert_eq!(
        (one.queue_sizes(), one.queues_for(one.features())),
        (&[256; 2][..], 2)
    );
    assert_eq!(one.config()[8..10], [1, 0]);
}

#[test]
fn a_driver_has_the_queues_that_its_features_take() {
    let (ports, _far, on) = cables();
    let card = Net::new(ports, MAC, None).unwrap();
    assert_eq!(card.features() & MULTI, MULTI);
    assert_eq!(card.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    for (features, queues) in [(0, 2), (CONTROL, 3), (MULTI & !CONTROL, 2), (MULTI, 7)] {
        assert_eq!(card.queues_for(features), queues);
    }
    assert_eq!(card.config()[8..10], [3, 0]);
    assert_eq!(states(&on), [true, false, false]);
    for count in [0, 9] {
        let ports = (0..count).map(|_| cable().0).collect();
        assert!(matches!(Net::new(ports, MAC, None), Err(NetError::Pairs(it)) if it == count));
    }
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    let (ports, _far, on) = cables();
    let mut card = Card::new(ports, MULTI);
    assert_eq!(states(&on), [true, false, false]);
    for (count, answer, expected) in [
        (3, OK, [true; 3]),
        (4, ERR, [true; 3]),
        (0, ERR, [true; 3]),
        (u16::MAX, ERR, [true; 3]),
        (2, OK, [true, true, false]),
        (2, OK, [true, true, false]),
        (1, OK, [true, false, false]),
        (3, OK, [true; 3]),
    ] {
        assert_eq!(card.set_pairs(count), answer, "{count}");
        assert_eq!(states(&on), expected, "{count}");
    }
    assert_eq!(card.device.counters().errors, 3);
    card.device.reset();
    assert_eq!(states(&on), [true, false, false]);
    assert!(card.device.queues().is_empty());
    card.activate(MULTI);
    assert_eq!(states(&on), [true, false, false]);
    assert_eq!(card.set_pairs(2), OK);
}

#[test]
fn a_driver_that_changes_its_mind_all_the_time_has_to_wait() {
    let (ports, _far, on) = cables();
    let mut card = Card::new(ports, MULTI);
    let mut changes = 0;
    while card.set_pairs(2 + changes % 2) == OK {
        changes += 1;
        assert!(changes < 1000);
        if changes == 3 {
            // There is no way around it.
            card.device.reset();
            card.activate(MULTI);
        }
    }
    // One was the first.
    assert!(changes >= 7);
    // What is so already is no change.
    let pairs = states(&on).iter().filter(|on| **on).count() as u16;
    assert_eq!(card.set_pairs(pairs), OK);
}

#[test]
fn changes_are_allowed_now_and_then() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let mut limit = RateLimit::new(start);
    let mut taken = |ms| (0..20).take_while(|_| limit.take(at(ms))).count();
    assert_eq!(taken(5000), 8);
    assert_eq!(taken(5900), 0);
    assert_eq!(taken(6000), 1);
    assert_eq!(taken(8500), 2);
    assert_eq!(taken(8999), 0);
    assert_eq!(taken(9000), 1);
    assert_eq!(taken(99_000), 8);
}

#[test]
fn what_is_no_command_is_refused_and_harms_nothing() {
    let (ports, mut far, on) = cables();
    let mut card = Card::new(ports, MULTI);
    for bytes in [
        &[4, 0, 2, 0, 0][..],
        &[4, 0, 2],
        &[4, 0],
        &[4],
        // Receive hashes, MAC filters, and what nobody knows.
        &[4, 1, 2, 0],
        &[1, 0, 2, 0],
        &[0, 0, 2, 0],
        &[0xff, 0xff, 2, 0],
    ] {
        assert_eq!(card.command(bytes), ERR, "{bytes:?}");
    }
    card.memory
        .write_slice(&[4, 0, 2, 0], GuestAddress(COMMAND))
        .unwrap();
    let answer = writable(ANSWER, 1);
    assert_eq!(card.offer(&[answer]), ERR, "no command");
    let command = readable(COMMAND, 4);
    for (case, chain) in [
        ("no room for the answer", &[command][..]),
        ("an answer of no bytes", &[command, writable(ANSWER, 0)]),
        ("the answer first", &[answer, command]),
        ("outside of memory", &[readable(u64::MAX - 1, 4), answer]),
        (
            "an answer nowhere",
            &[command, writable(0x1000_0000_0000, 1)],
        ),
        ("too many pieces", &[readable(COMMAND, 1); 9]),
    ] {
        assert_eq!(card.offer(chain), None, "{case}");
    }
    assert_eq!(card.device.counters().errors, 15);
    assert_eq!(states(&on), [true, false, false]);
    // In any pieces, and with more room than it takes.
    let byte = |at| readable(COMMAND + at, 1);
    let cut = [byte(0), byte(1), byte(2), byte(3), writable(ANSWER, 9)];
    assert_eq!(card.offer(&cut), OK);
    assert_eq!(states(&on), [true, true, false]);
    let Card {
        memory,
        queues,
        device,
        ..
    } = &mut card;
    let [pair @ .., _, _, _, _, _] = &mut queues[..] else {
        panic!("seven queues");
    };
    let pair = pair.try_into().unwrap();
    exchange(memory, 0, pair, &mut far[0], |source| {
        serve(device, source);
    });
    assert_eq!(device.on_kick(7).unwrap(), Progress::Done);
    assert_eq!(device.on_kick(u16::MAX).unwrap(), Progress::Done);
    assert_eq!(
        device.on_event(u32::MAX, EventSet::IN).unwrap(),
        Progress::Done
    );
}

fn serve(device: &mut Net<Cable>, source: Source) {
    let progress = match source {
        Source::Kick(queue) => device.on_kick(queue),
        Source::Device(token) => device.on_event(token, EventSet::IN),
    };
    assert_eq!(progress.unwrap(), Progress::Done);
}

#[test]
fn a_driver_that_wants_one_pair_finds_the_control_queue_behind_it() {
    let (ports, _far, on) = cables();
    let mut card = Card::new(ports, MERGING | CONTROL);
    assert_eq!(card.queues.len(), 3);
    assert_eq!(card.set_pairs(1), ERR, "that feature was not accepted");
    assert_eq!(card.set_pairs(2), ERR);
    assert_eq!(states(&on), [true, false, false]);
    assert_eq!(card.device.queues().len(), 3);
}

#[test]
fn a_broken_control_ring_breaks_the_device() {
    let (ports, _far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    let ring = 6 * DriverQueue::SPAN + 0x4002;
    card.memory.write_obj(1000u16, GuestAddress(ring)).unwrap();
    assert!(card.device.on_kick(6).is_err());
}

#[test]
fn frames_come_through_a_pair_once_it_is_on() {
    let (ports, mut far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    let (to, _) = buffers(1);
    card.queues[2].offer(&[writable(to, 2000)]).unwrap();
    assert_eq!(card.device.on_kick(2).unwrap(), Progress::Done);
    far[1].write_all(&frame(500)).unwrap();
    assert_eq!(card.run(), [0], "there is room in the first port");
    assert_eq!(card.device.on_kick(2).unwrap(), Progress::Done);
    assert!(card.queues[2].used().is_none());
    assert_eq!(card.set_pairs(2), OK);
    assert_eq!(card.run(), [2]);
    assert_eq!(card.queues[2].used().unwrap().1, 500);
    assert_eq!(card.set_pairs(1), OK);
    card.queues[2].offer(&[writable(to, 2000)]).unwrap();
    far[1].write_all(&frame(500)).unwrap();
    assert!(card.run().is_empty());
    assert!(card.queues[2].used().is_none());
}

#[test]
fn pairs_are_used_at_the_same_time() {
    let (ports, mut far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    assert_eq!(card.set_pairs(3), OK);
    let pairs: Vec<SharedQueuePair> = card.device.queue_pairs();
    let mut queues = std::mem::take(&mut card.queues);
    card.queues = queues.split_off(6);
    let (device, memory) = (&mut card.device, &card.memory);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, ((pair, far), queues)) in pairs
            .iter()
            .zip(&mut far)
            .zip(queues.chunks_exact_mut(2))
            .enumerate()
        {
            let queues: &mut [DriverQueue; 2] = queues.try_into().unwrap();
            threads.push(scope.spawn(move || {
                for _ in 0..500 {
                    exchange(memory, index, &mut *queues, far, |source| {
                        let mut pair = lock(pair);
                        let progress = match source {
                            Source::Kick(queue) => pair.on_kick(queue),
                            Source::Device(token) => pair.on_event(token, EventSet::IN),
                        };
                        assert_eq!(progress.unwrap(), Progress::Done);
                    });
                }
            }));
        }
        // The device as a whole is there for others meanwhile.
        let mut last = 0;
        while threads.iter().any(|thread| !thread.is_finished()) {
            let now = device.counters().requests;
            assert!(now >= last);
            last = now;
            assert_eq!(device.queues().len(), 7);
            thread::yield_now();
        }
    });
    assert_eq!(device.counters().requests, 3 * 1000 + 1);
    // A pair that is held up holds up no other.
    let held = lock(&pairs[1]);
    let last = (&mut queues[4..6]).try_into().unwrap();
    exchange(memory, 2, last, &mut far[2], |source| {
        let mut pair = lock(&pairs[2]);
        let progress = match source {
            Source::Kick(queue) => pair.on_kick(queue),
            Source::Device(token) => pair.on_event(token, EventSet::IN),
        };
        assert_eq!(progress.unwrap(), Progress::Done);
    });
    drop(held);
    assert_eq!(device.counters().errors, 0);
}

#[test]
fn each_pair_tells_of_its_own_lone_frames() {
    let (ports, _far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    assert_eq!(card.set_pairs(3), OK);
    card.run();
    let told = |card: &Card<Cable>| card.interrupt.queue.load(Ordering::SeqCst);
    let before = told(&card);
    for queue in [3, 5] {
        card.queues[queue].set_used_event(0);
        card.queues[queue]
            .offer(&[readable(TX_MEMORY, 100)])
            .unwrap();
        assert_eq!(card.device.on_kick(queue as u16).unwrap(), Progress::Done);
    }
    assert_eq!(told(&card), before);
    let start = Instant::now();
    let mut clocks = Vec::new();
    while clocks.len() < 2 {
        assert!(start.elapsed() < Duration::from_secs(10), "{clocks:?}");
        clocks.extend(card.run());
    }
    clocks.sort_unstable();
    assert_eq!(clocks, [3, 5]);
    assert_eq!(told(&card), before + 2);
}

#[test]
fn a_cable_that_ends_ends_all_pairs_and_is_told_once() {
    let (ports, far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    assert_eq!(card.set_pairs(3), OK);
    for pair in [0, 2, 4] {
        card.queues[pair]
            .offer(&[writable(RX_MEMORY, 2000)])
            .unwrap();
    }
    drop(far);
    card.run();
    assert!(card.run().is_empty());
    assert_eq!(card.device.config()[6..8], [0, 0]);
    assert_eq!(card.interrupt.config.load(Ordering::SeqCst), 1);
    assert_eq!(card.set_pairs(2), OK);
    card.device.reset();
    card.activate(MULTI);
    assert_eq!(card.set_pairs(3), OK);
    assert!(card.run().is_empty());
}

#[test]
fn a_snapshot_knows_the_pairs_in_use() {
    let (ports, _far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    assert_eq!(card.set_pairs(2), OK);
    let DeviceState::Net(mut state) = card.device.state() else {
        panic!("another device's state");
    };
    let (ports, mut far, on) = cables();
    card.device = Net::restore(&state, ports).unwrap();
    card.activate(MULTI);
    assert_eq!(states(&on), [true, true, false]);
    card.queues[2].offer(&[writable(RX_MEMORY, 2000)]).unwrap();
    far[1].write_all(&frame(500)).unwrap();
    card.run();
    assert_eq!(card.queues[2].used().unwrap().1, 500);
    for impossible in [0, 4, u16::MAX] {
        state.used_pairs = impossible;
        let (ports, _far, on) = cables();
        card.device = Net::restore(&state, ports).unwrap();
        assert!(card.try_activate(MULTI).is_err(), "{impossible}");
        assert!(card.device.queues().is_empty());
        assert_eq!(states(&on), [true, false, false]);
    }
}

#[test]
fn a_card_comes_back_without_its_cable() {
    let (ports, _far, _) = cables();
    let mut card = Card::new(ports, MULTI);
    assert_eq!(card.set_pairs(2), OK);
    let DeviceState::Net(mut state) = card.device.state() else {
        panic!("another device's state");
    };
    let again = Net::unplugged(&state).unwrap();
    assert_eq!(again.features(), card.device.features());
    assert_eq!(again.queue_sizes(), card.device.queue_sizes());
    assert_eq!(again.state(), card.device.state());
    assert_eq!(again.config()[6..8], [0, 0], "its link is down");
    assert_eq!(again.config()[..6], card.device.config()[..6]);
    for impossible in [0, 9, u16::MAX] {
        state.pairs = impossible;
        assert!(matches!(Net::unplugged(&state), Err(NetError::Pairs(_))));
    }
}

/// Opens a tap's queues and a packet socket on it.
fn multiqueue_tap(name: &str, queues: usize) -> io::Result<(Vec<OwnedFd>, File)> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let (first, socket) = open_tap(name, flags)?;
    let mut fds = vec![first];
    for _ in 1..queues {
        fds.push(open_tap(name, flags)?.0);
    }
    Ok((fds, socket))
}

#[test]
fn the_kernel_spreads_flows_over_the_queues_that_are_on() {
    with_namespace(|| {
        let (fds, mut socket) = match multiqueue_tap("multi0", 2) {
            Ok(tap) => tap,
            Err(error) => return eprintln!("skipped: no tap: {error}"),
        };
        let second = File::from(fds[1].try_clone().unwrap());
        let is_on = || interface_flags(&second) & libc::IFF_DETACH_QUEUE == 0;
        assert!(is_on());
        let mut card = Card::new(Tap::all(fds).unwrap(), MULTI);
        assert!(!is_on());
        for (count, queues) in [(1, &[0][..]), (2, &[0, 2]), (1, &[0])] {
            assert_eq!(card.set_pairs(count), OK);
            assert_eq!(is_on(), count == 2);
            let mut seen = vec![0; 3];
            for port in 0..32 {
                for queue in [0, 2] {
                    card.queues[queue].offer(&[writable(RX_MEMORY, 2000)]);
                }
                socket.write_all(&datagram(port)).unwrap();
                card.run();
                for queue in [0, 2] {
                    while card.queues[queue].used().is_some() {
                        seen[queue] += 1;
                    }
                }
            }
            // Some are the kernel's own.
            assert!(seen.iter().sum::<u32>() >= 32, "{seen:?}");
            assert_eq!(seen[2] > 0, queues.contains(&2), "{seen:?}");
            assert!(seen[0] > 0, "{seen:?}");
        }
        // Frames of the guest leave by both.
        assert_eq!(card.set_pairs(2), OK);
        for queue in [1, 3] {
            let mut bytes = vec![0; HEADER_SIZE];
            bytes.extend(ethernet(200 + queue));
            card.memory
                .write_slice(&bytes, GuestAddress(TX_MEMORY))
                .unwrap();
            card.queues[queue]
                .offer(&[readable(TX_MEMORY, bytes.len())])
                .unwrap();
            card.device.on_kick(queue as u16).unwrap();
            let seen = std::iter::from_fn(|| read_frame(&mut socket)).find(|it| ours(it));
            assert_eq!(seen.unwrap(), ethernet(200 + queue));
        }
        card.device.reset();
        assert!(!is_on());
    });
}

/// A datagram of a flow of its own.
fn datagram(port: u16) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    bytes.extend([0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    bytes.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend(port.to_be_bytes());
    bytes.extend([0, 80, 0, 8, 0, 0]);
    bytes.resize(60, 0);
    bytes
}

#[test]
fn queues_of_different_taps_make_no_card() {
    with_namespace(|| {
        let single = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let open = |name, flags| open_tap(name, flags).map(|(tap, _)| tap);
        let Ok(one) = open("one", single) else {
            return eprintln!("skipped: no tap");
        };
        let two = vec![one, open("two", single).unwrap()];
        assert!(matches!(Tap::all(two), Err(TapError::Queues)));
        let mut mixed = multiqueue_tap("multi1", 2).unwrap().0;
        mixed.extend(multiqueue_tap("multi2", 1).unwrap().0);
        assert!(matches!(Tap::all(mixed), Err(TapError::Queues)));
        let (same, _socket) = multiqueue_tap("multi3", 8).unwrap();
        assert_eq!(Tap::all(same).unwrap().len(), 8);
        assert!(Tap::all(Vec::new()).unwrap().is_empty());
    });
}
