//! Fuzz targets: names that callers give, and what registries hold. `make fuzz` runs them
//! (tests/fuzz), and the test below over kept inputs.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use tempfile::TempDir;

use crate::digest::Digest;
use crate::erofs;
use crate::erofs::reader;
use crate::layer::recipe::Remade;
use crate::layer::source::decompress;
use crate::layer::tree::{self, EntryKind};
use crate::layer::{LayerFiles, unpack};
use crate::manifest::{Configuration, Document, Manifest};
use crate::merge::Merger;
use crate::reference::Name;
use crate::registry::auth::{Challenge, TokenReply};
use crate::registry::hosts;
use crate::worker::job::{Failure, UnpackLimits};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("image-challenge", challenge),
    ("image-configuration", configuration),
    ("image-hosts", hosts),
    ("image-layer", layer),
    ("image-manifest", manifest),
    ("image-reference", reference),
];

/// Bytes of a block of tar.
const BLOCK: usize = 512;
/// The longest message, in bytes.
const MESSAGE: usize = 2000;

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
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made: io::Result<_> = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    made.expect("make a directory")
}

/// What is said of somebody else's text is one line that a person can read.
fn is_shown(message: &str) {
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
