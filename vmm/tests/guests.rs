//! Tiny hand-written guests on the real /dev/kvm, through the real process and its control socket.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

use hull_proto_vmm::{
    DeviceConfig, ErrorKind, ExitReason, Extent, FdIndex, Metrics, Request, Response,
    RestoreConfig, VmConfig, VmState,
};

use rustix::process::{Pid, Signal, kill_process};
use support::{Code, Control, Vmm, config, content, has_kvm, wait_until};

const SLOT: u32 = 0xd000_0000;
const SLOT_SIZE: u32 = 0x1000;
const IOAPIC: u32 = 0xfec0_0000;
const DEVICE_ID: u32 = 8;
const STATUS: u32 = 0x70;
/// A virtual address behind RAM, the entry of the page tables that maps it, and the first file region.
const VIEW: u32 = 0x4000_0000;
const VIEW_ENTRY: u32 = 0xc000;
const FILE_REGION: u64 = 0x1_0800_0000;

fn refused(response: &Response) -> ErrorKind {
    match response {
        Response::Error { kind, message } => {
            println!("refused: {message}");
            *kind
        }
        other => panic!("{other:?}"),
    }
}

fn exits(metrics: &Metrics, reason: &str) -> u64 {
    metrics
        .exits
        .iter()
        .find(|(name, _)| name == reason)
        .unwrap()
        .1
}

fn disk(readonly: bool) -> DeviceConfig {
    let extents = vec![Extent {
        file: FdIndex(0),
        offset: 0,
        length: 4096,
    }];
    DeviceConfig::Block {
        serial: "disk".into(),
        readonly,
        extents,
    }
}

fn empty_disk() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    file
}

#[test]
fn a_guest_prints_and_dies() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let serial = control.boot(
        &Code::default()
            .load(u32::from_le_bytes(*b"Hull"))
            .print()
            .die(),
    );
    let (status, report) = vmm.wait();
    assert!(status.success());
    assert_eq!(report.reason, ExitReason::GuestShutdown);
    assert_eq!(content(&serial), b"Hull");
    assert!(control.answer().is_err(), "the connection is closed");
}

#[test]
fn a_guest_finds_slots_and_their_devices() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let code = Code::default()
        .read(SLOT)
        .print()
        // No guest changes what registers read as but by what they do.
        .write(SLOT + SLOT_SIZE + DEVICE_ID, 7)
        .read(SLOT + SLOT_SIZE + DEVICE_ID)
        .print()
        .read(SLOT + 2 * SLOT_SIZE + DEVICE_ID)
        .print()
        .read(SLOT + 31 * SLOT_SIZE + DEVICE_ID)
        .print()
        .die();
    let serial = tempfile::tempfile().unwrap();
    let config = VmConfig {
        devices: vec![(1, DeviceConfig::Rng)],
        ..config()
    };
    control.order(
        &Request::Configure(Box::new(config)),
        &[&code.kernel(), &serial],
    );
    control.order(&Request::Start, &[]);
    vmm.wait();
    assert_eq!(
        content(&serial),
        *[*b"virt", [4, 0, 0, 0], [0; 4], [0; 4]].as_flattened()
    );
}

#[test]
fn nothing_is_all_ones() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let code = Code::default()
        .write(0xe000_0000, 1)
        .read(0xe000_0000)
        .print()
        .load(7)
        .port_out(0x1234)
        .port_in(0x1234)
        .print()
        .port_in(0x71)
        .print()
        .die();
    let serial = vmm.connect().boot(&code);
    assert_eq!(vmm.wait().1.reason, ExitReason::GuestShutdown);
    assert_eq!(
        content(&serial),
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
    );
}

#[test]
fn the_ways_of_a_pc_to_reset_work() {
    if !has_kvm() {
        return;
    }
    for (port, value) in [(0x64, 0xfe), (0xcf9, 6)] {
        let vmm = Vmm::start();
        vmm.connect()
            .boot(&Code::default().load(value).port_out(port).spin());
        assert_eq!(vmm.wait().1.reason, ExitReason::GuestShutdown);
    }
}

#[test]
fn a_kernel_that_panics_is_told_from_one_that_shuts_down() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let text = "[    0.1] Kernel panic - not syncing: no way\n\0\0\0";
    let code = text
        .as_bytes()
        .as_chunks::<4>()
        .0
        .iter()
        .fold(Code::default(), |code, bytes| {
            code.load(u32::from_le_bytes(*bytes)).print()
        });
    vmm.connect().boot(&code.die());
    let (status, report) = vmm.wait();
    assert!(!status.success());
    assert_eq!(
        (report.reason, report.message.as_str()),
        (ExitReason::GuestPanic, "guest kernel panic: no way")
    );
}

#[test]
fn running_off_into_nowhere_is_a_kvm_error() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    // mov eax, …; jmp rax
    vmm.connect()
        .boot(&Code::default().load(0xe000_0000).raw(&[0xff, 0xe0]));
    let (status, report) = vmm.wait();
    assert!(!status.success());
    assert_eq!(report.reason, ExitReason::KvmError);
    assert!(
        report.message.contains("KVM_EXIT_INTERNAL_ERROR"),
        "{}",
        report.message
    );
}

#[test]
fn devices_come_and_go_while_the_guest_runs() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let place = SLOT + 5 * SLOT_SIZE;
    let serial = control.boot(
        &Code::default()
            .read_until_nonzero(place + DEVICE_ID)
            .print()
            .write(place + STATUS, 1)
            .write(place + STATUS, 3)
            .read(place + STATUS)
            .print()
            .spin(),
    );
    let file = empty_disk();
    control.order(
        &Request::Attach {
            slot: 5,
            device: disk(true),
        },
        &[&file],
    );
    wait_until(|| content(&serial).len() == 8);
    assert_eq!(content(&serial), [2, 0, 0, 0, 3, 0, 0, 0]);
    let again = control.ask(
        &Request::Attach {
            slot: 5,
            device: DeviceConfig::Rng,
        },
        &[],
    );
    assert_eq!(refused(&again), ErrorKind::Busy);
    assert_eq!(control.metrics().devices[0].kind, "block");
    control.order(&Request::Detach { slot: 5 }, &[]);
    assert_eq!(
        refused(&control.ask(&Request::Detach { slot: 5 }, &[])),
        ErrorKind::Invalid
    );
    assert!(control.metrics().devices.is_empty());
    control.order(
        &Request::Attach {
            slot: 5,
            device: DeviceConfig::Rng,
        },
        &[],
    );
    control.order(&Request::Stop, &[]);
    assert_eq!(vmm.wait().1.reason, ExitReason::Stopped);
}

/// Code that maps the first file region and waits until slot 5 has a device.
fn read_a_file_region() -> Code {
    let entry = FILE_REGION | 0x83;
    Code::default()
        .write(VIEW_ENTRY, entry as u32)
        .write(VIEW_ENTRY + 4, (entry >> 32) as u32)
        .read_until_nonzero(SLOT + 5 * SLOT_SIZE + DEVICE_ID)
        .print()
}

/// A file of two pages, and pmem that shows the second one first.
fn pmem() -> (File, DeviceConfig) {
    let mut file = tempfile::tempfile().unwrap();
    for text in [b"one.", b"two."] {
        file.write_all(&text.repeat(1024)).unwrap();
    }
    let extent = |offset| Extent {
        file: FdIndex(0),
        offset,
        length: 4096,
    };
    let extents = vec![extent(4096), extent(0)];
    (file, DeviceConfig::Pmem { extents })
}

#[test]
fn a_guest_reads_files_as_memory_and_what_it_writes_is_lost() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let serial = control.boot(
        &read_a_file_region()
            .read(VIEW)
            .print()
            .write(VIEW, 7)
            .read(VIEW)
            .print()
            .read(VIEW + 4096)
            .print()
            .read(VIEW + 8192)
            .print()
            .read_until_nonzero(SLOT + 6 * SLOT_SIZE + DEVICE_ID)
            .read(VIEW)
            .print()
            .die(),
    );
    let (file, device) = pmem();
    control.order(&Request::Attach { slot: 5, device }, &[&file]);
    wait_until(|| content(&serial).len() == 20);
    assert_eq!(
        content(&serial),
        *[[27, 0, 0, 0], *b"two.", *b"two.", *b"one.", [0; 4]].as_flattened()
    );
    assert!(content(&file).ends_with(b"two."));
    let maps = format!("/proc/{}/maps", vmm.pid());
    let shows_files = || fs::read_to_string(&maps).unwrap().contains("(deleted)");
    assert!(shows_files());
    control.order(&Request::Detach { slot: 5 }, &[]);
    assert!(!shows_files());
    let device = DeviceConfig::Rng;
    control.order(&Request::Attach { slot: 6, device }, &[]);
    vmm.wait();
    assert_eq!(
        content(&serial)[20..],
        [0xff; 4],
        "nothing is there any more"
    );
}

#[test]
fn a_file_that_is_cut_ends_the_vm_that_uses_it_and_the_report_says_so() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let serial = control.boot(
        &read_a_file_region()
            .read_until_nonzero(SLOT + 6 * SLOT_SIZE + DEVICE_ID)
            .read(VIEW)
            .print()
            .die(),
    );
    let (file, device) = pmem();
    control.order(&Request::Attach { slot: 5, device }, &[&file]);
    file.set_len(0).unwrap();
    let device = DeviceConfig::Rng;
    control.order(&Request::Attach { slot: 6, device }, &[]);
    let (_, report) = vmm.wait();
    if content(&serial)[4..] == [0xff; 4] {
        println!("SKIPPED: KVM of this host emulates the guest, and finds nothing there");
        return;
    }
    assert_eq!(report.reason, ExitReason::KvmError);
    assert!(
        report.message.contains("an image's file was cut"),
        "{report:?}"
    );
}

#[test]
fn a_paused_guest_stands_still() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    // Reads a register that is no memory for ever: jmp back over the read and itself.
    control.boot(&Code::default().read(IOAPIC).raw(&[0xeb, 0xf7]));
    wait_until(|| exits(&control.metrics(), "mmio_read") > 100);
    for _ in 0..20 {
        control.order(&Request::Pause, &[]);
        control.order(&Request::Pause, &[]);
        let before = exits(&control.metrics(), "mmio_read");
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(exits(&control.metrics(), "mmio_read"), before);
        control.order(&Request::Resume, &[]);
        control.order(&Request::Resume, &[]);
        wait_until(|| exits(&control.metrics(), "mmio_read") > before);
    }
    control.order(&Request::Pause, &[]);
    let hello = control.ask(&Request::Hello { version: 1 }, &[]);
    assert!(matches!(
        hello,
        Response::Hello {
            state: VmState::Paused,
            ..
        }
    ));
    // Also a paused VM can be stopped.
    control.order(&Request::Stop, &[]);
    assert_eq!(vmm.wait().1.reason, ExitReason::Stopped);
}

/// Saves a paused VM as `label`.
fn save(control: &mut Control, label: &str) -> Snapshot {
    let snapshot = Snapshot {
        state: tempfile::tempfile().unwrap(),
        memory: tempfile::tempfile().unwrap(),
        written: Vec::new(),
    };
    let saved = snapshot.save(control, label, None);
    assert_eq!(saved, Response::Ok);
    snapshot
}

/// What a VM was saved to.
struct Snapshot {
    state: File,
    memory: File,
    /// What is said of what the guest will write.
    written: Vec<Range<u64>>,
}

impl Snapshot {
    fn save(
        &self,
        control: &mut Control,
        label: &str,
        changed: Option<Vec<Range<u64>>>,
    ) -> Response {
        let save = Request::Save {
            label: label.into(),
            state: FdIndex(0),
            memory: FdIndex(1),
            changed,
        };
        control.ask(&save, &[&self.state, &self.memory])
    }

    /// Asks a VMM to go on with it; serial output goes to `serial`, what devices have is from descriptor 3 on.
    fn restore(
        &self,
        control: &mut Control,
        label: &str,
        serial: &File,
        devices: &[(u8, DeviceConfig)],
        files: &[&File],
    ) -> Response {
        let config = RestoreConfig {
            label: label.into(),
            state: FdIndex(0),
            memory: FdIndex(1),
            written: self.written.clone(),
            pluggable: None,
            serial: Some(FdIndex(2)),
            devices: devices.to_vec(),
        };
        let own = [&self.state, &self.memory, serial];
        control.ask(&Request::Restore(Box::new(config)), &[&own, files].concat())
    }
}

/// Code that counts in memory and in a register, and prints the number now and then. It stops when the two
/// differ.
fn count() -> Code {
    Code::default()
        // mov r8d, 0x200000; xor r9d, r9d
        .raw(&[0x41, 0xb8, 0x00, 0x00, 0x20, 0x00, 0x45, 0x31, 0xc9])
        // again: inc r9d; inc dword [r8]; cmp r9d, [r8]; jne $
        .raw(&[0x41, 0xff, 0xc1, 0x41, 0xff, 0x00, 0x45, 0x3b, 0x08])
        .raw(&[0x75, 0xfe])
        // test r9d, 0xfff; jnz again; mov eax, r9d
        .raw(&[0x41, 0xf7, 0xc1, 0xff, 0x0f, 0x00, 0x00, 0x75, 0xec])
        .raw(&[0x44, 0x89, 0xc8])
        .print()
        // jmp again: over 23 bytes, what print() is, and itself.
        .raw(&[0xe9])
        .raw(&(-(23i32 + 36 + 5)).to_le_bytes())
}

/// The numbers that [`count`] printed.
fn counted(serial: &File) -> Vec<u32> {
    numbers(&content(serial))
}

/// Those in bytes of it. The last one may have been printed in part.
fn numbers(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|word| u32::from_le_bytes(*word) >> 12).collect()
}

#[test]
fn a_guest_that_was_saved_goes_on_in_other_processes_and_in_its_own() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let serial = control.boot(&count());
    wait_until(|| counted(&serial).len() > 2);
    assert_eq!(
        refused(&control.ask(
            &Request::Save {
                label: String::new(),
                state: FdIndex(0),
                memory: FdIndex(1),
                changed: None,
            },
            &[&serial, &serial]
        )),
        ErrorKind::State,
        "it runs"
    );
    let ahead = tempfile::tempfile().unwrap();
    let copy = Request::Copy { memory: FdIndex(0) };
    let Response::Copied(parts) = control.ask(&copy, &[&ahead]) else {
        panic!("it runs, and the file is empty");
    };
    let [part] = &parts[..] else {
        panic!("{parts:?}");
    };
    assert_eq!((part.offset, part.length), (0, 32 << 20));
    assert_ne!(part.address, 0);
    let again = control.ask(&copy, &[&ahead]);
    assert_eq!(refused(&again), ErrorKind::Invalid, "it is not empty");
    control.order(&Request::Pause, &[]);
    assert_eq!(
        refused(&control.ask(&copy, &[&ahead])),
        ErrorKind::State,
        "it stands still"
    );
    let printed = content(&serial);
    let before = *numbers(&printed).last().unwrap();
    let mut snapshot = save(&mut control, "count");
    // What the guest counts in is all that changes.
    let mut ahead = Snapshot {
        state: tempfile::tempfile().unwrap(),
        memory: ahead,
        written: Vec::new(),
    };
    for wrong in [0..1, 0..64 << 20, 4096..4096] {
        let saved = ahead.save(&mut control, "count", Some(vec![0..4096, wrong]));
        assert_eq!(refused(&saved), ErrorKind::Invalid);
        ahead.state = tempfile::tempfile().unwrap();
    }
    let changed = Some(vec![0..0x1000, 0x20_0000..0x20_1000]);
    let saved = ahead.save(&mut control, "count", changed);
    assert_eq!(saved, Response::Ok);
    assert!(content(&ahead.memory) == content(&snapshot.memory));
    let empty = tempfile::tempfile().unwrap();
    let empty = Snapshot {
        state: tempfile::tempfile().unwrap(),
        memory: empty,
        written: Vec::new(),
    };
    let saved = empty.save(&mut control, "count", Some(Vec::new()));
    assert_eq!(refused(&saved), ErrorKind::Invalid, "nothing is in it");
    let blocks = snapshot.memory.metadata().unwrap().blocks();
    assert!(blocks < 4096, "{blocks} blocks: zeros are holes");
    let memory = content(&snapshot.memory);
    // Its own process goes on, and others do from the same state; none sees what another writes.
    control.order(&Request::Resume, &[]);
    for written in [vec![], vec![0..4096, 2 << 20..(2 << 20) + 4096]] {
        snapshot.written = written;
        let clone = Vmm::start();
        let mut control = clone.connect();
        let serial = tempfile::tempfile().unwrap();
        let restored = snapshot.restore(&mut control, "count", &serial, &[], &[]);
        assert_eq!(restored, Response::Ok);
        assert!(content(&serial).is_empty(), "it does not run yet");
        control.order(&Request::Start, &[]);
        // It may have been saved in the middle of a number.
        let counted = || numbers(&[&printed[..], &content(&serial)].concat());
        wait_until(|| counted().contains(&(before + 2)));
        assert!(
            counted().is_sorted_by(|a, b| a + 1 == *b),
            "{:?}",
            counted()
        );
        control.order(&Request::Stop, &[]);
    }
    wait_until(|| counted(&serial).contains(&(before + 2)));
    let all = counted(&serial);
    assert!(all.is_sorted_by(|a, b| a + 1 == *b), "{all:?}");
    assert!(content(&snapshot.memory) == memory);
    control.order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn a_snapshot_of_something_else_is_refused_and_the_vmm_can_be_used_all_the_same() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let kernel = Code::default().spin().kernel();
    let serial = tempfile::tempfile().unwrap();
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempfile().unwrap());
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    let listener = File::from(std::os::fd::OwnedFd::from(listener));
    let devices = [
        (
            0,
            DeviceConfig::Vsock {
                cid: 3,
                listener: FdIndex(3),
            },
        ),
        (7, DeviceConfig::Rng),
    ];
    let mut configured = VmConfig {
        devices: devices.to_vec(),
        ..config()
    };
    configured.devices[0].1 = DeviceConfig::Vsock {
        cid: 3,
        listener: FdIndex(2),
    };
    let configure = Request::Configure(Box::new(configured));
    control.order(&configure, &[&kernel, &serial, &listener]);
    control.order(&Request::Start, &[]);
    control.order(&Request::Pause, &[]);
    let snapshot = save(&mut control, "this");
    control.order(&Request::Stop, &[]);
    vmm.wait();

    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let mut refusal =
        |snapshot: &Snapshot, label: &str, devices: &[(u8, DeviceConfig)]| match snapshot.restore(
            &mut control,
            label,
            &serial,
            devices,
            &[&listener],
        ) {
            Response::Error {
                kind: ErrorKind::Invalid,
                message,
            } => {
                println!("refused: {message}");
                assert_eq!(message.lines().count(), 1);
                message
            }
            other => panic!("{other:?}"),
        };
    assert!(refusal(&snapshot, "that", &devices).contains(r#"of "this", not of "that""#));
    let missing = refusal(&snapshot, "this", &devices[..1]);
    assert!(missing.contains("slots [0, 7], and [0] are given"));
    let swapped = [(7, devices[0].1.clone()), (0, DeviceConfig::Rng)];
    assert!(refusal(&snapshot, "this", &swapped).contains("not the one that was saved"));
    let copy = |memory: &File| Snapshot {
        state: snapshot.state.try_clone().unwrap(),
        memory: memory.try_clone().unwrap(),
        written: Vec::new(),
    };
    let mut odd = copy(&snapshot.memory);
    odd.written = vec![0..4096, 4096..4097];
    assert!(refusal(&odd, "this", &devices).contains("0x1000..0x1001 are no whole pages"));
    let mut short = copy(&tempfile::tempfile().unwrap());
    short.memory.set_len(33 << 20).unwrap();
    assert!(refusal(&short, "this", &devices).contains("34603008 bytes instead of 32 MiB"));
    other.set_len(4096).unwrap();
    short.state = other;
    assert!(refusal(&short, "this", &devices).contains("no snapshot"));
    assert_eq!(
        snapshot.restore(&mut control, "this", &serial, &devices, &[&listener]),
        Response::Ok
    );
    let again = snapshot.restore(&mut control, "this", &serial, &devices, &[&listener]);
    assert_eq!(refused(&again), ErrorKind::State);
    control.order(&Request::Start, &[]);
    assert_eq!(control.metrics().devices.len(), 2);
    control.order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn a_second_processor_waits_to_be_woken_and_does_not_hold_anything_up() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let serial = tempfile::tempfile().unwrap();
    let config = VmConfig {
        vcpus: 4,
        ..config()
    };
    let code = Code::default().read_until_nonzero(SLOT + DEVICE_ID);
    control.order(
        &Request::Configure(Box::new(config)),
        &[&code.kernel(), &serial],
    );
    control.order(&Request::Start, &[]);
    control.order(&Request::Pause, &[]);
    control.order(&Request::Resume, &[]);
    control.order(&Request::Stop, &[]);
    assert_eq!(vmm.wait().1.reason, ExitReason::Stopped);
}

#[test]
fn sigterm_stops_the_vm_in_any_state() {
    let terminate = |vmm: &Vmm| {
        let pid = Pid::from_raw(vmm.pid() as i32).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
    };
    let vmm = Vmm::start();
    terminate(&vmm);
    let (status, report) = vmm.wait();
    assert!(status.success());
    assert_eq!(report.reason, ExitReason::Stopped);
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    vmm.connect().boot(&Code::default().spin());
    terminate(&vmm);
    assert_eq!(vmm.wait().1.reason, ExitReason::Stopped);
}

#[test]
fn a_configuration_that_is_not_possible_has_no_effect() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let kernel = Code::default().die().kernel();
    let text = File::open("/etc/os-release").unwrap();
    let extents = |file, offset, length| {
        vec![Extent {
            file: FdIndex(file),
            offset,
            length,
        }]
    };
    let block = |extents| DeviceConfig::Block {
        serial: String::new(),
        readonly: true,
        extents,
    };
    let cases: Vec<(&str, VmConfig, ErrorKind)> = vec![
        (
            "not a kernel",
            VmConfig {
                kernel: FdIndex(2),
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "no such descriptor",
            VmConfig {
                kernel: FdIndex(9),
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "no vCPU",
            VmConfig {
                vcpus: 0,
                boot_vcpus: 0,
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "more at boot than there are",
            VmConfig {
                boot_vcpus: 2,
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "too little memory",
            VmConfig {
                memory_mib: 31,
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "memory beyond all",
            VmConfig {
                memory_mib: u64::MAX,
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "memory that the host lacks",
            VmConfig {
                memory_mib: 1 << 20,
                ..config()
            },
            ErrorKind::NoResources,
        ),
        (
            "a long command line",
            VmConfig {
                cmdline: "x".repeat(4096),
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "an initrd that does not fit",
            VmConfig {
                initrd: Some(FdIndex(3)),
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "no such slot",
            VmConfig {
                devices: vec![(32, DeviceConfig::Rng)],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "two in a slot",
            VmConfig {
                devices: vec![(1, DeviceConfig::Rng), (1, DeviceConfig::Rng)],
                ..config()
            },
            ErrorKind::Busy,
        ),
        (
            "a disk without extents",
            VmConfig {
                devices: vec![(1, block(vec![]))],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "a disk beyond its file",
            VmConfig {
                devices: vec![(1, block(extents(2, 0, 1 << 30)))],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "memory of half a page",
            VmConfig {
                devices: vec![(
                    1,
                    DeviceConfig::Pmem {
                        extents: extents(3, 0, 512),
                    },
                )],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "memory beyond its file",
            VmConfig {
                devices: vec![(
                    1,
                    DeviceConfig::Pmem {
                        extents: extents(3, 0, 1 << 30),
                    },
                )],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "a tap that is a file",
            VmConfig {
                devices: vec![(
                    1,
                    DeviceConfig::Net {
                        taps: vec![FdIndex(2)],
                        mac: [2; 6],
                        mtu: None,
                    },
                )],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "a network card without a tap",
            VmConfig {
                devices: vec![(
                    1,
                    DeviceConfig::Net {
                        taps: Vec::new(),
                        mac: [2; 6],
                        mtu: None,
                    },
                )],
                ..config()
            },
            ErrorKind::Invalid,
        ),
        (
            "a reserved context id",
            VmConfig {
                devices: vec![(
                    1,
                    DeviceConfig::Vsock {
                        cid: 2,
                        listener: FdIndex(2),
                    },
                )],
                ..config()
            },
            ErrorKind::Invalid,
        ),
    ];
    let serial = tempfile::tempfile().unwrap();
    let large = tempfile::tempfile().unwrap();
    large.set_len(40 << 20).unwrap();
    let descriptors = || {
        let all = fs::read_dir(format!("/proc/{}/fd", vmm.pid()));
        all.unwrap().count()
    };
    let fresh = descriptors();
    for (case, config, kind) in cases {
        let response = control.ask(
            &Request::Configure(Box::new(config)),
            &[&kernel, &serial, &text, &large],
        );
        let told = refused(&response);
        // A host that has promised the memory leaves it to KVM to refuse it.
        let is_late = case.starts_with("memory that") && told == ErrorKind::Kvm;
        assert!(told == kind || is_late, "{case}: {response:?}");
        assert_eq!(
            refused(&control.ask(&Request::Start, &[])),
            ErrorKind::State,
            "{case}"
        );
    }
    assert_eq!(descriptors(), fresh, "nothing was kept");
    control.boot(&Code::default().die());
    assert_eq!(vmm.wait().1.reason, ExitReason::GuestShutdown);
}

#[test]
fn requests_out_of_turn_are_refused() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    for request in [
        Request::Start,
        Request::Pause,
        Request::Resume,
        Request::Detach { slot: 0 },
        Request::Attach {
            slot: 0,
            device: DeviceConfig::Rng,
        },
    ] {
        assert_eq!(
            refused(&control.ask(&request, &[])),
            ErrorKind::State,
            "{request:?}"
        );
    }
    assert_eq!(control.metrics(), Metrics::default());
    control.boot(&Code::default().spin());
    for request in [Request::Start, Request::Configure(Box::new(config()))] {
        assert_eq!(refused(&control.ask(&request, &[])), ErrorKind::State);
    }
    control.order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn a_connection_starts_with_hello_and_survives_garbage() {
    let vmm = Vmm::start();
    let mut control = vmm.connect_silently();
    assert_eq!(
        refused(&control.ask(&Request::Stop, &[])),
        ErrorKind::Invalid
    );
    control.0.write_all(&[2, 0, 0, 0, b'{', b'}']).unwrap();
    assert_eq!(refused(&control.answer().unwrap()), ErrorKind::Invalid);
    control.0.write_all(&u32::MAX.to_le_bytes()).unwrap();
    assert_eq!(refused(&control.answer().unwrap()), ErrorKind::Invalid);
    assert!(
        control.answer().is_err(),
        "there is no way to find the next message"
    );
    vmm.connect().order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn connections_are_independent_and_their_number_is_bounded() {
    let vmm = Vmm::start();
    let mut silent = vmm.connect_silently();
    silent.0.write_all(&[7]).unwrap();
    let mut many: Vec<_> = (0..7).map(|_| vmm.connect()).collect();
    let mut refused = vmm.connect_silently();
    assert!(refused.answer().is_err());
    many.pop();
    drop(silent);
    wait_until(|| {
        let mut next = vmm.connect_silently();
        let frame = hull_proto_vmm::encode(&Request::Hello { version: 1 }).unwrap();
        next.0.write_all(&frame).is_ok() && next.answer().is_ok()
    });
    many[0].order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn a_client_that_reads_no_answers_holds_nobody_up() {
    let vmm = Vmm::start();
    let mut greedy = vmm.connect();
    greedy.0.set_nonblocking(true).unwrap();
    let frame = hull_proto_vmm::encode(&Request::Metrics).unwrap();
    let mut sent = 0;
    while greedy.0.write(&frame).is_ok() && sent < 200_000 {
        sent += 1;
    }
    vmm.connect().order(&Request::Stop, &[]);
    assert_eq!(vmm.wait().1.reason, ExitReason::Stopped);
}

#[test]
fn a_vsock_listener_and_a_disk_are_given_up_when_detached() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    control.boot(&Code::default().spin());
    let path = vmm.path("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let listener = File::from(std::os::fd::OwnedFd::from(listener));
    control.order(
        &Request::Attach {
            slot: 0,
            device: DeviceConfig::Vsock {
                cid: 3,
                listener: FdIndex(0),
            },
        },
        &[&listener],
    );
    let file = empty_disk();
    control.order(
        &Request::Attach {
            slot: 4,
            device: disk(false),
        },
        &[&file],
    );
    let count = || {
        fs::read_dir(format!("/proc/{}/fd", vmm.pid()))
            .unwrap()
            .count()
    };
    let with_devices = count();
    control.order(&Request::Detach { slot: 0 }, &[]);
    control.order(&Request::Detach { slot: 4 }, &[]);
    // Kicks of four queues, acknowledgements of two devices, the listener, its timer, the disk.
    assert_eq!(with_devices - count(), 9);
    control.order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn the_start_is_measured() {
    if !has_kvm() {
        return;
    }
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    control.boot(&Code::default().spin());
    wait_until(|| {
        control
            .metrics()
            .start_ns
            .iter()
            .any(|(phase, _)| phase == "total")
    });
    let metrics = control.metrics();
    let phases: Vec<&str> = metrics
        .start_ns
        .iter()
        .map(|(phase, _)| phase.as_str())
        .collect();
    println!("{:?}", metrics.start_ns);
    let all = ["jail", "memory", "kvm", "kernel_load", "devices", "total"];
    assert_eq!(phases, all);
    assert!(metrics.start_ns.iter().all(|(_, time)| *time > 0));
    control.order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn nobody_else_may_use_the_control_socket() {
    use std::os::unix::fs::PermissionsExt;
    let vmm = Vmm::start();
    let mode = fs::metadata(vmm.path("vmm.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    vmm.connect().order(&Request::Stop, &[]);
    vmm.wait();
}

#[test]
fn the_probe_answers_in_words() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_hull-vmm"))
        .arg("probe")
        .output()
        .unwrap();
    let answer = String::from_utf8(output.stdout).unwrap();
    println!("{answer}");
    if output.status.success() {
        assert_eq!(answer, "/dev/kvm runs microVMs\n");
    } else {
        assert!(answer.contains("/dev/kvm"), "{answer}");
    }
    let mut rest = String::new();
    output.stderr.as_slice().read_to_string(&mut rest).unwrap();
}
