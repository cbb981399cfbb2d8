//! Layers laid over each other: one tree, as a union mount of the layers would show it
//! (OCI image-spec, layer.md, "Applying Changesets").
//!
//! Paths are resolved as inside a chroot of the image: symbolic links in parent directories are
//! followed, and can't lead out. A layer's whiteouts hide what is below it, never its own files,
//! whatever their order.

use std::collections::BTreeMap;

use crate::layer::tree::{Attributes, Entry, EntryKind};

/// Most symbolic links followed in one path, as in Linux.
const MAX_LINKS: usize = 40;
/// Most steps of path resolution for one image: far above any real one, low enough to end soon.
const MAX_STEPS: u64 = 1 << 30;

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

/// What the file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Directory {
        parent: NodeId,
        children: BTreeMap<Box<[u8]>, NodeId>,
    },
    /// Contents are in the data of layer number `layer`, counted as they were applied.
    File {
        layer: usize,
        offset: u64,
        size: u64,
    },
    Symlink {
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
}

/// Why a layer does not fit on those below it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MergeError {
    #[error("{path:?}: {reason}")]
    Invalid { path: String, reason: &'static str },
    #[error("image has more than {0} entries")]
    TooManyEntries(u64),
}

/// A tree in the making.
#[derive(Debug)]
pub(crate) struct Merger {
    nodes: Vec<Node>,
    layers: usize,
    max_entries: u64,
    steps: u64,
}

impl Merger {
    pub(crate) fn new(max_entries: u64) -> Self {
        Self {
            nodes: vec![implied_directory(ROOT)],
            layers: 0,
            max_entries,
            steps: 0,
        }
    }

    /// Lays the next layer over those applied before.
    pub(crate) fn apply(&mut self, entries: Vec<Entry>) -> Result<(), MergeError> {
        for entry in &entries {
            match entry.kind {
                EntryKind::Whiteout => self.hide(&entry.path)?,
                EntryKind::Opaque => self.hide_children(&entry.path)?,
                _ => {}
            }
        }
        for entry in entries {
            if !matches!(entry.kind, EntryKind::Whiteout | EntryKind::Opaque) {
                self.add(entry)?;
            }
        }
        self.layers += 1;
        Ok(())
    }

    pub(crate) fn finish(self) -> Tree {
        Tree { nodes: self.nodes }
    }

    fn hide(&mut self, path: &[u8]) -> Result<(), MergeError> {
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

    fn add(&mut self, entry: Entry) -> Result<(), MergeError> {
        let Entry {
            path,
            attributes,
            kind,
        } = entry;
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
                    children: BTreeMap::new(),
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
                self.children(parent).insert(name.into(), target);
                return Ok(());
            }
            EntryKind::File { size, offset } => NodeKind::File {
                layer: self.layers,
                offset,
                size,
            },
            EntryKind::Symlink { target } => NodeKind::Symlink { target },
            EntryKind::Char { major, minor } => NodeKind::Char { major, minor },
            EntryKind::Block { major, minor } => NodeKind::Block { major, minor },
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::Whiteout | EntryKind::Opaque => return Ok(()),
        };
        let node = self.push(Node { attributes, kind })?;
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
                        let created = self.push(implied_directory(here))?;
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

    fn push(&mut self, node: Node) -> Result<NodeId, MergeError> {
        let too_many = || MergeError::TooManyEntries(self.max_entries);
        if self.nodes.len() as u64 > self.max_entries {
            return Err(too_many());
        }
        let id = NodeId::try_from(self.nodes.len()).map_err(|_| too_many())?;
        self.nodes.push(node);
        Ok(id)
    }

    fn children(&mut self, directory: NodeId) -> &mut BTreeMap<Box<[u8]>, NodeId> {
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
            xattrs: Vec::new(),
        },
        kind: NodeKind::Directory {
            parent,
            children: BTreeMap::new(),
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
    path.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(mode: u16) -> Attributes {
        Attributes {
            mode,
            ..implied_directory(ROOT).attributes
        }
    }

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry {
            path: path.into(),
            attributes: attributes(0o700),
            kind,
        }
    }

    fn dir(path: &str) -> Entry {
        entry(path, EntryKind::Directory)
    }

    fn file(path: &str) -> Entry {
        entry(path, EntryKind::File { size: 1, offset: 0 })
    }

    fn link(path: &str, target: &str) -> Entry {
        entry(
            path,
            EntryKind::Symlink {
                target: target.into(),
            },
        )
    }

    fn hardlink(path: &str, target: &str) -> Entry {
        entry(
            path,
            EntryKind::Hardlink {
                target: target.into(),
            },
        )
    }

    fn gone(path: &str) -> Entry {
        entry(path, EntryKind::Whiteout)
    }

    fn opaque(path: &str) -> Entry {
        entry(path, EntryKind::Opaque)
    }

    /// Paths of the merged tree; files with the layer that they are from.
    fn merged(layers: Vec<Vec<Entry>>) -> Result<Vec<String>, MergeError> {
        let mut merger = Merger::new(100_000);
        for layer in layers {
            merger.apply(layer)?;
        }
        let tree = merger.finish();
        let mut paths = Vec::new();
        let mut pending = vec![(String::new(), ROOT)];
        while let Some((path, id)) = pending.pop() {
            match &tree.nodes[id as usize].kind {
                NodeKind::Directory { children, .. } => {
                    for (name, child) in children {
                        pending.push((format!("{path}/{}", name.escape_ascii()), *child));
                    }
                    paths.push(format!("{path}/"));
                }
                NodeKind::File { layer, .. } => paths.push(format!("{path}@{layer}")),
                _ => paths.push(path),
            }
        }
        paths.sort();
        Ok(paths)
    }

    #[test]
    fn upper_layers_replace_hide_and_keep() {
        let paths = merged(vec![
            vec![
                file("a/b"),
                file("a/c"),
                file("d/e"),
                file("d/f"),
                file("g"),
                dir("h"),
                file("h/i"),
            ],
            vec![
                file("a/b"),
                gone("a/c"),
                opaque("d"),
                file("d/new"),
                dir("g"),
                file("h"),
            ],
        ]);
        assert_eq!(
            paths.unwrap(),
            ["/", "/a/", "/a/b@1", "/d/", "/d/new@1", "/g/", "/h@1"]
        );
    }

    #[test]
    fn whiteouts_never_hide_their_own_layer() {
        for layer in [
            vec![file("a/x"), gone("a/x"), opaque("a"), gone("a")],
            vec![gone("a"), opaque("a"), gone("a/x"), file("a/x")],
        ] {
            let paths = merged(vec![vec![file("a/x"), file("a/y")], layer]).unwrap();
            assert_eq!(paths, ["/", "/a/", "/a/x@1"]);
        }
        assert_eq!(
            merged(vec![vec![gone("no/such"), opaque("none")]]).unwrap(),
            ["/"]
        );
    }

    #[test]
    fn parents_are_followed_inside_the_image() {
        let paths = merged(vec![
            vec![
                dir("usr/bin"),
                link("bin", "usr/bin"),
                link("abs", "/usr/bin"),
                link("up", "../../../usr/./bin/"),
                link("deep/chain", "../up"),
                link("made", "not/there"),
            ],
            vec![
                file("bin/a"),
                file("abs/b"),
                file("up/c"),
                file("deep/chain/d"),
                file("made/e"),
                gone("bin/a"),
                hardlink("x", "abs/b"),
            ],
        ]);
        assert_eq!(
            paths.unwrap(),
            [
                "/",
                "/abs",
                "/bin",
                "/deep/",
                "/deep/chain",
                "/made",
                "/not/",
                "/not/there/",
                "/not/there/e@1",
                "/up",
                "/usr/",
                "/usr/bin/",
                "/usr/bin/a@1",
                "/usr/bin/b@1",
                "/usr/bin/c@1",
                "/usr/bin/d@1",
                "/x@1"
            ]
        );
    }

    #[test]
    fn a_directory_keeps_its_children_and_replaces_a_link() {
        let mut again = dir("d");
        again.attributes.mode = 0o755;
        again.attributes.xattrs = vec![(b"user.b".to_vec(), vec![2])];
        let mut before = dir("d");
        before.attributes.xattrs = vec![(b"user.a".to_vec(), vec![1])];
        let mut merger = Merger::new(100);
        merger
            .apply(vec![before, file("d/x"), link("l", "d")])
            .unwrap();
        merger.apply(vec![again, dir("l")]).unwrap();
        let tree = merger.finish();
        let NodeKind::Directory { children, .. } = &tree.nodes[0].kind else {
            panic!()
        };
        let d = &tree.nodes[children[&b"d"[..]] as usize];
        assert_eq!(d.attributes.mode, 0o755);
        assert_eq!(d.attributes.xattrs.len(), 2);
        assert!(matches!(&d.kind, NodeKind::Directory { children, .. } if children.len() == 1));
        let l = &tree.nodes[children[&b"l"[..]] as usize];
        assert!(matches!(&l.kind, NodeKind::Directory { children, .. } if children.is_empty()));
    }

    #[test]
    fn tricks_are_refused_with_the_path() {
        for (layer, expected) in [
            (
                vec![file("a"), file("a/b")],
                "parent that is not a directory",
            ),
            (vec![hardlink("a", "none")], "hard link to nothing"),
            (
                vec![dir("d"), hardlink("a", "d")],
                "hard link to a directory",
            ),
            (vec![hardlink("a", "")], "hard link to a directory"),
            (
                vec![link("a", "b"), link("b", "a"), file("a/x")],
                "too many symbolic links",
            ),
            (
                vec![link("a", "a/a"), file("a/x")],
                "too many symbolic links",
            ),
        ] {
            let error = merged(vec![layer]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = merged(vec![(0..100_001).map(|i| file(&i.to_string())).collect()]).unwrap_err();
        assert!(matches!(error, MergeError::TooManyEntries(100_000)));
    }

    #[test]
    fn a_very_deep_tree_needs_no_deep_stack() {
        let mut layer = Vec::new();
        let mut base = String::new();
        for number in 0..500 {
            let step = format!("{base}{}", "d/".repeat(100));
            layer.push(file(&format!("{step}f")));
            layer.push(link(&format!("l{number}"), &step));
            base = format!("l{number}/");
        }
        // Each link goes on from the one before, so following the last takes too many of them.
        let error = merged(vec![layer]).unwrap_err().to_string();
        assert!(error.contains("too many symbolic links"), "{error}");
    }
}
