//! Serving devices: taking events of an epoll set to the devices that they are for.
//!
//! Disks have a thread of their own ([`Worker`]), because a host's file system may take its time, and
//! the network and the agent's connection must not wait for it. Network cards have others, so that a
//! guest that floods does not hold up its agent, and a packet costs no detour over the event loop's set:
//! one for each vCPU, up to the number of pairs of queues that a card may have. The first serves the
//! first pair of each card, and so on. All else is served by the event loop.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use error_reporter::Report;
use hull_jail::seccomp::List;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::epolls::wait;
use crate::log;
use crate::slots::{Attached, Slots};
use crate::sync::lock;
use crate::virtio::device::pair_of;
use crate::virtio::device::{DeviceError, Progress};
use crate::virtio::watch::{Source, decode};

/// Events taken at a time.
const BATCH: usize = 32;
/// The stack of the worker. Only what is touched costs memory.
const STACK: usize = 256 << 10;
/// Marks the event that wakes the worker; no slot has this number.
const WAKE: u64 = u64::MAX;

/// Serves the devices that are ready now.
///
/// # Errors
/// What epoll says.
pub fn serve_ready(slots: &Slots, epoll: &Epoll) -> io::Result<()> {
    let mut events = [EpollEvent::default(); BATCH];
    let count = wait(epoll, 0, &mut events)?;
    for event in events.iter().take(count) {
        serve(slots, *event);
    }
    Ok(())
}

fn serve(slots: &Slots, event: EpollEvent) {
    let (slot, generation, source) = decode(event.data());
    let Some(attached) = slots.find(slot, generation) else {
        return;
    };
    match handle(&attached, source, event.event_set()) {
        Ok(Progress::Done) => {}
        Ok(Progress::More(queue)) => slots.kick(slot, queue),
        Err(error) => {
            log::note(&format!(
                "device in slot {slot} needs a reset: {}",
                Report::new(&error)
            ));
            slots.fail(slot, generation);
        }
    }
}

/// Has the queue pair handle the event if the pair is in use, else the device.
fn handle(attached: &Attached, source: Source, ready: EventSet) -> Result<Progress, DeviceError> {
    let pair = match source {
        Source::Kick(queue) => pair_of(queue.into()),
        Source::Device(token) => pair_of(token),
    };
    if let Some(mut pair) = attached.pairs.get(pair).map(|pair| lock(pair))
        && pair.is_active()
    {
        return match source {
            Source::Kick(queue) => pair.on_kick(queue),
            Source::Device(token) => pair.on_event(token, ready),
        };
    }
    let mut device = lock(&attached.device);
    match source {
        Source::Kick(queue) => device.on_kick(queue),
        Source::Device(token) => device.on_event(token, ready),
    }
}

#[derive(Debug, Default)]
struct State {
    paused: bool,
    /// The thread is in the middle of events.
    serving: bool,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
    stopped: AtomicBool,
    wake: EventFd,
}

/// A thread that serves the devices of one set. It ends when this is dropped.
#[derive(Debug)]
pub struct Worker {
    control: Arc<Control>,
}

impl Worker {
    /// Starts serving the devices of `slots` that are watched through `epoll`, by a thread of this name
    /// that may call what is listed.
    ///
    /// # Errors
    /// When the host has no more threads or descriptors.
    pub fn start(
        name: String,
        list: &'static List,
        slots: Arc<Slots>,
        epoll: Arc<Epoll>,
    ) -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.ctl(
            ControlOperation::Add,
            std::os::fd::AsRawFd::as_raw_fd(&wake),
            EpollEvent::new(EventSet::IN, WAKE),
        )?;
        let control = Arc::new(Control {
            state: Mutex::default(),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
            wake,
        });
        let theirs = Arc::clone(&control);
        thread::Builder::new()
            .name(name.clone())
            .stack_size(STACK)
            .spawn(move || {
                list.apply_or_abort();
                if let Err(error) = theirs.run(&slots, &epoll) {
                    log::note(&format!("{name}: devices are not served any more: {error}"));
                }
            })?;
        Ok(Self { control })
    }

    /// Begins nothing more and waits until `deadline` for what is being served. False: it is not finished
    /// by then.
    pub fn pause(&self, deadline: Instant) -> bool {
        let mut state = lock(&self.control.state);
        state.paused = true;
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .control
            .changed
            .wait_timeout_while(state, left, |state| state.serving)
            .unwrap_or_else(PoisonError::into_inner);
        !state.serving
    }

    /// Goes on.
    pub fn resume(&self) {
        lock(&self.control.state).paused = false;
        self.control.changed.notify_all();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The thread is not waited for: it may be in the middle of I/O that never ends.
        self.control.stopped.store(true, Ordering::SeqCst);
        let _ = self.control.wake.write(1);
        self.control.changed.notify_all();
    }
}

impl Control {
    fn run(&self, slots: &Slots, epoll: &Epoll) -> io::Result<()> {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let count = wait(epoll, -1, &mut events)?;
            let mut state = lock(&self.state);
            while state.paused && !self.stopped.load(Ordering::SeqCst) {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.serving = true;
            drop(state);
            for event in events.iter().take(count) {
                if self.stopped.load(Ordering::SeqCst) {
                    return Ok(());
                }
                if event.data() != WAKE {
                    serve(slots, *event);
                }
            }
            lock(&self.state).serving = false;
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::epolls::Epolls;
    use crate::extent::FileExtent;
    use crate::legacy::ioapic::Ioapic;
    use crate::virtio::block::Block;
    use crate::virtio::block::disk::Disk;
    use crate::virtio::test_driver::{Nothing, memory};

    fn disk() -> Box<Block> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(512).unwrap();
        let extent = FileExtent {
            file: Arc::new(file),
            offset: 0,
            length: 512,
        };
        Box::new(Block::new(Disk::new(vec![extent], true).unwrap(), String::new()).unwrap())
    }

    /// Tells whether the disk in slot 1 has handled this many notifications within `patience`.
    fn has_handled(slots: &Slots, count: u64, patience: Duration) -> bool {
        let start = Instant::now();
        while slots.metrics()[0].notifications != count {
            if start.elapsed() > patience {
                return false;
            }
            thread::yield_now();
        }
        true
    }

    #[test]
    fn the_worker_serves_disks_unless_paused_and_ends_when_dropped() {
        let epolls = Epolls::new(Arc::new(Epoll::new().unwrap()), 1).unwrap();
        let ioapic = Arc::new(Ioapic::new(Nothing));
        let slots = Arc::new(Slots::new(&ioapic, memory(0x10000), epolls.clone()).unwrap());
        slots.attach(1, disk(), &Nothing).unwrap();
        let worker = Worker::start(
            "disks".to_owned(),
            &crate::seccomp::DISKS,
            Arc::clone(&slots),
            Arc::clone(&epolls.disks[0]),
        )
        .unwrap();
        let long = Duration::from_secs(10);
        for count in 1..4 {
            slots.kick(1, 0);
            assert!(
                has_handled(&slots, count, long),
                "every notification is one"
            );
        }
        assert!(worker.pause(Instant::now() + long));
        slots.kick(1, 0);
        assert!(!has_handled(&slots, 4, Duration::from_millis(300)));
        // A device can be taken out meanwhile; its events are forgotten.
        slots.detach(1, &Nothing).unwrap();
        slots.attach(1, disk(), &Nothing).unwrap();
        slots.kick(1, 0);
        worker.resume();
        assert!(has_handled(&slots, 1, long));
        assert_eq!(Arc::strong_count(&slots), 2);
        assert!(worker.pause(Instant::now() + long));
        drop(worker);
        let start = Instant::now();
        while Arc::strong_count(&slots) > 1 {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "the thread is still there"
            );
        }
    }

    /// The control thread pauses workers, and the daemon waits for the control thread.
    #[test]
    fn a_pause_does_not_wait_for_ever_for_io_that_does_not_end() {
        let epolls = Epolls::new(Arc::new(Epoll::new().unwrap()), 1).unwrap();
        let ioapic = Arc::new(Ioapic::new(Nothing));
        let slots = Arc::new(Slots::new(&ioapic, memory(0x10000), epolls.clone()).unwrap());
        slots.attach(1, disk(), &Nothing).unwrap();
        let disks = Arc::clone(&epolls.disks[0]);
        let worker = Worker::start(
            "disks".to_owned(),
            &crate::seccomp::DISKS,
            Arc::clone(&slots),
            disks,
        )
        .unwrap();
        let device = slots.find(1, 1).unwrap().device;
        let busy = lock(&device);
        slots.kick(1, 0);
        while !lock(&worker.control.state).serving {
            thread::yield_now();
        }
        thread::scope(|scope| {
            let (answers, answer) = mpsc::channel();
            let worker = &worker;
            scope.spawn(move || {
                answers.send(worker.pause(Instant::now() + Duration::from_millis(50)))
            });
            let paused = answer.recv_timeout(Duration::from_secs(10));
            drop(busy);
            assert!(!paused.expect("it waits"));
        });
        worker.resume();
        let long = Duration::from_secs(10);
        assert!(has_handled(&slots, 1, long));
        assert!(worker.pause(Instant::now() + long));
    }
}
