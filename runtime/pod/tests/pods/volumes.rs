//! Volumes that change: the guest is told of it, by each daemon, and what is watched goes with the
//! containers.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::PathBuf,
    time::Duration,
};

use hull_pod::Pods;
use hull_spec::{
    id::{ContainerId, PodId},
    spec::{ContainerSpec, MountPropagation, MountSource, MountSpec},
};

use crate::common::{TestNode, container, daemon, end, eventually, kill_pid};

/// A volume of kubelet's.
struct Volume(PathBuf);

impl Volume {
    fn new(node: &TestNode, plugin: &str) -> Self {
        let path = node.dir.path().join("volumes").join(plugin).join("v");
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn replace(&self, version: &str) {
        fs::create_dir(self.0.join(version)).unwrap();
        symlink(version, self.0.join("..data_tmp")).unwrap();
        fs::rename(self.0.join("..data_tmp"), self.0.join("..data")).unwrap();
    }

    /// How many inotify watches this process has on it.
    fn watches(&self) -> usize {
        let inode = format!("ino:{:x} ", fs::metadata(&self.0).unwrap().ino());
        let descriptors = fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
        let texts = descriptors.filter_map(|fd| fs::read_to_string(fd.path()).ok());
        let watches = texts.map(|text| text.matches(&inode).count());
        watches.sum()
    }

    fn mount(&self, readonly: bool) -> MountSpec {
        MountSpec {
            container_path: "/v".into(),
            source: MountSource::Host(self.0.clone()),
            readonly,
            recursive_readonly: false,
            propagation: MountPropagation::Private,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        }
    }
}

async fn create(pods: &Pods, pod: &PodId, name: &str, mount: MountSpec) -> ContainerId {
    let spec = ContainerSpec {
        mounts: vec![mount],
        ..container(name, &["wait"])
    };
    pods.create_container(pod.as_str(), spec).await.unwrap()
}

/// What the guest found when it was told to look last.
fn found(node: &TestNode, pod: &PodId) -> String {
    let run = node.config.state.join("pods").join(pod.as_str());
    let text = fs::read_to_string(run.join("volumes")).unwrap_or_default();
    text.lines().last().unwrap_or("never").to_owned()
}

async fn warning(pods: &Pods, pod: &PodId) -> String {
    let info = pods.sandbox(pod.as_str()).await.unwrap();
    info.vm.unwrap().warning
}

#[test]
fn a_guest_is_told_of_changed_volumes_by_each_daemon() {
    let node = TestNode::new();
    let volume = Volume::new(&node, "kubernetes.io~configmap");
    let scratch = Volume::new(&node, "kubernetes.io~empty-dir");
    for volume in [&volume, &scratch] {
        volume.replace("..1");
    }
    let first = daemon();
    let (pod, ids) = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        create(&pods, &pod, "other", scratch.mount(true)).await;
        create(&pods, &pod, "writer", volume.mount(false)).await;
        assert_eq!((volume.watches(), scratch.watches()), (0, 0));
        let one = create(&pods, &pod, "one", volume.mount(true)).await;
        let two = create(&pods, &pod, "two", volume.mount(true)).await;
        assert_eq!(volume.watches(), 1);
        assert_eq!(found(&node, &pod), "never");
        volume.replace("..2");
        eventually("news", async || found(&node, &pod) == "..2").await;

        // What the guest can't take is told, until it can.
        volume.replace("..large");
        let large = async || warning(&pods, &pod).await.contains("it is too large");
        eventually("a warning", large).await;
        volume.replace("..3");
        eventually("more news", async || found(&node, &pod) == "..3").await;
        eventually("no warning", async || warning(&pods, &pod).await.is_empty()).await;
        (pod, [one, two])
    });
    end(first);
    eventually_unwatched(&volume);

    volume.replace("..4");
    daemon().block_on(async {
        let pods = node.open().await;
        eventually("old news", async || found(&node, &pod) == "..4").await;
        volume.replace("..5");
        eventually("new news", async || found(&node, &pod) == "..5").await;
        for (id, left) in ids.iter().zip([1, 0]) {
            pods.remove_container(id.as_str()).await.unwrap();
            assert_eq!(volume.watches(), left);
        }
        volume.replace("..6");
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        // That the last containers have gone may have been told.
        assert_ne!(found(&node, &pod), "..6");
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[tokio::test]
async fn nothing_is_watched_for_what_could_not_be_made_or_has_ended() {
    let node = TestNode::new();
    let volume = Volume::new(&node, "kubernetes.io~projected");
    let pods = node.open().await;
    node.script(r#"{"refuse":["create"]}"#);
    let pod = pods.run_sandbox(node.sandbox("refused")).await.unwrap();
    let spec = ContainerSpec {
        mounts: vec![volume.mount(true)],
        ..container("app", &["wait"])
    };
    let refused = pods.create_container(pod.as_str(), spec).await;
    refused.unwrap_err();
    assert_eq!(volume.watches(), 0);

    node.script("{}");
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    create(&pods, &pod, "app", volume.mount(true)).await;
    assert_eq!(volume.watches(), 1);
    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
    kill_pid(vm.pid);
    eventually("the end", async || volume.watches() == 0).await;
}

/// A daemon that was dropped takes a moment to end.
fn eventually_unwatched(volume: &Volume) {
    for _ in 0..1000 {
        if volume.watches() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the former daemon still watches");
}
