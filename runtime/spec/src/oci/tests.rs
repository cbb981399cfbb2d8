use serde_json::{Value, json};

use super::*;
use crate::spec::{
    ContainerSecurity, IdRange, ImageRequest, MountFlag, MountPropagation, MountSource, MountSpec,
    Namespaces, Resources, SandboxMetadata, Seccomp, UserNamespace,
};

fn image() -> ImageConfig {
    ImageConfig {
        env: vec!["PATH=/bin".into(), "LANG=C".into()],
        entrypoint: vec!["/entry".into()],
        cmd: vec!["default".into()],
        working_dir: "/srv".into(),
        ..ImageConfig::default()
    }
}

fn spec_of(container: &ContainerSpec) -> Result<Value, PodError> {
    spec_in(None, container)
}

fn spec_in(
    user_namespace: Option<UserNamespace>,
    container: &ContainerSpec,
) -> Result<Value, PodError> {
    let sandbox = SandboxSpec {
        metadata: SandboxMetadata {
            name: "web".into(),
            ..SandboxMetadata::default()
        },
        namespaces: Namespaces {
            user_namespace,
            ..Namespaces::default()
        },
        ..SandboxSpec::default()
    };
    let spec = build(Inputs {
        sandbox: &sandbox,
        container,
        image: &image(),
        locals: &[5],
        localhost_seccomp: None,
        apparmor: Some("profile"),
        seccomp_default: true,
    })?;
    Ok(serde_json::to_value(spec).unwrap())
}

#[test]
fn what_plugins_want_goes_before_the_image_and_the_defaults() {
    let limit = |kind: &str, soft, hard| Rlimit {
        kind: kind.into(),
        soft,
        hard,
    };
    let mut container = ContainerSpec {
        env: vec![("A".into(), "1".into())],
        ..ContainerSpec::default()
    };
    container.adjusted.unset_env = vec!["LANG".into(), "NONE".into()];
    container.adjusted.rlimits = vec![limit("RLIMIT_CORE", 0, 9)];
    container.adjusted.annotations = [("k".to_owned(), "v".to_owned())].into();
    let spec = spec_of(&container).unwrap();
    let process = &spec["process"];
    let env: Vec<&str> = process["env"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert_eq!(env, ["PATH=/bin", "HOSTNAME=web", "A=1"]);
    let files = json!({"type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576});
    let core = json!({"type": "RLIMIT_CORE", "hard": 9, "soft": 0});
    assert_eq!(process["rlimits"], json!([core, files]));
    assert_eq!(spec["annotations"], json!({"k": "v"}));
    container.adjusted.rlimits = vec![limit("RLIMIT_NOFILE", 5, 6)];
    let spec = spec_of(&container).unwrap();
    let files = json!({"type": "RLIMIT_NOFILE", "hard": 6, "soft": 5});
    assert_eq!(spec["process"]["rlimits"], json!([files]));
    // A record of an earlier version has none of it, and means the same.
    let earlier: ContainerSpec = serde_json::from_str("{}").unwrap();
    assert_eq!(earlier.adjusted, crate::spec::Adjusted::default());
}

fn args(command: &[&str], args: &[&str]) -> Value {
    let words = |w: &[&str]| w.iter().map(|s| (*s).to_owned()).collect();
    let container = ContainerSpec {
        command: words(command),
        args: words(args),
        ..ContainerSpec::default()
    };
    spec_of(&container).unwrap()["process"]["args"].clone()
}

#[test]
fn a_plain_container_has_this_specification() {
    let mut spec = spec_of(&ContainerSpec::default()).unwrap();
    // The long lists have their own tests.
    spec["linux"]["seccomp"] = json!(spec["linux"]["seccomp"]["defaultAction"]);
    spec["mounts"] = json!(
        spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| format!(
                "{} {}",
                m["destination"].as_str().unwrap(),
                m["source"].as_str().unwrap()
            ))
            .collect::<Vec<_>>()
    );
    for set in ["bounding", "effective", "permitted"] {
        let list = &mut spec["process"]["capabilities"][set];
        *list = json!(list.as_array().unwrap().len());
    }
    let expected = json!({
        "ociVersion": spec["ociVersion"],
        "root": {"path": "rootfs", "readonly": false},
        "annotations": {},
        "mounts": [
            "/proc proc",
            "/dev tmpfs",
            "/sys sysfs",
            "/dev/pts devpts",
            "/dev/mqueue mqueue",
            "/dev/shm /run/hull/shm",
            "/etc/hosts /run/hull/files/sandbox/hosts",
            "/etc/resolv.conf /run/hull/files/sandbox/resolv.conf",
            "/etc/hostname /run/hull/files/sandbox/hostname",
            "/sys/fs/cgroup cgroup",
        ],
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/entry", "default"],
            "env": ["PATH=/bin", "HOSTNAME=web", "LANG=C"],
            "cwd": "/srv",
            "apparmorProfile": "profile",
            "capabilities": {
                "bounding": 14, "effective": 14, "permitted": 14, "inheritable": [], "ambient": [],
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576}],
        },
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "seccomp": "SCMP_ACT_ERRNO",
            "maskedPaths": spec["linux"]["maskedPaths"],
            "readonlyPaths": spec["linux"]["readonlyPaths"],
        },
    });
    assert_eq!(spec, expected, "{spec:#}");
    let hidden = spec["linux"]["maskedPaths"].as_array().unwrap();
    assert!(hidden.contains(&json!("/proc/kcore")));
}

#[test]
fn command_and_arguments_replace_those_of_the_image() {
    assert_eq!(args(&[], &[]), json!(["/entry", "default"]));
    assert_eq!(args(&[], &["x"]), json!(["/entry", "x"]));
    assert_eq!(args(&["sh"], &[]), json!(["sh"]));
    assert_eq!(args(&["sh"], &["-c", "x"]), json!(["sh", "-c", "x"]));
}

#[test]
fn without_any_command_the_container_is_refused() {
    let empty = ImageConfig::default();
    let error = build(Inputs {
        sandbox: &SandboxSpec::default(),
        container: &ContainerSpec::default(),
        image: &empty,
        locals: &[],
        localhost_seccomp: None,
        apparmor: None,
        seccomp_default: true,
    });
    assert!(matches!(error, Err(PodError::InvalidArgument { .. })));
}

#[test]
fn a_later_variable_replaces_an_earlier_one_in_its_place() {
    let container = ContainerSpec {
        tty: true,
        env: vec![("LANG".into(), "de=x".into()), ("A".into(), String::new())],
        ..ContainerSpec::default()
    };
    assert_eq!(
        spec_of(&container).unwrap()["process"]["env"],
        json!(["PATH=/bin", "TERM=xterm", "HOSTNAME=web", "LANG=de=x", "A="])
    );
}

#[test]
fn a_privileged_container_is_confined_by_the_vm_alone() {
    let container = ContainerSpec {
        security: ContainerSecurity {
            privileged: true,
            ..ContainerSecurity::default()
        },
        ..ContainerSpec::default()
    };
    let spec = spec_of(&container).unwrap();
    assert_eq!(spec["linux"].get("seccomp"), None);
    assert_eq!(spec["linux"].get("maskedPaths"), None);
    assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], true);
    let caps = spec["process"]["capabilities"]["effective"].as_array();
    assert_eq!(caps.unwrap().len(), 41);
}

#[test]
fn limits_reach_the_cgroup() {
    let container = ContainerSpec {
        resources: Some(Resources {
            cpu_period_us: 100_000,
            cpu_quota_us: 50_000,
            cpu_shares: 512,
            cpuset_cpus: "0".into(),
            memory_limit_bytes: 15 << 20,
            memory_swap_limit_bytes: 15 << 20,
            pids_limit: 100,
            oom_score_adj: 985,
            unified: [("memory.high".to_owned(), "1048576".to_owned())].into(),
            ..Resources::default()
        }),
        security: ContainerSecurity {
            seccomp: Seccomp::Unconfined,
            readonly_rootfs: true,
            no_new_privs: true,
            ..ContainerSecurity::default()
        },
        ..ContainerSpec::default()
    };
    let spec = spec_of(&container).unwrap();
    let resources = &spec["linux"]["resources"];
    assert_eq!(
        resources["cpu"],
        json!({"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"})
    );
    assert_eq!(resources["memory"], json!({"limit": 15 << 20}));
    assert_eq!(resources["pids"]["limit"], 100);
    assert_eq!(
        resources["unified"],
        json!({"memory.high": "1048576", "memory.swap.max": "0"})
    );
    assert_eq!(spec["process"]["oomScoreAdj"], 985);
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    assert_eq!(spec["root"]["readonly"], true);
    assert_eq!(spec["linux"].get("seccomp"), None);
}

#[test]
fn asked_mounts_replace_standard_ones_and_come_after_their_parents() {
    let mount = |container_path: &str, recursive_readonly| MountSpec {
        container_path: container_path.into(),
        source: MountSource::Host("/host".into()),
        readonly: true,
        recursive_readonly,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    };
    let container = ContainerSpec {
        mounts: vec![
            mount("/etc/hosts", false),
            mount("/data/deep/below", true),
            mount("/data/", false),
            mount("/dev/termination-log", false),
            mount("/dev/shm/", false),
            MountSpec {
                flags: vec![MountFlag::NoExec, MountFlag::NoSuid],
                ..mount("/volume", false)
            },
        ],
        ..ContainerSpec::default()
    };
    let spec = spec_of(&container).unwrap();
    let mounts: Vec<_> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| {
            (
                m["destination"].as_str().unwrap(),
                &m["source"],
                &m["options"],
            )
        })
        .collect();
    let place = |path: &str| {
        let found: Vec<_> = mounts.iter().filter(|(to, ..)| *to == path).collect();
        assert_eq!(found.len(), 1, "{path} in {mounts:?}");
        mounts.iter().position(|(to, ..)| *to == path).unwrap()
    };
    // The agent finds them.
    let source = |number: u32| json!(format!("mount-{number}"));
    assert_eq!(*mounts[place("/etc/hosts")].1, source(0));
    assert_eq!(*mounts[place("/data/deep/below")].1, source(1));
    assert_eq!(
        mounts[place("/data/")].2,
        &json!(["rbind", "rprivate", "nodev", "rw"])
    );
    // Nobody but the guest can refuse writes to what it keeps by itself.
    assert_eq!(
        mounts[place("/volume")].2,
        &json!(["rbind", "rprivate", "ro", "noexec", "nosuid"])
    );
    assert_eq!(
        mounts[place("/data/deep/below")].2,
        &json!(["rbind", "rprivate", "nodev", "ro"])
    );
    assert!(place("/data/") < place("/data/deep/below"));
    assert!(place("/dev") < place("/dev/termination-log"));
    assert_eq!(*mounts[place("/dev/shm/")].1, source(4));
    assert!(!mounts.iter().any(|(to, ..)| *to == "/dev/shm"));
    assert_eq!(
        mounts[place("/etc/hostname")].1,
        "/run/hull/files/sandbox/hostname"
    );
}

#[test]
fn a_volume_of_devices_is_the_guests() {
    let of = |privileged, readonly| {
        let mount = |container_path: &str, path: &str| MountSpec {
            container_path: container_path.into(),
            source: MountSource::Host(path.into()),
            readonly,
            recursive_readonly: false,
            propagation: MountPropagation::HostToContainer,
            selinux_relabel: false,
            flags: Vec::new(),
            owners: None,
        };
        let container = ContainerSpec {
            mounts: vec![mount("/dev", "/dev/"), mount("/tun", "/dev/net/tun")],
            security: ContainerSecurity {
                privileged,
                ..ContainerSecurity::default()
            },
            ..ContainerSpec::default()
        };
        let spec = spec_of(&container).unwrap();
        let mounts = spec["mounts"].as_array().unwrap().clone();
        let at = |path: &str| {
            mounts
                .iter()
                .position(|m| m["destination"] == path)
                .unwrap()
        };
        // What a container has below it is not covered.
        assert!(
            at("/dev") < at("/dev/pts") && at("/dev") < at("/dev/shm"),
            "{mounts:?}"
        );
        let shown = |path: &str| {
            format!(
                "{} {}",
                mounts[at(path)]["source"],
                mounts[at(path)]["options"][2]
            )
        };
        [shown("/dev"), shown("/tun")]
    };
    let writable = [r#""/dev" "rw""#, r#""/dev/net/tun" "rw""#];
    let readonly = [r#""/dev" "ro""#, r#""/dev/net/tun" "ro""#];
    assert_eq!(of(true, false), writable);
    assert_eq!(of(true, true), readonly);
    assert_eq!(of(false, false), readonly);
}

#[test]
fn in_a_user_namespace_all_is_the_pods_but_what_is_asked_to_be_the_hosts() {
    let range = |host| IdRange { host, length: 9 };
    let user = UserNamespace {
        uids: range(1000),
        gids: range(2000),
    };
    let mount = |container_path: &str, source, owners| MountSpec {
        container_path: container_path.into(),
        source,
        readonly: true,
        recursive_readonly: false,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners,
    };
    let host = || MountSource::Host("/host".into());
    let image = MountSource::Image {
        image: ImageRequest::default(),
        sub_path: String::new(),
    };
    let container = ContainerSpec {
        mounts: vec![
            mount("/mapped", host(), Some(user)),
            mount("/as-it-is", host(), None),
            mount("/image", image, None),
        ],
        ..ContainerSpec::default()
    };
    let owners = |spec: &Value| -> Vec<_> {
        let mounts = spec["mounts"].as_array().unwrap().iter();
        let mapped = mounts.filter(|mount| mount.get("uidMappings").is_some());
        mapped
            .map(|mount| {
                let ids = |host| json!([{"containerID": 0, "hostID": host, "size": 9}]);
                assert_eq!(mount["uidMappings"], ids(1000));
                assert_eq!(mount["gidMappings"], ids(2000));
                mount["destination"].as_str().unwrap().to_owned()
            })
            .collect()
    };
    let mut found = owners(&spec_in(Some(user), &container).unwrap());
    found.sort_unstable();
    let files = [
        "/dev/shm",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
    ];
    assert_eq!(found, [&files[..], &["/image", "/mapped"]].concat());
    assert_eq!(
        owners(&spec_of(&ContainerSpec::default()).unwrap()),
        [""; 0]
    );
}
