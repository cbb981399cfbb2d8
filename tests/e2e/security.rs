//! What a container may do and who it is: users, capabilities, profiles, namespaces, limits.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{self, Command},
    time::{Duration, Instant},
};

use hull_proto_cri::v1::{
    Capability, ContainerConfig, IdMapping, Int64Value, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, SeLinuxOption,
    SecurityProfile, StatusRequest, StatusResponse, SupplementalGroupsPolicy, UserNamespace,
    security_profile::ProfileType,
};
use tonic::{Code, Status};

use crate::{
    harness::{BUSYBOX, Node, Pod},
    templates::templates,
};

const PATIENCE: Duration = Duration::from_secs(60);
const SLEEP: &str = "sleep 1000";

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

/// A configuration with these settings; its first process is 1 unless they say otherwise.
pub fn with(
    mut config: ContainerConfig,
    mut context: LinuxContainerSecurityContext,
) -> ContainerConfig {
    context
        .namespace_options
        .get_or_insert_with(|| NamespaceOption {
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        });
    config.linux = Some(LinuxContainerConfig {
        security_context: Some(context),
        ..Default::default()
    });
    config
}

/// A started container with these settings.
async fn run(node: &Node, pod: &Pod, name: &str, context: LinuxContainerSecurityContext) -> String {
    let config = with(node.script(name, SLEEP), context);
    let id = node.create(pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    id
}

/// Why a container with these settings is refused.
async fn refused(node: &Node, pod: &Pod, context: LinuxContainerSecurityContext) -> Status {
    let config = with(node.script("refused", SLEEP), context);
    node.create(pod, config).await.unwrap_err()
}

/// The output of a script in a container.
pub async fn said(node: &Node, id: &str, script: &str) -> String {
    let answer = node.exec(id, script).await;
    String::from_utf8(answer.stdout).unwrap()
}

/// A pod whose Linux settings `change` has edited.
pub async fn pod_with(
    node: &Node,
    name: &str,
    change: impl FnOnce(&mut LinuxPodSandboxConfig),
) -> Result<Pod, Status> {
    node.client.pull(BUSYBOX).await.unwrap();
    let mut config = node.sandbox(name);
    change(config.linux.get_or_insert_default());
    node.run_sandbox(config).await
}

async fn status(node: &Node) -> StatusResponse {
    let mut runtime = node.client.runtime.clone();
    let answer = runtime.status(StatusRequest::default()).await;
    answer.unwrap().into_inner()
}

fn uid(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test]
async fn processes_have_the_users_and_groups_that_are_asked_for() {
    let node = Node::start().await;
    let pod = node.pod("users").await;
    let status = status(&node).await;
    let features = status.features.unwrap();
    assert!(features.supplemental_groups_policy);

    for (name, policy, groups) in [
        (
            "merge",
            SupplementalGroupsPolicy::Merge,
            [2000, 5678, 65534].as_slice(),
        ),
        ("strict", SupplementalGroupsPolicy::Strict, &[5678, 65534]),
    ] {
        let context = LinuxContainerSecurityContext {
            run_as_username: "nobody".into(),
            supplemental_groups: vec![5678],
            supplemental_groups_policy: policy.into(),
            ..Default::default()
        };
        let id = run(&node, &pod, name, context).await;
        let status = node.client.container_status(&id).await.unwrap();
        let user = status.user.unwrap().linux.unwrap();
        let mut told = user.supplemental_groups.clone();
        told.sort_unstable();
        assert_eq!((user.uid, user.gid), (65534, 65534));
        assert_eq!(told, groups, "{name}");
        // The first process and those that are run in it.
        let mut own = Vec::new();
        for script in ["grep Groups /proc/1/status", "echo x $(id -G)"] {
            let text = said(&node, &id, script).await;
            let mut ids: Vec<i64> = text
                .split_whitespace()
                .skip(1)
                .map(|g| g.parse().unwrap())
                .collect();
            ids.sort_unstable();
            own.push(ids);
        }
        assert_eq!(own, [groups, groups], "{name}");
    }
    let context = LinuxContainerSecurityContext {
        run_as_user: uid(1001),
        run_as_group: uid(1002),
        ..Default::default()
    };
    let id = run(&node, &pod, "numbers", context).await;
    assert_eq!(
        said(&node, &id, "echo $(id -u) $(id -g) $(id -G)").await,
        "1001 1002 1002\n"
    );

    let group_alone = LinuxContainerSecurityContext {
        run_as_group: uid(1002),
        ..Default::default()
    };
    let error = refused(&node, &pod, group_alone).await;
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("run_as_group"), "{error}");
    let stranger = LinuxContainerSecurityContext {
        run_as_username: "stranger".into(),
        ..Default::default()
    };
    let error = refused(&node, &pod, stranger).await;
    assert!(error.message().contains("stranger"), "{error}");
    end(node, &pod).await;
}

#[tokio::test]
async fn capabilities_and_paths_are_limited_as_asked() {
    let node = Node::start().await;
    let pod = node.pod("limits").await;
    let capable = |add: &[&str], drop: &[&str]| LinuxContainerSecurityContext {
        capabilities: Some(Capability {
            add_capabilities: names(add),
            drop_capabilities: names(drop),
            add_ambient_capabilities: Vec::new(),
        }),
        ..Default::default()
    };
    let bridge = "ip link add name br7 type bridge && ip link del br7 && echo made";
    let bounding = "grep CapBnd /proc/self/status /proc/1/status | cut -f 2";
    let id = run(&node, &pod, "default", Default::default()).await;
    assert_eq!(said(&node, &id, bridge).await, "");
    assert_eq!(
        said(&node, &id, bounding).await,
        "00000000a80425fb\n00000000a80425fb\n"
    );
    assert_eq!(
        said(
            &node,
            &id,
            "ping -c 1 127.0.0.1 | grep -c ' 0% packet loss'"
        )
        .await,
        "1\n"
    );
    let id = run(
        &node,
        &pod,
        "added",
        capable(&["NET_ADMIN"], &["CAP_NET_RAW"]),
    )
    .await;
    assert_eq!(said(&node, &id, bridge).await, "made\n");
    let ping = node.exec(&id, "ping -c 1 127.0.0.1").await;
    assert_ne!(ping.exit_code, 0);
    let id = run(&node, &pod, "all", capable(&["ALL"], &[])).await;
    assert_eq!(
        said(&node, &id, bounding).await,
        "000001ffffffffff\n000001ffffffffff\n"
    );
    let id = run(&node, &pod, "none", capable(&[], &["ALL"])).await;
    assert_eq!(
        said(&node, &id, bounding).await,
        "0000000000000000\n0000000000000000\n"
    );
    let ambient = LinuxContainerSecurityContext {
        run_as_user: uid(1001),
        capabilities: Some(Capability {
            add_ambient_capabilities: names(&["NET_ADMIN"]),
            ..Default::default()
        }),
        ..Default::default()
    };
    let id = run(&node, &pod, "ambient", ambient).await;
    assert_eq!(
        said(&node, &id, "grep CapAmb /proc/self/status | cut -f 2").await,
        "0000000000001000\n"
    );
    let error = refused(&node, &pod, capable(&["FLY"], &[])).await;
    assert!(error.message().contains("add_capabilities"), "{error}");

    let readonly = LinuxContainerSecurityContext {
        readonly_rootfs: true,
        no_new_privs: true,
        selinux_options: Some(SeLinuxOption {
            level: "s0:c1,c2".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let id = run(&node, &pod, "readonly", readonly).await;
    let script = "touch /x 2>&1; touch /etc/hosts 2>&1; echo > /dev/shm/x && echo shm; \
        grep NoNewPrivs /proc/self/status /proc/1/status | cut -f 2";
    assert_eq!(
        said(&node, &id, script).await,
        "touch: /x: Read-only file system\ntouch: /etc/hosts: Read-only file system\nshm\n1\n1\n"
    );
    let paths = LinuxContainerSecurityContext {
        masked_paths: names(&["/bin/ls", "/etc"]),
        readonly_paths: names(&["/tmp", "/proc/sys"]),
        ..Default::default()
    };
    let id = run(&node, &pod, "paths", paths).await;
    let script = "ls 2>&1; echo /etc/*; touch /tmp/x 2>&1; echo 1 > /proc/sys/vm/swappiness || echo no; touch /root/x && echo root";
    let seen = said(&node, &id, script).await;
    assert_eq!(
        seen,
        "/bin/sh: ls: Permission denied\n/etc/*\ntouch: /tmp/x: Read-only file system\nno\nroot\n"
    );
    let id = run(&node, &pod, "defaults", Default::default()).await;
    let script = "head -c 1 /proc/kcore | wc -c; echo 1 2>/dev/null > /proc/sys/vm/swappiness || echo no; \
        touch /sys/x 2>/dev/null || echo sys";
    assert_eq!(said(&node, &id, script).await, "0\nno\nsys\n");
    end(node, &pod).await;
}

#[tokio::test]
async fn seccomp_profiles_are_those_that_are_asked_for() {
    let node = Node::start().await;
    let pod = node.pod("seccomp").await;
    let profile = |kind: ProfileType, path: &str| LinuxContainerSecurityContext {
        seccomp: Some(SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: path.into(),
        }),
        capabilities: Some(Capability {
            add_capabilities: names(&["SYS_ADMIN"]),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mode = "grep Seccomp: /proc/self/status /proc/1/status | cut -f 2 | tr '\\n' ' '";
    let id = run(&node, &pod, "unset", Default::default()).await;
    assert_eq!(said(&node, &id, mode).await, "2 2 ");
    // Not even with the capability that the kernel asks for.
    assert_eq!(
        said(&node, &id, "unshare -m true 2>/dev/null || echo no").await,
        "no\n"
    );
    let id = run(
        &node,
        &pod,
        "default",
        profile(ProfileType::RuntimeDefault, ""),
    )
    .await;
    assert_eq!(said(&node, &id, mode).await, "2 2 ");
    let id = run(
        &node,
        &pod,
        "unconfined",
        profile(ProfileType::Unconfined, ""),
    )
    .await;
    assert_eq!(said(&node, &id, mode).await, "0 0 ");
    let old = LinuxContainerSecurityContext {
        #[expect(deprecated, reason = "old clients send it")]
        seccomp_profile_path: "unconfined".into(),
        ..Default::default()
    };
    let id = run(&node, &pod, "old", old).await;
    assert_eq!(said(&node, &id, mode).await, "0 0 ");

    let file = node.dir.join("profile.json");
    fs::write(
        &file,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{"architecture": "SCMP_ARCH_X86_64"}],
            "syscalls": [{"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"},
                {"name": "chmod", "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
                {"names": ["fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#,
    )
    .unwrap();
    let path = file.to_str().unwrap();
    let id = run(
        &node,
        &pod,
        "localhost",
        profile(ProfileType::Localhost, path),
    )
    .await;
    assert_eq!(said(&node, &id, mode).await, "2 2 ");
    let script =
        "hostname other 2>/dev/null || echo no; chmod 700 /root 2>&1; touch /root/x && echo yes";
    assert_eq!(
        said(&node, &id, script).await,
        "no\nchmod: /root: Permission denied\nyes\n"
    );
    for (content, reason) in [
        ("{", "parse"),
        ("{\"defaultAction\": \"SCMP_ACT_NOTIFY\"}", "NOTIFY"),
        (&*" ".repeat(2 << 20), "larger"),
    ] {
        fs::write(&file, content).unwrap();
        let error = refused(&node, &pod, profile(ProfileType::Localhost, path)).await;
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains("seccomp.localhost_ref"), "{error}");
        assert!(error.message().contains(reason), "{error}");
    }
    for path in ["/no/such/profile", "/dev/zero", "profile.json"] {
        let error = refused(&node, &pod, profile(ProfileType::Localhost, path)).await;
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
    end(node, &pod).await;
}

/// Under this AppArmor profile.
fn under(kind: ProfileType, profile: &str) -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        apparmor: Some(SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: profile.into(),
        }),
        ..Default::default()
    }
}

/// Whether this host has AppArmor on, and so guests have.
fn has_apparmor() -> bool {
    let enabled = fs::read("/sys/module/apparmor/parameters/enabled");
    enabled.is_ok_and(|text| text.starts_with(b"Y"))
}

/// What a container's first process and a command in it are under.
async fn label(node: &Node, id: &str) -> String {
    let script = "cat /proc/1/attr/apparmor/current /proc/self/attr/apparmor/current | uniq";
    said(node, id, script).await
}

#[tokio::test]
async fn containers_are_under_the_default_apparmor_profile_where_the_host_has_apparmor() {
    use ProfileType::{RuntimeDefault, Unconfined};
    let node = Node::start_with(|text| text + "[vm]\ntemplate = true\n").await;
    node.client.pull(BUSYBOX).await.unwrap();
    let mut config = node.sandbox("default");
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    // The second pod is a clone, which is the same.
    for attempt in 0..2 {
        config.metadata.get_or_insert_default().attempt = attempt;
        let pod = node.run_sandbox(config.clone()).await.unwrap();
        let mounts = |mut context: LinuxContainerSecurityContext| {
            context.capabilities = Some(Capability {
                add_capabilities: names(&["SYS_ADMIN"]),
                ..Default::default()
            });
            context
        };
        let privileged = LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        let all = [
            ("unset", mounts(Default::default())),
            ("default", mounts(under(RuntimeDefault, ""))),
            ("unconfined", mounts(under(Unconfined, ""))),
            ("privileged", privileged),
        ];
        for (name, context) in all {
            let id = run(&node, &pod, name, context).await;
            let confined = has_apparmor() && ["unset", "default"].contains(&name);
            if has_apparmor() {
                let expected = match confined {
                    true => "hull-default (enforce)\n",
                    false => "unconfined\n",
                };
                assert_eq!(label(&node, &id).await, expected, "{name}");
            }
            let script = "mount -t tmpfs x /mnt 2>/dev/null && echo mounted || echo denied; \
                kill -0 1 && touch /x && echo works";
            let expected = match confined {
                true => "denied\nworks\n",
                false => "mounted\nworks\n",
            };
            assert_eq!(said(&node, &id, script).await, expected, "{name}");
        }
        if attempt == 0 {
            let begun = Instant::now();
            while templates(&node).await["ready"] != 1 {
                assert!(begun.elapsed() < PATIENCE, "{}", templates(&node).await);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        } else {
            assert_eq!(templates(&node).await["clones"], 1);
        }
        node.stop_sandbox(&pod.id).await.unwrap();
        node.remove_sandbox(&pod.id).await.unwrap();
    }
    node.finish().await;
}

/// Has the host's kernel take this policy (`--replace`), or drop it (`--remove`).
fn apparmor_parser(how: &str, policy: &Path) {
    let parser = Command::new("apparmor_parser")
        .args([how, "--skip-cache"])
        .arg(policy)
        .status();
    assert!(parser.unwrap().success());
}

#[tokio::test]
async fn apparmor_profiles_of_the_host_hold_in_guests() {
    use ProfileType::Localhost;
    let node = Node::start().await;
    let pod = node.pod("localhost").await;
    let name = format!("hull-test-{}", process::id());
    let error = refused(&node, &pod, under(Localhost, &name)).await;
    let text = error.message();
    assert!(text.contains("security_context.apparmor"), "{error}");
    if !has_apparmor() {
        assert!(text.contains("AppArmor is off in the node's"), "{error}");
        println!("SKIPPED: profiles of the host: it has no AppArmor");
        return end(node, &pod).await;
    }
    assert!(text.contains("it is not loaded on the node"), "{error}");
    assert_eq!(error.code(), Code::InvalidArgument);

    let policy = node.dir.join("policy");
    let load = |rule: &str| {
        let text = format!(
            "profile {name} flags=(attach_disconnected) {{\n  file,\n  signal,\n  capability,\n  {rule},\n}}\n"
        );
        fs::write(&policy, text).unwrap();
        apparmor_parser("--replace", &policy);
    };
    // Times of a file that is there are nothing that AppArmor looks at, so no "touch".
    let script = "for dir in srv tmp; do (echo x >/$dir/x) 2>/dev/null && echo $dir; done; true";
    load("deny /srv/** w");
    let config = with(
        node.script("first", &format!("{script}; exec {SLEEP}")),
        under(Localhost, &format!("localhost/{name}")),
    );
    let first = node.create(&pod, config).await.unwrap();
    node.start_container(&first).await.unwrap();
    let expected = format!("{name} (enforce)\n");
    assert_eq!(label(&node, &first).await, expected);
    assert_eq!(said(&node, &first, script).await, "tmp\n");
    node.wait_log("first", "tmp\n").await;
    // Changed on the host, it is the changed one that a later container gets; and so has a process under it, as there.
    load("deny /tmp/** w");
    let second = run(&node, &pod, "second", under(Localhost, &name)).await;
    for id in [&first, &second] {
        assert_eq!(said(&node, id, script).await, "srv\n");
    }
    // Policy is not theirs to change, nor the profile theirs to leave.
    let escape = "echo changeprofile unconfined > /proc/self/attr/apparmor/current; \
        mount -t securityfs x /mnt; ls /sys/kernel/security; true";
    assert_eq!(said(&node, &second, escape).await, "");
    apparmor_parser("--remove", &policy);
    let error = refused(&node, &pod, under(Localhost, &name)).await;
    assert!(error.message().contains("not loaded"), "{error}");
    assert_eq!(label(&node, &second).await, expected);
    end(node, &pod).await;
}

#[tokio::test]
async fn a_privileged_container_has_the_guest_and_nothing_of_the_host() {
    let node = Node::start().await;
    let plain = node.pod("plain").await;
    let privileged = LinuxContainerSecurityContext {
        privileged: true,
        ..Default::default()
    };
    let error = refused(&node, &plain, privileged.clone()).await;
    assert!(error.message().contains("privileged"), "{error}");
    let id = run(&node, &plain, "plain", Default::default()).await;
    assert_eq!(said(&node, &id, "ls /dev | grep -c vd").await, "0\n");

    let pod = pod_with(&node, "privileged", |linux| {
        linux.security_context = Some(LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        });
    })
    .await
    .unwrap();
    // A volume of the host's /dev is the guest's.
    let dev = |container_path: &str, readonly| Mount {
        host_path: "/dev".into(),
        container_path: container_path.into(),
        readonly,
        ..Default::default()
    };
    let mut config = with(node.script("all", SLEEP), privileged.clone());
    config.mounts = vec![dev("/dev", false), dev("/host/dev", true)];
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let script = "grep CapEff /proc/self/status | cut -f 2; grep Seccomp: /proc/self/status | cut -f 2; \
        head -c 1 /dev/vda | wc -c; echo 61 > /proc/sys/vm/swappiness && cat /proc/sys/vm/swappiness; \
        mkdir /sys/fs/cgroup/mine && echo cgroup; mount -t tmpfs x /mnt && echo mounted; \
        dmesg | grep -c virtio; hostname changed && hostname";
    let seen = said(&node, &id, script).await;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(
        lines[..6],
        ["000001ffffffffff", "0", "1", "61", "cgroup", "mounted"],
        "{seen}"
    );
    assert_ne!(lines[6], "0", "{seen}");
    assert_eq!(lines[7], "changed", "{seen}");
    // Its devices are the guest's: none that only the host has.
    let devices = said(&node, &id, "find /dev -type b -o -type c").await;
    let own = node.exec(&id, "ls /dev/kvm /dev/loop0 /dev/sda").await;
    assert_eq!(own.stdout, b"", "{devices}");
    // A new one is there at once.
    let script = "echo data > /tmp/disk; dd if=/dev/zero bs=64k count=16 >> /tmp/disk 2>/dev/null; \
        losetup -f /tmp/disk && head -n 1 /dev/loop0; ls /host/dev/loop0; losetup -d /dev/loop0; \
        touch /dev/made; touch /host/dev/x || ls -d /dev/shm /host/dev/made; rm /dev/made";
    assert_eq!(
        said(&node, &id, script).await,
        "data\n/host/dev/loop0\n/dev/shm\n/host/dev/made\n"
    );
    assert!(!Path::new("/dev/made").exists());
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_ne!(host.trim(), "changed");

    // A profile for the whole system does not confine what is privileged.
    let file = node.dir.join("profile.json");
    fs::write(
        &file,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}]}"#,
    )
    .unwrap();
    let profiled = LinuxContainerSecurityContext {
        seccomp: Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: file.to_str().unwrap().into(),
        }),
        ..privileged
    };
    let id = run(&node, &pod, "profiled", profiled).await;
    assert_eq!(
        said(&node, &id, "hostname again && hostname").await,
        "again\n"
    );
    node.stop_sandbox(&plain.id).await.unwrap();
    node.remove_sandbox(&plain.id).await.unwrap();
    end(node, &pod).await;
}

#[tokio::test]
async fn sysctls_reach_the_guest() {
    let node = Node::start().await;
    let values = [
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.shmmax", "1048576"),
        ("fs.mqueue.msg_max", "100"),
        ("net.core.somaxconn", "77"),
        ("net/ipv4/ip_local_port_range", "2000\t3000"),
    ];
    let sysctls: BTreeMap<String, String> = values
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
        .collect();
    let pod = pod_with(&node, "sysctls", |linux| linux.sysctls = sysctls)
        .await
        .unwrap();
    let id = run(&node, &pod, "main", Default::default()).await;
    for (name, value) in values {
        let file = name.replace('.', "/");
        assert_eq!(
            said(&node, &id, &format!("cat /proc/sys/{file}")).await,
            format!("{value}\n")
        );
    }
    for (name, value) in [
        ("kernel", "1"),
        ("../etc/x", "1"),
        ("kernel.shmmax", "1\n2"),
        ("kernel.no_such", "1"),
        ("kernel.shmmax", "x"),
    ] {
        let result = pod_with(&node, "wrong", |linux| {
            linux.sysctls = [(name.to_owned(), value.to_owned())].into();
        })
        .await;
        let error = result.map(|pod| pod.id).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{name}: {error}");
    }
    end(node, &pod).await;
}

#[tokio::test]
async fn namespaces_are_the_pods_the_containers_or_another_containers() {
    let node = Node::start().await;
    let pod = node.pod("namespaces").await;
    let pid = |mode: NamespaceMode, target: &str| LinuxContainerSecurityContext {
        namespace_options: Some(NamespaceOption {
            pid: mode.into(),
            target_id: target.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let namespace = "readlink /proc/self/ns/pid";
    let mut seen = BTreeMap::new();
    let own = run(&node, &pod, "own", pid(NamespaceMode::Container, "")).await;
    for (name, context) in [
        ("pod1", pid(NamespaceMode::Pod, "")),
        ("pod2", pid(NamespaceMode::Pod, "")),
        ("node", pid(NamespaceMode::Node, "")),
        ("target", pid(NamespaceMode::Target, &own)),
    ] {
        let id = run(&node, &pod, name, context).await;
        seen.insert(name, said(&node, &id, namespace).await);
        if name == "pod2" {
            let sleeps = said(&node, &id, "ps | grep -c 'sleep 100[0]'").await;
            assert_eq!(sleeps, "2\n");
            assert_eq!(
                said(&node, &id, "cat /proc/1/cmdline | grep -c sleep").await,
                "0\n"
            );
            // Shared memory is the pod's, and has its usual size.
            let df = said(
                &node,
                &id,
                "echo there > /dev/shm/note; df -m /dev/shm | tail -1",
            )
            .await;
            assert_eq!(df.split_whitespace().nth(1), Some("64"), "{df}");
        }
    }
    let of_own = said(&node, &own, namespace).await;
    assert_eq!(seen["pod1"], seen["pod2"]);
    assert_eq!(seen["target"], of_own);
    assert!(seen["node"] != seen["pod1"] && seen["node"] != of_own && of_own != seen["pod1"]);
    assert_eq!(
        said(
            &node,
            &own,
            "cat /dev/shm/note; cat /proc/1/cmdline | grep -c sleep"
        )
        .await,
        "there\n1\n"
    );

    let error = refused(&node, &pod, pid(NamespaceMode::Target, "")).await;
    assert!(error.message().contains("target_id"), "{error}");
    let error = refused(&node, &pod, pid(NamespaceMode::Target, "nobody")).await;
    assert!(error.message().contains("target_id"), "{error}");
    node.stop_container(&own, 0).await.unwrap();
    let error = refused(&node, &pod, pid(NamespaceMode::Target, &own)).await;
    assert!(error.message().contains("not running"), "{error}");
    for field in ["network", "ipc"] {
        let mut options = NamespaceOption::default();
        match field {
            "network" => options.network = NamespaceMode::Node.into(),
            _ => options.ipc = NamespaceMode::Node.into(),
        }
        let context = LinuxContainerSecurityContext {
            namespace_options: Some(options.clone()),
            ..Default::default()
        };
        let of_container = refused(&node, &pod, context).await;
        let of_pod = pod_with(&node, "host", |linux| {
            linux
                .security_context
                .get_or_insert_default()
                .namespace_options = Some(options);
        })
        .await
        .map(|pod| pod.id)
        .unwrap_err();
        for error in [of_container, of_pod] {
            assert_eq!(error.code(), Code::InvalidArgument);
            let named = format!("namespace_options.{field}");
            assert!(error.message().contains(&named), "{error}");
        }
    }
    end(node, &pod).await;
}

pub fn mapping(container_id: u32, host_id: u32, length: u32) -> IdMapping {
    IdMapping {
        host_id,
        container_id,
        length,
    }
}

pub fn user_namespace(mode: NamespaceMode, mappings: &[IdMapping]) -> NamespaceOption {
    NamespaceOption {
        userns_options: Some(UserNamespace {
            mode: mode.into(),
            uids: mappings.to_vec(),
            gids: mappings.to_vec(),
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_pod_can_have_a_user_namespace() {
    let node = Node::start().await;
    let handlers = status(&node).await.runtime_handlers;
    assert!(handlers.iter().all(|h| h.features.unwrap().user_namespaces));

    let options = user_namespace(NamespaceMode::Pod, &[mapping(0, 1000, 100_000)]);
    let set = |options: &NamespaceOption| {
        let options = options.clone();
        move |linux: &mut LinuxPodSandboxConfig| {
            linux.sysctls = [("net.core.somaxconn".to_owned(), "77".to_owned())].into();
            linux
                .security_context
                .get_or_insert_default()
                .namespace_options = Some(options);
        }
    };
    let pod = pod_with(&node, "mapped", set(&options)).await.unwrap();
    let told = node.client.pod_status(&pod.id).await.unwrap();
    let told = told.linux.unwrap().namespaces.unwrap().options.unwrap();
    assert_eq!(told.userns_options, options.userns_options);
    let context = LinuxContainerSecurityContext {
        namespace_options: Some(options.clone()),
        ..Default::default()
    };
    let config = with(
        node.script("map", "tr -s ' ' < /proc/self/uid_map; id -u; ls -ln /bin/busybox | tr -s ' ' | cut -d ' ' -f 3,4"),
        context.clone(),
    );
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    node.client.wait_exited(&id, PATIENCE).await.unwrap();
    assert_eq!(node.log("map"), " 0 1000 100000\n0\n0 0\n");

    let id = run(&node, &pod, "main", context.clone()).await;
    let script = "tr -s ' ' < /proc/self/gid_map; echo x > /root/x && ls -ln /root/x | tr -s ' ' | cut -d ' ' -f 3,4; \
        ls -ln /srv/secret | tr -s ' ' | cut -d ' ' -f 3,4; cat /srv/secret; hostname; \
        cat /proc/sys/net/core/somaxconn; echo x > /dev/shm/x && ls -ln /dev/shm/x | tr -s ' ' | cut -d ' ' -f 3,4; \
        ip -4 address show eth0 | grep -c 'inet 10.86'; ping -c 1 127.0.0.1 | grep -c ' 0% packet loss'; \
        grep -c nameserver /etc/resolv.conf | head -c 0; cat /etc/hostname; ls /sys/class/net | grep -c eth0";
    assert_eq!(
        said(&node, &id, script).await,
        " 0 1000 100000\n0 0\n33 33\nonly www-data reads this\nmapped\n77\n0 0\n1\n1\nmapped\n1\n"
    );
    // The daemon reaches what listens in the pod's network, as any other does.
    let ip = node
        .client
        .pod_status(&pod.id)
        .await
        .unwrap()
        .network
        .unwrap()
        .ip;
    node.exec(&id, "httpd -p 80 -h /srv/www").await;
    let mut answer = String::new();
    for _ in 0..100 {
        if let Ok(mut stream) = TcpStream::connect((ip.as_str(), 80)) {
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            stream.read_to_string(&mut answer).unwrap();
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(
        answer.ends_with("<h1>hello from a microVM</h1>\n"),
        "{answer}"
    );
    let net_admin = LinuxContainerSecurityContext {
        capabilities: Some(Capability {
            add_capabilities: names(&["NET_ADMIN"]),
            ..Default::default()
        }),
        ..context.clone()
    };
    let able = run(&node, &pod, "able", net_admin).await;
    assert_eq!(
        said(
            &node,
            &able,
            "ip link add name br7 type bridge && echo made"
        )
        .await,
        "made\n"
    );

    let other = LinuxContainerSecurityContext {
        namespace_options: Some(user_namespace(NamespaceMode::Pod, &[mapping(0, 5000, 10)])),
        ..Default::default()
    };
    let error = refused(&node, &pod, other).await;
    assert!(error.message().contains("userns_options"), "{error}");

    for (wrong, field) in [
        (
            user_namespace(
                NamespaceMode::Pod,
                &[mapping(0, 1000, 9), mapping(0, 2000, 9)],
            ),
            "uids",
        ),
        (
            user_namespace(NamespaceMode::Pod, &[mapping(1, 1000, 9)]),
            "container_id",
        ),
        (user_namespace(NamespaceMode::Container, &[]), "mode"),
        (user_namespace(NamespaceMode::Target, &[]), "mode"),
    ] {
        let result = pod_with(&node, "wrong", set(&wrong)).await;
        let error = result.map(|pod| pod.id).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains(field), "{error}");
    }
    let plain = pod_with(
        &node,
        "plain",
        set(&user_namespace(NamespaceMode::Node, &[])),
    )
    .await
    .unwrap();
    let id = run(&node, &plain, "plain", Default::default()).await;
    assert_eq!(
        said(&node, &id, "tr -s ' ' < /proc/self/uid_map").await,
        " 0 0 4294967295\n"
    );
    node.stop_sandbox(&plain.id).await.unwrap();
    node.remove_sandbox(&plain.id).await.unwrap();
    end(node, &pod).await;
}

#[tokio::test]
async fn limits_are_in_force_from_the_start() {
    let node = Node::start().await;
    let pod = node.pod("resources").await;
    let limits = LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        memory_swap_limit_in_bytes: 64 << 20,
        oom_score_adj: 985,
        cpuset_cpus: "0,63".into(),
        cpuset_mems: "0".into(),
        hugepage_limits: vec![
            hull_proto_cri::v1::HugepageLimit {
                page_size: "2MB".into(),
                limit: 4 << 20,
            },
            hull_proto_cri::v1::HugepageLimit {
                page_size: "1GB".into(),
                limit: 0,
            },
        ],
        unified: [("pids.max", "50"), ("memory.high", "50331648")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
    };
    let limited = |limits: LinuxContainerResources| {
        let mut config = node.script("limited", SLEEP);
        config.linux = Some(LinuxContainerConfig {
            resources: Some(limits),
            ..Default::default()
        });
        config
    };
    let id = node.create(&pod, limited(limits.clone())).await.unwrap();
    node.start_container(&id).await.unwrap();
    for (file, value) in [
        ("cpu.max", "25000 50000"),
        ("memory.max", "67108864"),
        ("memory.swap.max", "0"),
        ("memory.high", "50331648"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("pids.max", "50"),
        ("hugetlb.2MB.max", "4194304"),
    ] {
        let seen = said(&node, &id, &format!("cat /sys/fs/cgroup/{file}")).await;
        assert_eq!(seen.trim(), value, "{file}");
    }
    let weight: u32 = said(&node, &id, "cat /sys/fs/cgroup/cpu.weight")
        .await
        .trim()
        .parse()
        .unwrap();
    assert!((10..100).contains(&weight), "{weight}");
    let script = "cat /proc/$(pidof sleep)/oom_score_adj /proc/self/oom_score_adj; ulimit -n";
    assert_eq!(said(&node, &id, script).await, "985\n985\n1048576\n");
    let told = node.client.container_status(&id).await.unwrap();
    assert_eq!(told.resources.unwrap().linux.unwrap(), limits);

    let swap = LinuxContainerResources {
        memory_swap_limit_in_bytes: 1,
        ..limits.clone()
    };
    let score = LinuxContainerResources {
        oom_score_adj: 1001,
        ..limits.clone()
    };
    let unified = LinuxContainerResources {
        unified: [("../cgroup.procs".to_owned(), "1".to_owned())].into(),
        ..limits.clone()
    };
    let pages = LinuxContainerResources {
        hugepage_limits: vec![hull_proto_cri::v1::HugepageLimit {
            page_size: "64MB".into(),
            limit: 64 << 20,
        }],
        ..limits
    };
    for (wrong, field) in [
        (swap, "memory_swap"),
        (score, "oom_score_adj"),
        (unified, "unified"),
        (pages, "64MB"),
    ] {
        let mut config = limited(wrong);
        config.metadata.as_mut().unwrap().name = "wrong".into();
        let error = node.create(&pod, config).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(field), "{error}");
    }
    end(node, &pod).await;
}
