//! Exec and attach, in all protocols.

use std::time::Duration;

use super::{
    ALL, FULL, PATIENCE, Server, TRANSPORTS, TTY, bytes, pattern, read_exactly, wait, within,
};
use crate::{
    Config, TerminalSize,
    client::{self, Dialer, Ended, Session, Transport, Wants},
};

async fn open(server: &Server, cmd: &[&str], wants: Wants, transport: Transport<'_>) -> Session {
    let url = server.exec(cmd, wants);
    within(client::command(&Dialer::default(), &url, wants, transport))
        .await
        .unwrap()
}

/// The exit code, in JSON or in the text that old protocols have for it.
fn code(ended: &Ended) -> Option<u8> {
    match &ended.status {
        Some(status) => status.exit_code(),
        None if ended.failure.is_empty() => Some(0),
        None => {
            let code = ended.failure.rsplit(' ').next()?;
            code.parse().ok()
        }
    }
}

#[tokio::test]
async fn output_and_exit_code_arrive_in_every_protocol() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        for expected in [0, 3, 137] {
            let cmd = ["print", "some output", "some errors", &expected.to_string()];
            let session = open(&server, &cmd, ALL, transport).await;
            let ended = within(session.end()).await.unwrap();
            assert_eq!(ended.stdout, b"some output", "{transport:?}");
            assert_eq!(ended.stderr, b"some errors", "{transport:?}");
            assert_eq!(code(&ended), Some(expected), "{transport:?}");
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn the_server_takes_the_newest_protocol_that_it_knows() {
    let server = Server::start().await;
    let session = open(&server, &["print", "", "", "0"], ALL, TRANSPORTS[0]).await;
    assert_eq!(session.protocol, "v4.channel.k8s.io");
    within(session.end()).await.unwrap();
}

#[tokio::test]
async fn input_comes_back_whole_in_every_protocol() {
    let server = Server::start().await;
    let data = pattern(3 << 20);
    for transport in TRANSPORTS {
        let cmd = ["echo", &data.len().to_string(), "4"];
        let mut session = open(&server, &cmd, ALL, transport).await;
        let mut stdin = session.stdin.take().unwrap();
        let send = async {
            for chunk in data.chunks(100_000) {
                let chunk = bytes::Bytes::copy_from_slice(chunk);
                stdin.send(chunk).await.unwrap();
            }
        };
        let ((), ended) = within(async { tokio::join!(send, session.end()) }).await;
        let ended = ended.unwrap();
        assert!(ended.stdout == data, "{transport:?}");
        assert_eq!(ended.stderr, b"begin");
        assert_eq!(code(&ended), Some(4));
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn the_end_of_input_reaches_the_process() {
    let server = Server::start().await;
    for transport in FULL {
        let mut session = open(&server, &["cat"], ALL, transport).await;
        let mut stdin = session.stdin.take().unwrap();
        stdin.send(bytes("one ")).await.unwrap();
        stdin.send(bytes("two")).await.unwrap();
        stdin.finish().await.unwrap();
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.stdout, b"one two");
        assert_eq!(code(&ended), Some(0));
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_terminal_has_one_output_and_sizes() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        // v2 and v1 of SPDY have no stream of sizes.
        if let Transport::Spdy(["v2.channel.k8s.io"] | ["channel.k8s.io"]) = transport {
            continue;
        }
        let mut session = open(&server, &["sizes", "2"], TTY, transport).await;
        session.resize(80, 24).await.unwrap();
        session.resize(0, 0).await.unwrap();
        session.resize(132, 43).await.unwrap();
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.stdout, b"24 80\n43 132\n", "{transport:?}");
        let sizes = std::mem::take(&mut *server.memory.sizes.lock().unwrap());
        let expected = [(80, 24), (132, 43)];
        assert_eq!(
            sizes,
            expected.map(|(columns, rows)| TerminalSize { columns, rows })
        );
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn any_choice_of_streams_is_served() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        for choice in 1..8 {
            let wants = Wants {
                stdin: choice & 1 != 0,
                stdout: choice & 2 != 0,
                stderr: choice & 4 != 0,
                tty: false,
            };
            let session = open(&server, &["print", "o", "e", "5"], wants, transport).await;
            let ended = within(session.end()).await.unwrap();
            assert_eq!(ended.stdout, if wants.stdout { &b"o"[..] } else { b"" });
            assert_eq!(ended.stderr, if wants.stderr { &b"e"[..] } else { b"" });
            assert_eq!(code(&ended), Some(5));
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn output_that_is_slower_than_the_exit_is_not_lost() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        let session = open(&server, &["late", "300000"], ALL, transport).await;
        let ended = within(session.end()).await.unwrap();
        assert!(ended.stdout == pattern(300_000), "{transport:?}");
        assert_eq!(code(&ended), Some(0));
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_failure_is_told_on_the_error_stream() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        for (cmd, output, reason) in [
            ("nonsense", &b""[..], "no such program: nonsense"),
            ("lost", b"before", "the VM is gone"),
        ] {
            let session = open(&server, &[cmd], ALL, transport).await;
            let ended = within(session.end()).await.unwrap();
            assert_eq!(ended.stdout, output, "{transport:?}");
            match ended.status {
                Some(status) => {
                    assert_eq!(status.message, reason);
                    assert_eq!(status.reason, "InternalError");
                    assert_eq!((status.code, status.exit_code()), (Some(500), None));
                }
                None => assert_eq!(ended.failure, reason),
            }
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_the_process() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        let session = open(&server, &["hang"], ALL, transport).await;
        wait("it runs", || server.memory.alive() == 1).await;
        drop(session);
        server.memory.assert_none_left().await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn attach_detaches_at_the_end_of_input_and_tells_no_exit_code() {
    let server = Server::start().await;
    for transport in FULL {
        for (text, finish) in [("hello", true), ("exit", false)] {
            let url = server.attach(ALL);
            let dialer = Dialer::default();
            let opened = client::command(&dialer, &url, ALL, transport);
            let mut session = within(opened).await.unwrap();
            let stdout = session.stdout.as_mut().unwrap();
            assert_eq!(read_exactly(stdout, 9).await, b"attached\n");
            let mut stdin = session.stdin.take().unwrap();
            stdin.send(bytes(text)).await.unwrap();
            if finish {
                stdin.finish().await.unwrap();
            }
            let ended = within(session.end()).await.unwrap();
            assert_eq!(code(&ended), Some(0));
            let got = std::mem::take(&mut *server.memory.attached.lock().unwrap());
            assert_eq!(got, text.as_bytes());
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_its_own_process_only() {
    let server = Server::start().await;
    for transport in TRANSPORTS {
        // It is opened, and nothing of it is ever taken.
        let stuck = open(&server, &["yes"], ALL, transport).await;
        let written = || {
            server
                .memory
                .written
                .load(std::sync::atomic::Ordering::SeqCst)
        };
        wait("it writes", || written() > 0).await;
        // The sockets' buffers are the kernel's, some MiB.
        let mut before = usize::MAX;
        while before != written() {
            before = written();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(written() < 64 << 20, "{} MiB", written() >> 20);
        let other = open(&server, &["print", "o", "e", "0"], ALL, transport).await;
        assert_eq!(code(&within(other.end()).await.unwrap()), Some(0));
        drop(stuck);
        server.memory.assert_none_left().await;
        server
            .memory
            .written
            .store(0, std::sync::atomic::Ordering::SeqCst);
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_process_that_does_not_read_stops_its_own_client_only() {
    let server = Server::start().await;
    let mut all = Vec::new();
    for transport in TRANSPORTS {
        let mut stuck = open(&server, &["hang"], ALL, transport).await;
        let mut stdin = stuck.stdin.take().unwrap();
        let send = async {
            loop {
                stdin.send(pattern(60_000).into()).await.unwrap();
            }
        };
        let blocked = tokio::time::timeout(Duration::from_millis(500), send).await;
        assert!(blocked.is_err());
        let other = open(&server, &["print", "o", "e", "0"], ALL, transport).await;
        assert_eq!(code(&within(other.end()).await.unwrap()), Some(0));
        all.push((stuck, stdin));
    }
    // That they hung up stands behind all that nobody reads.
    drop(all);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_session_without_traffic_ends() {
    let server = Server::start_with(Config {
        idle_timeout: Duration::from_millis(300),
        ..Config::default()
    })
    .await;
    for transport in FULL {
        let session = open(&server, &["hang"], ALL, transport).await;
        let ended = tokio::time::timeout(PATIENCE, session.end()).await.unwrap();
        assert!(ended.is_err());
        server.memory.assert_none_left().await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn shutting_down_ends_sessions() {
    let server = Server::start().await;
    let mut sessions = Vec::new();
    for transport in TRANSPORTS {
        sessions.push(open(&server, &["hang"], ALL, transport).await);
    }
    wait("they run", || server.memory.alive() == TRANSPORTS.len()).await;
    within(server.streaming.shutdown()).await;
    assert_eq!(server.memory.alive(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_sessions_leave_nothing() {
    let server = Server::start().await;
    for _ in 0..20 {
        let sessions = (0..40).map(|n| {
            let transport = TRANSPORTS[n % TRANSPORTS.len()];
            let server = &server;
            async move {
                let cmd = ["print", "out", "err", &n.to_string()];
                let session = open(server, &cmd, ALL, transport).await;
                let ended = within(session.end()).await.unwrap();
                assert_eq!(code(&ended), Some(n as u8));
            }
        });
        futures::future::join_all(sessions).await;
    }
    server.assert_idle().await;
}
