//! The real guest kernel with busybox: needs `$HULL_ASSETS/vmlinux`, busybox, mkfs.erofs and a
//! /dev/kvm that can run it, as the KVM host of the tests has.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use hull_proto_vmm::{DeviceConfig, Extent, FdIndex, Request, RestoreConfig, VmConfig};
use tempfile::TempDir;

use super::{Control, Vmm, content, wait_until};

const APPLETS: [&str; 28] = [
    "sh", "mount", "umount", "echo", "cat", "grep", "cut", "ls", "seq", "sleep", "dd", "md5sum",
    "reboot", "sync", "wc", "rm", "cp", "mkdir", "test", "[", "tail", "nproc", "ip", "nc", "cmp",
    "taskset", "touch", "uniq",
];
const PROLOGUE: &str = "#!/bin/sh\n\
    export PATH=/bin\n\
    mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev; mount -t tmpfs t /tmp\n\
    exec >/dev/ttyS0 2>&1\n";

/// A guest under test.
pub struct Linux {
    /// Its VMM.
    pub vmm: Vmm,
    /// A connection to it.
    pub control: Control,
    /// Those of its configuration: kernel, console, root, disks.
    files: Vec<File>,
    devices: Vec<(u8, DeviceConfig)>,
    _root: TempDir,
}

/// Boots the kernel with a script as /init, beside these disks with the devices of `config`, which need no files.
/// None, with a note, where that is not possible.
pub fn boot(script: &str, config: &VmConfig, disks: &[(u8, &File, bool)]) -> Option<Linux> {
    let needs = prerequisites();
    let (kernel, busybox) = match &needs {
        Ok(found) => found,
        Err(why) => {
            println!("SKIPPED: Linux guest: {why}");
            return None;
        }
    };
    let root = TempDir::new().unwrap();
    let image = make_root(root.path(), busybox, script);
    let serial = tempfile::tempfile().unwrap();

    let vmm = Vmm::start();
    let mut control = vmm.connect();
    let mut files = vec![
        File::open(kernel).unwrap(),
        serial,
        File::open(image).unwrap(),
    ];
    let mut devices = vec![(1, DeviceConfig::Rng), (2, disk(&files[2], 2, true))];
    for (slot, file, readonly) in disks {
        devices.push((*slot, disk(file, files.len() as u32, *readonly)));
        files.push(file.try_clone().unwrap());
    }
    devices.extend(config.devices.iter().cloned());
    let cmdline = format!(
        "root=/dev/vda rootfstype=erofs ro init=/init quiet loglevel=1 {}",
        config.cmdline
    );
    let config = VmConfig {
        kernel: FdIndex(0),
        serial: Some(FdIndex(1)),
        cmdline,
        devices: devices.clone(),
        ..config.clone()
    };
    control.order(
        &Request::Configure(Box::new(config)),
        &Vec::from_iter(&files),
    );
    control.order(&Request::Start, &[]);
    Some(Linux {
        vmm,
        control,
        files,
        devices,
        _root: root,
    })
}

impl Linux {
    /// Returns what the guest printed.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&content(&self.files[1])).replace('\r', "")
    }

    /// Has the guest go on in another process, with the same files.
    pub fn moved(mut self) -> Self {
        let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        self.control.order(&Request::Pause, &[]);
        let label = String::from("linux");
        let save = Request::Save {
            label: label.clone(),
            state: FdIndex(0),
            memory: FdIndex(1),
            changed: None,
        };
        self.control.order(&save, &[&state, &memory]);
        self.control.order(&Request::Stop, &[]);
        self.vmm.wait();

        self.vmm = Vmm::start();
        self.control = self.vmm.connect();
        let config = RestoreConfig {
            label,
            state: FdIndex(0),
            memory: FdIndex(self.files.len() as u32),
            written: vec![0..2 << 20, 16 << 20..18 << 20],
            pluggable: None,
            serial: Some(FdIndex(1)),
            devices: self.devices.clone(),
        };
        let mut files = vec![&state];
        files.extend(&self.files[1..]);
        files.push(&memory);
        let restore = Request::Restore(Box::new(config));
        self.control.order(&restore, &files);
        self.control.order(&Request::Start, &[]);
        self
    }

    /// Waits until the guest has printed `text`.
    pub fn wait_for(&self, text: &str) {
        wait_until(|| self.output().contains(text));
    }
}

/// Makes a disk of a whole file.
pub fn disk(file: &File, index: u32, readonly: bool) -> DeviceConfig {
    let length = file.metadata().unwrap().len();
    let extents = vec![Extent {
        file: FdIndex(index),
        offset: 0,
        length,
    }];
    DeviceConfig::Block {
        serial: format!("disk{index}"),
        readonly,
        extents,
    }
}

/// Opens a new tap of this name, once for each queue.
pub fn tap(name: &str, queues: usize) -> Vec<File> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let open = |_| {
        let mut tun = File::options();
        let tun = tun.read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        let set = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        tun
    };
    (0..queues).map(open).collect()
}

/// Runs a shell script on the host that must succeed.
pub fn host(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn prerequisites() -> Result<(PathBuf, PathBuf), String> {
    let assets = std::env::var_os("HULL_ASSETS").ok_or("$HULL_ASSETS is not set")?;
    let kernel = Path::new(&assets).join("vmlinux");
    if !kernel.exists() {
        return Err(format!("there is no {}", kernel.display()));
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.exists());
    let busybox = busybox.ok_or("there is no busybox")?;
    if Command::new("mkfs.erofs").arg("-V").output().is_err() {
        return Err("there is no mkfs.erofs".to_owned());
    }
    let probe = Command::new(env!("CARGO_BIN_EXE_hull-vmm"))
        .arg("probe")
        .output()
        .unwrap();
    if !probe.status.success() {
        return Err(String::from_utf8_lossy(&probe.stdout).trim().to_owned());
    }
    Ok((kernel, busybox))
}

fn make_root(directory: &Path, busybox: &Path, script: &str) -> PathBuf {
    let tree = directory.join("root");
    for name in ["bin", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(tree.join(name)).unwrap();
    }
    fs::copy(busybox, tree.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    let init = tree.join("init");
    fs::write(&init, format!("{PROLOGUE}{script}\nreboot -f\n")).unwrap();
    fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let image = directory.join("root.erofs");
    let made = Command::new("mkfs.erofs")
        .arg("--quiet")
        .args([&image, &tree])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    image
}
