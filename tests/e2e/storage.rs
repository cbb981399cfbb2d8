//! Writable layers: their quota, what the node sees of them, and that space comes back.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::ImageFsInfoRequest;

use crate::harness::{Node, PATIENCE, Pod};

/// Bytes that the host has allocated for a pod's disk, which is larger.
fn allocated(node: &Node, pod: &Pod) -> u64 {
    let disks: Vec<PathBuf> = fs::read_dir(node.dir.join("root/pods").join(&pod.id))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::metadata(path).unwrap().len() >= 64 << 20)
        .collect();
    let [disk] = disks.as_slice() else {
        panic!("not one disk: {disks:?}");
    };
    fs::metadata(disk).unwrap().blocks() * 512
}

/// What the node tells the kubelet that writable layers occupy.
async fn told(node: &Node) -> u64 {
    let info = node
        .client
        .images
        .clone()
        .image_fs_info(ImageFsInfoRequest {})
        .await;
    let info = info.unwrap().into_inner();
    info.container_filesystems[0].used_bytes.unwrap().value
}

async fn end(node: Node, pods: &[&Pod]) {
    for pod in pods {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}

#[tokio::test]
async fn space_of_deleted_files_goes_back_to_the_host() {
    const WRITTEN: u64 = 96 << 20;
    let node = Node::start().await;
    let pod = node.pod("discard").await;
    let id = node.run_script(&pod, "main", "sleep 100000").await;
    let (before, told_before) = (allocated(&node, &pod), told(&node).await);
    // Half of it as one file, half as many.
    let write = "mkdir /d && dd if=/dev/zero of=/big bs=1M count=48 && \
        for i in $(seq 48); do dd if=/dev/zero of=/d/$i bs=1M count=1 || exit 1; done && sync";
    let written = node.exec(&id, write).await;
    assert_eq!(written.exit_code, 0, "{written:?}");
    let full = allocated(&node, &pod);
    assert!(full >= before + WRITTEN, "{before} {full}");
    let told_full = told(&node).await;
    assert!(
        told_full >= told_before + WRITTEN,
        "{told_before} {told_full}"
    );

    node.exec(&id, "rm -r /d && sync").await;
    below(&node, &pod, before + WRITTEN / 2 + (8 << 20)).await;
    node.exec(&id, "rm /big && sync").await;
    below(&node, &pod, before + (8 << 20)).await;
    assert!(told(&node).await < told_before + (8 << 20));
    // The disk is whole, and what was freed can be used again.
    let again = node
        .exec(
            &id,
            "dd if=/dev/urandom of=/x bs=1M count=8 && md5sum /x && sync && \
            echo 3 > /proc/sys/vm/drop_caches; md5sum /x",
        )
        .await;
    assert_eq!(again.exit_code, 0, "{again:?}");
    let sums = String::from_utf8_lossy(&again.stdout).into_owned();
    let lines: Vec<_> = sums.lines().collect();
    assert_eq!(lines.len(), 2, "{sums}");
    assert_eq!(lines[0], lines[1]);
    end(node, &[&pod]).await;
}

/// Waits until the host has no more allocated than this.
async fn below(node: &Node, pod: &Pod, limit: u64) {
    let begin = Instant::now();
    loop {
        let now = allocated(node, pod);
        if now <= limit {
            println!("given back after {:?}", begin.elapsed());
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{now} bytes, wanted {limit}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn a_full_quota_is_the_pods_own_affair() {
    let node = Node::start_with(|text| text + "[vm]\nscratch_mib = 64\n").await;
    let (greedy, other) = (node.pod("greedy").await, node.pod("other").await);
    let main = node.run_script(&greedy, "main", "sleep 100000").await;
    let beside = node.run_script(&greedy, "beside", "sleep 100000").await;
    let elsewhere = node.run_script(&other, "elsewhere", "sleep 100000").await;
    let fill = node.exec(&main, "dd if=/dev/zero of=/fill bs=1M").await;
    let said = String::from_utf8_lossy(&fill.stderr).into_owned();
    assert_ne!(fill.exit_code, 0);
    assert!(said.contains("No space left on device"), "{said}");
    node.exec(&main, "sync").await;
    // Not more than the quota on the host, whatever was written.
    let used = allocated(&node, &greedy);
    assert!((32 << 20..=64 << 20).contains(&used), "{used}");
    // The pod shares its quota; another has its own.
    let write = "dd if=/dev/zero of=/y bs=1M count=16 && sync";
    let beside = node.exec(&beside, write).await;
    let said = String::from_utf8_lossy(&beside.stderr).into_owned();
    assert!(said.contains("No space left on device"), "{said}");
    let elsewhere = node.exec(&elsewhere, write).await;
    assert_eq!(elsewhere.exit_code, 0, "{elsewhere:?}");
    // It goes on, and is well again when it has cleaned up.
    let again = format!("rm /fill && {write} && echo well");
    let again = node.exec(&main, &again).await;
    assert_eq!(again.stdout, b"well\n", "{again:?}");
    end(node, &[&greedy, &other]).await;
}
