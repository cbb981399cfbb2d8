//! A tar stream, member by member. Written here because extension headers must be bounded in
//! memory and all sparse formats understood, whatever the writer was.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::header::{BLOCK, Extensions, RawHeader, TarError, decimal, number};

/// Largest extended header or long name, bytes; real ones are a few KiB, or 64 KiB per xattr.
const MAX_EXTENSION: u64 = 1 << 20;
/// Most entries in the map of one sparse file; Go's tar reader takes as many as fit into 1 MiB of text.
const MAX_SPARSE: usize = 1 << 16;

/// What kind of file a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    Hardlink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
}

/// One file of the archive; its bytes come from [`TarReader::read`].
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) kind: MemberKind,
    /// As in the archive, neither checked nor cleaned.
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Length of the file, with its holes.
    pub(crate) size: u64,
    /// Where the bytes of the stream belong, when the file has holes.
    pub(crate) sparse: Option<Vec<SparseEntry>>,
}

/// An entry of a sparse file's map: a run of bytes between holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SparseEntry {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Reads members in the order of the stream.
#[derive(Debug)]
pub(crate) struct TarReader<R> {
    inner: R,
    /// Bytes of the current member that were not read yet.
    remaining: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            remaining: 0,
            padding: 0,
        }
    }

    /// The stream that the archive is in.
    pub(crate) fn stream(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The stream behind the archive.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// Goes to the next member; skips what is left of the current one.
    pub(crate) fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let mut extensions = Extensions::default();
        let mut extended = 0u64;
        loop {
            self.skip(self.remaining + self.padding)?;
            (self.remaining, self.padding) = (0, 0);
            let Some(block) = self.next_header()? else {
                return if extended > 0 {
                    Err(TarError::malformed("archive ends after an extended header"))
                } else {
                    Ok(None)
                };
            };
            let header = RawHeader::parse(&block)?;
            match header.type_flag {
                b'x' | b'X' => extensions.read_pax(&self.extension(&header)?)?,
                b'L' => extensions.path = Some(long_name(self.extension(&header)?)),
                b'K' => extensions.link = Some(long_name(self.extension(&header)?)),
                // Global records and volume labels say nothing about files.
                b'g' | b'V' => self.start_data(header.size)?,
                _ => return self.member(header, extensions, &block).map(Some),
            }
            if matches!(header.type_flag, b'x' | b'X' | b'L' | b'K') {
                // One more for empty ones: a chain of them has to end as well.
                extended += header.size + 1;
                if extended > 4 * MAX_EXTENSION {
                    return Err(TarError::malformed(
                        "extended headers of one member are too long",
                    ));
                }
            }
        }
    }

    /// Reads bytes of the current member; 0 at its end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if limit == 0 {
            return Ok(0);
        }
        let count = self.inner.read(&mut buffer[..limit])?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "archive ends within a file",
            ));
        }
        self.remaining -= count as u64;
        Ok(count)
    }

    fn member(
        &mut self,
        header: RawHeader,
        extensions: Extensions,
        block: &[u8; BLOCK],
    ) -> Result<Member, TarError> {
        let stored = extensions.size.unwrap_or(header.size);
        let path = extensions.path.unwrap_or(header.path);
        let kind = match header.type_flag {
            // Before POSIX a directory was a file whose name ends with a slash.
            0 | b'0' | b'7' if path.ends_with(b"/") => MemberKind::Directory,
            0 | b'0' | b'7' | b'S' => MemberKind::File,
            b'1' => MemberKind::Hardlink,
            b'2' => MemberKind::Symlink,
            b'3' => MemberKind::Char,
            b'4' => MemberKind::Block,
            b'5' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            other => {
                return Err(TarError::malformed(format!(
                    "member {:?} has the unknown type {:?}",
                    path.escape_ascii().to_string(),
                    char::from(other)
                )));
            }
        };
        // Some writers give links the size of their target; no bytes follow.
        self.start_data(if kind == MemberKind::File { stored } else { 0 })?;
        let (mtime, mtime_nsec) = extensions.mtime.unwrap_or((header.mtime, 0));
        let mut member = Member {
            kind,
            path,
            link: extensions.link.unwrap_or(header.link),
            mode: header.mode,
            uid: extensions.uid.unwrap_or(header.uid),
            gid: extensions.gid.unwrap_or(header.gid),
            mtime,
            mtime_nsec,
            device: (header.major, header.minor),
            xattrs: extensions.xattrs,
            size: if kind == MemberKind::File { stored } else { 0 },
            sparse: None,
        };
        if header.type_flag == b'S' {
            let (map, real_size) = self.old_gnu_sparse(block)?;
            self.set_sparse(&mut member, &map, real_size)?;
        } else if kind == MemberKind::File && extensions.sparse.is_used() {
            let real_size = extensions
                .sparse
                .real_size
                .ok_or_else(|| TarError::malformed("sparse file has no size"))?;
            if let Some(name) = extensions.sparse.name {
                member.path = name;
            }
            let map = match extensions.sparse.major {
                Some(1) => self.sparse_map_in_data()?,
                None | Some(0) => extensions.sparse.map,
                Some(other) => {
                    return Err(TarError::malformed(format!(
                        "sparse format {other} is unknown"
                    )));
                }
            };
            self.set_sparse(&mut member, &map, real_size)?;
        }
        Ok(member)
    }

    fn set_sparse(&self, member: &mut Member, map: &[u64], real_size: u64) -> Result<(), TarError> {
        let bad = || {
            TarError::malformed(format!(
                "sparse file {:?} has a map that does not fit it",
                member.path.escape_ascii().to_string()
            ))
        };
        if !map.len().is_multiple_of(2) {
            return Err(bad());
        }
        if map.len() > 2 * MAX_SPARSE {
            return Err(TarError::malformed("sparse map is too long"));
        }
        let mut entries = Vec::with_capacity(map.len() / 2);
        let (mut end, mut stored) = (0u64, 0u64);
        for pair in map.chunks_exact(2) {
            let entry = SparseEntry {
                offset: pair[0],
                length: pair[1],
            };
            if entry.offset < end {
                return Err(bad());
            }
            end = entry.offset.checked_add(entry.length).ok_or_else(bad)?;
            stored = stored.checked_add(entry.length).ok_or_else(bad)?;
            if entry.length > 0 {
                entries.push(entry);
            }
        }
        if end > real_size || stored != self.remaining {
            return Err(bad());
        }
        member.size = real_size;
        member.sparse = Some(entries);
        Ok(())
    }

    /// The map in an old GNU header (type `S`) and in the blocks that continue it.
    fn old_gnu_sparse(&mut self, block: &[u8; BLOCK]) -> Result<(Vec<u64>, u64), TarError> {
        let positive = |field: &[u8]| {
            u64::try_from(number("sparse", field)?)
                .map_err(|_| TarError::malformed("sparse map has a negative number"))
        };
        let mut map = Vec::new();
        let mut take = |fields: &[u8]| -> Result<(), TarError> {
            for entry in fields.chunks_exact(24) {
                if entry[0] == 0 {
                    break;
                }
                map.push(positive(&entry[..12])?);
                map.push(positive(&entry[12..])?);
            }
            if map.len() > 2 * MAX_SPARSE {
                return Err(TarError::malformed("sparse map is too long"));
            }
            Ok(())
        };
        take(&block[386..482])?;
        let mut continued = block[482] != 0;
        while continued {
            let mut more = [0u8; BLOCK];
            self.inner.read_exact(&mut more).map_err(truncated)?;
            take(&more[..504])?;
            continued = more[504] != 0;
        }
        Ok((map, positive(&block[483..495])?))
    }

    /// The map of PAX format 1.0: decimal lines at the start of the data, padded to a block.
    fn sparse_map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let mut block = [0u8; BLOCK];
        let mut position = BLOCK;
        let mut line = |reader: &mut Self| -> Result<u64, TarError> {
            let mut text = Vec::new();
            loop {
                if position == BLOCK {
                    let mut filled = 0;
                    while filled < BLOCK {
                        match reader.read(&mut block[filled..])? {
                            0 => return Err(TarError::malformed("sparse map is cut off")),
                            count => filled += count,
                        }
                    }
                    position = 0;
                }
                let byte = block[position];
                position += 1;
                match byte {
                    b'\n' => return decimal(&text),
                    _ if text.len() < 20 => text.push(byte),
                    _ => return Err(TarError::malformed("sparse map has a number too long")),
                }
            }
        };
        let count = line(self)?;
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= MAX_SPARSE)
            .ok_or_else(|| TarError::malformed("sparse map is too long"))?;
        let mut map = Vec::new();
        for _ in 0..2 * count {
            map.push(line(self)?);
        }
        Ok(map)
    }

    fn start_data(&mut self, size: u64) -> Result<(), TarError> {
        // Keeps every sum of size, padding and offsets below far from overflow.
        if size > i64::MAX as u64 - BLOCK as u64 {
            return Err(TarError::malformed("member is larger than any file can be"));
        }
        self.remaining = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn extension(&mut self, header: &RawHeader) -> Result<Vec<u8>, TarError> {
        if header.size > MAX_EXTENSION {
            return Err(TarError::malformed(format!(
                "extended header of {} bytes is larger than {MAX_EXTENSION}",
                header.size
            )));
        }
        self.start_data(header.size)?;
        let mut bytes = vec![0; usize::try_from(header.size).unwrap_or_default()];
        self.inner.read_exact(&mut bytes).map_err(truncated)?;
        self.remaining = 0;
        Ok(bytes)
    }

    /// The next header block; `None` at the end of the archive: two zero blocks, or no bytes.
    fn next_header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if block != [0; BLOCK] {
            return Ok(Some(block));
        }
        match self.block()? {
            None => Ok(None),
            Some(block) if block == [0; BLOCK] => Ok(None),
            Some(_) => Err(TarError::malformed("archive goes on after its end mark")),
        }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::malformed("archive ends within a header")),
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(Some(block))
    }

    fn skip(&mut self, count: u64) -> Result<(), TarError> {
        let skipped = io::copy(&mut (&mut self.inner).take(count), &mut io::sink())?;
        if skipped < count {
            return Err(TarError::malformed("archive ends within a file"));
        }
        Ok(())
    }
}

fn truncated(error: io::Error) -> TarError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        TarError::malformed("archive ends within a header")
    } else {
        TarError::Io(error)
    }
}

fn long_name(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}
