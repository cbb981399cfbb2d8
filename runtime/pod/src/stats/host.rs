//! What a pod costs the host, from its cgroup and its processes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use hull_base::clock;
use hull_spec::{
    info::VmInfo,
    stats::{HostUsage, ProcessMemory},
};

/// Clock ticks of proc_pid_stat(5) in a second: USER_HZ, fixed for x86-64's user space.
const TICKS: u64 = 100;
const PAGE: u64 = 4096;

/// Measures a pod. Blocks. None when its VM is gone.
pub(super) fn usage(vm: &VmInfo) -> Option<HostUsage> {
    let at_ns = clock::now_ns();
    let pids = processes(vm);
    let mut sum = HostUsage {
        at_ns,
        ..HostUsage::default()
    };
    for process in pids.iter().filter_map(|pid| Process::read(*pid)) {
        add(&mut sum.processes, 1);
        add(&mut sum.cpu_usage_ns, process.cpu_ns);
        add(&mut sum.rss_bytes, process.rss_bytes);
        add(&mut sum.page_faults, process.page_faults);
        add(&mut sum.major_page_faults, process.major_page_faults);
    }
    if sum.processes == 0 {
        return None;
    }
    sum.memory_usage_bytes = sum.rss_bytes;
    sum.memory_working_set_bytes = sum.rss_bytes;
    if let Some(cgroup) = &vm.cgroup {
        // What ended is in it too, and it counts in microseconds.
        if let Some(us) = keyed(&read(&cgroup.join("cpu.stat")), "usage_usec") {
            sum.cpu_usage_ns = us.saturating_mul(1000);
        }
        // Absent without a memory controller.
        if let Ok(bytes) = read(&cgroup.join("memory.current")).trim().parse::<u64>() {
            let stat = read(&cgroup.join("memory.stat"));
            let inactive = keyed(&stat, "inactive_file").unwrap_or(0);
            sum.memory_usage_bytes = bytes;
            sum.memory_working_set_bytes = bytes.saturating_sub(inactive);
        }
    }
    Some(sum)
}

/// Looks at the memory of a pod's processes page by page: exact, and not for free. Blocks.
pub(crate) fn memory(vm: &VmInfo) -> ProcessMemory {
    let rollups = processes(vm)
        .into_iter()
        .map(|pid| parse_rollup(&read(Path::new(&format!("/proc/{pid}/smaps_rollup")))));
    rollups.fold(ProcessMemory::default(), |mut sum, one| {
        add(&mut sum.rss_bytes, one.rss_bytes);
        add(&mut sum.pss_bytes, one.pss_bytes);
        add(&mut sum.private_bytes, one.private_bytes);
        sum
    })
}

fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}

/// The processes in the pod's cgroup; without one, the VMM.
fn processes(vm: &VmInfo) -> Vec<u32> {
    let procs = vm
        .cgroup
        .as_ref()
        .map(|path: &PathBuf| read(&path.join("cgroup.procs")));
    let pids: Vec<u32> = procs
        .iter()
        .flat_map(|text| text.lines())
        .filter_map(|line| line.parse().ok())
        .collect();
    if pids.is_empty() { vec![vm.pid] } else { pids }
}

#[derive(Debug, PartialEq, Eq)]
struct Process {
    cpu_ns: u64,
    rss_bytes: u64,
    page_faults: u64,
    major_page_faults: u64,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name in parentheses may hold anything, so fields count from the last one: the
        // first here is field 3 of proc_pid_stat(5).
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let field =
            |number: usize| -> Option<u64> { fields.get(number.checked_sub(3)?)?.parse().ok() };
        // A zombie has no memory, and is no part of the pod.
        if fields.first() == Some(&"Z") {
            return None;
        }
        let (minor, major) = (field(10)?, field(12)?);
        Some(Self {
            cpu_ns: field(14)?
                .saturating_add(field(15)?)
                .saturating_mul(1_000_000_000 / TICKS),
            rss_bytes: field(24)?.saturating_mul(PAGE),
            page_faults: minor.saturating_add(major),
            major_page_faults: major,
        })
    }
}

fn parse_rollup(text: &str) -> ProcessMemory {
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok());
        kib.unwrap_or(0_u64).saturating_mul(1024)
    };
    ProcessMemory {
        rss_bytes: bytes("Rss:"),
        pss_bytes: bytes("Pss:"),
        private_bytes: bytes("Private_Clean:").saturating_add(bytes("Private_Dirty:")),
    }
}

fn keyed(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(cgroup: Option<PathBuf>) -> VmInfo {
        VmInfo {
            pid: std::process::id(),
            vcpus: 1,
            memory_mib: 1,
            max_memory_mib: 1,
            netns: PathBuf::new(),
            cgroup,
            warning: String::new(),
        }
    }

    #[test]
    fn a_process_is_read_past_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 5 3 0 250 150 0 0 20 0 3 0 99 1000 42 0";
        let process = Process::parse(stat).unwrap();
        assert_eq!(
            process,
            Process {
                cpu_ns: 4_000_000_000,
                rss_bytes: 42 * 4096,
                page_faults: 103,
                major_page_faults: 3,
            }
        );
        assert_eq!(Process::parse(&stat.replace(" S ", " Z ")), None);
        assert_eq!(Process::parse("nonsense"), None);
    }

    #[test]
    fn a_rollup_is_read_by_whole_names() {
        let text = "5600-7fff ---p 00000000 00:00 0 [rollup]\nRss: 884 kB\nPss: 385 kB\n\
                    Pss_Anon: 300 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: 84 kB\n";
        let memory = parse_rollup(text);
        assert_eq!(memory.rss_bytes, 884 << 10);
        assert_eq!(memory.pss_bytes, 385 << 10);
        assert_eq!(memory.private_bytes, 88 << 10);
    }

    #[test]
    fn the_cgroup_says_more_than_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let own = usage(&vm(None)).unwrap();
        assert_eq!((own.processes, own.memory_usage_bytes), (1, own.rss_bytes));
        assert!(own.rss_bytes > 0 && own.page_faults > 0);
        // Without a memory controller.
        fs::write(dir.path().join("cpu.stat"), "usage_usec 5\nuser_usec 1\n").unwrap();
        let some = usage(&vm(Some(dir.path().to_owned()))).unwrap();
        assert_eq!(some.cpu_usage_ns, 5000);
        assert_eq!(some.memory_usage_bytes, some.rss_bytes);
        fs::write(dir.path().join("memory.current"), "1000\n").unwrap();
        fs::write(dir.path().join("memory.stat"), "inactive_file 300\n").unwrap();
        let all = usage(&vm(Some(dir.path().to_owned()))).unwrap();
        assert_eq!(all.memory_usage_bytes, 1000);
        assert_eq!(all.memory_working_set_bytes, 700);
        assert!(memory(&vm(None)).pss_bytes > 0);
        let gone = VmInfo {
            pid: u32::MAX,
            ..vm(None)
        };
        assert_eq!(usage(&gone), None);
    }
}
