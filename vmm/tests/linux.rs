//! The real guest kernel in the real VMM.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;

use hull_proto_vmm::{DeviceConfig, ExitReason, FdIndex, Metrics, Pluggable, Request, VmConfig};

use support::linux::{boot, disk, host, tap};
use support::{config, wait_until};

const MIB: usize = 1 << 20;

fn machine(memory_mib: u64) -> VmConfig {
    VmConfig {
        memory_mib,
        ..config()
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

/// A file of bytes that differ from block to block.
fn patterned(bytes: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..bytes as u32 / 4)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    file.write_all(&data).unwrap();
    file
}

#[test]
fn linux_starts_and_ends_without_pit_pic_keyboard_acpi_and_pci() {
    let script = "echo up $(cut -d' ' -f1 /proc/uptime); grep . /sys/devices/system/clocksource/clocksource0/current_clocksource\n\
        cat /sys/devices/system/cpu/cpuidle/current_driver /sys/devices/system/cpu/cpuidle/current_governor\n\
        cat /proc/interrupts; sleep 1; echo done";
    let Some(mut guest) = boot(script, &machine(128), &[]) else {
        return;
    };
    guest.wait_for("up ");
    let metrics = guest.control.metrics();
    println!("{metrics:?}");
    // A register of a missing device that is polled costs thousands.
    let total: u64 = metrics.exits.iter().map(|(_, count)| count).sum();
    assert!(total < 2500, "{total} exits to user space until init");
    // Registers of devices are read as memory; what is left reads the IOAPIC.
    let reads = exits(&metrics, "mmio_read");
    assert!(reads < 200, "{reads} reads");
    guest.wait_for("done");
    let output = guest.output();
    assert!(
        output.contains("kvm-clock") || output.contains("tsc"),
        "{output}"
    );
    // Else every idle period would stop the tick.
    assert!(output.contains("haltpoll\nmenu"), "{output}");
    let (_, report) = guest.vmm.wait();
    assert_eq!(report.reason, ExitReason::GuestShutdown, "reboot=t");
}

#[test]
fn a_kernel_without_root_panics_and_says_why() {
    let config = VmConfig {
        cmdline: "root=/dev/vdz".into(),
        ..machine(128)
    };
    let Some(guest) = boot("", &config, &[]) else {
        return;
    };
    let (_, report) = guest.vmm.wait();
    assert_eq!(report.reason, ExitReason::GuestPanic);
    assert!(report.message.contains("VFS"), "{}", report.message);
}

#[test]
fn processors_come_online_when_asked() {
    let script = "echo before $(nproc); echo 1 > /sys/devices/system/cpu/cpu2/online\n\
        echo 1 > /sys/devices/system/cpu/cpu1/online; echo after $(nproc) $(cat /sys/devices/system/cpu/online)";
    let config = VmConfig {
        vcpus: 4,
        ..machine(128)
    };
    let Some(guest) = boot(script, &config, &[]) else {
        return;
    };
    guest.wait_for("after 3 0-2");
    assert!(guest.output().contains("before 1\n"));
    assert_eq!(guest.vmm.wait().1.reason, ExitReason::GuestShutdown);
}

#[test]
fn memory_goes_on_above_the_gap() {
    let script = "echo kib $(grep MemTotal /proc/meminfo)\n\
        dd if=/dev/zero of=/tmp/x bs=1M count=64 && echo written";
    let Some(guest) = boot(script, &machine(3584), &[]) else {
        return;
    };
    guest.wait_for("written");
    let output = guest.output();
    let total: u64 = output
        .lines()
        .find_map(|l| {
            l.strip_prefix("kib MemTotal: ")?
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .unwrap();
    assert!(total > 3400 << 10, "{total} KiB");
    assert_eq!(guest.vmm.wait().1.reason, ExitReason::GuestShutdown);
}

#[test]
fn memory_comes_and_goes_and_what_is_free_is_the_hosts() {
    let script = "total() { grep MemTotal /proc/meminfo | grep -o '[0-9]*'; }\n\
        first=$(total); echo up\n\
        while test $(total) -lt $((first + 250000)); do sleep 0.1; done; echo more\n\
        mount -o remount,size=300m /tmp; dd if=/dev/zero of=/tmp/x bs=1M count=200 2>/dev/null; echo full; sleep 2; rm /tmp/x; echo free\n\
        while test $(total) -gt $((first + 1000)); do sleep 0.1; done; echo less; sleep 600";
    let config = VmConfig {
        memory_mib: 128,
        pluggable: Some(Pluggable {
            mib: 1024,
            port: 1 << 28,
        }),
        cmdline: "memory_hotplug.online_policy=auto-movable".into(),
        devices: vec![(6, DeviceConfig::Memory), (7, DeviceConfig::Balloon)],
        ..config()
    };
    let Some(mut guest) = boot(script, &config, &[]) else {
        return;
    };
    let resident = |guest: &support::linux::Linux| {
        let path = format!("/proc/{}/statm", guest.vmm.pid());
        let text = std::fs::read_to_string(path).unwrap();
        let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        pages >> 8
    };
    guest.wait_for("up");
    let plug = |guest: &mut support::linux::Linux, mib| {
        let (least_mib, most_mib) = (mib, mib);
        let request = Request::Plug {
            least_mib,
            most_mib,
        };
        guest.control.order(&request, &[]);
    };
    plug(&mut guest, 256);
    guest.wait_for("more");
    assert_eq!(guest.control.metrics().plugged_mib, (256, 256));
    let idle = resident(&guest);
    guest.wait_for("full");
    let full = resident(&guest);
    assert!(full > idle + 150, "{idle} MiB, then {full}");
    guest.wait_for("free");
    wait_until(|| resident(&guest) < idle + 50);
    println!("{idle} MiB idle, {full} full, {} free", resident(&guest));
    plug(&mut guest, 0);
    guest.wait_for("less");
    wait_until(|| guest.control.metrics().plugged_mib == (0, 0));
    println!("{} MiB unplugged", resident(&guest));
}

#[test]
fn disks_on_one_line_work_at_the_same_time_through_pauses() {
    // Slots 4 and 23 have the same line.
    let (one, other, target) = (patterned(16 * MIB), patterned(8 * MIB), patterned(MIB));
    let script = "cd /tmp; echo go\n\
        md5sum < /dev/vdb > b & md5sum < /dev/vdc > c & dd if=/dev/vdc of=/dev/vdd bs=64k count=16 oflag=direct & wait\n\
        dd if=/dev/vdd of=/dev/null bs=1M iflag=direct; echo sums $(cut -c1-32 b) $(cut -c1-32 c) $(grep -c . /proc/interrupts)\n\
        sync; echo finished; sleep 600";
    let Some(mut guest) = boot(
        script,
        &machine(256),
        &[(4, &one, true), (23, &other, true), (24, &target, false)],
    ) else {
        return;
    };
    guest.wait_for("go");
    let before = guest.control.metrics();
    let mut pauses = 0;
    while !guest.output().contains("finished") {
        guest.control.order(&Request::Pause, &[]);
        guest.control.order(&Request::Resume, &[]);
        pauses += 1;
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    println!("{pauses} pauses");
    let after = guest.control.metrics();
    let interrupts = |metrics: &Metrics| metrics.devices.iter().map(|d| d.interrupts).sum::<u64>();
    let interrupts = interrupts(&after) - interrupts(&before);
    let writes = exits(&after, "mmio_write") - exits(&before, "mmio_write");
    println!("{interrupts} interrupts, {writes} writes that the VMM handled");
    assert!(
        writes < interrupts / 2,
        "notifications and acknowledgements are KVM's"
    );
    let expected = format!("sums {} {} ", md5sum(&one), md5sum(&other));
    assert!(
        guest.output().contains(&expected),
        "{} {expected}",
        guest.output()
    );
    let mut written = vec![0; MIB];
    target.read_exact_at(&mut written, 0).unwrap();
    let mut source = vec![0; MIB];
    other.read_exact_at(&mut source, 0).unwrap();
    assert!(
        written == source,
        "what the guest wrote is on the host's disk"
    );
    assert!(
        guest
            .control
            .metrics()
            .devices
            .iter()
            .all(|device| device.errors == 0)
    );
    guest.control.order(&Request::Stop, &[]);
    guest.vmm.wait();
}

/// Two processors, timers, floating point, and requests of disks that are on their way when it is saved.
#[test]
fn linux_goes_on_in_other_processes() {
    let disk = patterned(8 * MIB);
    let script = "cd /tmp; echo go\n\
        (n=0; while [ ! -e end ]; do dd if=/dev/vdb bs=64k iflag=direct 2>/dev/null | md5sum | cut -c1-32 >> sums; done) &\n\
        for i in $(seq 30); do echo tick $i $(cut -d' ' -f1 /proc/uptime); sleep 0.1; done\n\
        touch end; wait; echo online $(nproc) sums $(uniq sums) random $(dd if=/dev/hwrng bs=4 count=1 2>/dev/null | wc -c) end";
    let config = VmConfig {
        vcpus: 2,
        boot_vcpus: 2,
        ..machine(128)
    };
    let Some(mut guest) = boot(script, &config, &[(4, &disk, true)]) else {
        return;
    };
    for tick in [3, 12, 20] {
        guest.wait_for(&format!("tick {tick} "));
        guest = guest.moved();
    }
    guest.wait_for(" end\n");
    let output = guest.output();
    println!("{output}");
    let ticks = output.lines().filter_map(|line| {
        let (number, uptime) = line.strip_prefix("tick ")?.split_once(' ')?;
        Some((number.parse::<u32>().ok()?, uptime.parse::<f64>().ok()?))
    });
    let (numbers, uptimes): (Vec<_>, Vec<_>) = ticks.unzip();
    assert_eq!(numbers, Vec::from_iter(1..=30));
    let steps = || uptimes.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(
        steps().all(|step| step > 0.0),
        "time goes back: {uptimes:?}"
    );
    assert_eq!(
        output.lines().last().unwrap(),
        format!("online 2 sums {} random 4 end", md5sum(&disk))
    );
    assert_eq!(guest.vmm.wait().1.reason, ExitReason::GuestShutdown);
}

fn md5sum(file: &File) -> String {
    let output = std::process::Command::new("md5sum")
        .stdin(rewound(file))
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

fn rewound(file: &File) -> File {
    use std::io::Seek;
    let mut copy = file.try_clone().unwrap();
    copy.rewind().unwrap();
    copy
}

#[test]
fn disks_come_and_go_by_themselves() {
    let script = "cd /sys/bus/platform; echo ready; n=0\n\
        while [ $n -lt 10 ]; do\n\
          s=$((4 + n % 28)); until [ -e /sys/block/vdb ]; do echo virtio-mmio.$s > drivers_probe; done\n\
          echo cycle $n $(md5sum < /dev/vdb | cut -c1-32) $(cat /sys/block/vdb/ro)\n\
          echo virtio-mmio.$s > drivers/virtio-mmio/unbind; [ -e /sys/block/vdb ] || echo gone $n; n=$((n+1))\n\
        done";
    let Some(mut guest) = boot(script, &machine(128), &[]) else {
        return;
    };
    guest.wait_for("ready");
    let file = patterned(MIB);
    for round in 0..10u8 {
        let slot = 4 + round % 28;
        guest.control.order(
            &Request::Attach {
                slot,
                device: disk(&file, 0, round % 2 == 0),
            },
            &[&file],
        );
        guest.wait_for(&format!("gone {round}\n"));
        guest.control.order(&Request::Detach { slot }, &[]);
    }
    assert_eq!(guest.vmm.wait().1.reason, ExitReason::GuestShutdown);
}

/// What each flow carries, there and back.
const FLOW: usize = 256 << 10;

/// Sends back what comes, flow by flow.
fn echo(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut bytes = vec![0; FLOW];
                stream.read_exact(&mut bytes).unwrap();
                stream.write_all(&bytes).unwrap();
            });
        }
    });
}

#[test]
fn flows_use_all_pairs_of_a_card() {
    // Four flows of each CPU at the same time; twice, with another driver.
    let script = format!(
        "cd /sys/bus/platform; echo ready; dd if=/dev/urandom of=/tmp/sent bs={FLOW} count=1 2>/dev/null\n\
         for n in 1 2; do\n\
           until [ -e /sys/class/net/eth0 ]; do echo virtio-mmio.5 > drivers_probe; done\n\
           ip address add 10.89.0.2/24 dev eth0; ip link set eth0 up\n\
           echo queues $n $(cd /sys/class/net/eth0/queues; echo *)\n\
           for i in 1 2 3 4 5 6 7 8; do\n\
             taskset $((1 + i % 2)) nc 10.89.0.1 7000 < /tmp/sent > /tmp/got.$i &\n\
           done; wait\n\
           echo same $n $(for i in 1 2 3 4 5 6 7 8; do cmp -s /tmp/sent /tmp/got.$i && echo $i; done)\n\
           echo virtio-mmio.5 > drivers/virtio-mmio/unbind; rm /tmp/got.*; [ -e /sys/class/net/eth0 ] || echo gone $n\n\
         done; sleep 600"
    );
    let config = VmConfig {
        vcpus: 2,
        boot_vcpus: 2,
        ..machine(128)
    };
    let Some(mut guest) = boot(&script, &config, &[]) else {
        return;
    };
    guest.wait_for("ready");
    let name = format!("hull-mq{}", guest.vmm.pid());
    let queues = tap(&name, 2);
    host(&format!(
        "ip address add 10.89.0.1/24 dev {name}; ip link set {name} up"
    ));
    echo(TcpListener::bind("10.89.0.1:7000").unwrap());
    let device = DeviceConfig::Net {
        taps: vec![FdIndex(0), FdIndex(1)],
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
    };
    guest.control.order(
        &Request::Attach { slot: 5, device },
        &queues.iter().collect::<Vec<_>>(),
    );
    // The VM has the only ones.
    drop(queues);
    let counts = format!(
        "tc -s class show dev {name} | sed -nE 's/^ Sent .* bytes ([0-9]+) pkt.*/\\1/p' | head -n 2"
    );
    let sent = || -> Vec<u64> {
        let counts = host(&counts);
        counts.lines().map(|count| count.parse().unwrap()).collect()
    };
    let mut before = sent();
    for n in 1..3 {
        guest.wait_for(&format!("gone {n}\n"));
        let output = guest.output();
        let queues = format!("queues {n} rx-0 rx-1 tx-0 tx-1\n");
        assert!(output.contains(&queues), "{output}");
        let same = format!("same {n} 1 2 3 4 5 6 7 8\n");
        assert!(output.contains(&same), "{output}");
        // The host's kernel sends a flow by the queue that the guest sent it by.
        let now = sent();
        for (before, now) in before.iter().zip(&now) {
            assert!(now - before > 10, "{now} packets more than {before}");
        }
        before = now;
    }
    let metrics = guest.control.metrics();
    let card = metrics.devices.iter().find(|card| card.slot == 5).unwrap();
    let bytes = 2 * 8 * FLOW as u64;
    assert!(card.bytes_in > bytes && card.bytes_out > bytes, "{card:?}");
    guest.control.order(&Request::Detach { slot: 5 }, &[]);
    let interface = Path::new("/sys/class/net").join(name);
    wait_until(|| !interface.exists());
}

#[test]
fn the_vmm_itself_is_small() {
    let Some(guest) = boot("echo up; sleep 600", &machine(128), &[]) else {
        return;
    };
    guest.wait_for("up");
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", guest.vmm.pid())).unwrap();
    let (mut guest_memory, mut kib) = (false, 0);
    for line in smaps.lines() {
        let value = |name| {
            line.strip_prefix(name)?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        };
        if let Some(size) = value("Size:") {
            guest_memory = size >= 64 << 10;
        } else if let Some(dirty) = value("Private_Dirty:").filter(|_| !guest_memory) {
            kib += dirty;
        }
    }
    println!("private memory without the guest's: {kib} KiB");
    assert!(kib < 5 << 10, "{kib} KiB");
    drop(guest);
}
