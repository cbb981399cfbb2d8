//! URLs, HTTP and handshakes.

use std::io::Write;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{ALL, FULL, Server, TTY, within};
use crate::{
    Config, ExecRequest, PortForwardRequest, RequestError, TlsFiles,
    client::{self, ClientError, Dialer, Transport},
    config::Limits,
};

fn status(result: Result<client::Session, ClientError>) -> (u16, Vec<String>) {
    match result {
        Err(ClientError::Refused {
            status, accepted, ..
        }) => (status, accepted),
        other => panic!("{other:?}"),
    }
}

/// Sends text and gives all that comes back.
async fn http(server: &Server, request: &str) -> String {
    let mut stream = TcpStream::connect(server.streaming.address())
        .await
        .unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

fn path(url: &str) -> &str {
    let (_, rest) = url.split_once("://").unwrap();
    &rest[rest.find('/').unwrap()..]
}

#[tokio::test]
async fn a_url_is_absolute_and_names_what_it_is_for() {
    let server = Server::start().await;
    let address = server.streaming.address();
    assert!(address.ip().is_loopback());
    for (url, verb) in [
        (server.exec(&["cat"], ALL), "exec"),
        (server.attach(ALL), "attach"),
        (server.forward(&[80]), "portforward"),
    ] {
        let token = url
            .strip_prefix(&format!("http://{address}/{verb}/"))
            .unwrap();
        assert_eq!(token.len(), 22, "{url}");
    }
    let config = Config {
        advertise: Some("node.example:1234".into()),
        ..Config::default()
    };
    let url = Server::start_with(config).await.attach(ALL);
    assert!(url.starts_with("http://node.example:1234/attach/"), "{url}");
}

#[tokio::test]
async fn requests_that_make_no_sense_get_no_url() {
    let server = Server::start().await;
    let good = ExecRequest {
        container_id: "c".into(),
        cmd: vec!["cat".into()],
        tty: false,
        stdin: false,
        stdout: true,
        stderr: true,
    };
    let exec = |change: &dyn Fn(&mut ExecRequest)| {
        let mut request = good.clone();
        change(&mut request);
        server.streaming.exec(request).map(drop)
    };
    assert_eq!(exec(&|_| {}), Ok(()));
    let missing = |field| Err(RequestError::Missing(field));
    assert_eq!(exec(&|r| r.container_id.clear()), missing("container_id"));
    assert_eq!(exec(&|r| r.cmd.clear()), missing("cmd"));
    assert!(matches!(
        exec(&|r| r.tty = true),
        Err(RequestError::Invalid {
            field: "stderr",
            ..
        })
    ));
    let none = |r: &mut ExecRequest| (r.stdout, r.stderr) = (false, false);
    assert!(matches!(exec(&none), Err(RequestError::Invalid { .. })));
    let pod = PortForwardRequest {
        pod_sandbox_id: String::new(),
        ports: vec![80],
    };
    assert_eq!(
        server.streaming.port_forward(pod),
        Err(RequestError::Missing("pod_sandbox_id"))
    );
}

#[tokio::test]
async fn no_more_than_so_many_urls_wait() {
    let limits = Limits {
        tokens: 3,
        ..Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let server = Server::start_with(config).await;
    let urls: Vec<_> = (0..3)
        .map(|_| server.exec(&["print", "", "", "0"], ALL))
        .collect();
    let request = PortForwardRequest {
        pod_sandbox_id: "pod".into(),
        ports: Vec::new(),
    };
    let again = || server.streaming.port_forward(request.clone());
    assert_eq!(again(), Err(RequestError::TooMany(3)));
    let session = client::command(&Dialer::default(), &urls[0], ALL, FULL[0])
        .await
        .unwrap();
    within(session.end()).await.unwrap();
    assert!(again().is_ok());
}

#[tokio::test]
async fn a_token_is_good_once_and_for_its_verb_only() {
    let server = Server::start().await;
    let dialer = Dialer::default();
    for transport in FULL {
        let url = server.exec(&["print", "", "", "0"], ALL);
        let open = |url: String| {
            let dialer = dialer.clone();
            async move { client::command(&dialer, &url, ALL, transport).await }
        };
        let session = open(url.clone()).await.unwrap();
        within(session.end()).await.unwrap();
        assert_eq!(status(open(url.clone()).await).0, 404);
        assert_eq!(
            status(open(url[..url.len() - 1].to_owned() + "%").await).0,
            404
        );
        let other = server.exec(&["cat"], ALL).replace("/exec/", "/attach/");
        assert_eq!(status(open(other).await).0, 404);
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn what_is_no_stream_request_is_refused() {
    let server = Server::start().await;
    for (request, expected) in [
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("GET /exec HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("GET /exec/ HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("GET /exec/../../etc HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("DELETE /exec/AAAAAAAA HTTP/1.1\r\nHost: x\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let answer = http(&server, request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {expected}")),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn an_upgrade_that_is_wrong_is_refused() {
    let server = Server::start().await;
    let spdy = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
    let key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    for (method, headers, expected) in [
        ("GET", String::new(), 400),
        ("POST", spdy.to_owned(), 400),
        ("POST", format!("{spdy}X-Stream-Protocol-Version:\r\n"), 400),
        (
            "POST",
            format!("{spdy}X-Stream-Protocol-Version: v9\r\n"),
            403,
        ),
        (
            "POST",
            "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n".into(),
            400,
        ),
        (
            "POST",
            format!("{websocket}{key}Sec-WebSocket-Version: 13\r\n"),
            400,
        ),
        (
            "GET",
            format!("{websocket}Sec-WebSocket-Version: 13\r\n"),
            400,
        ),
        (
            "GET",
            format!("{websocket}{key}Sec-WebSocket-Version: 8\r\n"),
            426,
        ),
        (
            "GET",
            format!("{websocket}{key}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: v9\r\n"),
            403,
        ),
    ] {
        let url = server.exec(&["cat"], ALL);
        let path = path(&url);
        let answer = http(
            &server,
            &format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"),
        )
        .await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {expected}")),
            "{headers} {answer}"
        );
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn an_upgrade_does_not_close_its_connection() {
    let server = Server::start().await;
    for (method, upgrade, headers) in [
        (
            "POST",
            "SPDY/3.1",
            "X-Stream-Protocol-Version: v4.channel.k8s.io\r\n",
        ),
        (
            "GET",
            "websocket",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n",
        ),
    ] {
        let url = server.exec(&["cat"], ALL);
        let path = path(&url);
        let mut stream = TcpStream::connect(server.streaming.address())
            .await
            .unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n{headers}\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within(stream.read_u8()).await.unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.starts_with("http/1.1 101"), "{head}");
        // A client in Go takes no upgrade from an answer that says `close`, too.
        let connection: Vec<_> = head
            .lines()
            .filter(|line| line.starts_with("connection:"))
            .collect();
        assert_eq!(connection, ["connection: upgrade"]);
    }
}

#[tokio::test]
async fn a_client_learns_which_protocols_there_are() {
    let server = Server::start().await;
    let url = server.exec(&["cat"], ALL);
    let transport = Transport::Spdy(&["v9.channel.k8s.io"]);
    let refused = client::command(&Dialer::default(), &url, ALL, transport).await;
    let (status, accepted) = status(refused);
    assert_eq!(status, 403);
    assert_eq!(accepted[0], "v4.channel.k8s.io");
    assert_eq!(accepted.len(), 4);
}

#[tokio::test]
async fn channels_need_ports_in_the_request() {
    let server = Server::start().await;
    let dialer = Dialer::default();
    for (protocol, ports) in [
        ("v4.channel.k8s.io", 0),
        ("v4.base64.channel.k8s.io", 6),
        ("", 128),
    ] {
        let ports = vec![80; ports];
        let url = server.forward(&ports);
        let refused = client::forward_channels(&dialer, &url, protocol, &ports).await;
        assert!(matches!(
            refused.map(drop),
            Err(ClientError::Refused { status: 400, .. })
        ));
    }
}

#[tokio::test]
async fn https_is_served_with_the_certificate_of_the_files() {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let dir = std::env::temp_dir().join(format!("hull-streaming-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let files = TlsFiles {
        cert: dir.join("cert.pem"),
        key: dir.join("key.pem"),
    };
    let write = |path: &std::path::Path, text: String| {
        std::fs::File::create(path)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    };
    write(&files.cert, made.cert.pem());
    write(&files.key, made.signing_key.serialize_pem());
    let config = Config {
        tls: Some(files.clone()),
        ..Config::default()
    };
    let server = Server::start_with(config).await;
    std::fs::remove_dir_all(&dir).unwrap();

    let dialer = Dialer::trusting(vec![made.cert.der().clone()]);
    for transport in FULL {
        let url = server.exec(&["sizes", "1"], TTY);
        assert!(url.starts_with("https://"));
        let mut session = within(client::command(&dialer, &url, TTY, transport))
            .await
            .unwrap();
        session.resize(10, 20).await.unwrap();
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.stdout, b"20 10\n");
    }
    // Who does not know the certificate hangs up.
    let url = server.exec(&["cat"], ALL);
    let stranger = client::command(&Dialer::default(), &url, ALL, FULL[0]).await;
    assert!(matches!(stranger, Err(ClientError::Connect(..))));
    server.assert_idle().await;
    let missing = crate::Streaming::start(
        Config {
            tls: Some(files),
            ..Config::default()
        },
        server.memory.clone(),
    );
    let text = format!("{:?}", missing.await.unwrap_err());
    assert!(text.contains("cert.pem"), "{text}");
}
