//! What pods and containers use, as it is told to callers.

use serde::Serialize;

use crate::info::{ContainerInfo, SandboxInfo};

/// What a pod uses.
#[derive(Debug, Clone)]
pub struct PodStats {
    /// The sandbox.
    pub sandbox: SandboxInfo,
    /// The pod's cost on the host; none when its VM is gone, or was not asked for.
    pub host: Option<HostUsage>,
    /// What the guest tells about itself; none when it did not answer or is gone.
    pub guest: Option<GuestUsage>,
    /// The containers; those that run are missing when the guest did not answer.
    pub containers: Vec<ContainerStats>,
}

/// What a container uses.
#[derive(Debug, Clone)]
pub struct ContainerStats {
    /// The container.
    pub container: ContainerInfo,
    /// When it was measured, by the host's clock.
    pub at_ns: i64,
    /// Its counters. Of one that does not run: its last CPU time, and nothing else.
    pub usage: Usage,
    /// CPU use in billionths of a CPU; none until there were two measurements.
    pub nano_cores: Option<u64>,
    /// Its writable layer as it was last measured; none: it has none, or not yet.
    pub writable: Option<Filesystem>,
    /// Limits of its first process.
    pub ulimits: Vec<Ulimit>,
}

/// The processes of a container, as its guest tells them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Processes {
    /// Those that are told of.
    pub processes: Vec<ProcessInfo>,
    /// How many more there are.
    pub left_out: u64,
}

/// A process as the container's own programs see it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ProcessInfo {
    /// Its pid.
    pub pid: u32,
    /// Its parent's; 0: that is none of the container's.
    pub parent: u32,
    /// Its user.
    pub uid: u32,
    /// A letter of proc_pid_stat(5).
    pub state: char,
    /// CPU time in milliseconds.
    pub cpu_ms: u64,
    /// Resident memory.
    pub memory_bytes: u64,
    /// Milliseconds since its start.
    pub age_ms: u64,
    /// Its arguments in one line, or its name in brackets.
    pub command: String,
}

/// What a guest tells about itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GuestUsage {
    /// When, by the host's clock.
    pub at_ns: i64,
    /// All containers together.
    pub usage: Usage,
    /// Network interfaces but for loopback.
    pub interfaces: Vec<Interface>,
    /// The disk of writable layers.
    pub scratch: Option<Filesystem>,
}

/// What a pod costs the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostUsage {
    /// When it was measured.
    pub at_ns: i64,
    /// CPU time of all threads of the pod's processes, vCPUs included.
    pub cpu_usage_ns: u64,
    /// CPU use in billionths of a CPU; none until there were two measurements.
    pub nano_cores: Option<u64>,
    /// Memory charged to the pod's cgroup; where it has no memory controller, `rss_bytes`.
    pub memory_usage_bytes: u64,
    /// `memory_usage_bytes` without the file pages that are easily given back.
    pub memory_working_set_bytes: u64,
    /// Resident memory of the pod's processes: the guest's memory that was ever touched, and
    /// the VMM's own.
    pub rss_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that needed a disk.
    pub major_page_faults: u64,
    /// Processes.
    pub processes: u64,
}

/// Memory of a pod's processes on the host, exactly (proc_pid_smaps(5)).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ProcessMemory {
    /// Resident.
    pub rss_bytes: u64,
    /// Resident, with pages that are shared with other processes counted in part.
    pub pss_bytes: u64,
    /// Resident and shared with nobody.
    pub private_bytes: u64,
}

/// Counters of a cgroup in the guest.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// CPU.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Block devices.
    pub io: Vec<DeviceIo>,
    /// Stalls for I/O.
    pub io_pressure: Option<Pressure>,
    /// Processes.
    pub tasks: Tasks,
    /// Huge pages.
    pub hugetlb: Vec<Hugetlb>,
}

/// CPU of a cgroup.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cpu {
    /// Time used.
    pub usage_ns: u64,
    /// Of it in user mode.
    pub user_ns: u64,
    /// Of it in the kernel.
    pub system_ns: u64,
    /// Periods of the quota.
    pub periods: u64,
    /// Periods in which it was throttled.
    pub throttled_periods: u64,
    /// Time for which it was throttled.
    pub throttled_ns: u64,
    /// Stalls for CPU.
    pub pressure: Option<Pressure>,
}

/// Memory of a cgroup.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Memory {
    /// All that is charged.
    pub usage_bytes: u64,
    /// What can't easily be given back.
    pub working_set_bytes: u64,
    /// Anonymous pages.
    pub rss_bytes: u64,
    /// File pages.
    pub cache_bytes: u64,
    /// File pages that are mapped.
    pub mapped_file_bytes: u64,
    /// The kernel's own for it.
    pub kernel_bytes: u64,
    /// The most that was ever charged.
    pub peak_bytes: u64,
    /// The limit.
    pub limit_bytes: Option<u64>,
    /// How often the limit was reached.
    pub limit_hits: u64,
    /// Protected from reclaim.
    pub min_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that needed a disk.
    pub major_page_faults: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Swap in use.
    pub swap_usage_bytes: u64,
    /// Limit of swap; none: no limit.
    pub swap_limit_bytes: Option<u64>,
    /// Stalls for memory.
    pub pressure: Option<Pressure>,
}

/// Processes of a cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tasks {
    /// Processes.
    pub processes: u64,
    /// Threads.
    pub threads: u64,
    /// Most threads.
    pub threads_limit: Option<u64>,
    /// Open file descriptors.
    pub file_descriptors: u64,
    /// Of them sockets.
    pub sockets: u64,
}

/// Use of a block device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Major number in the guest.
    pub major: u32,
    /// Minor number in the guest.
    pub minor: u32,
    /// `/dev/vdb` in the guest; empty when it has no name.
    pub device: String,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hugetlb {
    /// `2MB`.
    pub page_size: String,
    /// In use.
    pub usage_bytes: u64,
    /// The most that was seen in use when it was looked at.
    pub max_usage_bytes: u64,
}

/// Pressure stall information.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: Stall,
    /// All of them did.
    pub full: Stall,
}

/// How long tasks stood still.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stall {
    /// Percent of the last 10 seconds.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last five minutes.
    pub avg300: f64,
    /// In all, in microseconds.
    pub total_us: u64,
}

/// A directory tree or a whole file system in the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filesystem {
    /// When it was measured, by the host's clock.
    pub at_ns: i64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Inodes in use.
    pub used_inodes: u64,
    /// Size of the file system.
    pub capacity_bytes: u64,
    /// Inodes of the file system.
    pub capacity_inodes: u64,
    /// Free on the file system.
    pub free_bytes: u64,
    /// Free inodes of the file system.
    pub free_inodes: u64,
}

/// A network interface of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// `eth0`.
    pub name: String,
    /// What came in.
    pub received: Traffic,
    /// What went out.
    pub sent: Traffic,
}

/// One direction of an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Errors.
    pub errors: u64,
    /// Packets that were dropped.
    pub dropped: u64,
}

/// A limit of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ulimit {
    /// `max_open_files`.
    pub name: String,
    /// The soft limit; none: no limit.
    pub soft: Option<u64>,
}
