//! Layers laid over each other: one tree, as a union mount of the layers would show it
//! (OCI image-spec, layer.md, "Applying Changesets").
//!
//! Paths are resolved as inside a chroot of the image: symbolic links in parent directories are
//! followed, and can't lead out. A layer's whiteouts hide what is below it, never its own files,
//! whatever their order.
//!
//! A tree is in memory as a whole, and layers come from strangers: what it takes is known before
//! ([`Estimate`]), reserved, and held to ([`Merger::new`]).

use std::collections::BTreeMap;
use std::io;

use crate::layer::tree::{Attributes, Entry, EntryKind};
use crate::shown::line;

/// Most symbolic links followed in one path, as in Linux.
const MAX_LINKS: usize = 40;
/// Most steps of path resolution for one image: far above any real one, low enough to end soon.
const MAX_STEPS: u64 = 1 << 30;

/// Bytes that a file takes besides its name until its image is written: the node, its place in a
/// directory, and the plan of its inode. With the allocator's own; a test measures it.
const NODE_MEMORY: u64 = 216;
/// What a directory takes besides: its map, and a node of that with room for eleven names.
const DIRECTORY_MEMORY: u64 = 304;
/// What an extended attribute takes besides its name and value.
const XATTR_MEMORY: u64 = 112;

/// Index into [`Tree::nodes`].
pub(crate) type NodeId = u32;

/// The root's own id.
pub(crate) const ROOT: NodeId = 0;

/// A whole file system. Nodes that no directory names are gone.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
}

/// One file, with any number of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) attributes: Attributes,
    pub(crate) kind: NodeKind,
}

/// What is in a directory, by name.
pub(crate) type Children = BTreeMap<Box<[u8]>, NodeId>;

/// What the file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Directory {
        parent: NodeId,
        /// Apart, as most nodes are no directories.
        children: Box<Children>,
    },
    /// Contents are in the data of layer number `layer`, counted as they were applied.
    File {
        layer: u32,
        offset: u64,
        size: u64,
    },
    Symlink {
        target: Box<[u8]>,
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
}

/// Why a layer does not fit on those below it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MergeError {
    #[error("{path:?}: {reason}")]
    Invalid { path: String, reason: &'static str },
    #[error("image has more than {0} entries")]
    TooManyEntries(u64),
    #[error("image needs more than {0} bytes of memory for its tree")]
    TooMuchMemory(u64),
    #[error("read the entries of a layer")]
    Read(#[from] io::Error),
}

/// What the entries of a layer, in their order, will take in memory when they are merged.
///
/// Directories that an archive uses without naming them are counted where a path leaves that of
/// the entry before it. Links in the path can lead to more of them, which is why [`Merger`] counts
/// again.
#[derive(Debug, Default)]
pub(crate) struct Estimate {
    memory: u64,
    previous: Vec<u8>,
}

impl Estimate {
    pub(crate) fn add(&mut self, entry: &Entry) {
        let target = match &entry.kind {
            EntryKind::Whiteout | EntryKind::Opaque => return,
            EntryKind::Symlink { target } => target.len(),
            _ => 0,
        };
        let (parent, name) = split(&entry.path);
        let mut before = self.previous.split(|b| *b == b'/');
        let parents = parent.split(|b| *b == b'/').filter(|name| !name.is_empty());
        for implied in parents.skip_while(|name| before.next() == Some(name)) {
            self.memory += node_memory(implied, true);
        }
        self.memory += node_memory(name, entry.kind == EntryKind::Directory)
            + target as u64
            + xattr_memory(&entry.attributes);
        self.previous.clone_from(&entry.path);
    }

    /// Bytes.
    pub(crate) fn memory(&self) -> u64 {
        self.memory
    }
}

fn node_memory(name: &[u8], is_directory: bool) -> u64 {
    let directory = if is_directory { DIRECTORY_MEMORY } else { 0 };
    NODE_MEMORY + name.len() as u64 + directory
}

fn xattr_memory(attributes: &Attributes) -> u64 {
    let of = |(name, value): &(Vec<u8>, Vec<u8>)| XATTR_MEMORY + (name.len() + value.len()) as u64;
    attributes.xattrs.iter().map(of).sum()
}

/// A tree in the making.
#[derive(Debug)]
pub(crate) struct Merger {
    nodes: Vec<Node>,
    layers: u32,
    max_entries: u64,
    /// Bytes that the tree has taken so far, and may take.
    memory: u64,
    max_memory: u64,
    steps: u64,
}

impl Merger {
    /// Starts with an empty root; `max_memory` is in bytes.
    pub(crate) fn new(max_entries: u64, max_memory: u64) -> Self {
        Self {
            nodes: vec![implied_directory(ROOT)],
            layers: 0,
            max_entries,
            memory: 0,
            max_memory,
            steps: 0,
        }
    }

    /// Takes away what the next layer's entry hides. All of a layer's entries go through this
    /// before the first goes through [`Merger::add`].
    pub(crate) fn hide(&mut self, entry: &Entry) -> Result<(), MergeError> {
        match entry.kind {
            EntryKind::Whiteout => self.hide_path(&entry.path),
            EntryKind::Opaque => self.hide_children(&entry.path),
            _ => Ok(()),
        }
    }

    /// Ends a layer: what is hidden and added next belongs to the one above it.
    pub(crate) fn end_layer(&mut self) {
        self.layers += 1;
    }

    pub(crate) fn finish(self) -> Tree {
        Tree { nodes: self.nodes }
    }

    fn hide_path(&mut self, path: &[u8]) -> Result<(), MergeError> {
        let (parent, name) = split(path);
        if let Some(parent) = self.directory(parent, Missing::Stop)? {
            self.children(parent).remove(name);
        }
        Ok(())
    }

    fn hide_children(&mut self, path: &[u8]) -> Result<(), MergeError> {
        if let Some(directory) = self.directory(path, Missing::Stop)? {
            self.children(directory).clear();
        }
        Ok(())
    }

    /// Adds what an entry of the next layer brings.
    pub(crate) fn add(&mut self, entry: Entry) -> Result<(), MergeError> {
        let Entry {
            path,
            attributes,
            kind,
        } = entry;
        if matches!(kind, EntryKind::Whiteout | EntryKind::Opaque) {
            return Ok(());
        }
        self.charge(xattr_memory(&attributes))?;
        if path.is_empty() {
            // The unpacker lets only directories through.
            overlay_attributes(&mut self.nodes[ROOT as usize].attributes, attributes);
            return Ok(());
        }
        let (parent_path, name) = split(&path);
        let invalid = |reason| MergeError::Invalid {
            path: shown(&path),
            reason,
        };
        let parent = self
            .directory(parent_path, Missing::Create)?
            .ok_or_else(|| invalid("has a parent that is not a directory"))?;
        let existing = self.children(parent).get(name).copied();
        let kind = match kind {
            EntryKind::Directory => {
                if let Some(existing) = existing
                    && let Node {
                        attributes: known,
                        kind: NodeKind::Directory { .. },
                    } = &mut self.nodes[existing as usize]
                {
                    overlay_attributes(known, attributes);
                    return Ok(());
                }
                NodeKind::Directory {
                    parent,
                    children: Box::default(),
                }
            }
            EntryKind::Hardlink { target } => {
                let target = self
                    .find(&target)?
                    .ok_or_else(|| invalid("is a hard link to nothing"))?;
                if Some(target) == existing {
                    return Ok(());
                }
                let node = &mut self.nodes[target as usize];
                if matches!(node.kind, NodeKind::Directory { .. }) {
                    return Err(invalid("is a hard link to a directory"));
                }
                let mode = match node.kind {
                    NodeKind::Symlink { .. } => node.attributes.mode,
                    _ => attributes.mode,
                };
                overlay_attributes(&mut node.attributes, Attributes { mode, ..attributes });
                self.charge(node_memory(name, false))?;
                self.children(parent).insert(name.into(), target);
                return Ok(());
            }
            EntryKind::File { size, offset } => NodeKind::File {
                layer: self.layers,
                offset,
                size,
            },
            EntryKind::Symlink { target } => {
                self.charge(target.len() as u64)?;
                NodeKind::Symlink {
                    target: target.into(),
                }
            }
            EntryKind::Char { major, minor } => NodeKind::Char { major, minor },
            EntryKind::Block { major, minor } => NodeKind::Block { major, minor },
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::Whiteout | EntryKind::Opaque => return Ok(()),
        };
        let node = self.push(name, Node { attributes, kind })?;
        self.children(parent).insert(name.into(), node);
        Ok(())
    }

    /// The node at a path; its last component is not followed.
    fn find(&mut self, path: &[u8]) -> Result<Option<NodeId>, MergeError> {
        let (parent, name) = split(path);
        if name.is_empty() {
            return Ok(Some(ROOT));
        }
        let Some(parent) = self.directory(parent, Missing::Stop)? else {
            return Ok(None);
        };
        Ok(self.children(parent).get(name).copied())
    }

    /// The directory at a path, all symbolic links followed.
    fn directory(&mut self, path: &[u8], missing: Missing) -> Result<Option<NodeId>, MergeError> {
        let mut links = 0;
        let mut here = ROOT;
        // Components still to go, the next one last.
        let mut ahead: Vec<Box<[u8]>> = components(path);
        while let Some(name) = ahead.pop() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(MergeError::Invalid {
                    path: shown(path),
                    reason: "image has too many symbolic links to follow",
                });
            }
            let NodeKind::Directory { parent, children } = &self.nodes[here as usize].kind else {
                return Ok(None);
            };
            if &*name == b".." {
                here = *parent;
                continue;
            }
            let Some(&child) = children.get(&name) else {
                match missing {
                    Missing::Stop => return Ok(None),
                    Missing::Create => {
                        let created = self.push(&name, implied_directory(here))?;
                        self.children(here).insert(name, created);
                        here = created;
                        continue;
                    }
                }
            };
            match &self.nodes[child as usize].kind {
                NodeKind::Directory { .. } => here = child,
                NodeKind::Symlink { target } => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(MergeError::Invalid {
                            path: shown(path),
                            reason: "has too many symbolic links in its path",
                        });
                    }
                    if target.starts_with(b"/") {
                        here = ROOT;
                    }
                    ahead.extend(components(target));
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(here))
    }

    fn charge(&mut self, bytes: u64) -> Result<(), MergeError> {
        self.memory = self.memory.saturating_add(bytes);
        if self.memory > self.max_memory {
            return Err(MergeError::TooMuchMemory(self.max_memory));
        }
        Ok(())
    }

    /// Takes in a node that gets this name.
    fn push(&mut self, name: &[u8], node: Node) -> Result<NodeId, MergeError> {
        let is_directory = matches!(node.kind, NodeKind::Directory { .. });
        self.charge(node_memory(name, is_directory))?;
        let too_many = || MergeError::TooManyEntries(self.max_entries);
        if self.nodes.len() as u64 > self.max_entries {
            return Err(too_many());
        }
        let id = NodeId::try_from(self.nodes.len()).map_err(|_| too_many())?;
        self.nodes.push(node);
        Ok(id)
    }

    fn children(&mut self, directory: NodeId) -> &mut Children {
        match &mut self.nodes[directory as usize].kind {
            NodeKind::Directory { children, .. } => children,
            other => unreachable!("directory() returned {other:?}"),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Missing {
    Create,
    Stop,
}

/// A directory that an archive uses without naming it; the same on every node, so at the epoch.
fn implied_directory(parent: NodeId) -> Node {
    Node {
        attributes: Attributes {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nsec: 0,
            xattrs: Box::default(),
        },
        kind: NodeKind::Directory {
            parent,
            children: Box::default(),
        },
    }
}

/// Sets attributes as chown, chmod, utimes and setxattr on what exists would.
fn overlay_attributes(known: &mut Attributes, new: Attributes) {
    let mut xattrs: BTreeMap<_, _> = std::mem::take(&mut known.xattrs).into_iter().collect();
    xattrs.extend(new.xattrs);
    *known = Attributes {
        xattrs: xattrs.into_iter().collect(),
        ..new
    };
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&path[..0], path),
    }
}

/// Components of a path in reverse order.
fn components(path: &[u8]) -> Vec<Box<[u8]>> {
    path.rsplit(|b| *b == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(Into::into)
        .collect()
}

fn shown(path: &[u8]) -> String {
    line(&path.escape_ascii().to_string(), 300)
}

#[cfg(test)]
impl Merger {
    /// Lays a whole layer over those applied before.
    pub(crate) fn apply(&mut self, entries: Vec<Entry>) -> Result<(), MergeError> {
        for entry in &entries {
            self.hide(entry)?;
        }
        for entry in entries {
            self.add(entry)?;
        }
        self.end_layer();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
