//! Where everything goes: decided completely before the first byte is written.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};

use crate::merge::{Children, Node, NodeId, NodeKind, ROOT, Tree};

use super::format::{BLOCK, BLOCK_SIZE, COMPACT_INODE, DIRENT, DataLayout, EXTENDED_INODE, SLOT};
use super::xattr;

/// Different times of files that are counted: there may be as many as files.
const MAX_TIMES: usize = 1 << 14;

/// Why a tree has no place in one image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayoutError {
    #[error("image needs more than 2^32 blocks")]
    TooManyBlocks,
    #[error("a file has more extended attributes than EROFS can hold")]
    TooManyXattrs,
}

/// The plan for one inode. Small, as there are as many as files.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) size: u64,
    pub(super) node: NodeId,
    /// Number of the inode: where it is, in slots.
    pub(super) nid: u32,
    pub(super) links: u32,
    /// First block of what does not follow the inode.
    pub(super) first_block: u32,
    /// Number of these blocks.
    pub(super) blocks: u32,
    pub(super) xattr_count: u16,
    pub(super) extended: bool,
    pub(super) layout: DataLayout,
}

impl Placed {
    /// Byte offset of the inode.
    pub(super) fn offset(&self) -> u64 {
        u64::from(self.nid) * SLOT
    }
}

/// The plan for the whole.
#[derive(Debug)]
pub(super) struct Layout {
    /// In the order of their offsets; the root comes first.
    pub(super) inodes: Vec<Placed>,
    /// Position in `inodes` of each node of the tree; `u32::MAX` for one that is gone.
    index: Vec<u32>,
    /// Blocks up to the data of the layers.
    pub(super) blocks: u64,
    /// The time of all compact inodes: that of most files.
    pub(super) common_time: (i64, u32),
}

impl Layout {
    pub(super) fn of(tree: &Tree) -> Result<Self, LayoutError> {
        let (order, links) = walk(tree);
        let common_time = most_common_time(tree, &order);
        let mut index = vec![u32::MAX; tree.nodes.len()];
        let mut cursor = BLOCK_SIZE;
        let mut inodes = Vec::with_capacity(order.len());
        for (position, id) in (0u32..).zip(&order) {
            index[*id as usize] = position;
            let node = &tree.nodes[*id as usize];
            let placed = place(*id, node, links[*id as usize], common_time, &mut cursor)?;
            inodes.push(placed);
        }
        let mut block = cursor.div_ceil(BLOCK_SIZE);
        for inode in &mut inodes {
            inode.first_block = u32::try_from(block).map_err(|_| LayoutError::TooManyBlocks)?;
            block += u64::from(inode.blocks);
        }
        Ok(Self {
            inodes,
            index,
            blocks: block,
            common_time,
        })
    }

    /// The inode number of a node.
    pub(super) fn nid(&self, node: NodeId) -> u32 {
        self.inodes[self.index[node as usize] as usize].nid
    }
}

/// Every node that has a name, parents before children and siblings together, and the number of
/// links of each.
fn walk(tree: &Tree) -> (Vec<NodeId>, Vec<u32>) {
    let mut links = vec![0u32; tree.nodes.len()];
    let mut order = Vec::new();
    let mut queue = VecDeque::from([ROOT]);
    order.push(ROOT);
    links[ROOT as usize] = 2;
    while let Some(directory) = queue.pop_front() {
        let NodeKind::Directory { children, .. } = &tree.nodes[directory as usize].kind else {
            continue;
        };
        for &child in children.values() {
            if let NodeKind::Directory { .. } = tree.nodes[child as usize].kind {
                links[child as usize] = 2;
                links[directory as usize] += 1;
                queue.push_back(child);
                order.push(child);
            } else {
                if links[child as usize] == 0 {
                    order.push(child);
                }
                links[child as usize] += 1;
            }
        }
    }
    (order, links)
}

fn most_common_time(tree: &Tree, order: &[NodeId]) -> (i64, u32) {
    let mut counts: HashMap<(i64, u32), usize> = HashMap::new();
    for id in order {
        let attributes = &tree.nodes[*id as usize].attributes;
        let time = (attributes.mtime, attributes.mtime_nsec);
        if let Some(count) = counts.get_mut(&time) {
            *count += 1;
        } else if counts.len() < MAX_TIMES {
            counts.insert(time, 1);
        }
    }
    counts
        .into_iter()
        .max_by_key(|(time, count)| (*count, Reverse(*time)))
        .map_or((0, 0), |(time, _)| time)
}

fn place(
    id: NodeId,
    node: &Node,
    links: u32,
    common_time: (i64, u32),
    cursor: &mut u64,
) -> Result<Placed, LayoutError> {
    let attributes = &node.attributes;
    let size = match &node.kind {
        NodeKind::Directory { parent, children } => {
            let mut packer = Packer::default();
            for (name, _) in directory_entries(id, *parent, children) {
                packer.add(name);
            }
            packer.size()
        }
        NodeKind::File { size, .. } => *size,
        NodeKind::Symlink { target } => target.len() as u64,
        NodeKind::Char { .. } | NodeKind::Block { .. } | NodeKind::Fifo => 0,
    };
    let extended = (attributes.mtime, attributes.mtime_nsec) != common_time
        || attributes.uid > u32::from(u16::MAX)
        || attributes.gid > u32::from(u16::MAX)
        || links > u32::from(u16::MAX)
        || size > u64::from(u32::MAX);
    let inode_size = if extended {
        EXTENDED_INODE
    } else {
        COMPACT_INODE
    };
    let xattr_size = xattr::size(&attributes.xattrs);
    let xattr_count = xattr::count(xattr_size).ok_or(LayoutError::TooManyXattrs)?;
    let head = inode_size + xattr_size;
    let tail = (size % BLOCK_SIZE) as usize;
    // Linux reads a link that follows its inode only when both are in one block. A link is never
    // longer than a block, so all of it is tail.
    let own_data = matches!(
        node.kind,
        NodeKind::Directory { .. } | NodeKind::Symlink { .. }
    );
    let inline = own_data && tail > 0 && head + tail <= BLOCK;
    let in_one_block = if inline { head + tail } else { inode_size };
    let mut offset = cursor.next_multiple_of(SLOT);
    if offset % BLOCK_SIZE + in_one_block as u64 > BLOCK_SIZE {
        offset = offset.next_multiple_of(BLOCK_SIZE);
    }
    *cursor = offset + (head + if inline { tail } else { 0 }) as u64;
    let blocks = match (own_data, inline) {
        (false, _) => 0,
        (true, true) => size / BLOCK_SIZE,
        (true, false) => size.div_ceil(BLOCK_SIZE),
    };
    Ok(Placed {
        node: id,
        nid: u32::try_from(offset / SLOT).map_err(|_| LayoutError::TooManyBlocks)?,
        extended,
        xattr_count,
        links,
        size,
        layout: if inline {
            DataLayout::Inline
        } else {
            DataLayout::Plain
        },
        first_block: 0,
        blocks: u32::try_from(blocks).map_err(|_| LayoutError::TooManyBlocks)?,
    })
}

/// The entries of a directory as they are stored: with `.` and `..`, sorted by byte.
pub(super) fn directory_entries(
    id: NodeId,
    parent: NodeId,
    children: &Children,
) -> impl Iterator<Item = (&[u8], NodeId)> {
    let (here, up) = (&b"."[..], &b".."[..]);
    // Names such as `!` come before `.`, and `.!` between the two.
    let before = children.range::<[u8], _>((Unbounded, Excluded(here)));
    let between = children.range::<[u8], _>((Excluded(here), Excluded(up)));
    let after = children.range::<[u8], _>((Excluded(up), Unbounded));
    before
        .map(named)
        .chain([(here, id)])
        .chain(between.map(named))
        .chain([(up, parent)])
        .chain(after.map(named))
}

fn named<'a>((name, child): (&'a impl AsRef<[u8]>, &NodeId)) -> (&'a [u8], NodeId) {
    (name.as_ref(), *child)
}

/// Cuts the entries of a directory into blocks: each entry has a fixed part and its name.
#[derive(Debug, Default)]
pub(super) struct Packer {
    full_blocks: u64,
    used: usize,
}

impl Packer {
    /// Takes an entry; `true` when it is the first of a new block after a full one.
    pub(super) fn add(&mut self, name: &[u8]) -> bool {
        let entry = DIRENT + name.len();
        let next_block = self.used + entry > BLOCK;
        if next_block {
            self.full_blocks += 1;
            self.used = 0;
        }
        self.used += entry;
        next_block
    }

    pub(super) fn size(&self) -> u64 {
        self.full_blocks * BLOCK_SIZE + self.used as u64
    }
}
