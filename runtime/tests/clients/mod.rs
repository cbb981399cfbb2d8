//! Clients of other kinds than tonic's.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    process::Command,
    time::Duration,
};

use super::Daemon;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
/// A message without fields: not compressed, of no bytes.
const EMPTY_MESSAGE: &[u8] = &[0; 5];
/// Three calls over one channel.
const PYTHON: &str = r#"
import sys, grpc
same = lambda message: message
channel = grpc.insecure_channel("unix:" + sys.argv[1])
for service in ("RuntimeService/Version", "ImageService/ListImages", "RuntimeService/Version"):
    call = channel.unary_unary("/runtime.v1." + service, request_serializer=same, response_deserializer=same)
    print(call(b"", timeout=30))
"#;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend_from_slice(&[kind, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The headers of a call of Version: POST, http, and literal fields.
fn call(authority: Option<&str>) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let path = "/runtime.v1.RuntimeService/Version";
    let fields = [
        (":path", path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let authority = authority.map(|value| (":authority", value));
    for (name, value) in authority.into_iter().chain(fields) {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// The kinds of frames that a call is answered with, and what they hold, until its stream ends.
fn answer(stream: &mut UnixStream, authority: Option<&str>) -> Vec<(u8, Vec<u8>)> {
    let mut sent = PREFACE.to_vec();
    sent.extend(frame(SETTINGS, 0, 0, &[]));
    sent.extend(frame(HEADERS, 4, 1, &call(authority)));
    sent.extend(frame(DATA, 1, 1, EMPTY_MESSAGE));
    stream.write_all(&sent).unwrap();
    let mut frames = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length.try_into().unwrap()];
        stream.read_exact(&mut payload).unwrap();
        if head[8] != 1 {
            continue;
        }
        let (kind, flags) = (head[3], head[4]);
        frames.push((kind, payload));
        if kind == RST_STREAM || flags & 1 != 0 {
            return frames;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_name_the_socket_as_the_authority_get_in() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let socket = daemon.dir.path().join("state/hull.sock");
    for authority in [
        Some("localhost"),
        None,
        Some(""),
        Some("/run/hull/hull.sock"),
        Some("%2Frun%2Fhull.sock"),
        Some("a b?"),
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).unwrap();
        let frames = answer(&mut stream, authority);
        let told = frames.iter().find(|(kind, _)| *kind == DATA);
        let (_, message) = told.unwrap_or_else(|| panic!("{authority:?}: {frames:?}"));
        assert!(
            message.windows(4).any(|part| part == b"hull"),
            "{authority:?}: {message:?}"
        );
    }

    let mut python = Command::new("python-grpcio");
    python.args(["-c", PYTHON]).arg(&socket);
    match python.output() {
        Ok(done) => {
            assert!(done.status.success(), "{done:?}");
            let told = String::from_utf8(done.stdout).unwrap();
            assert_eq!(told.matches("hull").count(), 2, "{told}");
        }
        Err(error) => println!("SKIPPED: grpcio: {error}; get it by: tests/host/install.sh grpcio"),
    }
}
