use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use super::*;
use crate::test_worker;

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        tar.append_data(&mut header, path, *contents).unwrap();
    }
    tar.into_inner().unwrap()
}

fn expected(stream: &[u8], plain: &[u8]) -> ExpectedLayer {
    ExpectedLayer {
        digest: Digest::of(stream),
        size: stream.len() as u64,
        diff_id: Digest::of(plain),
    }
}

/// A transfer of these chunks, and what keeps it wanted.
fn transfer(chunks: impl IntoIterator<Item = Chunk>) -> (Transfer, oneshot::Sender<Infallible>) {
    let (sender, receiver) = mpsc::channel(100_000);
    for chunk in chunks {
        sender.try_send(chunk).unwrap();
    }
    let (want, wanted) = oneshot::channel();
    let transfer = Transfer {
        chunks: receiver,
        wanted,
    };
    (transfer, want)
}

fn chunks(stream: &[u8], size: usize) -> impl Iterator<Item = Chunk> {
    let data = stream.chunks(size.max(1));
    data.map(|chunk| Chunk::Data(Bytes::copy_from_slice(chunk)))
        .chain([Chunk::End])
}

struct Unpacking {
    directory: tempfile::TempDir,
    config: StoreConfig,
}

impl Unpacking {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            config: test_worker::store(""),
        }
    }

    /// With a worker for this job that is a script; the others are honest.
    fn with_script(name: &str, script: &str) -> Self {
        let mut unpacking = Self::new();
        let honest = test_worker::program();
        let path = unpacking.directory.path().join("worker");
        let script = format!(
            "#!/bin/sh\ncase $2 in\n{name}) {script};;\n*) exec {} \"$@\";;\nesac\n",
            honest.display()
        );
        let mut file = File::create_new(&path).unwrap();
        file.write_all(script.as_bytes()).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o755))
            .unwrap();
        unpacking.config.workers.program = path;
        unpacking.config.workers.patience = Duration::from_secs(2);
        unpacking
    }

    fn run(&self, stream: &[u8], expected: &ExpectedLayer) -> Result<(), PullError> {
        let (transfer, _want) = transfer(chunks(stream, 100_000));
        let layer = tempfile::tempdir_in(&self.directory).unwrap();
        unpack(transfer, expected, layer.path(), &self.config)
    }
}

#[test]
fn compressed_streams_give_the_same_layer_however_they_come() {
    let plain = archive(&[("a", &[5; 100_000]), ("b", b"x")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    let unpacking = Unpacking::new();
    let mut seen = Vec::new();
    for (stream, size) in [(&plain, 4096), (&gzip, 1), (&zstd, 1), (&gzip, 1 << 20)] {
        let directory = tempfile::tempdir().unwrap();
        let (transfer, _want) = transfer(chunks(stream, size));
        let layer = expected(stream, &plain);
        unpack(transfer, &layer, directory.path(), &unpacking.config).unwrap();
        let files =
            ["data", "tree", "recipe"].map(|name| fs::read(directory.path().join(name)).unwrap());
        seen.push(files);
    }
    assert!(seen.windows(2).all(|two| two[0] == two[1]));
    let [data, ..] = &seen[0];
    assert_eq!(data.len(), 25 * 4096 + 4096);
    assert!(data.starts_with(&[5; 100_000]));
}

#[test]
fn digests_decide_who_is_at_fault() {
    let plain = archive(&[("a", b"x")]);
    let unpacking = Unpacking::new();
    let run =
        |stream: &[u8], expected: &ExpectedLayer| unpacking.run(stream, expected).unwrap_err();
    let good = expected(&plain, &plain);
    let mut damaged = plain.clone();
    damaged[3] ^= 1;
    let others = ExpectedLayer {
        diff_id: Digest::of(b"other"),
        ..good.clone()
    };
    for (stream, expected) in [
        (damaged, &good),
        (plain[..600].to_vec(), &good),
        ([&plain[..], b"more"].concat(), &good),
        (plain.clone(), &others),
    ] {
        let error = run(&stream, expected);
        assert!(
            matches!(error, PullError::DigestMismatch { .. }),
            "{error:?}"
        );
    }
    let noise = vec![0x1f, 0x8b, 8, 0, 1, 2, 3, 4];
    for noise in [noise, vec![7; 4000], vec![0x28, 0xb5, 0x2f, 0xfd, 9, 9]] {
        let error = run(&noise, &expected(&noise, &plain));
        assert!(matches!(error, PullError::CorruptLayer { .. }), "{error:?}");
    }
    let (transfer, _want) = transfer([]);
    let error = prove(transfer, &good, &unpacking.config).unwrap_err();
    assert!(error.to_string().contains("broke off"), "{error}");
}

#[test]
fn a_layer_that_is_there_is_only_read() {
    let plain = archive(&[("a", &[5; 100_000])]);
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    let config = Unpacking::new().config;
    for stream in [&plain, &zstd] {
        let (good, _want) = transfer(chunks(stream, 1000));
        prove(good, &expected(stream, &plain), &config).unwrap();
        let (bad, _want) = transfer(chunks(stream, 1000));
        let error = prove(bad, &expected(stream, b"other"), &config).unwrap_err();
        assert!(
            matches!(error, PullError::DigestMismatch { .. }),
            "{error:?}"
        );
    }
}

#[test]
fn a_stream_that_only_decompresses_to_padding_ends_at_its_limit() {
    let plain = [archive(&[]), vec![0; 4 << 20]].concat();
    let bomb = zstd::encode_all(&plain[..], 3).unwrap();
    let mut unpacking = Unpacking::new();
    unpacking.config.limits.max_unpacked_bytes = 1 << 20;
    unpacking.config.limits.max_entries = 10;
    let error = unpacking.run(&bomb, &expected(&bomb, &plain)).unwrap_err();
    assert!(
        matches!(error, PullError::TooLarge { unit: "bytes", .. }),
        "{error:?}"
    );
}

/// Answers as a worker that is done.
const DONE: &str = r"printf '\001\000\000\000\000' >&0";

#[test]
fn a_worker_that_lies_dies_floods_or_hangs_fails_its_layer_with_the_reason() {
    let plain = archive(&[("a", &noise(1 << 20))]);
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    let hangs = "did next to nothing for 2 s";
    for (script, of_inflate, of_unpack) in [
        // One that says that it has decompressed all leaves too short a stream.
        (
            DONE,
            "verify content of layer",
            "answered what can't be: that it has read all",
        ),
        (
            "exit 3",
            "ended without an answer, exit status: 3",
            "exit status: 3",
        ),
        ("sleep 1000", hangs, hangs),
        // What they say is only read when the stream has ended.
        ("exec cat /dev/zero >&0", hangs, hangs),
        (
            r"printf '\001\000\000\000' >&0; exec sleep 1000",
            hangs,
            hangs,
        ),
        (
            r"printf '\377\377\377\377' >&0",
            "answered what can't be: too much",
            "too much",
        ),
        (
            r"printf '\001\000\000\000\007' >&0",
            "answered what can't be: no answer",
            "no answer",
        ),
        (
            r"printf '\001\000\000\000\000\000' >&0",
            "more than an answer",
            "more than an answer",
        ),
    ] {
        for (name, reason) in [("inflate", of_inflate), ("unpack", of_unpack)] {
            let unpacking = Unpacking::with_script(name, script);
            let start = Instant::now();
            let error = unpacking.run(&zstd, &expected(&zstd, &plain)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("layer sha256:"), "{name}: {script}: {text}");
            assert!(text.contains(reason), "{name}: {script}: {text}");
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{name}: {script}"
            );
        }
    }
}

/// Bytes that do not compress.
fn noise(length: u32) -> Vec<u8> {
    let bytes = (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8);
    let mut state = 1u8;
    bytes
        .map(|byte| {
            state = state.wrapping_mul(77).wrapping_add(byte);
            state
        })
        .collect()
}

#[test]
fn a_layer_that_nobody_wants_any_more_is_given_up() {
    let plain = archive(&[("a", &noise(1 << 20))]);
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    // The worker takes nothing, so all is held up; or the transfer brings nothing.
    for (name, some) in [("inflate", zstd.len()), ("none", 3000)] {
        let mut unpacking = Unpacking::with_script(name, "sleep 1000");
        unpacking.config.workers.patience = Duration::from_secs(600);
        let start = Instant::now();
        let (mut transfer, want) = transfer(chunks(&zstd[..some], 1000).take(some / 1000));
        let (_more, none) = mpsc::channel(1);
        if name == "none" {
            transfer.chunks = none;
        }
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(500));
                drop(want);
            });
            let layer = expected(&zstd, &plain);
            let error = unpack(
                transfer,
                &layer,
                unpacking.directory.path(),
                &unpacking.config,
            );
            assert!(error.unwrap_err().to_string().contains("broke off"));
        });
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
