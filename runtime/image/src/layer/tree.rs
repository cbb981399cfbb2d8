//! The entries of one layer, in the order of its tar stream, and their file `tree`.
//!
//! A tree file is the mark, the version, the entries, each in postcard form after its length, and
//! a trailer: the length 0, the number of entries, the memory that they take when they are merged,
//! and a CRC-32C of all that. It is written and read entry by entry: a layer may have millions.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

const MARK: &[u8; 8] = b"HULLTREE";
const VERSION: u32 = 2;
/// Bytes of the number of entries, their memory, and the checksum.
const TRAILER: usize = 20;
/// Longest entry in postcard form: two paths and the extended attributes, which the unpacker
/// bounds, and some room.
const LONGEST_ENTRY: usize = 1 << 20;

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
    pub(crate) xattrs: Box<[(Vec<u8>, Vec<u8>)]>,
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

/// What a whole tree file says of its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Summary {
    pub(crate) entries: u64,
    /// Bytes, see [`crate::merge::Estimate`].
    pub(crate) memory: u64,
}

/// Writes a tree file.
#[derive(Debug)]
pub(crate) struct TreeWriter<W> {
    out: Crc<W>,
    entries: u64,
    /// Bytes of all entries so far.
    length: u64,
    buffer: Vec<u8>,
}

impl<W: Write> TreeWriter<W> {
    pub(crate) fn new(out: W) -> io::Result<Self> {
        let mut out = Crc { inner: out, crc: 0 };
        out.write_all(MARK)?;
        out.write_all(&VERSION.to_le_bytes())?;
        Ok(Self {
            out,
            entries: 0,
            length: 0,
            buffer: Vec::new(),
        })
    }

    pub(crate) fn add(&mut self, entry: &Entry) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let buffer = postcard::to_extend(entry, buffer).map_err(io::Error::other)?;
        let length = u32::try_from(buffer.len()).map_err(io::Error::other)?;
        self.out.write_all(&length.to_le_bytes())?;
        self.out.write_all(&buffer)?;
        self.entries += 1;
        self.length += u64::from(length);
        self.buffer = buffer;
        Ok(())
    }

    /// Bytes that the entries take in the file so far.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Ends the file; `memory` is for its summary.
    pub(crate) fn finish(mut self, memory: u64) -> io::Result<W> {
        self.out.write_all(&0u32.to_le_bytes())?;
        self.out.write_all(&self.entries.to_le_bytes())?;
        self.out.write_all(&memory.to_le_bytes())?;
        let crc = self.out.crc;
        self.out.inner.write_all(&crc.to_le_bytes())?;
        Ok(self.out.inner)
    }
}

/// Reads a tree file, entry by entry. Damage shows at the end at the latest, so nothing that was
/// made of the entries counts before this returns.
pub(crate) fn read<E: From<io::Error>>(
    file: impl Read,
    mut take: impl FnMut(Entry) -> Result<(), E>,
) -> Result<(), E> {
    let mut file = Crc {
        inner: file,
        crc: 0,
    };
    let head: [u8; 12] = file.array()?;
    check_head(&head)?;
    let mut buffer = Vec::new();
    let mut entries = 0u64;
    loop {
        let length = u32::from_le_bytes(file.array()?) as usize;
        if length == 0 {
            break;
        }
        if length > LONGEST_ENTRY {
            return Err(damaged().into());
        }
        buffer.resize(length, 0);
        file.read_exact(&mut buffer)?;
        let (entry, rest) = postcard::take_from_bytes(&buffer).map_err(|_| damaged())?;
        if !rest.is_empty() {
            return Err(damaged().into());
        }
        take(entry)?;
        entries += 1;
    }
    let counted = u64::from_le_bytes(file.array()?);
    let _memory: [u8; 8] = file.array()?;
    let crc = file.crc;
    let expected = u32::from_le_bytes(file.array()?);
    let at_end = file.inner.read(&mut [0])? == 0;
    if crc != expected || counted != entries || !at_end {
        return Err(damaged().into());
    }
    Ok(())
}

/// What the trailer of a tree file says; its entries are not read, so their damage does not show.
pub(crate) fn summary(file: &mut File) -> io::Result<Summary> {
    let mut head = [0; 12];
    file.read_exact(&mut head)?;
    check_head(&head)?;
    file.seek(SeekFrom::End(-(TRAILER as i64)))?;
    let mut numbers = [[0; 8]; 2];
    file.read_exact(&mut numbers[0])?;
    file.read_exact(&mut numbers[1])?;
    Ok(Summary {
        entries: u64::from_le_bytes(numbers[0]),
        memory: u64::from_le_bytes(numbers[1]),
    })
}

fn check_head(head: &[u8; 12]) -> io::Result<()> {
    let version = head.strip_prefix(MARK).ok_or_else(damaged)?;
    if version == VERSION.to_le_bytes() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "layer tree has another version",
        ))
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "layer tree is damaged")
}

#[derive(Debug)]
struct Crc<T> {
    inner: T,
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

impl<R: Read> Crc<R> {
    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_exact(buffer)?;
        self.crc = crc32c::crc32c_append(self.crc, buffer);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Reads all entries at once.
#[cfg(any(test, fuzzing))]
pub(crate) fn all(file: impl Read) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    read(file, |entry| {
        entries.push(entry);
        Ok::<_, io::Error>(())
    })?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(entries: &[Entry]) -> Vec<u8> {
        let mut writer = TreeWriter::new(Vec::new()).unwrap();
        for entry in entries {
            writer.add(entry).unwrap();
        }
        writer.finish(77).unwrap()
    }

    #[test]
    fn a_tree_survives_the_file_and_damage_is_seen() {
        let entry = Entry {
            path: b"a/\xff".to_vec(),
            attributes: Attributes {
                mode: 0o4755,
                uid: 70_000,
                gid: 3,
                mtime: -5,
                mtime_nsec: 7,
                xattrs: [(b"user.x".to_vec(), vec![0, 1])].into(),
            },
            kind: EntryKind::File {
                size: 1 << 40,
                offset: 4096,
            },
        };
        let entries = vec![entry.clone(), entry];
        let bytes = written(&entries);
        assert_eq!(all(&bytes[..]).unwrap(), entries);
        for position in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[position] ^= 0x10;
            assert!(all(&damaged[..]).is_err(), "byte {position}");
            assert!(all(&bytes[..position]).is_err(), "cut at {position}");
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes[..]).unwrap();
        file.rewind().unwrap();
        let expected = Summary {
            entries: 2,
            memory: 77,
        };
        assert_eq!(summary(&mut file).unwrap(), expected);
    }
}
