//! Fuzz targets: FUSE packets of a hostile guest, as far as this crate reads them. `make fuzz` runs them
//! (tests/fuzz), and the test below over kept inputs.

use fuse_backend_rs::abi::fuse_abi::Opcode;
use hull_proto_vmm::fs::MAX_DATA;

use crate::filter::{self, Verdict};
use crate::packet::{IN_HEADER, answer, refusal, word};
use crate::session;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[("fs-filter", filter), ("fs-session", session)];

/// A packet is judged. What passes has a whole header, and nothing in it that the host must not do.
pub fn filter(input: &[u8]) {
    let mut packet = input.to_vec();
    let verdict = filter::judge(&mut packet);
    let answered = filter::is_answered(&packet);
    if let Verdict::Refuse(error) = verdict {
        let refusal = refusal(&packet, error);
        assert!(error > 0 && word(&refusal, 4) == Some(error.wrapping_neg().cast_unsigned()));
    }
    if matches!(verdict, Verdict::Drop | Verdict::Refuse(_)) {
        return;
    }
    assert!(packet.len() == input.len() && packet.len() >= IN_HEADER);
    assert_eq!(
        packet[..IN_HEADER],
        input[..IN_HEADER],
        "the header changed"
    );
    let is = |opcodes: &[Opcode]| {
        let mut all = opcodes.iter();
        all.any(|opcode| word(&packet, 4) == Some(*opcode as u32))
    };
    assert!(!is(&[
        Opcode::Ioctl,
        Opcode::Setlk,
        Opcode::Setlkw,
        Opcode::Poll
    ]));
    if is(&[Opcode::Lookup]) {
        let name = packet[IN_HEADER..].split(|byte| *byte == 0).next();
        assert!(name.is_some_and(|name| !name.contains(&b'/') && name != b".."));
    }
    if is(&[Opcode::Read, Opcode::Write, Opcode::Readdir]) {
        assert!(word(&packet, IN_HEADER + 16).is_some_and(|size| size as usize <= MAX_DATA));
    }
    if is(&[Opcode::Mknod]) {
        let kind = word(&packet, IN_HEADER).map(|mode| mode & libc::S_IFMT);
        assert!(kind != Some(libc::S_IFCHR) && kind != Some(libc::S_IFBLK));
    }
    if is(&[Opcode::Open, Opcode::Create]) {
        let dangerous =
            (libc::O_PATH | libc::O_DIRECT | libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;
        assert!(word(&packet, IN_HEADER).is_some_and(|flags| flags & dangerous == 0));
    }
    // Judged again, it is the same packet.
    let once = packet.clone();
    assert_eq!(filter::judge(&mut packet), verdict);
    assert_eq!(packet, once);
    if filter::take_mask(&mut packet).is_some() {
        assert_eq!(filter::take_mask(&mut packet), Some(0), "a mask is left");
    }
    assert_eq!(filter::is_answered(&packet), answered);
    assert!(answer(&packet, Ok(7)).len() == 24 && answer(&packet, Err(5)).len() == 16);
}

/// The begin of a session: the guest's packet, and an answer that this process' own library could make.
pub fn session(input: &[u8]) {
    let _ = session::offers_mapping(input);
    for change in [session::allow_mapping, filter::report_no_acl] {
        let mut changed = input.to_vec();
        change(&mut changed);
        let once = changed.clone();
        change(&mut changed);
        assert_eq!(changed, once, "changed twice is changed once");
        assert_eq!(changed.len(), input.len());
    }
}

#[test]
fn packets_of_a_guest_do_no_harm() {
    hull_corpus::replay(TARGETS);
}
