//! From a layer's stream to its three files: `data`, the contents of all regular files, each at a
//! block boundary; `tree`, all else that a disk needs; `recipe`, how to make the stream again.
//!
//! One pass over the stream; neither file contents nor entries stay in memory. It is a worker's work
//! ([`crate::worker`]). Nothing is trusted before the digests of the whole stream, compressed and
//! plain, are those that the manifest and the configuration name ([`crate::unpack`]).

mod data;
pub(crate) mod header;
pub(crate) mod path;
pub(crate) mod recipe;
pub(crate) mod source;
pub(crate) mod tar;
#[cfg(test)]
mod tests;
pub(crate) mod tree;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};

use crate::merge::Estimate;
use crate::shown;
use crate::worker::job::{Failure, JobFile, Unit, UnpackLimits};

use data::{AppendError, DataFile};
use header::TarError;
use path::{MAX_NAME, MAX_PATH, Whiteout, clean_path};
use recipe::Recorder;
use source::BUFFER;
use tar::{Member, MemberKind, TarReader};
use tree::{Attributes, Entry, EntryKind, TreeWriter};

/// Most bytes that all extended attributes of a file may take; EROFS counts them in 16 bits.
const MAX_XATTRS: usize = 200 << 10;

/// Where a layer goes: new files.
#[derive(Debug)]
pub(crate) struct LayerFiles {
    pub(crate) data: File,
    pub(crate) tree: File,
    pub(crate) recipe: File,
}

/// Takes in a whole plain tar stream.
///
/// # Errors
/// When the stream is no layer, exceeds a limit, or cannot be stored.
pub(crate) fn unpack(
    stream: impl Read,
    files: LayerFiles,
    limits: &UnpackLimits,
) -> Result<(), Failure> {
    let mut unpacker = Unpacker {
        limits,
        data: DataFile::new(files.data),
        tree: TreeFile::new(files.tree)?,
        estimate: Estimate::default(),
        contents: 0,
    };
    let recipe_error = |e: io::Error| Failure::file(JobFile::Recipe, &e);
    let stream = BufReader::with_capacity(BUFFER, stream);
    let recorder = Recorder::new(stream, files.recipe).map_err(recipe_error)?;
    let recorder = unpacker.archive(recorder)?;
    recorder.finish().map_err(recipe_error)?;
    unpacker.data.finish()?;
    unpacker.tree.finish(unpacker.estimate.memory())
}

struct Unpacker<'a> {
    limits: &'a UnpackLimits,
    data: DataFile,
    tree: TreeFile,
    estimate: Estimate,
    contents: u64,
}

impl Unpacker<'_> {
    /// Takes in the whole stream, and gives it back at its end.
    fn archive<R: Read>(&mut self, stream: Recorder<R>) -> Result<Recorder<R>, Failure> {
        let mut archive = TarReader::new(stream);
        let mut members = 0;
        while let Some(member) = archive.next_member().map_err(tar_error)? {
            members += 1;
            if members > self.limits.max_entries {
                return Err(Failure::too_large(self.limits.max_entries, Unit::Entries));
            }
            if let Some(entry) = self.entry(member, &mut archive)? {
                self.take(&entry)?;
            }
        }
        // What follows the end mark belongs to the digest as well.
        let mut stream = archive.into_inner();
        io::copy(&mut stream, &mut io::sink()).map_err(|e| Failure::Invalid(e.to_string()))?;
        Ok(stream)
    }

    fn take(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.estimate.add(entry);
        if self.estimate.memory() > self.limits.tree_memory {
            return Err(Failure::too_large(self.limits.tree_memory, Unit::Memory));
        }
        self.tree.add(entry)?;
        if self.tree.length() > self.limits.max_tree_bytes {
            return Err(Failure::too_large(
                self.limits.max_tree_bytes,
                Unit::Attributes,
            ));
        }
        Ok(())
    }

    /// What a member means; `None` for bookkeeping of other storage drivers.
    fn entry(
        &mut self,
        member: Member,
        archive: &mut TarReader<Recorder<impl Read>>,
    ) -> Result<Option<Entry>, Failure> {
        let shown = shown::line(&member.path.escape_ascii().to_string(), 300);
        let bad = |reason: String| Failure::Invalid(format!("{shown:?}: {reason}"));
        let path = clean_path(&member.path).map_err(|reason| bad(reason.into()))?;
        let attributes = attributes(&member).map_err(&bad)?;
        let kind = match Whiteout::of(&path) {
            Whiteout::Bookkeeping => return Ok(None),
            Whiteout::Invalid => return Err(bad("is not a valid whiteout".into())),
            Whiteout::Of(path) => {
                return Ok(Some(Entry {
                    path,
                    attributes,
                    kind: EntryKind::Whiteout,
                }));
            }
            Whiteout::Opaque(path) => {
                return Ok(Some(Entry {
                    path,
                    attributes,
                    kind: EntryKind::Opaque,
                }));
            }
            Whiteout::None if path.is_empty() && member.kind != MemberKind::Directory => {
                return Err(bad("would replace the root directory".into()));
            }
            Whiteout::None => match member.kind {
                MemberKind::Directory => EntryKind::Directory,
                MemberKind::File => {
                    let size = member.size;
                    self.contents = self.contents.saturating_add(size);
                    if self.contents > self.limits.max_unpacked_bytes {
                        return Err(Failure::too_large(
                            self.limits.max_unpacked_bytes,
                            Unit::Bytes,
                        ));
                    }
                    let offset = match self.data.append(archive, size, member.sparse.as_deref()) {
                        Ok(offset) => offset,
                        Err(AppendError::Archive(e)) => return Err(bad(e.to_string())),
                        Err(AppendError::Store(e)) => return Err(e),
                    };
                    EntryKind::File { size, offset }
                }
                MemberKind::Symlink => match member.link.len() {
                    1..=MAX_PATH => EntryKind::Symlink {
                        target: member.link,
                    },
                    0 => return Err(bad("is a symbolic link to nothing".into())),
                    _ => return Err(bad("is a symbolic link with a target too long".into())),
                },
                MemberKind::Hardlink => {
                    let target = clean_path(&member.link)
                        .map_err(|reason| bad(format!("hard link target {reason}")))?;
                    if target == path {
                        return Err(bad("is a hard link to itself".into()));
                    }
                    EntryKind::Hardlink { target }
                }
                MemberKind::Char | MemberKind::Block => {
                    // Linux has 12 bits for major and 20 for minor numbers.
                    let (major, minor) = match (
                        u32::try_from(member.device.0),
                        u32::try_from(member.device.1),
                    ) {
                        (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => {
                            (major, minor)
                        }
                        _ => return Err(bad("is a device with impossible numbers".into())),
                    };
                    if member.kind == MemberKind::Char {
                        EntryKind::Char { major, minor }
                    } else {
                        EntryKind::Block { major, minor }
                    }
                }
                MemberKind::Fifo => EntryKind::Fifo,
            },
        };
        Ok(Some(Entry {
            path,
            attributes,
            kind,
        }))
    }
}

fn tar_error(error: TarError) -> Failure {
    Failure::Invalid(match error {
        TarError::Io(e) => e.to_string(),
        TarError::Malformed(reason) => reason,
    })
}

fn attributes(member: &Member) -> Result<Attributes, String> {
    let owner = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
    let xattrs: Box<[(Vec<u8>, Vec<u8>)]> = member
        .xattrs
        .iter()
        .filter(|(name, _)| is_kept_xattr(name, member.kind))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let mut total = 0;
    for (name, value) in &xattrs {
        if name.len() > MAX_NAME || name.contains(&0) || value.len() > usize::from(u16::MAX) {
            return Err(format!(
                "has an extended attribute {:?} too long",
                name.escape_ascii().to_string()
            ));
        }
        total += name.len() + value.len() + 8;
    }
    if total > MAX_XATTRS {
        return Err("has too many extended attributes".into());
    }
    Ok(Attributes {
        mode: u16::try_from(member.mode & 0o7777).unwrap_or_default(),
        uid: owner(member.uid).ok_or("has an impossible owner")?,
        gid: owner(member.gid).ok_or("has an impossible group")?,
        mtime: member.mtime,
        mtime_nsec: member.mtime_nsec,
        xattrs,
    })
}

/// Whether a guest can make use of the attribute. Those of overlayfs would change the meaning of
/// the tree under the guest's own overlay; `user.` exists on files and directories alone (xattr(7)).
fn is_kept_xattr(name: &[u8], kind: MemberKind) -> bool {
    let overlay = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    let known = name == b"system.posix_acl_access"
        || name == b"system.posix_acl_default"
        || [&b"trusted."[..], b"security."]
            .iter()
            .any(|p| name.starts_with(p) && name.len() > p.len());
    let user = name.len() > 5
        && name.starts_with(b"user.")
        && matches!(
            kind,
            MemberKind::File | MemberKind::Directory | MemberKind::Hardlink
        );
    !overlay && (known || user)
}

/// The `tree` file.
struct TreeFile(TreeWriter<BufWriter<File>>);

impl TreeFile {
    fn new(file: File) -> Result<Self, Failure> {
        let writer = TreeWriter::new(BufWriter::with_capacity(BUFFER, file));
        writer.map(Self).map_err(|e| tree_error(&e))
    }

    fn add(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.0.add(entry).map_err(|e| tree_error(&e))
    }

    fn length(&self) -> u64 {
        self.0.length()
    }

    fn finish(self, memory: u64) -> Result<(), Failure> {
        let finished = self.0.finish(memory).and_then(|mut out| out.flush());
        finished.map_err(|e| tree_error(&e))
    }
}

fn tree_error(error: &io::Error) -> Failure {
    Failure::file(JobFile::Tree, error)
}
