//! Bad input from every side: a clear status, and nothing left behind.

use hull_proto_cri::v1::{
    ContainerStatusRequest, LinuxContainerResources, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxStatusRequest,
    RunPodSandboxRequest,
};
use hull_tests::client::image;
use tonic::Code;

use crate::harness::{Fault, FaultyRegistry, Node};

#[tokio::test]
async fn a_sandbox_that_makes_no_sense_is_refused() {
    let node = Node::start().await;
    let mut runtime = node.client.runtime.clone();
    let mut refused = async |request: RunPodSandboxRequest, code: Code, word: &str| {
        let error = runtime.run_pod_sandbox(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(word), "{word}: {error}");
    };
    refused(
        RunPodSandboxRequest::default(),
        Code::InvalidArgument,
        "config",
    )
    .await;
    let mut config = node.sandbox("a");
    config.metadata = None;
    let request = RunPodSandboxRequest {
        config: Some(config),
        runtime_handler: String::new(),
    };
    refused(request, Code::InvalidArgument, "metadata").await;
    let request = RunPodSandboxRequest {
        config: Some(node.sandbox("a")),
        runtime_handler: "no-such-handler".into(),
    };
    refused(request, Code::InvalidArgument, "no-such-handler").await;
    for (field, network, ipc) in [
        ("network", NamespaceMode::Node, NamespaceMode::Pod),
        ("ipc", NamespaceMode::Pod, NamespaceMode::Node),
    ] {
        let mut config = node.sandbox("a");
        config.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: network.into(),
                    ipc: ipc.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: String::new(),
        };
        refused(request, Code::InvalidArgument, field).await;
    }
    node.finish().await;
}

#[tokio::test]
async fn unknown_ids_and_images_are_told() {
    let node = Node::start().await;
    let mut runtime = node.client.runtime.clone();
    let unknown = "0123456789abcdef";
    let error = runtime
        .pod_sandbox_status(PodSandboxStatusRequest {
            pod_sandbox_id: unknown.into(),
            verbose: false,
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let error = runtime
        .container_status(ContainerStatusRequest {
            container_id: unknown.into(),
            verbose: false,
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let error = node.start_container(unknown).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let error = node.exec_for(unknown, "true", 0).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    // Stopping and removing what is not there has happened already.
    node.stop_container(unknown, 0).await.unwrap();
    node.remove_container(unknown).await.unwrap();
    node.stop_sandbox(unknown).await.unwrap();
    node.remove_sandbox(unknown).await.unwrap();

    let error = node
        .client
        .pull("registry.test/demo/absent")
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let error = node.client.pull("NOT a reference").await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    node.finish().await;
}

#[tokio::test]
async fn a_container_that_makes_no_sense_is_refused() {
    let node = Node::start().await;
    let pod = node.pod("strict").await;
    let refused = async |config, code: Code, word: &str| {
        let error = node.create(&pod, config).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(word), "{word}: {error}");
    };
    let mut config = node.script("a", "true");
    config.metadata = None;
    refused(config, Code::InvalidArgument, "metadata").await;
    let mut config = node.script("a", "true");
    config.image = Some(image("registry.test/demo/not-pulled"));
    refused(config, Code::NotFound, "not-pulled").await;
    let mut config = node.script("a", "true");
    config.image = None;
    refused(config, Code::InvalidArgument, "image").await;
    let mut config = node.script("a", "true");
    config.log_path = "../../escape.log".into();
    refused(config, Code::InvalidArgument, "log_path").await;
    // A NUL can't be in an argument (execve(2)).
    let mut config = node.script("a", "true");
    config.command = vec!["/bin/sh".into(), "a\0b".into()];
    refused(config, Code::InvalidArgument, "command").await;

    // None of that took the name.
    let id = node.run_script(&pod, "a", "sleep 1000").await;
    let error = node
        .create(&pod, node.script("a", "other"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    assert_eq!(node.exec(&id, "echo ok").await.stdout, b"ok\n");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_name_is_taken_until_its_sandbox_is_removed() {
    let node = Node::start().await;
    let pod = node.pod("name").await;
    let mut other = node.sandbox("name");
    other.hostname = "different".into();
    let error = node.run_sandbox(other).await.err().unwrap();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    assert_eq!(node.vmms().len(), 1);
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    let pod = node.pod("name").await;
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_registry_that_lies_or_dies_leaves_nothing() {
    let node = Node::start().await;
    let images = node.dir.join("root/images");
    let before = files(&images);
    for (fault, word) in [
        (Fault::WrongBytes, "expected sha256:"),
        (Fault::CorruptLayer, "sha256:"),
        (Fault::WrongDiffId, "expected sha256:"),
        (Fault::Dies, "127.0.0.1"),
    ] {
        let registry = FaultyRegistry::start(fault);
        node.mirror("faulty.test", &registry.address.to_string());
        let error = node
            .client
            .pull("faulty.test/repo/image")
            .await
            .unwrap_err();
        assert!(
            matches!(
                error.code(),
                Code::DataLoss | Code::Unavailable | Code::FailedPrecondition
            ),
            "{fault:?}: {error}"
        );
        let text = error.message().to_lowercase();
        assert!(text.contains(word), "{fault:?}: {error}");
        assert_eq!(files(&images), before, "{fault:?}");
    }
    node.finish().await;
}

/// Names of the files below a directory.
fn files(dir: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn without_a_kernel_the_path_is_named() {
    let node = Node::start_with(|text| {
        let assets = std::env::var("HULL_ASSETS").unwrap();
        text.replace(&assets, "/no/such/assets")
    })
    .await;
    let error = node.run_sandbox(node.sandbox("a")).await.err().unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("/no/such/assets"), "{error}");
    node.finish().await;
}

#[tokio::test]
async fn a_vm_that_the_host_has_no_memory_for_is_refused() {
    let node = Node::start().await;
    let mut config = node.sandbox("huge");
    config.linux = Some(LinuxPodSandboxConfig {
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: 1 << 43,
            ..Default::default()
        }),
        ..Default::default()
    });
    let error = node.run_sandbox(config).await.err().unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert!(error.message().contains("memory"), "{error}");
    node.finish().await;
}

#[tokio::test]
async fn without_a_network_configuration_no_sandbox_runs() {
    let node = Node::start().await;
    std::fs::remove_file(node.dir.join("net.d/10-test.conflist")).unwrap();
    let error = node.run_sandbox(node.sandbox("a")).await.err().unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("CNI"), "{error}");
    node.finish().await;
}
