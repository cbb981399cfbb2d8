//! The guest's counters, made safe: lists are cut, amounts can't exceed what the VM has, text is
//! printable, times are the host's.

use std::{
    collections::{HashMap, HashSet},
    time::Instant,
};

use hull_proto_agent::agent::{
    self as message, CgroupStats, FilesystemStats, StatsRequest, StatsResponse,
};
use protobuf::MessageField;

use hull_base::printable::printable;
use hull_spec::stats::{
    Cpu, DeviceIo, Filesystem, GuestUsage, Hugetlb, Interface, Memory, Pressure, Stall, Tasks,
    Traffic, Ulimit, Usage,
};

/// Most interfaces, devices, page sizes and limits that are kept.
const LIST: usize = 64;
/// Longest name of an interface, device, page size or limit.
const NAME: usize = 64;
/// Oldest measurement of a disk that is believed.
const AGE_MS: u64 = 3_600_000;
/// A count that no guest reaches, so that sums of counts don't overflow.
const COUNT: u64 = 1 << 48;
/// An amount of bytes moved, or a time, that no guest reaches either.
const AMOUNT: u64 = 1 << 62;

/// What a guest's counters can't exceed.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The host's time of the answer.
    pub now_ns: i64,
    /// CPU time that the VM can have used.
    pub cpu_ns: u64,
    /// Memory of the VM.
    pub memory_bytes: u64,
    /// Size of the VM's scratch disk.
    pub disk_bytes: u64,
}

/// A guest's answer.
#[derive(Debug)]
pub struct Answer {
    /// When it came.
    pub at: Instant,
    /// What is said of the guest as a whole.
    pub guest: GuestUsage,
    /// What is said of each container, by id.
    pub containers: HashMap<String, Told>,
}

/// What a guest says of a container.
#[derive(Debug)]
pub struct Told {
    /// What the container uses.
    pub usage: Usage,
    /// Its writable layer; none: not measured yet.
    pub writable: Option<Filesystem>,
    /// The limits of its first process.
    pub ulimits: Vec<Ulimit>,
}

/// A request for all counters.
pub(super) fn request() -> StatsRequest {
    StatsRequest::default()
}

impl Answer {
    /// Checks an answer, and leaves out containers that are not `known`.
    #[must_use]
    pub fn checked(mut response: StatsResponse, known: &HashSet<&str>, bounds: &Bounds) -> Self {
        let mut containers = HashMap::new();
        for told in std::mem::take(&mut response.containers) {
            if known.contains(told.container_id.as_str()) {
                containers.insert(
                    told.container_id.clone(),
                    Told {
                        usage: bounds.usage(told.cgroup.into_option()),
                        writable: told.writable.as_ref().map(|f| bounds.filesystem(f)),
                        ulimits: told.ulimits.into_iter().take(LIST).map(ulimit).collect(),
                    },
                );
            }
        }
        let interfaces = std::mem::take(&mut response.interfaces);
        Self {
            at: Instant::now(),
            guest: GuestUsage {
                at_ns: bounds.now_ns,
                usage: bounds.usage(response.sandbox.into_option()),
                interfaces: interfaces.into_iter().take(LIST).map(interface).collect(),
                scratch: response.scratch.as_ref().map(|f| bounds.filesystem(f)),
            },
            containers,
        }
    }
}

impl Bounds {
    fn usage(&self, stats: Option<CgroupStats>) -> Usage {
        let s = stats.unwrap_or_default();
        let cpu = |ns: u64| ns.min(self.cpu_ns);
        let memory = |bytes: u64| bytes.min(self.memory_bytes);
        Usage {
            cpu: Cpu {
                usage_ns: cpu(s.cpu_usage_ns),
                user_ns: cpu(s.cpu_user_ns),
                system_ns: cpu(s.cpu_system_ns),
                periods: count(s.cpu_periods),
                throttled_periods: count(s.cpu_throttled_periods),
                throttled_ns: amount(s.cpu_throttled_ns),
                pressure: pressure(&s.cpu_pressure),
            },
            memory: Memory {
                usage_bytes: memory(s.memory_usage_bytes),
                working_set_bytes: memory(s.memory_working_set_bytes),
                rss_bytes: memory(s.memory_rss_bytes),
                cache_bytes: memory(s.memory_cache_bytes),
                mapped_file_bytes: memory(s.memory_mapped_file_bytes),
                kernel_bytes: memory(s.memory_kernel_bytes),
                peak_bytes: memory(s.memory_peak_bytes),
                limit_bytes: (s.memory_limit_bytes > 0).then(|| amount(s.memory_limit_bytes)),
                limit_hits: count(s.memory_limit_hits),
                min_bytes: amount(s.memory_min_bytes),
                page_faults: count(s.memory_page_faults),
                major_page_faults: count(s.memory_major_page_faults),
                oom_kills: count(s.oom_kills),
                swap_usage_bytes: amount(s.swap_usage_bytes),
                swap_limit_bytes: (!s.unlimited_swap).then(|| amount(s.swap_limit_bytes)),
                pressure: pressure(&s.memory_pressure),
            },
            io: s.io.iter().take(LIST).map(device).collect(),
            io_pressure: pressure(&s.io_pressure),
            tasks: Tasks {
                processes: count(s.processes),
                threads: count(s.pids),
                threads_limit: (s.pids_limit > 0).then(|| count(s.pids_limit)),
                file_descriptors: count(s.file_descriptors),
                sockets: count(s.sockets),
            },
            hugetlb: s
                .hugetlb
                .iter()
                .take(LIST)
                .map(|pages| Hugetlb {
                    page_size: printable(&pages.page_size, NAME),
                    usage_bytes: memory(pages.usage_bytes),
                    max_usage_bytes: memory(pages.max_usage_bytes),
                })
                .collect(),
        }
    }

    fn filesystem(&self, f: &FilesystemStats) -> Filesystem {
        let bytes = |bytes: u64| bytes.min(self.disk_bytes);
        let age_ns = f.age_ms.min(AGE_MS).saturating_mul(1_000_000);
        Filesystem {
            at_ns: self.now_ns.saturating_sub_unsigned(age_ns),
            used_bytes: bytes(f.used_bytes),
            used_inodes: count(f.used_inodes),
            capacity_bytes: bytes(f.capacity_bytes),
            capacity_inodes: count(f.capacity_inodes),
            free_bytes: bytes(f.free_bytes),
            free_inodes: count(f.free_inodes),
        }
    }
}

fn count(count: u64) -> u64 {
    count.min(COUNT)
}

fn amount(amount: u64) -> u64 {
    amount.min(AMOUNT)
}

fn pressure(told: &MessageField<message::Pressure>) -> Option<Pressure> {
    let told = told.as_ref()?;
    Some(Pressure {
        some: stall(&told.some),
        full: stall(&told.full),
    })
}

fn stall(told: &MessageField<message::Stall>) -> Stall {
    let percent = |value: f64| {
        if value.is_finite() {
            value.clamp(0.0, 100.0)
        } else {
            0.0
        }
    };
    let told = told.as_ref();
    told.map_or_else(Stall::default, |told| Stall {
        avg10: percent(told.avg10),
        avg60: percent(told.avg60),
        avg300: percent(told.avg300),
        total_us: amount(told.total_us),
    })
}

fn device(told: &message::DeviceIo) -> DeviceIo {
    let name = printable(&told.device, NAME);
    DeviceIo {
        major: told.major,
        minor: told.minor,
        device: if name.is_empty() {
            name
        } else {
            format!("/dev/{name}")
        },
        read_bytes: amount(told.read_bytes),
        write_bytes: amount(told.write_bytes),
        reads: count(told.reads),
        writes: count(told.writes),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map wants")]
fn interface(told: message::InterfaceStats) -> Interface {
    Interface {
        name: printable(&told.name, NAME),
        received: Traffic {
            bytes: amount(told.rx_bytes),
            packets: count(told.rx_packets),
            errors: count(told.rx_errors),
            dropped: count(told.rx_dropped),
        },
        sent: Traffic {
            bytes: amount(told.tx_bytes),
            packets: count(told.tx_packets),
            errors: count(told.tx_errors),
            dropped: count(told.tx_dropped),
        },
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map wants")]
fn ulimit(told: message::Ulimit) -> Ulimit {
    Ulimit {
        name: printable(&told.name, NAME),
        soft: (!told.unlimited).then_some(told.soft),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        now_ns: 5_000_000_000,
        cpu_ns: 10,
        memory_bytes: 1 << 20,
        disk_bytes: 1 << 30,
    };

    fn checked(response: StatsResponse) -> Answer {
        Answer::checked(response, &HashSet::from(["known"]), &BOUNDS)
    }

    #[test]
    fn a_guest_has_no_more_than_its_vm() {
        let lie = CgroupStats {
            cpu_usage_ns: u64::MAX,
            memory_usage_bytes: u64::MAX,
            memory_limit_bytes: u64::MAX,
            pids: u64::MAX,
            cpu_pressure: MessageField::some(message::Pressure {
                some: MessageField::some(message::Stall {
                    avg10: f64::NAN,
                    avg60: 1e300,
                    avg300: -1.0,
                    total_us: u64::MAX,
                    ..message::Stall::default()
                }),
                ..message::Pressure::default()
            }),
            io: vec![message::DeviceIo::default(); 1000],
            ..CgroupStats::default()
        };
        let disk = FilesystemStats {
            used_bytes: u64::MAX,
            age_ms: u64::MAX,
            ..FilesystemStats::default()
        };
        let of = |id: &str| message::ContainerStats {
            container_id: id.into(),
            cgroup: MessageField::some(lie.clone()),
            writable: MessageField::some(disk.clone()),
            ulimits: vec![message::Ulimit::default(); 1000],
            ..message::ContainerStats::default()
        };
        let answer = checked(StatsResponse {
            at_ns: u64::MAX,
            containers: vec![of("known"), of("invented")],
            interfaces: vec![
                message::InterfaceStats {
                    name: "e\u{1b}th".repeat(100),
                    rx_bytes: u64::MAX,
                    ..message::InterfaceStats::default()
                };
                1000
            ],
            scratch: MessageField::some(disk.clone()),
            ..StatsResponse::default()
        });
        assert_eq!(answer.containers.len(), 1);
        let told = &answer.containers["known"];
        assert_eq!(told.usage.cpu.usage_ns, 10);
        assert_eq!(told.usage.memory.usage_bytes, 1 << 20);
        let some = told.usage.cpu.pressure.unwrap().some;
        assert_eq!((some.avg10, some.avg60, some.avg300), (0.0, 100.0, 0.0));
        assert_eq!((told.usage.io.len(), told.ulimits.len()), (LIST, LIST));
        assert_eq!(answer.guest.at_ns, BOUNDS.now_ns);
        assert_eq!(answer.guest.interfaces.len(), LIST);
        let name = &answer.guest.interfaces[0].name;
        assert!(name.len() <= NAME && !name.contains('\u{1b}'));
        assert_eq!(answer.guest.scratch.unwrap().used_bytes, 1 << 30);
        assert_eq!(
            told.writable.unwrap().at_ns,
            BOUNDS.now_ns - 3_600_000_000_000
        );
    }

    #[test]
    fn an_honest_answer_is_not_changed() {
        let answer = checked(StatsResponse {
            sandbox: MessageField::some(CgroupStats {
                cpu_usage_ns: 3,
                memory_working_set_bytes: 4096,
                memory_limit_bytes: 8192,
                unlimited_swap: true,
                io: vec![message::DeviceIo {
                    device: "vdb".into(),
                    reads: 1,
                    ..message::DeviceIo::default()
                }],
                ..CgroupStats::default()
            }),
            ..StatsResponse::default()
        });
        let usage = &answer.guest.usage;
        assert_eq!(usage.cpu.usage_ns, 3);
        assert_eq!(usage.memory.working_set_bytes, 4096);
        assert_eq!(usage.memory.limit_bytes, Some(8192));
        assert_eq!(usage.memory.swap_limit_bytes, None);
        assert_eq!(usage.io[0].device, "/dev/vdb");
        assert_eq!((usage.cpu.pressure, answer.guest.scratch), (None, None));
    }
}
