use std::io;

use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::virtio::counters::Counters;
use crate::virtio::device::{Kind, Progress};
use crate::virtio::registers::Registers;
use crate::virtio::state::RngState;
use crate::virtio::test_driver::memory;

const SIZES: [u16; 2] = [16, 8];
const OWN_FEATURE: u64 = 1 << 5;
/// With it the driver has one queue only.
const FEWER_QUEUES: u64 = 1 << 7;

/// What the test device was told.
#[derive(Debug, Default)]
struct Log {
    activated: Option<Activation>,
    resets: u32,
}

#[derive(Debug)]
struct Fake {
    log: Arc<Mutex<Log>>,
    fails: bool,
    active: Option<Activation>,
}

impl VirtioDevice for Fake {
    fn kind(&self) -> Kind {
        Kind::Rng
    }
    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn queues_for(&self, features: u64) -> usize {
        if features & FEWER_QUEUES == 0 { 2 } else { 1 }
    }
    fn features(&self) -> u64 {
        OWN_FEATURE | FEWER_QUEUES
    }
    fn config(&self) -> Vec<u8> {
        vec![5, 6, 7, 8, 9]
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.fails {
            return Err(DeviceError::Watch(io::ErrorKind::OutOfMemory.into()));
        }
        self.active = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        let mut log = lock(&self.log);
        log.resets += 1;
        log.activated = self.active.take();
    }
    fn queues(&self) -> Vec<QueueRecord> {
        Activation::records(self.active.as_ref())
    }
    fn on_kick(&mut self, _: u16) -> Result<Progress, DeviceError> {
        Ok(Progress::Done)
    }
    fn on_event(&mut self, _: u32, _: EventSet) -> Result<Progress, DeviceError> {
        Ok(Progress::Done)
    }
    fn counters(&self) -> Counters {
        Counters::default()
    }
    fn state(&self) -> DeviceState {
        DeviceState::Rng(RngState::default())
    }
}

#[derive(Debug, Default)]
struct Wire(AtomicU64);

impl Line for Wire {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Driver {
    transport: Transport,
    page: Page,
    log: Arc<Mutex<Log>>,
    wire: Arc<Wire>,
}

fn device(fails: bool) -> Driver {
    let log = Arc::new(Mutex::new(Log::default()));
    let wire = Arc::new(Wire::default());
    let fake = Fake {
        log: Arc::clone(&log),
        fails,
        active: None,
    };
    let kicks = SIZES
        .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
        .into();
    let page = Registers::new().unwrap().page(3);
    clear(&page);
    let transport = Transport::new(
        Box::new(fake),
        memory(0x10000),
        page.clone(),
        Arc::clone(&wire) as Arc<dyn Line>,
        kicks,
        Watcher::detached().unwrap(),
    );
    Driver {
        transport,
        page,
        log,
        wire,
    }
}

impl Driver {
    fn read(&self, offset: u64) -> u32 {
        self.page.get(offset)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self, value: u32) -> u32 {
        self.write(STATUS, value);
        self.read(STATUS)
    }

    fn accept(&mut self, features: u64) {
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
    }

    fn set_queue(&mut self, index: u32, size: u32, base: u32) {
        self.write(QUEUE_SELECT, index);
        for (register, value) in [
            (QUEUE_SIZE, size),
            (QUEUE_DESCRIPTORS_LOW, base),
            (QUEUE_DRIVER_LOW, base + 0x400),
            (QUEUE_DEVICE_LOW, base + 0x800),
            (QUEUE_READY, 1),
        ] {
            self.write(register, value);
        }
    }

    /// Brings the device to just before `DRIVER_OK`.
    fn prepare(&mut self) {
        self.status(ACKNOWLEDGE);
        self.status(ACKNOWLEDGE | DRIVER);
        self.accept(VERSION_1 | EVENT_IDX | OWN_FEATURE);
        assert_eq!(
            self.status(ACKNOWLEDGE | DRIVER | FEATURES_OK),
            ACKNOWLEDGE | DRIVER | FEATURES_OK
        );
        self.set_queue(0, 16, 0x1000);
        self.set_queue(1, 4, 0x2000);
    }

    fn go_live(&mut self) {
        self.prepare();
        assert_eq!(self.status(LIVE), LIVE);
    }

    fn records(&self) -> Vec<QueueRecord> {
        lock(self.transport.device()).queues()
    }
}

const LIVE: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn a_driver_finds_the_device_and_takes_it_into_use() {
    let mut driver = device(false);
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), Kind::Rng.id());
    driver.write(DEVICE_FEATURES_SELECT, 1);
    assert_eq!(driver.read(DEVICE_FEATURES), 1);
    driver.write(DEVICE_FEATURES_SELECT, 2);
    assert_eq!(driver.read(DEVICE_FEATURES), 0);
    driver.go_live();
    let records = driver.records();
    assert_eq!(
        (
            records[0].size,
            records[0].descriptors,
            records[0].event_idx
        ),
        (16, 0x1000, true)
    );
    assert_eq!(
        (records[1].size, records[1].avail, records[1].used),
        (4, 0x2400, 0x2800)
    );
    assert_eq!(driver.wire.0.load(Ordering::SeqCst), 0);
}

#[test]
fn steps_can_not_be_skipped_and_bits_not_taken_back() {
    let mut driver = device(false);
    assert_eq!(driver.status(DRIVER), 0);
    assert_eq!(driver.status(DRIVER_OK), 0);
    assert_eq!(driver.status(ACKNOWLEDGE | FEATURES_OK), ACKNOWLEDGE);
    assert_eq!(driver.status(ACKNOWLEDGE | DRIVER), ACKNOWLEDGE | DRIVER);
    assert_eq!(driver.status(DRIVER), ACKNOWLEDGE | DRIVER);
    // DRIVER_OK without FEATURES_OK.
    assert_eq!(
        driver.status(ACKNOWLEDGE | DRIVER | DRIVER_OK),
        ACKNOWLEDGE | DRIVER
    );
    assert!(lock(driver.transport.device()).queues().is_empty());
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for features in [
        0,
        OWN_FEATURE,
        VERSION_1 | 1 << 40,
        VERSION_1 | 1 << 6,
        u64::MAX,
    ] {
        let mut driver = device(false);
        driver.status(ACKNOWLEDGE);
        driver.status(ACKNOWLEDGE | DRIVER);
        driver.accept(features);
        assert_eq!(
            driver.status(ACKNOWLEDGE | DRIVER | FEATURES_OK),
            ACKNOWLEDGE | DRIVER,
            "{features:#x}"
        );
    }
}

#[test]
fn everything_is_frozen_once_the_driver_is_ready() {
    let mut driver = device(false);
    driver.go_live();
    let before = driver.records();
    driver.accept(VERSION_1);
    driver.set_queue(0, 32768, 0x4000);
    driver.write(QUEUE_SELECT, 1);
    driver.write(QUEUE_READY, 0);
    assert_eq!(driver.read(QUEUE_READY), 1);
    assert_eq!(driver.records(), before);
    assert_eq!(
        driver.transport.state().driver_features,
        VERSION_1 | EVENT_IDX | OWN_FEATURE
    );
    assert_eq!(driver.status(LIVE), LIVE);
    assert_eq!(lock(&driver.log).resets, 0);
}

#[test]
fn a_ready_queue_is_frozen_and_features_end_with_features_ok() {
    let mut driver = device(false);
    driver.prepare();
    driver.write(QUEUE_SELECT, 0);
    driver.write(QUEUE_SIZE, 8);
    driver.accept(VERSION_1);
    driver.status(LIVE);
    assert_eq!(driver.records()[0].size, 16);
    assert!(driver.records()[0].event_idx);
}

#[test]
fn queues_can_not_be_set_up_before_the_features() {
    let mut driver = device(false);
    driver.status(ACKNOWLEDGE);
    driver.status(ACKNOWLEDGE | DRIVER);
    driver.set_queue(0, 16, 0x1000);
    assert_eq!(driver.read(QUEUE_READY), 0);
}

#[test]
fn queues_that_are_not_valid_break_the_device() {
    type Change = fn(&mut Driver);
    let cases: [(&str, Change); 8] = [
        ("never set up", |d| d.write(QUEUE_READY, 0)),
        ("size zero", |d| d.set_queue(1, 0, 0x2000)),
        ("not a power of two", |d| d.set_queue(1, 3, 0x2000)),
        ("larger than offered", |d| d.set_queue(1, 16, 0x2000)),
        ("does not fit 16 bits", |d| d.set_queue(1, 0x10004, 0x2000)),
        ("not aligned", |d| d.set_queue(1, 4, 0x2001)),
        ("outside of memory", |d| d.set_queue(1, 4, 0xfff0)),
        ("beyond four GiB", |d| {
            d.write(QUEUE_DEVICE_HIGH, u32::MAX);
            d.write(QUEUE_READY, 1);
        }),
    ];
    for (case, change) in cases {
        let mut driver = device(false);
        driver.prepare();
        driver.write(QUEUE_SELECT, 1);
        driver.write(QUEUE_READY, 0);
        change(&mut driver);
        assert_eq!(driver.status(LIVE), LIVE | NEEDS_RESET, "{case}");
        assert!(
            lock(driver.transport.device()).queues().is_empty(),
            "{case}"
        );
        assert_eq!(driver.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
        // A reset makes it as good as new.
        assert_eq!(driver.status(0), 0);
        assert_eq!(driver.read(INTERRUPT_STATUS), 0);
        driver.go_live();
    }
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let mut driver = device(true);
    driver.prepare();
    assert_eq!(driver.status(LIVE), LIVE | NEEDS_RESET);
    assert_eq!(driver.wire.0.load(Ordering::SeqCst), 1);
}

#[test]
fn a_reset_is_done_when_the_write_returns() {
    let mut driver = device(false);
    driver.go_live();
    assert_eq!(driver.status(0), 0);
    assert_eq!(lock(&driver.log).resets, 1);
    assert!(lock(&driver.log).activated.is_some());
    assert_eq!(driver.read(QUEUE_READY), 0);
    assert_eq!(driver.transport.state().driver_features, 0);
    driver.go_live();
}

#[test]
fn a_failed_driver_can_only_reset() {
    let mut driver = device(false);
    driver.prepare();
    let failed = ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED;
    assert_eq!(driver.status(failed), failed);
    assert_eq!(driver.status(failed | DRIVER_OK), failed);
    assert!(lock(driver.transport.device()).queues().is_empty());
}

#[test]
fn a_change_of_the_configuration_stays_until_it_is_acknowledged() {
    let mut driver = device(false);
    driver.go_live();
    let interrupt = Arc::clone(driver.transport.interrupt());
    let generation = driver.read(CONFIG_GENERATION);
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
    interrupt.signal_queue();
    assert_eq!(driver.read(INTERRUPT_STATUS), INTERRUPT_QUEUE);
    interrupt.signal_config(&[1, 2]);
    let both = INTERRUPT_QUEUE | INTERRUPT_CONFIG;
    assert_eq!(driver.read(INTERRUPT_STATUS), both);
    assert_eq!(driver.read(CONFIG), 0x0807_0201);
    assert_ne!(driver.read(CONFIG_GENERATION), generation);
    driver.write(INTERRUPT_ACKNOWLEDGE, INTERRUPT_QUEUE);
    assert_eq!(driver.read(INTERRUPT_STATUS), both);
    driver.write(INTERRUPT_ACKNOWLEDGE, both);
    assert_eq!(driver.read(INTERRUPT_STATUS), INTERRUPT_QUEUE);
    assert_eq!(interrupt.raised(), 2);
    driver.status(0);
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
}

#[test]
fn notifications_of_queues_that_exist_reach_their_descriptor() {
    let mut driver = device(false);
    driver.go_live();
    driver.write(QUEUE_NOTIFY, 1);
    for queue in [2, 77, u32::MAX] {
        driver.write(QUEUE_NOTIFY, queue);
    }
    assert!(driver.transport.kicks()[0].read().is_err());
    assert_eq!(driver.transport.kicks()[1].read().unwrap(), 1);
}

#[test]
fn accesses_of_any_place_and_width_do_no_harm() {
    let mut driver = device(false);
    driver.go_live();
    for select in [0, 1, 2, u32::MAX] {
        driver.write(QUEUE_SELECT, select);
        for offset in 0..0x100 {
            for width in [1, 2, 4, 8] {
                if offset != STATUS {
                    driver.transport.write(offset, &vec![0xff; width]);
                }
            }
        }
    }
    assert_eq!(driver.read(STATUS), LIVE);
    assert_eq!(driver.read(0xb0), u32::MAX);
    assert_eq!(driver.records().len(), 2);
}

#[test]
fn configuration_is_not_written_by_drivers() {
    let mut driver = device(false);
    driver.go_live();
    driver.write(CONFIG, 1);
    assert_eq!(driver.read(CONFIG), 0x0807_0605);
    assert_eq!(driver.read(CONFIG + 4), 9);
}

#[test]
fn an_empty_slot_says_so() {
    let mut driver = device(false);
    driver.go_live();
    assert!(driver.transport.shut_down());
    assert_eq!((driver.read(0), driver.read(4)), (MAGIC, 2));
    assert!((8..SLOT_SIZE).step_by(4).all(|at| driver.read(at) == 0));
}

#[test]
fn a_live_device_survives_a_snapshot() {
    let mut driver = device(false);
    driver.go_live();
    driver.transport.interrupt().signal_config(&[1]);
    let json = serde_json::to_string(&driver.transport.state()).unwrap();
    let state: State = serde_json::from_str(&json).unwrap();

    let fresh = device(false);
    let wire = Arc::clone(&fresh.wire);
    let mut restored = fresh.transport.restore(&state).unwrap();
    assert_eq!(restored.state(), state);
    assert_eq!(wire.0.load(Ordering::SeqCst), 1);
    // It looks at its queues, because a notification may have been under way.
    assert!(restored.kicks().iter().all(|kick| kick.read().is_ok()));
    assert!(restored.shut_down());
    let activated = lock(&fresh.log).activated.take().unwrap();
    assert!(activated.has(5) && activated.queues.len() == 2);
}

#[test]
fn queues_that_the_features_need_not_have_are_left_alone() {
    let mut driver = device(false);
    driver.status(ACKNOWLEDGE | DRIVER);
    driver.accept(VERSION_1 | FEWER_QUEUES);
    driver.status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    driver.set_queue(0, 16, 0x1000);
    assert_eq!(driver.status(LIVE), LIVE);
    assert_eq!(driver.records().len(), 1);
    let state = driver.transport.state();
    assert_eq!(state.queues.len(), 2);
    assert!(state.queues[0].ready && !state.queues[1].ready);
    let restored = device(false).transport.restore(&state).unwrap();
    assert_eq!(restored.state(), state);
}

#[test]
fn a_device_that_is_not_live_survives_a_snapshot_as_it_is() {
    let mut driver = device(false);
    driver.prepare();
    let state = driver.transport.state();
    let restored = device(false).transport.restore(&state).unwrap();
    assert_eq!(restored.state(), state);
    assert!(lock(restored.device()).queues().is_empty());
}

#[test]
fn states_that_can_not_be_are_refused() {
    let mut driver = device(false);
    driver.go_live();
    let good = driver.transport.state();
    let refused = |change: fn(&mut State)| {
        let mut state = good.clone();
        change(&mut state);
        device(false).transport.restore(&state).unwrap_err()
    };
    assert!(matches!(
        refused(|s| s.queues.truncate(1)),
        RestoreError::Queues { .. }
    ));
    assert!(matches!(
        refused(|s| s.driver_features |= 1 << 50),
        RestoreError::Features(_)
    ));
    assert!(matches!(
        refused(|s| s.status = DRIVER_OK),
        RestoreError::Status(_)
    ));
    assert!(matches!(
        refused(|s| s.queues[0].size = 1 << 15),
        RestoreError::Activate(_)
    ));
    assert!(matches!(
        refused(|s| s.queues[0].used = !3),
        RestoreError::Activate(_)
    ));
}
