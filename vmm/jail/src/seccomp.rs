//! Lists of the system calls that a thread may make, and how they are put in force (seccomp(2)).
//!
//! What is not on a thread's list ends the process with SIGSYS. A thread has the lists of who started
//! it, too: a call has to be on all of them. So the list of a process that goes on to start threads
//! contains theirs, and each thread adds a narrower one of its own.
//!
//! Arguments are compared as the 32 bits that the kernel takes of them; what is behind a pointer can't
//! be looked at.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::{fmt, io, process};

use error_reporter::Report;
use rustix::thread::set_name;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use crate::JailError;

pub mod common;
#[cfg(feature = "probe")]
pub mod probe;

/// Checks of a call's arguments, at most.
const CHECKS: usize = 3;

/// A system call that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    number: i64,
    name: &'static str,
    checks: [Option<Check>; CHECKS],
    unknown: bool,
    rare: Option<&'static str>,
}

/// A condition: an argument has these bits where the mask has any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Check {
    argument: u8,
    mask: u32,
    bits: u32,
}

impl Call {
    /// The call of this number, whatever its arguments. See [`call!`](crate::call).
    #[must_use]
    pub const fn new(number: i64, name: &'static str) -> Self {
        Self {
            number,
            name,
            checks: [None; CHECKS],
            unknown: false,
            rare: None,
        }
    }

    /// With these bits where the mask has any, in an argument. They are counted from 0.
    #[must_use]
    pub const fn masked(mut self, argument: u8, mask: u32, bits: u32) -> Self {
        let mut place = 0;
        while self.checks[place].is_some() {
            place += 1;
        }
        self.checks[place] = Some(Check {
            argument,
            mask,
            bits,
        });
        self
    }

    /// With this value alone as an argument.
    #[must_use]
    pub const fn is(self, argument: u8, value: i64) -> Self {
        self.masked(argument, u32::MAX, value as u32)
    }

    /// With no other bits than these in an argument.
    #[must_use]
    pub const fn within(self, argument: u8, bits: i64) -> Self {
        self.masked(argument, !(bits as u32), 0)
    }

    /// With these bits in an argument.
    #[must_use]
    pub const fn has(self, argument: u8, bits: i64) -> Self {
        self.masked(argument, bits as u32, bits as u32)
    }

    /// Answers as a kernel does that has no such call.
    #[must_use]
    pub const fn unknown(mut self) -> Self {
        self.unknown = true;
        self
    }

    /// The call is needed though no test of whole pods makes it: says why.
    #[must_use]
    pub const fn rare(mut self, why: &'static str) -> Self {
        self.rare = Some(why);
        self
    }

    fn checks(&self) -> impl Iterator<Item = Check> {
        self.checks.into_iter().flatten()
    }

    fn rule(&self) -> Result<SeccompRule, seccompiler::BackendError> {
        let conditions = self.checks().map(|check| {
            let operator = match check.mask {
                u32::MAX => SeccompCmpOp::Eq,
                mask => SeccompCmpOp::MaskedEq(mask.into()),
            };
            let bits = check.bits.into();
            SeccompCondition::new(check.argument, SeccompCmpArgLen::Dword, operator, bits)
        });
        SeccompRule::new(conditions.collect::<Result<_, _>>()?)
    }
}

/// Names an allowed system call as the crate `libc` does: `call!(SYS_read)`.
#[macro_export]
macro_rules! call {
    ($name:ident) => {
        $crate::seccomp::Call::new(libc::$name, stringify!($name))
    };
}

/// What a kind of thread may call.
#[derive(Debug, Clone, Copy)]
pub struct List {
    /// The names of its threads; ends with `*` if they are numbered.
    pub threads: &'static str,
    /// What its threads go on to, or others that they start: all of it is allowed.
    pub contains: &'static [&'static List],
    /// What is allowed beyond that.
    pub calls: &'static [&'static [Call]],
}

impl List {
    /// All that is allowed, each once.
    fn calls(&self) -> Vec<Call> {
        let mut calls = Vec::new();
        // What goes on being called is looked at first.
        for list in self.contains {
            merge(&mut calls, list.calls());
        }
        merge(&mut calls, self.calls.iter().copied().flatten().copied());
        calls
    }

    /// Allows the calling thread, and those that it starts, what is listed and nothing else, for good.
    ///
    /// # Errors
    /// [`JailError`]
    pub fn apply(&self) -> Result<(), JailError> {
        self.programs()
            .and_then(|programs| {
                programs
                    .iter()
                    .try_for_each(|program| apply_filter(program))
            })
            .map_err(|error| JailError::new("limit system calls", io::Error::other(error)))
    }

    /// Does so, and names the thread as the list does, so that its state is seen from outside.
    ///
    /// # Errors
    /// [`JailError`]
    pub fn apply_by_name(&self) -> Result<(), JailError> {
        let name = CString::new(self.threads).unwrap_or_default();
        set_name(&name).map_err(|error| JailError::new("name the thread", error))?;
        self.apply()
    }

    /// Does so, or ends the process: for a thread that nobody can be told of.
    pub fn apply_or_abort(&self) {
        if let Err(error) = self.apply() {
            eprintln!("{}: {}", self.threads, Report::new(&error));
            process::abort();
        }
    }

    /// The programs that the kernel is to run at each call. Of their verdicts the strictest counts, so
    /// that one lets pass what another answers.
    fn programs(&self) -> Result<Vec<BpfProgram>, seccompiler::Error> {
        let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut unknown = BTreeMap::new();
        let mut whatever = Vec::new();
        for call in self.calls() {
            let rules = allowed.entry(call.number).or_default();
            if call.checks().next().is_none() {
                whatever.push(call.number);
            } else {
                rules.push(call.rule()?);
            }
            if call.unknown {
                unknown.insert(call.number, Vec::new());
            }
        }
        // No rule is no condition.
        for number in whatever {
            allowed.insert(number, Vec::new());
        }
        let here = std::env::consts::ARCH.try_into()?;
        let none = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let (allow, kill) = (SeccompAction::Allow, SeccompAction::KillProcess);
        let mut programs = Vec::new();
        if !unknown.is_empty() {
            let filter = SeccompFilter::new(unknown, allow.clone(), none, here)?;
            programs.push(filter.try_into()?);
        }
        programs.push(SeccompFilter::new(allowed, kill, allow, here)?.try_into()?);
        Ok(programs)
    }
}

/// Adds calls, each once.
fn merge(calls: &mut Vec<Call>, more: impl IntoIterator<Item = Call>) {
    for call in more {
        let what = |call: &Call| (call.number, call.checks, call.unknown);
        match calls.iter_mut().find(|other| what(other) == what(&call)) {
            // Rare only if it is so wherever it is listed.
            Some(other) => other.rare = other.rare.and(call.rare),
            None => calls.push(call),
        }
    }
}

/// One line for each call but those of lists that it contains: threads, name, number, checks as `argument&mask=bits`, and why it is rare;
/// separated by tabs, `-` where there is nothing. The threads are those that have the list, if only until
/// they have their own.
impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads: Vec<_> = [self.threads]
            .into_iter()
            .chain(self.contains.iter().map(|list| list.threads))
            .collect();
        let threads = threads.join(",");
        let mut calls = Vec::new();
        merge(&mut calls, self.calls.iter().copied().flatten().copied());
        for call in calls {
            let checks: Vec<String> = call
                .checks()
                .map(|check| format!("{}&{:#x}={:#x}", check.argument, check.mask, check.bits))
                .collect();
            let checks = match &checks[..] {
                [] => "-".to_owned(),
                some => some.join(","),
            };
            let name = call.name.strip_prefix("SYS_").unwrap_or(call.name);
            let rare = call.rare.unwrap_or("-");
            writeln!(f, "{threads}\t{name}\t{}\t{checks}\t{rare}", call.number)?;
        }
        Ok(())
    }
}
