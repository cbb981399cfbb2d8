//! A small EROFS reader for tests, written from the format's description and not from the writer.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;

/// What the reader sees at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) nid: u64,
    /// With file type.
    pub(crate) mode: u16,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) size: u64,
    /// Contents or link target.
    pub(crate) data: Vec<u8>,
    pub(crate) device: u32,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads the whole tree of a device; paths start with `/`.
pub(crate) fn read(device: &[u8]) -> BTreeMap<Vec<u8>, Seen> {
    let image = Image { device };
    let sb = 1024;
    assert_eq!(image.u32(sb), 0xE0F5_E1E2, "magic");
    assert_eq!(device[sb + 12], 12, "block size");
    assert_eq!(image.u32(sb + 80), 0, "incompatible features");
    let blocks = u64::from(image.u32(sb + 36));
    assert_eq!(blocks * 4096, device.len() as u64, "blocks of the device");
    let mut block = device[1024..4096].to_vec();
    block[4..8].fill(0);
    assert_eq!(image.u32(sb + 4), !crc32c::crc32c(&block), "checksum");
    let mut seen = BTreeMap::new();
    let mut pending = vec![(b"/".to_vec(), u64::from(image.u16(sb + 14)), None)];
    while let Some((path, nid, parent)) = pending.pop() {
        let inode = image.inode(nid);
        if inode.mode & 0o170_000 == 0o040_000 {
            for (name, child, kind) in directory(&inode.data) {
                match &name[..] {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent.unwrap_or(nid)),
                    _ => {
                        let path =
                            [if path == b"/" { b"" } else { &path[..] }, b"/", &name].concat();
                        let types = [0, 0o100, 0o040, 0o020, 0o060, 0o010, 0o140, 0o120];
                        let mode = image.inode(child).mode;
                        assert_eq!(
                            (mode & 0o170_000) >> 9,
                            types[usize::from(kind)],
                            "type of {name:?}"
                        );
                        pending.push((path, child, Some(nid)));
                    }
                }
            }
        }
        seen.insert(path, inode);
    }
    assert_eq!(
        image.u64(sb + 16),
        seen.values()
            .map(|inode| inode.nid)
            .collect::<std::collections::HashSet<_>>()
            .len() as u64,
        "number of inodes"
    );
    seen
}

struct Image<'a> {
    device: &'a [u8],
}

impl Image<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.device[at..at + N].try_into().unwrap()
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    fn inode(&self, nid: u64) -> Seen {
        let at = usize::try_from(nid * 32).unwrap();
        let format = self.u16(at);
        let extended = format & 1 == 1;
        let inode_size = if extended { 64 } else { 32 };
        assert!(
            at % 4096 + inode_size <= 4096,
            "inode {nid} crosses a block"
        );
        let layout = format >> 1;
        let xattr_count = usize::from(self.u16(at + 2));
        let xattr_size = if xattr_count == 0 {
            0
        } else {
            12 + 4 * (xattr_count - 1)
        };
        let mode = self.u16(at + 4);
        let size = if extended {
            self.u64(at + 8)
        } else {
            u64::from(self.u32(at + 8))
        };
        let address = self.u32(at + 16);
        let file_type = mode & 0o170_000;
        let has_data = matches!(file_type, 0o100_000 | 0o040_000 | 0o120_000);
        let mut data = Vec::new();
        if has_data {
            let length = usize::try_from(size).unwrap();
            let start = address as usize * 4096;
            match layout {
                0 => data.extend(&self.device[start..start + length][..]),
                2 => {
                    let full = length / 4096 * 4096;
                    data.extend(&self.device[start..start + full][..]);
                    let tail = at + inode_size + xattr_size;
                    assert!(tail % 4096 + length % 4096 <= 4096, "tail crosses a block");
                    if file_type == 0o120_000 {
                        assert_eq!(
                            at / 4096,
                            (tail + length - 1) / 4096,
                            "link crosses a block"
                        );
                    }
                    data.extend(&self.device[tail..tail + length % 4096]);
                }
                other => panic!("data layout {other}"),
            }
        }
        Seen {
            nid,
            mode,
            links: if extended {
                self.u32(at + 44)
            } else {
                u32::from(self.u16(at + 6))
            },
            uid: if extended {
                self.u32(at + 24)
            } else {
                u32::from(self.u16(at + 24))
            },
            gid: if extended {
                self.u32(at + 28)
            } else {
                u32::from(self.u16(at + 26))
            },
            mtime: if extended {
                (self.u64(at + 32).cast_signed(), self.u32(at + 40))
            } else {
                (self.u64(1024 + 24).cast_signed(), self.u32(1024 + 32))
            },
            size,
            data,
            device: if has_data { 0 } else { address },
            xattrs: self.xattrs(at + inode_size, xattr_size),
        }
    }

    fn xattrs(&self, start: usize, size: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut xattrs = Vec::new();
        if size == 0 {
            return xattrs;
        }
        assert_eq!(self.device[start + 4], 0, "no shared attributes");
        let mut at = start + 12;
        while at < start + size {
            let prefix: &[u8] = match self.device[at + 1] {
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                4 => b"trusted.",
                6 => b"security.",
                other => panic!("prefix {other}"),
            };
            let name = usize::from(self.device[at]);
            let value = usize::from(self.u16(at + 2));
            let bytes = &self.device[at + 4..at + 4 + name + value];
            xattrs.push(([prefix, &bytes[..name]].concat(), bytes[name..].to_vec()));
            at += (4 + name + value).next_multiple_of(4);
        }
        assert_eq!(at, start + size);
        xattrs
    }
}

fn directory(data: &[u8]) -> Vec<(Vec<u8>, u64, u8)> {
    let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
    for block in data.chunks(4096) {
        let u16_at =
            |at: usize| usize::from(u16::from_le_bytes(block[at..at + 2].try_into().unwrap()));
        let count = u16_at(8) / 12;
        assert_eq!(u16_at(8) % 12, 0);
        for number in 0..count {
            let at = number * 12;
            let start = u16_at(at + 8);
            let end = if number + 1 < count {
                u16_at(at + 12 + 8)
            } else {
                block.len()
            };
            let name = block[start..end]
                .split(|b| *b == 0)
                .next()
                .unwrap()
                .to_vec();
            assert!(!name.is_empty());
            let nid = u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
            entries.push((name, nid, block[at + 10]));
        }
    }
    assert!(
        entries.windows(2).all(|pair| pair[0].0 < pair[1].0),
        "names are not sorted"
    );
    entries
}
