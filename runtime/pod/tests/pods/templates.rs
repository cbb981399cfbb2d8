//! Pods whose VMs are clones of one that was booted.

use std::time::Duration;

use hull_pod::Pods;
use hull_spec::{config::TemplateScope, id::PodId, info::TemplateCounts};

use crate::common::{TestNode, container, daemon, end, eventually};

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
    assert_eq!(cold(&counts, "no template yet"), 1);

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

/// With a script of clones, and why a pod boots then.
#[tokio::test]
async fn whatever_is_wrong_with_a_clone_its_pod_boots_in_the_same_call() {
    for (clone, why) in [
        (
            r#"{"refuse_configure": "invalid"}"#,
            "VMM refused the template",
        ),
        (
            r#"{"refuse_attach": "internal"}"#,
            "VMM refused the template",
        ),
        (
            r#"{"refuse_start": "internal"}"#,
            "VMM refused the template",
        ),
        (r#"{"die_at_start": true}"#, "clone failed"),
        (r#"{"version": 9}"#, "clone failed"),
        (r#"{"refuse": ["wake"]}"#, "clone failed"),
        (r#"{"refuse": ["attach_device"]}"#, "clone failed"),
        (r#"{"refuse": ["configure"]}"#, "clone failed"),
        (r#"{"no_agent": true}"#, "clone took too long"),
        (r#"{"hang_once": ["wake"]}"#, "clone took too long"),
    ] {
        let mut node = node(&format!(r#"{{"clone": {clone}}}"#));
        // A clone has a quarter of it.
        node.config.boot_timeout = Duration::from_secs(8);
        let pods = node.open().await;
        made(&pods, &node).await;
        assert!(!is_clone(&pods, &node, "second").await, "{clone}");
        assert_eq!(node.vmms().len(), 2, "{clone}");
        let counts = pods.templates();
        assert_eq!((counts.ready, counts.clones), (0, 0), "{clone}");
        assert_eq!(cold(&counts, why), 1, "{clone}: {counts:?}");
        // Its template is not tried again.
        assert!(!is_clone(&pods, &node, "third").await);
        assert_eq!(cold(&pods.templates(), "template failed before"), 1);
        for pod in pods.sandboxes().await {
            pods.remove_sandbox(pod.id.as_str()).await.unwrap();
        }
        drop(pods);
        assert_eq!(node.leftovers(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_template_that_cannot_be_made_leaves_nothing_and_pods_boot() {
    let node = node(r#"{"refuse_save": "busy"}"#);
    let pods = node.open().await;
    assert!(!is_clone(&pods, &node, "first").await);
    eventually("it has failed", async || {
        let name = format!("pod{}", pods.sandboxes().await.len());
        assert!(!is_clone(&pods, &node, &name).await);
        cold(&pods.templates(), "template failed before") > 0
    })
    .await;
    assert_eq!(pods.templates().ready, 0);
    for pod in pods.sandboxes().await {
        pods.remove_sandbox(pod.id.as_str()).await.unwrap();
    }
    drop(pods);
    assert_eq!(node.leftovers(), Vec::<String>::new());
}

/// A daemon that ends while it makes one.
#[test]
fn a_template_goes_with_its_daemon() {
    let node = node(r#"{"hang_save": true}"#);
    let first = daemon();
    first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("first")).await.unwrap();
        eventually("it is being made", async || node.vmms().len() == 2).await;
        pods.remove_sandbox(pod.as_str()).await.unwrap();
    });
    end(first);
    let second = daemon();
    second.block_on(async {
        let pods = node.open().await;
        eventually("its VM is gone", async || node.vmms().is_empty()).await;
        assert_eq!(pods.templates().ready, 0);
    });
    end(second);
    assert_eq!(node.leftovers(), Vec::<String>::new());
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
