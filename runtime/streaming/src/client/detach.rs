//! The keys that leave a process alone: Ctrl-P Ctrl-Q, as docker(1) has them.

use bytes::Bytes;

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

/// Looks for the keys in what is typed. A Ctrl-P is held back until the next key is known.
#[derive(Debug, Default)]
pub struct Keys {
    held: bool,
}

impl Keys {
    /// What of it is the process's, and whether it is left.
    pub(super) fn pass(&mut self, typed: &[u8]) -> (Bytes, bool) {
        let mut passed = Vec::with_capacity(typed.len() + 1);
        for &key in typed {
            if std::mem::take(&mut self.held) {
                if key == CTRL_Q {
                    return (passed.into(), true);
                }
                passed.push(CTRL_P);
            }
            if key == CTRL_P {
                self.held = true;
            } else {
                passed.push(key);
            }
        }
        (passed.into(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_found_however_they_come_and_all_else_is_passed_on() {
        for (typed, passed, left) in [
            (&b"ls\r"[..], &b"ls\r"[..], false),
            (b"a\x10\x11b", b"a", true),
            (b"\x10x\x10\x10\x11", b"\x10x\x10", true),
            (b"\x11\x10", b"\x11", false),
            (b"\x10\x03", b"\x10\x03", false),
        ] {
            for size in 1..=typed.len() {
                let (mut keys, mut all, mut detached) = (Keys::default(), Vec::new(), false);
                for piece in typed.chunks(size) {
                    let (bytes, now) = keys.pass(piece);
                    all.extend_from_slice(&bytes);
                    detached |= now;
                    if now {
                        break;
                    }
                }
                assert_eq!((&all[..], detached), (passed, left), "{typed:?} by {size}");
            }
        }
    }
}
