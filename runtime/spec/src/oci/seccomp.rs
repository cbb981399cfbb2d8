//! The default seccomp profile: a list of what programs need, everything else fails with EPERM.
//!
//! Some calls are allowed only with the capability that the kernel asks for anyway, so that a
//! container which was given the capability can use it.

use std::collections::HashSet;

use oci_spec::runtime::{
    Arch, Capability, LinuxCapabilities, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
};

use super::profile::ProfileFile;
use crate::{
    error::PodError,
    field::Field,
    spec::{ContainerSecurity, Seccomp},
};

/// Calls that create namespaces: `CLONE_NEW*` of clone(2) but for CLONE_NEWTIME, whose bit
/// belongs to the exit signal there.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// errno(3) ENOSYS: makes the C library fall back from clone3(2), whose flags are in memory and
/// can't be looked at, to clone(2).
const ENOSYS: u32 = 38;
/// errno(3) EPERM.
const EPERM: u32 = 1;
/// `AF_VSOCK`: it leads out of the pod, to the VMM.
const AF_VSOCK: u64 = 40;
/// Personalities (personality(2)): PER_LINUX, PER_LINUX32, with and without UNAME26, and a query.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

#[rustfmt::skip]
const FILES: &[&str] = &[
    "access", "cachestat", "chdir", "chmod", "chown", "chown32", "close", "close_range",
    "copy_file_range", "creat", "dup", "dup2", "dup3", "faccessat", "faccessat2", "fadvise64",
    "fadvise64_64", "fallocate", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown",
    "fchown32", "fchownat", "fcntl", "fcntl64", "fdatasync", "fgetxattr", "flistxattr", "flock",
    "fremovexattr", "fsetxattr", "fstat", "fstat64", "fstatat64", "fstatfs", "fstatfs64", "fsync",
    "ftruncate", "ftruncate64", "futimesat", "getcwd", "getdents", "getdents64", "getxattr",
    "getxattrat", "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch",
    "ioctl", "lchown", "lchown32", "lgetxattr", "link", "linkat", "listxattr", "listxattrat",
    "llistxattr", "lremovexattr", "lseek", "_llseek", "lsetxattr", "lstat", "lstat64",
    "memfd_create", "memfd_secret", "mkdir", "mkdirat", "mknod", "mknodat", "name_to_handle_at",
    "newfstatat", "open", "openat", "openat2", "pipe", "pipe2", "pread64", "preadv", "preadv2",
    "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat", "readv",
    "removexattr", "removexattrat", "rename", "renameat", "renameat2", "rmdir", "sendfile",
    "sendfile64", "setxattr", "setxattrat", "splice", "stat", "stat64", "statfs", "statfs64",
    "statmount", "listmount", "statx", "symlink", "symlinkat", "sync", "sync_file_range",
    "syncfs", "tee", "truncate", "truncate64", "umask", "unlink", "unlinkat", "utime", "utimensat",
    "utimensat_time64", "utimes", "vmsplice", "write", "writev",
];

#[rustfmt::skip]
const LANDLOCK: &[&str] = &[
    "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self",
];

#[rustfmt::skip]
const MEMORY: &[&str] = &[
    "brk", "madvise", "map_shadow_stack", "membarrier", "mincore", "mlock", "mlock2", "mlockall",
    "mmap", "mmap2", "mprotect", "mremap", "mseal", "msync", "munlock", "munlockall", "munmap",
    "pkey_alloc", "pkey_free", "pkey_mprotect", "process_mrelease", "remap_file_pages",
];

#[rustfmt::skip]
const PROCESSES: &[&str] = &[
    "arch_prctl", "capget", "capset", "execve", "execveat", "exit", "exit_group", "fork",
    "futex", "futex_requeue", "futex_time64", "futex_wait", "futex_waitv", "futex_wake",
    "get_robust_list", "get_thread_area", "getcpu", "getegid", "getegid32", "geteuid",
    "geteuid32", "getgid", "getgid32", "getgroups", "getgroups32", "getpgid", "getpgrp", "getpid",
    "getppid", "getpriority", "getresgid", "getresgid32", "getresuid", "getresuid32", "getrlimit",
    "getrusage", "getsid", "gettid", "getuid", "getuid32", "ioprio_get", "ioprio_set", "kill",
    "modify_ldt", "pause", "pidfd_open", "pidfd_send_signal", "prctl", "prlimit64", "ptrace",
    "process_vm_readv", "process_vm_writev", "rseq", "sched_get_priority_max",
    "sched_get_priority_min", "sched_getaffinity", "sched_getattr", "sched_getparam",
    "sched_getscheduler", "sched_rr_get_interval", "sched_rr_get_interval_time64",
    "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield",
    "seccomp", "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsgid32",
    "setfsuid", "setfsuid32", "setgid", "setgid32", "setgroups", "setgroups32", "setpgid",
    "setpriority", "setregid", "setregid32", "setresgid", "setresgid32", "setresuid",
    "setresuid32", "setreuid", "setreuid32", "setrlimit", "setsid", "setuid", "setuid32",
    "sysinfo", "tgkill", "times", "tkill", "ugetrlimit", "uname", "vfork", "wait4", "waitid",
    "waitpid",
];

#[rustfmt::skip]
const SIGNALS_AND_TIME: &[&str] = &[
    "alarm", "clock_adjtime", "clock_adjtime64", "adjtimex", "clock_getres", "clock_getres_time64",
    "clock_gettime", "clock_gettime64", "clock_nanosleep", "clock_nanosleep_time64", "getitimer",
    "gettimeofday", "nanosleep", "restart_syscall", "rt_sigaction", "rt_sigpending",
    "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait",
    "rt_sigtimedwait_time64", "rt_tgsigqueueinfo", "setitimer", "sigaltstack", "signalfd",
    "signalfd4", "sigprocmask", "sigreturn", "time", "timer_create", "timer_delete",
    "timer_getoverrun", "timer_gettime", "timer_gettime64", "timer_settime", "timer_settime64",
    "timerfd_create", "timerfd_gettime", "timerfd_gettime64", "timerfd_settime",
    "timerfd_settime64",
];

#[rustfmt::skip]
const WAITING: &[&str] = &[
    "epoll_create", "epoll_create1", "epoll_ctl", "epoll_ctl_old", "epoll_pwait", "epoll_pwait2",
    "epoll_wait", "epoll_wait_old", "eventfd", "eventfd2", "io_cancel", "io_destroy",
    "io_getevents", "io_pgetevents", "io_pgetevents_time64", "io_setup", "io_submit", "_newselect",
    "poll", "ppoll", "ppoll_time64", "pselect6", "pselect6_time64", "select",
];

#[rustfmt::skip]
const SOCKETS_AND_IPC: &[&str] = &[
    "accept", "accept4", "bind", "connect", "getpeername", "getrandom", "getsockname",
    "getsockopt", "ipc", "listen", "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive",
    "mq_timedreceive_time64", "mq_timedsend", "mq_timedsend_time64", "mq_unlink", "msgctl",
    "msgget", "msgrcv", "msgsnd", "recv", "recvfrom", "recvmmsg", "recvmmsg_time64", "recvmsg",
    "semctl", "semget", "semop", "semtimedop", "semtimedop_time64", "send", "sendmmsg", "sendmsg",
    "sendto", "setsockopt", "shmat", "shmctl", "shmdt", "shmget", "shutdown", "socketcall",
    "socketpair",
];

#[rustfmt::skip]
const WITH_CAPABILITY: &[(Capability, &[&str])] = &[
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (
        Capability::SysModule,
        &["delete_module", "finit_module", "init_module"],
    ),
    (Capability::SysPacct, &["acct"]),
    (
        Capability::SysPtrace,
        &["kcmp", "pidfd_getfd", "process_madvise"],
    ),
    (Capability::SysRawio, &["ioperm", "iopl"]),
    (
        Capability::SysTime,
        &["clock_settime", "clock_settime64", "settimeofday", "stime"],
    ),
    (Capability::SysTtyConfig, &["vhangup"]),
    (
        Capability::SysNice,
        &[
            "get_mempolicy", "mbind", "move_pages", "set_mempolicy", "set_mempolicy_home_node",
        ],
    ),
    (Capability::Syslog, &["syslog"]),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
    (
        Capability::SysAdmin,
        &[
            "bpf", "clone", "clone3", "fanotify_init", "fanotify_mark", "fsconfig", "fsmount",
            "fsopen", "fspick", "lookup_dcookie", "mount", "mount_setattr", "move_mount",
            "open_tree", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd",
            "setdomainname", "sethostname", "setns", "syslog", "umount", "umount2", "unshare",
        ],
    ),
];

/// The profile of a container; none when it is not confined. `localhost` is the one that was read from
/// the node, for `Seccomp::Localhost`.
pub(super) fn profile(
    security: &ContainerSecurity,
    localhost: Option<&ProfileFile>,
    is_default_on: bool,
    capabilities: Option<&LinuxCapabilities>,
) -> Result<Option<LinuxSeccomp>, PodError> {
    if security.privileged {
        return Ok(None);
    }
    let bounding = capabilities.and_then(|c| c.bounding().clone());
    let bounding = bounding.unwrap_or_default();
    Ok(match security.seccomp {
        Seccomp::Unset if !is_default_on => None,
        Seccomp::Unconfined => None,
        Seccomp::Localhost(_) => localhost
            .map(|file: &ProfileFile| file.resolve(&bounding))
            .transpose()
            .map_err(|reason| PodError::invalid(Field::SeccompProfile, reason))?,
        Seccomp::RuntimeDefault | Seccomp::Unset => Some(default_profile(&bounding)?),
    })
}

fn default_profile(capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp, PodError> {
    let mut names: Vec<&str> = [
        FILES,
        LANDLOCK,
        MEMORY,
        PROCESSES,
        SIGNALS_AND_TIME,
        WAITING,
        SOCKETS_AND_IPC,
    ]
    .concat();
    for (capability, calls) in WITH_CAPABILITY {
        if capabilities.contains(capability) {
            names.extend_from_slice(calls);
        }
    }
    names.sort_unstable();
    names.dedup();

    let mut rules = vec![allow(&names, None)];
    for personality in PERSONALITIES {
        let argument = argument(0, LinuxSeccompOperator::ScmpCmpEq, personality, None)?;
        rules.push(allow(&["personality"], Some(argument)));
    }
    let not_vsock = argument(0, LinuxSeccompOperator::ScmpCmpNe, AF_VSOCK, None)?;
    rules.push(allow(&["socket"], Some(not_vsock)));
    if !capabilities.contains(&Capability::SysAdmin) {
        let no_namespaces = argument(
            0,
            LinuxSeccompOperator::ScmpCmpMaskedEq,
            CLONE_NAMESPACES,
            Some(0),
        )?;
        rules.push(allow(&["clone"], Some(no_namespaces)));
        let mut refused = LinuxSyscall::default();
        refused.set_names(vec!["clone3".into()]);
        refused.set_action(LinuxSeccompAction::ScmpActErrno);
        refused.set_errno_ret(Some(ENOSYS));
        rules.push(refused);
    }

    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(LinuxSeccompAction::ScmpActErrno);
    profile.set_default_errno_ret(Some(EPERM));
    profile.set_architectures(Some(vec![
        Arch::ScmpArchX86_64,
        Arch::ScmpArchX86,
        Arch::ScmpArchX32,
    ]));
    profile.set_syscalls(Some(rules));
    Ok(profile)
}

fn allow(names: &[&str], argument: Option<LinuxSeccompArg>) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|n| (*n).to_owned()).collect());
    rule.set_action(LinuxSeccompAction::ScmpActAllow);
    rule.set_args(argument.map(|argument| vec![argument]));
    rule
}

fn argument(
    index: usize,
    op: LinuxSeccompOperator,
    value: u64,
    value_two: Option<u64>,
) -> Result<LinuxSeccompArg, PodError> {
    let mut argument = LinuxSeccompArgBuilder::default()
        .index(index)
        .op(op)
        .value(value);
    if let Some(value) = value_two {
        argument = argument.value_two(value);
    }
    argument
        .build()
        .map_err(|e| PodError::internal("make the seccomp profile", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(profile: &LinuxSeccomp, name: &str) -> bool {
        profile.syscalls().as_ref().unwrap().iter().any(|rule| {
            rule.action() == LinuxSeccompAction::ScmpActAllow
                && rule.names().iter().any(|n| n == name)
                && rule.args().is_none()
        })
    }

    #[test]
    fn dangerous_calls_need_their_capability() {
        let bare = default_profile(&HashSet::new()).unwrap();
        let admin = default_profile(&HashSet::from([Capability::SysAdmin])).unwrap();
        for name in ["mount", "unshare", "setns", "bpf", "clone3", "clone"] {
            assert!(!allowed(&bare, name), "{name}");
            assert!(allowed(&admin, name), "{name}");
        }
        for name in [
            "keyctl",
            "kexec_load",
            "add_key",
            "userfaultfd",
            "io_uring_setup",
            "swapon",
            "init_module",
            "open_by_handle_at",
            "reboot",
            "settimeofday",
        ] {
            assert!(!allowed(&bare, name) && !allowed(&admin, name), "{name}");
        }
    }

    #[test]
    fn what_programs_need_is_there() {
        let bare = default_profile(&HashSet::new()).unwrap();
        for name in [
            "execve",
            "openat",
            "read",
            "write",
            "mmap",
            "futex",
            "rseq",
            "statx",
            "epoll_wait",
            "accept4",
            "getrandom",
            "prctl",
            "clock_nanosleep",
            "fchmodat2",
        ] {
            assert!(allowed(&bare, name), "{name}");
        }
    }
}
