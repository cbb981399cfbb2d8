//! What a VMM has, from outside.

use std::fs;

/// What a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Possessions {
    /// Memory of its own in KiB, without the guest's.
    pub memory_kib: u64,
    /// Threads, but for those of the kernel's KVM, which come and go.
    pub threads: usize,
    /// Descriptors.
    pub descriptors: usize,
}

impl Possessions {
    /// Returns those of a process. None: it is gone.
    pub fn of(pid: u32, guest_kib: u64) -> Option<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
        let (mut memory_kib, mut size) = (0, 0);
        for line in maps.lines() {
            let mut words = line.split_ascii_whitespace();
            let (name, value) = (
                words.next(),
                words.next().and_then(|word| word.parse::<u64>().ok()),
            );
            match (name, value) {
                (Some("Size:"), Some(value)) => size = value,
                (Some("Anonymous:"), Some(value)) if size < guest_kib => memory_kib += value,
                _ => {}
            }
        }
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        let is_own = |task: &fs::DirEntry| {
            let name = fs::read_to_string(task.path().join("comm"));
            name.is_ok_and(|name| !name.starts_with("kvm-"))
        };
        Some(Self {
            memory_kib,
            threads: tasks.filter(is_own).count(),
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(),
        })
    }
}
