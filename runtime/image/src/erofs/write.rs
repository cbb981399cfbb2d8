//! Writes the metadata, front to back.

use std::io::{self, Write};

use crate::merge::{Node, NodeId, NodeKind, Tree};

use super::format::{BLOCK, BLOCK_SIZE, DIRENT, DataLayout, Inode, Superblock, encode_device};
use super::layout::{Layout, LayoutError, Packer, Placed, directory_entries};
use super::xattr;

/// What was written.
#[derive(Debug)]
pub(crate) struct Metadata {
    /// Length in bytes, a multiple of the block size.
    pub(crate) length: u64,
    /// Which of the layers have contents in the tree; the device is the metadata and the data of
    /// these, in this order.
    pub(crate) layers: Vec<u32>,
}

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("write EROFS metadata")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// Writes the metadata of `tree`. `data` has the length in bytes of each layer's data, a multiple
/// of the block size; `uuid` becomes the file system's own.
pub(crate) fn write(
    mut out: impl Write,
    tree: &Tree,
    data: &[u64],
    uuid: [u8; 16],
) -> Result<Metadata, WriteError> {
    let layout = Layout::of(tree)?;
    let mut used = vec![false; data.len()];
    for inode in &layout.inodes {
        if let NodeKind::File {
            layer, size: 1.., ..
        } = tree.nodes[inode.node as usize].kind
        {
            used[layer as usize] = true;
        }
    }
    let mut total = layout.blocks;
    let mut data_starts = vec![0; data.len()];
    for (layer, length) in data.iter().enumerate().filter(|(layer, _)| used[*layer]) {
        data_starts[layer] = total;
        total += length / BLOCK_SIZE;
    }
    // The highest number means "no block".
    let blocks = u32::try_from(total)
        .ok()
        .filter(|blocks| *blocks < u32::MAX)
        .ok_or(LayoutError::TooManyBlocks)?;
    let root = &layout.inodes[0];
    let superblock = Superblock {
        // The root is the first inode, so its number is small.
        root_nid: u16::try_from(root.nid).map_err(|_| LayoutError::TooManyBlocks)?,
        inodes: layout.inodes.len() as u64,
        build_time: layout.common_time.0,
        build_time_nsec: layout.common_time.1,
        blocks,
        uuid,
    };
    out.write_all(&superblock.encode())?;
    let mut writer = Writer {
        tree,
        layout: &layout,
        data_starts: &data_starts,
    };
    writer.inodes(&mut out)?;
    writer.blocks(&mut out)?;
    out.flush()?;
    Ok(Metadata {
        length: layout.blocks * BLOCK_SIZE,
        layers: (0..)
            .zip(used)
            .filter_map(|(layer, used)| used.then_some(layer))
            .collect(),
    })
}

struct Writer<'a> {
    tree: &'a Tree,
    layout: &'a Layout,
    data_starts: &'a [u64],
}

impl Writer<'_> {
    fn inodes(&mut self, out: &mut impl Write) -> Result<(), WriteError> {
        let mut position = BLOCK_SIZE;
        let mut bytes = Vec::with_capacity(BLOCK);
        for (number, placed) in (1u32..).zip(&self.layout.inodes) {
            let node = &self.tree.nodes[placed.node as usize];
            bytes.clear();
            bytes.resize((placed.offset() - position) as usize, 0);
            self.inode(number, placed, node, &mut bytes)?;
            xattr::encode(&node.attributes.xattrs, &mut bytes);
            if placed.layout == DataLayout::Inline {
                self.own_data(placed.node, node, |number, block| {
                    if number == placed.blocks {
                        bytes.extend(block);
                    }
                    Ok(())
                })?;
            }
            out.write_all(&bytes)?;
            position += bytes.len() as u64;
        }
        pad(out, position)?;
        Ok(())
    }

    /// Links and directories, or the parts of them, that are not behind their inodes.
    fn blocks(&mut self, out: &mut impl Write) -> io::Result<()> {
        for placed in self.layout.inodes.iter().filter(|placed| placed.blocks > 0) {
            let node = &self.tree.nodes[placed.node as usize];
            self.own_data(placed.node, node, |number, block| {
                if number >= placed.blocks {
                    return Ok(());
                }
                out.write_all(block)?;
                pad(out, block.len() as u64)
            })?;
        }
        Ok(())
    }

    fn inode(
        &self,
        number: u32,
        placed: &Placed,
        node: &Node,
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        let address = match &node.kind {
            NodeKind::File {
                layer,
                offset,
                size: 1..,
            } => self.data_starts[*layer as usize] + offset / BLOCK_SIZE,
            NodeKind::File { .. } | NodeKind::Fifo => 0,
            NodeKind::Directory { .. } | NodeKind::Symlink { .. } => u64::from(placed.first_block),
            NodeKind::Char { major, minor } | NodeKind::Block { major, minor } => {
                u64::from(encode_device(*major, *minor))
            }
        };
        let attributes = &node.attributes;
        Inode {
            extended: placed.extended,
            layout: placed.layout,
            xattr_count: placed.xattr_count,
            mode: type_bits(&node.kind) | attributes.mode,
            links: placed.links,
            size: placed.size,
            address: u32::try_from(address).map_err(|_| LayoutError::TooManyBlocks)?,
            number,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            mtime_nsec: attributes.mtime_nsec,
        }
        .encode(out);
        Ok(())
    }

    /// Gives out the bytes of a link or directory, block by block with their numbers; the last may
    /// be shorter, and padding is left out.
    fn own_data(
        &self,
        id: NodeId,
        node: &Node,
        mut give: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        match &node.kind {
            NodeKind::Symlink { target } => give(0, target),
            NodeKind::Directory { parent, children } => {
                let mut packer = Packer::default();
                let mut entries = Vec::new();
                let mut block = Vec::with_capacity(BLOCK);
                let mut number = 0;
                for entry in directory_entries(id, *parent, children) {
                    if packer.add(entry.0) {
                        self.directory_block(&entries, &mut block);
                        give(number, &block)?;
                        number += 1;
                        block.clear();
                        entries.clear();
                    }
                    entries.push(entry);
                }
                self.directory_block(&entries, &mut block);
                give(number, &block)
            }
            _ => Ok(()),
        }
    }

    /// Fixed parts of all entries of a block, then their names; the offset of the first name
    /// tells how many there are.
    fn directory_block(&self, entries: &[(&[u8], NodeId)], out: &mut Vec<u8>) {
        let mut name_offset = entries.len() * DIRENT;
        for (name, node) in entries {
            let kind = &self.tree.nodes[*node as usize].kind;
            out.extend(u64::from(self.layout.nid(*node)).to_le_bytes());
            out.extend((name_offset as u16).to_le_bytes());
            out.extend([dirent_type(kind), 0]);
            name_offset += name.len();
        }
        for (name, _) in entries {
            out.extend(*name);
        }
    }
}

fn pad(out: &mut impl Write, position: u64) -> io::Result<()> {
    let gap = position.next_multiple_of(BLOCK_SIZE) - position;
    out.write_all(&[0; BLOCK][..gap as usize])
}

fn type_bits(kind: &NodeKind) -> u16 {
    match kind {
        NodeKind::Fifo => 0o010_000,
        NodeKind::Char { .. } => 0o020_000,
        NodeKind::Directory { .. } => 0o040_000,
        NodeKind::Block { .. } => 0o060_000,
        NodeKind::File { .. } => 0o100_000,
        NodeKind::Symlink { .. } => 0o120_000,
    }
}

/// The `FT_*` numbers of Linux's fs_types.h.
fn dirent_type(kind: &NodeKind) -> u8 {
    match kind {
        NodeKind::File { .. } => 1,
        NodeKind::Directory { .. } => 2,
        NodeKind::Char { .. } => 3,
        NodeKind::Block { .. } => 4,
        NodeKind::Fifo => 5,
        NodeKind::Symlink { .. } => 7,
    }
}
