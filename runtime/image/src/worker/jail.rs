//! How a worker locks itself in, before it reads the first byte that a stranger chose.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use hull_jail::seccomp::{List, common::DROPPABLE};
use hull_jail::{
    JailError, Reach, Root, become_user, call, confine, drop_oom_protection, empty_root,
    end_with_parent, hide_memory, leave_namespaces, limit,
};
use rustix::process::Resource;
use rustix::thread::set_name;

/// A directory that every host has.
const ANY_DIRECTORY: &str = "/proc";
/// Descriptors: the socket, twice, the standard ones, and those of a job.
const DESCRIPTORS: u64 = 16;

/// What a worker may use, and whom it runs as.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) user: u32,
    /// Bytes.
    pub(super) memory: u64,
    /// Bytes.
    pub(super) file_size: u64,
}

/// What a worker may call: what the tests of images were seen to. No call makes or opens a descriptor but what
/// the daemon sends (`recvmsg`), none maps a file.
const LIST: List = List {
    threads: "hull-*",
    contains: &[],
    calls: &[&[
        call!(SYS_read),
        call!(SYS_write),
        call!(SYS_pread64),
        call!(SYS_lseek),
        call!(SYS_ftruncate),
        call!(SYS_recvmsg),
        call!(SYS_close),
        call!(SYS_mmap).within(2, PROT_DATA).is(3, MAP_NEW),
        call!(SYS_munmap),
        call!(SYS_mremap).is(3, libc::MREMAP_MAYMOVE as i64),
        call!(SYS_brk),
        // Keys of hash maps.
        call!(SYS_getrandom),
        call!(SYS_mmap).is(2, PROT_DATA).is(3, DROPPABLE),
        call!(SYS_rt_sigprocmask),
        call!(SYS_sched_getaffinity),
        call!(SYS_sigaltstack),
        call!(SYS_exit_group),
        #[cfg(debug_assertions)]
        call!(SYS_fcntl)
            .is(1, libc::F_GETFD as i64)
            .rare("looks whether what is closed was open"),
    ]],
};
const PROT_DATA: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;
const MAP_NEW: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;

/// Locks the process in; it has one thread, and no descriptor that it does not need.
pub(super) fn enter(name: &OsStr, bounds: &Bounds) -> Result<(), JailError> {
    if let Ok(name) = CString::new([b"hull-", name.as_bytes()].concat()) {
        // For people alone.
        let _ = set_name(&name);
    }
    drop_oom_protection()?;
    leave_namespaces()?;
    empty_root(Path::new(ANY_DIRECTORY), Root::Empty)?;
    limit(&[
        (Resource::Data, bounds.memory),
        (Resource::Fsize, bounds.file_size),
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Nproc, 0),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
    ])?;
    become_user(bounds.user)?;
    end_with_parent()?;
    hide_memory()?;
    confine(Reach::Nothing)?;
    LIST.apply()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_ends_a_worker() {
        hull_jail::seccomp::probe::assert_exact(&LIST);
    }
}
