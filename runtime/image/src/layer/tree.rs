//! The entries of one layer, in the order of its tar stream, and their file `tree`.
//!
//! A tree file is the mark, the version, the number of entries, the entries in postcard form, and
//! a CRC-32C of all that.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

const MARK: &[u8; 8] = b"HULLTREE";
const VERSION: u32 = 1;

/// One change that a layer makes to the tree below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Components joined by `/`, none of them empty, `.` or `..`; empty for the root itself.
    pub(crate) path: Vec<u8>,
    pub(crate) attributes: Attributes,
    pub(crate) kind: EntryKind,
}

/// Owner, mode, time and extended attributes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attributes {
    /// Permission bits with set-id and sticky bits; no file type.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    /// Full names, sorted.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is at the path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EntryKind {
    Directory,
    /// Contents are in the layer's data file from `offset`, a multiple of the block size.
    File {
        size: u64,
        offset: u64,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// Another name of what is at `target`, in this layer or below; a path like the entry's.
    Hardlink {
        target: Vec<u8>,
    },
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// What layers below have at the path is gone.
    Whiteout,
    /// What layers below have in this directory is gone.
    Opaque,
}

impl Entry {
    /// Heap and inline bytes of the entry, for limits.
    pub(crate) fn memory(&self) -> u64 {
        let link = match &self.kind {
            EntryKind::Symlink { target } | EntryKind::Hardlink { target } => target.len(),
            _ => 0,
        };
        let xattrs: usize = self
            .attributes
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len() + 48)
            .sum();
        (size_of::<Self>() + self.path.len() + link + xattrs) as u64
    }
}

/// Writes a tree file.
pub(crate) fn write(out: impl Write, entries: &[Entry]) -> io::Result<()> {
    let mut out = Crc { inner: out, crc: 0 };
    out.write_all(MARK)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&(entries.len() as u64).to_le_bytes())?;
    for entry in entries {
        postcard::to_io(entry, &mut out).map_err(io::Error::other)?;
    }
    let crc = out.crc;
    out.inner.write_all(&crc.to_le_bytes())
}

/// Reads a tree file.
pub(crate) fn read(mut file: impl Read) -> io::Result<Vec<Entry>> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "layer tree is damaged");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (body, crc) = bytes.split_last_chunk::<4>().ok_or_else(damaged)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
        return Err(damaged());
    }
    let (version, body) = body
        .strip_prefix(MARK)
        .and_then(|body| body.split_first_chunk::<4>())
        .ok_or_else(damaged)?;
    if u32::from_le_bytes(*version) != VERSION {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "layer tree has another version",
        ));
    }
    let (count, mut body) = body.split_first_chunk::<8>().ok_or_else(damaged)?;
    let mut entries = Vec::new();
    for _ in 0..u64::from_le_bytes(*count) {
        let (entry, rest) = postcard::take_from_bytes(body).map_err(|_| damaged())?;
        entries.push(entry);
        body = rest;
    }
    Ok(entries)
}

struct Crc<W> {
    inner: W,
    crc: u32,
}

impl<W: Write> Write for Crc<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.crc = crc32c::crc32c_append(self.crc, &bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_survives_the_file_and_damage_is_seen() {
        let entries = vec![Entry {
            path: b"a/\xff".to_vec(),
            attributes: Attributes {
                mode: 0o4755,
                uid: 70_000,
                gid: 3,
                mtime: -5,
                mtime_nsec: 7,
                xattrs: vec![(b"user.x".to_vec(), vec![0, 1])],
            },
            kind: EntryKind::File {
                size: 1 << 40,
                offset: 4096,
            },
        }];
        let mut bytes = Vec::new();
        write(&mut bytes, &entries).unwrap();
        assert_eq!(read(&bytes[..]).unwrap(), entries);
        for position in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[position] ^= 0x10;
            assert!(read(&damaged[..]).is_err(), "byte {position}");
            assert!(read(&bytes[..position]).is_err(), "cut at {position}");
        }
    }
}
