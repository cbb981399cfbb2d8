//! What the standard library, the C library and its allocator call in any program.

use super::Call;
use crate::call;

const READ_WRITE: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;
const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
/// The signal by which the C library has threads change their user; it is set up with the first thread.
const SIGSETXID: i64 = 33;

/// How memory is mapped that the kernel may forget (`MAP_DROPPABLE`, which libc has not). A C library from 2.41 on, which
/// Debian has from trixie on, has its first random bytes made by the vDSO of Linux 6.11 or newer in such memory, with its
/// signals blocked, and asks how many processors there are.
pub const DROPPABLE: i64 = 0x08 | libc::MAP_ANONYMOUS as i64;

const ALLOCATOR: &str = "the allocator's, as memory comes and goes";
const FAULT: &str = "ends a process that touches memory it does not have";
const PANIC: &str = "ends a process that panics";

/// What any thread may call. Never memory that can be executed.
pub const ANY: &[Call] = &[
    call!(SYS_write).rare("says what went wrong"),
    call!(SYS_close).rare("who let go of something last, closes it"),
    call!(SYS_futex)
        .is(1, futex(libc::FUTEX_WAKE))
        .rare("depends on who is quicker"),
    call!(SYS_futex)
        .is(1, futex(libc::FUTEX_WAIT_BITSET))
        .rare("depends on who is quicker"),
    call!(SYS_futex)
        .is(1, futex(libc::FUTEX_WAIT))
        .rare(ALLOCATOR),
    #[cfg(debug_assertions)]
    call!(SYS_fcntl)
        .is(1, libc::F_GETFD as i64)
        .rare("looks whether what is closed was open"),
    call!(SYS_clock_gettime).rare("where the clock can't be read without a call"),
    call!(SYS_restart_syscall).rare("goes on after SIGSTOP with a call that has a time limit"),
    call!(SYS_mmap)
        .within(2, READ_WRITE)
        .is(3, PRIVATE)
        .rare(ALLOCATOR),
    call!(SYS_mmap)
        .is(2, 0)
        .is(3, PRIVATE | libc::MAP_NORESERVE as i64)
        .rare(ALLOCATOR),
    call!(SYS_mmap)
        .is(2, READ_WRITE)
        .is(3, DROPPABLE)
        .rare("random bytes, with a newer C library"),
    call!(SYS_munmap).rare(ALLOCATOR),
    call!(SYS_mprotect).within(2, READ_WRITE).rare(ALLOCATOR),
    call!(SYS_mremap)
        .is(3, libc::MREMAP_MAYMOVE as i64)
        .rare(ALLOCATOR),
    call!(SYS_madvise)
        .is(2, libc::MADV_DONTNEED as i64)
        .rare(ALLOCATOR),
    call!(SYS_brk).rare(ALLOCATOR),
    call!(SYS_sched_getaffinity).rare(ALLOCATOR),
    call!(SYS_rt_sigaction)
        .is(0, libc::SIGSEGV as i64)
        .rare(FAULT),
    call!(SYS_rt_sigaction)
        .is(0, libc::SIGBUS as i64)
        .rare(FAULT),
    call!(SYS_rt_sigreturn).rare(FAULT),
    call!(SYS_rt_sigaction)
        .is(0, libc::SIGABRT as i64)
        .rare(PANIC),
    call!(SYS_rt_sigprocmask).rare(PANIC),
    call!(SYS_gettid).rare(PANIC),
    call!(SYS_getpid).rare(PANIC),
    call!(SYS_tgkill).is(2, libc::SIGABRT as i64).rare(PANIC),
    call!(SYS_exit_group).rare("ends a process that can't go on"),
];

/// What ends a thread that is not the first, and so is mostly ended by the end of the process.
pub const END_OF_THREAD: &[Call] = &[
    call!(SYS_sigaltstack).rare("a thread ends before its process"),
    call!(SYS_exit).rare("a thread ends before its process"),
];

/// What starts a thread, in the way that has its flags in a register: those of clone3 can't be looked at.
/// It then limits itself.
pub const NEW_THREAD: &[Call] = &[
    call!(SYS_clone3)
        .unknown()
        .rare("is answered before it could be counted"),
    call!(SYS_clone).is(0, THREAD),
    call!(SYS_mmap)
        .is(2, 0)
        .is(3, PRIVATE | libc::MAP_STACK as i64),
    call!(SYS_mmap)
        .is(2, READ_WRITE)
        .is(3, PRIVATE | libc::MAP_STACK as i64),
    call!(SYS_rt_sigaction).is(0, SIGSETXID),
    call!(SYS_set_robust_list),
    call!(SYS_rseq),
    call!(SYS_sigaltstack),
    call!(SYS_prctl).is(0, libc::PR_SET_NAME as i64),
    call!(SYS_prctl)
        .is(0, libc::PR_SET_NO_NEW_PRIVS as i64)
        .is(1, 1),
    call!(SYS_seccomp)
        .is(0, libc::SECCOMP_SET_MODE_FILTER as i64)
        .is(1, 0),
];

/// What a thread shares with the others: all. It has no namespaces of its own and is no process.
const THREAD: i64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as i64;

/// An operation on a futex that no other process has.
const fn futex(operation: libc::c_int) -> i64 {
    (operation | libc::FUTEX_PRIVATE_FLAG) as i64
}
