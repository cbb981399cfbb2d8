//! Checkpoints of pods, and pods that go on from them.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Duration,
};

use sha2::{Digest, Sha256};

use hull_pod::{Asked, Pods};
use hull_spec::{
    error::ErrorKind,
    id::{ContainerId, PodId},
    info::{ContainerState, SandboxState},
    spec::{ContainerSpec, MountFlag, MountPropagation, MountSource, MountSpec},
};

use crate::common::{TestNode, attached, container, daemon, end, eventually};

const FILES: [&str; 4] = ["manifest", "memory", "scratch", "state"];

/// A pod that counts, and its container.
async fn counting(pods: &Pods, node: &TestNode, name: &str) -> (PodId, ContainerId) {
    let pod = pods.run_sandbox(node.sandbox(name)).await.unwrap();
    let spec = container(name, &["ticks:2"]);
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    goes_on(node, name).await;
    (pod, id)
}

/// Waits until a container has counted on.
async fn goes_on(node: &TestNode, name: &str) {
    let log = format!("{name}.log");
    let begun = node.log(&log).len();
    eventually("it counts on", async || node.log(&log).len() > begun + 3).await;
}

/// Where checkpoints are, and nothing else.
fn place(node: &TestNode) -> PathBuf {
    let place = node.dir.path().join("c");
    fs::create_dir_all(&place).unwrap();
    place
}

/// The only checkpoint, of this pod.
async fn saved(pods: &Pods, node: &TestNode, pod: &PodId) -> PathBuf {
    let checkpoint = place(node).join("one");
    let saved = pods.checkpoint_sandbox(pod.as_str(), &checkpoint);
    saved.await.unwrap();
    checkpoint
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap().flatten();
    entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// What was done with a pod's VM for a checkpoint, in order.
fn calls(node: &TestNode, pod: &PodId) -> Vec<String> {
    let path = node.config.state.join("pods").join(pod.as_str());
    let text = fs::read_to_string(path.join("calls")).unwrap_or_default();
    let known = ["freeze", "pause", "save", "resume", "thaw"];
    let lines = text.lines().filter(|line| known.contains(line));
    lines.map(str::to_owned).collect()
}

/// A container of a checkpoint under another log.
fn renamed(name: &str, log: &str) -> Vec<ContainerSpec> {
    let mut spec = container(name, &[]);
    spec.log_path = log.into();
    vec![spec]
}

async fn fork(pods: &Pods, node: &TestNode, checkpoint: &Path, name: &str) -> (PodId, ContainerId) {
    let asked = renamed("first", &format!("{name}.log"));
    let restored = pods.restore_sandbox(checkpoint, Some(node.sandbox(name)), asked);
    let (pod, containers) = restored.await.unwrap();
    let [(first, id)] = &containers[..] else {
        panic!("{containers:?}");
    };
    assert_eq!(first, "first");
    (pod, id.clone())
}

/// The number in a line of a log.
fn number(line: &str) -> u64 {
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

async fn remove_all(pods: &Pods) {
    for pod in pods.sandboxes().await {
        pods.remove_sandbox(pod.id.as_str()).await.unwrap();
    }
}

#[tokio::test]
async fn a_pod_goes_on_and_any_number_of_others_from_where_it_was() {
    let node = TestNode::new();
    let pods = node.open().await;
    let (source, _) = counting(&pods, &node, "first").await;
    let checkpoint = place(&node).join("one");
    let paused = pods.checkpoint_sandbox(source.as_str(), &checkpoint).await;
    let paused = paused.unwrap();
    assert!(paused < Duration::from_secs(5));
    assert_eq!(hull_pod::checkpoint_pause(&checkpoint), Some(paused));
    assert_eq!(hull_pod::checkpoint_pause(&place(&node)), None);
    assert_eq!(
        calls(&node, &source),
        ["freeze", "pause", "save", "resume", "thaw"]
    );
    let saved = number(node.log("first.log").last().unwrap());
    goes_on(&node, "first").await;

    // For nobody else to read, and nothing beside it.
    assert_eq!(names(&place(&node)), BTreeSet::from(["one".to_owned()]));
    assert_eq!(names(&checkpoint), FILES.map(str::to_owned).into());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&checkpoint), 0o700);
    for name in FILES {
        assert_eq!(mode(&checkpoint.join(name)), 0o600, "{name}");
    }

    for name in ["second", "third"] {
        let (pod, id) = fork(&pods, &node, &checkpoint, name).await;
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        assert_eq!(info.state, SandboxState::Ready);
        assert_eq!(info.spec.metadata.name, name);
        // Its card is another one.
        let run = node.config.state.join("pods").join(pod.as_str());
        let links = fs::read_to_string(run.join("links")).unwrap();
        assert_eq!(links, "out 3\nin 3\n");
        let created = pods.container(id.as_str()).await.unwrap();
        assert_eq!(created.state, ContainerState::Created);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let log = format!("{name}.log");
        let still = node.log(&log).len();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(
            node.log(&log).len(),
            still,
            "it stands still until it is started"
        );

        pods.start_container(id.as_str()).await.unwrap();
        goes_on(&node, name).await;
        let lines = node.log(&log);
        let numbers: Vec<u64> = lines.iter().map(|line| number(line)).collect();
        let first = numbers[0];
        assert!((1..=saved + 1).contains(&first), "{first} after {saved}");
        assert_eq!(
            numbers,
            Vec::from_iter(first..first + numbers.len() as u64),
            "no line is lost or doubled"
        );
    }
    // A pod that was restored is a pod like others.
    let (second, _) = fork(&pods, &node, &checkpoint, "fourth").await;
    let again = place(&node).join("two");
    pods.checkpoint_sandbox(second.as_str(), &again)
        .await
        .unwrap();
    let (_, id) = fork(&pods, &node, &again, "fifth").await;
    pods.start_container(id.as_str()).await.unwrap();
    goes_on(&node, "fifth").await;
    goes_on(&node, "first").await;
    remove_all(&pods).await;
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn what_has_ended_is_not_in_a_restored_pod() {
    let node = TestNode::new();
    let pods = node.open().await;
    let (source, _) = counting(&pods, &node, "first").await;
    let done = container("done", &["exit:0"]);
    let done = pods.create_container(source.as_str(), done).await.unwrap();
    pods.start_container(done.as_str()).await.unwrap();
    pods.wait_container(done.as_str()).await.unwrap();
    let waits = container("waits", &["out:hello\\n", "exit:3"]);
    pods.create_container(source.as_str(), waits).await.unwrap();
    let checkpoint = saved(&pods, &node, &source).await;
    let before = attached(&pods, &source).await;
    let leases = node.images.leases();

    let restored = pods.restore_sandbox(&checkpoint, Some(node.sandbox("second")), Vec::new());
    let (pod, containers) = restored.await.unwrap();
    let known: BTreeSet<&str> = containers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(known, BTreeSet::from(["first", "waits"]));
    assert_eq!(attached(&pods, &pod).await, before, "they have one image");
    assert!(
        node.images.leases().is_superset(&leases),
        "the source's are its own"
    );
    // One that was created only is started as it always was.
    let (_, waits) = containers.iter().find(|(name, _)| name == "waits").unwrap();
    pods.start_container(waits.as_str()).await.unwrap();
    let ended = pods.wait_container(waits.as_str()).await.unwrap();
    assert_eq!(ended.exit_code, 3);
    assert_eq!(node.log("waits.log"), ["stdout F hello"]);
    remove_all(&pods).await;
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn what_cannot_be_in_a_checkpoint_is_refused_before_anything_stands_still() {
    let node = TestNode::new();
    let pods = node.open().await;
    let (pod, id) = counting(&pods, &node, "first").await;
    let place = place(&node);
    let refused = async |output: &Path| {
        let refused = pods.checkpoint_sandbox(pod.as_str(), output).await;
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
        assert_eq!(calls(&node, &pod), [""; 0]);
        error.to_string()
    };
    let told = refused(&place).await;
    assert!(told.contains("is there already"), "{told}");
    pods.stop_sandbox(pod.as_str()).await.unwrap();
    let told = refused(&place.join("one")).await;
    assert!(told.contains("the sandbox is not ready"), "{told}");
    assert_eq!(names(&place), BTreeSet::new());
    assert!(pods.container(id.as_str()).await.is_ok());
}

/// A container that has a directory of the host, and its pod's hosts file.
fn with_files(node: &TestNode, pod: &str) -> ContainerSpec {
    let mut spec = container("first", &["ticks:2"]);
    let mount = |name: &str, readonly| MountSpec {
        container_path: format!("/{name}").into(),
        source: MountSource::Host(node.dir.path().join(pod).join(name)),
        readonly,
        recursive_readonly: false,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    };
    spec.mounts = vec![mount("data", false), mount("hosts", true)];
    spec
}

#[tokio::test]
async fn paths_of_the_host_are_those_of_the_pod_that_goes_on() {
    let node = TestNode::new();
    let pods = node.open().await;
    let source = pods.run_sandbox(node.sandbox("first")).await.unwrap();
    let spec = with_files(&node, "a");
    let mut other = with_files(&node, "a");
    other.metadata.name = "other".into();
    other.mounts.remove(0);
    for spec in [spec, other] {
        let id = pods.create_container(source.as_str(), spec).await.unwrap();
        pods.start_container(id.as_str()).await.unwrap();
    }
    let checkpoint = saved(&pods, &node, &source).await;
    let files = [FILES.as_slice(), &["shares"]].concat();
    assert_eq!(
        names(&checkpoint),
        files.into_iter().map(str::to_owned).collect()
    );

    let restore = async |asked: Vec<ContainerSpec>| {
        let spec = Some(node.sandbox("second"));
        pods.restore_sandbox(&checkpoint, spec, asked).await
    };
    type Change = fn(&mut ContainerSpec);
    let changes: [(Change, &str); 7] = [
        (
            |spec| spec.mounts[0].readonly = true,
            "can't get another mount",
        ),
        (
            |spec| spec.mounts[1].container_path = "/x".into(),
            "can't get another mount",
        ),
        (
            |spec| spec.mounts[0].flags.push(MountFlag::NoExec),
            "can't get another mount",
        ),
        (
            |spec| {
                let mut more = spec.mounts[0].clone();
                more.container_path = "/more".into();
                spec.mounts.push(more);
            },
            "can't get another mount",
        ),
        (
            |spec| spec.mounts[0].source = MountSource::Host("/dev".into()),
            "can't get another mount",
        ),
        (
            |spec| drop(spec.mounts.remove(0)),
            "of the host at /data: say which it gets",
        ),
        // The two have one file.
        (
            |spec| spec.mounts[1].source = MountSource::Host("/c/hosts".into()),
            "which can't be both",
        ),
    ];
    let mut other = with_files(&node, "b");
    other.metadata.name = "other".into();
    other.mounts.remove(0);
    let refused = async |asked: Vec<ContainerSpec>, expected: &str| {
        let error = restore(asked).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    for (change, expected) in changes {
        let mut asked = with_files(&node, "b");
        change(&mut asked);
        refused(vec![asked, other.clone()], expected).await;
    }
    let without = "of the host at /hosts: say which it gets";
    refused(vec![with_files(&node, "b")], without).await;
    let (pod, containers) = restore(vec![with_files(&node, "b"), other]).await.unwrap();
    let run = node.config.state.join("pods").join(pod.as_str());
    let shares = fs::read_to_string(run.join("shares")).unwrap();
    let paths = BTreeSet::from_iter(shares.lines().map(PathBuf::from));
    let of = |name: &str| node.dir.path().join("b").join(name);
    assert_eq!(paths, BTreeSet::from([of("data"), of("hosts")]));
    let (_, first) = containers.iter().find(|(name, _)| name == "first").unwrap();
    let info = pods.container(first.as_str()).await.unwrap();
    assert_eq!(info.spec.mounts, with_files(&node, "b").mounts);
    pods.start_container(first.as_str()).await.unwrap();
    goes_on(&node, "first").await;

    // What was restored can be in a checkpoint again. Paths may be said for all containers.
    let again = place(&node).join("two");
    let saved = pods.checkpoint_sandbox(pod.as_str(), &again);
    saved.await.unwrap();
    let paths = ["data", "hosts"].map(|name| (Path::new("/").join(name), of(name)));
    let asked = Asked {
        paths: paths.into(),
        ..Asked::default()
    };
    let third = pods.restore_sandbox(&again, Some(node.sandbox("third")), asked.clone());
    let (third, _) = third.await.unwrap();
    let run = node.config.state.join("pods").join(third.as_str());
    assert_eq!(fs::read_to_string(run.join("shares")).unwrap(), shares);
    pods.remove_container(first.as_str()).await.unwrap();

    // Whoever can write there can't have the pod get more than is asked for.
    let path = again.join("manifest");
    let text = fs::read_to_string(&path).unwrap();
    let (_, body) = text.split_once('\n').unwrap();
    for (from, to) in [
        ("\"read_only\"", "\"read_write\""),
        ("/b/hosts", "/b/secret"),
    ] {
        let (specs, owners) = body.split_once("\"owners\":[").unwrap();
        let body = format!("{specs}\"owners\":[{}", owners.replace(from, to));
        assert!(body.contains(to), "{to} is there");
        let digest = Sha256::digest(body.as_bytes());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(&path, format!("hull-checkpoint 1 {digest}\n{body}")).unwrap();
        let fourth = pods.restore_sandbox(&again, Some(node.sandbox("fourth")), asked.clone());
        let (fourth, _) = fourth.await.unwrap();
        let run = node.config.state.join("pods").join(fourth.as_str());
        let shares = fs::read_to_string(run.join("shares")).unwrap();
        assert_eq!(shares, format!("{}\n", of("data").display()), "{to}");
        pods.remove_sandbox(fourth.as_str()).await.unwrap();
    }
    for wrong in ["shares", "manifest"] {
        let path = again.join(wrong);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        let fourth = pods.restore_sandbox(&again, Some(node.sandbox("fourth")), asked.clone());
        let told = fourth.await.unwrap_err().to_string();
        assert!(told.ends_with("was changed"), "{told}");
    }
    remove_all(&pods).await;
    assert_eq!(node.leftovers(), [""; 0]);
}

/// A container that has an emptyDir of the pod that kubelet calls `uid`.
fn with_empty_dir(node: &TestNode, uid: &str, name: &str) -> (ContainerSpec, PathBuf) {
    let volumes = "volumes/kubernetes.io~empty-dir";
    let pods = node.dir.path().join("kubelet/pods");
    let directory = pods.join(uid).join(volumes).join(name);
    fs::create_dir_all(&directory).unwrap();
    let mut spec = with_files(node, "none");
    spec.mounts.truncate(1);
    spec.mounts[0].source = MountSource::Host(directory.clone());
    (spec, directory)
}

#[tokio::test]
async fn empty_dirs_go_with_the_pod_that_goes_on() {
    let node = TestNode::new();
    let pods = node.open().await;
    let source = pods.run_sandbox(node.sandbox("first")).await.unwrap();
    let (spec, directory) = with_empty_dir(&node, "uid", "data");
    let id = pods.create_container(source.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    // As if the guest had written to its disk.
    let write = |directory: &Path, text: &str| {
        let image = directory.join(".hull-volume.img");
        let image = fs::File::options().write(true).open(image).unwrap();
        image.write_all_at(text.as_bytes(), 1 << 20).unwrap();
    };
    write(&directory, "source");
    let checkpoint = saved(&pods, &node, &source).await;
    let files = [FILES.as_slice(), &["volume-data"]].concat();
    assert_eq!(
        names(&checkpoint),
        files.into_iter().map(str::to_owned).collect()
    );
    write(&directory, "SOURCE");

    let restore = async |uid: &str, spec: ContainerSpec| {
        let mut sandbox = node.sandbox(uid);
        sandbox.metadata.uid = uid.into();
        pods.restore_sandbox(&checkpoint, Some(sandbox), vec![spec])
            .await
    };
    let refused = async |uid: &str, spec: ContainerSpec| {
        let error = restore(uid, spec).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
        error.to_string()
    };
    let (own, _) = with_empty_dir(&node, "uid", "data");
    assert!(
        refused("uid", own.clone())
            .await
            .ends_with("is the source's")
    );
    assert!(refused("b", own).await.ends_with("needs one of this pod"));
    let (other, _) = with_empty_dir(&node, "b", "other");
    assert!(
        refused("b", other)
            .await
            .ends_with("has another name in this pod")
    );
    let (spec, directory) = with_empty_dir(&node, "b", "data");
    fs::write(directory.join("file"), "").unwrap();
    assert!(
        refused("b", spec.clone())
            .await
            .contains("of another kind or in use")
    );
    fs::remove_file(directory.join("file")).unwrap();

    let read = |directory: &Path| {
        let image = fs::File::open(directory.join(".hull-volume.img")).unwrap();
        let mut text = [0; 6];
        image.read_exact_at(&mut text, 1 << 20).unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    };
    // Twice, as when kubelet asks again; the second has it as it was, too.
    for _ in 0..2 {
        let (pod, containers) = restore("b", spec.clone()).await.unwrap();
        assert_eq!(read(&directory), "source");
        write(&directory, "forked");
        let (_, id) = &containers[0];
        pods.start_container(id.as_str()).await.unwrap();
        // It is the pod's as any other: another container has it, too, and the last takes it out.
        let disks = attached(&pods, &pod).await;
        let (mut more, _) = with_empty_dir(&node, "b", "data");
        more.metadata.name = "more".into();
        let more = pods.create_container(pod.as_str(), more).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, disks);
        for id in [id, &more] {
            pods.remove_container(id.as_str()).await.unwrap();
        }
        assert_eq!(attached(&pods, &pod).await, disks - 2, "image and volume");
        assert_eq!(read(&directory), "forked");
        pods.remove_sandbox(pod.as_str()).await.unwrap();
    }
    let image = fs::File::options()
        .write(true)
        .open(checkpoint.join("volume-data"));
    image.unwrap().write_all_at(b"other", 1 << 20).unwrap();
    let told = refused("b", spec).await;
    assert!(
        told.ends_with("its file \"volume-data\" was changed"),
        "{told}"
    );
    remove_all(&pods).await;
    assert_eq!(node.leftovers(), [""; 0]);
}

/// With what goes wrong, and whether there is a checkpoint all the same.
#[tokio::test]
async fn a_pod_goes_on_whatever_fails() {
    for (script, complete) in [
        (r#"{"refuse": ["freeze"]}"#, false),
        (r#"{"hang_once": ["freeze"]}"#, false),
        (r#"{"refuse_pause": "busy"}"#, false),
        (r#"{"refuse_copy": "busy"}"#, true),
        (r#"{"refuse_save": "internal"}"#, false),
        (r#"{"refuse_resume": "internal"}"#, true),
        (r#"{"lose_once": ["thaw"]}"#, true),
        (r#"{"hang_once": ["thaw"]}"#, true),
    ] {
        let mut node = TestNode::new();
        node.config.agent_timeout = Duration::from_secs(1);
        node.script(script);
        let pods = node.open().await;
        let (pod, _) = counting(&pods, &node, "first").await;
        let checkpoint = place(&node).join("one");
        let saved = pods.checkpoint_sandbox(pod.as_str(), &checkpoint).await;
        assert_eq!(saved.is_ok(), complete, "{script}: {saved:?}");
        goes_on(&node, "first").await;
        let there = names(&place(&node));
        assert_eq!(there.len(), usize::from(complete), "{script}: {there:?}");
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        assert_eq!(info.state, SandboxState::Ready);
        remove_all(&pods).await;
        drop(pods);
        assert_eq!(node.leftovers(), [""; 0]);
    }
}

/// A daemon that is killed while the VM stands still, or while containers do.
#[test]
fn a_pod_goes_on_when_the_daemon_was_killed_meanwhile() {
    for script in [
        r#"{"lose_pause": true}"#,
        r#"{"lose_once": ["freeze"]}"#,
        r#"{"hang_once": ["thaw"]}"#,
    ] {
        let mut node = TestNode::new();
        node.config.agent_timeout = Duration::from_secs(20);
        node.script(script);
        let checkpoint = place(&node).join("one");
        let first = daemon();
        let pod = first.block_on(async {
            let pods = node.open().await;
            let (pod, _) = counting(&pods, &node, "first").await;
            let (saved, output) = (pods.clone(), checkpoint.clone());
            let of = pod.clone();
            tokio::spawn(async move { saved.checkpoint_sandbox(of.as_str(), &output).await });
            let last = match script {
                _ if script.contains("pause") => "pause",
                _ if script.contains("thaw") => "hangs",
                _ => "freeze",
            };
            eventually("it stands still", async || node.noted(pod.as_str(), last)).await;
            pod
        });
        end(first);
        assert_eq!(names(&place(&node)).len(), 1, "it is written aside");
        let second = daemon();
        second.block_on(async {
            let pods = node.open().await;
            let info = pods.sandbox(pod.as_str()).await.unwrap();
            assert_eq!(
                info.state,
                SandboxState::Ready,
                "{script}: {}",
                info.message
            );
            goes_on(&node, "first").await;
            assert_eq!(names(&place(&node)), BTreeSet::new(), "{script}");
            // And it can be had now.
            let saved = pods.checkpoint_sandbox(pod.as_str(), &checkpoint);
            saved.await.unwrap();
            remove_all(&pods).await;
        });
        end(second);
        assert_eq!(node.leftovers(), [""; 0]);
    }
}

#[tokio::test]
async fn a_checkpoint_that_was_changed_or_is_of_elsewhere_is_refused() {
    let node = TestNode::new();
    let pods = node.open().await;
    let (source, _) = counting(&pods, &node, "first").await;
    let checkpoint = saved(&pods, &node, &source).await;
    let refused = async || {
        let spec = Some(node.sandbox("second"));
        let refused = pods.restore_sandbox(&checkpoint, spec, Vec::new()).await;
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
        error.to_string()
    };
    for name in FILES {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(checkpoint.join(name))
            .unwrap();
        let at = file.metadata().unwrap().len() - 1;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let told = refused().await;
        let expected = match name {
            "manifest" => "its manifest was changed".to_owned(),
            _ => format!("its file {name:?} was changed"),
        };
        assert!(told.ends_with(&expected), "{told}");
        file.write_all_at(&byte, at).unwrap();
    }
    node.images.missing.store(true, Ordering::Relaxed);
    let told = refused().await;
    assert!(told.contains("is not on this node: pull it"), "{told}");
    node.images.missing.store(false, Ordering::Relaxed);
    fs::write(&node.images.disk, vec![1; 8192]).unwrap();
    let told = refused().await;
    assert!(told.ends_with("is another one on this node"), "{told}");
    fs::write(&node.images.disk, vec![0; 8192]).unwrap();
    let spec = Some(node.sandbox("second"));
    let other = pods.restore_sandbox(&checkpoint, spec, renamed("other", "o.log"));
    let told = other.await.unwrap_err().to_string();
    assert!(
        told.contains(r#"has no container "other"; it has ["first"]"#),
        "{told}"
    );
    type Change = fn(&mut ContainerSpec);
    let changes: [(Change, &str); 4] = [
        (|spec| spec.command = vec!["wait".into()], "command"),
        (
            |spec| spec.env = vec![("A".into(), "b".into())],
            "environment",
        ),
        (
            |spec| spec.working_dir = "/other".into(),
            "working directory",
        ),
        (|spec| spec.security.privileged = true, "security context"),
    ];
    for (change, what) in changes {
        let mut changed = renamed("first", "o.log");
        change(&mut changed[0]);
        let spec = Some(node.sandbox("second"));
        let other = pods.restore_sandbox(&checkpoint, spec, changed).await;
        let told = other.unwrap_err().to_string();
        assert!(
            told.ends_with(&format!("can't get another {what}")),
            "{told}"
        );
    }
    let none = pods.restore_sandbox(&place(&node), None, Vec::new()).await;
    let told = none.unwrap_err().to_string();
    assert!(told.contains("read its manifest"), "{told}");
    // The source has its name yet.
    let taken = pods.restore_sandbox(&checkpoint, None, Vec::new()).await;
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::AlreadyExists);
    pods.remove_sandbox(source.as_str()).await.unwrap();
    let (again, _) = pods
        .restore_sandbox(&checkpoint, None, Vec::new())
        .await
        .unwrap();
    let info = pods.sandbox(again.as_str()).await.unwrap();
    assert_eq!(info.spec.metadata.name, "first");

    node.script("{}");
    let told = refused().await;
    assert!(told.contains("it is of another guest kernel"), "{told}");
    remove_all(&pods).await;
    assert_eq!(node.leftovers(), [""; 0]);
}

#[tokio::test]
async fn nothing_is_left_of_a_pod_that_could_not_be_restored() {
    for clone in [
        r#"{"refuse_configure": "invalid"}"#,
        r#"{"refuse_start": "internal"}"#,
        r#"{"die_at_start": true}"#,
        r#"{"refuse": ["wake"]}"#,
        r#"{"refuse": ["detach_device"]}"#,
        r#"{"refuse_attach": "internal"}"#,
        r#"{"refuse": ["attach_device"]}"#,
        r#"{"refuse": ["configure"]}"#,
    ] {
        let node = TestNode::new();
        node.script(&format!(r#"{{"clone": {clone}}}"#));
        let pods = node.open().await;
        let (source, _) = counting(&pods, &node, "first").await;
        let checkpoint = saved(&pods, &node, &source).await;
        let spec = Some(node.sandbox("second"));
        let failed = pods.restore_sandbox(&checkpoint, spec, Vec::new()).await;
        assert!(failed.is_err(), "{clone}");
        assert_eq!(pods.sandboxes().await.len(), 1, "{clone}");
        assert_eq!(node.vmms().len(), 1, "{clone}");
        goes_on(&node, "first").await;
        remove_all(&pods).await;
        drop(pods);
        assert_eq!(node.leftovers(), [""; 0], "{clone}");
    }
}

#[tokio::test]
async fn nothing_is_left_of_a_pod_that_is_up_and_whose_containers_are_not() {
    let node = TestNode::new();
    let pods = node.open().await;
    let (source, _) = counting(&pods, &node, "first").await;
    let checkpoint = saved(&pods, &node, &source).await;
    node.images.full.store(true, Ordering::Relaxed);
    let spec = Some(node.sandbox("second"));
    let failed = pods
        .restore_sandbox(&checkpoint, spec.clone(), Vec::new())
        .await;
    let told = failed.unwrap_err().to_string();
    assert!(told.contains("lease the container's image"), "{told}");
    assert_eq!(pods.sandboxes().await.len(), 1);
    assert_eq!(node.vmms().len(), 1);
    node.images.full.store(false, Ordering::Relaxed);
    pods.restore_sandbox(&checkpoint, spec, Vec::new())
        .await
        .unwrap();
    goes_on(&node, "first").await;
    remove_all(&pods).await;
    drop(pods);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_restored_pod_outlives_its_daemon_as_any_other() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, id) = first.block_on(async {
        let pods = node.open().await;
        let (source, _) = counting(&pods, &node, "first").await;
        let checkpoint = saved(&pods, &node, &source).await;
        fork(&pods, &node, &checkpoint, "second").await
    });
    end(first);
    let second = daemon();
    second.block_on(async {
        let pods = node.open().await;
        let info = pods.container(id.as_str()).await.unwrap();
        assert_eq!((info.state, &info.pod), (ContainerState::Created, &pod));
        pods.start_container(id.as_str()).await.unwrap();
        goes_on(&node, "second").await;
        goes_on(&node, "first").await;
    });
    end(second);
    let third = daemon();
    third.block_on(async {
        let pods = node.open().await;
        goes_on(&node, "second").await;
        pods.stop_container(id.as_str(), Duration::ZERO)
            .await
            .unwrap();
        let ended = pods.container(id.as_str()).await.unwrap();
        assert_eq!(ended.state, ContainerState::Exited);
        pods.remove_container(id.as_str()).await.unwrap();
        remove_all(&pods).await;
    });
    end(third);
    assert_eq!(node.leftovers(), [""; 0]);
}
