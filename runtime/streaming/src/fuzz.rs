//! Fuzz targets: bytes of a client, before and after it has shown a token. `make fuzz` runs them
//! (tests/fuzz), and the test below over kept inputs.

use std::{future::ready, sync::Arc, time::Duration};

use arbitrary::{Result, Unstructured};
use async_trait::async_trait;
use bytes::BytesMut;
use hull_spdy::{Encoder, Frame, Headers};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex, empty, join, sink},
    runtime::{Builder, Runtime},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    backend::{
        AttachRequest, Backend, BackendError, Duplex, ExecRequest, Exit, PortForwardRequest,
        Process,
    },
    config::Config,
    request::{Command, Request},
    server::serve,
    shared::Shared,
    strangers::Strangers,
    tokens::Tokens,
};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("streaming-http", http),
    ("streaming-spdy", spdy),
    ("streaming-websocket", websocket),
];

/// In place of the token in a request.
const TOKEN: &[u8] = b"TOKEN";
/// How long what is left of a client may last once it is gone.
const END: Duration = Duration::from_secs(20);
/// What a connection holds between client and server.
const PIPE: usize = 64 << 10;
const STREAMS: [&str; 6] = ["stdin", "stdout", "stderr", "error", "resize", "data"];

/// A request, in which `TOKEN` is replaced by one that is good, and whatever follows it. Only who has a token
/// gets an upgrade.
pub fn http(input: &[u8]) {
    let place = input
        .windows(TOKEN.len())
        .position(|window| window == TOKEN);
    let answer = talk(input.len(), |token| match place {
        None => input.to_vec(),
        Some(at) => [&input[..at], token.as_bytes(), &input[at + TOKEN.len()..]].concat(),
    });
    // As old as the request.
    let mut versions = [&b"HTTP/1.1 "[..], b"HTTP/1.0 "].into_iter();
    let status = versions.find_map(|version| answer.strip_prefix(version));
    let upgraded = status.is_some_and(|status| status.starts_with(b"101 "));
    let refused = status.is_some_and(|status| status.starts_with(b"4"));
    assert!(answer.is_empty() || upgraded || refused, "{answer:?}");
    assert!(!upgraded || place.is_some(), "an upgrade without a token");
}

/// A SPDY connection of a client with a token: frames, or any bytes.
pub fn spdy(input: &[u8]) {
    let Ok((kind, wire)) = frames(&mut Unstructured::new(input)) else {
        return;
    };
    let protocol = if kind % KINDS == FORWARD {
        "portforward.k8s.io"
    } else {
        "v4.channel.k8s.io"
    };
    talk(kind, |token| {
        let head = format!(
            "POST /{}/{token} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             X-Stream-Protocol-Version: {protocol}\r\n\r\n",
            VERBS[kind % KINDS]
        );
        [head.as_bytes(), &wire].concat()
    });
}

/// A WebSocket of a client with a token: messages, or any bytes.
pub fn websocket(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok((kind, protocol, wire)) = messages(&mut input) else {
        return;
    };
    talk(kind, |token| {
        let head = format!(
            "GET /{}/{token} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\
             Sec-WebSocket-Protocol: {protocol}\r\n\r\n",
            VERBS[kind % KINDS]
        );
        [head.as_bytes(), &wire].concat()
    });
}

const KINDS: usize = 3;
const FORWARD: usize = 2;
const VERBS: [&str; KINDS] = ["exec", "attach", "portforward"];

/// What a token is for.
fn wanted(kind: usize) -> Request {
    match kind % KINDS {
        0 => Request::Command(Command::Exec(ExecRequest {
            container_id: "c".into(),
            cmd: vec!["sh".into()],
            tty: true,
            stdin: true,
            stdout: true,
            stderr: false,
        })),
        1 => Request::Command(Command::Attach(AttachRequest {
            container_id: "c".into(),
            tty: false,
            stdin: true,
            stdout: true,
            stderr: true,
        })),
        _ => Request::PortForward(PortForwardRequest {
            pod_sandbox_id: "p".into(),
            ports: vec![80, 81],
        }),
    }
}

/// Serves a client that sends what `bytes` makes of its token, reads all that comes and hangs up. Returns the
/// answer; nothing of the client is left then.
fn talk(kind: usize, bytes: impl FnOnce(&str) -> Vec<u8>) -> Vec<u8> {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(session(kind, bytes)))
}

async fn session(kind: usize, bytes: impl FnOnce(&str) -> Vec<u8>) -> Vec<u8> {
    let config = Config::default();
    let stop = CancellationToken::new();
    let shared = Arc::new(Shared {
        tokens: Tokens::new(1, config.token_ttl),
        connections: Arc::new(Semaphore::new(1)),
        config,
        backend: Arc::new(Echo),
        tasks: TaskTracker::new(),
        stop: stop.clone(),
    });
    let token = shared.tokens.put(wanted(kind)).expect("a token");
    let bytes = bytes(&token);
    let stranger = Arc::new(Strangers::new(1).admit());
    let (mut client, server) = duplex(PIPE);
    shared
        .tasks
        .spawn(serve(server, Arc::clone(&shared), stranger));
    // It may be hung up on at any time.
    let _ = timeout(END, client.write_all(&bytes))
        .await
        .expect("the server reads or hangs up");
    let mut answer = Vec::new();
    let mut chunk = vec![0; 4096];
    // What is there already, and no more.
    while let Ok(Ok(count)) = timeout(Duration::ZERO, client.read(&mut chunk)).await {
        answer.extend_from_slice(&chunk[..count]);
        if count == 0 {
            break;
        }
        tokio::task::yield_now().await;
    }
    drop(client);
    shared.tasks.close();
    timeout(END, shared.tasks.wait())
        .await
        .expect("a session ends with its client");
    drop(stop);
    answer
}

/// A runtime whose processes say something and end with their input.
struct Echo;

fn process() -> Process {
    let (resize, _sizes) = mpsc::channel(1);
    Process {
        stdin: Some(Box::new(sink())),
        stdout: Some(Box::new(&b"hello"[..])),
        stderr: Some(Box::new(empty())),
        resize: Some(resize),
        exit: Box::pin(ready(Ok(Exit::Code(3)))),
    }
}

#[async_trait]
impl Backend for Echo {
    async fn exec(&self, _: ExecRequest) -> std::result::Result<Process, BackendError> {
        Ok(process())
    }

    async fn attach(&self, _: AttachRequest) -> std::result::Result<Process, BackendError> {
        Ok(process())
    }

    async fn dial(&self, _: &str, port: u16) -> std::result::Result<Box<dyn Duplex>, BackendError> {
        match port {
            9 => Err(BackendError::new("refused")),
            _ => Ok(Box::new(join(&b"hello"[..], sink()))),
        }
    }
}

/// Bytes from the input, at most `most`.
fn some_bytes(input: &mut Unstructured<'_>, most: usize) -> Result<Vec<u8>> {
    let length = input.int_in_range(0..=most)?;
    Ok(input.bytes(length.min(input.len()))?.to_vec())
}

fn frames(input: &mut Unstructured<'_>) -> Result<(usize, Vec<u8>)> {
    let kind = input.choose_index(KINDS)?;
    let (mut encoder, mut wire) = (Encoder::new(), BytesMut::new());
    let mut next = 1;
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let stream = match input.int_in_range(0..=3)? {
            0 => input.arbitrary::<u32>()? & hull_spdy::MAX_STREAM,
            back => {
                (next + 2_u32).saturating_sub(2 * u32::from(back as u8)) & hull_spdy::MAX_STREAM
            }
        };
        let fin = input.int_in_range(0..=3)? == 0;
        let frame = match input.int_in_range(0..=9)? {
            0..=2 => {
                let mut headers = vec![("streamtype".into(), (*input.choose(&STREAMS)?).into())];
                if input.arbitrary()? {
                    headers.push(("port".into(), input.int_in_range(0..=99)?.to_string()));
                    headers.push(("requestid".into(), input.int_in_range(0..=3)?.to_string()));
                }
                if input.int_in_range(0..=7)? == 0 {
                    let text = String::from_utf8_lossy(&some_bytes(input, 20)?).into_owned();
                    headers.push((text.to_ascii_lowercase(), text));
                }
                next += 2;
                Frame::SynStream {
                    stream: next - 2,
                    associated: 0,
                    priority: 0,
                    headers: Headers(headers),
                    fin,
                    unidirectional: input.int_in_range(0..=7)? == 0,
                }
            }
            3..=5 => Frame::Data {
                stream,
                payload: some_bytes(input, 60)?.into(),
                fin,
            },
            6 => Frame::RstStream {
                stream,
                status: input.arbitrary()?,
            },
            7 => Frame::Ping(input.arbitrary()?),
            8 => Frame::Headers {
                stream,
                headers: Headers::default(),
                fin,
            },
            _ => {
                wire.extend(some_bytes(input, 40)?);
                continue;
            }
        };
        // Not all that can be asked for can be written.
        let _ = encoder.encode(&frame, &mut wire);
    }
    Ok((kind, wire.to_vec()))
}

fn messages(input: &mut Unstructured<'_>) -> Result<(usize, &'static str, Vec<u8>)> {
    let kind = input.choose_index(KINDS)?;
    let protocols = [
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "channel.k8s.io",
        "base64.channel.k8s.io",
        "SPDY/3.1+portforward.k8s.io",
    ];
    let protocol = *input.choose(&protocols)?;
    let mut wire = Vec::new();
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        if input.int_in_range(0..=9)? == 0 {
            wire.extend(some_bytes(input, 40)?);
            continue;
        }
        // Final or not; a continuation, text, bytes, close, ping, pong.
        let opcodes = [0x82, 0x82, 0x81, 0x80, 0x02, 0x00, 0x88, 0x89, 0x8a];
        let opcode = *input.choose(&opcodes)?;
        let mut payload = some_bytes(input, 60)?;
        if input.arbitrary()? {
            payload.insert(0, *input.choose(&[0, 1, 2, 3, 4, 255, b'0', b'1', b'4'])?);
        }
        wire.push(opcode);
        wire.push(0x80 | payload.len() as u8);
        // A mask of zeros.
        wire.extend([0; 4]);
        wire.extend(payload);
    }
    Ok((kind, protocol, wire))
}

#[test]
fn bytes_of_a_client_do_no_harm() {
    hull_corpus::replay(TARGETS);
}
