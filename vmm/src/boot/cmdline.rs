//! The kernel command line.

use std::fmt::Write;

use hull_proto_vmm::SLOTS;

use crate::layout::{SLOT_SIZE, slot_address, slot_pin};

/// The most that Linux takes, without the final zero (x86: `COMMAND_LINE_SIZE`).
pub const MAX: usize = 2047;

/// What every guest is told:
///
/// - `reboot=t`: reset by triple fault, there is no other way; `panic=-1`: at once;
/// - `8250.nr_uarts=1`: look for one serial port, each look costs exits;
/// - `tsc=reliable`, `no_timer_check`: KVM's clock needs no second opinion;
/// - `random.trust_cpu=on`: the boot parameters carry a seed as well;
/// - `cpuidle_haltpoll.force=1 cpuidle.governor=menu`: a vCPU that wakes soon keeps its tick;
/// - `cryptomgr.notests`, `swiotlb=noforce`, `nomodule`, `rcupdate.rcu_expedited=1`: start faster.
const BASE: &str = "console=ttyS0 reboot=t panic=-1 nomodule 8250.nr_uarts=1 tsc=reliable \
    no_timer_check random.trust_cpu=on cryptomgr.notests swiotlb=noforce \
    rcupdate.rcu_expedited=1 noreplace-smp cpuidle_haltpoll.force=1 cpuidle.governor=menu";
/// For a console that nobody sees: only a panic is printed.
const QUIET: &str = "quiet loglevel=1";

/// The command line is too long or not printable ASCII.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Above [`MAX`].
    #[error("kernel command line of {0} bytes is too long, the limit is {MAX}")]
    TooLong(usize),
    /// Bytes that the kernel would not take as they are meant.
    #[error("kernel command line has a character that is not printable ASCII")]
    Character,
}

/// Composes the command line: the base, the slots, then what the configuration adds.
///
/// # Errors
/// [`CmdlineError`]
pub fn compose(added: &str, boot_vcpus: u8, verbose: bool) -> Result<String, CmdlineError> {
    if !added.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(CmdlineError::Character);
    }
    let mut line = String::from(BASE);
    if !verbose {
        let _ = write!(line, " {QUIET}");
    }
    let _ = write!(line, " maxcpus={boot_vcpus}");
    for slot in 0..SLOTS {
        let (size, address, pin) = (SLOT_SIZE >> 10, slot_address(slot), slot_pin(slot));
        let _ = write!(line, " virtio_mmio.device={size}K@{address:#x}:{pin}");
    }
    let _ = write!(line, " {added}");
    if line.len() > MAX {
        return Err(CmdlineError::TooLong(line.len()));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_in_order_with_their_lines() {
        let line = compose("root=/dev/vda", 2, false).unwrap();
        let slots: Vec<&str> = line
            .split(' ')
            .filter_map(|word| word.strip_prefix("virtio_mmio.device="))
            .collect();
        assert_eq!(slots.len(), usize::from(SLOTS));
        assert_eq!(slots[0], "4K@0xd0000000:5");
        assert_eq!(slots[19], "4K@0xd0013000:5");
        assert!(
            line.contains(" quiet ")
                && line.contains(" maxcpus=2 ")
                && line.ends_with(" root=/dev/vda")
        );
        assert!(!compose("", 1, true).unwrap().contains("quiet"));
    }

    #[test]
    fn a_line_that_the_kernel_would_cut_is_refused() {
        let room = MAX - compose("", 1, false).unwrap().len();
        compose(&"x".repeat(room), 1, false).unwrap();
        assert_eq!(
            compose(&"x".repeat(room + 1), 1, false),
            Err(CmdlineError::TooLong(MAX + 1))
        );
        assert_eq!(compose("a\0b", 1, false), Err(CmdlineError::Character));
    }
}
