//! Log files: splitting, terminals, rotation.

use std::{fs, time::Duration};

use hull_proto_cri::v1::{ContainerConfig, ReopenContainerLogRequest};
use hull_tests::logs::{Entry, Stream, output};
use tonic::{Code, Status};

use crate::harness::{Node, Pod};

const PATIENCE: Duration = Duration::from_secs(120);

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

fn read(node: &Node, file: &str) -> Vec<u8> {
    fs::read(node.dir.join("logs").join(file)).unwrap()
}

async fn reopen(node: &Node, id: &str) -> Result<(), Status> {
    let request = ReopenContainerLogRequest {
        container_id: id.into(),
    };
    let mut runtime = node.client.runtime.clone();
    runtime.reopen_container_log(request).await.map(drop)
}

#[tokio::test]
async fn long_lines_are_split_and_terminals_are_raw() {
    let node = Node::start().await;
    let pod = node.pod("lines").await;
    let x = |n: usize| format!("dd if=/dev/zero bs=1 count={n} 2>/dev/null | tr '\\000' x");
    // One line that fits, one that does not, and an end without a line end.
    let script = format!("{}; echo; {}; echo; printf end", x(16384), x(40000));
    let id = node.run_script(&pod, "long", &script).await;
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    let log = read(&node, "long.log");
    let entries: Vec<_> = log
        .split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| Entry::parse(line).unwrap())
        .map(|entry| (entry.partial, entry.text.len()))
        .collect();
    assert_eq!(
        entries,
        [
            (false, 16384),
            (true, 16384),
            (true, 16384),
            (false, 40000 - 2 * 16384),
            (true, 3)
        ]
    );

    let config = ContainerConfig {
        tty: true,
        ..node.script("tty", "tty; echo one; echo two >&2; stty size")
    };
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    let log = read(&node, "tty.log");
    let text = String::from_utf8(output(&log, Stream::Stdout).unwrap()).unwrap();
    assert!(text.starts_with("/dev/pts/"), "{text:?}");
    assert!(text.contains("\r\none\r\ntwo\r\n"), "{text:?}");
    assert_eq!(output(&log, Stream::Stderr).unwrap(), b"");
    end(node, &pod).await;
}

#[tokio::test]
async fn a_rotated_log_loses_and_doubles_nothing() {
    const LINES: usize = 4000;
    let mut node = Node::start().await;
    let pod = node.pod("rotate").await;
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); \
         [ $((i % 200)) != 0 ] || sleep 0.2; done"
    );
    let id = node.run_script(&pod, "talk", &script).await;
    let path = node.dir.join("logs/talk.log");
    let mut parts = Vec::new();
    for n in 0..6 {
        while !fs::metadata(&path).is_ok_and(|m| m.len() > 0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let part = format!("talk.log.{n}");
        // The way of a rotator: rename, then ask. Twice nobody is there to be asked.
        fs::rename(&path, path.with_file_name(&part)).unwrap();
        if n % 3 == 2 {
            node.client = node.daemon.kill_and_restart().await;
        }
        match reopen(&node, &id).await {
            Ok(()) => {}
            // All was written before.
            Err(error) => {
                assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
                parts.push(part);
                break;
            }
        }
        assert!(path.exists());
        parts.push(part);
    }
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    if path.exists() {
        parts.push("talk.log".to_owned());
    }
    let whole: Vec<u8> = parts.iter().flat_map(|part| read(&node, part)).collect();
    let text = String::from_utf8(output(&whole, Stream::Stdout).unwrap()).unwrap();
    let expected: String = (0..LINES).map(|n| format!("line {n}\n")).collect();
    assert_eq!(text, expected);

    // Nothing more will come: an error, and no new file.
    let _ = fs::remove_file(&path);
    let error = reopen(&node, &id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(!path.exists());
    let error = reopen(&node, "feedfeed").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    end(node, &pod).await;
}
