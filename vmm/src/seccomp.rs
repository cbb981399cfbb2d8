//! The system calls that each kind of thread of a VM may make.
//!
//! ```text
//! START ─ a VM is built, threads start ─▶ CONTROL
//!   └─ each thread, before anything else ─▶ VCPU, DISKS, NETWORK
//! ```
//! The process has [`START`] before it reads the first byte of a request. What is rare says why, so
//! that a list has nothing else in it that is never used (tests/checks/syscalls).

use std::ffi::c_uint;

use hull_jail::call;
use hull_jail::seccomp::common::{ANY, END_OF_THREAD, NEW_THREAD};
use hull_jail::seccomp::{Call, List};
use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_enable_cap, kvm_fpu, kvm_ioeventfd,
    kvm_lapic_state, kvm_mp_state, kvm_msi, kvm_msr_list, kvm_msrs, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// What a process may call until its VM has started: all that its threads may, and what starting takes.
pub const START: List = List {
    threads: "hull-vmm:start",
    contains: &[&VCPU, &DISKS, &NETWORK, &CONTROL],
    calls: &[STARTING, NEW_THREAD],
};

/// What the main thread may call while the VM runs.
pub const CONTROL: List = List {
    threads: "hull-vmm:run",
    contains: &[],
    calls: &[CONTROL_ALONE, ANY],
};

/// What a vCPU's thread may call.
pub const VCPU: List = List {
    threads: "vcpu*",
    contains: &[],
    calls: &[VCPU_ALONE, END_OF_THREAD, ANY],
};

/// What the thread that serves disks may call.
pub const DISKS: List = List {
    threads: "disks",
    contains: &[],
    calls: &[DISKS_ALONE, END_OF_THREAD, ANY],
};

/// What a thread that serves network cards may call.
pub const NETWORK: List = List {
    threads: "network*",
    contains: &[],
    calls: &[NETWORK_ALONE, END_OF_THREAD, ANY],
};

/// All lists.
pub const LISTS: [List; 5] = [START, CONTROL, VCPU, DISKS, NETWORK];

const READ: i64 = libc::PROT_READ as i64;
const READ_WRITE: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;
const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
const NORESERVE: i64 = libc::MAP_NORESERVE as i64;
const FIXED: i64 = libc::MAP_FIXED as i64;
/// The signal that has a vCPU leave the guest; libc gives the first that the C library leaves to programs.
const SIGRTMIN: i64 = 34;

const VCPU_ALONE: &[Call] = &[
    call!(SYS_ioctl).is(1, KVM_RUN),
    call!(SYS_ioctl).is(1, KVM_SIGNAL_MSI),
    call!(SYS_ioctl)
        .is(1, KVM_GET_REGS)
        .rare("where the guest was when KVM gave up on it"),
    call!(SYS_ioctl).is(1, ioctl(libc::TUNSETOFFLOAD)),
    call!(SYS_ioctl).is(1, ioctl(libc::TUNSETQUEUE)),
    call!(SYS_epoll_ctl),
    call!(SYS_timerfd_settime),
    call!(SYS_getrandom),
    call!(SYS_rt_sigreturn),
];

const DISKS_ALONE: &[Call] = &[
    call!(SYS_epoll_wait),
    call!(SYS_preadv),
    call!(SYS_pwritev),
    call!(SYS_fdatasync),
    call!(SYS_fallocate).is(
        1,
        (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as i64,
    ),
    call!(SYS_ioctl).is(1, KVM_SIGNAL_MSI),
];

const NETWORK_ALONE: &[Call] = &[
    call!(SYS_epoll_wait),
    call!(SYS_epoll_ctl),
    call!(SYS_readv),
    call!(SYS_writev),
    call!(SYS_timerfd_settime),
    call!(SYS_ioctl).is(1, KVM_SIGNAL_MSI),
    call!(SYS_ioctl).is(1, ioctl(libc::TUNSETQUEUE)),
];

const CONTROL_ALONE: &[Call] = &[
    call!(SYS_epoll_wait),
    call!(SYS_epoll_ctl),
    call!(SYS_read),
    call!(SYS_close),
    call!(SYS_accept4).is(3, libc::SOCK_CLOEXEC as i64),
    call!(SYS_recvmsg),
    call!(SYS_recvfrom),
    call!(SYS_sendto),
    call!(SYS_shutdown),
    call!(SYS_ppoll).rare("a VM with shares pauses"),
    call!(SYS_getrandom),
    call!(SYS_timerfd_settime),
    call!(SYS_clock_nanosleep)
        .is(0, libc::CLOCK_MONOTONIC as i64)
        .rare("a vCPU has the device's registers"),
    call!(SYS_ioctl).is(1, KVM_SIGNAL_MSI),
    // Devices that are attached.
    call!(SYS_ioctl).is(1, KVM_IOEVENTFD),
    call!(SYS_ioctl).is(1, KVM_SET_USER_MEMORY_REGION),
    call!(SYS_ioctl).is(1, ioctl(libc::TUNGETIFF)),
    call!(SYS_ioctl).is(1, ioctl(libc::TUNSETVNETHDRSZ)),
    call!(SYS_ioctl).is(1, ioctl(libc::TUNSETQUEUE)),
    call!(SYS_ioctl).is(1, ioctl(libc::FIONBIO)),
    call!(SYS_eventfd2).is(1, (libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) as i64),
    call!(SYS_timerfd_create).is(0, libc::CLOCK_MONOTONIC as i64),
    call!(SYS_fcntl).is(1, libc::F_DUPFD_CLOEXEC as i64),
    call!(SYS_fcntl).is(1, libc::F_GETFL as i64),
    call!(SYS_statx).has(2, libc::AT_EMPTY_PATH as i64),
    call!(SYS_lseek).is(2, libc::SEEK_END as i64),
    call!(SYS_getsockopt).is(1, libc::SOL_SOCKET as i64),
    call!(SYS_setsockopt)
        .is(1, libc::SOL_SOCKET as i64)
        .is(2, libc::SO_SNDBUF as i64)
        .rare("the daemon may not give a socket so large a buffer"),
    call!(SYS_mmap)
        .is(2, READ)
        .is(3, libc::MAP_SHARED as i64 | FIXED),
    call!(SYS_mmap)
        .is(2, READ)
        .is(3, PRIVATE | NORESERVE | FIXED),
    call!(SYS_mmap)
        .is(2, READ_WRITE)
        .is(3, PRIVATE | FIXED)
        .rare("the guest of a clone tells of free pages"),
    // A snapshot.
    call!(SYS_ioctl).is(1, KVM_GET_MP_STATE).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_REGS).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_SREGS).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_XSAVE).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_XCRS).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_DEBUGREGS).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_LAPIC).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_MSRS).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_VCPU_EVENTS).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_TSC_KHZ).rare(SAVE),
    call!(SYS_ioctl).is(1, KVM_GET_CLOCK).rare(SAVE),
    call!(SYS_ftruncate).rare(SAVE),
    call!(SYS_pwrite64).rare(SAVE),
    call!(SYS_madvise)
        .is(2, libc::MADV_COLLAPSE as i64)
        .rare(SAVE),
    // vCPUs that are to pause or stop.
    call!(SYS_tgkill).is(2, SIGRTMIN),
    call!(SYS_getpid),
    call!(SYS_rt_sigprocmask),
    // The end.
    call!(SYS_setsockopt)
        .is(1, libc::SOL_SOCKET as i64)
        .is(2, libc::SO_SNDTIMEO as i64),
    call!(SYS_sigaltstack),
    call!(SYS_exit_group),
];

const SAVE: &str = "a VM is saved";
const RESTORE: &str = "a VM is made from a snapshot";

/// What building a VM and starting its threads takes beyond what they go on to call.
const STARTING: &[Call] = &[
    call!(SYS_ioctl).is(1, KVM_CHECK_EXTENSION),
    call!(SYS_ioctl).is(1, KVM_CREATE_VM),
    call!(SYS_ioctl).is(1, KVM_GET_VCPU_MMAP_SIZE),
    call!(SYS_ioctl).is(1, KVM_GET_SUPPORTED_CPUID),
    call!(SYS_ioctl).is(1, KVM_GET_TSC_KHZ),
    call!(SYS_ioctl).is(1, KVM_CREATE_VCPU),
    call!(SYS_ioctl).is(1, KVM_SET_TSS_ADDR),
    call!(SYS_ioctl).is(1, KVM_ENABLE_CAP),
    call!(SYS_ioctl).is(1, KVM_SET_CPUID2),
    call!(SYS_ioctl).is(1, KVM_SET_MSRS),
    call!(SYS_ioctl).is(1, KVM_SET_FPU),
    call!(SYS_ioctl).is(1, KVM_GET_SREGS),
    call!(SYS_ioctl).is(1, KVM_SET_SREGS),
    call!(SYS_ioctl).is(1, KVM_SET_REGS),
    call!(SYS_ioctl).is(1, KVM_GET_MSR_INDEX_LIST),
    call!(SYS_ioctl).is(1, KVM_SET_MP_STATE).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_SET_XSAVE).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_SET_XCRS).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_SET_DEBUGREGS).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_SET_LAPIC).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_SET_VCPU_EVENTS).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_KVMCLOCK_CTRL).rare(RESTORE),
    call!(SYS_ioctl).is(1, KVM_SET_CLOCK).rare(RESTORE),
    call!(SYS_pread64).rare(RESTORE),
    call!(SYS_madvise)
        .is(2, libc::MADV_POPULATE_WRITE as i64)
        .rare(RESTORE),
    call!(SYS_mmap)
        .is(2, READ_WRITE)
        .is(3, libc::MAP_PRIVATE as i64 | FIXED)
        .rare(RESTORE),
    call!(SYS_epoll_create1).is(0, libc::EPOLL_CLOEXEC as i64),
    call!(SYS_lseek),
    call!(SYS_mmap)
        .is(2, READ_WRITE)
        .is(3, libc::MAP_SHARED as i64),
    call!(SYS_mmap)
        .within(2, READ_WRITE)
        .is(3, PRIVATE | NORESERVE),
    call!(SYS_madvise).is(2, libc::MADV_HUGEPAGE as i64),
    call!(SYS_madvise).is(2, libc::MADV_DONTDUMP as i64),
    call!(SYS_rt_sigaction).is(0, SIGRTMIN),
];

const KVM_CREATE_VM: i64 = kvm(_IOC_NONE, 0x01, 0);
const KVM_GET_MSR_INDEX_LIST: i64 = kvm(_IOC_READ | _IOC_WRITE, 0x02, size_of::<kvm_msr_list>());
const KVM_CHECK_EXTENSION: i64 = kvm(_IOC_NONE, 0x03, 0);
const KVM_GET_VCPU_MMAP_SIZE: i64 = kvm(_IOC_NONE, 0x04, 0);
const KVM_GET_SUPPORTED_CPUID: i64 = kvm(_IOC_READ | _IOC_WRITE, 0x05, size_of::<kvm_cpuid2>());
const KVM_CREATE_VCPU: i64 = kvm(_IOC_NONE, 0x41, 0);
const KVM_SET_USER_MEMORY_REGION: i64 =
    kvm(_IOC_WRITE, 0x46, size_of::<kvm_userspace_memory_region>());
const KVM_SET_TSS_ADDR: i64 = kvm(_IOC_NONE, 0x47, 0);
const KVM_IOEVENTFD: i64 = kvm(_IOC_WRITE, 0x79, size_of::<kvm_ioeventfd>());
const KVM_RUN: i64 = kvm(_IOC_NONE, 0x80, 0);
const KVM_GET_REGS: i64 = kvm(_IOC_READ, 0x81, size_of::<kvm_regs>());
const KVM_SET_REGS: i64 = kvm(_IOC_WRITE, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: i64 = kvm(_IOC_READ, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: i64 = kvm(_IOC_WRITE, 0x84, size_of::<kvm_sregs>());
const KVM_SET_MSRS: i64 = kvm(_IOC_WRITE, 0x89, size_of::<kvm_msrs>());
const KVM_GET_MSRS: i64 = kvm(_IOC_READ | _IOC_WRITE, 0x88, size_of::<kvm_msrs>());
const KVM_SET_FPU: i64 = kvm(_IOC_WRITE, 0x8d, size_of::<kvm_fpu>());
const KVM_GET_LAPIC: i64 = kvm(_IOC_READ, 0x8e, size_of::<kvm_lapic_state>());
const KVM_SET_LAPIC: i64 = kvm(_IOC_WRITE, 0x8f, size_of::<kvm_lapic_state>());
const KVM_SET_CPUID2: i64 = kvm(_IOC_WRITE, 0x90, size_of::<kvm_cpuid2>());
const KVM_GET_MP_STATE: i64 = kvm(_IOC_READ, 0x98, size_of::<kvm_mp_state>());
const KVM_SET_MP_STATE: i64 = kvm(_IOC_WRITE, 0x99, size_of::<kvm_mp_state>());
const KVM_SET_CLOCK: i64 = kvm(_IOC_WRITE, 0x7b, size_of::<kvm_clock_data>());
const KVM_GET_CLOCK: i64 = kvm(_IOC_READ, 0x7c, size_of::<kvm_clock_data>());
const KVM_GET_VCPU_EVENTS: i64 = kvm(_IOC_READ, 0x9f, size_of::<kvm_vcpu_events>());
const KVM_SET_VCPU_EVENTS: i64 = kvm(_IOC_WRITE, 0xa0, size_of::<kvm_vcpu_events>());
const KVM_GET_DEBUGREGS: i64 = kvm(_IOC_READ, 0xa1, size_of::<kvm_debugregs>());
const KVM_SET_DEBUGREGS: i64 = kvm(_IOC_WRITE, 0xa2, size_of::<kvm_debugregs>());
const KVM_GET_TSC_KHZ: i64 = kvm(_IOC_NONE, 0xa3, 0);
const KVM_ENABLE_CAP: i64 = kvm(_IOC_WRITE, 0xa3, size_of::<kvm_enable_cap>());
const KVM_GET_XSAVE: i64 = kvm(_IOC_READ, 0xa4, size_of::<kvm_xsave>());
const KVM_SET_XSAVE: i64 = kvm(_IOC_WRITE, 0xa5, size_of::<kvm_xsave>());
const KVM_GET_XCRS: i64 = kvm(_IOC_READ, 0xa6, size_of::<kvm_xcrs>());
const KVM_SET_XCRS: i64 = kvm(_IOC_WRITE, 0xa7, size_of::<kvm_xcrs>());
const KVM_KVMCLOCK_CTRL: i64 = kvm(_IOC_NONE, 0xad, 0);
const KVM_SIGNAL_MSI: i64 = kvm(_IOC_WRITE, 0xa5, size_of::<kvm_msi>());

/// The number of a request to KVM (linux/kvm.h).
const fn kvm(direction: c_uint, number: c_uint, size: usize) -> i64 {
    ioctl_expr(direction, KVMIO, number, size as c_uint) as i64
}

const fn ioctl(request: libc::Ioctl) -> i64 {
    request as i64
}

#[cfg(test)]
mod tests {
    use hull_jail::seccomp::probe::assert_exact;

    use super::*;

    #[test]
    fn the_main_threads_lists_are_what_the_kernel_lets_pass() {
        assert_exact(&START);
        assert_exact(&CONTROL);
    }

    #[test]
    fn the_lists_of_vcpus_are_what_the_kernel_lets_pass() {
        assert_exact(&VCPU);
    }

    #[test]
    fn the_lists_of_devices_threads_are_what_the_kernel_lets_pass() {
        assert_exact(&DISKS);
        assert_exact(&NETWORK);
    }
}
