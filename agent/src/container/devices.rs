//! Which devices a container may use: the OCI device rules as a program that
//! the kernel runs on each access (cgroup v2 has no files for this).
//!
//! A container with CAP_MKNOD could otherwise make the node of the pod's disks
//! and read other containers' files.

use std::{fs::File, io, path::Path};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys::{self, Instruction};

/// `BPF_DEVCG_ACC_*` of `linux/bpf.h`.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ANY_ACCESS: i32 = MKNOD | READ | WRITE;
/// `BPF_DEVCG_DEV_*`.
const BLOCK: i32 = 1;
const CHAR: i32 = 2;

/// One rule; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may use, whatever its rules say: making nodes, and the
/// devices that each is given ([`super::make`]).
fn always() -> Vec<Rule> {
    let rule = |kind, major, minor, access| Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    };
    let device = |major, minor| rule(CHAR, Some(major), minor, ANY_ACCESS);
    vec![
        rule(CHAR, None, None, MKNOD),
        rule(BLOCK, None, None, MKNOD),
        device(1, Some(3)), // null
        device(1, Some(5)), // zero
        device(1, Some(7)), // full
        device(1, Some(8)), // random
        device(1, Some(9)), // urandom
        device(5, Some(0)), // tty
        device(5, Some(2)), // ptmx
        device(136, None),  // pts/*
    ]
}

impl Rule {
    fn new(oci: &LinuxDeviceCgroup) -> Self {
        let kind = match oci.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            _ => None,
        };
        let number = |n: Option<i64>| n.and_then(|n| i32::try_from(n).ok()).filter(|n| *n >= 0);
        let access = oci.access().as_deref().unwrap_or("rwm");
        let access = access.chars().fold(0, |bits, c| match c {
            'r' => bits | READ,
            'w' => bits | WRITE,
            'm' => bits | MKNOD,
            _ => bits,
        });
        Self {
            allow: oci.allow(),
            kind,
            major: number(oci.major()),
            minor: number(oci.minor()),
            access,
        }
    }

    fn matches_all(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == ANY_ACCESS
    }
}

/// Applies `rules` to the cgroup at `path`. None at all, or a last one that
/// allows everything, means no limit.
pub(crate) fn apply(path: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    let rules: Vec<Rule> = rules.iter().map(Rule::new).collect();
    let Some(program) = program(rules) else {
        return Ok(());
    };
    let program = sys::load_device_program(&program)?;
    sys::attach_device_program(&File::open(path)?, &program)
}

/// Compiles the rules; the last one that matches decides, and none means no.
fn program(mut rules: Vec<Rule>) -> Option<Vec<Instruction>> {
    if rules
        .last()
        .is_none_or(|last| last.allow && last.matches_all())
    {
        return None;
    }
    rules.extend(always());
    // r2 = type, r3 = access, r4 = major, r5 = minor (struct bpf_cgroup_dev_ctx)
    let mut code = vec![
        Instruction::load(2, 0),
        Instruction::copy(3, 2),
        Instruction::shift_right(3, 16),
        Instruction::and(2, 0xffff),
        Instruction::load(4, 4),
        Instruction::load(5, 8),
    ];
    for rule in rules.iter().rev() {
        let mut block = Vec::new();
        // Each of these goes on with the next rule when it does not hold.
        let mut unless = |insn: Instruction| block.push(insn);
        if let Some(kind) = rule.kind {
            unless(Instruction::jump_if_not(2, kind));
        }
        if let Some(major) = rule.major {
            unless(Instruction::jump_if_not(4, major));
        }
        if let Some(minor) = rule.minor {
            unless(Instruction::jump_if_not(5, minor));
        }
        if rule.access != ANY_ACCESS {
            block.push(Instruction::copy(1, 3));
            if rule.allow {
                // Everything that is asked for must be in the rule.
                block.push(Instruction::and(1, ANY_ACCESS & !rule.access));
                block.push(Instruction::jump_if_not(1, 0));
            } else {
                // One forbidden kind of access is enough.
                block.push(Instruction::and(1, rule.access));
                block.push(Instruction::jump_if(1, 0));
            }
        }
        block.push(Instruction::set(0, i32::from(rule.allow)));
        block.push(Instruction::exit());
        let length = block.len();
        for (i, insn) in block.iter_mut().enumerate() {
            if insn.is_jump() {
                insn.aim(length - i - 1);
            }
        }
        code.extend(block);
        if rule.matches_all() {
            // The kernel refuses instructions that can never be reached.
            return Some(code);
        }
    }
    code.push(Instruction::set(0, 0));
    code.push(Instruction::exit());
    Some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn allowed(code: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [(access << 16) | kind, major, minor];
        let mut r = [0i32; 6];
        let mut at = 0;
        loop {
            let i = code[at];
            at += 1;
            let (dst, src) = (usize::from(i.dst()), usize::from(i.src()));
            match i.code {
                0x61 => r[dst] = context[usize::try_from(i.offset).unwrap() / 4],
                0xbc => r[dst] = r[src],
                0x74 => r[dst] >>= i.immediate,
                0x54 => r[dst] &= i.immediate,
                0x56 if r[dst] != i.immediate => at += usize::try_from(i.offset).unwrap(),
                0x16 if r[dst] == i.immediate => at += usize::try_from(i.offset).unwrap(),
                0x56 | 0x16 => {}
                0xb7 => r[dst] = i.immediate,
                0x95 => return r[0] == 1,
                code => panic!("{code:#x}"),
            }
        }
    }

    fn rules(json: serde_json::Value) -> Vec<Rule> {
        let oci: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
        oci.iter().map(Rule::new).collect()
    }

    #[test]
    fn all_but_the_usual_devices_is_denied() {
        let code = program(rules(
            serde_json::json!([{"allow": false, "access": "rwm"}]),
        ))
        .unwrap();
        assert!(allowed(&code, CHAR, READ | WRITE, 1, 3));
        assert!(allowed(&code, CHAR, READ | WRITE, 136, 17));
        assert!(allowed(&code, BLOCK, MKNOD, 254, 0));
        assert!(!allowed(&code, BLOCK, READ, 254, 0));
        assert!(!allowed(&code, BLOCK, READ | MKNOD, 254, 0));
        assert!(!allowed(&code, CHAR, READ, 1, 1));
        assert!(!allowed(&code, BLOCK, READ, 1, 3));
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let code = program(rules(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 254, "minor": 1, "access": "r"},
            {"allow": true, "type": "c", "major": 10, "access": "rwm"},
            {"allow": false, "type": "c", "major": 10, "minor": 200, "access": "w"}
        ])))
        .unwrap();
        assert!(allowed(&code, BLOCK, READ, 254, 1));
        assert!(!allowed(&code, BLOCK, READ | WRITE, 254, 1));
        assert!(!allowed(&code, BLOCK, READ, 254, 2));
        assert!(allowed(&code, CHAR, READ | WRITE, 10, 229));
        assert!(allowed(&code, CHAR, READ, 10, 200));
        assert!(!allowed(&code, CHAR, READ | WRITE, 10, 200));
    }

    #[test]
    fn nothing_follows_what_always_ends_the_program() {
        let deny_all = serde_json::json!([{"allow": false, "access": "rwm"}]);
        let code = program(rules(deny_all)).unwrap();
        let denials = code.iter().filter(|i| **i == Instruction::set(0, 0));
        assert_eq!(denials.count(), 1);
    }

    #[test]
    fn privileged_containers_have_no_program() {
        assert_eq!(program(Vec::new()), None);
        let all = serde_json::json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
        assert_eq!(program(rules(all)), None);
    }
}
