//! A container's seccomp profile (OCI runtime specification, "Seccomp"), by libseccomp.
//!
//! System calls that are newer than all in the profile are answered as by a kernel that lacks them, as runc
//! does it: a C library tries those first, and takes EPERM for an answer.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read, Seek},
};

use libc::sock_filter;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
    error::SeccompError,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use rustix::fs::{MemfdFlags, memfd_create};

use super::error::{StepError, doing};
use crate::sys;

/// A filter that can be put in force.
pub(super) struct Filter {
    program: Vec<sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: libc::c_ulong,
}

impl Filter {
    /// Makes what `profile` asks for.
    pub(super) fn new(profile: &LinuxSeccomp) -> Result<Self, StepError> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let made = || -> Result<ScmpFilterContext, SeccompError> {
            let mut context = ScmpFilterContext::new(default)?;
            for arch in profile.architectures().iter().flatten() {
                context.add_arch(arch_of(*arch))?;
            }
            Ok(context)
        };
        let mut context = made().map_err(|e| refused("make the seccomp filter", &e))?;
        let mut newest = None;
        for rule in profile.syscalls().iter().flatten() {
            let known = rule.names().iter().map(|name| ScmpSyscall::from_name(name));
            let known = known.flatten().map(i32::from);
            newest = newest.max(known.filter_map(|number| u32::try_from(number).ok()).max());
            let action = action(rule.action(), rule.errno_ret())?;
            // libseccomp takes no rule that says the same.
            if action == default {
                continue;
            }
            for name in rule.names() {
                // Names of other kernels and processors are in every profile.
                let Ok(call) = ScmpSyscall::from_name(name) else {
                    continue;
                };
                add(&mut context, action, call, rule)
                    .map_err(|e| refused(&format!("add {name} to the seccomp filter"), &e))?;
            }
        }
        let mut program = program(&context).map_err(doing("read the seccomp filter"))?;
        let lenient = matches!(
            default,
            ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_)
        );
        if let Some(newest) = newest.filter(|_| !lenient) {
            program.splice(0..0, unknown_above(newest));
        }
        let flags = profile.flags().iter().flatten().map(|flag| match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            // Without a listener it says nothing, and the kernel refuses it.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        });
        Ok(Self {
            program,
            flags: flags.fold(0, |all, flag| all | flag),
        })
    }

    /// Puts it in force for the calling process. `no_new_privs` stays what it is.
    pub(super) fn load(&self) -> Result<(), StepError> {
        sys::load_filter(&self.program, self.flags).map_err(doing("load the seccomp filter"))
    }
}

/// What libseccomp makes of a filter.
fn program(context: &ScmpFilterContext) -> io::Result<Vec<sock_filter>> {
    let mut file = File::from(memfd_create("seccomp", MemfdFlags::CLOEXEC)?);
    context.export_bpf(&file).map_err(io::Error::other)?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (instructions, _) = bytes.as_chunks::<8>();
    Ok(instructions.iter().map(instruction).collect())
}

fn instruction(bytes: &[u8; 8]) -> sock_filter {
    let [c0, c1, jt, jf, k @ ..] = *bytes;
    sock_filter {
        code: u16::from_ne_bytes([c0, c1]),
        jt,
        jf,
        k: u32::from_ne_bytes(k),
    }
}

/// The beginning of a filter that answers ENOSYS to system calls above the number `newest`.
fn unknown_above(newest: u32) -> [sock_filter; 6] {
    /// `AUDIT_ARCH_X86_64` of `linux/audit.h`.
    const ARCH: u32 = 0xc000_003e;
    /// `__X32_SYSCALL_BIT`: from here on they are of another interface, which the filter knows of.
    const X32: u32 = 0x4000_0000;
    // `struct seccomp_data` of seccomp(2).
    const NUMBER_AT: u32 = 0;
    const ARCH_AT: u32 = 4;
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0);
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let greater = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    [
        (load, ARCH_AT),
        ((equal, 0, 4), ARCH),
        (load, NUMBER_AT),
        ((at_least, 2, 0), X32),
        ((greater, 0, 1), newest),
        ((libc::BPF_RET | libc::BPF_K, 0, 0), unknown),
    ]
    .map(|((code, jt, jf), k)| sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt,
        jf,
        k,
    })
}

fn refused(step: &str, error: &SeccompError) -> StepError {
    StepError::Refused(format!("{step}: {error}"))
}

fn add(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    call: ScmpSyscall,
    rule: &LinuxSyscall,
) -> Result<(), SeccompError> {
    let args = rule.args().as_deref().unwrap_or_default();
    let compared: Vec<ScmpArgCompare> = args.iter().map(compare).collect();
    let mut seen = HashSet::new();
    if args.iter().all(|arg| seen.insert(arg.index())) {
        context.add_rule_conditional(action, call, &compared)?;
        return Ok(());
    }
    // An argument can be compared once in a rule; as in runc, any of the comparisons is enough then.
    for one in compared {
        context.add_rule_conditional(action, call, &[one])?;
    }
    Ok(())
}

fn compare(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let value = arg.value();
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // The first value is the mask, the second what is to be left.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(value),
            arg.value_two().unwrap_or(0),
        ),
    };
    // There are six arguments; libseccomp refuses others.
    ScmpArgCompare::new(
        u32::try_from(arg.index()).unwrap_or(u32::MAX),
        operator,
        value,
    )
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, StepError> {
    let errno = errno
        .and_then(|errno| i32::try_from(errno).ok())
        .unwrap_or(libc::EPERM);
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(errno).unwrap_or(u16::MAX))
        }
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(StepError::Refused(
                "the seccomp profile has SCMP_ACT_NOTIFY, but there is nobody to notify".to_owned(),
            ));
        }
    })
}

fn arch_of(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::{
        io::Errno,
        process::{PidfdFlags, chdir, getpid, pidfd_open},
        thread::set_no_new_privs,
    };
    use serde_json::json;

    use super::*;

    /// What a thread with this profile hears from chdir(2) and from a system call that is newer than what
    /// ends a thread.
    fn answers(profile: serde_json::Value) -> [Option<i32>; 2] {
        let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
        let filter = Filter::new(&profile).unwrap();
        let asked = thread::spawn(move || {
            let pid = getpid();
            set_no_new_privs(true).unwrap();
            filter.load().unwrap();
            let known = chdir("/").err();
            let newer = pidfd_open(pid, PidfdFlags::empty()).err();
            [known, newer].map(|error| error.map(Errno::raw_os_error))
        });
        asked.join().unwrap()
    }

    #[test]
    fn calls_that_are_newer_than_the_profile_are_not_there() {
        let ends = [
            "exit",
            "exit_group",
            "futex",
            "madvise",
            "mmap",
            "munmap",
            "mprotect",
            "prctl",
            "rseq",
            "rt_sigprocmask",
            "sched_yield",
            "set_robust_list",
            "sigaltstack",
            "write",
        ];
        let allowed = json!([{"names": ends, "action": "SCMP_ACT_ALLOW"}]);
        let strict =
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13, "syscalls": allowed});
        assert_eq!(answers(strict), [Some(libc::EACCES), Some(libc::ENOSYS)]);
        let refused = json!([{"names": ["chdir"], "action": "SCMP_ACT_ERRNO"}]);
        let lenient = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": refused});
        assert_eq!(answers(lenient), [Some(libc::EPERM), None]);
    }

    #[test]
    fn other_interfaces_are_left_to_the_filter() {
        let begin = unknown_above(334);
        // Both ways around it lead behind it.
        let after = |at: usize, jump: u8| at + 1 + usize::from(jump);
        assert_eq!(after(1, begin[1].jf), begin.len());
        assert_eq!(after(3, begin[3].jt), begin.len());
        assert_eq!(after(4, begin[4].jf), begin.len());
    }
}
