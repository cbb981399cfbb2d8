//! Devices added to a running VM through empty slots, and what a VMM says at its end.

use std::{
    fs::{self, File, OpenOptions},
    os::fd::OwnedFd,
    os::unix::fs::OpenOptionsExt,
    process::Command,
};

use hull_proto_agent::agent::{
    AttachDeviceRequest, AttachStorageRequest, ConfigureRequest, DetachDeviceRequest,
    DetachStorageRequest, Interface, StatsRequest,
};
use hull_proto_vmm::{
    DeviceConfig, ErrorKind, ExitReason, FdIndex, Request, Response, SLOTS, VmConfig,
};
use ttrpc::context::{Context, with_timeout};

use crate::harness::vm::{Vm, asset, block, disk};

fn within() -> Context {
    with_timeout(120_000_000_000)
}

fn attach(slot: u8) -> AttachStorageRequest {
    AttachStorageRequest {
        id: format!("disk{slot}"),
        slot: u32::from(slot),
        fstype: "erofs".into(),
        readonly: true,
        ..Default::default()
    }
}

#[tokio::test]
async fn every_slot_takes_a_disk_and_lines_are_shared() {
    let (mut vm, agent) = Vm::boot().await;
    let root = asset("root.erofs");
    // 29 disks on 19 interrupt lines, all mounted at the same time.
    for slot in 3..SLOTS {
        let (file, extents) = disk(&root, 0);
        let device = block(&format!("disk{slot}"), extents);
        vm.done(&Request::Attach { slot, device }, &[file]);
    }
    let all = (3..SLOTS).map(|slot| {
        let agent = agent.clone();
        async move {
            let answer = agent.attach_storage(within(), &attach(slot)).await;
            (slot, answer.unwrap_or_else(|e| panic!("slot {slot}: {e}")))
        }
    });
    let tasks: Vec<_> = all.map(tokio::spawn).collect();
    let mut devices = std::collections::BTreeSet::new();
    for task in tasks {
        let (slot, answer) = task.await.unwrap();
        assert!(answer.device.starts_with("/dev/vd"), "{slot}: {answer:?}");
        devices.insert(answer.device);
    }
    assert_eq!(devices.len(), usize::from(SLOTS) - 3);
    let metrics = vm.metrics();
    for slot in 3..SLOTS {
        let device = metrics.devices.iter().find(|d| d.slot == slot).unwrap();
        assert!(device.requests > 0 && device.errors == 0, "{device:?}");
    }

    // A slot is used again and again.
    for _ in 0..5 {
        let slot = 30;
        let detach = DetachStorageRequest {
            id: format!("disk{slot}"),
            ..Default::default()
        };
        agent.detach_storage(within(), &detach).await.unwrap();
        vm.done(&Request::Detach { slot }, &[]);
        let (file, extents) = disk(&root, 0);
        let device = block("again", extents);
        vm.done(&Request::Attach { slot, device }, &[file]);
        agent.attach_storage(within(), &attach(slot)).await.unwrap();
    }
    let (file, extents) = disk(&root, 0);
    let device = block("twice", extents);
    let taken = vm.request(&Request::Attach { slot: 30, device }, &[file]);
    assert!(
        matches!(
            taken,
            Response::Error {
                kind: ErrorKind::Busy,
                ..
            }
        ),
        "{taken:?}"
    );
}

#[tokio::test]
async fn a_network_interface_is_added_and_removed() {
    let (mut vm, agent) = Vm::boot().await;
    let mac = "02:00:00:00:00:07";
    // Slot 22 shares the line of slot 3, which holds a disk in use.
    let (file, extents) = disk(&asset("root.erofs"), 0);
    vm.done(
        &Request::Attach {
            slot: 3,
            device: block("disk3", extents),
        },
        &[file],
    );
    agent.attach_storage(within(), &attach(3)).await.unwrap();
    for round in 0..3 {
        let tap = tap("hull-e2etap");
        let device = DeviceConfig::Net {
            taps: vec![FdIndex(0)],
            mac: [2, 0, 0, 0, 0, 7],
            mtu: Some(1400),
        };
        vm.done(&Request::Attach { slot: 22, device }, &[tap]);
        let request = AttachDeviceRequest {
            slot: 22,
            ..Default::default()
        };
        let answer = agent.attach_device(within(), &request).await.unwrap();
        assert_eq!(answer.driver, "virtio_net");

        for command in [
            "ip link set hull-e2etap up mtu 1400",
            "ip address add 10.87.0.1/24 dev hull-e2etap",
        ] {
            let status = Command::new("sh").args(["-c", command]).status().unwrap();
            assert!(status.success(), "{command}");
        }
        let configure = ConfigureRequest {
            sandbox_id: "hot".into(),
            hostname: "hot".into(),
            interfaces: vec![Interface {
                mac: mac.into(),
                name: "eth0".into(),
                mtu: 1400,
                addresses: vec!["10.87.0.2/24".into()],
                ..Default::default()
            }],
            ..Default::default()
        };
        agent.configure(within(), &configure).await.unwrap();
        // Packets of the largest size, both ways.
        let ping = "ping -c 5 -i 0.2 -W 5 -s 1372 -M do 10.87.0.2";
        let output = Command::new("sh").args(["-c", ping]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(" 0% packet loss"), "round {round}: {text}");

        let request = DetachDeviceRequest {
            slot: 22,
            ..Default::default()
        };
        agent.detach_device(within(), &request).await.unwrap();
        vm.done(&Request::Detach { slot: 22 }, &[]);
    }
}

/// A new tap: the one before went with the device that held it.
fn tap(name: &str) -> OwnedFd {
    let _ = Command::new("ip").args(["link", "del", name]).output();
    hull_network::tap::open(name, 1).unwrap().remove(0)
}

#[tokio::test]
async fn the_end_of_a_vm_is_reported() {
    let (mut vm, agent) = Vm::boot().await;
    // The answer may be lost with the guest.
    let _ = agent.shutdown(within(), &Default::default()).await;
    assert_eq!(vm.exit_report().reason, ExitReason::GuestShutdown);

    let (mut vm, _) = Vm::boot().await;
    vm.done(&Request::Stop, &[]);
    assert_eq!(vm.exit_report().reason, ExitReason::Stopped);

    let (mut vm, _) = Vm::boot().await;
    let pid = vm.child.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(killed.success());
    assert_eq!(vm.exit_report().reason, ExitReason::Stopped);
}

#[tokio::test]
async fn a_paused_vm_does_nothing_until_it_is_resumed() {
    let (mut vm, agent) = Vm::boot().await;
    vm.done(&Request::Pause, &[]);
    vm.done(&Request::Pause, &[]);
    let exits = |vm: &mut Vm| vm.metrics().exits.iter().map(|(_, n)| n).sum::<u64>();
    let before = exits(&mut vm);
    let request = StatsRequest::default();
    let late = agent.stats(with_timeout(1_000_000_000), &request).await;
    assert!(late.is_err(), "a paused guest has answered");
    assert_eq!(exits(&mut vm), before);
    vm.done(&Request::Resume, &[]);
    agent.stats(within(), &request).await.unwrap();
}

#[tokio::test]
async fn nonsense_on_the_control_socket_harms_nothing() {
    let mut vm = Vm::spawn();
    let start = vm.request(&Request::Start, &[]);
    assert!(
        matches!(
            start,
            Response::Error {
                kind: ErrorKind::State,
                ..
            }
        ),
        "{start:?}"
    );
    // No ELF file.
    let config = VmConfig {
        vcpus: 1,
        boot_vcpus: 1,
        memory_mib: 64,
        pluggable: None,
        kernel: FdIndex(0),
        initrd: None,
        cmdline: String::new(),
        serial: None,
        devices: Vec::new(),
    };
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("kernel"), vec![0x90; 8192]).unwrap();
    let no_kernel: OwnedFd = File::open(dir.path().join("kernel")).unwrap().into();
    let configure = Request::Configure(Box::new(config.clone()));
    let answer = vm.request(&configure, &[no_kernel]);
    let answer = match answer {
        Response::Ok => vm.request(&Request::Start, &[]),
        other => other,
    };
    assert!(matches!(answer, Response::Error { .. }), "{answer:?}");

    // A descriptor that was not sent, an unknown slot, no memory for it.
    let mut vm = Vm::spawn();
    assert!(matches!(
        vm.request(&configure, &[]),
        Response::Error { .. }
    ));
    let huge = VmConfig {
        memory_mib: 1 << 40,
        ..config
    };
    let kernel = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_CLOEXEC)
        .open(asset("vmlinux"));
    let huge = Request::Configure(Box::new(huge));
    let mut answer = vm.request(&huge, &[kernel.unwrap().into()]);
    if answer == Response::Ok {
        answer = vm.request(&Request::Start, &[]);
    }
    assert!(matches!(answer, Response::Error { .. }), "{answer:?}");
}
