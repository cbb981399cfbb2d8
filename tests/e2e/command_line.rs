//! `hull check` and `hull run`, as a person uses them.

use std::process::{Command, Output};

use crate::harness::{BUSYBOX, Node};

fn hull(node: &Node, arguments: &[&str]) -> Output {
    Command::new("hull")
        .args(["--config", node.dir.join("hull.toml").to_str().unwrap()])
        .args(arguments)
        .output()
        .unwrap()
}

#[tokio::test]
async fn check_finds_that_this_host_can_run_microvms() {
    let node = Node::start().await;
    let output = hull(&node, &["check"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("FAIL"), "{text}");

    std::fs::remove_file(node.dir.join("net.d/10-test.conflist")).unwrap();
    let output = hull(&node, &["check"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("FAIL") && text.contains("CNI"), "{text}");
    node.finish().await;
}

#[tokio::test]
async fn run_passes_output_and_exit_code_on_and_cleans_up() {
    let node = Node::start().await;
    let output = hull(
        &node,
        &[
            "run",
            BUSYBOX,
            "--",
            "/bin/sh",
            "-c",
            "echo hi; uname -r; exit 9",
        ],
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let progress = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(9), "{text}{progress}");
    assert!(text.starts_with("hi\n") && text.contains("-hull"), "{text}");
    node.assert_no_pod_left();

    let output = hull(&node, &["run", "registry.test/demo/absent"]);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("absent"), "{text}");
    node.finish().await;
}
