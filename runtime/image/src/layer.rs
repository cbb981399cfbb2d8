//! From a layer's stream to its three files: `data`, the contents of all regular files, each at a
//! block boundary; `tree`, all else that a disk needs; `recipe`, how to make the stream again.
//!
//! One pass over the stream; neither file contents nor entries stay in memory. Nothing is trusted before the
//! digests of the whole stream, compressed and plain, are those that the manifest and the
//! configuration name.

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
use std::path::{Path, PathBuf};

use crate::config::Limits;
use crate::digest::Digest;
use crate::error::{PullError, StoreError};
use crate::merge::Estimate;
use crate::shown;

use data::{AppendError, DataFile};
use header::TarError;
use path::{MAX_NAME, MAX_PATH, Whiteout, clean_path};
use recipe::Recorder;
use source::{BUFFER, HashReader, decompress};
use tar::{Member, MemberKind, TarReader};
use tree::{Attributes, Entry, EntryKind, TreeWriter};

/// Most bytes that all extended attributes of a file may take; EROFS counts them in 16 bits.
const MAX_XATTRS: usize = 200 << 10;

/// What a layer has to be.
#[derive(Debug, Clone)]
pub(crate) struct ExpectedLayer {
    /// Digest of the bytes at the registry.
    pub(crate) digest: Digest,
    /// Number of these bytes.
    pub(crate) size: u64,
    /// Digest of the plain tar stream.
    pub(crate) diff_id: Digest,
}

impl ExpectedLayer {
    fn corrupt(&self, reason: impl Into<String>) -> PullError {
        PullError::CorruptLayer {
            layer: self.digest.to_string(),
            reason: reason.into(),
        }
    }

    fn too_large(&self, limit: u64, unit: &'static str) -> PullError {
        PullError::TooLarge {
            what: format!("layer {}", self.digest),
            limit,
            unit,
        }
    }
}

/// Writes `data`, `tree` and `recipe` of a layer into `directory`, durably.
///
/// # Errors
/// When the stream breaks off or is not the layer expected, exceeds a limit, or cannot be stored.
pub(crate) fn unpack(
    stream: impl Read,
    expected: &ExpectedLayer,
    directory: &Path,
    limits: &Limits,
) -> Result<(), PullError> {
    compressed(stream, expected, |stream| {
        unpack_plain(stream, expected, directory, limits)
    })
}

/// Reads a stream that is a layer which is there already: who sends it has it.
///
/// # Errors
/// When the stream breaks off, is not the layer expected, or exceeds a limit.
pub(crate) fn prove(
    stream: impl Read,
    expected: &ExpectedLayer,
    limits: &Limits,
) -> Result<(), PullError> {
    compressed(stream, expected, |stream| {
        let plain = decompress(stream).map_err(|e| expected.corrupt(e.to_string()))?;
        let mut plain = HashReader::new(plain, expected.diff_id.hasher(), longest(limits));
        let read = io::copy(&mut plain, &mut io::sink());
        if plain.exceeded() {
            return Err(expected.too_large(longest(limits), "bytes"));
        }
        read.map_err(|e| expected.corrupt(e.to_string()))?;
        is_plain(plain, expected)
    })
}

/// Does `work` with a stream, and holds the bytes of the stream against the manifest's digest.
fn compressed<R: Read>(
    stream: R,
    expected: &ExpectedLayer,
    work: impl FnOnce(&mut HashReader<R>) -> Result<(), PullError>,
) -> Result<(), PullError> {
    let mut stream = HashReader::new(stream, expected.digest.hasher(), expected.size);
    let unpacked = work(&mut stream);
    if stream.exceeded() {
        return Err(PullError::DigestMismatch {
            what: format!("layer {}", expected.digest),
            expected: format!("{} bytes", expected.size),
            actual: "more".into(),
        });
    }
    if let Err(PullError::TooLarge { .. } | PullError::Store(_)) = unpacked {
        return unpacked;
    }
    // Also for a broken archive: whether the registry or the image is at fault shows in the digest.
    let (digest, length) = match stream.finish() {
        Ok(finished) => finished,
        Err(e) => {
            return Err(unpacked
                .err()
                .unwrap_or_else(|| expected.corrupt(e.to_string())));
        }
    };
    if digest != expected.digest {
        return Err(PullError::DigestMismatch {
            what: format!(
                "layer {} ({length} of {} bytes)",
                expected.digest, expected.size
            ),
            expected: expected.digest.to_string(),
            actual: digest.to_string(),
        });
    }
    unpacked
}

fn unpack_plain(
    stream: impl Read,
    expected: &ExpectedLayer,
    directory: &Path,
    limits: &Limits,
) -> Result<(), PullError> {
    let plain = decompress(stream).map_err(|e| expected.corrupt(e.to_string()))?;
    let mut plain = HashReader::new(plain, expected.diff_id.hasher(), longest(limits));
    let mut unpacker = Unpacker {
        expected,
        limits,
        data: DataFile::create(&directory.join("data"))?,
        tree: TreeFile::create(&directory.join("tree"))?,
        estimate: Estimate::default(),
        contents: 0,
    };
    let recipe = directory.join("recipe");
    let stream = BufReader::with_capacity(BUFFER, &mut plain);
    let recipe_error = |e| StoreError::io(format!("write {}", recipe.display()), e);
    let recorder = Recorder::create(stream, &recipe).map_err(recipe_error)?;
    let result = unpacker
        .archive(recorder)
        .and_then(|recorder| Ok(recorder.finish().map_err(recipe_error)?));
    if plain.exceeded() {
        return Err(expected.too_large(longest(limits), "bytes"));
    }
    result?;
    is_plain(plain, expected)?;
    unpacker.data.finish()?;
    unpacker.tree.finish(unpacker.estimate.memory())?;
    Ok(())
}

/// Most bytes of a plain stream: the archive's own headers and padding come on top of contents.
fn longest(limits: &Limits) -> u64 {
    limits
        .max_unpacked_bytes
        .saturating_add(limits.max_entries.saturating_mul(2048))
}

/// Holds the plain stream against the configuration's digest.
fn is_plain(plain: HashReader<impl Read>, expected: &ExpectedLayer) -> Result<(), PullError> {
    let (diff_id, _) = plain
        .finish()
        .map_err(|e| expected.corrupt(e.to_string()))?;
    if diff_id == expected.diff_id {
        return Ok(());
    }
    Err(PullError::DigestMismatch {
        what: format!("content of layer {}", expected.digest),
        expected: expected.diff_id.to_string(),
        actual: diff_id.to_string(),
    })
}

struct Unpacker<'a> {
    expected: &'a ExpectedLayer,
    limits: &'a Limits,
    data: DataFile,
    tree: TreeFile,
    estimate: Estimate,
    contents: u64,
}

impl Unpacker<'_> {
    /// Takes in the whole stream, and gives it back at its end.
    fn archive<R: Read>(&mut self, stream: Recorder<R>) -> Result<Recorder<R>, PullError> {
        let mut archive = TarReader::new(stream);
        let mut members = 0;
        while let Some(member) = archive.next_member().map_err(|e| self.tar_error(&e))? {
            members += 1;
            if members > self.limits.max_entries {
                return Err(self.too_large(self.limits.max_entries, "entries"));
            }
            if let Some(entry) = self.entry(member, &mut archive)? {
                self.take(&entry)?;
            }
        }
        // What follows the end mark belongs to the digest as well.
        let mut stream = archive.into_inner();
        io::copy(&mut stream, &mut io::sink()).map_err(|e| self.expected.corrupt(e.to_string()))?;
        Ok(stream)
    }

    fn take(&mut self, entry: &Entry) -> Result<(), PullError> {
        self.estimate.add(entry);
        if self.estimate.memory() > self.limits.tree_memory {
            return Err(self.too_large(self.limits.tree_memory, "bytes of memory for its entries"));
        }
        self.tree.add(entry)?;
        if self.tree.length() > self.limits.max_tree_bytes {
            return Err(self.too_large(self.limits.max_tree_bytes, "bytes of names and attributes"));
        }
        Ok(())
    }

    /// What a member means; `None` for bookkeeping of other storage drivers.
    fn entry(
        &mut self,
        member: Member,
        archive: &mut TarReader<Recorder<impl Read>>,
    ) -> Result<Option<Entry>, PullError> {
        let shown = shown::line(&member.path.escape_ascii().to_string(), 300);
        let bad = |reason: String| self.expected.corrupt(format!("{shown:?}: {reason}"));
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
                        return Err(self.too_large(self.limits.max_unpacked_bytes, "bytes"));
                    }
                    let offset = match self.data.append(archive, size, member.sparse.as_deref()) {
                        Ok(offset) => offset,
                        Err(AppendError::Archive(e)) => return Err(bad(e.to_string())),
                        Err(AppendError::Store(e)) => return Err(e.into()),
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

    fn tar_error(&self, error: &TarError) -> PullError {
        self.expected.corrupt(match error {
            TarError::Io(e) => e.to_string(),
            TarError::Malformed(reason) => reason.clone(),
        })
    }

    fn too_large(&self, limit: u64, unit: &'static str) -> PullError {
        self.expected.too_large(limit, unit)
    }
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
struct TreeFile {
    path: PathBuf,
    writer: TreeWriter<BufWriter<File>>,
}

impl TreeFile {
    fn create(path: &Path) -> Result<Self, StoreError> {
        let created = File::create_new(path)
            .and_then(|file| TreeWriter::new(BufWriter::with_capacity(BUFFER, file)));
        Ok(Self {
            writer: created.map_err(|e| StoreError::io(format!("create {}", path.display()), e))?,
            path: path.to_owned(),
        })
    }

    fn add(&mut self, entry: &Entry) -> Result<(), StoreError> {
        let added = self.writer.add(entry);
        added.map_err(|e| StoreError::io(format!("write {}", self.path.display()), e))
    }

    fn length(&self) -> u64 {
        self.writer.length()
    }

    fn finish(self, memory: u64) -> Result<(), StoreError> {
        let finish = || {
            let mut out = self.writer.finish(memory)?;
            out.flush()?;
            out.get_ref().sync_all()
        };
        finish().map_err(|e| StoreError::io(format!("write {}", self.path.display()), e))
    }
}
