//! What goes wrong: a clear error, and nothing left behind.

use std::{fs, time::Duration};

use hull_spec::{
    error::{ErrorKind, PodError},
    info::{ContainerState, SandboxState},
    spec::{MountPropagation, MountSource, MountSpec, NamespaceMode},
};

use crate::common::{TestNode, container, eventually, kill_pid};

/// A sandbox on this node fails with this kind and text, leaves nothing, and can be started once
/// the fault is mended.
async fn fails(node: &TestNode, kind: ErrorKind, text: &str, mend: impl FnOnce(&TestNode)) {
    let pods = node.open().await;
    let error = pods.run_sandbox(node.sandbox("web")).await.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
    assert!(pods.sandboxes().await.is_empty());
    assert_eq!(node.leftovers(), [""; 0]);
    mend(node);
    pods.run_sandbox(node.sandbox("web")).await.unwrap();
}

#[tokio::test]
async fn a_missing_kernel_root_or_vmm_is_named() {
    for which in 0..3 {
        let mut node = TestNode::new();
        let absent = node.dir.path().join("absent");
        let config = &mut node.config;
        let path = match which {
            0 => &mut config.kernel,
            1 => &mut config.guest_root,
            _ => &mut config.vmm,
        };
        let real = std::mem::replace(path, absent.clone());
        fails(
            &node,
            ErrorKind::FailedPrecondition,
            absent.to_str().unwrap(),
            |_| {
                std::os::unix::fs::symlink(&real, &absent).unwrap();
            },
        )
        .await;
    }
}

#[tokio::test]
async fn a_vm_that_is_too_large_is_refused() {
    let node = TestNode::new();
    let pods = node.open().await;
    let mut spec = node.sandbox("web");
    spec.resources = Some(hull_spec::spec::Resources {
        memory_limit_bytes: 1 << 50,
        ..hull_spec::spec::Resources::default()
    });
    let error = pods.run_sandbox(spec).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
    assert!(error.to_string().contains("MiB"), "{error}");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_network_that_fails_takes_the_rest_with_it() {
    let node = TestNode::new();
    node.network.faults.lock().unwrap().setup = true;
    fails(&node, ErrorKind::Internal, "network", |node| {
        node.network.faults.lock().unwrap().setup = false;
    })
    .await;
}

#[tokio::test]
async fn what_could_not_be_undone_is_undone_before_the_next_try() {
    let node = TestNode::new();
    let pods = node.open().await;
    {
        let mut faults = node.network.faults.lock().unwrap();
        (faults.setup, faults.teardown) = (true, true);
    }
    pods.run_sandbox(node.sandbox("web")).await.unwrap_err();
    let left = pods.sandboxes().await;
    assert_eq!(left.len(), 1);

    // It can't be undone still, which is what the next one is told.
    node.network.faults.lock().unwrap().setup = false;
    let error = pods.run_sandbox(node.sandbox("web")).await.unwrap_err();
    assert!(error.to_string().contains("network"), "{error}");

    node.network.faults.lock().unwrap().teardown = false;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let known = pods.sandboxes().await;
    assert_eq!(known.len(), 1);
    assert_eq!(known[0].id, pod);
    assert_ne!(pod, left[0].id);
}

#[tokio::test]
async fn a_vmm_that_ends_at_once_takes_the_rest_with_it() {
    let mut node = TestNode::new();
    let real = std::mem::replace(&mut node.config.vmm, "/bin/false".into());
    let program = node.dir.path().join("vmm");
    std::os::unix::fs::symlink("/bin/false", &program).unwrap();
    node.config.vmm = program.clone();
    fails(&node, ErrorKind::Unavailable, "reach the VM", |_| {
        fs::remove_file(&program).unwrap();
        std::os::unix::fs::symlink(real, &program).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_disk_that_cannot_be_made_takes_the_rest_with_it() {
    let mut node = TestNode::new();
    // mkfs.ext4 refuses so small a disk.
    node.config.scratch_bytes = 4096;
    let pods = node.open().await;
    let error = pods.run_sandbox(node.sandbox("web")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_vm_that_is_refused_is_undone() {
    for (script, kind, text) in [
        (
            r#"{"refuse_configure":"no_resources"}"#,
            ErrorKind::ResourceExhausted,
            "configure the VM",
        ),
        (
            r#"{"refuse_start":"no_resources"}"#,
            ErrorKind::ResourceExhausted,
            "start the VM",
        ),
        (
            r#"{"refuse_start":"kvm"}"#,
            ErrorKind::FailedPrecondition,
            "as the script says",
        ),
        (
            r#"{"refuse_configure":"internal"}"#,
            ErrorKind::Internal,
            "run the VM",
        ),
        (
            r#"{"die_at_start":true}"#,
            ErrorKind::Unavailable,
            "reach the VM",
        ),
        (
            r#"{"refuse_plug":"internal"}"#,
            ErrorKind::Internal,
            "run the VM",
        ),
        (r#"{"refuse":["configure"]}"#, ErrorKind::Internal, "agent"),
    ] {
        let mut node = TestNode::new();
        node.config.max_memory_mib = 1024;
        node.script(script);
        fails(&node, kind, text, |node| node.script("")).await;
    }
}

#[tokio::test]
async fn a_guest_that_does_not_boot_is_given_up() {
    let mut node = TestNode::new();
    node.config.boot_timeout = Duration::from_millis(300);
    node.script(r#"{"no_agent":true}"#);
    let pods = node.open().await;
    let error = pods.run_sandbox(node.sandbox("web")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("of at most 0.3 s"), "{error}");
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_guest_that_boots_slowly_is_waited_for() {
    let node = TestNode::new();
    node.script(r#"{"attempts":5}"#);
    let pods = node.open().await;
    pods.run_sandbox(node.sandbox("web")).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_undone_stays_visible_until_it_can() {
    let node = TestNode::new();
    let pods = node.open().await;
    node.script(r#"{"die_at_start":true}"#);
    node.network.faults.lock().unwrap().teardown = true;
    let error = pods.run_sandbox(node.sandbox("web")).await.unwrap_err();
    assert!(matches!(error, PodError::Undo { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    eventually("listing", async || pods.sandboxes().await.len() == 1).await;
    let info = pods.sandboxes().await.remove(0);
    assert_eq!(info.state, SandboxState::NotReady);
    assert!(
        info.message.contains("undoing it failed"),
        "{}",
        info.message
    );

    let id = info.id.to_string();
    assert!(pods.stop_sandbox(&id).await.is_err());
    assert!(pods.remove_sandbox(&id).await.is_err());
    node.network.faults.lock().unwrap().teardown = false;
    pods.stop_sandbox(&id).await.unwrap();
    pods.remove_sandbox(&id).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
    assert!(pods.sandboxes().await.is_empty());
}

#[tokio::test]
async fn a_container_that_fails_leaves_nothing_in_its_pod() {
    for (script, text) in [
        (r#"{"refuse":["attach_storage"]}"#, "as the script says"),
        (r#"{"refuse":["create"]}"#, "agent"),
        (r#"{"refuse_attach":"internal"}"#, "run the VM"),
    ] {
        let node = TestNode::new();
        node.script(script);
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let spec = container("app", &["wait"]);
        for _ in 0..2 {
            let failed = pods.create_container(pod.as_str(), spec.clone()).await;
            let error = failed.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Internal, "{error:?} {text}");
        }
        assert!(pods.containers().await.is_empty());
        assert!(node.images.leases().is_empty());
        let attached = pods.vm_metrics(pod.as_str()).await.unwrap().exits[0].1;
        assert_eq!(attached, 5, "only the disks of the sandbox");
    }
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_undoes_its_container() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let mut spec = container("app", &["wait"]);
    fs::create_dir_all(node.log_directory().join("app.log")).unwrap();
    let error = pods.create_container(pod.as_str(), spec.clone()).await;
    assert!(error.unwrap_err().to_string().contains("log"));
    assert!(node.images.leases().is_empty());
    let attached = pods.vm_metrics(pod.as_str()).await.unwrap().exits[0].1;
    assert_eq!(attached, 5);
    spec.log_path = "other.log".into();
    pods.create_container(pod.as_str(), spec).await.unwrap();
}

#[tokio::test]
async fn wrong_requests_are_refused_by_field() {
    let node = TestNode::new();
    let pods = node.open().await;
    let mut nameless = node.sandbox("web");
    nameless.metadata.name.clear();
    let mut on_node = node.sandbox("web");
    on_node.namespaces.network = NamespaceMode::Node;
    for (spec, field) in [(nameless, "pod name"), (on_node, "network namespace")] {
        let error = pods.run_sandbox(spec).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(field), "{error}");
    }

    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let mut unknown = container("app", &["x"]);
    unknown.image.image = "nope".into();
    let mut mounted = container("app", &["x"]);
    mounted.mounts.push(MountSpec {
        container_path: "/data".into(),
        source: MountSource::Host("/srv".into()),
        readonly: false,
        recursive_readonly: false,
        propagation: MountPropagation::Bidirectional,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    });
    for (spec, kind, text) in [
        (container("app", &[]), ErrorKind::InvalidArgument, "command"),
        (unknown, ErrorKind::NotFound, "image nope"),
        (mounted, ErrorKind::InvalidArgument, "mount 0: propagation"),
    ] {
        let error = pods.create_container(pod.as_str(), spec).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
    assert!(pods.containers().await.is_empty());
}

#[tokio::test]
async fn a_process_that_cannot_be_started_is_an_exited_container() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = pods
        .create_container(pod.as_str(), container("app", &["cannot-start"]))
        .await
        .unwrap();
    let error = pods.start_container(id.as_str()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains("/nope"), "{error}");
    // For a person; kubelet is told what it is of other runtimes.
    assert_eq!(error.exit_code(), Some(127));
    let info = pods.container(id.as_str()).await.unwrap();
    assert_eq!(info.state, ContainerState::Exited);
    assert_eq!((info.exit_code, info.reason.as_str()), (128, "StartError"));
    assert!(info.message.contains("/nope"), "{}", info.message);
    pods.remove_container(id.as_str()).await.unwrap();
}

#[tokio::test]
async fn a_process_whose_start_was_not_answered_does_not_run_on() {
    let mut node = TestNode::new();
    node.config.agent_timeout = Duration::from_secs(3);
    node.script(r#"{"lose_once":["start"]}"#);
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = pods
        .create_container(pod.as_str(), container("app", &["wait"]))
        .await
        .unwrap();
    let error = pods.start_container(id.as_str()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    // Nobody is told that it ended before it did.
    let state = async || pods.container(id.as_str()).await.unwrap().state;
    eventually("its end", async || state().await == ContainerState::Exited).await;
    assert!(node.noted(pod.as_str(), "exited"));
    let info = pods.container(id.as_str()).await.unwrap();
    assert_eq!((info.exit_code, info.reason.as_str()), (137, "Error"));
}

#[tokio::test]
async fn a_vm_that_dies_takes_its_containers_and_can_be_stopped() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let args = ["out:before\\n", "wait"];
    let running = pods
        .create_container(pod.as_str(), container("running", &args))
        .await
        .unwrap();
    pods.start_container(running.as_str()).await.unwrap();
    let waiting = pods
        .create_container(pod.as_str(), container("waiting", &["wait"]))
        .await
        .unwrap();
    eventually("output", async || !node.log("running.log").is_empty()).await;
    let exec = {
        let (pods, id) = (pods.clone(), running.to_string());
        tokio::spawn(async move { pods.exec_sync(&id, vec!["wait".into()], None).await })
    };
    eventually("a command", async || node.noted(pod.as_str(), "exec")).await;

    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
    kill_pid(vm.pid);
    let info = pods.wait_container(running.as_str()).await.unwrap();
    assert_eq!((info.exit_code, info.reason.as_str()), (137, "Error"));
    assert!(info.message.contains("killed"), "{}", info.message);
    assert!(exec.await.unwrap().is_err());
    eventually("not ready", async || {
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        info.state == SandboxState::NotReady && info.vm.is_none()
    })
    .await;
    let info = pods.wait_container(waiting.as_str()).await.unwrap();
    assert_eq!(info.state, ContainerState::Exited);
    assert_eq!(node.log("running.log"), ["stdout F before"]);

    // The network is kept for StopPodSandbox.
    assert_eq!(node.network.up().len(), 1);
    pods.stop_container(running.as_str(), Duration::ZERO)
        .await
        .unwrap();
    pods.remove_container(running.as_str()).await.unwrap();
    pods.stop_sandbox(pod.as_str()).await.unwrap();
    assert_eq!(node.network.up().len(), 0);
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_vmm_that_makes_a_forbidden_call_ends_with_that_as_the_reason() {
    let node = TestNode::new();
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = pods
        .create_container(pod.as_str(), container("main", &["wait"]))
        .await
        .unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    let command = vec!["forbidden".into()];
    assert!(pods.exec_sync(id.as_str(), command, None).await.is_err());
    let info = pods.wait_container(id.as_str()).await.unwrap();
    assert_eq!((info.exit_code, info.reason.as_str()), (137, "Error"));
    assert!(info.message.contains("SIGSYS"), "{}", info.message);
    pods.stop_sandbox(pod.as_str()).await.unwrap();
    pods.remove_sandbox(pod.as_str()).await.unwrap();
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_second_daemon_is_kept_off() {
    let node = TestNode::new();
    let _pods = node.open().await;
    let error = node.try_open().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
}
