//! Tells all of a tree, so that two who see it may compare.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::Path,
};

use rustix::fs::{lgetxattr, llistxattr};

/// Larger files are mostly holes: what is in them is not told.
const LARGEST: u64 = 32 << 20;

/// Prints a line for each file below `dir`: name, type and mode, owner, group, links, size, time of
/// change of the content, and what stands for content and extended attributes.
pub fn list(dir: &Path) {
    let mut lines = Vec::new();
    walk(dir, dir, &mut lines);
    lines.sort();
    for line in lines {
        println!("{line}");
    }
}

fn walk(top: &Path, dir: &Path, lines: &mut Vec<String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_symlink() {
            digest(fs::read_link(&path).unwrap().as_os_str().as_bytes())
        } else if meta.is_file() && meta.len() <= LARGEST {
            digest(&fs::read(&path).unwrap())
        } else {
            0
        };
        let name = path.strip_prefix(top).unwrap().as_os_str().as_bytes();
        lines.push(format!(
            "{} {:o} {} {} {} {} {}.{:09} {content:x} {:x}",
            name.escape_ascii(),
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.len(),
            meta.mtime(),
            meta.mtime_nsec(),
            attributes(&path)
        ));
        if meta.is_dir() {
            walk(top, &path, lines);
        }
    }
}

/// What stands for a file's extended attributes, those of users and ACLs.
fn attributes(path: &Path) -> u64 {
    let mut names = vec![0; 65_536];
    let length = llistxattr(path, &mut names[..]).unwrap();
    let mut told: Vec<_> = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user.") || name.starts_with(b"system.posix_acl"))
        .map(|name| {
            let mut value = vec![0; 65_536];
            let length = lgetxattr(path, name, &mut value[..]).unwrap();
            [name, &value[..length]].concat()
        })
        .collect();
    told.sort();
    digest(&told.join(&0))
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
