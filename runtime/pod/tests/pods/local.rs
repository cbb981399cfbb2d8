//! Volumes that the guest keeps.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use hull_spec::{
    config::PodsConfig,
    spec::{ContainerSpec, MountPropagation, MountSource, MountSpec},
};

use crate::common::{TestNode, attached, container, daemon, end};

/// A directory as kubelet makes it for an emptyDir of the pods of this node.
fn empty_dir(node: &TestNode, name: &str) -> PathBuf {
    let volumes = "kubelet/pods/uid/volumes/kubernetes.io~empty-dir";
    let directory = node.dir.path().join(volumes).join(name);
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn with(name: &str, directories: &[&Path]) -> ContainerSpec {
    let mounts = directories.iter().map(|directory| MountSpec {
        container_path: Path::new("/volumes").join(directory.file_name().unwrap()),
        source: MountSource::Host(directory.to_path_buf()),
        readonly: false,
        recursive_readonly: false,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    });
    ContainerSpec {
        mounts: mounts.collect(),
        ..container(name, &["wait"])
    }
}

#[test]
fn an_empty_directory_is_one_disk_for_all_and_stays_when_they_have_gone() {
    let node = TestNode::new();
    let directory = empty_dir(&node, "data");
    let image = directory.join(".hull-volume.img");
    let number = || fs::metadata(&image).unwrap().ino();
    let first = daemon();
    let (pod, one, two) = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 5);
        // One for the image, one for the volume.
        let create = async |name| {
            let spec = with(name, &[&directory]);
            let id = pods.create_container(pod.as_str(), spec).await.unwrap();
            pods.start_container(id.as_str()).await.unwrap();
            assert_eq!(attached(&pods, &pod).await, 7);
            id.to_string()
        };
        let (one, two) = (create("one").await, create("two").await);
        (pod, one, two)
    });
    let made = number();
    end(first);
    daemon().block_on(async {
        let pods = node.open().await;
        assert_eq!(attached(&pods, &pod).await, 7);
        pods.remove_container(&one).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 7);
        pods.remove_container(&two).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 5);
        let spec = with("three", &[&directory]);
        pods.create_container(pod.as_str(), spec).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 7);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        // As the sandbox left it, for the pod's next one.
        assert_eq!(number(), made);
        let mut next = node.sandbox("web");
        next.metadata.attempt = 1;
        let pod = pods.run_sandbox(next).await.unwrap();
        let spec = with("three", &[&directory]);
        pods.create_container(pod.as_str(), spec).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 7);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
    assert_eq!(number(), made);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
}

#[test]
fn what_the_host_has_files_in_is_shared_and_so_are_volumes_beyond_the_most() {
    let node = TestNode::new();
    let daemon = daemon();
    daemon.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let create = async |name: &str, directories: &[&Path]| {
            let spec = with(name, directories);
            pods.create_container(pod.as_str(), spec).await.unwrap();
        };
        let full = empty_dir(&node, "full");
        fs::write(full.join("file"), "").unwrap();
        create("full", &[&full]).await;
        // The image, and the one device of all shares.
        assert_eq!(attached(&pods, &pod).await, 5 + 2);
        // Who comes later sees what others see.
        fs::remove_file(full.join("file")).unwrap();
        create("emptied", &[&full]).await;
        assert_eq!(attached(&pods, &pod).await, 5 + 2);
        assert_eq!(fs::read_dir(&full).unwrap().count(), 0);

        let numbered: Vec<_> = (0..9).map(|n| empty_dir(&node, &format!("v{n}"))).collect();
        let nine: Vec<&Path> = numbered.iter().map(PathBuf::as_path).collect();
        create("nine", &nine).await;
        create("again", &nine[..2]).await;
        assert_eq!(attached(&pods, &pod).await, 5 + 2 + 8);
        let images = nine
            .iter()
            .map(|directory| directory.join(".hull-volume.img"));
        assert_eq!(images.filter(|image| image.exists()).count(), 8);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn nothing_is_kept_by_guests_when_the_node_says_so() {
    let mut node = TestNode::new();
    node.config = PodsConfig {
        guest_volumes: false,
        ..node.config.clone()
    };
    let directory = empty_dir(&node, "data");
    daemon().block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let spec = with("one", &[&directory]);
        pods.create_container(pod.as_str(), spec).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 5 + 2);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn what_a_container_left_in_a_volume_leads_nowhere() {
    let node = TestNode::new();
    let directory = empty_dir(&node, "data");
    let victim = node.dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    daemon().block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let mut spec = with("one", &[&directory]);
        spec.mounts[0].propagation = MountPropagation::HostToContainer;
        let one = pods.create_container(pod.as_str(), spec).await.unwrap();
        // The image of the container, and the one device of all shares.
        assert_eq!(attached(&pods, &pod).await, 5 + 2);
        for name in [".hull-volume.img.tmp", ".hull-volume.img"] {
            symlink(&victim, directory.join(name)).unwrap();
        }
        pods.remove_container(one.as_str()).await.unwrap();
        let spec = with("two", &[&directory]);
        pods.create_container(pod.as_str(), spec).await.unwrap();
        // It shares what is there, as files like others.
        assert_eq!(attached(&pods, &pod).await, 5 + 2);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn what_a_vmm_leaves_in_its_directory_leads_nowhere() {
    let node = TestNode::new();
    let outside = node.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let victim = outside.join("victim");
    fs::write(&victim, "precious").unwrap();
    let full = empty_dir(&node, "full");
    fs::write(full.join("file"), "").unwrap();
    daemon().block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let run = node.config.state.join("pods").join(pod.as_str());
        // The file server is still to come, with a log of its own.
        symlink(&victim, run.join("fs.log")).unwrap();
        symlink(&outside, run.join("directory")).unwrap();
        fs::create_dir_all(run.join("nested/deeper")).unwrap();
        symlink(&outside, run.join("nested/deeper/link")).unwrap();
        let spec = with("one", &[&full]);
        pods.create_container(pod.as_str(), spec).await.unwrap();
        assert!(fs::symlink_metadata(run.join("fs.log")).unwrap().is_file());
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}
