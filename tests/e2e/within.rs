//! What a hostile container gets at from inside: its agent, other containers of its pod, the guest's
//! devices and kernel. SECURITY.md has the table.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    ContainerConfig, LinuxContainerSecurityContext, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxState, SecurityProfile, security_profile::ProfileType,
};

use crate::{
    harness::{Node, Pod},
    security::{mapping, pod_with, said, user_namespace, with},
    volumes::{mount, readonly},
};

/// How long a command may take while its guest is under attack.
const PATIENCE: i64 = 60;
/// How long an attack goes on that does not end by itself.
const ATTACK: i64 = 20;

/// A container that waits, with the attacks in /tools.
async fn attacker(
    node: &Node,
    pod: &Pod,
    name: &str,
    context: LinuxContainerSecurityContext,
) -> String {
    let tools = std::env::var_os("HULL_POSIX").expect("HULL_POSIX is set");
    let config = ContainerConfig {
        mounts: vec![readonly(mount("/tools", &PathBuf::from(tools)), false)],
        ..node.script(name, "sleep 100000")
    };
    let id = node.create(pod, with(config, context)).await.unwrap();
    node.start_container(&id).await.unwrap();
    id
}

/// What came of each attack in a container: `done`, or why not.
async fn outcomes(node: &Node, id: &str) -> BTreeMap<String, String> {
    let text = said(node, id, "/tools/hull-hostile attack").await;
    let line = |line: &str| {
        line.split_once(' ')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
    };
    text.lines().filter_map(line).collect()
}

fn unconfined() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        seccomp: Some(SecurityProfile {
            profile_type: ProfileType::Unconfined.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn in_pids(
    mode: NamespaceMode,
    context: LinuxContainerSecurityContext,
) -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        namespace_options: Some(NamespaceOption {
            pid: mode.into(),
            ..Default::default()
        }),
        ..context
    }
}

/// The names of those that were successful.
fn done(outcomes: &BTreeMap<String, String>) -> Vec<&str> {
    let done = outcomes.iter().filter(|(_, outcome)| *outcome == "done");
    done.map(|(name, _)| name.as_str()).collect()
}

async fn remove(node: &Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
}

#[tokio::test]
async fn a_hostile_container_gets_at_nothing_but_its_own() {
    // So that its memory comes to an end soon.
    let node = Node::start_with(|text| text + "[vm]\nmax_memory_mib = 256\n").await;
    let pod = node.pod("plain").await;
    for (name, context, expected) in [
        (
            "default",
            LinuxContainerSecurityContext::default(),
            [].as_slice(),
        ),
        ("unconfined", unconfined(), &["keys"]),
        (
            "shared",
            in_pids(NamespaceMode::Pod, unconfined()),
            &["keys"],
        ),
        (
            "all-pids",
            in_pids(NamespaceMode::Node, unconfined()),
            &["agent-seen", "keys"],
        ),
    ] {
        let id = attacker(&node, &pod, name, context).await;
        let outcomes = outcomes(&node, &id).await;
        println!("{name}: {outcomes:#?}");
        assert_eq!(done(&outcomes), expected, "{name}: {outcomes:#?}");
    }
    remove(&node, &pod).await;

    let options = user_namespace(NamespaceMode::Pod, &[mapping(0, 100_000, 65536)]);
    let pod = pod_with(&node, "mapped", |linux| {
        let context = linux.security_context.get_or_insert_default();
        context.namespace_options = Some(options.clone());
    })
    .await
    .unwrap();
    let context = LinuxContainerSecurityContext {
        namespace_options: Some(options),
        ..unconfined()
    };
    let id = attacker(&node, &pod, "mapped", context).await;
    let seen = outcomes(&node, &id).await;
    println!("mapped: {seen:#?}");
    assert_eq!(done(&seen), ["keys"], "{seen:#?}");
    remove(&node, &pod).await;

    let pod = pod_with(&node, "privileged", |linux| {
        linux.security_context = Some(LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        });
    })
    .await
    .unwrap();
    let privileged = LinuxContainerSecurityContext {
        privileged: true,
        ..in_pids(NamespaceMode::Node, Default::default())
    };
    let id = attacker(&node, &pod, "privileged", privileged).await;
    let seen = outcomes(&node, &id).await;
    println!("privileged: {seen:#?}");
    // It has the guest: which shows that the attacks see what they look for. It has no way to the
    // host but that of every pod, and none within vsock; the rest is not in this kernel.
    let refused: Vec<_> = seen
        .iter()
        .filter(|(_, outcome)| *outcome != "done")
        .collect();
    let refused: Vec<_> = refused.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(refused, NOT_IN_ANY_GUEST, "{seen:#?}");
    // It can end its guest, and that ends its pod alone.
    let beside = node.pod("beside").await;
    let other = node.run_script(&beside, "other", "sleep 100000").await;
    let end = "echo 2 > /proc/sys/vm/panic_on_oom; exec tail /dev/zero";
    let _ = node.exec_for(&id, end, 120).await;
    let gone = async {
        while node.client.pod_status(&pod.id).await.unwrap().state()
            == PodSandboxState::SandboxReady
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), gone)
        .await
        .expect("the pod goes on");
    assert_eq!(said(&node, &other, "echo beside").await, "beside\n");
    remove(&node, &pod).await;
    remove(&node, &beside).await;
    node.finish().await;
}

/// What not even a privileged container can do.
const NOT_IN_ANY_GUEST: &[&str] = &[
    "abstract-sockets",
    // The kernel knows version 2 alone.
    "cgroup-of-version-1",
    "io-ports",
    "kcore",
    "kernel-memory",
    "kexec",
    "module",
    "physical-memory",
    "ports",
    "sysrq",
    "vsock-agent-local",
    "vsock-agent-rpc",
    "vsock-agent-streams",
    "vsock-be-the-agent",
    "vsock-be-the-agents-streams",
    "vsock-host",
    "vsock-host-other-port",
    "vsock-within",
];

#[tokio::test]
async fn a_hostile_container_leaves_the_agent_what_it_needs() {
    let node =
        Node::start_with(|text| text + "[vm]\nmemory_mib = 128\nmax_memory_mib = 128\n").await;
    let pod = node.pod("greedy").await;
    let other = attacker(&node, &pod, "other", Default::default()).await;
    let id = attacker(&node, &pod, "files", Default::default()).await;
    let fill = "for f in hostname hosts resolv.conf; do dd if=/dev/zero bs=64k count=4096 of=/etc/$f; done; true";
    let filled = node.exec_for(&id, fill, PATIENCE).await.unwrap();
    let filled = String::from_utf8_lossy(&filled.stderr).into_owned();
    assert!(filled.contains("No space left"), "{filled}");
    assert_eq!(said(&node, &other, "echo beside").await, "beside\n");
    works(&node, &pod, "after-files").await;
    node.stop_container(&id, 0).await.unwrap();

    let id = attacker(&node, &pod, "threads", Default::default()).await;
    let crowd =
        "/tools/hull-hostile crowd > /tmp/crowd & while ! [ -s /tmp/crowd ]; do :; done; echo full";
    // A command that leaves something behind ends with its time.
    let _ = node.exec_for(&id, crowd, ATTACK).await;
    node.exec_for(&other, "echo beside", PATIENCE)
        .await
        .unwrap();
    works(&node, &pod, "after-threads").await;
    node.stop_container(&id, 0).await.unwrap();

    for (name, attack) in [
        ("memory", "exec tail /dev/zero"),
        ("sockets", "exec /tools/hull-hostile hoard"),
    ] {
        let id = attacker(&node, &pod, name, Default::default()).await;
        // Whoever of the containers the kernel ends, it is not the agent.
        let _ = node.exec_for(&id, attack, ATTACK).await;
        works(&node, &pod, &format!("after-{name}")).await;
        node.stop_container(&id, 0).await.unwrap();
    }
    remove(&node, &pod).await;
    node.finish().await;
}

/// A new container runs, and ends when it is asked to.
async fn works(node: &Node, pod: &Pod, name: &str) {
    let begin = Instant::now();
    let id = node.run_script(pod, name, "echo works; sleep 1000").await;
    node.wait_log(name, "works\n").await;
    node.stop_container(&id, 0).await.unwrap();
    println!("{name}: a container after {:?}", begin.elapsed());
}
