//! What is left to the process of a running VM, read from /proc as root.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hull_proto_vmm::{DeviceConfig, Extent, FdIndex, Request};
use support::{Code, Control, USER, Vmm, has_kvm, make_known, wait_until};

fn process(vmm: &Vmm) -> PathBuf {
    Path::new("/proc").join(vmm.pid().to_string())
}

/// Lines of the form `Name: value` (proc_pid_status(5)).
fn status(of: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(of.join("status")).unwrap();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// What the descriptors of a process lead to, but for standard input, output and error, sorted. Of
/// sockets only that they are some.
fn descriptors(of: &Path) -> Vec<String> {
    let entries = fs::read_dir(of.join("fd")).unwrap();
    let mut targets: Vec<String> = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| {
            !["0", "1", "2"]
                .map(Some)
                .contains(&entry.file_name().to_str())
        })
        .map(|entry| {
            let target = fs::read_link(entry.path()).unwrap();
            let target = target.to_str().unwrap();
            match target.split_once(':') {
                Some(("socket", _)) => "socket".to_owned(),
                _ => target.to_owned(),
            }
        })
        .collect();
    targets.sort();
    targets
}

/// A VM with a disk, a control connection that is open, and the file of its console.
fn running() -> (Vmm, Control, File) {
    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let serial = control.boot(&Code::default().spin());
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let extents = vec![Extent {
        file: FdIndex(0),
        offset: 0,
        length: 1 << 20,
    }];
    let device = DeviceConfig::Block {
        serial: "disk".into(),
        readonly: false,
        extents,
    };
    control.order(&Request::Attach { slot: 1, device }, &[&disk]);
    (vmm, control, serial)
}

#[test]
fn nothing_of_the_host_is_left_to_a_vmm() {
    if !has_kvm() {
        return;
    }
    // As a daemon under systemd has it. It takes CAP_SYS_RESOURCE, which root of a container lacks.
    let _ = fs::write("/proc/self/oom_score_adj", "-500");
    let (vmm, _control, _serial) = running();
    let process = process(&vmm);
    let score = fs::read_to_string(process.join("oom_score_adj")).unwrap();
    assert_eq!(score.trim(), "0");
    let threads: Vec<PathBuf> = fs::read_dir(process.join("task"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(threads.len() >= 3, "{threads:?}");
    let user = format!("{USER}\t{USER}\t{USER}\t{USER}");
    for thread in &threads {
        let status = status(thread);
        let name = &status["Name"];
        for (key, wanted) in [
            ("Uid", user.as_str()),
            ("Gid", &user),
            ("Groups", ""),
            ("NoNewPrivs", "1"),
        ] {
            assert_eq!(status[key], wanted, "{key} of {name}");
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{set} of {name}");
        }
    }
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let id = |of: &Path| fs::read_link(of.join("ns").join(namespace)).unwrap();
        assert_ne!(id(&process), id(Path::new("/proc/self")), "{namespace}");
    }
    // Its root has nothing, and nothing can be made in it, not even by root.
    let root = process.join("root");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    let made = fs::write(root.join("x"), "").unwrap_err();
    assert_eq!(made.raw_os_error(), Some(libc::EROFS));
    let mounts = fs::read_to_string(process.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    // A process that can be dumped has files of its own user there.
    assert_eq!(fs::metadata(process.join("environ")).unwrap().uid(), 0);
    assert_eq!(fs::read(process.join("environ")).unwrap(), b"");
    let limits = fs::read_to_string(process.join("limits")).unwrap();
    for (name, value) in [
        ("Max core file size", "0"),
        ("Max processes", "512"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let numbers: Vec<&str> = line[name.len()..].split_whitespace().take(2).collect();
        assert_eq!(numbers, [value, value], "{line}");
    }
}

/// The whole list, so that one more is noticed.
#[test]
fn a_vmm_has_no_descriptor_that_it_does_not_need() {
    if !has_kvm() {
        return;
    }
    let (vmm, _control, _serial) = running();
    let mut open = descriptors(&process(&vmm));
    // Of the loop and of threads; they lead nowhere.
    open.retain(|target| {
        !["anon_inode:[eventfd]", "anon_inode:[eventpoll]"].contains(&target.as_str())
    });
    let of_the_host: Vec<String> = open
        .extract_if(.., |target| target.starts_with('/'))
        .collect();
    let (files, disks): (Vec<&str>, Vec<&str>) = of_the_host
        .iter()
        .map(String::as_str)
        .partition(|target| !target.ends_with(" (deleted)"));
    // The console and the disk.
    assert_eq!(disks.len(), 2, "{disks:?}");
    assert_eq!(files, [vmm.path("exit.json").to_str().unwrap()]);
    // The sockets are the control socket and its connection.
    let rest = [
        "anon_inode:[signalfd]",
        "anon_inode:kvm-vcpu:0",
        "anon_inode:kvm-vm",
        "socket",
        "socket",
    ];
    assert_eq!(open, rest);
}

/// What the parent left open is closed, and a VMM that nobody knows does nothing.
#[test]
fn a_vmm_whose_daemon_is_gone_ends_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hull-vmm"))
        .args(["run", "--id", "test", "--user", &USER.to_string()])
        .arg("--socket")
        .arg(directory.path().join("vmm.sock"))
        .arg("--exit-report")
        .arg(directory.path().join("exit.json"))
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It waits until it is known, and has made nothing.
    let process = Path::new("/proc").join(child.id().to_string());
    wait_until(|| {
        let waits = fs::read_to_string(process.join("wchan")).unwrap_or_default();
        waits.contains("pipe") || waits == "0"
    });
    assert_eq!(child.try_wait().unwrap(), None);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("wait to be known"), "{error}");
    assert!(!output.status.success());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_vmm_does_not_run_as_root() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_hull-vmm"))
        .args(["run", "--id", "test", "--user", "0"])
        .arg("--socket")
        .arg(directory.path().join("vmm.sock"))
        .arg("--exit-report")
        .arg(directory.path().join("exit.json"))
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    make_known(&mut child);
    assert!(!child.wait().unwrap().success());
    let report = fs::read_to_string(directory.path().join("exit.json")).unwrap();
    assert!(report.contains("root is not unprivileged"), "{report}");
}
