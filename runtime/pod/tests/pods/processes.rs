//! Which processes are a pod's, and which only look so.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use hull_pod::Pods;
use hull_spec::{
    config::UserRange,
    id::PodId,
    info::SandboxState,
    spec::{MountPropagation, MountSource, MountSpec},
};
use nix::{
    sys::ptrace,
    unistd::{Pid, geteuid},
};

use crate::common::{TestNode, container, daemon, end, eventually};

/// A process with the command line of a VMM or file server, but another program.
fn pretender(node: &TestNode, pod: &str, socket: &str, user: u32) -> Child {
    // The shell executes the file `run`.
    let dir = Path::new("/tmp").join(format!("pretender-{}-{user}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("run"), "sleep 1000 & wait\n").unwrap();
    let socket = node.config.state.join("pods").join(pod).join(socket);
    let mut command = Command::new("/bin/sh");
    command.args(["run", "--socket"]).arg(socket);
    command.current_dir(&dir).process_group(0);
    if geteuid().is_root() {
        command.uid(user);
    }
    let child = command.spawn().unwrap();
    // It has read the file when it has a child of its own.
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    while fs::read_to_string(&children).unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::remove_dir_all(dir).unwrap();
    child
}

fn share() -> MountSpec {
    MountSpec {
        container_path: "/data".into(),
        source: MountSource::Host("/srv".into()),
        readonly: false,
        recursive_readonly: false,
        propagation: MountPropagation::Private,
        selinux_relabel: false,
        flags: Vec::new(),
        owners: None,
    }
}

async fn with_share(pods: &Pods, pod: &PodId, name: &str) {
    let mut spec = container(name, &["wait"]);
    spec.mounts.push(share());
    let id = pods.create_container(pod.as_str(), spec).await.unwrap();
    pods.start_container(id.as_str()).await.unwrap();
}

#[test]
fn a_process_that_poses_as_a_pods_is_left_alone() {
    let node = TestNode::new();
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        with_share(&pods, &pod, "first").await;
        pod
    });
    end(first);
    let own = node.vmms();
    assert_eq!(own.len(), 2);
    let mut others: Vec<Child> = [0, 65534]
        .into_iter()
        .flat_map(|user| {
            [
                ("vmm.sock", pod.as_str()),
                ("fs.sock", pod.as_str()),
                ("vmm.sock", "x"),
            ]
            .map(|(socket, pod)| pretender(&node, pod, socket, user))
        })
        .collect();
    daemon().block_on(async {
        let pods = node.open().await;
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        assert_eq!(info.state, SandboxState::Ready, "{}", info.message);
        for other in &mut others {
            assert_eq!(other.try_wait().unwrap(), None, "it was ended");
        }
        // The pod's own file server serves on.
        with_share(&pods, &pod, "second").await;
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        for mut other in others {
            assert_eq!(other.try_wait().unwrap(), None, "it was ended");
            let group = Pid::from_raw(other.id() as i32);
            nix::sys::signal::killpg(group, nix::sys::signal::SIGKILL).unwrap();
            other.wait().unwrap();
        }
        eventually("the end", async || node.leftovers().is_empty()).await;
    });
}

/// The value of the option `--user` of a VMM.
fn user_of(vmm: i32) -> u32 {
    let line = fs::read_to_string(format!("/proc/{vmm}/cmdline")).unwrap();
    let mut arguments = line.split('\0');
    arguments.find(|argument| *argument == "--user").unwrap();
    arguments.next().unwrap().parse().unwrap()
}

#[test]
fn vmms_have_users_and_pid_namespaces_of_their_own() {
    let node = TestNode::new();
    let run = |name: &'static str| {
        daemon().block_on(async {
            let pods = node.open().await;
            let before = node.vmms();
            pods.run_sandbox(node.sandbox(name)).await.unwrap();
            let vmm = node.vmms().into_iter().find(|vmm| !before.contains(vmm));
            vmm.unwrap()
        })
    };
    // The daemon ends after each, so what is taken is known from records.
    let vmms = [run("one"), run("two"), run("three")];
    let first = UserRange::FIRST;
    assert_eq!(vmms.map(user_of), [first + 1, first + 2, first + 3]);
    for vmm in vmms {
        let status = fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
        let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        // Its number here, perhaps in namespaces between, and in its own.
        assert!(pids.unwrap().ends_with("\t1"), "{pids:?}");
    }
    daemon().block_on(async {
        let pods = node.open().await;
        let id = pods.sandboxes().await[1].id.clone();
        pods.remove_sandbox(id.as_str()).await.unwrap();
        let before = node.vmms();
        pods.run_sandbox(node.sandbox("four")).await.unwrap();
        let vmm = node.vmms().into_iter().find(|vmm| !before.contains(vmm));
        assert_eq!(user_of(vmm.unwrap()), first + 2, "it is free again");
        for info in pods.sandboxes().await {
            pods.remove_sandbox(info.id.as_str()).await.unwrap();
        }
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn pods_outlive_the_replacement_of_their_programs() {
    let mut node = TestNode::new();
    let programs = ["vmm", "fs"].map(|name| node.dir.path().join(name));
    let real = std::mem::replace(&mut node.config.vmm, programs[0].clone());
    node.config.file_server = programs[1].clone();
    let install = |path: &PathBuf| {
        let _ = fs::remove_file(path);
        fs::copy(&real, path).unwrap();
    };
    programs.iter().for_each(install);
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        with_share(&pods, &pod, "first").await;
        // This one is never recorded as up: its VMM is a stray.
        node.script(r#"{"no_agent":true}"#);
        let start = pods.run_sandbox(node.sandbox("cut-off"));
        let cut = tokio::time::timeout(Duration::from_secs(1), start).await;
        assert!(cut.is_err());
        pod
    });
    end(first);
    assert_eq!(node.vmms().len(), 3);
    node.script("");
    programs.iter().for_each(install);
    daemon().block_on(async {
        let pods = node.open().await;
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        assert_eq!(info.state, SandboxState::Ready, "{}", info.message);
        assert_eq!(node.vmms().len(), 2, "the stray is found");
        with_share(&pods, &pod, "second").await;
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn processes_that_do_not_end_hold_up_the_start_once_and_not_for_long() {
    let node = TestNode::new();
    node.script(r#"{"no_agent":true}"#);
    let first = daemon();
    first.block_on(async {
        let pods = node.open().await;
        for name in ["one", "two", "three"] {
            let (pods, spec) = (pods.clone(), node.sandbox(name));
            tokio::spawn(async move { pods.run_sandbox(spec).await });
        }
        let vsocks = || {
            let runs = fs::read_dir(node.config.state.join("pods")).unwrap();
            runs.filter(|run| run.as_ref().unwrap().path().join("vsock.sock").exists())
                .count()
        };
        eventually("boots", async || vsocks() == 3).await;
    });
    end(first);
    let strays = node.vmms();
    assert_eq!(strays.len(), 3);
    // No record names them any more, nor a copy of one.
    fs::remove_file(node.config.root.join("hull.redb")).unwrap();
    fs::remove_dir_all(node.config.state.join("records")).unwrap();
    // They stop on their way out, until they are let go.
    let options = ptrace::Options::PTRACE_O_TRACEEXIT;
    for pid in &strays {
        ptrace::seize(Pid::from_raw(*pid), options).unwrap();
    }
    node.script("");
    daemon().block_on(async {
        let begin = Instant::now();
        let pods = node.open().await;
        let waited = begin.elapsed();
        assert!(waited < Duration::from_secs(25), "{waited:?}");
        pods.run_sandbox(node.sandbox("web")).await.unwrap();
    });
    assert!(node.vmms().len() >= 4, "they did not end");
    for pid in strays {
        ptrace::detach(Pid::from_raw(pid), None).unwrap();
    }
}
