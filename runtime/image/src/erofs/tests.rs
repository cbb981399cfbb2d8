use std::collections::BTreeMap;
use std::process::Command;

use crate::layer::tree::{Attributes, Entry, EntryKind};
use crate::merge::{Merger, Tree};

use super::reader::{Seen, read};
use super::{BLOCK_SIZE, write};

fn attributes() -> Attributes {
    Attributes {
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 1_700_000_000,
        mtime_nsec: 0,
        xattrs: Box::default(),
    }
}

fn entry(path: &str, kind: EntryKind) -> Entry {
    Entry {
        path: path.into(),
        attributes: attributes(),
        kind,
    }
}

fn tree(layers: Vec<Vec<Entry>>) -> Tree {
    let mut merger = Merger::new(1 << 20, u64::MAX);
    for layer in layers {
        merger.apply(layer).unwrap();
    }
    merger.finish()
}

/// Writes the tree, appends the data of the layers that are used, and reads it back; Debian's
/// fsck.erofs has a look where it is installed.
fn round_trip(tree: &Tree, data: &[Vec<u8>]) -> BTreeMap<Vec<u8>, Seen> {
    let lengths: Vec<u64> = data.iter().map(|data| data.len() as u64).collect();
    let mut device = Vec::new();
    let written = write(&mut device, tree, &lengths, [7; 16]).unwrap();
    assert_eq!(written.length, device.len() as u64);
    assert_eq!(written.length % BLOCK_SIZE, 0);
    for layer in written.layers {
        device.extend(&data[layer as usize]);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &device).unwrap();
    match Command::new("fsck.erofs").arg(file.path()).output() {
        Ok(fsck) => assert!(
            fsck.status.success(),
            "{}",
            String::from_utf8_lossy(&fsck.stderr)
        ),
        Err(e) => println!("SKIPPED fsck.erofs: {e}; install it with: apt-get install erofs-utils"),
    }
    read(&device)
}

fn padded(contents: &[u8]) -> Vec<u8> {
    let mut data = contents.to_vec();
    data.resize(data.len().next_multiple_of(4096), 0);
    data
}

#[test]
fn every_kind_of_file_comes_back() {
    let mut file = entry(
        "usr/bin/tool",
        EntryKind::File {
            size: 5000,
            offset: 0,
        },
    );
    file.attributes = Attributes {
        mode: 0o4755,
        uid: 100_000,
        gid: 7,
        mtime: -3,
        mtime_nsec: 999_999_999,
        xattrs: [
            (b"security.capability".to_vec(), vec![1, 0, 0, 2]),
            (b"system.posix_acl_access".to_vec(), vec![2, 0, 0, 0]),
            (b"trusted.t".to_vec(), vec![]),
            (b"user.long".to_vec(), vec![b'x'; 9000]),
        ]
        .into(),
    };
    let mut again = entry(
        "usr/bin/again",
        EntryKind::Hardlink {
            target: "usr/bin/tool".into(),
        },
    );
    again.attributes = Attributes {
        xattrs: Box::default(),
        ..file.attributes.clone()
    };
    let contents: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
    let seen = round_trip(
        &tree(vec![vec![
            file.clone(),
            again,
            entry(
                "bin",
                EntryKind::Symlink {
                    target: "usr/bin".into(),
                },
            ),
            entry("empty", EntryKind::File { size: 0, offset: 0 }),
            entry("dev/null", EntryKind::Char { major: 1, minor: 3 }),
            entry(
                "dev/big",
                EntryKind::Block {
                    major: 4095,
                    minor: 1_048_575,
                },
            ),
            entry("pipe", EntryKind::Fifo),
        ]]),
        &[padded(&contents)],
    );
    let tool = &seen[&b"/usr/bin/tool"[..]];
    assert_eq!(tool.data, contents);
    assert_eq!((tool.mode, tool.uid, tool.gid), (0o104_755, 100_000, 7));
    assert_eq!(seen[&b"/usr/bin/again"[..]].nid, tool.nid);
    assert_eq!(tool.links, 2);
    assert_eq!(tool.xattrs[..], file.attributes.xattrs[..]);
    assert_eq!(seen[&b"/bin"[..]].data, b"usr/bin");
    assert_eq!(seen[&b"/bin"[..]].mtime, (1_700_000_000, 0));
    assert_eq!(seen[&b"/dev/null"[..]].device, 0x103);
    assert_eq!(seen[&b"/dev/big"[..]].device, 0xffff_ffff);
    assert_eq!(seen[&b"/empty"[..]].size, 0);
    assert_eq!(seen[&b"/"[..]].links, 4);
    assert_eq!(seen[&b"/usr"[..]].links, 3);
    assert_eq!(seen.len(), 11);
}

#[test]
fn directories_of_all_sizes_are_sorted_and_complete() {
    for count in [0, 1, 200, 300, 5000] {
        for length in [1, 20, 255] {
            let names: Vec<String> = (0..count)
                .map(|i| {
                    format!("{i:x}{}", "-".repeat(length))
                        .chars()
                        .take(255)
                        .collect()
                })
                .collect();
            let entries = names
                .iter()
                .map(|name| entry(&format!("d/{name}"), EntryKind::Fifo))
                .collect::<Vec<_>>();
            let mut layer = vec![entry("d", EntryKind::Directory)];
            layer.extend(entries);
            // Names that sort before `.`, as they must come first on disk as well.
            layer.push(entry("d/!", EntryKind::Fifo));
            let seen = round_trip(&tree(vec![layer]), &[]);
            assert_eq!(seen.len(), names.len() + 3, "{count} names of {length}");
        }
    }
}

#[test]
fn links_of_all_lengths_come_back() {
    let lengths = [1, 100, 2000, 3999, 4030, 4031, 4032, 4033, 4064, 4065, 4095];
    let mut layer: Vec<Entry> = lengths
        .iter()
        .map(|length| {
            entry(
                &format!("l{length}"),
                EntryKind::Symlink {
                    target: vec![b't'; *length],
                },
            )
        })
        .collect();
    layer[2].attributes.mtime = 5;
    layer[4].attributes.xattrs = [(b"trusted.x".to_vec(), vec![1; 60])].into();
    let seen = round_trip(&tree(vec![layer]), &[]);
    for length in lengths {
        assert_eq!(
            seen[format!("/l{length}").as_bytes()].data,
            vec![b't'; length]
        );
    }
}

#[test]
fn data_of_layers_is_found_behind_the_metadata_and_unused_layers_are_left_out() {
    let file = |path: &str, offset: u64| entry(path, EntryKind::File { size: 4, offset });
    let data = [
        [padded(b"aaaa"), padded(b"bbbb")].concat(),
        padded(b"gone"),
        [padded(b"cccc"), padded(b"dddd")].concat(),
    ];
    let tree = tree(vec![
        vec![file("a", 0), file("b", 4096)],
        vec![file("x", 0)],
        vec![file("x", 0), file("d", 4096)],
    ]);
    let mut out = Vec::new();
    let lengths: Vec<u64> = data.iter().map(|data| data.len() as u64).collect();
    assert_eq!(
        write(&mut out, &tree, &lengths, [0; 16]).unwrap().layers,
        [0, 2]
    );
    let seen = round_trip(&tree, &data);
    for (path, contents) in [
        ("/a", "aaaa"),
        ("/b", "bbbb"),
        ("/x", "cccc"),
        ("/d", "dddd"),
    ] {
        assert_eq!(seen[path.as_bytes()].data, contents.as_bytes());
    }
}

#[test]
fn the_same_tree_is_the_same_disk() {
    let layer: Vec<Entry> = (0..500)
        .map(|i| {
            entry(
                &format!("d{}/f{i}", i % 7),
                EntryKind::Symlink {
                    target: vec![b'x'; i + 1],
                },
            )
        })
        .collect();
    let mut backwards = layer.clone();
    backwards.reverse();
    let disk = |layer| {
        let mut out = Vec::new();
        write(&mut out, &tree(vec![layer]), &[], [1; 16]).unwrap();
        out
    };
    assert_eq!(disk(layer), disk(backwards));
}
