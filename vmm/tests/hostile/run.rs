//! A group of attacks in a VM, watched.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use hull_hostile_guest::PROGRAM;
use hull_hostile_guest::attack::{
    ALLOWED_MIB, CHANGING_SLOTS, CHANGING_SLOTS_COUNT, Group, Must, Outcome, PLUGGABLE_MIB,
    TARGETS, WISHES,
};
use hull_proto_vmm::{
    DeviceConfig, ErrorKind, ExitReason, ExitReport, Extent, FdIndex, Pluggable, Request, Response,
    VERSION, VmConfig,
};

use crate::support::{Code, Control, Vmm, config, content, wait_until};
use crate::watch::Possessions;
use crate::world::World;

const MEMORY_MIB: u64 = 32;
/// Bytes that the guest says of an attack: its outcome, and which devices work.
const SAID: usize = 3;
/// How long an attack may take, and the guest's check of all devices after it.
const ATTACK: Duration = Duration::from_secs(60);
/// How long a guest is waited for that may have overwritten itself.
const LOST: Duration = Duration::from_secs(12);
/// How long an answer of the control socket may take, and one to a request to pause: that waits for what devices
/// are in the midst of, twice five seconds at most.
const ANSWER: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_secs(12);
/// How much more memory the VMM may have than at its start.
const GROWTH_KIB: u64 = 8 << 10;

/// What is to be run.
pub struct Order {
    pub group: &'static Group,
    pub seed: u64,
    pub steps: u64,
}

/// Runs a group of attacks; returns what was wrong, and prints what came of each.
pub fn attack(order: &Order) -> Vec<String> {
    let mut world = World::new();
    let group = order.group;
    if group
        .attacks
        .iter()
        .any(|attack| attack.name.contains("net"))
        && world.there() & 16 == 0
    {
        return Vec::new();
    }
    let bystander = Bystander::start();
    let vmm = Vmm::start();
    let serial = start(&vmm, &world, order);
    let mut watched = Watched::new(&vmm, group.name == "slots");
    let mut failures = Vec::new();
    let mut last = Vec::new();
    let mut since = Instant::now();
    let must = |at: usize| group.attacks.get(at).map(|attack| attack.must);
    loop {
        let is_alive = watched.look();
        let said = content(&serial);
        if said.len() != last.len() {
            (last, since) = (said, Instant::now());
        }
        let done = last.len() / SAID;
        if !is_alive || watched.failures.len() > 3 {
            break;
        }
        let is_done = match must(done.min(group.attacks.len() - 1)) {
            Some(Must::Hang) => last == b"H" && since.elapsed() > Duration::from_secs(1),
            Some(Must::Panic) => false,
            Some(Must::Any) if since.elapsed() > LOST => true,
            _ => done >= group.attacks.len(),
        };
        if is_done {
            break;
        }
        if since.elapsed() > ATTACK {
            failures.push(format!(
                "{}: {}: it has no end",
                group.name, group.attacks[done].name
            ));
            break;
        }
    }
    failures.append(&mut watched.failures);
    world.hang_up();
    let (ended_itself, reason, message) = finish(vmm, &mut watched, &mut failures);
    for (at, attack) in group.attacks.iter().enumerate() {
        let said = last.get(SAID * at..).unwrap_or_default();
        let (outcome, wrong) = match (attack.must, said) {
            (Must::Be(must), [outcome, low, high, ..]) => {
                judge(must, *outcome, [*low, *high], world.there())
            }
            (Must::Hang, b"H") => ("stands still".to_owned(), ended_itself),
            (Must::Any, [outcome, low, high, ..]) => {
                judge(Outcome::Survived, *outcome, [*low, *high], world.there())
            }
            (Must::Any, ..) if !ended_itself => ("the guest lost itself".to_owned(), false),
            (must, ..) if ended_itself => (
                format!("the VM ends: {reason:?}: {}", shortened(&message)),
                match must {
                    Must::Shutdown => reason != ExitReason::GuestShutdown,
                    Must::End | Must::Any => {
                        !matches!(reason, ExitReason::GuestShutdown | ExitReason::KvmError)
                    }
                    Must::Panic => reason != ExitReason::GuestPanic || message.len() > 1000,
                    Must::Be(_) | Must::Hang => true,
                },
            ),
            _ => ("nothing was heard of it".to_owned(), true),
        };
        println!("{:<26} {:<66} {outcome}", group.name, attack.name);
        if wrong {
            let must = attack.must;
            failures.push(format!(
                "{}: {}: {outcome}, must be {must:?}",
                group.name, attack.name
            ));
            break;
        }
    }
    failures.extend(
        world
            .damage()
            .into_iter()
            .map(|damage| format!("{}: {damage}", group.name)),
    );
    failures.extend(bystander.is_well().err());
    watched.print(group.name, order.seed);
    failures
}

fn judge(must: Outcome, outcome: u8, works: [u8; 2], there: u16) -> (String, bool) {
    let works = u16::from_le_bytes(works);
    let name = match outcome {
        b'R' => "refused",
        b'N' => "needs a reset",
        b'S' => "survived",
        b'-' => "SKIPPED: no second processor",
        _ => "WRONG",
    };
    let broken: Vec<_> = (TARGETS.iter().enumerate())
        .filter(|(bit, _)| there & !works & 1 << bit != 0)
        .map(|(_, target)| target.name)
        .collect();
    if broken.is_empty() {
        let wrong = outcome != must as u8 && outcome != b'-';
        (format!("{name}; devices work"), wrong)
    } else {
        (
            format!("{name}; of no use any more: {}", broken.join(", ")),
            true,
        )
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(90).filter(|c| !c.is_control()).collect()
}

fn start(vmm: &Vmm, world: &World, order: &Order) -> File {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(PROGRAM).unwrap();
    let serial = tempfile::tempfile().unwrap();
    let mut fds = vec![&kernel, &serial];
    let (devices, more) = world.devices(2);
    fds.extend(more);
    let groups = &hull_hostile_guest::attacks::GROUPS;
    let number = groups
        .iter()
        .position(|group| std::ptr::eq(group, order.group));
    let config = VmConfig {
        vcpus: 2,
        boot_vcpus: 2,
        memory_mib: MEMORY_MIB,
        pluggable: Some(Pluggable {
            mib: PLUGGABLE_MIB,
            port: WISHES,
        }),
        cmdline: format!(
            "group={} seed={} steps={}",
            number.unwrap(),
            order.seed,
            order.steps
        ),
        devices,
        ..config()
    };
    let mut control = vmm.connect();
    control.order(&Request::Configure(Box::new(config)), &fds);
    control.order(&Request::Start, &[]);
    let plug = Request::Plug {
        least_mib: 0,
        most_mib: ALLOWED_MIB,
    };
    control.order(&plug, &[]);
    serial
}

/// A VMM under attack, as the daemon sees it.
struct Watched {
    control: Control,
    pid: u32,
    before: Possessions,
    most_kib: u64,
    slowest: Duration,
    slowest_pause: Duration,
    rounds: u32,
    /// Where devices come and go; which is there.
    changing: Option<[bool; CHANGING_SLOTS_COUNT as usize]>,
    failures: Vec<String>,
}

impl Watched {
    fn new(vmm: &Vmm, changing: bool) -> Self {
        let mut control = vmm.connect();
        control.0.set_read_timeout(Some(2 * PAUSE)).unwrap();
        // A connection that was closed is gone when the next one was answered.
        control.metrics();
        Self {
            control,
            pid: vmm.pid(),
            before: Possessions::of(vmm.pid(), MEMORY_MIB << 10).unwrap(),
            most_kib: 0,
            slowest: Duration::ZERO,
            slowest_pause: Duration::ZERO,
            rounds: 0,
            changing: changing.then_some([false; CHANGING_SLOTS_COUNT as usize]),
            failures: Vec::new(),
        }
    }

    /// Asks the VMM what a daemon asks. False: it has ended.
    fn look(&mut self) -> bool {
        self.rounds += 1;
        std::thread::sleep(Duration::from_millis(10));
        if let Some(mut there) = self.changing {
            for (at, there) in (0..).zip(&mut there) {
                if !self.change(CHANGING_SLOTS + at, there) {
                    return false;
                }
            }
            self.changing = Some(there);
        }
        let hello = Request::Hello { version: VERSION };
        let answered = self.ask(&hello, ANSWER) && self.ask(&Request::Metrics, ANSWER);
        if !answered {
            return false;
        }
        if self.rounds.is_multiple_of(16) {
            if let Some(now) = Possessions::of(self.pid, MEMORY_MIB << 10) {
                self.most_kib = self.most_kib.max(now.memory_kib);
                if now.memory_kib > self.before.memory_kib + GROWTH_KIB
                    || now.threads != self.before.threads
                {
                    self.failures
                        .push(format!("the VMM has {now:?}, had {:?}", self.before));
                }
            }
            return self.ask(&Request::Pause, PAUSE) && self.ask(&Request::Resume, ANSWER);
        }
        true
    }

    /// Attaches or detaches.
    fn change(&mut self, slot: u8, there: &mut bool) -> bool {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let extents = vec![Extent {
            file: FdIndex(0),
            offset: 0,
            length: 8192,
        }];
        let device = match self.rounds.wrapping_add(slot.into()) % 3 {
            0 => DeviceConfig::Rng,
            1 => DeviceConfig::Pmem { extents },
            _ => DeviceConfig::Block {
                serial: String::new(),
                readonly: false,
                extents,
            },
        };
        let request = if *there {
            Request::Detach { slot }
        } else {
            Request::Attach { slot, device }
        };
        match self.control.try_to_ask(&request, &[&file]) {
            Ok(Response::Ok) => *there = !*there,
            Ok(Response::Error {
                kind: ErrorKind::Busy,
                ..
            }) => {}
            Ok(other) => self.failures.push(format!("{request:?}: {other:?}")),
            Err(error) => return self.is_end(&error),
        }
        true
    }

    fn ask(&mut self, request: &Request, limit: Duration) -> bool {
        let start = Instant::now();
        let answer = self.control.try_to_ask(request, &[]);
        let took = start.elapsed();
        let slowest = match request {
            Request::Pause => &mut self.slowest_pause,
            _ => &mut self.slowest,
        };
        *slowest = took.max(*slowest);
        match answer {
            Err(error) => return self.is_end(&error),
            // What it began may take longer than it waits.
            Ok(Response::Error {
                kind: ErrorKind::Busy,
                ..
            }) if *request == Request::Pause => {}
            Ok(Response::Error { kind, message }) => {
                self.failures
                    .push(format!("{request:?}: {kind:?}: {message}"));
            }
            Ok(_) => {}
        }
        if took > limit {
            self.failures.push(format!("{request:?} took {took:?}"));
        }
        true
    }

    /// The connection is closed, or nobody answers.
    fn is_end(&mut self, error: &io::Error) -> bool {
        if [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&error.kind()) {
            self.failures.push("the VMM does not answer".to_owned());
        }
        false
    }

    fn print(&self, group: &str, seed: u64) {
        println!(
            "{group}: seed {seed}; answers within {:?}, to a pause within {:?}; {} KiB at the start, {} KiB at most",
            self.slowest, self.slowest_pause, self.before.memory_kib, self.most_kib
        );
    }
}

/// Ends the VM if it did not do so itself; returns whether it did, and its report.
fn finish(
    vmm: Vmm,
    watched: &mut Watched,
    failures: &mut Vec<String>,
) -> (bool, ExitReason, String) {
    let alive = watched.ask(&Request::Metrics, ANSWER);
    if alive {
        for slot in (0..CHANGING_SLOTS_COUNT).filter(|_| watched.changing.is_some()) {
            let detach = Request::Detach {
                slot: CHANGING_SLOTS + slot,
            };
            let _ = watched.control.try_to_ask(&detach, &[]);
        }
        // The clients' connections go with the next turn of the device.
        let mut now = watched.before;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            now = Possessions::of(watched.pid, MEMORY_MIB << 10).unwrap();
            if now.descriptors <= watched.before.descriptors {
                break;
            }
            watched.ask(&Request::Metrics, ANSWER);
            std::thread::sleep(Duration::from_millis(20));
        }
        if now.descriptors > watched.before.descriptors || now.threads != watched.before.threads {
            failures.push(format!("the VMM has {now:?}, had {:?}", watched.before));
        }
        watched.ask(&Request::Stop, ANSWER);
    }
    let (status, report) = vmm.wait_however_it_ends();
    if status.code().is_none() {
        failures.push(format!("the VMM ended by a signal: {status}"));
    }
    let report = report.unwrap_or_else(|error| {
        failures.push(format!("the VMM left no report: {error}, {status}"));
        ExitReport {
            reason: ExitReason::VmmError,
            message: status.to_string(),
        }
    });
    if alive && report.reason != ExitReason::Stopped {
        failures.push(format!("the VMM was to stop, and reports {report:?}"));
    }
    (!alive, report.reason, report.message)
}

/// Another VM, which must not notice anything.
struct Bystander {
    _vmm: Vmm,
    control: std::cell::RefCell<Control>,
}

impl Bystander {
    fn start() -> Self {
        let vmm = Vmm::start();
        let mut control = vmm.connect();
        // Reads a register of the IOAPIC for ever.
        control.boot(&Code::default().read(0xfec0_0000).raw(&[0xeb, 0xf7]));
        control.order(&Request::Pause, &[]);
        let control = std::cell::RefCell::new(control);
        Self { _vmm: vmm, control }
    }

    fn is_well(&self) -> Result<(), String> {
        let mut control = self.control.borrow_mut();
        let reads = |control: &mut Control| {
            let exits = control.metrics().exits;
            exits
                .iter()
                .find(|(name, _)| name == "mmio_read")
                .unwrap()
                .1
        };
        let before = reads(&mut control);
        control.order(&Request::Resume, &[]);
        wait_until(|| reads(&mut control) > before);
        Ok(())
    }
}
