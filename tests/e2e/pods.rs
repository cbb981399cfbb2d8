//! Sandboxes: a VM of their own, a network, and nothing left afterwards.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ListPodSandboxRequest, PodSandboxFilter, PodSandboxState, PodSandboxStateValue, StatusRequest,
    VersionRequest,
};
use hull_tests::client::map;

use crate::harness::{BUSYBOX, Node};

#[tokio::test]
async fn a_container_runs_on_a_kernel_of_its_own() {
    let node = Node::start().await;
    let pod = node.pod("kernel").await;
    assert_eq!(node.vmms().len(), 1);

    let id = node.run_script(&pod, "main", "uname -r; sleep 1000").await;
    let guest = node.exec(&id, "uname -r").await;
    let guest = String::from_utf8(guest.stdout).unwrap();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(guest, host);
    assert!(guest.contains("-hull"), "{guest}");

    // The process is not one of the host's.
    let seen = std::fs::read_dir("/proc").unwrap().flatten().any(|p| {
        std::fs::read_to_string(p.path().join("cmdline")).is_ok_and(|c| c.contains("sleep\x001000"))
    });
    assert!(!seen, "the container's process is visible on the host");

    node.wait_log("main", &guest).await;
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn the_runtime_says_what_it_is_and_that_it_is_ready() {
    let node = Node::start().await;
    let mut runtime = node.client.runtime.clone();
    let version = runtime
        .version(VersionRequest {
            version: "0.1.0".into(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(version.runtime_name, "hull");
    assert_eq!(version.runtime_api_version, "v1");
    let status = runtime.status(StatusRequest { verbose: false }).await;
    let status = status.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    for name in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|c| c.r#type == name).unwrap();
        assert!(condition.status, "{condition:?}");
    }
    assert!(status.runtime_handlers.iter().any(|h| h.name.is_empty()));
    // Without a network configuration it is no longer ready for pods.
    std::fs::remove_file(node.dir.join("net.d/10-test.conflist")).unwrap();
    let status = runtime.status(StatusRequest { verbose: false }).await;
    let conditions = status.unwrap().into_inner().status.unwrap().conditions;
    let network = conditions.iter().find(|c| c.r#type == "NetworkReady");
    assert!(!network.unwrap().status);
    node.finish().await;
}

#[tokio::test]
async fn a_pod_is_listed_filtered_and_stopped_twice() {
    let node = Node::start().await;
    node.client.pull(BUSYBOX).await.unwrap();
    let mut config = node.sandbox("listed");
    config.labels = map(&[("app", "a"), ("tier", "b")]);
    config.annotations = map(&[("note", "kept as it is")]);
    let pod = node.run_sandbox(config).await.unwrap();

    let status = node.client.pod_status(&pod.id).await.unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.annotations, map(&[("note", "kept as it is")]));
    assert!(status.created_at > 0);
    let ip = status.network.unwrap().ip;
    assert!(ip.starts_with("10.86."), "{ip}");
    // Ids may be shortened.
    let short = node.client.pod_status(&pod.id[..12]).await.unwrap();
    assert_eq!(short.id, pod.id);

    let list = |filter: PodSandboxFilter| {
        let mut runtime = node.client.runtime.clone();
        async move {
            let request = ListPodSandboxRequest {
                filter: Some(filter),
            };
            let answer = runtime.list_pod_sandbox(request).await.unwrap();
            answer.into_inner().items.len()
        }
    };
    let labels = |pairs| PodSandboxFilter {
        label_selector: map(pairs),
        ..Default::default()
    };
    assert_eq!(list(labels(&[("app", "a"), ("tier", "b")])).await, 1);
    assert_eq!(list(labels(&[("app", "a"), ("tier", "c")])).await, 0);
    let not_ready = || PodSandboxFilter {
        state: Some(PodSandboxStateValue {
            state: PodSandboxState::SandboxNotready.into(),
        }),
        ..Default::default()
    };
    assert_eq!(list(not_ready()).await, 0);

    node.stop_sandbox(&pod.id).await.unwrap();
    node.stop_sandbox(&pod.id).await.unwrap();
    assert_eq!(list(not_ready()).await, 1);
    assert!(node.vmms().is_empty());
    node.remove_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    assert_eq!(list(PodSandboxFilter::default()).await, 0);
    node.finish().await;
}

#[tokio::test]
async fn the_host_and_a_pod_talk_over_the_network() {
    let node = Node::start().await;
    let pod = node.pod("network").await;
    let status = node.client.pod_status(&pod.id).await.unwrap();
    let ip = status.network.unwrap().ip;
    let server = "while :; do echo pong | nc -l -p 8080; done";
    let id = node.run_script(&pod, "server", server).await;

    let deadline = Instant::now() + Duration::from_secs(30);
    let mut answer = String::new();
    while answer != "pong\n" {
        assert!(Instant::now() < deadline, "no answer from {ip}:8080");
        if let Ok(stream) = TcpStream::connect((ip.as_str(), 8080)) {
            stream
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            answer.clear();
            // The server keeps the connection until we close it.
            let _ = BufReader::new(stream).read_line(&mut answer);
        }
        std::thread::sleep(Duration::from_millis(50));
    }

    // And the other way, with enough bytes to fill every queue.
    let listener = std::net::TcpListener::bind("10.86.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut total = 0;
        let mut sum = 0u64;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = stream.read(&mut buffer).unwrap();
            if n == 0 {
                return (total, sum);
            }
            total += n;
            sum += buffer[..n].iter().map(|b| u64::from(*b)).sum::<u64>();
        }
    });
    let send = format!(
        "dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\000' '\\003' | nc 10.86.0.1 {port}"
    );
    assert_eq!(node.exec(&id, &send).await.exit_code, 0);
    assert_eq!(receiver.join().unwrap(), (4 << 20, 3 * (4 << 20)));

    let listener = std::net::TcpListener::bind("10.86.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let sender = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&vec![5; 4 << 20]).unwrap();
    });
    let receive = format!("nc 10.86.0.1 {port} </dev/null | md5sum");
    let sum = node.exec(&id, &receive).await;
    sender.join().unwrap();
    let expected = node.exec(
        &id,
        "dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\000' '\\005' | md5sum",
    );
    assert_eq!(
        String::from_utf8_lossy(&sum.stdout),
        String::from_utf8_lossy(&expected.await.stdout)
    );

    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn pods_are_kept_apart() {
    let node = Node::start().await;
    let one = node.pod("one").await;
    let two = node.pod("two").await;
    let a = node
        .run_script(&one, "a", "echo secret > /dev/shm/x; hostname; sleep 1000")
        .await;
    let b = node.run_script(&two, "b", "hostname; sleep 1000").await;
    assert_eq!(node.exec(&a, "cat /dev/shm/x").await.stdout, b"secret\n");
    assert_ne!(node.exec(&b, "cat /dev/shm/x").await.exit_code, 0);
    assert_eq!(node.exec(&a, "hostname").await.stdout, b"one\n");
    assert_eq!(node.exec(&b, "hostname").await.stdout, b"two\n");
    assert_eq!(node.vmms().len(), 2);

    // The end of one leaves the other alone.
    node.stop_sandbox(&one.id).await.unwrap();
    node.remove_sandbox(&one.id).await.unwrap();
    assert_eq!(
        node.exec(&b, "echo still here").await.stdout,
        b"still here\n"
    );
    node.stop_sandbox(&two.id).await.unwrap();
    node.remove_sandbox(&two.id).await.unwrap();
    node.finish().await;
}
