//! A pod that counts in its memory is checkpointed and restored, twice, in real VMs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    CheckpointPodRequest, ContainerConfig, ContainerState, PodSandboxConfig, RestorePodRequest,
};
use tonic::Code;

use crate::{
    harness::{Node, PATIENCE, Pod},
    volumes::{HostDir, Live, host, mount, readonly, run},
};

/// Counts in a shell's memory, and says with each number what the guest's kernel chose; writes to its own disk.
const COUNTS: &str = "\
    echo kept > /kept; i=0
    while :; do i=$((i + 1)); echo $i $(cat /proc/sys/kernel/random/uuid); sleep 0.1; done";

/// The numbers in a log, with what was chosen at each.
fn counted(node: &Node, directory: &str) -> BTreeMap<u64, String> {
    let file = node.dir.join(directory).join("counts.log");
    let text = fs::read_to_string(file).unwrap_or_default();
    // The last line may not be there as a whole yet.
    let lines = text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'));
    lines
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words[3].parse().unwrap(), words[4].to_owned())
        })
        .collect()
}

/// Waits until a container counts on.
async fn counts_on(node: &Node, directory: &str) {
    let (before, begun) = (counted(node, directory).len(), Instant::now());
    while counted(node, directory).len() < before + 5 {
        assert!(begun.elapsed() < PATIENCE, "it stands still at {before}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A pod's configuration whose logs are in a directory of its own.
fn config(node: &Node, name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        log_directory: node.dir.join(name).to_string_lossy().into_owned(),
        hostname: format!("host-{name}"),
        ..node.sandbox(name)
    }
}

/// Makes a checkpoint.
async fn save(node: &Node, pod: &Pod) -> PathBuf {
    let checkpoint = node.dir.join("checkpoint");
    let request = CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        output_path: checkpoint.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let mut runtime = node.client.runtime.clone();
    runtime.checkpoint_pod(request).await.unwrap();
    checkpoint
}

async fn restore(
    node: &Node,
    checkpoint: &Path,
    name: &str,
    containers: Vec<ContainerConfig>,
) -> Result<(Pod, String), tonic::Status> {
    let request = RestorePodRequest {
        checkpoint_path: checkpoint.to_string_lossy().into_owned(),
        config: Some(config(node, name)),
        container_configs: containers,
        ..Default::default()
    };
    let restored = node.client.runtime.clone().restore_pod(request).await?;
    let restored = restored.into_inner();
    let [container] = &restored.restored_containers[..] else {
        panic!("{restored:?}");
    };
    assert_eq!(container.name, "counts");
    let pod = Pod {
        id: restored.pod_sandbox_id,
        config: config(node, name),
    };
    Ok((pod, container.container_id.clone()))
}

#[tokio::test]
async fn a_pod_goes_on_and_is_restored_twice_from_where_it_was() {
    let mut node = Node::start().await;
    node.client.pull(crate::harness::BUSYBOX).await.unwrap();
    let source = node.run_sandbox(config(&node, "source")).await.unwrap();
    let id = node.run_script(&source, "counts", COUNTS).await;
    counts_on(&node, "source").await;

    let begun = Instant::now();
    let checkpoint = save(&node, &source).await;
    let took = begun.elapsed();
    let cut = counted(&node, "source").into_keys().last().unwrap();
    let log = fs::read_to_string(node.dir.join("hull.log")).unwrap();
    let paused = log
        .lines()
        .find(|line| line.contains("stood still for a checkpoint"));
    let memory = fs::metadata(checkpoint.join("memory")).unwrap();
    println!(
        "checkpoint in {took:?}; {} MiB of memory with {} MiB of data; {}",
        memory.len() >> 20,
        std::os::unix::fs::MetadataExt::blocks(&memory) >> 11,
        paused.unwrap()
    );
    counts_on(&node, "source").await;

    // One byte of the memory is another: one line says so.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(checkpoint.join("memory"))
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 20 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 20 << 20).unwrap();
    let refused = restore(&node, &checkpoint, "changed", Vec::new())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused
            .message()
            .ends_with("its file \"memory\" was changed"),
        "{refused}"
    );
    file.write_all_at(&byte, 20 << 20).unwrap();

    let mut ips = BTreeSet::new();
    let mut pods = vec![(source, id)];
    for name in ["one", "two"] {
        let begun = Instant::now();
        let (pod, id) = restore(&node, &checkpoint, name, Vec::new()).await.unwrap();
        println!("restored in {:?}", begun.elapsed());
        let status = node.container_status(&id).await.unwrap();
        assert_eq!(status.state(), ContainerState::ContainerCreated);
        // What it had written before the cut comes at once.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let still = counted(&node, name).len();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(counted(&node, name).len(), still, "it stands still");
        pods.push((pod, id));
    }
    // The next daemon knows them as any other.
    node.client = node.daemon.kill_and_restart().await;
    for (_, id) in &pods[1..] {
        node.start_container(id).await.unwrap();
    }
    for name in ["one", "two"] {
        counts_on(&node, name).await;
        let counted = counted(&node, name);
        let first = *counted.keys().next().unwrap();
        assert!(
            (2..=cut + 1).contains(&first),
            "{name} begins with {first}, cut at {cut}"
        );
        let numbers = Vec::from_iter(counted.into_keys());
        assert_eq!(numbers, Vec::from_iter(first..first + numbers.len() as u64));
    }
    // What the kernel chose after the cut. The first may have been chosen before it.
    let [source, one, two] = ["source", "one", "two"].map(|name| counted(&node, name));
    let mut chosen = BTreeSet::new();
    let mut compared = 0;
    for number in one.keys().skip(2).filter(|number| two.contains_key(number)) {
        compared += 1;
        for uuid in [source.get(number), one.get(number), two.get(number)] {
            let uuid = uuid.expect("all counted so far");
            assert!(chosen.insert(uuid), "{uuid} was chosen twice, at {number}");
        }
    }
    assert!(compared > 2, "{compared} numbers compared");

    let gateway = "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'";
    for (pod, id) in &pods {
        let ip = node.pod_status(&pod.id).await.unwrap().network.unwrap().ip;
        let script = format!(
            "hostname; cat /kept; grep -c {ip} /etc/hosts; ip -4 addr show eth0; ping -c 1 -W 60 $({gateway}) >&2"
        );
        let answer = node.exec(id, &script).await;
        assert_eq!(answer.exit_code, 0, "{answer:?}");
        let told = String::from_utf8(answer.stdout).unwrap();
        let expected = format!("{}\nkept\n1\n", pod.config.hostname);
        assert!(told.starts_with(&expected), "{told}");
        assert!(told.contains(&ip), "{told}");
        assert!(ips.insert(ip));
        // Each has a disk of its own.
        let other = format!("echo {} > /kept", pod.config.hostname);
        assert_eq!(node.exec(id, &other).await.exit_code, 0);
    }
    for (pod, id) in &pods {
        let answer = node.exec(id, "cat /kept").await;
        let told = String::from_utf8(answer.stdout).unwrap();
        assert_eq!(told.trim(), pod.config.hostname);
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}

/// What kubelet has on the host for a pod: a hosts file, a token, an emptyDir on disk and one in memory; beside
/// them the pod's volume.
struct Files {
    hosts: PathBuf,
    token: Live,
    disk: PathBuf,
    memory: PathBuf,
    volume: HostDir,
}

impl Files {
    fn of(node: &Node, kubelet: &HostDir, pod: &str) -> Self {
        let at = HostDir::new(node, &format!("kubelet/pods/{pod}-uid"));
        at.write("hosts", &format!("127.0.0.1 {pod}\n"));
        let token = Live::new(&at, "kubernetes.io~projected", "token");
        // Two versions never have one name.
        token.replace(&format!("..{pod}"), &[("token", &format!("{pod}\n"))], 0);
        let [disk, memory] = ["disk", "memory"].map(|name| {
            let path = at.path("volumes/kubernetes.io~empty-dir").join(name);
            fs::create_dir_all(&path).unwrap();
            path
        });
        kubelet.tmpfs(&format!(
            "pods/{pod}-uid/volumes/kubernetes.io~empty-dir/memory"
        ));
        let volume = HostDir::new(node, &format!("volume-{pod}"));
        volume.write("list", &format!("{pod}\n"));
        Self {
            hosts: at.path("hosts"),
            token,
            disk,
            memory,
            volume,
        }
    }

    /// The container that counts, into its volume as well.
    fn container(&self, node: &Node) -> ContainerConfig {
        let script = "cd /volume && exec 3>>log 4<list && echo disk >/disk/kept && echo memory >/memory/kept; i=0
            while :; do i=$((i + 1)); echo $i >&3; echo $i here; sleep 0.1; done";
        ContainerConfig {
            mounts: vec![
                mount("/etc/hosts", &self.hosts),
                readonly(mount("/token", &self.token.0), false),
                mount("/disk", &self.disk),
                mount("/memory", &self.memory),
                mount("/volume", &self.volume.0),
            ],
            ..node.script("counts", script)
        }
    }
}

#[tokio::test]
async fn a_pod_of_kubelet_goes_on_with_the_files_of_another() {
    let node = Node::start().await;
    node.client.pull(crate::harness::BUSYBOX).await.unwrap();
    let kubelet = HostDir::new(&node, "kubelet");
    let [source, fork] = ["source", "fork"].map(|pod| Files::of(&node, &kubelet, pod));
    let pod = node.run_sandbox(config(&node, "source")).await.unwrap();
    let id = node.create(&pod, source.container(&node)).await.unwrap();
    node.start_container(&id).await.unwrap();
    counts_on(&node, "source").await;
    assert_eq!(run(&node, &id, "cat /token/token").await, "source\n");
    let checkpoint = save(&node, &pod).await;
    run(
        &node,
        &id,
        "echo changed >/disk/kept; echo changed >/memory/kept",
    )
    .await;
    counts_on(&node, "source").await;
    let log = source.volume.path("log");
    host(
        "cp",
        &[
            "--",
            log.to_str().unwrap(),
            fork.volume.path("log").to_str().unwrap(),
        ],
    );
    let copied = fork.volume.read("log").len();

    // No checkpoint says by itself what of the host a pod gets.
    let refused = restore(&node, &checkpoint, "fork", Vec::new())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("say which it gets"), "{refused}");
    let containers = vec![fork.container(&node)];
    let (other, restored) = restore(&node, &checkpoint, "fork", containers)
        .await
        .unwrap();
    node.start_container(&restored).await.unwrap();
    counts_on(&node, "fork").await;
    let seen = "cat /etc/hosts /volume/list /disk/kept /memory/kept; \
                for i in $(seq 300); do grep -qx fork /token/token && break; sleep 0.1; done; cat /token/token";
    let expected = "127.0.0.1 fork\nfork\ndisk\nmemory\nfork\n";
    assert_eq!(run(&node, &restored, seen).await, expected);
    // What the program had open is the fork's, too.
    assert!(fork.volume.read("log").len() > copied);
    let open =
        "for p in /proc/[0-9]*; do [ ! -e $p/fd/4 ] || { cat $p/fd/4; ls $p/cwd/; break; }; done";
    assert_eq!(run(&node, &restored, open).await, "fork\nlist\nlog\n");
    run(
        &node,
        &restored,
        "echo new >/volume/new; echo fork >/disk/kept",
    )
    .await;
    assert_eq!(fork.volume.read("new"), "new\n");

    let expected = "127.0.0.1 source\nsource\nchanged\nchanged\nsource\n";
    let seen = "cat /etc/hosts /volume/list /disk/kept /memory/kept /token/token";
    assert_eq!(run(&node, &id, seen).await, expected);
    assert!(!source.volume.path("new").exists());
    // Later changes of the token are the fork's own.
    fork.token.replace("..2", &[("token", "later\n")], 0);
    let told =
        "for i in $(seq 300); do grep -qx later /token/token && exit; sleep 0.1; done; exit 1";
    run(&node, &restored, told).await;
    for pod in [&pod, &other] {
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    drop(kubelet);
    node.finish().await;
}
