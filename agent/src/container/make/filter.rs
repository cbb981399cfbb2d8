//! A container's seccomp profile (OCI runtime specification, "Seccomp"), by libseccomp.

use std::collections::HashSet;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
    error::SeccompError,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::error::StepError;

/// A filter that can be put in force.
pub(super) struct Filter(ScmpFilterContext);

impl Filter {
    /// Makes what `profile` asks for.
    pub(super) fn new(profile: &LinuxSeccomp) -> Result<Self, StepError> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let made = || -> Result<ScmpFilterContext, SeccompError> {
            let mut context = ScmpFilterContext::new(default)?;
            // Only `noNewPrivileges` says so.
            context.set_ctl_nnp(false)?;
            for flag in profile.flags().iter().flatten() {
                match flag {
                    LinuxSeccompFilterFlag::SeccompFilterFlagLog => context.set_ctl_log(true)?,
                    LinuxSeccompFilterFlag::SeccompFilterFlagTsync => {
                        context.set_ctl_tsync(true)?
                    }
                    LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                        context.set_ctl_ssb(true)?
                    }
                    LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                        context.set_ctl_waitkill(true)?
                    }
                };
            }
            for arch in profile.architectures().iter().flatten() {
                context.add_arch(arch_of(*arch))?;
            }
            Ok(context)
        };
        let mut context = made().map_err(|e| refused("make the seccomp filter", &e))?;
        for rule in profile.syscalls().iter().flatten() {
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
        Ok(Self(context))
    }

    /// Puts it in force for the calling process.
    pub(super) fn load(&self) -> Result<(), StepError> {
        self.0
            .load()
            .map_err(|e| refused("load the seccomp filter", &e))
    }
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
