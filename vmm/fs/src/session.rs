//! How a session begins: the guest's kernel and the file system agree on what of FUSE they use
//! (FUSE_INIT), and this adds what the file system's own code does not know of.
//!
//! FUSE_ALLOW_IDMAP (7.41) lets the guest mount shares with other owners, which is how a pod with
//! a user namespace sees them. Nothing else of the server takes part: what it is told and tells are
//! ids as they are on the host. A kernel that agreed names users in those requests alone that make
//! files, and [`NOBODY`] in all others.

use crate::packet::{IN_HEADER, word};

/// The user or group of a request that does not say whose it is (FUSE_INVALID_UIDGID).
pub const NOBODY: u32 = u32::MAX;

/// Bytes of `fuse_out_header`.
const OUT_HEADER: usize = 16;
/// Where a `fuse_init_in` has its flags, and those of the upper word.
const ASKED: [usize; 2] = [IN_HEADER + 12, IN_HEADER + 16];
/// Where a `fuse_init_out` has them.
const AGREED: [usize; 2] = [OUT_HEADER + 12, OUT_HEADER + 32];
/// There is an upper word of flags (FUSE_INIT_EXT).
const EXTENDED: u32 = 1 << 30;
/// Of the upper word: FUSE_ALLOW_IDMAP.
const ALLOW_IDMAP: u32 = 1 << (40 - 32);

/// Whether the kernel that sent this FUSE_INIT can mount shares with other owners.
#[must_use]
pub fn offers_mapping(request: &[u8]) -> bool {
    let has = |at, flag| word(request, at).is_some_and(|flags| flags & flag != 0);
    has(ASKED[0], EXTENDED) && has(ASKED[1], ALLOW_IDMAP)
}

/// Adds to the file system's answer that it may. An error, or the answer to a kernel whose protocol
/// has no upper word, stays as it is.
pub fn allow_mapping(answer: &mut [u8]) {
    if word(answer, 4) != Some(0) {
        return;
    }
    let [Some(flags), Some(upper)] = AGREED.map(|at| word(answer, at)) else {
        return;
    };
    for (at, flags) in AGREED
        .into_iter()
        .zip([flags | EXTENDED, upper | ALLOW_IDMAP])
    {
        answer[at..at + 4].copy_from_slice(&flags.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(flags: u32, upper: u32) -> Vec<u8> {
        let mut packet = vec![0; IN_HEADER + 64];
        packet[ASKED[0]..ASKED[0] + 4].copy_from_slice(&flags.to_le_bytes());
        packet[ASKED[1]..ASKED[1] + 4].copy_from_slice(&upper.to_le_bytes());
        packet
    }

    #[test]
    fn mapping_is_allowed_to_a_kernel_that_offers_it() {
        assert!(offers_mapping(&request(1 << 30, 1 << 8)));
        assert!(!offers_mapping(&request(1 << 30, !(1 << 8))));
        assert!(!offers_mapping(&request(!(1 << 30), 1 << 8)));
        // Of an old kernel, and of none.
        assert!(!offers_mapping(&request(1 << 30, 1 << 8)[..IN_HEADER + 16]));
        assert!(!offers_mapping(&[]));

        let mut answer = vec![0; OUT_HEADER + 64];
        answer[28] = 5;
        allow_mapping(&mut answer);
        assert_eq!(answer[28..32], (5_u32 | 1 << 30).to_le_bytes());
        assert_eq!(answer[48..52], (1_u32 << 8).to_le_bytes());
    }

    #[test]
    fn other_answers_stay_as_they_are() {
        let mut error = vec![0; OUT_HEADER + 64];
        error[4..8].copy_from_slice(&(-71_i32).to_le_bytes());
        for mut answer in [error, vec![0; OUT_HEADER + 24], vec![0; OUT_HEADER], vec![]] {
            let before = answer.clone();
            allow_mapping(&mut answer);
            assert_eq!(answer, before);
        }
    }
}
