//! The host's CPUs and memory.

use std::fs;

/// How many CPUs this process may use; one, if the host does not tell.
#[must_use]
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The host's `MemAvailable` (proc_meminfo(5)) in MiB; none when it can't be read.
#[must_use]
pub fn available_mib() -> Option<u64> {
    meminfo_mib("MemAvailable:")
}

/// The host's memory (`MemTotal`) in MiB; none when it can't be read.
#[must_use]
pub fn total_mib() -> Option<u64> {
    meminfo_mib("MemTotal:")
}

fn meminfo_mib(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_what_it_has() {
        assert!(cpus() > 0);
        assert!(available_mib().is_some_and(|mib| mib > 0));
        assert!(total_mib() > available_mib());
    }
}
