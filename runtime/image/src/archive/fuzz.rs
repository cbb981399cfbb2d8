//! Archives of images, and what a worker that was taken over says of one; see [`crate::fuzz`].

use std::io::{BufWriter, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;
use crate::fuzz::{is_shown, scratch};
use crate::manifest::{Configuration, Manifest};
use crate::worker::process::decoded;
use crate::worker::serve;

/// Most bytes that an archive may bring.
const MAX_ARCHIVE: u64 = 64 << 10;
/// Files that a worker has laid down.
const SPOOLED: &[u8] = br#"[{"Config":"c","RepoTags":["a.b/c:1"],"Layers":["c","d"]}]{"imageLayoutVersion":"1.0.0"}{"manifests":[]}"#;
/// In names and contents, before a digit: the digest of the contents of the file with this number.
const DIGEST: &str = "@";

/// An archive of the files that the input names: a name and contents in turn, each ended by a zero byte. A
/// name that begins with `>` or `=` is one of a link, and where it leads are the contents. Before
/// them is a byte: how it is compressed, and whether the caller has a name for the image.
///
/// What is imported has names, and each blob has the digest that it is known by.
pub(crate) fn import(input: &[u8]) {
    let Some((&how, files)) = input.split_first() else {
        return;
    };
    let archive = packed(how, &files_of(files));
    let directory = scratch();
    let file = Spool::file(&directory).expect("make a file");
    let out = BufWriter::new(&file);
    let answer = serve::spool(archive.as_slice(), out, MAX_ARCHIVE);
    let answer = match answer {
        Ok(answer) => answer,
        Err(failure) => {
            serve::encode(&Err::<(), _>(failure.shown())).expect("a failure is encoded")
        }
    };
    let answer = decoded(&answer).expect("an honest worker's answer is one");
    take(answer, file, directory, how);
}

/// What a worker says of the files that it laid down: [`SPOOLED`]. Before it is a byte: whether the caller has
/// a name for the image.
pub(crate) fn answer(input: &[u8]) {
    let Some((&how, input)) = input.split_first() else {
        return;
    };
    let Ok(answer) = decoded(input) else { return };
    let directory = scratch();
    let file = Spool::file(&directory).expect("make a file");
    file.write_all_at(SPOOLED, 0).expect("write a file");
    take(answer, file, directory, how);
}

/// Imports what a worker has laid down.
fn take(answer: Result<(u64, Vec<u8>), Failure>, file: File, directory: TempDir, how: u8) {
    let name = Name::parse("given.example/name")
        .ok()
        .filter(|_| how & 4 != 0);
    let spool = Spool::answered(answer, file, directory);
    let imported = spool.and_then(|spool| Archive::of(spool, name.as_ref()));
    let (archive, images) = match imported {
        Ok(imported) => imported,
        Err(error) => return is_shown(&error.to_string()),
    };
    assert!(!images.is_empty());
    for image in images {
        assert!(!image.names.is_empty());
        let document = &image.document;
        assert_eq!(Digest::of(&document.bytes), document.digest);
        let Ok(Manifest::Image { config, .. }) = Manifest::parse(document) else {
            continue;
        };
        match archive.small_blob(&config, MAX_CONFIGURATION) {
            Ok(bytes) => {
                assert_eq!(Digest::of(&bytes), config.digest);
                let _ = Configuration::parse(&config.digest, &bytes);
            }
            Err(error) => is_shown(&error.to_string()),
        }
        // What is made here of an archive without digests has the right ones.
        if document.content_type == types::DOCKER_MANIFEST {
            for digest in archive.blobs.keys() {
                archive
                    .whole(digest, MAX_ARCHIVE)
                    .expect("a blob has its digest");
            }
        }
    }
}

/// Names and contents.
fn files_of(input: &[u8]) -> Vec<(String, String)> {
    let texts = String::from_utf8_lossy(input).into_owned();
    let mut texts = texts.split('\0');
    let mut files: Vec<(String, String)> = Vec::new();
    let mut digests: Vec<Digest> = Vec::new();
    while let (Some(name), Some(contents)) = (texts.next(), texts.next()) {
        let contents = known(&digests, contents);
        digests.push(Digest::of(contents.as_bytes()));
        let name = known(&digests, name);
        files.push((name.replace("blobs/sha256:", "blobs/sha256/"), contents));
    }
    files
}

/// A text with the digests that it names.
fn known(digests: &[Digest], text: &str) -> String {
    let mut text = text.to_owned();
    for (number, digest) in digests.iter().take(10).enumerate() {
        text = text.replace(&format!("{DIGEST}{number}"), digest.as_str());
    }
    text
}

/// The files as a tar stream.
fn packed(how: u8, files: &[(String, String)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        // What can't be in a header is left out.
        let _ = match name.split_at_checked(1) {
            Some((">", name)) => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, name, contents)
            }
            Some(("=", name)) => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, name, contents)
            }
            _ => {
                header.set_size(contents.len() as u64);
                tar.append_data(&mut header, name, contents.as_bytes())
            }
        };
    }
    let tar = tar.into_inner().expect("it is in memory");
    match how & 3 {
        1 => {
            let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
            gzip.write_all(&tar).expect("it is in memory");
            gzip.finish().expect("it is in memory")
        }
        2 => zstd::encode_all(tar.as_slice(), 1).expect("it is in memory"),
        3 => tar[..tar.len() / 2].to_vec(),
        _ => tar,
    }
}
