//! AppArmor profiles of the node for containers.

use std::fs;

use hull_pod::Pods;
use hull_spec::{
    error::PodError,
    id::PodId,
    spec::{AppArmor, ContainerSecurity, ContainerSpec},
};

use crate::common::{TestNode, container, daemon, end};

/// A container under a profile of this kind.
async fn create(pods: &Pods, pod: &PodId, name: &str, apparmor: AppArmor) -> Result<(), PodError> {
    let spec = ContainerSpec {
        security: ContainerSecurity {
            apparmor,
            ..ContainerSecurity::default()
        },
        ..container(name, &["exit:0"])
    };
    pods.create_container(pod.as_str(), spec).await.map(drop)
}

/// What the guest was told, a line for each container that has a profile.
fn told(node: &TestNode, pod: &PodId) -> String {
    let file = node.config.state.join("pods").join(pod.as_str());
    fs::read_to_string(file.join("apparmor")).unwrap_or_default()
}

#[test]
fn profiles_of_the_node_are_the_guests_where_the_node_has_apparmor() {
    use AppArmor::{Localhost, RuntimeDefault, Unconfined};
    let mut node = TestNode::new();
    let host = node.dir.path().join("apparmor");
    let profile = host.join("policy/profiles/mine.4");
    fs::create_dir_all(&profile).unwrap();
    fs::write(profile.join("name"), "mine\n").unwrap();
    fs::write(profile.join("raw_data"), "policy").unwrap();
    node.config.apparmor = Some(host);
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("on")).await.unwrap();
        for (name, apparmor) in [
            ("default", RuntimeDefault),
            ("mine", Localhost("mine".into())),
            ("unconfined", Unconfined),
        ] {
            create(&pods, &pod, name, apparmor).await.unwrap();
        }
        assert_eq!(told(&node, &pod), "hull-default \nmine policy\n");
        let error = create(&pods, &pod, "other", Localhost("other".into())).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("it is not loaded on the node"), "{error}");
        pod
    });
    end(first);

    // The next daemon knows which guests have it.
    node.config.apparmor = None;
    daemon().block_on(async {
        let pods = node.open().await;
        create(&pods, &pod, "later", RuntimeDefault).await.unwrap();
        assert!(told(&node, &pod).ends_with("mine policy\nhull-default \n"));
        pods.remove_sandbox(pod.as_str()).await.unwrap();

        let pod = pods.run_sandbox(node.sandbox("off")).await.unwrap();
        for (name, apparmor) in [("default", RuntimeDefault), ("unconfined", Unconfined)] {
            create(&pods, &pod, name, apparmor).await.unwrap();
        }
        assert_eq!(told(&node, &pod), "");
        let error = create(&pods, &pod, "mine", Localhost("mine".into())).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("AppArmor is off in the node's"), "{error}");
        pods.remove_sandbox(pod.as_str()).await.unwrap();
    });
}
