//! Entry points for fuzzing: bytes that a hostile guest or VMM may send, and this crate's code that reads
//! them. `make fuzz` runs them (tests/fuzz), and the tests of this crate do.

use std::{collections::HashSet, time::Duration};

use futures::FutureExt;
use hull_proto_agent::{
    agent::{Event, EventsRequest, StatsResponse},
    rpc::AgentClient,
    stream::{ChunkDecoder, StreamHeader, StreamKind, StreamReply},
};
use hull_proto_vmm::Response;
use protobuf::Message;
use tokio::{
    io::{AsyncWriteExt, duplex, join, sink, split},
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::timeout,
};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::Context,
    proto::MessageHeader,
};

use hull_base::printable::printable;
use hull_spec::stats::Usage;

use crate::{
    agent::{
        client::ask,
        connect,
        error::GuestError,
        events::{self, GuestEvent},
        fault::Fault,
        stats::{Answer, Bounds},
        stdio,
        wire::{EventStream, Wire},
    },
    client,
};

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("agent-stats", stats),
    ("agent-events", events),
    ("agent-streams", streams),
    ("agent-wire", wire),
    ("vmm-answers", vmm),
];

/// Longest text that is kept, in bytes.
const TEXT_MAX: usize = 2048;
/// How long a call may last.
const LIMIT: Duration = Duration::from_millis(20);
/// How many bytes of an output are read at a time.
const READ: usize = 8193;

/// The agent's answer about what is used.
pub fn stats(input: &[u8]) {
    let Ok(response) = StatsResponse::parse_from_bytes(input) else {
        return;
    };
    let bounds = Bounds {
        now_ns: i64::MAX,
        cpu_ns: 1 << 50,
        memory_bytes: 1 << 30,
        disk_bytes: 1 << 40,
    };
    let told = response.containers.iter().take(3);
    let ids: Vec<String> = told.map(|told| told.container_id.clone()).collect();
    let known: HashSet<&str> = ids.iter().map(String::as_str).collect();
    let answer = Answer::checked(response, &known, &bounds);
    assert!(answer.containers.len() <= known.len());
    let fits = |usage: &Usage| {
        assert!(usage.cpu.usage_ns <= bounds.cpu_ns);
        assert!(usage.memory.usage_bytes <= bounds.memory_bytes);
        let written = usage.io.iter().map(|io| io.write_bytes.min(1 << 40));
        assert!(usage.io.len() <= 64 && written.sum::<u64>() < u64::MAX);
        assert!(usage.io.iter().all(|io| is_tame(&io.device)));
    };
    fits(&answer.guest.usage);
    for told in answer.containers.values() {
        fits(&told.usage);
        assert!(
            told.writable
                .is_none_or(|disk| disk.used_bytes <= bounds.disk_bytes)
        );
    }
}

/// Events: a length of one byte before each.
pub fn events(mut input: &[u8]) {
    let (sender, mut receiver) = mpsc::channel(16);
    let mut progress = events::Progress::default();
    while let Some((&length, rest)) = input.split_first() {
        let (event, rest) = rest.split_at(rest.len().min(length.into()));
        input = rest;
        let Ok(event) = Event::parse_from_bytes(event) else {
            continue;
        };
        let before = progress.seen;
        if let Err(error) = events::deliver(event, &mut progress, &sender) {
            assert!(is_tame(&error.to_string()));
        }
        assert!(progress.seen >= before);
    }
    while let Ok(event) = receiver.try_recv() {
        let GuestEvent::Exited(exit) = event else {
            panic!("{event:?}");
        };
        assert!((0..256).contains(&exit.code));
        assert!(exit.container.len() <= 128 && exit.exec.len() <= 128);
    }
}

/// A stream of output: the VMM's line, the agent's reply, then chunks.
pub fn streams(mut input: &[u8]) {
    // A slice and a sink never have anybody wait.
    if !matches!(connect::accepted(&mut input).now_or_never(), Some(Ok(()))) {
        return;
    }
    let header = StreamHeader {
        kind: StreamKind::Stdout,
        container: "c".into(),
        exec: String::new(),
        offset: 0,
    };
    let mut stream = join(&mut input, sink());
    let reply = stdio::exchange(&mut stream, &header).now_or_never();
    let offset = match reply {
        Some(Ok(StreamReply::Ok { offset })) => offset,
        Some(Ok(StreamReply::Error { message })) => {
            assert!(is_tame(&printable(&message, TEXT_MAX)));
            return;
        }
        _ => return,
    };
    for (received, safe) in [(0, 0), (9, 5), (u64::MAX, 7), (u64::MAX, u64::MAX)] {
        let known = stdio::known(offset, received, safe);
        assert_eq!(known.is_some(), offset <= safe);
        assert!(known.is_none_or(|known| known <= received));
    }
    let mut decoder = ChunkDecoder::default();
    for read in input.chunks(READ) {
        let (mut read, had_ended) = (read.to_vec(), decoder.has_ended());
        let Ok(length) = decoder.decode(&mut read) else {
            break;
        };
        assert!(!had_ended && length <= read.len());
    }
}

/// Messages of an agent while it is asked: a byte each for the type, the stream, the flags and the length, and so
/// many bytes; a length of 255 is announced as the longest. No event that is long comes through, and what is
/// shown of a refusal is tame. Nothing more is read once as many events wait as may, also of a stream that is
/// none, so calls end when their time is over at the latest.
pub fn wire(input: &[u8]) {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(asked(messages(input))));
}

fn messages(mut input: &[u8]) -> Vec<u8> {
    let mut messages = Vec::new();
    while let Some((&[type_, stream, flags, length], rest)) = input.split_first_chunk() {
        let (body, rest) = rest.split_at(rest.len().min(length.into()));
        input = rest;
        let header = MessageHeader {
            length: if length == u8::MAX {
                u32::MAX
            } else {
                body.len() as u32
            },
            stream_id: stream.into(),
            type_,
            flags,
        };
        messages.extend(Vec::from(header));
        messages.extend(body);
    }
    messages
}

/// Asks an agent that says these bytes, whatever it is asked.
async fn asked(bytes: Vec<u8>) {
    let (ours, theirs) = duplex(4096);
    let fault = Fault::default();
    let (ours, window) = Wire::new(ours, fault.clone());
    let client = AgentClient::new(Client::new(Socket::new(ours)));
    let (mut requests, mut answers) = split(theirs);
    tokio::spawn(async move { tokio::io::copy(&mut requests, &mut sink()).await });
    let say = timeout(LIMIT, async {
        // It may be hung up on at any time.
        let _ = answers.write_all(&bytes).await;
        let _ = answers.shutdown().await;
    });
    let (hello, stats, create) = Default::default();
    let follow = async {
        let asked = EventsRequest::default();
        let Ok(events) = client.events(Context::default(), &asked).await else {
            return;
        };
        let mut events = EventStream::new(events, window);
        while let Ok(Ok(Some(event))) = timeout(LIMIT, events.recv()).await {
            assert!(event.compute_size() <= 1 << 10);
        }
    };
    let refused = |error: Option<GuestError>| {
        if let Some(GuestError::Refused { message, .. } | GuestError::NotExecuted { message, .. }) =
            error
        {
            assert!(is_tame(&message));
        }
    };
    let call = "ask";
    tokio::join!(
        async {
            refused(
                ask(
                    call,
                    LIMIT,
                    &hello,
                    client.hello(Context::default(), &hello),
                )
                .await
                .err(),
            )
        },
        async {
            refused(
                ask(
                    call,
                    LIMIT,
                    &stats,
                    client.stats(Context::default(), &stats),
                )
                .await
                .err(),
            )
        },
        async {
            refused(
                ask(
                    call,
                    LIMIT,
                    &create,
                    client.create(Context::default(), &create),
                )
                .await
                .err(),
            )
        },
        follow,
        async { drop(say.await) },
    );
    if let Some(reason) = fault.told().now_or_never() {
        assert!(is_tame(&reason));
    }
}

/// What a VMM sends: an answer on its control socket, or its exit report.
pub fn vmm(input: &[u8]) {
    if let Some(words) = client::last_words(input) {
        assert!(is_tame(&words));
    }
    let Some((prefix, body)) = input.split_first_chunk() else {
        return;
    };
    let Ok(length) = hull_proto_vmm::body_length(*prefix) else {
        return;
    };
    let body = &body[..body.len().min(length)];
    if let Ok(Response::Error { message, .. }) = hull_proto_vmm::decode(body) {
        assert!(is_tame(&client::clean(&message)));
    }
    let _ = hull_proto_vmm::decode::<hull_proto_vmm::fs::Response>(body);
}

fn is_tame(text: &str) -> bool {
    text.len() <= TEXT_MAX && !text.contains(|c: char| c.is_control() && c != '\n')
}

#[cfg(test)]
mod tests {
    use hull_proto_agent::{
        agent::{CgroupStats, ContainerStats, DeviceIo, Exited, FilesystemStats, event::Kind},
        stream::{self, END_OF_OUTPUT},
    };
    use hull_proto_vmm::{ErrorKind, ExitReason, ExitReport};
    use proptest::prelude::*;
    use protobuf::MessageField;

    use super::*;

    /// Bytes that are right but for a few.
    fn spoilt(right: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
        let at = 0..right.len().max(1);
        prop::collection::vec((at, any::<u8>()), 0..4).prop_map(move |changes| {
            let mut bytes = right.clone();
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            bytes
        })
    }

    fn used() -> Vec<u8> {
        let usage = CgroupStats {
            cpu_usage_ns: u64::MAX,
            memory_usage_bytes: u64::MAX,
            io: vec![
                DeviceIo {
                    device: "vda".into(),
                    write_bytes: u64::MAX,
                    ..DeviceIo::default()
                };
                70
            ],
            ..CgroupStats::default()
        };
        let disk = FilesystemStats {
            age_ms: u64::MAX,
            used_bytes: u64::MAX,
            ..FilesystemStats::default()
        };
        let response = StatsResponse {
            containers: vec![ContainerStats {
                container_id: "c".into(),
                cgroup: MessageField::some(usage.clone()),
                writable: MessageField::some(disk),
                ..ContainerStats::default()
            }],
            sandbox: MessageField::some(usage),
            ..StatsResponse::default()
        };
        response.write_to_bytes().unwrap()
    }

    fn ends() -> Vec<u8> {
        let ends = (1..4).map(|seq| {
            let exited = Exited {
                container_id: "c".into(),
                code: 7,
                at_ns: u64::MAX,
                stdout_bytes: u64::MAX,
                ..Exited::default()
            };
            let event = Event {
                seq,
                kind: Some(Kind::Exited(exited)),
                ..Event::default()
            };
            let bytes = event.write_to_bytes().unwrap();
            [vec![bytes.len() as u8], bytes].concat()
        });
        ends.collect::<Vec<_>>().concat()
    }

    fn stream() -> Vec<u8> {
        let reply = stream::encode(&StreamReply::Ok { offset: 7 }).unwrap();
        let output = stream::encode_chunk([b"hello\n", b"world"]).unwrap();
        let all = [b"OK 5000\n".as_slice(), &reply, &output, &END_OF_OUTPUT];
        all.concat()
    }

    fn answers() -> Vec<Vec<u8>> {
        let error = Response::Error {
            kind: ErrorKind::Internal,
            message: "no\u{1b} luck".into(),
        };
        let report = ExitReport {
            reason: ExitReason::VmmError,
            message: "no\u{1b} luck".into(),
        };
        let report = serde_json::to_vec(&report).unwrap();
        vec![hull_proto_vmm::encode(&error).unwrap(), report]
    }

    #[test]
    fn inputs_that_were_kept_do_no_harm() {
        hull_corpus::replay(TARGETS);
    }

    proptest! {
        #[test]
        fn bytes_of_a_guest_or_vmm_do_no_harm(
            noise in prop::collection::vec(any::<u8>(), 0..300),
            used in spoilt(used()),
            ends in spoilt(ends()),
            stream in spoilt(stream()),
            answer in prop::sample::select(answers()).prop_flat_map(spoilt),
        ) {
            for target in [stats, events, streams, vmm] {
                target(&noise);
            }
            stats(&used);
            events(&ends);
            streams(&stream);
            vmm(&answer);
        }
    }
}
