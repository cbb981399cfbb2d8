//! Processes that close their outputs and live on, and connections that are lost.

use std::{fs, time::Duration};

use hull_pod::{Pods, SessionStreams};
use hull_spec::id::PodId;
use tokio::{
    io::AsyncReadExt,
    time::{sleep, timeout},
};

use crate::common::{TestNode, container, daemon, end, eventually};

const OUTPUT: SessionStreams = SessionStreams {
    stdin: false,
    stdout: true,
    stderr: true,
    tty: false,
};

/// Many times the longest pause between two attempts to connect.
const LONG: Duration = Duration::from_secs(3);

async fn start(node: &TestNode, pods: &Pods, args: &[&str]) -> (PodId, String) {
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let spec = container("app", args);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    (pod, id.to_string())
}

/// How often an output was connected to.
fn connections(node: &TestNode, pod: &PodId) -> usize {
    let run = node.config.state.join("pods").join(pod.as_str());
    let text = fs::read_to_string(run.join("outputs")).unwrap_or_default();
    text.lines().count()
}

#[test]
fn outputs_that_a_container_closed_are_not_connected_to_again() {
    let node = TestNode::new();
    let log = ["stdout F hello", "stderr P oh"];
    let first = daemon();
    let (pod, id) = first.block_on(async {
        let pods = node.open().await;
        let args = ["out:hello\\n", "sleep:100", "err:oh", "close", "wait"];
        let (pod, id) = start(&node, &pods, &args).await;
        // The rest of a line may still come, as far as the log knows.
        eventually("output", async || !node.log("app.log").is_empty()).await;
        sleep(LONG).await;
        assert_eq!(connections(&node, &pod), 2);
        (pod, id)
    });
    end(first);

    daemon().block_on(async {
        let pods = node.open().await;
        sleep(LONG).await;
        assert_eq!(connections(&node, &pod), 4);
        // Who attaches hears nothing more, and of the end when the container ends.
        let mut attached = pods.attach(&id, OUTPUT).await.unwrap();
        let mut stdout = attached.stdout.take().unwrap();
        let mut heard = Vec::new();
        let read = timeout(Duration::from_millis(100), stdout.read_to_end(&mut heard));
        read.await.unwrap_err();
        pods.stop_container(&id, Duration::ZERO).await.unwrap();
        stdout.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"");
        assert_eq!(node.log("app.log"), log);
        assert_eq!(connections(&node, &pod), 4);
    });
}

#[tokio::test]
async fn a_command_that_closes_its_outputs_runs_to_its_end() {
    let node = TestNode::new();
    let pods = node.open().await;
    let (pod, id) = start(&node, &pods, &["close", "wait"]).await;
    eventually("the log's", async || connections(&node, &pod) == 2).await;
    let args = ["out:hello", "close", "sleep:2500", "exit:3"];
    let args = args.map(str::to_owned).to_vec();
    let mut session = pods.exec(&id, args.clone(), OUTPUT).await.unwrap();
    let mut heard = Vec::new();
    let mut stdout = session.stdout.take().unwrap();
    stdout.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"hello");
    assert_eq!(session.control.exited().await.unwrap(), 3);
    assert_eq!(connections(&node, &pod), 4);
    let output = pods.exec_sync(&id, args, None).await.unwrap();
    assert_eq!((output.exit_code, output.stdout), (3, b"hello".to_vec()));
    assert_eq!(connections(&node, &pod), 6);
}

#[tokio::test]
async fn a_connection_without_an_end_of_output_was_lost() {
    let node = TestNode::new();
    let pods = node.open().await;
    let args = ["lie:no-end", "out:hello\\n", "close", "wait"];
    let (pod, id) = start(&node, &pods, &args).await;
    eventually("again", async || connections(&node, &pod) > 4).await;
    pods.stop_container(&id, Duration::ZERO).await.unwrap();
    assert_eq!(node.log("app.log"), ["stdout F hello"]);
}

#[tokio::test]
async fn a_guest_that_never_sends_what_it_told_is_asked_at_a_bounded_rate() {
    let node = TestNode::new();
    let pods = node.open().await;
    let args = ["lie:no-end", "lie:end", "out:hello\\n", "exit:0"];
    let (pod, id) = start(&node, &pods, &args).await;
    sleep(LONG).await;
    // Each of two outputs, with pauses of 50 ms that double.
    let tries = connections(&node, &pod);
    assert!((4..40).contains(&tries), "{tries}");
    pods.remove_container(&id).await.unwrap();
}
