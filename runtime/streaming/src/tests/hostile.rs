//! Clients that mean no good, and those that stop in the middle.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use hull_spdy::{Decoder, Encoder, Frame, Headers};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::Message;

use super::{ALL, FULL, PATIENCE, Server, bytes, pattern, read_exactly, wait, within};
use crate::{
    Config,
    client::{self, Dialer},
    config::Limits,
};

/// Writes raw frames and reads the answers.
struct Raw {
    io: Box<dyn crate::Duplex>,
    encoder: Encoder,
    decoder: Decoder,
}

impl Raw {
    async fn open(url: &str, protocol: &str) -> Self {
        let (io, _) = Dialer::default().spdy(url, &[protocol]).await.unwrap();
        Self {
            io: Box::new(io),
            encoder: Encoder::new(),
            decoder: Decoder::new(),
        }
    }

    async fn send(&mut self, frame: Frame) {
        let mut wire = BytesMut::new();
        self.encoder.encode(&frame, &mut wire).unwrap();
        self.io.write_all(&wire).await.unwrap();
    }

    async fn syn(&mut self, stream: u32, headers: &[(&str, &str)], fin: bool) {
        self.send(Frame::SynStream {
            stream,
            associated: 0,
            priority: 0,
            headers: Headers::new(headers),
            fin,
            unidirectional: false,
        })
        .await;
    }

    /// The next frame; none when the server hung up.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.frame().unwrap() {
                return Some(frame);
            }
            let mut buffer = self.decoder.buffer();
            match within(self.io.read_buf(&mut buffer)).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    async fn next_where(&mut self, wanted: impl Fn(&Frame) -> bool) -> Frame {
        loop {
            let frame = self.next().await.expect("the frame comes");
            if wanted(&frame) {
                return frame;
            }
        }
    }
}

#[tokio::test]
async fn garbage_after_the_handshake_ends_the_session() {
    let server = Server::start().await;
    for seed in 0..50 {
        let url = server.exec(&["hang"], ALL);
        let mut raw = Raw::open(&url, "v4.channel.k8s.io").await;
        let mut garbage = pattern(5000);
        garbage.rotate_left(seed * 10);
        // A control frame, at least.
        garbage[0] |= 0x80;
        let _ = raw.io.write_all(&garbage).await;
        while raw.next().await.is_some() {}
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn garbage_on_some_stream_of_a_running_command_ends_it() {
    let server = Server::start().await;
    let url = server.exec(&["hang"], ALL);
    let mut raw = Raw::open(&url, "v4.channel.k8s.io").await;
    for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        raw.syn(stream, &[("streamtype", kind)], false).await;
    }
    wait("it runs", || server.memory.alive() == 1).await;
    raw.io
        .write_all(&[0x80, 9, 9, 9, 9, 9, 9, 9])
        .await
        .unwrap();
    server.assert_idle().await;
}

#[tokio::test]
async fn half_a_handshake_is_cut_off() {
    let server = Server::start_with(Config {
        handshake_timeout: Duration::from_millis(200),
        ..Config::default()
    })
    .await;
    for half in [
        "",
        "POST /exec/",
        "POST /exec/x HTTP/1.1\r\nHost: x\r\nConnection: Upg",
    ] {
        let mut stream = TcpStream::connect(server.streaming.address())
            .await
            .unwrap();
        stream.write_all(half.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let _ = within(stream.read_to_end(&mut rest)).await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn headers_without_end_are_refused() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.streaming.address())
        .await
        .unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let mut sent = 0;
    while stream
        .write_all(b"X-Header: value value value value\r\n")
        .await
        .is_ok()
    {
        sent += 1;
        assert!(sent < 1_000_000);
        tokio::task::yield_now().await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn streams_that_do_not_come_end_the_session() {
    let server = Server::start_with(Config {
        creation_timeout: Duration::from_millis(200),
        ..Config::default()
    })
    .await;
    let url = server.exec(&["hang"], ALL);
    let mut raw = Raw::open(&url, "v4.channel.k8s.io").await;
    raw.syn(1, &[("streamtype", "error")], false).await;
    raw.syn(3, &[("streamtype", "stdin")], false).await;
    raw.next_where(|frame| matches!(frame, Frame::GoAway { .. }))
        .await;
    assert_eq!(server.memory.alive(), 0);
    drop(raw);
    server.assert_idle().await;
}

#[tokio::test]
async fn streams_of_no_use_are_refused() {
    let server = Server::start().await;
    let url = server.exec(&["hang"], ALL);
    let mut raw = Raw::open(&url, "v4.channel.k8s.io").await;
    raw.syn(1, &[("streamtype", "error")], true).await;
    raw.syn(3, &[("streamtype", "nonsense")], false).await;
    raw.syn(5, &[("streamtype", "error")], false).await;
    raw.syn(7, &[], false).await;
    for refused in [3, 5, 7] {
        let frame = raw
            .next_where(|frame| matches!(frame, Frame::RstStream { .. }))
            .await;
        assert!(matches!(frame, Frame::RstStream { stream, .. } if stream == refused));
    }
    // Thousands more.
    for stream in (9..5009).step_by(2) {
        raw.syn(stream, &[("streamtype", "nonsense")], false).await;
        raw.next_where(|frame| matches!(frame, Frame::RstStream { .. }))
            .await;
    }
    drop(raw);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_stream_id_out_of_order_ends_the_session() {
    let server = Server::start().await;
    for ids in [[3, 3], [3, 1], [1, 4], [1, 0]] {
        let url = server.forward(&[]);
        let mut raw = Raw::open(&url, "portforward.k8s.io").await;
        for id in ids {
            raw.syn(id, &[("streamtype", "error"), ("port", "7")], false)
                .await;
        }
        while raw.next().await.is_some() {}
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn streams_opened_and_reset_without_end_leave_nothing() {
    let server = Server::start().await;
    let url = server.forward(&[]);
    let mut raw = Raw::open(&url, "portforward.k8s.io").await;
    let mut stream = 1;
    for n in 0..5000 {
        let request = n.to_string();
        let headers = [
            ("streamtype", "error"),
            ("port", "7"),
            ("requestid", &request),
        ];
        raw.syn(stream, &headers, false).await;
        raw.send(Frame::RstStream { stream, status: 5 }).await;
        // What was reset before it was answered has no answer.
        raw.send(Frame::Ping(stream)).await;
        raw.next_where(|frame| *frame == Frame::Ping(stream)).await;
        stream += 2;
    }
    drop(raw);
    server.assert_idle().await;
}

#[tokio::test]
async fn pings_are_sent_back_and_frames_without_meaning_ignored() {
    let server = Server::start().await;
    let url = server.forward(&[]);
    let mut raw = Raw::open(&url, "portforward.k8s.io").await;
    raw.send(Frame::Settings).await;
    raw.send(Frame::WindowUpdate {
        stream: 0,
        delta: 100,
    })
    .await;
    raw.send(Frame::Data {
        stream: 77,
        payload: bytes("nobody"),
        fin: true,
    })
    .await;
    raw.send(Frame::RstStream {
        stream: 99,
        status: 1,
    })
    .await;
    raw.send(Frame::Ping(41)).await;
    assert_eq!(raw.next().await, Some(Frame::Ping(41)));
    // An answer to a ping of ours, had we sent one.
    raw.send(Frame::Ping(2)).await;
    raw.send(Frame::Ping(43)).await;
    assert_eq!(raw.next().await, Some(Frame::Ping(43)));
}

#[tokio::test]
async fn pings_do_not_keep_a_session_alive() {
    let server = Server::start_with(Config {
        idle_timeout: Duration::from_millis(400),
        ..Config::default()
    })
    .await;
    let url = server.forward(&[]);
    let mut raw = Raw::open(&url, "portforward.k8s.io").await;
    let pinging = async {
        for id in (1..).step_by(2) {
            raw.send(Frame::Ping(id)).await;
            match raw.next().await {
                Some(Frame::Ping(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                _ => break,
            }
        }
    };
    tokio::time::timeout(PATIENCE, pinging).await.unwrap();
    drop(raw);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_frame_of_16_mib_needs_no_memory() {
    let server = Server::start().await;
    let url = server.exec(&["hang"], ALL);
    let mut raw = Raw::open(&url, "v4.channel.k8s.io").await;
    for (stream, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "stderr")] {
        raw.syn(stream, &[("streamtype", kind)], false).await;
    }
    raw.io
        .write_all(&[0, 0, 0, 3, 0, 0xff, 0xff, 0xff])
        .await
        .unwrap();
    // It is not all taken: what nobody reads stays where it is.
    let send = async {
        for _ in 0..256 {
            raw.io.write_all(&[0; 65536]).await.unwrap();
        }
    };
    let sent = tokio::time::timeout(Duration::from_secs(1), send).await;
    assert!(sent.is_err(), "16 MiB went somewhere");
    drop(raw);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_websocket_message_that_is_too_large_ends_the_session() {
    let limits = Limits {
        message: 100_000,
        ..Limits::default()
    };
    let server = Server::start_with(Config {
        limits,
        ..Config::default()
    })
    .await;
    let url = server.exec(&["hang"], ALL);
    let dialer = Dialer::default();
    let mut socket = dialer.websocket(&url, "v4.channel.k8s.io").await.unwrap();
    let _ = socket.send(Message::binary(vec![0; 100_001])).await;
    while let Some(Ok(_)) = within(socket.next()).await {}
    server.assert_idle().await;
}

#[tokio::test]
async fn a_websockets_pings_are_answered_while_nothing_else_happens() {
    let server = Server::start().await;
    let url = server.exec(&["hang"], ALL);
    let dialer = Dialer::default();
    let mut socket = dialer.websocket(&url, "v5.channel.k8s.io").await.unwrap();
    // The first message is empty, on the first channel of output.
    let first = within(socket.next()).await.unwrap().unwrap();
    assert_eq!(first, Message::binary(vec![1]));
    for n in 0..10_u8 {
        let ping = Message::Ping(Bytes::copy_from_slice(&[n]));
        socket.send(ping).await.unwrap();
        let pong = Message::Pong(Bytes::copy_from_slice(&[n]));
        assert_eq!(within(socket.next()).await.unwrap().unwrap(), pong);
    }
    drop(socket);
    server.assert_idle().await;
}

#[tokio::test]
async fn messages_that_make_no_sense_end_a_websocket_or_are_ignored() {
    let server = Server::start().await;
    for (protocol, message, fatal) in [
        ("v4.channel.k8s.io", vec![], false),
        ("v4.channel.k8s.io", vec![200, 1, 2, 3], false),
        ("v4.channel.k8s.io", vec![1, 2, 3], false),
        ("v4.channel.k8s.io", vec![255, 0], false),
        ("v5.channel.k8s.io", vec![255], true),
        ("v5.channel.k8s.io", vec![255, 0, 0], true),
        ("v5.channel.k8s.io", vec![255, 77], false),
        ("base64.channel.k8s.io", b"0no base64!".to_vec(), true),
        ("base64.channel.k8s.io", vec![0, 1, 2], false),
    ] {
        let url = server.exec(&["hang"], ALL);
        let dialer = Dialer::default();
        let mut socket = dialer.websocket(&url, protocol).await.unwrap();
        within(socket.next()).await.unwrap().unwrap();
        socket.send(Message::binary(message.clone())).await.unwrap();
        if fatal {
            while let Some(Ok(_)) = within(socket.next()).await {}
        } else {
            socket.send(Message::Ping(Bytes::new())).await.unwrap();
            let pong = within(socket.next()).await.unwrap().unwrap();
            assert_eq!(pong, Message::Pong(Bytes::new()), "{protocol} {message:?}");
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_pair_with_a_long_id_is_refused() {
    let server = Server::start().await;
    let url = server.forward(&[]);
    let mut raw = Raw::open(&url, "portforward.k8s.io").await;
    let id = "7".repeat(10_000);
    let headers = [("streamtype", "error"), ("port", "7"), ("requestid", &id)];
    raw.syn(1, &headers, false).await;
    let answer = raw.next().await;
    assert!(
        matches!(answer, Some(Frame::RstStream { stream: 1, .. })),
        "{answer:?}"
    );
    drop(raw);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_flood_without_tokens_holds_up_nobody_who_has_one() {
    let limits = Limits {
        connections: 4,
        strangers: 8,
        ..Limits::default()
    };
    let server = Server::start_with(Config {
        limits,
        ..Config::default()
    })
    .await;
    let flood = async || {
        let mut all = Vec::new();
        for n in 0..50 {
            let address = server.streaming.address();
            let mut stream = TcpStream::connect(address).await.unwrap();
            if n % 2 == 0 {
                stream.write_all(b"POST /exec/").await.unwrap();
            }
            all.push(stream);
        }
        all
    };
    let mut held = flood().await;
    let dialer = Dialer::default();
    let mut sessions = Vec::new();
    for n in 0..4 {
        let url = server.exec(&["cat"], ALL);
        let session = client::command(&dialer, &url, ALL, FULL[n % 2]);
        sessions.push(within(session).await.unwrap());
        held.extend(flood().await);
    }
    // Nor do those that come later end a session.
    for session in &mut sessions {
        let stdin = session.stdin.as_mut().unwrap();
        stdin.send(bytes("still here")).await.unwrap();
        let stdout = session.stdout.as_mut().unwrap();
        assert_eq!(read_exactly(stdout, 10).await, b"still here");
    }
    // The first of them are gone.
    let mut rest = Vec::new();
    let _ = within(held[0].read_to_end(&mut rest)).await;
    drop((sessions, held));
    server.assert_idle().await;
}

#[tokio::test]
async fn connections_above_the_limit_are_turned_away() {
    let limits = Limits {
        connections: 5,
        ..Limits::default()
    };
    let server = Server::start_with(Config {
        limits,
        ..Config::default()
    })
    .await;
    let dialer = Dialer::default();
    let open = |transport| {
        let url = server.exec(&["hang"], ALL);
        let dialer = dialer.clone();
        async move { client::command(&dialer, &url, ALL, transport).await }
    };
    let mut sessions = Vec::new();
    for n in 0..5 {
        sessions.push(within(open(FULL[n % 2])).await.unwrap());
    }
    for n in 0..5 {
        assert!(within(open(FULL[n % 2])).await.is_err());
    }
    sessions.pop();
    wait("one is gone", || server.memory.alive() == 4).await;
    // Its place is free a moment later.
    let again = async {
        loop {
            if let Ok(session) = open(FULL[0]).await {
                return session;
            }
        }
    };
    sessions.push(within(again).await);
    drop(sessions);
    server.assert_idle().await;
}
