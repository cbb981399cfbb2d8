//! Fuzz targets: names that callers give, and what registries hold. `make fuzz` runs them
//! (tests/fuzz), and the test below over kept inputs.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::archive;
use crate::digest::Digest;
use crate::erofs;
use crate::erofs::reader;
use crate::layer::recipe::Remade;
use crate::layer::source::decompress;
use crate::layer::tree::{self, Entry, EntryKind, TreeWriter};
use crate::layer::{LayerFiles, unpack};
use crate::manifest::{Configuration, Document, Manifest};
use crate::merge::Merger;
use crate::reference::Name;
use crate::registry::auth::{Challenge, TokenReply};
use crate::registry::hosts;
use crate::store::disk;
use crate::worker::job::{Failure, Merge, UnpackLimits};
use crate::worker::serve;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("image-archive", archive::fuzz::import),
    ("image-archive-answer", archive::fuzz::answer),
    ("image-challenge", challenge),
    ("image-configuration", configuration),
    ("image-hosts", hosts),
    ("image-layer", layer),
    ("image-manifest", manifest),
    ("image-merge", merge),
    ("image-recipe", recipe),
    ("image-reference", reference),
];

/// Bytes of a block of tar.
const BLOCK: usize = 512;
/// The longest message, in bytes.
const MESSAGE: usize = 2000;
/// Of an image whose trees are merged.
const LAYERS: usize = 3;

fn limits() -> UnpackLimits {
    UnpackLimits {
        max_unpacked_bytes: 1 << 20,
        max_entries: 100,
        max_tree_bytes: 1 << 20,
        tree_memory: 1 << 20,
    }
}

/// A name: its full form is a name too, the same one, and no path leads elsewhere by it.
pub fn reference(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else {
        return;
    };
    let Ok(name) = Name::parse(text) else { return };
    let full = name.full();
    assert_eq!(Name::parse(&full).ok(), Some(name.clone()), "{full}");
    let is_plain = |c: char| c.is_ascii_graphic() && c != '\\';
    assert!(full.chars().all(is_plain), "{full:?}");
    assert!(!name.registry().contains('/') && !name.registry().is_empty());
    assert!(
        name.repository()
            .split('/')
            .all(|part| !part.is_empty() && part != "..")
    );
}

/// A manifest or an index.
pub fn manifest(input: &[u8]) {
    for content_type in ["", "application/vnd.oci.image.index.v1+json; charset=utf-8"] {
        let document = Document {
            bytes: input.to_vec().into(),
            digest: Digest::of(input),
            content_type: content_type.into(),
        };
        if let Err(error) = Manifest::parse(&document) {
            is_shown(&error.to_string());
        }
    }
}

/// An image's configuration.
pub fn configuration(input: &[u8]) {
    match Configuration::parse(&Digest::of(input), input) {
        Ok(configuration) => drop(configuration.image_config()),
        Err(error) => is_shown(&error.to_string()),
    }
}

/// What a registry asks for in a header, and a token server's reply.
pub fn challenge(input: &[u8]) {
    if let Ok(header) = str::from_utf8(input)
        && let Some(Challenge::Bearer {
            realm,
            service,
            scope,
        }) = Challenge::parse(header)
    {
        let all = realm.len() + service.map_or(0, |s| s.len()) + scope.map_or(0, |s| s.len());
        assert!(all <= input.len());
    }
    if let Ok(reply) = serde_json::from_slice::<TokenReply>(input) {
        assert!(reply.token().is_none_or(|token| !token.is_empty()));
    }
}

/// An administrator's `hosts.toml`.
pub fn hosts(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else {
        return;
    };
    // It names files, and these have no end.
    if ["dev", "proc", "sys"]
        .iter()
        .any(|directory| text.contains(directory))
    {
        return;
    }
    let Ok(hosts) = hosts::parse("registry.example:5000", text, Path::new("/nowhere")) else {
        return;
    };
    assert!(!hosts.is_empty(), "the registry itself is always asked");
    for host in hosts {
        assert!(matches!(host.base.scheme(), "http" | "https") && host.base.has_host());
        assert!(host.base.query().is_none() && host.base.fragment().is_none());
        assert!(!host.authority().is_empty());
    }
}

/// A layer: what is unpacked is what the tar stream says, a disk is made of it that a reader of its own
/// reads, and an export is the same stream again.
pub fn layer(input: &[u8]) {
    let archive = with_checksums(input);
    let mut plain = Vec::new();
    let limit = 4 << 20;
    let whole = decompress(archive.as_slice())
        .and_then(|stream| stream.take(limit).read_to_end(&mut plain));
    if whole.is_err() || plain.len() as u64 == limit {
        plain.clear();
    }
    let directory = scratch();
    let directory = directory.path();
    let create = |name: &str| File::create_new(directory.join(name)).expect("make a file");
    let files = LayerFiles {
        data: create("data"),
        tree: create("tree"),
        recipe: create("recipe"),
    };
    if let Err(failure) = unpack(plain.as_slice(), files, &limits()) {
        if let Failure::Invalid(reason) = failure.shown() {
            is_shown(&reason);
        }
        return;
    }
    let data = fs::read(directory.join("data")).expect("a layer has data");
    assert_eq!(data.len() as u64 % erofs::BLOCK_SIZE, 0);
    let tree = File::open(directory.join("tree")).expect("a layer has a tree");
    let entries = tree::all(tree).expect("a tree that was written is read");
    for entry in &entries {
        let path = entry.path.split(|byte| *byte == b'/');
        let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
        assert!(entry.path.is_empty() || path.into_iter().all(is_name));
        if let EntryKind::File { size, offset } = entry.kind {
            assert!(size == 0 || offset + size <= data.len() as u64);
        }
    }
    let mut again = Vec::new();
    let open = |name| File::open(directory.join(name)).expect("a layer has it");
    let remade = Remade::new(open("recipe"), open("data"));
    let mut remade = remade.expect("a recipe that was written is read");
    remade.read_to_end(&mut again).expect("it makes the stream");
    assert!(again == plain, "an export is another stream");

    let mut merger = Merger::new(100, 1 << 20);
    if entries
        .iter()
        .try_for_each(|entry| merger.hide(entry))
        .is_err()
    {
        return;
    }
    if entries
        .into_iter()
        .try_for_each(|entry| merger.add(entry))
        .is_err()
    {
        return;
    }
    merger.end_layer();
    let mut device = Vec::new();
    let lengths = [data.len() as u64];
    if let Ok(written) = erofs::write(&mut device, &merger.finish(), &lengths, [7; 16]) {
        if !written.layers.is_empty() {
            device.extend(data);
        }
        let seen = reader::read(&device);
        assert!(seen.contains_key(&b"/"[..]));
    }
}

/// Trees of layers that a worker left which was taken over, each entry behind a byte that says in which: a
/// disk of them is as long as it is said to be, and made of layers that there are.
pub fn merge(mut input: &[u8]) {
    let mut trees: [_; LAYERS] = std::array::from_fn(|_| {
        let file = tempfile::tempfile_in(memory()).expect("make a file");
        TreeWriter::new(file).expect("write a file")
    });
    while let Ok(((layer, entry), rest)) = postcard::take_from_bytes::<(u8, Entry)>(input) {
        let tree = &mut trees[usize::from(layer) % LAYERS];
        tree.add(&entry).expect("write a file");
        input = rest;
    }
    let job = Merge {
        data: vec![8192; LAYERS],
        uuid: [7; 16],
        max_entries: 100,
        memory: 1 << 20,
    };
    let mut trees = trees.into_iter();
    let next = || {
        let tree = trees.next().map(|tree| tree.finish(0).map(OwnedFd::from));
        tree.expect("as many as there are layers")
    };
    let out = tempfile::tempfile_in(memory()).expect("make a file");
    let length = out.try_clone().expect("a descriptor");
    match serve::merge(&job, out, next) {
        Ok(merged) => {
            let length = length.metadata().expect("a file has a length").len();
            let layers: Vec<Digest> = (0..LAYERS).map(|n| Digest::of(&[n as u8])).collect();
            let extents = disk::extents_of(&merged, length, &layers, &job.data);
            assert!(extents.is_ok(), "{merged:?} of {length} bytes");
        }
        Err(Failure::Invalid(reason) | Failure::InvalidLayer { reason, .. }) => is_shown(&reason),
        Err(_) => {}
    }
}

/// The steps of a recipe that a worker left which was taken over: what is made of them ends, or fails.
pub fn recipe(input: &[u8]) {
    let mut recipe = tempfile::tempfile_in(memory()).expect("make a file");
    let mut write = |bytes: &[u8]| recipe.write_all(bytes).expect("write a file");
    write(b"HULLRECP\x01\0\0\0\xff\0\0\0\0\0\0\0");
    write(&zstd::encode_all(input, 1).expect("it is in memory"));
    recipe.rewind().expect("a file has a start");
    let data = tempfile::tempfile_in(memory()).expect("make a file");
    data.write_all_at(&[7; 4096], 0).expect("write a file");
    let Ok(remade) = Remade::new(recipe, data) else {
        return;
    };
    // A step brings what the recipe or the data have, and each takes a byte of it.
    let most = input.len() as u64 * 4096;
    if let Ok(length) = io::copy(&mut remade.take(most + 1), &mut io::sink()) {
        assert!(length <= most, "{length} bytes of {} and 4096", input.len());
    }
}

/// The input as a tar stream whose headers have the right checksums: else nearly all would end there.
fn with_checksums(input: &[u8]) -> Vec<u8> {
    let mut archive = input.to_vec();
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        // The odd ones are tested too.
        if header[155] != b'!' {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        let size = String::from_utf8_lossy(&header[124..135]).into_owned();
        let size = usize::from_str_radix(size.trim_matches(['\0', ' ']), 8).unwrap_or(0);
        at = at.saturating_add(size.min(input.len()).next_multiple_of(BLOCK));
    }
    archive
}

/// A directory in memory, as what is unpacked is made durable.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir_in(memory()).expect("make a directory")
}

fn memory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() {
        memory
    } else {
        env::temp_dir()
    }
}

/// What is said of somebody else's text is one line that a person can read.
pub(crate) fn is_shown(message: &str) {
    assert!(
        message.len() <= MESSAGE,
        "{} bytes: {message}",
        message.len()
    );
    assert!(!message.contains(char::is_control), "{message:?}");
}

#[test]
fn what_registries_and_archives_hold_does_no_harm() {
    hull_corpus::replay(TARGETS);
}
