//! Extended attributes behind an inode.

/// Bytes before the first attribute.
const HEADER: usize = 12;

/// Prefixes that are stored as numbers; the others are not valid in EROFS.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES
        .iter()
        .find_map(|(prefix, index)| name.strip_prefix(*prefix).map(|rest| (*index, rest)))
}

/// Bytes that the attributes take, a multiple of 4; 0 for none.
pub(super) fn size(xattrs: &[(Vec<u8>, Vec<u8>)]) -> usize {
    let entries: usize = xattrs
        .iter()
        .filter_map(|(name, value)| {
            split(name).map(|(_, name)| (4 + name.len() + value.len()).next_multiple_of(4))
        })
        .sum();
    if entries == 0 { 0 } else { HEADER + entries }
}

/// The count that an inode holds for attributes of this size.
pub(super) fn count(size: usize) -> Option<u16> {
    match size {
        0 => Some(0),
        size => u16::try_from((size - HEADER) / 4 + 1).ok(),
    }
}

/// Appends what [`size`] counted.
pub(super) fn encode(xattrs: &[(Vec<u8>, Vec<u8>)], out: &mut Vec<u8>) {
    if size(xattrs) == 0 {
        return;
    }
    let start = out.len();
    out.extend([0; HEADER]);
    for (name, value) in xattrs {
        let Some((index, name)) = split(name) else {
            continue;
        };
        // Names and values were bounded when the layer was unpacked.
        out.extend([name.len() as u8, index]);
        out.extend((value.len() as u16).to_le_bytes());
        out.extend(name);
        out.extend(value);
        out.resize(start + (out.len() - start).next_multiple_of(4), 0);
    }
}
