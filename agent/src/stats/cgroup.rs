//! A cgroup by its files.

use std::{fs, path::Path};

use hull_proto_agent::agent::{CgroupStats, Hugetlb, Pressure};
use protobuf::MessageField;

use super::{io, pressure};
use crate::container::cgroup::value;

/// Reads a cgroup; what it does not count is 0.
pub(super) fn read(dir: &Path) -> CgroupStats {
    // "max" is no number.
    let number = |file: &str| text(&dir.join(file)).trim().parse().unwrap_or(0);
    let cpu = text(&dir.join("cpu.stat"));
    let cpu_us = |key| value(&cpu, key).unwrap_or(0).saturating_mul(1000);
    let cpu_count = |key| value(&cpu, key).unwrap_or(0);
    let memory = text(&dir.join("memory.stat"));
    let stat = |key| value(&memory, key).unwrap_or(0);
    let events = text(&dir.join("memory.events"));
    let event = |key| value(&events, key).unwrap_or(0);
    let pressure_of =
        |file: &str| -> MessageField<Pressure> { pressure::parse(&text(&dir.join(file))).into() };
    let usage: u64 = number("memory.current");
    CgroupStats {
        cpu_usage_ns: cpu_us("usage_usec"),
        cpu_user_ns: cpu_us("user_usec"),
        cpu_system_ns: cpu_us("system_usec"),
        cpu_periods: cpu_count("nr_periods"),
        cpu_throttled_periods: cpu_count("nr_throttled"),
        cpu_throttled_ns: cpu_us("throttled_usec"),
        memory_usage_bytes: usage,
        // kubelet's definition: what cannot easily be given back.
        memory_working_set_bytes: usage.saturating_sub(stat("inactive_file")),
        memory_rss_bytes: stat("anon"),
        memory_cache_bytes: stat("file"),
        memory_mapped_file_bytes: stat("file_mapped"),
        memory_kernel_bytes: stat("kernel"),
        memory_page_faults: stat("pgfault"),
        memory_major_page_faults: stat("pgmajfault"),
        memory_peak_bytes: number("memory.peak"),
        memory_limit_bytes: number("memory.max"),
        memory_limit_hits: event("max"),
        memory_min_bytes: number("memory.min"),
        oom_kills: event("oom_kill"),
        swap_usage_bytes: number("memory.swap.current"),
        swap_limit_bytes: number("memory.swap.max"),
        unlimited_swap: text(&dir.join("memory.swap.max")).trim() == "max",
        pids: number("pids.current"),
        pids_limit: number("pids.max"),
        io: io::devices(&text(&dir.join("io.stat"))),
        cpu_pressure: pressure_of("cpu.pressure"),
        memory_pressure: pressure_of("memory.pressure"),
        io_pressure: pressure_of("io.pressure"),
        hugetlb: hugetlb(dir),
        ..CgroupStats::default()
    }
}

/// A file of the kernel; empty when it is not there.
pub(super) fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The file that counts the huge pages of one size.
pub(super) fn hugetlb_file(page_size: &str) -> String {
    format!("hugetlb.{page_size}.current")
}

fn hugetlb(dir: &Path) -> Vec<Hugetlb> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut all: Vec<_> = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // "hugetlb.2MB.rsvd.current" counts reservations.
            (!size.contains('.')).then(|| Hugetlb {
                page_size: size.to_owned(),
                usage_bytes: text(&entry.path()).trim().parse().unwrap_or(0),
                ..Hugetlb::default()
            })
        })
        .collect();
    all.sort_by(|a, b| a.page_size.cmp(&b.page_size));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroups_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 9\n\
                 nr_throttled 4\nthrottled_usec 70\n",
            ),
            ("memory.current", "5000\n"),
            (
                "memory.stat",
                "anon 3000\nfile 1800\nkernel 200\nfile_mapped 40\ninactive_file 1200\n\
                 pgfault 7\npgmajfault 2\n",
            ),
            ("memory.max", "max\n"),
            ("memory.swap.max", "max\n"),
            ("memory.peak", "6000\n"),
            ("memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "100\n"),
            ("hugetlb.2MB.current", "4194304\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=33\n",
            ),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let stats = read(dir.path());
        assert_eq!(stats.cpu_usage_ns, 1_500_000);
        assert_eq!(
            (stats.cpu_user_ns, stats.cpu_system_ns),
            (1_000_000, 500_000)
        );
        assert_eq!((stats.cpu_periods, stats.cpu_throttled_periods), (9, 4));
        assert_eq!(stats.cpu_throttled_ns, 70_000);
        assert_eq!(stats.memory_working_set_bytes, 3800);
        assert_eq!((stats.memory_rss_bytes, stats.pids), (3000, 3));
        assert_eq!(
            (stats.memory_cache_bytes, stats.memory_mapped_file_bytes),
            (1800, 40)
        );
        assert_eq!(
            (stats.memory_kernel_bytes, stats.memory_peak_bytes),
            (200, 6000)
        );
        assert_eq!((stats.memory_limit_hits, stats.oom_kills), (3, 1));
        assert_eq!((stats.memory_limit_bytes, stats.swap_usage_bytes), (0, 0));
        assert!(stats.unlimited_swap);
        assert_eq!(stats.pids_limit, 100);
        assert_eq!(stats.hugetlb.len(), 1);
        assert_eq!(stats.hugetlb[0].usage_bytes, 4 << 20);
        assert_eq!(stats.cpu_pressure.some.total_us, 33);
        assert!(stats.memory_pressure.is_none());
    }

    #[test]
    fn an_absent_cgroup_counts_nothing() {
        assert_eq!(read(Path::new("/nonexistent")), CgroupStats::default());
    }
}
