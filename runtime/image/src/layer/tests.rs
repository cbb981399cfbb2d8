use std::io::{Cursor, Seek, Write};
use std::path::Path;

use proptest::prelude::*;

use super::source::decompress;
use super::*;
use crate::erofs::BLOCK_SIZE;

/// Builds archives byte by byte, also such as no program would write.
#[derive(Default)]
struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    fn header(
        mut self,
        path: &[u8],
        flag: u8,
        size: u64,
        change: impl FnOnce(&mut [u8; 512]),
    ) -> Self {
        let mut block = [0u8; 512];
        block[..path.len().min(100)].copy_from_slice(&path[..path.len().min(100)]);
        block[100..108].copy_from_slice(b"0000644\0");
        block[108..116].copy_from_slice(b"0000000\0");
        block[116..124].copy_from_slice(b"0000000\0");
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[136..148].copy_from_slice(b"00000000017\0");
        block[156] = flag;
        block[257..265].copy_from_slice(b"ustar\x0000");
        change(&mut block);
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend(block);
        self
    }

    fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, contents: &[u8]) -> Self {
        self.header(path.as_bytes(), b'0', contents.len() as u64, |_| {})
            .data(contents)
    }

    fn link(self, path: &str, flag: u8, target: &str) -> Self {
        self.header(path.as_bytes(), flag, 0, |block| {
            block[157..157 + target.len()].copy_from_slice(target.as_bytes());
        })
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            body.extend(format!("{length} {key}=").as_bytes());
            body.extend(*value);
            body.push(b'\n');
        }
        self.header(b"pax", b'x', body.len() as u64, |_| {})
            .data(&body)
    }

    fn end(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }
}

fn limits() -> UnpackLimits {
    UnpackLimits {
        max_unpacked_bytes: 128 << 30,
        max_entries: 4 << 20,
        max_tree_bytes: 2 << 30,
        tree_memory: 512 << 20,
    }
}

/// Decompresses and unpacks, as two workers do.
fn unpack_into(stream: impl Read, directory: &Path, limits: &UnpackLimits) -> Result<(), Failure> {
    let plain = decompress(stream).map_err(|e| Failure::Invalid(e.to_string()))?;
    let create = |name| File::create_new(directory.join(name)).unwrap();
    let files = LayerFiles {
        data: create("data"),
        tree: create("tree"),
        recipe: create("recipe"),
    };
    unpack(plain, files, limits)
}

struct Unpacked {
    entries: Vec<Entry>,
    data: Vec<u8>,
}

impl Unpacked {
    fn kind(&self, path: &str) -> &EntryKind {
        &self
            .entries
            .iter()
            .find(|entry| entry.path == path.as_bytes())
            .unwrap()
            .kind
    }

    fn contents(&self, path: &str) -> &[u8] {
        let EntryKind::File { size, offset } = *self.kind(path) else {
            panic!("{path} is no file")
        };
        assert_eq!(offset % BLOCK_SIZE, 0);
        &self.data[offset as usize..(offset + size) as usize]
    }
}

fn try_unpack(archive: &[u8], limits: &UnpackLimits) -> Result<Unpacked, Failure> {
    let directory = tempfile::tempdir().unwrap();
    unpack_into(archive, directory.path(), limits)?;
    Ok(load(directory.path()))
}

fn load(directory: &Path) -> Unpacked {
    let data = std::fs::read(directory.join("data")).unwrap();
    assert_eq!(data.len() as u64 % BLOCK_SIZE, 0);
    let entries = tree::all(File::open(directory.join("tree")).unwrap()).unwrap();
    Unpacked { entries, data }
}

fn unpacked(archive: &[u8]) -> Unpacked {
    try_unpack(archive, &limits()).unwrap()
}

fn refused(archive: &[u8]) -> String {
    match try_unpack(archive, &limits()) {
        Err(Failure::Invalid(reason)) => reason,
        Err(other) => panic!("refused with {other:?}"),
        Ok(_) => panic!("accepted"),
    }
}

#[test]
fn contents_are_packed_at_block_boundaries() {
    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 % 253) as u8).collect();
    let layer = unpacked(
        &Tar::default()
            .file("one", b"1")
            .file("none", b"")
            .file("big", &big)
            .file("./last/../end", &[9; 4096])
            .end(),
    );
    assert_eq!(layer.contents("one"), b"1");
    assert_eq!(layer.contents("big"), big);
    assert_eq!(layer.contents("end"), [9; 4096]);
    assert_eq!(*layer.kind("none"), EntryKind::File { size: 0, offset: 0 });
    assert_eq!(
        layer.data.len(),
        4096 + big.len().next_multiple_of(4096) + 4096
    );
}

#[test]
fn compressed_streams_give_the_same_layer() {
    let plain = Tar::default().file("a", &[5; 100_000]).end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain[..700]).unwrap();
    let mut gzip = gzip.finish().unwrap();
    // Two members, as parallel compressors write them.
    let mut second = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    second.write_all(&plain[700..]).unwrap();
    gzip.extend(second.finish().unwrap());
    let mut zstd = zstd::encode_all(&plain[..700], 3).unwrap();
    // A skippable frame, as seekable variants have them.
    zstd.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
    zstd.extend(zstd::encode_all(&plain[700..], 3).unwrap());
    for stream in [plain.clone(), gzip, zstd] {
        let directory = tempfile::tempdir().unwrap();
        // One byte at a time: nothing may depend on how the network cuts the stream.
        let slow = Dribble(Cursor::new(stream.clone()));
        unpack_into(slow, directory.path(), &limits()).unwrap();
        assert_eq!(load(directory.path()).contents("a"), [5; 100_000]);
    }
}

struct Dribble(Cursor<Vec<u8>>);

impl Read for Dribble {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(1);
        self.0.read(&mut buffer[..length])
    }
}

#[test]
fn names_and_attributes_come_from_where_they_are_best() {
    let long = "n".repeat(200);
    let longer = format!("{}/{}", "p".repeat(150), "q".repeat(99));
    let layer = unpacked(
        &Tar::default()
            .pax(&[
                ("path", long.as_bytes()),
                ("uid", b"3000000000"),
                ("mtime", b"-1.5"),
                ("SCHILY.xattr.user.k", b"a=b\n\0"),
                ("SCHILY.xattr.security.capability", &[1, 2]),
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.com.apple.quarantine", b"y"),
            ])
            .file("short", b"x")
            .header(b"././@LongLink", b'L', longer.len() as u64 + 1, |_| {})
            .data(longer.as_bytes())
            .header(b"././@LongLink", b'K', 301, |_| {})
            .data(&[b't'; 300])
            .link("cut", b'2', "cut")
            .header(b"tail", b'0', 0, |block| {
                block[345..348].copy_from_slice(b"pre");
                block[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0, 1, 0x11, 0x70]);
            })
            .header(b"old-directory/", 0, 0, |_| {})
            .link("hard", b'1', "/pre/./tail")
            .header(b"null", b'3', 0, |block| {
                block[329..337].copy_from_slice(b"0000001\0");
                block[337..345].copy_from_slice(b"0000003\0");
            })
            .header(b"g", b'g', 4, |_| {})
            .data(b"4 x\n")
            .header(b"pipe", b'6', 0, |_| {})
            .end(),
    );
    let first = &layer.entries[0];
    assert_eq!(first.path, long.as_bytes());
    assert_eq!(first.attributes.uid, 3_000_000_000);
    assert_eq!(
        (first.attributes.mtime, first.attributes.mtime_nsec),
        (-2, 500_000_000)
    );
    assert_eq!(
        first.attributes.xattrs[..],
        [
            (b"security.capability".to_vec(), vec![1, 2]),
            (b"user.k".to_vec(), b"a=b\n\0".to_vec())
        ]
    );
    assert_eq!(
        *layer.kind(&longer),
        EntryKind::Symlink {
            target: vec![b't'; 300]
        }
    );
    assert_eq!(layer.entries[2].path, b"pre/tail");
    assert_eq!(layer.entries[2].attributes.uid, 70_000);
    assert_eq!(*layer.kind("old-directory"), EntryKind::Directory);
    assert_eq!(
        *layer.kind("hard"),
        EntryKind::Hardlink {
            target: b"pre/tail".to_vec()
        }
    );
    assert_eq!(*layer.kind("null"), EntryKind::Char { major: 1, minor: 3 });
    assert_eq!(*layer.kind("pipe"), EntryKind::Fifo);
}

#[test]
fn whiteouts_are_told_from_files() {
    let layer = unpacked(
        &Tar::default()
            .file("a/.wh.b", b"")
            .file(".wh.c", b"")
            .file("d/.wh..wh..opq", b"")
            .file(".wh..wh.plnk/1.2", b"x")
            .file("a/.whx", b"")
            .end(),
    );
    assert_eq!(*layer.kind("a/b"), EntryKind::Whiteout);
    assert_eq!(*layer.kind("c"), EntryKind::Whiteout);
    assert_eq!(*layer.kind("d"), EntryKind::Opaque);
    assert!(matches!(layer.kind("a/.whx"), EntryKind::File { .. }));
    assert_eq!(layer.entries.len(), 4);
    for bad in ["a/.wh.", "a/.wh..", ".wh...", "a/.wh..."] {
        let archive = Tar::default().file(bad, b"").end();
        assert!(refused(&archive).contains("whiteout"), "{bad}");
    }
}

#[test]
fn sparse_files_of_all_formats_have_their_holes() {
    let mut contents = vec![0u8; 1 << 20];
    contents[5000..5004].copy_from_slice(b"body");
    contents[900_000..900_003].copy_from_slice(b"end");
    let map = "2\n5000\n4\n900000\n3\n";
    let mut in_data = map.as_bytes().to_vec();
    in_data.resize(512, 0);
    in_data.extend(b"bodyend");
    let size = "1048576";
    let layer = unpacked(
        &Tar::default()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"pax-1.0"),
                ("GNU.sparse.realsize", size.as_bytes()),
            ])
            .file("GNUSparseFile.1/pax-1.0", &in_data)
            .pax(&[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.numblocks", b"2"),
                ("GNU.sparse.map", b"5000,4,900000,3"),
            ])
            .file("pax-0.1", b"bodyend")
            .pax(&[
                ("GNU.sparse.size", size.as_bytes()),
                ("GNU.sparse.offset", b"5000"),
                ("GNU.sparse.numbytes", b"4"),
                ("GNU.sparse.offset", b"900000"),
                ("GNU.sparse.numbytes", b"3"),
            ])
            .file("pax-0.0", b"bodyend")
            .header(b"gnu", b'S', 7, |block| {
                block[257..265].copy_from_slice(b"ustar  \0");
                block[386..398].copy_from_slice(b"00000011610\0");
                block[398..410].copy_from_slice(b"00000000004\0");
                block[410..422].copy_from_slice(b"00003335640\0");
                block[422..434].copy_from_slice(b"00000000003\0");
                block[483..495].copy_from_slice(b"00004000000\0");
            })
            .data(b"bodyend")
            .file("after", b"still in step")
            .end(),
    );
    for name in ["pax-1.0", "pax-0.1", "pax-0.0", "gnu"] {
        assert!(layer.contents(name) == contents, "{name}");
    }
    assert_eq!(layer.contents("after"), b"still in step");
}

#[test]
fn holes_take_no_room() {
    use std::os::unix::fs::MetadataExt;
    let archive = Tar::default()
        .pax(&[
            ("GNU.sparse.size", b"10737418240"),
            ("GNU.sparse.map", b"10737418239,1"),
        ])
        .file("huge", b"x")
        .end();
    let directory = tempfile::tempdir().unwrap();
    unpack_into(&archive[..], directory.path(), &limits()).unwrap();
    let data = std::fs::metadata(directory.path().join("data")).unwrap();
    assert_eq!(data.len(), 10_737_418_240);
    assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
}

#[test]
fn what_leaves_the_root_is_refused() {
    for path in ["../a", "a/../../b", "/../etc/passwd", ".."] {
        assert!(
            refused(&Tar::default().file(path, b"").end()).contains("leaves the root"),
            "{path}"
        );
        let archive = Tar::default().link("l", b'1', path).end();
        assert!(
            refused(&archive).contains("leaves the root"),
            "hard link to {path}"
        );
    }
    // Where a symbolic link points is the guest's business; nothing is followed here.
    let layer = unpacked(
        &Tar::default()
            .link("l", b'2', "../../../etc/passwd")
            .file("/abs", b"")
            .end(),
    );
    assert_eq!(layer.entries[1].path, b"abs");
}

#[test]
fn nonsense_is_refused_and_says_what() {
    let over = "a".repeat(256);
    let huge = |path: &str, flag, size: &[u8; 12]| {
        let size = *size;
        Tar::default()
            .header(path.as_bytes(), flag, 0, move |b| {
                b[124..136].copy_from_slice(&size)
            })
            .end()
    };
    for (archive, expected) in [
        (Tar::default().header(b"", b'0', 0, |_| {}).end(), "root"),
        (Tar::default().link(".", b'2', "x").end(), "root"),
        (Tar::default().link("a", b'2', "").end(), "nothing"),
        (Tar::default().link("a", b'1', "./a").end(), "itself"),
        (
            Tar::default().header(b"a", b'Z', 0, |_| {}).end(),
            "unknown type",
        ),
        (
            Tar::default()
                .pax(&[("path", over.as_bytes())])
                .file("a", b"")
                .end(),
            "name too long",
        ),
        (
            Tar::default()
                .pax(&[("path", "b/".repeat(3000).as_bytes())])
                .file("a", b"")
                .end(),
            "too long",
        ),
        (
            Tar::default()
                .pax(&[("path", b"a\0b")])
                .file("a", b"")
                .end(),
            "zero byte",
        ),
        (
            Tar::default()
                .pax(&[("uid", b"4294967295")])
                .file("a", b"")
                .end(),
            "owner",
        ),
        (
            Tar::default()
                .pax(&[("size", b"9223372036854775807")])
                .file("a", b"")
                .end(),
            "larger than any",
        ),
        (
            Tar::default()
                .pax(&[("SCHILY.xattr.user.x", &[0; 70_000])])
                .file("a", b"")
                .end(),
            "attribute",
        ),
        (
            Tar::default().header(b"a", b'0', 1100, |_| {}).end(),
            "ends within",
        ),
        (
            Tar::default().file("a", b"b").bytes[..700].to_vec(),
            "ends within",
        ),
        (
            Tar::default().file("a", b"").bytes[..300].to_vec(),
            "ends within a header",
        ),
        (Tar::default().pax(&[]).end(), "after an extended header"),
        (
            huge("a", b'0', b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"),
            "larger than any",
        ),
        (
            huge(
                "a",
                b'0',
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            ),
            "negative",
        ),
        (huge("a", b'L', b"77777777777\0"), "extended header of"),
        (
            Tar::default()
                .header(b"d", b'4', 0, |b| b[329..337].copy_from_slice(b"7777777\0"))
                .end(),
            "impossible numbers",
        ),
        (
            Tar::default()
                .pax(&[("GNU.sparse.size", b"10"), ("GNU.sparse.map", b"5,3,4,3")])
                .file("a", b"123456")
                .end(),
            "map that does not fit",
        ),
        (
            Tar::default()
                .pax(&[
                    ("GNU.sparse.size", b"10"),
                    ("GNU.sparse.map", b"18446744073709551615,3"),
                ])
                .file("a", b"123")
                .end(),
            "map that does not fit",
        ),
        (
            Tar::default()
                .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"10")])
                .file("a", b"99999999999\n")
                .end(),
            "cut off",
        ),
        (
            [
                Tar::default().file("a", b"").bytes,
                vec![0; 512],
                vec![1; 512],
            ]
            .concat(),
            "end mark",
        ),
        (vec![b'x'; 512], "not a number"),
    ] {
        let reason = refused(&archive);
        assert!(
            reason.contains(expected),
            "wanted {expected:?}, got {reason:?}"
        );
    }
    let mut chain = Tar::default();
    for _ in 0..8 {
        chain = chain.pax(&[("comment", &[b'x'; 900_000])]);
    }
    assert!(refused(&chain.file("a", b"").end()).contains("too long"));
}

#[test]
fn bombs_meet_their_limits() {
    let few = UnpackLimits {
        max_unpacked_bytes: 1 << 20,
        max_entries: 10,
        ..limits()
    };
    let too_large = |archive: &[u8], limits: &UnpackLimits| match try_unpack(archive, limits) {
        Err(Failure::TooLarge { unit, .. }) => unit.as_str(),
        other => panic!("{:?}", other.err()),
    };
    let sparse = Tar::default()
        .pax(&[
            ("GNU.sparse.size", b"1125899906842624"),
            ("GNU.sparse.map", b""),
        ])
        .end();
    assert!(try_unpack(&sparse, &few).is_err());
    let sparse = Tar::default()
        .pax(&[
            ("GNU.sparse.size", b"1125899906842624"),
            ("GNU.sparse.map", b"0,1"),
        ])
        .file("a", b"x")
        .end();
    assert_eq!(too_large(&sparse, &few), "bytes");
    assert_eq!(
        too_large(&Tar::default().file("a", &[0; 2 << 20]).end(), &few),
        "bytes"
    );
    let mut many = Tar::default();
    for number in 0..11 {
        many = many.file(&number.to_string(), b"");
    }
    assert_eq!(too_large(&many.end(), &few), "entries");
    let fat = Tar::default()
        .pax(&[("SCHILY.xattr.user.x", &[0; 60_000])])
        .file("a", b"")
        .end();
    let small = UnpackLimits {
        max_tree_bytes: 10_000,
        ..limits()
    };
    assert_eq!(too_large(&fat, &small), "bytes of names and attributes");
    let little = UnpackLimits {
        tree_memory: 10_000,
        ..limits()
    };
    let memory = "bytes of memory for its entries";
    assert_eq!(too_large(&fat, &little), memory);
    let deep = Tar::default().file(&"d/".repeat(45), b"").end();
    assert_eq!(too_large(&deep, &little), memory);
    let map = vec!["0,0"; 70_000].join(",");
    let pieces = Tar::default()
        .pax(&[
            ("GNU.sparse.size", b"1"),
            ("GNU.sparse.map", map.as_bytes()),
        ])
        .file("a", b"");
    assert!(refused(&pieces.end()).contains("too long"));
}

/// An archive with something of everything, for damage.
fn rich_archive() -> Vec<u8> {
    Tar::default()
        .file("dir/file", &[1; 700])
        .pax(&[
            ("path", b"long/name"),
            ("mtime", b"12.5"),
            ("SCHILY.xattr.user.a", b"v"),
        ])
        .file("x", b"y")
        .link("dir/hard", b'1', "dir/file")
        .link("soft", b'2', "../../out")
        .header(b"././@LongLink", b'L', 20, |_| {})
        .data(b"another/long/name/x\0")
        .file("cut", b"")
        .pax(&[
            ("GNU.sparse.size", b"9000"),
            ("GNU.sparse.map", b"10,2,8000,3"),
        ])
        .file("sparse", b"abcde")
        .file("dir/.wh.gone", b"")
        .file("dir/.wh..wh..opq", b"")
        .end()
}

/// The stream that a layer's recipe makes.
fn remade(directory: &Path) -> io::Result<Vec<u8>> {
    let mut stream = Vec::new();
    let mut file = File::open(directory.join("recipe"))?;
    let length = recipe::announced_length(&mut file)?;
    file.rewind()?;
    let data = File::open(directory.join("data"))?;
    recipe::Remade::new(file, data)?.read_to_end(&mut stream)?;
    // Who exports compares what is announced with what comes.
    if length == stream.len() as u64 {
        Ok(stream)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[test]
fn a_recipe_makes_the_stream_again_to_the_last_byte() {
    let sparse_1_0 = Tar::default()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.realsize", b"9000"),
        ])
        .file(
            "holes",
            &[&b"2\n10\n2\n8000\n3\n"[..], &[0; 498], b"abcde"].concat(),
        );
    let odd = Tar::default()
        .file("dir/.wh.gone", b"contents that nobody keeps")
        .file(".wh..wh.plnk/x", &[3; 5000])
        .header(b"end", b'0', 5, |_| {})
        .bytes;
    for archive in [
        rich_archive(),
        sparse_1_0.end(),
        // Padding and what follows the end may be anything.
        [&odd[..], b"tail\0", &[0xff; 507], &[0; 1024], &[7; 100_000]].concat(),
        // Without an end mark.
        Tar::default().file("big", &[9; 300_000]).bytes,
        Vec::new(),
    ] {
        let directory = tempfile::tempdir().unwrap();
        unpack_into(&archive[..], directory.path(), &limits()).unwrap();
        assert!(remade(directory.path()).unwrap() == archive);
    }
}

#[test]
fn a_recipe_does_not_hold_what_the_data_has() {
    let noise: Vec<u8> = (0..1u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let archive = Tar::default().file("a", &noise).file("b", &noise).end();
    let directory = tempfile::tempdir().unwrap();
    unpack_into(&archive[..], directory.path(), &limits()).unwrap();
    let recipe = std::fs::metadata(directory.path().join("recipe")).unwrap();
    assert!(recipe.len() < 1000, "{}", recipe.len());
    assert!(remade(directory.path()).unwrap() == archive);
}

#[test]
fn a_damaged_recipe_never_makes_another_stream() {
    let archive = rich_archive();
    let directory = tempfile::tempdir().unwrap();
    unpack_into(&archive[..], directory.path(), &limits()).unwrap();
    let path = directory.path().join("recipe");
    let good = std::fs::read(&path).unwrap();
    let mut seen = 0;
    for position in 0..good.len() {
        let mut damaged = good.clone();
        damaged[position] ^= 0x10;
        std::fs::write(&path, &damaged).unwrap();
        match remade(directory.path()) {
            Ok(stream) => assert!(stream == archive, "byte {position}"),
            Err(_) => seen += 1,
        }
        std::fs::write(&path, &good[..position]).unwrap();
        let cut = remade(directory.path());
        assert!(cut.is_err(), "cut at {position}");
    }
    // Some bits of zstd's own mean nothing.
    assert!(seen * 10 > good.len() * 9, "{seen} of {}", good.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Damaged archives are unpacked or refused, and what is unpacked is a tree that can be merged
    /// and written or is refused there: never a panic, never a path outside, never a huge result.
    #[test]
    fn damage_never_gets_through(
        damage in prop::collection::vec((0usize..12_000, any::<u8>()), 1..6),
        cut in 0usize..12_000,
        fix_sums in any::<bool>(),
    ) {
        let mut archive = rich_archive();
        for (position, byte) in damage {
            let position = position % archive.len();
            archive[position] = byte;
        }
        if fix_sums {
            for block in archive.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        if cut > 6000 {
            archive.truncate(cut % archive.len());
        }
        let limits = UnpackLimits { max_unpacked_bytes: 1 << 30, ..limits() };
        match try_unpack_to_entries(&archive, &limits) {
            Err(Failure::Invalid(_) | Failure::TooLarge { .. }) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
            Ok((entries, data_length)) => {
                for entry in &entries {
                    let bad = |name: &[u8]| matches!(name, b"" | b"." | b"..") || name.contains(&0);
                    let root = entry.path.is_empty();
                    prop_assert!(root || !entry.path.split(|b| *b == b'/').any(bad));
                    if let EntryKind::File { size, offset } = entry.kind {
                        prop_assert!(offset + size <= data_length);
                    }
                }
                let mut merger = crate::merge::Merger::new(1000, u64::MAX);
                if merger.apply(entries).is_ok() {
                    let tree = merger.finish();
                    crate::erofs::write(io::sink(), &tree, &[data_length], [0; 16]).unwrap();
                }
            }
        }
    }

    /// Noise after each kind of compression mark is refused.
    #[test]
    fn noise_is_refused(mark in 0usize..4, mut noise in prop::collection::vec(any::<u8>(), 16..3000)) {
        let marks: [&[u8]; 4] = [&[0x1f, 0x8b, 8, 0], &[0x28, 0xb5, 0x2f, 0xfd], &[0x50, 0x2a, 0x4d, 0x18], &[]];
        noise[..marks[mark].len()].copy_from_slice(marks[mark]);
        let error = try_unpack_to_entries(&noise, &limits());
        prop_assert!(matches!(error, Err(Failure::Invalid(_) | Failure::TooLarge { .. })), "{:?}", error.is_ok());
    }
}

fn try_unpack_to_entries(
    archive: &[u8],
    limits: &UnpackLimits,
) -> Result<(Vec<Entry>, u64), Failure> {
    let directory = tempfile::tempdir().unwrap();
    unpack_into(archive, directory.path(), limits)?;
    assert!(remade(directory.path()).unwrap() == archive);
    let length = std::fs::metadata(directory.path().join("data"))
        .unwrap()
        .len();
    Ok((
        tree::all(File::open(directory.path().join("tree")).unwrap()).unwrap(),
        length,
    ))
}
