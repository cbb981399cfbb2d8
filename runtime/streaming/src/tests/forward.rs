//! Port-forward, in all protocols.

use std::time::Duration;

use futures::future::join_all;

use super::{
    PATIENCE, Server,
    backend::{COUNT, ECHO, GREET, REFUSED, RESET, STUCK},
    bytes, pattern, read_exactly, read_to_end, wait, within,
};
use crate::{
    Config, Lost,
    client::{self, Dialer, Forward, Forwarder},
    config::Limits,
};

const CHANNELS: [&str; 5] = [
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "",
];

/// Both ways to many connections.
async fn forwarders(server: &Server) -> [Forwarder; 2] {
    let dialer = Dialer::default();
    [
        within(client::forward(&dialer, &server.forward(&[])))
            .await
            .unwrap(),
        within(client::forward_tunnel(&dialer, &server.forward(&[])))
            .await
            .unwrap(),
    ]
}

/// Sends a pattern and reads it back at the same time.
async fn echo(mut forward: Forward, length: usize) {
    let data = pattern(length);
    let send = async {
        for chunk in data.chunks(50_000) {
            let chunk = bytes::Bytes::copy_from_slice(chunk);
            forward.output.send(chunk).await.unwrap();
        }
        forward.output.finish().await.unwrap();
    };
    let ((), back) = tokio::join!(send, read_to_end(&mut forward.input));
    assert!(back == data);
    assert_eq!(read_to_end(&mut forward.error).await, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_share_one() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        let echoes = (0..100).map(|_| async {
            let forward = forwarder.open(ECHO).await.unwrap();
            echo(forward, 200_000).await;
        });
        within(join_all(echoes)).await;
        // Again, and nothing of the first ones counts.
        for _ in 0..600 {
            let mut forward = within(forwarder.open(GREET)).await.unwrap();
            assert_eq!(read_to_end(&mut forward.input).await, b"hello");
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn an_answer_after_the_end_of_the_request_arrives() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        let mut forward = within(forwarder.open(COUNT)).await.unwrap();
        forward.output.send(bytes("request")).await.unwrap();
        forward.output.finish().await.unwrap();
        assert_eq!(read_to_end(&mut forward.input).await, b"7");
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_port_that_refuses_is_told_and_the_others_go_on() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        let mut good = within(forwarder.open(ECHO)).await.unwrap();
        let mut bad = within(forwarder.open(REFUSED)).await.unwrap();
        let reason = read_to_end(&mut bad.error).await;
        assert_eq!(
            String::from_utf8(reason).unwrap(),
            "forward port 9 to pod pod: connection refused"
        );
        assert_eq!(within(bad.input.recv()).await, Err(Lost));
        good.output.send(bytes("still here")).await.unwrap();
        assert_eq!(read_exactly(&mut good.input, 10).await, b"still here");
    }
    server.assert_idle().await;
}

/// kubectl and crictl give all connections up when anything comes on the error stream of one.
#[tokio::test]
async fn a_connection_that_the_server_resets_ends_alone_and_nothing_is_told() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        let mut good = within(forwarder.open(ECHO)).await.unwrap();
        for _ in 0..3 {
            let mut reset = within(forwarder.open(RESET)).await.unwrap();
            reset.output.send(bytes("request")).await.unwrap();
            assert_eq!(read_exactly(&mut reset.input, 4).await, b"part");
            assert_eq!(within(reset.input.recv()).await, Err(Lost));
            assert_eq!(read_to_end(&mut reset.error).await, b"");
        }
        good.output.send(bytes("still here")).await.unwrap();
        assert_eq!(read_exactly(&mut good.input, 10).await, b"still here");
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_stream_without_sense_is_refused_and_the_others_go_on() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        for (kind, port) in [
            ("data", "0"),
            ("data", "70000"),
            ("data", "x"),
            ("resize", "7"),
            ("", "7"),
        ] {
            let opened = within(forwarder.stream(kind, port, Some("1"))).await;
            assert!(opened.is_err(), "{kind} {port}");
        }
        let first = within(forwarder.stream("error", "7", Some("twice"))).await;
        assert!(first.is_ok());
        let second = within(forwarder.stream("error", "7", Some("twice"))).await;
        assert!(second.is_err());
        echo(forwarder.open(ECHO).await.unwrap(), 10).await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn streams_find_each_other_without_request_ids_and_in_any_order() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        // The error stream first, as clients of old do.
        for _ in 0..3 {
            let _error = within(forwarder.stream("error", "80", None)).await.unwrap();
            let (_output, mut input) = within(forwarder.stream("data", "80", None)).await.unwrap();
            assert_eq!(read_to_end(&mut input).await, b"hello");
        }
        let (_output, mut input) = within(forwarder.stream("data", "80", Some("x")))
            .await
            .unwrap();
        let _error = within(forwarder.stream("error", "80", Some("x")))
            .await
            .unwrap();
        assert_eq!(read_to_end(&mut input).await, b"hello");
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn a_pair_that_stays_incomplete_is_told_and_its_id_is_free_again() {
    let server = Server::start_with(Config {
        creation_timeout: Duration::from_millis(100),
        ..Config::default()
    })
    .await;
    for forwarder in forwarders(&server).await {
        let (_output, mut error) = within(forwarder.stream("error", "80", Some("0")))
            .await
            .unwrap();
        let text = String::from_utf8(read_to_end(&mut error).await).unwrap();
        assert!(text.contains("did not come in time"), "{text}");
        let (_other, mut data) = within(forwarder.stream("data", "80", Some("1")))
            .await
            .unwrap();
        assert_eq!(within(data.recv()).await, Err(Lost));
        // These have the ids 0 and 1.
        for _ in 0..2 {
            let mut forward = within(forwarder.open(GREET)).await.unwrap();
            assert_eq!(read_to_end(&mut forward.input).await, b"hello");
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn connections_end_with_the_client() {
    let server = Server::start().await;
    for forwarder in forwarders(&server).await {
        let mut forwards = Vec::new();
        for _ in 0..20 {
            forwards.push(within(forwarder.open(STUCK)).await.unwrap());
        }
        wait("they are open", || server.memory.alive() == 20).await;
        // One by its reset, the others with the connection.
        forwards[0].output.reset().await;
        wait("one is closed", || server.memory.alive() == 19).await;
        drop((forwards, forwarder));
        server.memory.assert_none_left().await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn streams_above_the_limit_are_refused_until_others_end() {
    let limits = Limits {
        streams: 20,
        ..Limits::default()
    };
    let server = Server::start_with(Config {
        limits,
        ..Config::default()
    })
    .await;
    for forwarder in forwarders(&server).await {
        let mut forwards = Vec::new();
        // The client has ended its half of each error stream, the server has not.
        for _ in 0..10 {
            forwards.push(within(forwarder.open(STUCK)).await.unwrap());
        }
        for _ in 0..1000 {
            assert!(within(forwarder.open(STUCK)).await.is_err());
        }
        forwards.pop().unwrap().output.reset().await;
        wait("one is closed", || server.memory.alive() == 9).await;
        echo(within(forwarder.open(ECHO)).await.unwrap(), 1000).await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn channels_carry_the_ports_of_the_request() {
    let server = Server::start().await;
    let ports = [ECHO, GREET, REFUSED, RESET];
    for protocol in CHANNELS {
        let url = server.forward(&ports);
        let dialer = Dialer::default();
        let opened = client::forward_channels(&dialer, &url, protocol, &ports);
        let (mut forwards, carrier) = within(opened).await.unwrap();
        let reset = &mut forwards[3];
        reset.output.send(bytes("request")).await.unwrap();
        assert_eq!(read_exactly(&mut reset.input, 4).await, b"part");
        let data = pattern(200_000);
        let forward = &mut forwards[0];
        let send = forward.output.send(data.clone().into());
        let (sent, back) = tokio::join!(send, read_exactly(&mut forward.input, data.len()));
        sent.unwrap();
        assert!(back == data, "{protocol}");
        assert_eq!(read_exactly(&mut forwards[1].input, 5).await, b"hello");
        let reason = read_exactly(&mut forwards[2].error, 45).await;
        assert_eq!(reason, b"forward port 9 to pod pod: connection refused");
        drop((forwards, carrier));
        server.memory.assert_none_left().await;
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn an_idle_connection_ends() {
    let server = Server::start_with(Config {
        idle_timeout: Duration::from_millis(300),
        ..Config::default()
    })
    .await;
    for n in 0..2 {
        let [spdy, tunnel] = forwarders(&server).await;
        let forwarder = if n == 0 { spdy } else { tunnel };
        let _forward = within(forwarder.open(STUCK)).await.unwrap();
        tokio::time::timeout(PATIENCE, forwarder.closed())
            .await
            .unwrap();
        server.memory.assert_none_left().await;
    }
    server.assert_idle().await;
}
