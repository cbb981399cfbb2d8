//! Pods whose VMs are clones of one that was booted.

use hull_pod::Pods;
use hull_spec::{config::TemplateScope, id::PodId, info::TemplateCounts};

use crate::common::{TestNode, container, eventually};

/// A node whose pods are clones. Templates are made of VMs with this script.
fn node(script: &str) -> TestNode {
    let mut node = TestNode::new();
    node.config.template = TemplateScope::Node;
    node.script(script);
    node
}

/// Runs a pod with a container that ends, and says whether its VM is a clone.
async fn is_clone(pods: &Pods, node: &TestNode, name: &str) -> bool {
    let pod = pods.run_sandbox(node.sandbox(name)).await.unwrap();
    let spec = container("app", &["out:hello\\n", "exit:0"]);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    pods.wait_container(id.as_str()).await.unwrap();
    cloned(pods, &pod).await
}

async fn cloned(pods: &Pods, pod: &PodId) -> bool {
    let info = pods.sandbox(pod.as_str()).await.unwrap();
    info.boot.unwrap().cloned
}

fn cold(counts: &TemplateCounts, why: &str) -> u64 {
    counts.cold.get(why).copied().unwrap_or(0)
}

/// Boots the first pod of a class, and waits for its template.
async fn made(pods: &Pods, node: &TestNode) {
    assert!(!is_clone(pods, node, "first").await);
    eventually("the template is ready", async || {
        pods.templates().ready == 1
    })
    .await;
    // The VM that it was made in is gone, with its directory.
    assert_eq!(node.vmms().len(), 1);
}

#[tokio::test]
async fn the_first_pod_boots_and_others_are_clones() {
    let node = node("");
    let pods = node.open().await;
    made(&pods, &node).await;
    assert!(is_clone(&pods, &node, "second").await);
    assert!(is_clone(&pods, &node, "third").await);
    let counts = pods.templates();
    assert_eq!((counts.ready, counts.clones), (1, 2));
    assert_eq!(cold(&counts, "template is being made"), 1);

    // Another kernel is another class.
    node.script("{}");
    assert!(!is_clone(&pods, &node, "fourth").await);
    eventually("there is another", async || pods.templates().ready == 2).await;
    for name in pods.sandboxes().await {
        pods.remove_sandbox(name.id.as_str()).await.unwrap();
    }
    drop(pods);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn what_the_vmm_refuses_boots_in_the_same_vmm_and_is_counted() {
    let node = node(r#"{"refuse_restore": "invalid"}"#);
    let pods = node.open().await;
    made(&pods, &node).await;
    assert!(!is_clone(&pods, &node, "second").await);
    assert!(!is_clone(&pods, &node, "third").await);
    let counts = pods.templates();
    assert_eq!((counts.ready, counts.clones), (0, 0));
    assert_eq!(cold(&counts, "template was refused"), 1);
    assert_eq!(cold(&counts, "template failed"), 1);
}

#[tokio::test]
async fn a_clone_that_does_not_wake_is_the_last_of_its_template() {
    let node = node(r#"{"refuse": ["wake"]}"#);
    let pods = node.open().await;
    made(&pods, &node).await;
    pods.run_sandbox(node.sandbox("second")).await.unwrap_err();
    assert!(!is_clone(&pods, &node, "second").await);
    assert_eq!(cold(&pods.templates(), "template failed"), 1);
}

#[tokio::test]
async fn namespaces_do_not_share_templates_if_they_must_not() {
    let mut node = node("");
    node.config.template = TemplateScope::Namespace;
    let pods = node.open().await;
    made(&pods, &node).await;
    let mut other = node.sandbox("second");
    other.metadata.namespace = "other".into();
    let pod = pods.run_sandbox(other).await.unwrap();
    assert!(!cloned(&pods, &pod).await);
    assert!(is_clone(&pods, &node, "third").await);
}
