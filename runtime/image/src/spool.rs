//! The files of an archive of images, laid down one after the other in one file, and where each is.

use std::io::{self, BufReader, BufWriter, Read, Write};

use serde::{Deserialize, Serialize};

use crate::layer::header::TarError;
use crate::layer::path::clean_path;
use crate::layer::source::{BUFFER, decompress};
use crate::layer::tar::{Member, MemberKind, TarReader};
use crate::shown::line;
use crate::worker::job::{Failure, JobFile, Unit};

/// Most files and links.
pub(crate) const MAX_MEMBERS: usize = 1 << 16;
/// Most bytes of all their names.
pub(crate) const MAX_NAMES: usize = 8 << 20;
/// Bytes of headers and padding beside the files.
const OVERHEAD: u64 = 256 << 20;

/// Where a file's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// What is at a path of the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Found {
    File(Span),
    /// Another path of the archive.
    Link(Vec<u8>),
}

/// Reads a whole archive, plain or compressed, and writes its files to `out`. Of two with the same
/// path the later counts.
pub(crate) fn fill(
    stream: impl Read,
    out: impl Write,
    max_archive_bytes: u64,
) -> Result<Vec<(Vec<u8>, Found)>, Failure> {
    let store = |e: io::Error| Failure::file(JobFile::Archive, &e);
    let invalid = |e: io::Error| Failure::Invalid(e.to_string());
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let plain = decompress(stream).map_err(invalid)?;
    // What is no file has to end as well.
    let longest = max_archive_bytes.saturating_add(OVERHEAD);
    let plain = BufReader::with_capacity(BUFFER, plain.take(longest));
    let mut archive = TarReader::new(plain);
    let mut found = Vec::new();
    let (mut position, mut names, mut members) = (0u64, 0, 0);
    let mut buffer = vec![0; BUFFER];
    while let Some(member) = archive.next_member().map_err(broken)? {
        members += 1;
        names += member.path.len() + member.link.len();
        if members > MAX_MEMBERS {
            return Err(Failure::too_large(MAX_MEMBERS as u64, Unit::Entries));
        }
        if names > MAX_NAMES {
            return Err(Failure::too_large(MAX_NAMES as u64, Unit::Names));
        }
        let Some((path, file)) = Found::of(&member, position)? else {
            continue;
        };
        if member.size > max_archive_bytes.saturating_sub(position) {
            return Err(Failure::too_large(max_archive_bytes, Unit::Bytes));
        }
        if let Found::File(span) = file {
            loop {
                let count = archive.read(&mut buffer).map_err(invalid)?;
                if count == 0 {
                    break;
                }
                out.write_all(&buffer[..count]).map_err(store)?;
            }
            position += span.length;
        }
        found.push((path, file));
    }
    // To the last byte, so that who writes the archive into a pipe can end.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(invalid)?;
    out.flush().map_err(store)?;
    Ok(found)
}

impl Found {
    /// What a member is, under its clean path; `None` for what can be neither a file nor lead to one.
    fn of(member: &Member, position: u64) -> Result<Option<(Vec<u8>, Self)>, Failure> {
        let bad = |reason: &str| {
            let shown = line(&member.path.escape_ascii().to_string(), 300);
            Failure::Invalid(format!("has the file {shown:?}, which {reason}"))
        };
        let path = clean_path(&member.path).map_err(bad)?;
        let found = match member.kind {
            MemberKind::File if member.sparse.is_some() => return Err(bad("is a sparse file")),
            MemberKind::File => Self::File(Span {
                offset: position,
                length: member.size,
            }),
            MemberKind::Hardlink => Self::Link(clean_path(&member.link).map_err(bad)?),
            MemberKind::Symlink => {
                let parent = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
                let target = [&path[..parent], b"/", &member.link].concat();
                Self::Link(clean_path(&target).map_err(bad)?)
            }
            MemberKind::Directory | MemberKind::Char | MemberKind::Block | MemberKind::Fifo => {
                return Ok(None);
            }
        };
        Ok(Some((path, found)))
    }
}

fn broken(error: TarError) -> Failure {
    Failure::Invalid(match error {
        TarError::Io(e) => e.to_string(),
        TarError::Malformed(reason) => reason,
    })
}
