//! Images: pulled from a real registry, listed, removed, shared by pods.

use std::{fs, os::unix::fs::MetadataExt, path::Path, path::PathBuf, process::Command};

use hull_proto_cri::v1::{
    ImageFsInfoRequest, ImageStatusRequest, LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext, ListImagesRequest, RemoveImageRequest,
};
use hull_tests::client::image;
use tonic::Code;

use crate::{
    command_line::{hull, said},
    harness::{BUSYBOX, NETWORK_TOOLS, Node},
};

#[tokio::test]
async fn an_image_is_pulled_listed_and_removed() {
    let node = Node::start().await;
    let id = node.client.pull(BUSYBOX).await.unwrap();
    assert!(id.starts_with("sha256:"), "{id}");
    assert_eq!(node.client.pull(BUSYBOX).await.unwrap(), id);

    let mut images = node.client.images.clone();
    let list = images.list_images(ListImagesRequest::default()).await;
    let list = list.unwrap().into_inner().images;
    assert_eq!(list.len(), 1);
    assert_eq!(list[0].repo_tags, [BUSYBOX]);
    assert!(list[0].repo_digests[0].starts_with("registry.test/demo/busybox@sha256:"));
    assert!(list[0].size > 100_000, "{}", list[0].size);

    for name in [BUSYBOX, &id, &list[0].repo_digests[0]] {
        let request = ImageStatusRequest {
            image: Some(image(name)),
            verbose: false,
        };
        let status = images.image_status(request).await.unwrap().into_inner();
        assert_eq!(status.image.unwrap().id, id, "{name}");
    }
    let usage = images.image_fs_info(ImageFsInfoRequest {}).await.unwrap();
    let usage = usage.into_inner().image_filesystems;
    assert!(usage[0].used_bytes.unwrap().value > 100_000);

    for _ in 0..2 {
        let request = RemoveImageRequest {
            image: Some(image(BUSYBOX)),
        };
        images.remove_image(request).await.unwrap();
    }
    let request = ImageStatusRequest {
        image: Some(image(BUSYBOX)),
        verbose: false,
    };
    let status = images.image_status(request).await.unwrap().into_inner();
    assert!(status.image.is_none(), "absent is an empty answer");
    node.finish().await;
}

#[tokio::test]
async fn a_container_keeps_its_image() {
    let node = Node::start().await;
    let pod = node.pod("kept").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let request = RemoveImageRequest {
        image: Some(image(BUSYBOX)),
    };
    // Refused or deferred: either way the container must go on.
    let _ = node.client.images.clone().remove_image(request).await;
    let tree = node
        .exec(&id, "find /bin /etc /lib -type f -exec cat {} + | md5sum")
        .await;
    assert_eq!(tree.exit_code, 0);
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn what_a_layer_deleted_is_gone_and_the_rest_is_whole() {
    let node = Node::start().await;
    let pod = node.pod("tree").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let hash = node
        .exec(&id, "md5sum < /bin/busybox; ls -ld /tmp /etc/passwd")
        .await;
    let text = String::from_utf8_lossy(&hash.stdout).into_owned();
    assert_eq!(hash.exit_code, 0, "{text}");
    assert!(text.contains("drwxrwxrwt"), "{text}");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

/// A file system in memory, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, size: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        let size = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&at)
            .status();
        assert!(mounted.unwrap().success());
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// All files and directories below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        for entry in fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path.clone());
            }
            all.push(path);
        }
    }
    all.sort();
    all
}

/// What the node says that images occupy: bytes and files.
async fn told(node: &Node) -> (u64, u64) {
    let mut images = node.client.images.clone();
    let info = images.image_fs_info(ImageFsInfoRequest {}).await.unwrap();
    let usage = info.into_inner().image_filesystems[0].clone();
    (
        usage.used_bytes.unwrap().value,
        usage.inodes_used.unwrap().value,
    )
}

#[tokio::test]
async fn a_full_disk_ends_a_pull_or_import_and_harms_nothing_else() {
    let mut small = None;
    let mut node = Node::start_with(|text| {
        let root = text.strip_prefix("root = '").unwrap();
        let root = Path::new(root.split('\'').next().unwrap());
        // busybox fits; the tools don't, nor does a large archive.
        small = Some(SmallDisk::mount(root.join("images"), "12m"));
        text
    })
    .await;
    let small = small.unwrap();
    let store = &small.0;
    let id = node.client.pull(BUSYBOX).await.unwrap();
    let (before, told_before) = (files(store), told(&node).await);
    for _ in 0..2 {
        let error = node.client.pull(NETWORK_TOOLS).await.unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
        assert!(error.message().contains("no space left"), "{error}");
        assert_eq!(files(store), before);
    }
    let archive = node.dir.join("large.tar");
    let made = Command::new("sh")
        .args([
            "-ec",
            "head -c 20M /dev/zero >large; tar -cf large.tar large",
        ])
        .current_dir(&node.dir)
        .status();
    assert!(made.unwrap().success());
    let import = hull(&node, &["images", "import", archive.to_str().unwrap()]);
    assert_eq!(import.status.code(), Some(1));
    assert!(said(&import).contains("no space left"), "{}", said(&import));
    assert_eq!(files(store), before);
    let (bytes, inodes) = told(&node).await;
    assert_eq!(inodes, told_before.1);
    // The database may have grown.
    assert!(bytes < told_before.0 + (4 << 20), "{told_before:?} {bytes}");
    let pod = node.pod("after").await;
    let container = node.run_script(&pod, "main", "sleep 100000").await;
    assert_eq!(
        node.exec(&container, "md5sum /bin/busybox").await.exit_code,
        0
    );
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    assert_eq!(node.client.pull(BUSYBOX).await.unwrap(), id);
    node.daemon.kill();
    drop(small);
    node.finish().await;
}

#[tokio::test]
async fn what_images_occupy_is_what_their_files_do() {
    let node = Node::start().await;
    let store = node.dir.join("root/images");
    let real = || -> u64 {
        let blocks = |path| fs::symlink_metadata(path).unwrap().blocks();
        files(&store).into_iter().map(blocks).sum::<u64>() * 512
    };
    let (empty, _) = told(&node).await;
    assert_eq!(empty, real());
    node.client.pull(NETWORK_TOOLS).await.unwrap();
    let (full, files_of_it) = told(&node).await;
    assert_eq!(full, real());
    assert!(full > empty + (8 << 20), "{empty} {full}");
    assert_eq!(files_of_it, files(&store).len() as u64);
    let request = RemoveImageRequest {
        image: Some(image(NETWORK_TOOLS)),
    };
    node.client
        .images
        .clone()
        .remove_image(request)
        .await
        .unwrap();
    let (removed, _) = told(&node).await;
    assert_eq!(removed, real());
    assert!(removed < empty + (4 << 20), "{empty} {removed}");
    node.finish().await;
}

/// Reads the programs of an image, which are most of it.
const TREE: &str = "find /bin -type f -exec md5sum {} + | sort | md5sum";

/// What a process has mapped of files below a directory: in all, and as its part of what is shared
/// (proc_pid_smaps(5)), in KiB.
fn mapped(pid: u32, below: &Path) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let below = below.to_str().unwrap();
    let (mut ours, mut all, mut part) = (false, 0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or_default(), words.next());
        match (name, value.and_then(|value| value.parse::<u64>().ok())) {
            ("Rss:", Some(kib)) if ours => all += kib,
            ("Pss:", Some(kib)) if ours => part += kib,
            _ if name.contains('-') => ours = line.contains(below),
            _ => {}
        }
    }
    (all, part)
}

#[tokio::test]
async fn pods_use_the_same_memory_for_an_image_and_can_not_write_to_it() {
    let node = Node::start_with(|text| text + "\n[vm]\nimage_device = \"pmem\"\n").await;
    node.client.pull(BUSYBOX).await.unwrap();
    let mut pods = Vec::new();
    let mut trees = Vec::new();
    for name in ["one", "other"] {
        let mut config = node.sandbox(name);
        let privileged = LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        };
        config.linux.get_or_insert_default().security_context = Some(privileged);
        let pod = node.run_sandbox(config).await.unwrap();
        let mut config = node.script("main", "sleep 100000");
        let privileged = LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        config.linux.get_or_insert_default().security_context = Some(privileged);
        let id = node.create(&pod, config).await.unwrap();
        node.start_container(&id).await.unwrap();
        trees.push(node.exec(&id, TREE).await.stdout);
        pods.push((pod, id));
    }
    assert_eq!(trees[0], trees[1]);
    let images = node.dir.join("root/images");
    for pid in node.vmms() {
        let (all, part) = mapped(pid, &images);
        assert!(all > 1024 && part < all * 6 / 10, "{all} KiB, {part}");
    }

    let write = "mknod /disk b $(tr : ' ' </sys/block/pmem0/dev) && ! dd if=/bin/busybox of=/disk bs=4096 count=9";
    let (_, id) = &pods[0];
    let refused = node.exec(id, write).await;
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.exit_code, 0, "{text}");
    assert_eq!(node.exec(id, TREE).await.stdout, trees[0]);
    for (pod, _) in &pods {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}
