//! Paths of the host in containers: what a pod sees and may do, and what the host keeps for
//! itself.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ContainerConfig, IdMapping, Int64Value, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, MountPropagation, NamespaceMode,
    NamespaceOption, PodSandboxConfig, StatusRequest, UserNamespace,
};
use hull_tests::client::image;
use rustix::fs::{CWD, FileType, Mode, mknodat, stat};
use tonic::Code;

use crate::harness::{BUSYBOX, NETWORK_TOOLS, Node, Pod};

const PATIENCE: Duration = Duration::from_secs(120);

pub fn mount(container: &str, host: &Path) -> Mount {
    Mount {
        container_path: container.into(),
        host_path: host.to_str().unwrap().into(),
        ..Default::default()
    }
}

pub fn readonly(mount: Mount, recursive: bool) -> Mount {
    Mount {
        readonly: true,
        recursive_read_only: recursive,
        ..mount
    }
}

/// Creates and starts an idle container with these mounts.
pub async fn idle(node: &Node, pod: &Pod, name: &str, mounts: Vec<Mount>) -> String {
    let config = ContainerConfig {
        mounts,
        ..node.script(name, "sleep 1000")
    };
    let id = node.create(pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    id
}

/// Runs a script that must succeed; returns what it says.
pub async fn run(node: &Node, id: &str, script: &str) -> String {
    let done = node.exec(id, script).await;
    let error = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.exit_code, 0, "{script}: {error}");
    String::from_utf8(done.stdout).unwrap()
}

pub async fn fails(node: &Node, id: &str, script: &str) -> String {
    let done = node.exec(id, script).await;
    assert_ne!(done.exit_code, 0, "{script} should fail");
    String::from_utf8(done.stderr).unwrap()
}

pub fn host(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

/// A directory of the host; what is mounted at or below it is unmounted at the end.
pub struct HostDir(pub PathBuf);

impl HostDir {
    pub fn new(node: &Node, name: &str) -> Self {
        let dir = node.dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// A new ext4, as large as `size` bytes.
    pub fn disk(node: &Node, name: &str, size: u64) -> Self {
        let dir = Self::new(node, name);
        let image = node.dir.join(format!("{}.img", name.replace('/', "-")));
        fs::File::create(&image)
            .and_then(|file| file.set_len(size))
            .unwrap();
        let image = image.to_str().unwrap();
        host("mkfs.ext4", &["-q", "-E", "lazy_itable_init=1", image]);
        host("mount", &["-o", "loop", image, dir.0.to_str().unwrap()]);
        fs::remove_dir(dir.path("lost+found")).unwrap();
        fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    /// The same, where kubelet mounts a volume for a pod of this name.
    pub fn volume(node: &Node, pod: &str, size: u64) -> Self {
        let volumes = format!("kubelet/pods/{pod}-uid/volumes");
        Self::disk(node, &format!("{volumes}/kubernetes.io~csi/pv/mount"), size)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Makes it a mount of its own.
    fn bind(&self, propagation: &str) {
        let dir = self.0.to_str().unwrap();
        host("mount", &["--bind", dir, dir]);
        host("mount", &[propagation, dir]);
    }

    pub fn tmpfs(&self, name: &str) {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        host("mount", &["-t", "tmpfs", "none", dir.to_str().unwrap()]);
    }

    pub fn unmount(&self) {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let below = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let below: Vec<_> = below
            .filter(|at| Path::new(at).starts_with(&self.0))
            .collect();
        for at in below.into_iter().rev() {
            host("umount", &["-l", at]);
        }
    }
}

impl Drop for HostDir {
    fn drop(&mut self) {
        self.unmount();
    }
}

pub async fn end(node: Node, pod: Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_directory_is_shared_both_ways_with_owners_and_modes() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o777)).unwrap();
    dir.write("from-host", "hello\n");
    let pod = node.pod("shared").await;
    let id = idle(&node, &pod, "root", vec![mount("/data", &dir.0)]).await;
    assert_eq!(run(&node, &id, "cat /data/from-host").await, "hello\n");

    let script = "cd /data && echo hi > f && chmod 640 f && chown 12:34 f && mkdir -p a/b \
                  && ln -s f link && mv a c && ln f hard && rm from-host && mkfifo pipe";
    run(&node, &id, script).await;
    assert_eq!(dir.read("f"), "hi\n");
    let meta = fs::metadata(dir.path("f")).unwrap();
    let found = (meta.uid(), meta.gid(), meta.mode() & 0o7777, meta.nlink());
    assert_eq!(found, (12, 34, 0o640, 2));
    assert!(dir.path("c/b").is_dir());
    assert_eq!(fs::read_link(dir.path("link")).unwrap(), Path::new("f"));
    assert!(!dir.path("from-host").exists());
    // Of the guest's kernel: both ends are in this pod.
    let said = run(&node, &id, "(echo through > /data/pipe &) ; cat /data/pipe").await;
    assert_eq!(said, "through\n");
    fails(&node, &id, "mknod /data/null c 1 3").await;

    dir.write("late", "seen\n");
    assert_eq!(run(&node, &id, "cat /data/late").await, "seen\n");
    dir.write("late", "changed\n");
    assert_eq!(run(&node, &id, "cat /data/late").await, "changed\n");
    fs::remove_file(dir.path("late")).unwrap();
    fails(&node, &id, "cat /data/late").await;

    // As another user, who owns what it makes.
    let config = ContainerConfig {
        mounts: vec![mount("/data", &dir.0)],
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                run_as_user: Some(Int64Value { value: 1000 }),
                run_as_group: Some(Int64Value { value: 2000 }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..node.script("user", "sleep 1000")
    };
    let user = node.create(&pod, config).await.unwrap();
    node.start_container(&user).await.unwrap();
    run(&node, &user, "touch /data/mine && mkdir /data/dir").await;
    for name in ["mine", "dir"] {
        let meta = fs::metadata(dir.path(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1000, 2000), "{name}");
    }
    fails(&node, &user, "cat /data/f").await;
    // Both containers have one file.
    run(&node, &id, "echo one > /data/both").await;
    assert_eq!(run(&node, &user, "cat /data/both").await, "one\n");
    end(node, pod).await;
}

/// Bytes that the file server of this share has read so far.
fn bytes_served(dir: &Path) -> u64 {
    // As from the root of its file system, which may be mounted at /tmp.
    let node = dir.parent().and_then(Path::file_name).unwrap();
    let root = Path::new(node).join(dir.file_name().unwrap());
    let root = root.to_str().unwrap();
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let serves = |pid: &PathBuf| {
        let comm = fs::read_to_string(pid.join("comm")).unwrap_or_default();
        let mounts = fs::read_to_string(pid.join("mountinfo")).unwrap_or_default();
        comm.starts_with("hull-fs") && mounts.contains(root)
    };
    let read = |pid: PathBuf| {
        let io = fs::read_to_string(pid.join("io")).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
        line.unwrap().parse::<u64>().unwrap()
    };
    pids.map(|pid| pid.path()).filter(serves).map(read).sum()
}

#[tokio::test]
async fn a_file_that_is_read_again_is_in_the_guests_memory() {
    const SIZE: u64 = 4 << 20;
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    dir.write("file", &"x".repeat(SIZE as usize));
    let pod = node.pod("again").await;
    let id = idle(&node, &pod, "root", vec![mount("/data", &dir.0)]).await;
    let ahead = "while read -r id parent device root at rest; do if [ $at = /data ]; then \
                 cat /sys/class/bdi/$device/read_ahead_kb; fi; done < /proc/self/mountinfo";
    assert_eq!(run(&node, &id, ahead).await, "1024\n");
    // It is closed each time, and by the second it is older than a tick of any file system.
    let read = async || {
        let before = bytes_served(&dir.0);
        let script = "sleep 3; sha256sum < /data/file";
        let sum = run(&node, &id, script).await;
        (sum, bytes_served(&dir.0) - before)
    };
    let (sum, first) = read().await;
    assert!(first >= SIZE, "{first}");
    let mut again = (String::new(), u64::MAX);
    for _ in 0..2 {
        again = read().await;
        assert_eq!(again.0, sum);
    }
    assert!(again.1 < SIZE / 100, "{} bytes were read again", again.1);

    // As long, and changed by the host.
    let file = fs::File::options().write(true).open(dir.path("file"));
    std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), b"y", SIZE / 2).unwrap();
    let (changed, bytes) = read().await;
    assert!(changed != sum && bytes >= SIZE, "{bytes}");
    end(node, pod).await;
}

#[tokio::test]
async fn what_no_other_pod_has_is_believed_for_longer() {
    let node = Node::start().await;
    let [volume, plain] = [
        HostDir::volume(&node, "alone", 16 << 20),
        HostDir::disk(&node, "plain", 16 << 20),
    ];
    for dir in [&volume, &plain] {
        dir.write("file", "first");
    }
    let pod = node.pod("alone").await;
    let mounts = vec![mount("/volume", &volume.0), mount("/plain", &plain.0)];
    let id = idle(&node, &pod, "root", mounts).await;
    let sees = async |script: &str| run(&node, &id, script).await;
    let look = "stat -c %s /volume/file /plain/file; stat /volume/more 2> /dev/null; echo $?";
    assert_eq!(sees(look).await, "5\n5\n1\n");
    // Nobody should.
    for dir in [&volume, &plain] {
        dir.write("file", "longer");
        dir.write("more", "");
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(sees(look).await, "5\n6\n1\n");
    // Who opens it sees what is there.
    assert_eq!(sees("cat /volume/file /plain/file").await, "longerlonger");
    // What the guest does it knows.
    let own = "cd /volume; echo x > new; mv new newer; rm file; mkdir sub; ln newer sub/link; echo y >> sub/link; \
               ls; cat newer; cat new || stat file || stat -c %h newer";
    // A listing is as new as what the guest knows of the directory.
    assert_eq!(sees(own).await, "more\nnewer\nsub\nx\ny\n2\n");
    assert_eq!(volume.read("newer"), "x\ny\n");

    // Another pod gets the volume: what the guest is told from now on it believes for a second.
    let other = HostDir::new(
        &node,
        "kubelet/pods/other/volumes/kubernetes.io~csi/pv/mount",
    );
    let [from, to] = [&volume, &other].map(|dir| dir.0.to_str().unwrap());
    host("mount", &["--bind", from, to]);
    volume.write("unseen", "1");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(sees("stat -c %s /volume/unseen").await, "1\n");
    volume.write("unseen", "22");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(sees("stat -c %s /volume/unseen").await, "2\n");

    // What was written is the host's, also if its VM is killed before anything is closed or synced.
    let held = "cd /volume; (exec 3> held; echo held >&3; sleep 1000) > /dev/null 2>&1 & \
                while [ ! -s /volume/held ]; do sleep 0.1; done";
    sees(held).await;
    for pid in node.vmms() {
        host("kill", &["-9", &pid.to_string()]);
    }
    assert_eq!(volume.read("held"), "held\n");
    other.unmount();
    volume.unmount();
    plain.unmount();
    end(node, pod).await;
}

/// Of kubelet's: 65536 ids of a pod's own.
const IDS: IdMapping = IdMapping {
    host_id: 100_000,
    container_id: 0,
    length: 65_536,
};

/// As kubelet mounts all in a pod with a user namespace.
fn mapped(mount: Mount, ids: IdMapping) -> Mount {
    Mount {
        uid_mappings: vec![ids],
        gid_mappings: vec![ids],
        ..mount
    }
}

async fn pod_with_user_namespace(node: &Node, name: &str) -> Pod {
    node.client.pull(BUSYBOX).await.unwrap();
    let options = NamespaceOption {
        userns_options: Some(UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![IDS],
            gids: vec![IDS],
        }),
        ..Default::default()
    };
    let config = PodSandboxConfig {
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..node.sandbox(name)
    };
    node.run_sandbox(config).await.unwrap()
}

/// User, group and mode of a file of the host.
fn owner(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.uid(), meta.gid(), meta.mode() & 0o7777)
}

#[tokio::test]
async fn owners_in_a_user_namespace_are_those_of_the_host() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755)).unwrap();
    for (name, id) in [("theirs", 1000), ("beyond", 200_000)] {
        dir.write(name, &format!("{name}\n"));
        chown(dir.path(name), Some(id), Some(id)).unwrap();
        fs::set_permissions(dir.path(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    for name in ["hosts", "resolv.conf", "token"] {
        dir.write(name, &format!("{name} of kubelet\n"));
        fs::set_permissions(dir.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    let pod = pod_with_user_namespace(&node, "owners").await;
    let mounts = vec![
        mapped(mount("/data", &dir.0), IDS),
        mapped(readonly(mount("/ro", &dir.0), false), IDS),
        mapped(readonly(mount("/rro", &dir.0), true), IDS),
        mapped(mount("/etc/hosts", &dir.path("hosts")), IDS),
        mapped(
            readonly(mount("/etc/resolv.conf", &dir.path("resolv.conf")), false),
            IDS,
        ),
    ];
    let root = idle(&node, &pod, "root", mounts.clone()).await;
    let status = node.client.container_status(&root).await.unwrap();
    assert_eq!(status.mounts, mounts);
    let map = run(&node, &root, "tr -s ' ' < /proc/self/uid_map").await;
    assert_eq!(map, " 0 100000 65536\n");

    // What is there: the same owners, and nobody for those that the pod has no id for.
    let script = "stat -c '%n %u %g' /data /data/theirs /data/beyond /etc/hosts";
    let expected = "/data 0 0\n/data/theirs 1000 1000\n/data/beyond 65534 65534\n/etc/hosts 0 0\n";
    assert_eq!(run(&node, &root, script).await, expected);
    let script = "cat /data/theirs /data/token /etc/hosts /etc/resolv.conf";
    let expected = "theirs\ntoken of kubelet\nhosts of kubelet\nresolv.conf of kubelet\n";
    assert_eq!(run(&node, &root, script).await, expected);
    for script in [
        "cat /data/beyond",
        "chmod 666 /data/beyond",
        "chown 0 /data/beyond",
        "chown 65536 /data/token",
    ] {
        fails(&node, &root, script).await;
    }

    // What its root makes and changes.
    let script = "cd /data && umask 027 && echo hi > f && mkdir d && mkfifo pipe && ln -s f link \
                  && echo long > short && truncate -s 2 short && echo x > g && mv g moved \
                  && ln moved hard && echo x > gone && rm gone && echo x >> /etc/hosts";
    run(&node, &root, script).await;
    for (name, mode) in [("f", 0o640), ("d", 0o750), ("pipe", 0o640), ("link", 0o777)] {
        assert_eq!(owner(&dir.path(name)), (0, 0, mode), "{name}");
    }
    assert_eq!(dir.read("short"), "lo");
    assert_eq!(fs::metadata(dir.path("moved")).unwrap().nlink(), 2);
    assert!(!dir.path("gone").exists() && !dir.path("g").exists());
    assert_eq!(dir.read("hosts"), "hosts of kubelet\nx\n");
    let script = "cd /data && chown 12:34 f && chown -h 5:6 link && chgrp 3000 d && chmod 2775 d \
                  && echo x > d/in && mkdir d/sub && chown 0:0 theirs && chmod 4755 theirs \
                  && stat -c '%u %g %a' f link d d/in theirs";
    assert_eq!(
        run(&node, &root, script).await,
        "12 34 640\n5 6 777\n0 3000 2775\n0 3000 644\n0 0 4755\n"
    );
    for (name, owned) in [
        ("f", (12, 34, 0o640)),
        ("link", (5, 6, 0o777)),
        ("d", (0, 3000, 0o2775)),
        ("d/in", (0, 3000, 0o644)),
        ("d/sub", (0, 3000, 0o2755)),
        ("theirs", (0, 0, 0o4755)),
    ] {
        assert_eq!(owner(&dir.path(name)), owned, "{name}");
    }
    for script in [
        "touch /ro/x",
        "chmod 777 /ro/f",
        "rm /rro/f",
        "echo x >> /etc/resolv.conf",
    ] {
        let error = fails(&node, &root, script).await;
        assert!(error.contains("Read-only file system"), "{script}: {error}");
    }

    // Another of its users, with a group that the directory belongs to.
    let config = ContainerConfig {
        mounts: mounts.clone(),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                run_as_user: Some(Int64Value { value: 1000 }),
                run_as_group: Some(Int64Value { value: 2000 }),
                supplemental_groups: vec![3000],
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..node.script("user", "sleep 1000")
    };
    let user = node.create(&pod, config).await.unwrap();
    node.start_container(&user).await.unwrap();
    run(&node, &user, "touch /data/d/mine && mkdir /data/d/sub2").await;
    assert_eq!(owner(&dir.path("d/mine")), (1000, 3000, 0o644));
    assert_eq!(owner(&dir.path("d/sub2")), (1000, 3000, 0o2755));
    for script in ["touch /data/x", "cat /data/token", "chown 1 /data/d/mine"] {
        fails(&node, &user, script).await;
    }
    assert_eq!(run(&node, &root, "stat -c %u /data/d/mine").await, "1000\n");
    // The root of the container and the pod's own files are the namespace's, too.
    let script = "echo x > /root/x && echo x > /dev/shm/x && cat /srv/secret > /dev/null \
                  && stat -c '%u %g' /root/x /dev/shm/x /srv/secret /etc/hostname";
    assert_eq!(run(&node, &root, script).await, "0 0\n0 0\n33 33\n0 0\n");
    end(node, pod).await;
}

#[tokio::test]
async fn a_mount_without_mappings_has_owners_from_outside_of_the_user_namespace() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(dir.path("pods")).unwrap();
    chown(dir.path("pods"), Some(100_000), Some(101_000)).unwrap();
    let pod = pod_with_user_namespace(&node, "outside").await;
    let of_image = Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(image(BUSYBOX)),
        image_sub_path: "srv".into(),
        ..Default::default()
    };
    let as_kubelet = Mount {
        container_path: "/image2".into(),
        ..mapped(of_image.clone(), IDS)
    };
    let mounts = vec![mount("/data", &dir.0), of_image, as_kubelet];
    let id = idle(&node, &pod, "main", mounts).await;
    let script = "stat -c '%u %g' /data /data/pods /image/secret /image2/secret";
    let expected = "65534 65534\n0 1000\n33 33\n33 33\n";
    assert_eq!(run(&node, &id, script).await, expected);
    fails(&node, &id, "touch /data/x").await;
    run(
        &node,
        &id,
        "echo x > /data/pods/f && chown 1:2 /data/pods/f",
    )
    .await;
    assert_eq!(owner(&dir.path("pods/f")), (100_001, 100_002, 0o644));

    // No other mapping than the pod's is possible.
    let plain = node.pod("plain").await;
    let other = IdMapping {
        host_id: 200_000,
        ..IDS
    };
    for (pod, ids) in [(&pod, other), (&plain, IDS)] {
        let config = ContainerConfig {
            mounts: vec![mapped(mount("/data", &dir.0), ids)],
            ..node.script("refused", "true")
        };
        let error = node.create(pod, config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        let field = "config.mounts[0].uidMappings";
        assert!(error.message().contains(field), "{error}");
    }
    node.stop_sandbox(&plain.id).await.unwrap();
    node.remove_sandbox(&plain.id).await.unwrap();
    end(node, pod).await;
}

#[tokio::test]
async fn files_and_symlinks_of_the_host_are_mounted() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    for name in ["hosts", "resolv.conf", "hostname", "termination"] {
        dir.write(name, &format!("{name} of kubelet\n"));
    }
    fs::create_dir(dir.path("real")).unwrap();
    fs::write(dir.path("real/file"), "through a link\n").unwrap();
    symlink("real", dir.path("link")).unwrap();
    symlink(dir.path("real/file"), dir.path("link-to-file")).unwrap();
    let pod = node.pod("files").await;
    let mounts = vec![
        mount("/deep/in/link", &dir.path("link")),
        mount("/dev/termination-log", &dir.path("termination")),
        mount("/etc/hosts", &dir.path("hosts")),
        readonly(mount("/etc/resolv.conf", &dir.path("resolv.conf")), false),
        mount("/etc/hostname", &dir.path("hostname")),
        mount("/new/file", &dir.path("link-to-file")),
    ];
    let id = idle(&node, &pod, "main", mounts.clone()).await;
    for (file, text) in [
        ("/etc/hosts", "hosts of kubelet\n"),
        ("/etc/resolv.conf", "resolv.conf of kubelet\n"),
        ("/etc/hostname", "hostname of kubelet\n"),
        ("/deep/in/link/file", "through a link\n"),
        ("/new/file", "through a link\n"),
    ] {
        assert_eq!(run(&node, &id, &format!("cat {file}")).await, text);
    }
    run(&node, &id, "echo done > /dev/termination-log").await;
    assert_eq!(dir.read("termination"), "done\n");
    fails(&node, &id, "echo no > /etc/resolv.conf").await;
    assert_eq!(dir.read("resolv.conf"), "resolv.conf of kubelet\n");

    let status = node.client.container_status(&id).await.unwrap();
    assert_eq!(status.mounts, mounts);
    // The mounts go with the container; the next one has its own.
    node.stop_container(&id, 0).await.unwrap();
    node.remove_container(&id).await.unwrap();
    let again = idle(&node, &pod, "again", vec![mount("/x", &dir.path("hosts"))]).await;
    assert_eq!(run(&node, &again, "cat /x").await, "hosts of kubelet\n");
    let shared = run(&node, &again, "grep -c virtiofs /proc/mounts").await;
    assert_eq!(shared, "1\n");
    end(node, pod).await;
}

#[tokio::test]
async fn read_only_mounts_refuse_writes_and_recursive_ones_below_mounts_too() {
    let node = Node::start().await;
    let mut client = node.client.runtime.clone();
    let answer = client.status(StatusRequest { verbose: false }).await;
    for handler in answer.unwrap().into_inner().runtime_handlers {
        assert!(handler.features.unwrap().recursive_read_only_mounts);
    }
    let dir = HostDir::new(&node, "data");
    dir.write("f", "as it was\n");
    dir.tmpfs("below");
    let pod = node.pod("readonly").await;
    let mounts = vec![
        mount("/rw", &dir.0),
        readonly(mount("/ro", &dir.0), false),
        readonly(mount("/rro", &dir.0), true),
    ];
    let id = idle(&node, &pod, "main", mounts).await;
    run(&node, &id, "touch /rw/a /rw/below/a /ro/below/b").await;
    assert!(dir.path("below/a").exists() && dir.path("below/b").exists());
    for script in [
        "touch /ro/c",
        "echo x > /ro/f",
        "rm /ro/f",
        "chmod 777 /ro/f",
        "mkdir /ro/d",
        "touch /rro/c",
        "touch /rro/below/c",
        "rm /rro/below/a",
        "mv /rro/f /rro/g",
    ] {
        let error = fails(&node, &id, script).await;
        assert!(error.contains("Read-only file system"), "{script}: {error}");
    }
    assert_eq!(run(&node, &id, "cat /rro/f /ro/f").await.lines().count(), 2);
    assert_eq!(dir.read("f"), "as it was\n");
    // In the guest, root may do what it likes with its mounts: the host still refuses.
    let again = "mount -o remount,rw /ro; mount -o remount,rw,bind /rro; touch /rro/x";
    fails(&node, &id, again).await;
    dir.unmount();
    end(node, pod).await;
}

#[tokio::test]
async fn what_a_vm_cannot_have_is_refused_by_field() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    let _socket = std::os::unix::net::UnixListener::bind(dir.path("socket")).unwrap();
    symlink("nowhere", dir.path("dangling")).unwrap();
    let null = stat("/dev/null").unwrap().st_rdev;
    let (device, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
    mknodat(CWD, dir.path("device"), device, mode, null).unwrap();
    let with = |mount: Mount, propagation: MountPropagation| Mount {
        propagation: propagation.into(),
        ..mount
    };
    let both_ways = MountPropagation::PropagationBidirectional;
    let one_way = MountPropagation::PropagationHostToContainer;
    let pod = node.pod("refused").await;
    let good = mount("/good", &dir.0);
    for (bad, field, word) in [
        (mount("/x", &dir.path("absent")), "host_path", "absent"),
        (mount("/x", &dir.path("dangling")), "host_path", "dangling"),
        (mount("/x", &dir.path("device")), "host_path", "device"),
        (mount("/x", &dir.path("socket")), "host_path", "socket"),
        (
            with(good.clone(), both_ways),
            "propagation",
            "BIDIRECTIONAL",
        ),
        (
            with(readonly(good.clone(), true), one_way),
            "recursive_read_only",
            "private",
        ),
        (with(readonly(good.clone(), true), both_ways), "", ""),
        (
            Mount {
                recursive_read_only: true,
                ..good.clone()
            },
            "recursive_read_only",
            "readonly",
        ),
    ] {
        let config = ContainerConfig {
            mounts: vec![good.clone(), bad.clone()],
            ..node.script("main", "true")
        };
        let error = node.create(&pod, config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{bad:?}: {error}");
        let wanted = format!("config.mounts[1].{field}");
        assert!(error.message().contains(&wanted), "{error}");
        assert!(error.message().contains(word), "{error}");
    }
    // The refusals left nothing: the name is free, the pod works.
    let id = idle(&node, &pod, "main", vec![good]).await;
    run(&node, &id, "touch /good/f").await;
    end(node, pod).await;
}

#[tokio::test]
async fn mounts_made_later_on_the_host_appear_where_they_should() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    dir.bind("--make-shared");
    fs::create_dir(dir.path("point")).unwrap();
    let pod = node.pod("propagation").await;
    let slave = Mount {
        propagation: MountPropagation::PropagationHostToContainer.into(),
        ..mount("/slave", &dir.0)
    };
    let id = idle(&node, &pod, "main", vec![mount("/private", &dir.0), slave]).await;
    run(&node, &id, "ls /slave/point /private/point").await;
    dir.tmpfs("point");
    dir.write("point/late", "late\n");
    // A guest believes for a second in what it was told of a directory.
    let unlearned = Duration::from_millis(1500);
    tokio::time::sleep(unlearned).await;
    assert_eq!(run(&node, &id, "cat /slave/point/late").await, "late\n");
    assert_eq!(run(&node, &id, "ls /private/point").await, "");
    host("umount", &["-l", dir.path("point").to_str().unwrap()]);
    tokio::time::sleep(unlearned).await;
    assert_eq!(run(&node, &id, "ls /slave/point").await, "");
    dir.unmount();
    end(node, pod).await;
}

/// A volume of kubelet's below a directory of the host, which it replaces as a whole.
pub struct Live(pub PathBuf);

impl Live {
    pub fn new(dir: &HostDir, plugin: &str, name: &str) -> Self {
        let path = dir.path("volumes").join(plugin).join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Does what kubelet's AtomicWriter does, with owners and modes of an fsGroup.
    pub fn replace(&self, version: &str, keys: &[(&str, &str)], group: u32) {
        let old = fs::read_link(self.0.join("..data")).ok();
        let new = self.0.join(version);
        fs::create_dir(&new).unwrap();
        chown(&new, None, Some(group)).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o2775)).unwrap();
        for (key, text) in keys {
            fs::write(new.join(key), text).unwrap();
            chown(new.join(key), None, Some(group)).unwrap();
            fs::set_permissions(new.join(key), fs::Permissions::from_mode(0o440)).unwrap();
        }
        symlink(version, self.0.join("..data_tmp")).unwrap();
        fs::rename(self.0.join("..data_tmp"), self.0.join("..data")).unwrap();
        for (key, _) in keys {
            let _ = symlink(format!("..data/{key}"), self.0.join(key));
        }
        if let Some(old) = old {
            for key in fs::read_dir(self.0.join(&old)).unwrap() {
                let key = key.unwrap().file_name();
                if !new.join(&key).exists() {
                    fs::remove_file(self.0.join(key)).unwrap();
                }
            }
            fs::remove_dir_all(self.0.join(old)).unwrap();
        }
    }
}

/// Creates and starts a container that writes down what inotify tells of `/config`.
async fn watcher(node: &Node, pod: &Pod, mounts: Vec<Mount>) -> String {
    node.client.pull(NETWORK_TOOLS).await.unwrap();
    let script = "inotifywait -mq --format '%e %f' /config >>/tmp/seen & sleep 1000";
    let config = ContainerConfig {
        image: Some(image(NETWORK_TOOLS)),
        mounts,
        ..node.script("watcher", script)
    };
    let id = node.create(pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let inotify = "for i in $(seq 300); do grep -qs ^inotify /proc/[0-9]*/fdinfo/* && exit; \
                   sleep 0.1; done; exit 1";
    run(node, &id, inotify).await;
    id
}

/// Waits until a watcher was told that `..data` is another one; it forgets what it was told.
async fn was_told(node: &Node, id: &str) {
    let script = "for i in $(seq 300); do grep -qx 'MOVED_TO ..data' /tmp/seen && break; \
                  sleep 0.1; done; cat /tmp/seen; grep -qx 'MOVED_TO ..data' /tmp/seen && >/tmp/seen";
    run(node, id, script).await;
}

#[tokio::test]
async fn a_config_map_is_live_and_can_be_watched() {
    let mut node = Node::start().await;
    let dir = HostDir::new(&node, "kubelet");
    let config = Live::new(&dir, "kubernetes.io~configmap", "config");
    let secret = Live::new(&dir, "kubernetes.io~secret", "secret");
    config.replace("..1", &[("a", "a1\n"), ("b", "b1\n")], 3000);
    secret.replace("..1", &[("token", "1\n")], 0);
    chown(&config.0, None, Some(3000)).unwrap();
    fs::set_permissions(&config.0, fs::Permissions::from_mode(0o2777)).unwrap();
    let pod = node.pod("config").await;
    let mounts = || {
        vec![
            readonly(mount("/config", &config.0), false),
            readonly(mount("/secret", &secret.0), true),
        ]
    };
    let id = watcher(&node, &pod, mounts()).await;
    let other = idle(&node, &pod, "other", mounts()).await;
    let script = "cat /config/a /config/b /secret/token && \
                  stat -c '%n %u %g %a' /config /config/..data/ /config/..data/a";
    let owned = "/config 0 3000 2777\n/config/..data/ 0 3000 2775\n/config/..data/a 0 3000 440\n";
    assert_eq!(run(&node, &id, script).await, format!("a1\nb1\n1\n{owned}"));
    for script in ["touch /config/x", "rm /secret/token", "chmod 777 /config"] {
        let error = fails(&node, &id, script).await;
        assert!(error.contains("Read-only file system"), "{script}: {error}");
    }

    // Never a mix: who is in the directory has one version, and there always is one.
    let script = "while [ ! -e /tmp/end ]; do cd /config/..data/ || echo none; \
                  a=$(cat a 2>/dev/null); b=$(cat b 2>/dev/null); \
                  [ -z \"$a\" ] || [ -z \"$b\" ] || [ ${a#a} = ${b#b} ] || echo mix; \
                  done >/tmp/mixes 2>&1 &";
    run(&node, &other, script).await;
    config.replace("..2", &[("a", "a2\n"), ("b", "b2\n"), ("c", "c2\n")], 3000);
    secret.replace("..2", &[("token", "2\n")], 0);
    was_told(&node, &id).await;
    let told = "for i in $(seq 300); do grep -qx 2 /secret/token && exit; sleep 0.1; done; exit 1";
    run(&node, &id, told).await;
    for id in [&id, &other] {
        assert_eq!(run(&node, id, "cat /config/*").await, "a2\nb2\nc2\n");
    }
    let mixes = run(&node, &other, "touch /tmp/end; cat /tmp/mixes").await;
    assert_eq!(mixes, "");

    // Of a daemon that is not there at the time, and of the next one.
    node.daemon.kill();
    config.replace("..3", &[("a", "a3\n"), ("b", "b3\n")], 3000);
    node.client = node.daemon.restart().await;
    was_told(&node, &id).await;
    assert_eq!(run(&node, &id, "cat /config/*").await, "a3\nb3\n");
    config.replace("..4", &[("a", "a4\n"), ("b", "b4\n")], 3000);
    was_told(&node, &id).await;
    assert_eq!(run(&node, &other, "cat /config/*").await, "a4\nb4\n");

    // Too large for a copy: the last one stays, and the pod says so. A container that is made now
    // has the volume itself.
    let large = "x".repeat(5 << 20);
    config.replace("..5", &[("a", "a5\n"), ("b", &large)], 3000);
    let deadline = Instant::now() + PATIENCE;
    while !node
        .warning(&pod)
        .await
        .contains("config: it has more than")
    {
        assert!(Instant::now() < deadline, "nobody is told");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(run(&node, &id, "cat /config/*").await, "a4\nb4\n");
    let late = idle(&node, &pod, "late", mounts()).await;
    assert_eq!(run(&node, &late, "cat /config/a").await, "a5\n");
    assert_eq!(run(&node, &late, "wc -c </config/b").await, "5242880\n");
    config.replace("..6", &[("a", "a6\n")], 3000);
    was_told(&node, &id).await;
    assert_eq!(run(&node, &id, "cat /config/*").await, "a6\n");
    assert_eq!(run(&node, &late, "cat /config/*").await, "a6\n");
    while !node.warning(&pod).await.is_empty() {
        assert!(Instant::now() < deadline, "the warning stays");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    end(node, pod).await;
}

#[tokio::test]
async fn a_live_volume_in_a_user_namespace_has_its_owners_and_its_mount_points() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "kubelet");
    let config = Live::new(&dir, "kubernetes.io~projected", "all");
    config.replace("..1", &[("a", "1\n")], 3000);
    fs::create_dir_all(config.0.join("nested/deep")).unwrap();
    dir.write("inner", "inner\n");
    let pod = pod_with_user_namespace(&node, "users").await;
    let mounts = vec![
        mapped(mount("/config/nested/deep", &dir.0), IDS),
        mapped(readonly(mount("/config", &config.0), false), IDS),
    ];
    let id = watcher(&node, &pod, mounts).await;
    let script = "stat -c '%u %g %a' /config/..data/ /config/..data/a; \
                  cat /config/nested/deep/inner";
    assert_eq!(
        run(&node, &id, script).await,
        "0 3000 2775\n0 3000 440\ninner\n"
    );
    config.replace("..2", &[("a", "2\n")], 1000);
    was_told(&node, &id).await;
    assert_eq!(run(&node, &id, "cat /config/a").await, "2\n");
    assert_eq!(
        run(&node, &id, script).await,
        "0 1000 2775\n0 1000 440\ninner\n"
    );
    fails(&node, &id, "touch /config/x").await;
    end(node, pod).await;
}

#[tokio::test]
async fn a_large_file_comes_through_unchanged_both_ways() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    let mut block = vec![0_u8; 1 << 20];
    let mut state = 1_u64;
    for byte in &mut block {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = (state >> 33) as u8;
    }
    let text: Vec<u8> = (0..12_u8)
        .flat_map(|number| block.iter().map(move |byte| byte ^ number))
        .collect();
    fs::write(dir.path("in"), &text).unwrap();
    let sum = |name: &str| {
        let done = Command::new("sha256sum").arg(dir.path(name)).output();
        let line = String::from_utf8(done.unwrap().stdout).unwrap();
        line.split(' ').next().unwrap().to_owned()
    };
    let pod = node.pod("large").await;
    let id = idle(&node, &pod, "main", vec![mount("/data", &dir.0)]).await;
    let script =
        "cd /data && dd if=in of=out bs=1M 2>/dev/null && sha256sum in out | cut -d' ' -f1";
    let sums = run(&node, &id, script).await;
    let expected = sum("in");
    assert_eq!(sums, format!("{expected}\n{expected}\n"));
    assert_eq!(sum("out"), expected);
    end(node, pod).await;
}

#[tokio::test]
async fn shares_survive_the_daemon_and_go_with_their_containers() {
    let mut node = Node::start().await;
    let dir = HostDir::new(&node, "data");
    dir.write("f", "here\n");
    let disk = HostDir::new(&node, "disk");
    disk.tmpfs("fs");
    let pod = node.pod("survivor").await;
    let main = idle(&node, &pod, "main", vec![mount("/data", &dir.0)]).await;
    let writing = "exec 3>/data/open; sleep 1; while :; do echo tick >&3; sleep 0.1; done";
    let config = ContainerConfig {
        mounts: vec![mount("/data", &dir.0), mount("/fs", &disk.path("fs"))],
        ..node.script("writer", writing)
    };
    let writer = node.create(&pod, config).await.unwrap();
    node.start_container(&writer).await.unwrap();
    let servers = file_servers(&node);
    assert_eq!(servers.len(), 1, "one for the pod");

    node.client = node.daemon.kill_and_restart().await;
    assert_eq!(file_servers(&node), servers);
    assert_eq!(run(&node, &main, "cat /data/f").await, "here\n");
    let before = fs::metadata(dir.path("open")).unwrap().len();
    run(&node, &main, "sleep 1").await;
    let after = fs::metadata(dir.path("open")).unwrap().len();
    assert!(after > before, "{before} {after}");
    let late = idle(&node, &pod, "late", vec![mount("/late", &dir.0)]).await;
    run(&node, &late, "touch /late/made").await;
    assert!(dir.path("made").exists());
    assert_eq!(file_servers(&node), servers);

    // What a container had of the host is let go of with it, whatever the guest has cached.
    run(&node, &writer, "touch /fs/x && cat /fs/x && ls -l /fs").await;
    node.stop_container(&writer, 0).await.unwrap();
    node.remove_container(&writer).await.unwrap();
    for pid in &servers {
        let children = format!("/proc/{pid}/task/{pid}/children");
        let child = fs::read_to_string(children).unwrap();
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", child.trim())).unwrap();
        assert!(!mounts.contains(&writer), "{mounts}");
        assert!(mounts.contains(&main), "{mounts}");
    }
    assert_eq!(node.warning(&pod).await, "");
    // A file server that dies takes its files along, not the pod, which says so: to each daemon.
    host("kill", &["-9", &servers[0].to_string()]);
    for _ in 0..2 {
        let error = fails(&node, &main, "cat /data/f").await;
        assert!(error.contains("Input/output error"), "{error}");
        assert_eq!(run(&node, &main, "echo alive").await, "alive\n");
        let deadline = Instant::now() + PATIENCE;
        while !node.warning(&pod).await.contains("file server") {
            assert!(Instant::now() < deadline, "nobody is told");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let config = ContainerConfig {
            mounts: vec![mount("/data", &dir.0)],
            ..node.script("refused", "true")
        };
        let error = node.create(&pod, config).await.unwrap_err();
        assert!(error.message().contains("file server"), "{error}");
        node.client = node.daemon.kill_and_restart().await;
    }
    disk.unmount();
    end(node, pod).await;
}

/// As kubelet makes them: a directory, and a small tmpfs for one in memory.
#[tokio::test]
async fn containers_of_a_pod_share_an_empty_directory() {
    let node = Node::start().await;
    let dir = HostDir::new(&node, "empty");
    fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o777)).unwrap();
    let memory = HostDir::new(&node, "memory");
    let at = memory.0.to_str().unwrap();
    host(
        "mount",
        &["-t", "tmpfs", "-o", "size=1m,mode=1777", "none", at],
    );
    let pod = node.pod("sharing").await;
    let mounts = || vec![mount("/work", &dir.0), mount("/memory", &memory.0)];
    // One that prepares it and ends, as an init container does.
    let config = ContainerConfig {
        mounts: mounts(),
        ..node.script("init", "echo prepared >/work/state")
    };
    let init = node.create(&pod, config).await.unwrap();
    node.start_container(&init).await.unwrap();
    node.client.wait_exited(&init, PATIENCE).await.unwrap();
    let server = idle(&node, &pod, "server", mounts()).await;
    let client = idle(&node, &pod, "client", mounts()).await;
    assert_eq!(run(&node, &client, "cat /work/state").await, "prepared\n");
    run(&node, &server, "echo serving >>/work/state").await;
    assert_eq!(
        run(&node, &client, "cat /work/state").await,
        "prepared\nserving\n"
    );
    // A socket: syslogd's. Both find it through /dev/log.
    let link = "ln -s /work/log /dev/log";
    let serve = format!("{link}; syslogd -O /work/messages");
    run(&node, &server, &serve).await;
    run(&node, &client, &format!("{link}; logger over a socket")).await;
    let heard = "for i in $(seq 100); do grep -q 'over a socket' /work/messages && exit; sleep 0.1; \
                 done; exit 1";
    run(&node, &server, heard).await;
    // A pipe with an end in each.
    let listen = "mkfifo /work/pipe; cat /work/pipe >/work/got </dev/null 2>/dev/null &";
    run(&node, &server, listen).await;
    run(
        &node,
        &client,
        "until [ -p /work/pipe ]; do sleep 0.1; done; echo over a pipe >/work/pipe",
    )
    .await;
    let got = "for i in $(seq 100); do grep '' /work/got && exit; sleep 0.1; done; exit 1";
    assert_eq!(run(&node, &server, got).await, "over a pipe\n");
    // A lock of one holds off the other.
    let hold = "exec 3>/work/lock; flock 3; sleep 1000 >/dev/null 2>&1 </dev/null &";
    run(&node, &server, hold).await;
    fails(&node, &client, "flock -n /work/lock true").await;
    // kubelet sees how much it holds.
    run(
        &node,
        &client,
        "dd if=/dev/zero of=/work/big bs=1M count=3 && sync",
    )
    .await;
    assert_eq!(
        fs::metadata(dir.path("big")).unwrap().blocks() * 512,
        3 << 20
    );

    // In memory: shared, and as large as it was made.
    run(&node, &server, "echo both >/memory/f").await;
    assert_eq!(run(&node, &client, "cat /memory/f").await, "both\n");
    let full = "dd if=/dev/zero of=/memory/big bs=64k count=32";
    let error = fails(&node, &client, full).await;
    assert!(error.contains("No space left"), "{error}");
    memory.unmount();
    end(node, pod).await;
}

/// The file servers of a node, but for the processes that they started.
fn file_servers(node: &Node) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| {
            let command = fs::read_to_string(process.path().join("cmdline")).ok()?;
            let ours = command.contains("/fs.sock\0") && command.contains(node.dir.to_str()?);
            ours.then(|| process.file_name().to_str()?.parse().ok())?
        })
        .collect()
}

#[tokio::test]
async fn a_pod_without_host_paths_has_no_file_server() {
    let node = Node::start().await;
    let config: PodSandboxConfig = node.sandbox("plain");
    node.client.pull(BUSYBOX).await.unwrap();
    let pod = node.run_sandbox(config).await.unwrap();
    let id = idle(&node, &pod, "main", Vec::new()).await;
    assert!(file_servers(&node).is_empty());
    let dir = HostDir::new(&node, "data");
    let other = idle(&node, &pod, "other", vec![mount("/data", &dir.0)]).await;
    run(&node, &other, "touch /data/f").await;
    assert_eq!(file_servers(&node).len(), 1);
    run(&node, &id, "true").await;
    end(node, pod).await;
}
