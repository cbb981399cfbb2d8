//! Exec, attach and port-forward as their clients see them: the URLs of the daemon, opened over
//! SPDY and WebSocket.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use hull_proto_cri::v1::{AttachRequest, ContainerState, ExecRequest, PortForwardRequest};
use hull_streaming::{
    Input,
    client::{self, ClientError, Dialer, Forward, Forwarder, Session, Transport, Wants},
};
use tonic::{Code, Status};

use crate::harness::{Node, Pod};

const PATIENCE: Duration = Duration::from_secs(120);

const TRANSPORTS: [Transport<'static>; 10] = [
    Transport::Spdy(&["v5.channel.k8s.io", "v4.channel.k8s.io"]),
    Transport::Spdy(&["v3.channel.k8s.io"]),
    Transport::Spdy(&["v2.channel.k8s.io"]),
    Transport::Spdy(&["channel.k8s.io"]),
    Transport::WebSocket("v5.channel.k8s.io"),
    Transport::WebSocket("v4.channel.k8s.io"),
    Transport::WebSocket("v4.base64.channel.k8s.io"),
    Transport::WebSocket("channel.k8s.io"),
    Transport::WebSocket("base64.channel.k8s.io"),
    Transport::WebSocket(""),
];

/// Those of kubelet and kubectl today: an exit code, and an end of the input.
const FULL: [Transport<'static>; 2] = [TRANSPORTS[0], TRANSPORTS[4]];

const OUTPUT: Wants = Wants {
    stdin: false,
    stdout: true,
    stderr: true,
    tty: false,
};
const ALL: Wants = Wants {
    stdin: true,
    ..OUTPUT
};
const TTY: Wants = Wants {
    stdin: true,
    stdout: true,
    stderr: false,
    tty: true,
};

async fn within<T>(work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, work).await;
    done.expect("it takes too long")
}

async fn exec_url(node: &Node, id: &str, script: &str, wants: Wants) -> Result<String, Status> {
    let request = ExecRequest {
        container_id: id.into(),
        cmd: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        tty: wants.tty,
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
    };
    let answer = node.client.runtime.clone().exec(request).await?;
    Ok(answer.into_inner().url)
}

async fn open(url: &str, wants: Wants, transport: Transport<'_>) -> Result<Session, ClientError> {
    within(client::command(&Dialer::default(), url, wants, transport)).await
}

async fn exec(
    node: &Node,
    id: &str,
    script: &str,
    wants: Wants,
    transport: Transport<'_>,
) -> Session {
    let url = exec_url(node, id, script, wants).await.unwrap();
    open(&url, wants, transport).await.unwrap()
}

async fn attach_url(node: &Node, id: &str, wants: Wants) -> Result<String, Status> {
    let request = AttachRequest {
        container_id: id.into(),
        tty: wants.tty,
        stdin: wants.stdin,
        stdout: wants.stdout,
        stderr: wants.stderr,
    };
    let answer = node.client.runtime.clone().attach(request).await?;
    Ok(answer.into_inner().url)
}

async fn attach(node: &Node, id: &str, wants: Wants, transport: Transport<'_>) -> Session {
    let url = attach_url(node, id, wants).await.unwrap();
    open(&url, wants, transport).await.unwrap()
}

async fn forward_url(node: &Node, pod: &Pod, ports: &[u16]) -> Result<String, Status> {
    let request = PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: ports.iter().map(|&port| port.into()).collect(),
    };
    let answer = node.client.runtime.clone().port_forward(request).await?;
    Ok(answer.into_inner().url)
}

/// Sends bytes and the end of the input.
async fn send_all(session: &mut Session, bytes: &[u8]) {
    let mut stdin = session.stdin.take().unwrap();
    for chunk in bytes.chunks(32 << 10) {
        stdin.send(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    stdin.finish().await.unwrap();
}

async fn send(session: &mut Session, text: &str) {
    let stdin = session.stdin.as_mut().unwrap();
    let text = Bytes::copy_from_slice(text.as_bytes());
    within(stdin.send(text)).await.unwrap();
}

/// Reads until the text has come.
async fn read_until(input: &mut Input, text: &str) -> String {
    let mut all = Vec::new();
    loop {
        match within(input.recv()).await {
            Ok(Some(bytes)) => all.extend_from_slice(&bytes),
            other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&all)),
        }
        let read = String::from_utf8_lossy(&all);
        if read.contains(text) {
            return read.into_owned();
        }
    }
}

async fn read_to_end(input: &mut Input) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = within(input.recv()).await.unwrap() {
        all.extend_from_slice(&bytes);
    }
    all
}

/// Waits until a script in a container prints this.
async fn wait_for(node: &Node, id: &str, script: &str, expected: &str) {
    let mut last = String::new();
    for _ in 0..200 {
        let answer = node.exec(id, script).await;
        last = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        if last == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{script:?} prints {last:?}, not {expected:?}");
}

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(next).collect()
}

#[tokio::test]
async fn commands_run_over_every_protocol() {
    let node = Node::start().await;
    let pod = node.pod("exec").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    for transport in TRANSPORTS {
        let script = "echo some output; echo some errors >&2; exit 7";
        let session = exec(&node, &id, script, OUTPUT, transport).await;
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.stdout, b"some output\n", "{transport:?}");
        assert_eq!(ended.stderr, b"some errors\n", "{transport:?}");
        match ended.status {
            Some(status) => assert_eq!(status.exit_code(), Some(7)),
            None => assert!(ended.failure.ends_with("exit code: 7"), "{}", ended.failure),
        }
        // Old protocols can't tell the end of the input.
        let data = pattern(200_000);
        let script = format!("head -c {} | md5sum", data.len());
        let mut session = exec(&node, &id, &script, ALL, transport).await;
        send_all(&mut session, &data).await;
        let sum = within(session.end()).await.unwrap().stdout;
        let again = exec(&node, &id, "head -c 200000", ALL, transport).await;
        let echoed = echo(again, &data).await;
        assert!(echoed == data, "{transport:?}");
        assert_eq!(sum.len(), 36, "{}", String::from_utf8_lossy(&sum));
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

/// Sends bytes and their end while it reads what comes back.
async fn echo(mut session: Session, bytes: &[u8]) -> Vec<u8> {
    let stdin = session.stdin.take();
    let send = async {
        let mut stdin = stdin.unwrap();
        for chunk in bytes.chunks(32 << 10) {
            stdin.send(Bytes::copy_from_slice(chunk)).await.unwrap();
        }
        stdin.finish().await.unwrap();
        stdin
    };
    let (_stdin, ended) = within(async { tokio::join!(send, session.end()) }).await;
    ended.unwrap().stdout
}

#[tokio::test]
async fn input_of_several_mib_comes_back_whole_and_its_end_is_seen() {
    let node = Node::start().await;
    let pod = node.pod("echo").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    let data = pattern(6 << 20);
    for transport in FULL {
        let session = exec(&node, &id, "cat", ALL, transport).await;
        assert!(echo(session, &data).await == data, "{transport:?}");
        let output = exec(
            &node,
            &id,
            "dd if=/dev/zero bs=1M count=8 2>/dev/null",
            OUTPUT,
            transport,
        );
        let ended = within(output.await.end()).await.unwrap();
        assert_eq!(ended.stdout.len(), 8 << 20);
        assert_eq!(ended.status.unwrap().exit_code(), Some(0));
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_terminal_has_the_size_of_its_client() {
    let node = Node::start().await;
    let pod = node.pod("tty").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    for transport in TRANSPORTS {
        // v2 and v1 of SPDY have no stream of sizes.
        if let Transport::Spdy(["v2.channel.k8s.io"] | ["channel.k8s.io"]) = transport {
            continue;
        }
        let script = "test -t 0 && test -t 1 && test -t 2 && echo terminal; exec sh";
        let mut session = exec(&node, &id, script, TTY, transport).await;
        let mut stdout = session.stdout.take().unwrap();
        read_until(&mut stdout, "terminal").await;
        for (columns, rows) in [(101, 33), (80, 24)] {
            session.resize(columns, rows).await.unwrap();
            let expected = format!("size={rows} {columns}.");
            // The size and our line take different ways.
            let line =
                format!("until [ \"$(stty size)\" = '{rows} {columns}' ]; do sleep 0.1; done; ");
            send(
                &mut session,
                &format!("{line} printf 'size=%s.' \"$(stty size)\"\n"),
            )
            .await;
            read_until(&mut stdout, &expected).await;
        }
        send(&mut session, "exit 5\n").await;
        let ended = within(session.end()).await.unwrap();
        if let Some(status) = ended.status {
            assert_eq!(status.exit_code(), Some(5), "{transport:?}");
        }
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn urls_are_absolute_good_once_and_only_for_what_runs() {
    let node = Node::start().await;
    let pod = node.pod("urls").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    for transport in FULL {
        let url = exec_url(&node, &id, "true", OUTPUT).await.unwrap();
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        let session = open(&url, OUTPUT, transport).await.unwrap();
        within(session.end()).await.unwrap();
        let again = open(&url, OUTPUT, transport).await;
        assert!(
            matches!(again, Err(ClientError::Refused { status: 404, .. })),
            "{again:?}"
        );
    }
    // A shortened id is one too.
    let url = exec_url(&node, &id[..13], "echo hi", OUTPUT).await.unwrap();
    let session = open(&url, OUTPUT, FULL[0]).await.unwrap();
    assert_eq!(within(session.end()).await.unwrap().stdout, b"hi\n");

    let code = |result: Result<String, Status>| result.unwrap_err().code();
    let tty_errors = Wants {
        stderr: true,
        ..TTY
    };
    let nothing = Wants::default();
    for wants in [tty_errors, nothing] {
        let refused = exec_url(&node, &id, "true", wants).await;
        assert_eq!(code(refused), Code::InvalidArgument);
    }
    let refused = attach_url(&node, &id, nothing).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    // It has no terminal.
    let refused = attach_url(&node, &id, TTY).await;
    assert_eq!(code(refused), Code::InvalidArgument);
    node.stop_container(&id, 0).await.unwrap();
    let refused = exec_url(&node, &id, "true", OUTPUT).await;
    assert_eq!(code(refused), Code::FailedPrecondition);
    let refused = attach_url(&node, &id, OUTPUT).await;
    assert_eq!(code(refused), Code::FailedPrecondition);
    node.stop_sandbox(&pod.id).await.unwrap();
    let refused = forward_url(&node, &pod, &[80]).await;
    assert_eq!(code(refused), Code::FailedPrecondition);
    node.remove_sandbox(&pod.id).await.unwrap();
    let refused = forward_url(&node, &pod, &[80]).await;
    assert_eq!(code(refused), Code::NotFound);
    node.finish().await;
}

#[tokio::test]
async fn a_command_that_can_not_run_says_why() {
    let node = Node::start().await;
    let pod = node.pod("nonsense").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    for transport in TRANSPORTS {
        let request = ExecRequest {
            container_id: id.clone(),
            cmd: vec!["/no/such/program".into()],
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let answer = node.client.runtime.clone().exec(request).await.unwrap();
        let url = answer.into_inner().url;
        let session = open(&url, OUTPUT, transport).await.unwrap();
        let ended = within(session.end()).await.unwrap();
        let reason = match ended.status {
            Some(status) => {
                assert_ne!(status.exit_code(), Some(0), "{status:?}");
                status.message
            }
            None => ended.failure,
        };
        assert!(reason.contains("/no/such/program"), "{reason}");
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_its_command_with_all_it_started() {
    let node = Node::start().await;
    let pod = node.pod("hangup").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    let count = "ps | grep -c '[s]leep 98765$'";
    for transport in TRANSPORTS {
        let script = "sleep 98765 & sleep 98765 & echo started; wait";
        let mut session = exec(&node, &id, script, ALL, transport).await;
        read_until(session.stdout.as_mut().unwrap(), "started").await;
        wait_for(&node, &id, count, "2").await;
        drop(session);
        wait_for(&node, &id, count, "0").await;
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_its_own_command_only() {
    let node = Node::start().await;
    let pod = node.pod("stuck").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    let mut stuck = Vec::new();
    for transport in FULL {
        stuck.push(exec(&node, &id, "yes", OUTPUT, transport).await);
    }
    for transport in FULL {
        let session = exec(&node, &id, "echo fine", OUTPUT, transport).await;
        assert_eq!(within(session.end()).await.unwrap().stdout, b"fine\n");
    }
    drop(stuck);
    wait_for(&node, &id, "ps | grep -c '[y]es'", "0").await;
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

const LINES: &str = "echo old; while read line; do echo \"got $line\"; done; echo end of input";

#[tokio::test]
async fn clients_attach_and_detach_and_the_container_goes_on() {
    let node = Node::start().await;
    let pod = node.pod("attach").await;
    let mut config = node.script("main", LINES);
    config.stdin = true;
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    wait_for(&node, &id, "ps | grep -c '[w]hile read'", "1").await;
    let mut expected = String::from("old\n");
    for (n, transport) in TRANSPORTS.into_iter().enumerate() {
        let mut session = attach(&node, &id, ALL, transport).await;
        send(&mut session, &format!("{n}\n")).await;
        // Nothing of what was written before.
        let line = format!("got {n}\n");
        assert_eq!(
            read_until(session.stdout.as_mut().unwrap(), &line).await,
            line
        );
        expected += &line;
        drop(session);
    }
    // The end of a client's input is not the container's.
    for transport in FULL {
        let mut session = attach(&node, &id, ALL, transport).await;
        send_all(&mut session, b"").await;
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.status.unwrap().exit_code(), Some(0));
    }
    // Two at a time see the same.
    let mut both = Vec::new();
    for transport in FULL {
        both.push(attach(&node, &id, ALL, transport).await);
    }
    send(&mut both[0], "both\n").await;
    for session in &mut both {
        read_until(session.stdout.as_mut().unwrap(), "got both\n").await;
    }
    expected += "got both\n";
    let status = node.client.container_status(&id).await.unwrap();
    assert_eq!(status.state(), ContainerState::ContainerRunning);
    // Its end ends the clients.
    node.stop_container(&id, 0).await.unwrap();
    for session in both {
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.status.unwrap().exit_code(), Some(0));
    }
    assert_eq!(node.log("main"), expected);
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn the_end_of_input_reaches_a_container_with_stdin_once() {
    let node = Node::start().await;
    let pod = node.pod("once").await;
    for (n, transport) in FULL.into_iter().enumerate() {
        let name = format!("main{n}");
        let mut config = node.script(&name, LINES);
        (config.stdin, config.stdin_once) = (true, true);
        let id = node.create(&pod, config).await.unwrap();
        node.start_container(&id).await.unwrap();
        let mut session = attach(&node, &id, ALL, transport).await;
        send_all(&mut session, b"one\ntwo\n").await;
        let ended = within(session.end()).await.unwrap();
        let output = String::from_utf8(ended.stdout).unwrap();
        assert!(
            output.ends_with("got one\ngot two\nend of input\n"),
            "{output}"
        );
        let status = node.client.wait_exited(&id, PATIENCE).await.unwrap();
        assert_eq!(status.exit_code, 0);
        assert_eq!(
            node.log(&name),
            "old\ngot one\ngot two\nend of input\n",
            "{transport:?}"
        );
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_containers_terminal_can_be_attached_to_and_resized() {
    let node = Node::start().await;
    let pod = node.pod("ttyattach").await;
    let mut config = node.script("main", "exec sh");
    (config.stdin, config.tty) = (true, true);
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    for transport in FULL {
        let mut session = attach(&node, &id, TTY, transport).await;
        session.resize(77, 22).await.unwrap();
        send(
            &mut session,
            "until [ \"$(stty size)\" = '22 77' ]; do sleep 0.1; done; printf 'size=%s.' \"$(stty size)\"; stty size\n",
        )
        .await;
        read_until(session.stdout.as_mut().unwrap(), "size=22 77.").await;
        session.resize(10, 10).await.unwrap();
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

/// Servers on both loopbacks, and one that echoes.
const SERVERS: &str = "mkdir /tmp/www; cd /tmp/www; echo hello >index.html;
    dd if=/dev/urandom of=large bs=1M count=3 2>/dev/null; cp large /tmp/large;
    httpd -p 127.0.0.1:8080 -h /tmp/www; httpd -p '[::1]:8081' -h /tmp/www;
    nc -ll -p 7000 -e cat";
const V4: u16 = 8080;
const V6: u16 = 8081;
const ECHO: u16 = 7000;
/// Nobody listens.
const CLOSED: u16 = 9;

async fn get(mut forward: Forward, path: &str) -> Vec<u8> {
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    forward.output.send(Bytes::from(request)).await.unwrap();
    forward.output.finish().await.unwrap();
    let answer = read_to_end(&mut forward.input).await;
    assert_eq!(read_to_end(&mut forward.error).await, b"");
    let text = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    answer[text + 4..].to_vec()
}

async fn forwarders(node: &Node, pod: &Pod) -> [Forwarder; 2] {
    let dialer = Dialer::default();
    let first = forward_url(node, pod, &[]).await.unwrap();
    let second = forward_url(node, pod, &[]).await.unwrap();
    [
        within(client::forward(&dialer, &first)).await.unwrap(),
        within(client::forward_tunnel(&dialer, &second))
            .await
            .unwrap(),
    ]
}

#[tokio::test]
async fn ports_of_a_pod_are_reached_from_inside() {
    let node = Node::start().await;
    let pod = node.pod("ports").await;
    let id = node.run_script(&pod, "main", SERVERS).await;
    wait_for(
        &node,
        &id,
        "netstat -ltn | grep -cE ':(7000|808[01]) '",
        "3",
    )
    .await;
    let sum = node.exec(&id, "md5sum </tmp/large").await.stdout;
    for forwarder in forwarders(&node, &pod).await {
        for port in [V4, V6] {
            let forward = within(forwarder.open(port)).await.unwrap();
            assert_eq!(get(forward, "/index.html").await, b"hello\n");
        }
        // What refuses says so, and the rest goes on.
        let mut open = within(forwarder.open(ECHO)).await.unwrap();
        let mut refused = within(forwarder.open(CLOSED)).await.unwrap();
        let reason = String::from_utf8(read_to_end(&mut refused.error).await).unwrap();
        assert!(
            reason.contains("port 9") && reason.contains("refused"),
            "{reason}"
        );
        assert!(within(refused.input.recv()).await.is_err());
        open.output.send(Bytes::from("still here\n")).await.unwrap();
        read_until(&mut open.input, "still here\n").await;
        // Large ones, at the same time, and back into the pod to be compared.
        let downloads = (0..8).map(|n| {
            let (forwarder, node, id, sum) = (&forwarder, &node, &id, &sum);
            async move {
                let port = if n % 2 == 0 { V4 } else { V6 };
                let forward = within(forwarder.open(port)).await.unwrap();
                let large = get(forward, "/large").await;
                assert_eq!(large.len(), 3 << 20);
                if n == 0 {
                    let mut session = exec(node, id, "md5sum", ALL, FULL[0]).await;
                    send_all(&mut session, &large).await;
                    let again = within(session.end()).await.unwrap().stdout;
                    assert_eq!(&again, sum);
                }
            }
        });
        within(join_all(downloads)).await;
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn many_forwards_run_at_the_same_time_and_end_with_the_client() {
    let node = Node::start().await;
    let pod = node.pod("many").await;
    let id = node.run_script(&pod, "main", SERVERS).await;
    wait_for(
        &node,
        &id,
        "netstat -ltn | grep -cE ':(7000|808[01]) '",
        "3",
    )
    .await;
    let established = "netstat -tn | grep -c 'ESTABLISHED'";
    for forwarder in forwarders(&node, &pod).await {
        let data = pattern(100_000);
        // One after the other, and each answered: busybox's server lets few wait.
        let mut forwards = Vec::new();
        for _ in 0..60 {
            let mut forward = within(forwarder.open(ECHO)).await.unwrap();
            forward.output.send(Bytes::from("hello\n")).await.unwrap();
            read_until(&mut forward.input, "hello\n").await;
            forwards.push(forward);
        }
        let echoes = forwards.into_iter().map(|mut forward| async {
            let (mut output, data) = (forward.output, &data);
            let send = async {
                for chunk in data.chunks(20_000) {
                    output.send(Bytes::copy_from_slice(chunk)).await.unwrap();
                }
            };
            let read = async {
                let mut all = Vec::new();
                while all.len() < data.len() {
                    all.extend_from_slice(&forward.input.recv().await.unwrap().unwrap());
                }
                all
            };
            let ((), back) = within(async { tokio::join!(send, read) }).await;
            assert!(back == *data);
            (output, forward.input)
        });
        let open = join_all(echoes).await;
        // Both ends of each are in the guest.
        wait_for(&node, &id, established, "120").await;
        drop((open, forwarder));
        wait_for(&node, &id, established, "0").await;
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn clients_without_spdy_name_their_ports_in_the_request() {
    let node = Node::start().await;
    let pod = node.pod("channels").await;
    let id = node.run_script(&pod, "main", SERVERS).await;
    wait_for(
        &node,
        &id,
        "netstat -ltn | grep -cE ':(7000|808[01]) '",
        "3",
    )
    .await;
    let ports = [ECHO, CLOSED];
    for protocol in ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""] {
        let url = forward_url(&node, &pod, &ports).await.unwrap();
        let dialer = Dialer::default();
        let opened = client::forward_channels(&dialer, &url, protocol, &ports);
        let (mut forwards, _carrier) = within(opened).await.unwrap();
        let line = Bytes::from("over a channel\n");
        forwards[0].output.send(line).await.unwrap();
        read_until(&mut forwards[0].input, "over a channel\n").await;
        read_until(&mut forwards[1].error, "refused").await;
    }
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn streams_end_with_the_daemon_and_work_with_the_next_one() {
    let mut node = Node::start().await;
    let pod = node.pod("restart").await;
    let mut config = node.script("main", LINES);
    config.stdin = true;
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    for transport in FULL {
        let mut running = exec(&node, &id, "echo started; sleep 98765", ALL, transport).await;
        read_until(running.stdout.as_mut().unwrap(), "started").await;
        let mut attached = attach(&node, &id, ALL, transport).await;
        send(&mut attached, "before\n").await;
        read_until(attached.stdout.as_mut().unwrap(), "got before\n").await;
        let unused = exec_url(&node, &id, "true", OUTPUT).await.unwrap();

        node.client = node.daemon.kill_and_restart().await;
        assert!(within(running.end()).await.is_err());
        drop(attached);
        assert!(open(&unused, OUTPUT, transport).await.is_err());
        // The command went with its client; the container did not notice.
        wait_for(&node, &id, "ps | grep -c '[s]leep 98765$'", "0").await;
        let session = exec(&node, &id, "echo again; exit 3", OUTPUT, transport).await;
        let ended = within(session.end()).await.unwrap();
        assert_eq!(ended.stdout, b"again\n");
        assert_eq!(ended.status.unwrap().exit_code(), Some(3));
        let mut attached = attach(&node, &id, ALL, transport).await;
        send(&mut attached, "after\n").await;
        read_until(attached.stdout.as_mut().unwrap(), "got after\n").await;
    }
    let expected = "old\ngot before\ngot after\ngot before\ngot after\n";
    node.wait_log("main", expected).await;
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn many_execs_leave_nothing_behind() {
    let node = Node::start().await;
    let pod = node.pod("many").await;
    let id = node.run_script(&pod, "main", "sleep 10000").await;
    let descriptors = || {
        let dir = format!("/proc/{}/fd", node.daemon.pid());
        std::fs::read_dir(dir).unwrap().count()
    };
    let run = async |count: usize| {
        for batch in (0..count).step_by(8) {
            let sessions = (batch..batch + 8).map(|n| {
                let (node, id) = (&node, &id);
                async move {
                    let transport = TRANSPORTS[n % TRANSPORTS.len()];
                    let script = format!("echo {n}; exit {}", n % 100);
                    let session = exec(node, id, &script, ALL, transport).await;
                    let ended = within(session.end()).await.unwrap();
                    assert_eq!(ended.stdout, format!("{n}\n").as_bytes());
                    if let Some(status) = ended.status {
                        assert_eq!(status.exit_code(), Some((n % 100) as u8));
                    }
                }
            });
            join_all(sessions).await;
        }
    };
    // What the first ones leave open is for all.
    run(8).await;
    let before = descriptors();
    run(32).await;
    for _ in 0..100 {
        if descriptors() <= before {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(descriptors() <= before, "{} more", descriptors() - before);
    // The first process, and this one's.
    wait_for(&node, &id, "ls -d /proc/[0-9]* | wc -l", "4").await;
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}
