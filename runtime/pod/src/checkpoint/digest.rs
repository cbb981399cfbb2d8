//! A digest of a file that is mostly holes: SHA-256 of all blocks that are not zeros, each behind its place, and
//! of the length. A copy whose holes are elsewhere has the same, and zeros cost nothing.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
};

use sha2::{Digest, Sha256};

use crate::storage::holes;

/// Bytes of a block. Part of the digest's definition.
const BLOCK: usize = 64 << 10;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// The digest of a file, in hexadecimal. Moves its position. Blocks.
///
/// # Errors
/// When it can't be read.
pub(crate) fn of_file(file: &File) -> io::Result<String> {
    let length = file.metadata()?.len();
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    while at < length {
        let Some(data) = holes::data(file, at, length)? else {
            break;
        };
        at = at.max(data.start - data.start % BLOCK as u64);
        while at < data.end.min(length) {
            let size = usize::try_from(length - at).map_or(BLOCK, |left| left.min(BLOCK));
            let bytes = &mut block[..size];
            file.read_exact_at(bytes, at)?;
            if *bytes != ZEROS[..size] {
                hasher.update(at.to_le_bytes());
                hasher.update(&*bytes);
            }
            at += BLOCK as u64;
        }
    }
    hasher.update(length.to_le_bytes());
    Ok(hex(hasher))
}

/// The plain SHA-256 of what is read, in hexadecimal. Blocks.
///
/// # Errors
/// When it can't be read.
pub(crate) fn of(mut reader: impl Read) -> io::Result<String> {
    let mut hasher = Hashing(Sha256::new());
    io::copy(&mut reader, &mut hasher)?;
    Ok(hex(hasher.0))
}

struct Hashing(Sha256);

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn hex(hasher: Sha256) -> String {
    let bytes = hasher.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length: u64, written: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        for (at, bytes) in written {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    #[test]
    fn holes_are_zeros_wherever_they_are() {
        let zeros = vec![0; 300 << 10];
        let length = 1 << 20;
        let sparse = file(length, &[(100_000, b"x"), (700_000, b"y")]);
        let dense = file(
            length,
            &[(60_000, &zeros), (100_000, b"x"), (700_000, b"y")],
        );
        let digest = of_file(&sparse).unwrap();
        assert_eq!(of_file(&dense).unwrap(), digest);
        // Once more, as its position was moved.
        assert_eq!(of_file(&sparse).unwrap(), digest);
        for other in [
            file(length, &[(100_000, b"x"), (700_000, b"z")]),
            file(length, &[(100_001, b"x"), (700_000, b"y")]),
            file(length + 1, &[(100_000, b"x"), (700_000, b"y")]),
            file(length, &[(100_000, b"x")]),
            file(length, &[]),
        ] {
            assert_ne!(of_file(&other).unwrap(), digest);
        }
    }

    #[test]
    fn the_digest_is_the_same_in_every_version() {
        let of = |file: &File| of_file(file).unwrap();
        assert_eq!(
            of(&file(0, &[])),
            "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"
        );
        assert_eq!(
            of(&file(200_000, &[(70_000, b"hull")])),
            "c58936363c532e1de4ce9cc844950e5bb4fa00bc3a35697a71955cfb22fe38fa"
        );
    }

    #[test]
    fn what_is_read_has_the_digest_that_others_tell() {
        assert_eq!(
            of(&b"abc"[..]).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
