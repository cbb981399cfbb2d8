//! Exec, attach and dial.

use std::time::Duration;

use hull_pod::{Pods, SessionOutput, SessionStreams};
use hull_spec::{
    error::{ErrorKind, PodError},
    id::PodId,
    info::ContainerState,
    spec::ContainerSpec,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{TestNode, container, eventually, kill_pid};

const ALL: SessionStreams = SessionStreams {
    stdin: true,
    stdout: true,
    stderr: true,
    tty: false,
};
const TERMINAL: SessionStreams = SessionStreams {
    stderr: false,
    tty: true,
    ..ALL
};
const OUTPUT: SessionStreams = SessionStreams {
    stdin: false,
    ..ALL
};

async fn run(pods: &Pods, pod: &PodId, spec: ContainerSpec) -> String {
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    id.to_string()
}

async fn pod_with(node: &TestNode, spec: ContainerSpec) -> (Pods, PodId, String) {
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = run(&pods, &pod, spec).await;
    (pods, pod, id)
}

fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|a| (*a).to_owned()).collect()
}

async fn read_all(output: &mut Option<SessionOutput>) -> String {
    let mut text = String::new();
    let output = output.as_mut().unwrap();
    output.read_to_string(&mut text).await.unwrap();
    text
}

async fn read_some(output: &mut Option<SessionOutput>, length: usize) -> String {
    let mut bytes = vec![0; length];
    output
        .as_mut()
        .unwrap()
        .read_exact(&mut bytes)
        .await
        .unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn exec_carries_input_output_sizes_and_the_exit() {
    let node = TestNode::new();
    let (pods, _, id) = pod_with(&node, container("app", &["wait"])).await;

    let args = words(&["cat", "err:oops", "exit:7"]);
    let mut session = pods.exec(&id, args, ALL).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"hello").await.unwrap();
    assert_eq!(read_some(&mut session.stdout, 5).await, "hello");
    stdin.shutdown().await.unwrap();
    assert_eq!(read_all(&mut session.stdout).await, "");
    assert_eq!(read_all(&mut session.stderr).await, "oops");
    assert_eq!(session.control.exited().await.unwrap(), 7);
    assert!(session.control.exited().await.is_err());

    let mut session = pods.exec(&id, words(&["cat"]), TERMINAL).await.unwrap();
    session.control.resize(80, 24).await.unwrap();
    assert_eq!(read_some(&mut session.stdout, 6).await, "80x24\n");
    assert!(session.stderr.is_none());
    drop(session.stdin.take());
    assert_eq!(session.control.exited().await.unwrap(), 0);

    // Output that nobody wants does not block the command, nor does a client that hung up.
    let args = words(&["flood:3000000", "err:end"]);
    let stderr_alone = SessionStreams {
        stdout: false,
        ..OUTPUT
    };
    let mut session = pods.exec(&id, args.clone(), stderr_alone).await.unwrap();
    assert!(session.stdout.is_none() && session.stdin.is_none());
    assert_eq!(read_all(&mut session.stderr).await, "end");
    assert_eq!(session.control.exited().await.unwrap(), 0);
    let mut session = pods.exec(&id, args, OUTPUT).await.unwrap();
    drop(session.stdout.take());
    assert_eq!(session.control.exited().await.unwrap(), 0);
}

#[tokio::test]
async fn exec_refuses_what_can_not_be() {
    let node = TestNode::new();
    let (pods, pod, id) = pod_with(&node, container("app", &["wait"])).await;
    let kind = |error: PodError| error.kind();
    let exec = async |id: &str, args: &[&str], streams| {
        pods.exec(id, words(args), streams)
            .await
            .map(drop)
            .unwrap_err()
    };

    let missing = exec(&id, &["cannot-start"], OUTPUT).await;
    assert_eq!(missing.kind(), ErrorKind::FailedPrecondition);
    assert!(missing.to_string().contains("not found"), "{missing}");
    let invalid = ErrorKind::InvalidArgument;
    assert_eq!(kind(exec(&id, &[], OUTPUT).await), invalid);
    let none = SessionStreams::default();
    assert_eq!(kind(exec(&id, &["wait"], none).await), invalid);
    let both = SessionStreams {
        stderr: true,
        ..TERMINAL
    };
    assert_eq!(kind(exec(&id, &["wait"], both).await), invalid);
    assert_eq!(
        kind(exec("feed", &["wait"], OUTPUT).await),
        ErrorKind::NotFound
    );
    let ended = run(&pods, &pod, container("short", &["exit:0"])).await;
    pods.wait_container(&ended).await.unwrap();
    assert_eq!(
        kind(exec(&ended, &["wait"], OUTPUT).await),
        ErrorKind::FailedPrecondition
    );

    // A pod has room for a limited number of sessions, and gets it back.
    let mut sessions = Vec::new();
    let full = loop {
        match pods.exec(&id, words(&["wait"]), OUTPUT).await {
            Ok(session) => sessions.push(session),
            Err(error) => break error,
        }
    };
    assert_eq!(kind(full), ErrorKind::ResourceExhausted);
    assert!(sessions.len() >= 100);
    sessions.clear();
    pods.exec(&id, words(&["wait"]), OUTPUT).await.unwrap();
}

#[tokio::test]
async fn an_exec_that_is_left_is_killed() {
    let node = TestNode::new();
    let (pods, _, id) = pod_with(&node, container("app", &["wait"])).await;
    let mut session = pods.exec(&id, words(&["wait"]), OUTPUT).await.unwrap();
    let mut stdout = session.stdout.take();
    drop(session);
    // Its end closes what is still held of it.
    assert_eq!(read_all(&mut stdout).await, "");
    pods.stop_container(&id, Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn the_end_of_the_vm_ends_sessions() {
    let node = TestNode::new();
    let (pods, pod, id) = pod_with(&node, container("app", &["wait"])).await;
    let mut exec = pods.exec(&id, words(&["wait"]), OUTPUT).await.unwrap();
    let mut attached = pods.attach(&id, OUTPUT).await.unwrap();
    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
    kill_pid(vm.pid);
    assert_eq!(read_all(&mut exec.stdout).await, "");
    let gone = exec.control.exited().await.unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::FailedPrecondition);
    assert_eq!(read_all(&mut attached.stdout).await, "");
    attached.control.ended().await;
}

#[tokio::test]
async fn attached_clients_see_what_comes_and_the_log_has_all() {
    let node = TestNode::new();
    let spec = ContainerSpec {
        stdin: true,
        ..container("app", &["out:before\\n", "cat"])
    };
    let (pods, _, id) = pod_with(&node, spec).await;
    eventually("the first line", async || {
        node.log("app.log") == ["stdout F before"]
    })
    .await;

    let mut one = pods.attach(&id, ALL).await.unwrap();
    let mut two = pods.attach(&id, ALL).await.unwrap();
    let mut stdin = one.stdin.take().unwrap();
    stdin.write_all(b"first\n").await.unwrap();
    for session in [&mut one, &mut two] {
        assert_eq!(read_some(&mut session.stdout, 6).await, "first\n");
    }
    // The container was not created with stdin_once: it outlives both its input and its client.
    stdin.shutdown().await.unwrap();
    drop((stdin, one));
    let mut stdin = two.stdin.take().unwrap();
    stdin.write_all(b"second\n").await.unwrap();
    assert_eq!(read_some(&mut two.stdout, 7).await, "second\n");
    let info = pods.container(&id).await.unwrap();
    assert_eq!(info.state, ContainerState::Running);

    pods.stop_container(&id, Duration::ZERO).await.unwrap();
    assert_eq!(read_all(&mut two.stdout).await, "");
    assert_eq!(read_all(&mut two.stderr).await, "");
    two.control.ended().await;
    assert_eq!(
        node.log("app.log"),
        ["stdout F before", "stdout F first", "stdout F second"]
    );
    let late = pods.attach(&id, ALL).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_nothing_up() {
    let node = TestNode::new();
    let spec = ContainerSpec {
        stdin: true,
        stdin_once: true,
        ..container("app", &["cat", "flood:5000000", "out:\\nend\\n"])
    };
    let (pods, _, id) = pod_with(&node, spec).await;
    let mut slow = pods.attach(&id, ALL).await.unwrap();
    // The end of its input is the end of the container's.
    drop(slow.stdin.take());
    let info = pods.wait_container(&id).await.unwrap();
    assert_eq!(info.exit_code, 0);
    assert_eq!(node.log("app.log").last().unwrap(), "stdout F end");
    let mut seen = Vec::new();
    let mut stdout = slow.stdout.take().unwrap();
    let cut = stdout.read_to_end(&mut seen).await.unwrap_err();
    assert!(cut.to_string().contains("too slowly"), "{cut}");
    assert!(seen.iter().all(|b| *b == b'x'));
}

#[tokio::test]
async fn attach_asks_for_what_the_container_has() {
    let node = TestNode::new();
    let spec = ContainerSpec {
        tty: true,
        ..container("app", &["wait"])
    };
    let (pods, _, id) = pod_with(&node, spec).await;
    let wrong = pods.attach(&id, ALL).await.unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::InvalidArgument);
    let mut session = pods.attach(&id, TERMINAL).await.unwrap();
    assert!(session.stdin.is_none(), "the container has no input");
    assert!(session.stderr.is_none());
    session.control.resize(132, 50).await.unwrap();
    assert_eq!(read_some(&mut session.stdout, 7).await, "132x50\n");
}

#[tokio::test]
async fn a_port_is_reached_and_half_closes_go_through() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let mut connection = pods.dial(pod.as_str(), 7).await.unwrap();
    connection.write_all(b"ping").await.unwrap();
    connection.shutdown().await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ping");

    let refused = pods.dial(pod.as_str(), 8).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
    assert!(refused.to_string().contains("connection refused"));

    let mut connections = Vec::new();
    let full = loop {
        match pods.dial(pod.as_str(), 7).await {
            Ok(connection) => connections.push(connection),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::ResourceExhausted);
    connections.clear();
    pods.dial(pod.as_str(), 7).await.unwrap();
    pods.stop_sandbox(pod.as_str()).await.unwrap();
    let stopped = pods.dial(pod.as_str(), 7).await.unwrap_err();
    assert_eq!(stopped.kind(), ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn a_rotated_log_goes_on_in_a_new_file() {
    let node = TestNode::new();
    let spec = ContainerSpec {
        stdin: true,
        stdin_once: true,
        ..container("app", &["cat", "out:end"])
    };
    let (pods, _, id) = pod_with(&node, spec).await;
    let path = pods.container(&id).await.unwrap().log_path;
    let mut session = pods.attach(&id, ALL).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    let mut parts = Vec::new();
    for n in 0..500 {
        let line = format!("line {n}\n");
        stdin.write_all(line.as_bytes()).await.unwrap();
        // Some lines are on their way.
        if n % 50 == 49 {
            let renamed = format!("app.log.{n}");
            std::fs::rename(&path, path.with_file_name(&renamed)).unwrap();
            pods.reopen_log(&id).await.unwrap();
            assert!(path.exists());
            parts.push(renamed);
        }
    }
    drop(stdin);
    pods.wait_container(&id).await.unwrap();
    parts.push("app.log".to_owned());
    let lines: Vec<_> = parts.iter().flat_map(|part| node.log(part)).collect();
    let mut expected: Vec<_> = (0..500).map(|n| format!("stdout F line {n}")).collect();
    expected.push("stdout P end".to_owned());
    assert_eq!(lines, expected);

    std::fs::remove_file(&path).unwrap();
    let over = pods.reopen_log(&id).await.unwrap_err();
    assert_eq!(over.kind(), ErrorKind::FailedPrecondition);
    assert!(!path.exists());
    let unknown = pods.reopen_log("feed").await.unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn commands_without_end_keep_no_other_pod_from_its_probes() {
    let node = TestNode::new();
    let (pods, _, id) = pod_with(&node, container("app", &["wait"])).await;
    let other = pods.run_sandbox(node.sandbox("other")).await.unwrap();
    let other = run(&pods, &other, container("app", &["wait"])).await;

    let exec = |id: &str, args: &[&str]| {
        let (pods, id, args) = (pods.clone(), id.to_owned(), words(args));
        tokio::spawn(async move { pods.exec_sync(&id, args, None).await })
    };
    // They write what they may and do not end.
    let mut loud: Vec<_> = (0..6)
        .map(|_| exec(&id, &["flood:20000000", "wait"]))
        .collect();
    let is_over = tokio::task::JoinHandle::is_finished;
    eventually("too much output", async || {
        loud.iter().filter(|command| is_over(command)).count() >= 2
    })
    .await;
    for command in loud.extract_if(.., |command| is_over(command)) {
        let error = command.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    }
    let hung: Vec<_> = (0..40).map(|_| exec(&id, &["wait"])).collect();
    eventually("too many commands", async || {
        hung.iter().filter(|command| is_over(command)).count() >= 8 + loud.len()
    })
    .await;
    for _ in 0..20 {
        let output = exec(&other, &["out:healthy"]).await.unwrap().unwrap();
        assert_eq!(output.stdout, b"healthy");
    }
    hung.iter()
        .chain(&loud)
        .for_each(tokio::task::JoinHandle::abort);
}
