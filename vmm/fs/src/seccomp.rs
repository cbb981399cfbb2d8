//! The system calls that each kind of thread of the file server may make.
//!
//! ```text
//! manager ─ starts the server, listens ─▶ MANAGER
//! server ─ in its jail ─▶ SERVER ─ each thread that takes requests ─▶ REQUESTS
//! ```
//! The main thread of the server keeps what it started threads with: it reads what the manager says,
//! nothing of a guest, and lets go of files that the host deleted. What is rare says why, so that a list has nothing else in it that is never used
//! (tests/checks/syscalls). To open files by handle is on none of them: it finds those outside of a share.

use hull_jail::call;
use hull_jail::seccomp::common::{ANY, END_OF_THREAD, NEW_THREAD};
use hull_jail::seccomp::{Call, List};

/// What the server may call in its jail, before it has threads.
pub const SERVER: List = List {
    threads: "hull-fs:serve",
    contains: &[&REQUESTS],
    calls: &[SERVER_ALONE, NEW_THREAD],
};

/// What a thread may call that takes requests of the guest.
pub const REQUESTS: List = List {
    threads: "fuse*",
    contains: &[],
    calls: &[REQUESTS_ALONE, END_OF_THREAD, ANY],
};

/// What the manager may call once the server runs.
pub const MANAGER: List = List {
    threads: "hull-fs:manage",
    contains: &[],
    calls: &[MANAGER_ALONE, ANY],
};

/// All lists.
pub const LISTS: [List; 3] = [SERVER, REQUESTS, MANAGER];

const REQUESTS_ALONE: &[Call] = &[
    call!(SYS_close),
    call!(SYS_recvfrom),
    call!(SYS_sendto),
    call!(SYS_write),
    call!(SYS_writev),
    call!(SYS_shutdown),
    // For whom a request is.
    call!(SYS_umask),
    call!(SYS_setresuid),
    call!(SYS_setresgid),
    call!(SYS_capget),
    call!(SYS_capset),
    // Files.
    call!(SYS_openat),
    call!(SYS_preadv),
    call!(SYS_pwritev),
    call!(SYS_lseek),
    call!(SYS_ftruncate),
    call!(SYS_fallocate),
    call!(SYS_fsync),
    call!(SYS_fdatasync),
    call!(SYS_dup).rare("FUSE_FLUSH, of file systems of other machines"),
    call!(SYS_fcntl).is(1, libc::F_SETFL as i64),
    // Their attributes.
    call!(SYS_newfstatat),
    call!(SYS_statx),
    call!(SYS_fstatfs),
    call!(SYS_fchmod).rare("Linux names the inode, other kernels may name what is open"),
    call!(SYS_fchmodat),
    call!(SYS_fchownat),
    call!(SYS_utimensat),
    call!(SYS_getxattr),
    call!(SYS_setxattr),
    call!(SYS_listxattr),
    call!(SYS_removexattr),
    // Their names. Of what is no regular file, what another kernel can't use.
    call!(SYS_getdents64),
    call!(SYS_mkdirat),
    call!(SYS_mknodat)
        .masked(2, libc::S_IFMT, libc::S_IFREG)
        .rare("a program makes a regular file as it makes nodes"),
    call!(SYS_mknodat).masked(2, libc::S_IFMT, libc::S_IFIFO),
    call!(SYS_mknodat).masked(2, libc::S_IFMT, libc::S_IFSOCK),
    call!(SYS_linkat),
    call!(SYS_symlinkat),
    call!(SYS_readlinkat),
    call!(SYS_unlinkat),
    call!(SYS_renameat2),
    call!(SYS_getrandom),
];

/// What starting threads takes beyond what they go on to call.
const SERVER_ALONE: &[Call] = &[
    call!(SYS_read),
    call!(SYS_ppoll),
    call!(SYS_prlimit64),
    call!(SYS_fcntl).is(1, libc::F_DUPFD_CLOEXEC as i64),
    call!(SYS_unshare).is(0, libc::CLONE_FS as i64),
    call!(SYS_socketpair).is(0, libc::AF_UNIX as i64),
];

const MANAGER_ALONE: &[Call] = &[
    call!(SYS_read),
    call!(SYS_ppoll),
    call!(SYS_accept4).is(3, libc::SOCK_CLOEXEC as i64),
    call!(SYS_setsockopt).is(1, libc::SOL_SOCKET as i64),
    call!(SYS_recvfrom),
    call!(SYS_sendto),
    call!(SYS_clock_nanosleep).rare("there is no descriptor for a connection"),
    // Shares.
    call!(SYS_open),
    call!(SYS_openat),
    call!(SYS_fstat),
    call!(SYS_statx),
    call!(SYS_readlink),
    call!(SYS_open_tree),
    call!(SYS_mount_setattr),
    call!(SYS_setns).is(1, libc::CLONE_NEWNS as i64),
    call!(SYS_mkdir),
    call!(SYS_move_mount),
    call!(SYS_umount2),
    call!(SYS_rmdir),
    call!(SYS_unlink),
    // The end.
    call!(SYS_kill).is(1, libc::SIGKILL as i64),
    call!(SYS_wait4),
    call!(SYS_sigaltstack),
];

#[cfg(test)]
mod tests {
    use hull_jail::seccomp::probe::assert_exact;

    use super::*;

    #[test]
    fn the_servers_lists_are_what_the_kernel_lets_pass() {
        assert_exact(&SERVER);
        assert_exact(&REQUESTS);
    }

    #[test]
    fn the_managers_list_is_what_the_kernel_lets_pass() {
        assert_exact(&MANAGER);
    }
}
