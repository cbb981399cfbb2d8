//! emptyDirs as kubelet makes them: the guest keeps what is in them, and the host counts it.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{ContainerConfig, Mount, MountPropagation};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid as ProcessId,
};

use crate::{
    harness::{Node, PATIENCE},
    volumes::{HostDir, host, idle, mount, readonly, run},
};

/// kubelet's directory, of which one pod's is used.
struct Kubelet {
    dir: HostDir,
    pod: PathBuf,
}

impl Kubelet {
    fn of(node: &Node, pod: &str) -> Self {
        let dir = HostDir::new(node, "kubelet");
        let pod = dir.path(&format!("pods/{pod}-uid"));
        Self { dir, pod }
    }

    /// A volume, with a group that may write (fsGroup).
    fn empty_dir(&self, name: &str) -> PathBuf {
        let path = self.pod.join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path).unwrap();
        own(&path);
        path
    }

    fn in_memory(&self, name: &str) -> PathBuf {
        let path = self.empty_dir(name);
        let at = path.to_str().unwrap();
        host("mount", &["-t", "tmpfs", "-o", "size=1m", "none", at]);
        own(&path);
        path
    }

    /// A subPath of a volume, as a mount of its own.
    fn sub_path(&self, volume: &Path, sub: &str) -> PathBuf {
        let name = volume.file_name().unwrap();
        let at = self.pod.join("volume-subpaths").join(name).join("main/0");
        fs::create_dir_all(&at).unwrap();
        let inside = volume.join(sub);
        fs::create_dir_all(&inside).unwrap();
        let [from, to] = [&inside, &at].map(|path| path.to_str().unwrap());
        host("mount", &["--bind", from, to]);
        at
    }
}

fn own(path: &Path) {
    chown(path, None, Some(2000)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o2775)).unwrap();
}

/// Bytes that kubelet counts for a volume (du).
fn counted(volume: &Path) -> u64 {
    let entries = fs::read_dir(volume).unwrap();
    entries
        .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
        .sum()
}

#[tokio::test]
async fn containers_share_empty_directories_of_their_guest() {
    let node = Node::start().await;
    let kubelet = Kubelet::of(&node, "sharing");
    let (work, memory) = (kubelet.empty_dir("work"), kubelet.in_memory("memory"));
    let sub = kubelet.sub_path(&work, "deep/sub");
    let pod = node.pod("sharing").await;
    let both = || vec![mount("/work", &work), mount("/memory", &memory)];
    let script = "{ ls -A /work /memory; stat -c '%a %g' /work /memory; } >/work/state; \
                  echo kept >/memory/state; chmod 2777 /work";
    let config = ContainerConfig {
        mounts: both(),
        ..node.script("init", script)
    };
    let init = node.create(&pod, config).await.unwrap();
    node.start_container(&init).await.unwrap();
    node.client.wait_exited(&init, PATIENCE).await.unwrap();
    let server = idle(&node, &pod, "server", both()).await;
    let mut mounts = vec![mount("/sub", &sub)];
    mounts.extend(both().into_iter().map(|mount| readonly(mount, false)));
    let client = idle(&node, &pod, "client", mounts).await;
    // Empty and as kubelet made it, also in memory; then as the first container left it.
    let found = run(&node, &client, "cat /work/state; stat -c '%a %g' /work").await;
    let expected = "/memory:\n\n/work:\nstate\n2775 2000\n2775 2000\n2777 2000\n";
    assert_eq!(found, expected);
    assert_eq!(run(&node, &client, "cat /memory/state").await, "kept\n");
    let refused = node
        .exec(&client, "touch /work/x || touch /memory/x || echo no")
        .await;
    assert_eq!(refused.stdout, b"no\n", "{refused:?}");
    // A subPath is a directory of the same volume.
    run(&node, &client, "echo below >/sub/file").await;
    let below = run(
        &node,
        &server,
        "cat /work/deep/sub/file; stat -c %g /work/deep/sub",
    )
    .await;
    assert_eq!(below, "below\n2000\n");
    // A socket of one is the other's.
    let link = "ln -s /work/log /dev/log";
    run(&node, &server, &format!("{link}; syslogd -O /tmp/messages")).await;
    run(&node, &client, &format!("{link}; logger over a socket")).await;
    let heard = "for i in $(seq 100); do grep -q 'over a socket' /tmp/messages && exit; sleep 0.1; \
                 done; exit 1";
    run(&node, &server, heard).await;
    let full = node
        .exec(&server, "dd if=/dev/zero of=/memory/big bs=64k count=32")
        .await;
    let error = String::from_utf8_lossy(&full.stderr);
    assert!(error.contains("No space left"), "{error}");

    // kubelet counts what it holds, and what was deleted no more.
    let before = counted(&work);
    let write = "dd if=/dev/zero of=/work/big bs=1M count=32 && sync";
    run(&node, &server, write).await;
    let used = counted(&work);
    assert!(used >= before + (32 << 20), "{before} {used}");
    run(&node, &server, "rm /work/big && sync").await;
    let begin = Instant::now();
    while counted(&work) > before + (8 << 20) {
        assert!(begin.elapsed() < PATIENCE, "{}", counted(&work));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Of the host's own, nothing: no file server was needed.
    let files: Vec<_> = fs::read_dir(&memory).unwrap().collect();
    assert!(files.is_empty(), "{files:?}");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    kubelet.dir.unmount();
    node.finish().await;
}

#[tokio::test]
async fn an_empty_directory_outlives_containers_daemons_and_machines() {
    let mut node = Node::start().await;
    let kubelet = Kubelet::of(&node, "lasting");
    let work = kubelet.empty_dir("work");
    let pod = node.pod("lasting").await;
    let mounts = || vec![mount("/work", &work)];
    let first = idle(&node, &pod, "first", mounts()).await;
    run(&node, &first, "echo one >/work/state").await;
    node.client = node.daemon.kill_and_restart().await;
    // The volume's disk goes with its only user, and comes back.
    node.remove_container(&first).await.unwrap();
    let second = idle(&node, &pod, "second", mounts()).await;
    run(&node, &second, "echo two >>/work/state && sync").await;
    // A machine that dies in the middle.
    for pid in node.vmms() {
        let pid = ProcessId::from_raw(i32::try_from(pid).unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
    }
    node.stop_sandbox(&pod.id).await.unwrap();
    let mut again = node.sandbox("lasting");
    again.metadata.as_mut().unwrap().attempt = 1;
    let next = node.run_sandbox(again).await.unwrap();
    let third = idle(&node, &next, "third", mounts()).await;
    assert_eq!(run(&node, &third, "cat /work/state").await, "one\ntwo\n");
    for pod in [&pod, &next] {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    kubelet.dir.unmount();
    node.finish().await;
}

/// What a container left in a directory that it shared with the host must not lead the daemon to
/// any other file, also where it has the names of the daemon's own.
#[tokio::test]
async fn what_a_container_left_in_an_empty_directory_leads_nowhere() {
    let node = Node::start().await;
    let kubelet = Kubelet::of(&node, "hostile");
    let (work, other) = (kubelet.empty_dir("work"), kubelet.empty_dir("other"));
    let victim = node.dir.join("victim");
    fs::write(&victim, "precious").unwrap();
    let pod = node.pod("hostile").await;
    let shared = |at: &str, volume: &Path| Mount {
        propagation: MountPropagation::PropagationHostToContainer.into(),
        ..mount(at, volume)
    };
    let victim_name = victim.to_str().unwrap();
    // A file of root that looks like an image is in the other; it can't be marked as one.
    let script = format!(
        "ln -s {victim_name} /work/.hull-volume.img.tmp && ln -s {victim_name} /work/.hull-volume.img \
         && cd /other && truncate -s 1G .hull-volume.img && chmod 600 .hull-volume.img"
    );
    let config = ContainerConfig {
        mounts: vec![shared("/work", &work), shared("/other", &other)],
        ..node.script("writer", &script)
    };
    let writer = node.create(&pod, config).await.unwrap();
    node.start_container(&writer).await.unwrap();
    let status = node.client.wait_exited(&writer, PATIENCE).await.unwrap();
    assert_eq!(status.exit_code, 0, "{}", node.log("writer"));
    node.remove_container(&writer).await.unwrap();
    assert!(
        fs::symlink_metadata(work.join(".hull-volume.img"))
            .unwrap()
            .is_symlink()
    );

    let mounts = vec![mount("/work", &work), mount("/other", &other)];
    let user = idle(&node, &pod, "user", mounts).await;
    let found = run(&node, &user, "echo kept >/work/state; ls -A /work /other").await;
    let expected = "/other:\n.hull-volume.img\n\n/work:\n.hull-volume.img\n\
                    .hull-volume.img.tmp\nstate\n";
    assert_eq!(found, expected);
    // They are files of the host, like any others.
    assert_eq!(fs::read_to_string(work.join("state")).unwrap(), "kept\n");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    kubelet.dir.unmount();
    node.finish().await;
}
