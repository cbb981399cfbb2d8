//! A daemon that ends, in whatever way, and the next one.

use std::{fs, io::Write, process::Stdio, sync::atomic::Ordering, time::Duration};

use hull_network::{GuestInterface, GuestRoute};
use hull_pod::Pods;
use hull_spec::{
    config::ImageDevice,
    id::PodId,
    info::{ContainerState, SandboxState},
};
use hull_vm::identity::Identity;
use redb::ReadableTable;

use crate::common::{TestNode, attached, container, daemon, end, eventually, kill_pid};

async fn run(pods: &Pods, pod: &PodId, name: &str, args: &[&str]) -> String {
    let id = pods
        .create_container(pod.as_str(), container(name, args))
        .await
        .unwrap();
    pods.start_container(id.as_str()).await.unwrap();
    id.to_string()
}

#[test]
fn a_guest_hears_of_changes_of_its_network_and_of_nothing_else() {
    let node = TestNode::new();
    let with = |destination: &str| {
        let route = GuestRoute {
            destination: destination.into(),
            ..Default::default()
        };
        let guest = &node.network.guest;
        guest.send_modify(|guest| guest.routes = vec![route]);
    };
    let told = |pod: &PodId| {
        let run = node.config.state.join("pods").join(pod.as_str());
        fs::read_to_string(run.join("network")).unwrap_or_default()
    };
    with("10.0.0.0/8");
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        with("10.1.0.0/16");
        eventually("news", async || told(&pod) == "10.1.0.0/16\n").await;
        // Again what it has.
        with("10.1.0.0/16");
        with("10.2.0.0/16");
        let both = "10.1.0.0/16\n10.2.0.0/16\n";
        eventually("more news", async || told(&pod) == both).await;
        pod
    });
    end(first);

    with("10.3.0.0/16");
    daemon().block_on(async {
        let pods = node.open().await;
        eventually("old news", async || told(&pod).ends_with("10.3.0.0/16\n")).await;
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        let followers = &node.network.guest;
        eventually("the end", async || followers.receiver_count() == 0).await;
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn a_guests_clock_is_set_right_by_the_next_daemon() {
    const HOUR_NS: i64 = 3_600_000_000_000;
    let node = TestNode::new();
    node.script(&format!("{{\"clock_ahead_ns\": {HOUR_NS}}}"));
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        pods.run_sandbox(node.sandbox("web")).await.unwrap()
    });
    end(first);
    let set = || {
        let run = node.config.state.join("pods").join(pod.as_str());
        let text = fs::read_to_string(run.join("clock")).unwrap_or_default();
        text.lines().next().map(|by| by.parse::<i64>().unwrap())
    };
    daemon().block_on(async {
        let pods = node.open().await;
        eventually("a clock that is set", async || set().is_some()).await;
        // A slow machine is off by what it did not know of the way.
        let off_ns = set().unwrap() + HOUR_NS;
        assert!(off_ns.abs() < HOUR_NS / 60, "{off_ns}");
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn an_adopted_vm_gets_as_memory_what_its_own_memory_can_describe() {
    let mut node = TestNode::new();
    node.config.image_device = ImageDevice::Pmem;
    let devices = async |pods: &Pods, pod: &PodId| {
        let metrics = pods.vm_metrics(pod.as_str()).await.unwrap();
        let devices = metrics.devices.into_iter().map(|device| device.kind);
        devices.filter(|kind| kind == "pmem").count()
    };
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        pods.run_sandbox(node.sandbox("web")).await.unwrap()
    });
    end(first);

    // Four times as large as the VM that runs, and as half of those that are configured now.
    node.images.length.store(128 << 20, Ordering::Relaxed);
    node.config.memory_mib = 256;
    daemon().block_on(async {
        let pods = node.open().await;
        run(&pods, &pod, "one", &["app"]).await;
        assert_eq!(devices(&pods, &pod).await, 0);
        let larger = pods.run_sandbox(node.sandbox("larger")).await.unwrap();
        run(&pods, &larger, "two", &["app"]).await;
        assert_eq!(devices(&pods, &larger).await, 1);
        for pod in [pod, larger] {
            pods.remove_sandbox(pod.as_str()).await.unwrap();
        }
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn a_pod_has_the_addresses_that_its_interface_gets_later() {
    let node = TestNode::new();
    let with = |addresses: &[&str]| {
        let interface = GuestInterface {
            mac: "02:00:00:00:00:01".into(),
            name: "eth0".into(),
            mtu: 1500,
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
            lone_addresses: Vec::new(),
        };
        let other = GuestInterface {
            name: "net1".into(),
            addresses: vec!["10.99.0.1/24".into()],
            ..interface.clone()
        };
        let guest = &node.network.guest;
        guest.send_modify(|guest| guest.interfaces = vec![interface, other]);
    };
    let ips = async |pods: &Pods, pod: &PodId| {
        let ips = pods.sandbox(pod.as_str()).await.unwrap().ips;
        ips.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    // CNI told of the first alone.
    with(&["10.88.0.5/16", "10.88.0.6/16"]);
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        assert_eq!(ips(&pods, &pod).await, ["10.88.0.5"]);
        with(&["10.88.0.5/16", "10.88.0.6/16", "fd88::5/64"]);
        let both = ["10.88.0.5", "fd88::5"];
        eventually("an address", async || ips(&pods, &pod).await == both).await;
        pod
    });
    end(first);

    // The next daemon knows them, and that CNI left one out.
    let second = daemon();
    second.block_on(async {
        let pods = node.open().await;
        assert_eq!(ips(&pods, &pod).await, ["10.88.0.5", "fd88::5"]);
        with(&["10.88.0.7/16", "10.88.0.6/16", "fd88::5/64"]);
        let other = ["10.88.0.7", "fd88::5"];
        eventually("another", async || ips(&pods, &pod).await == other).await;
    });
    end(second);

    // What changed while there was no daemon.
    with(&["10.88.0.7/16", "10.88.0.6/16"]);
    daemon().block_on(async {
        let pods = node.open().await;
        eventually("one less", async || ips(&pods, &pod).await == ["10.88.0.7"]).await;
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(ips(&pods, &pod).await, [""; 0]);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn an_interface_that_comes_later_is_put_into_the_vm_until_it_goes() {
    let node = TestNode::new();
    let comes = |name: &str| {
        let guest = &node.network.guest;
        guest.send_modify(|guest| guest.unjoined = vec![name.into()]);
    };
    let goes = |name: &str| {
        node.network.guest.send_modify(|guest| {
            guest.interfaces.retain(|interface| interface.name != name);
            guest.missing = vec![name.into()];
        });
    };
    let links = |pod: &PodId| {
        let run = node.config.state.join("pods").join(pod.as_str());
        fs::read_to_string(run.join("links")).unwrap_or_default()
    };
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 5);
        comes("net1");
        eventually("a link", async || links(&pod) == "in 31\n").await;
        assert_eq!(attached(&pods, &pod).await, 6);
        // This one comes no further than the record.
        node.network.faults.lock().unwrap().join = true;
        comes("net2");
        eventually("a link", async || {
            node.network.joining.load(Ordering::Relaxed)
        })
        .await;
        pod
    });
    end(first);

    node.network.faults.lock().unwrap().join = false;
    let second = daemon();
    second.block_on(async {
        let pods = node.open().await;
        // The guest is told of the first again, and the second gets its slot after all.
        let both = "in 31\nin 31\nin 30\n";
        eventually("both links", async || links(&pod) == both).await;
        assert_eq!(attached(&pods, &pod).await, 7);
        goes("net1");
        eventually("one less", async || attached(&pods, &pod).await == 6).await;
        assert_eq!(links(&pod), format!("{both}out 31\n"));
        comes("net3");
        eventually("its place is taken", async || {
            links(&pod) == format!("{both}out 31\nin 31\n")
        })
        .await;
    });
    end(second);

    daemon().block_on(async {
        let pods = node.open().await;
        assert_eq!(attached(&pods, &pod).await, 7);
        // A disk does not get a slot of theirs.
        let id = run(&pods, &pod, "app", &["wait"]).await;
        assert_eq!(attached(&pods, &pod).await, 8);
        pods.remove_container(&id).await.unwrap();
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn an_interface_that_the_vm_does_not_take_holds_up_nothing() {
    for script in [
        r#"{"refuse":["attach_device"]}"#,
        r#"{"refuse_attach":"busy"}"#,
    ] {
        let node = TestNode::new();
        node.script(script);
        daemon().block_on(async {
            let pods = node.open().await;
            let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
            node.network.guest.send_modify(|guest| {
                guest.unjoined = vec!["net1".into()];
                guest.routes = vec![GuestRoute {
                    destination: "10.9.0.0/16".into(),
                    ..Default::default()
                }];
            });
            let run = node.config.state.join("pods").join(pod.as_str());
            let told = || fs::read_to_string(run.join("network")).unwrap_or_default();
            eventually("news", async || told().ends_with("10.9.0.0/16\n")).await;
            assert_eq!(attached(&pods, &pod).await, 5, "{script}");
            pods.stop_sandbox(pod.as_str()).await.unwrap();
            pods.remove_sandbox(pod.as_str()).await.unwrap();
            assert_eq!(node.leftovers(), [""; 0]);
        });
    }
}

#[test]
fn running_pods_are_adopted_and_no_log_line_is_lost_or_doubled() {
    const LINES: usize = 600;
    let node = TestNode::new();
    let first = daemon();
    let (pod, long, stopped, created) = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let long = run(&pods, &pod, "long", &["lines:600", "exit:5"]).await;
        let stopped = run(&pods, &pod, "stopped", &["exit:4"]).await;
        pods.wait_container(&stopped).await.unwrap();
        let created = pods
            .create_container(pod.as_str(), container("created", &["out:late\\n"]))
            .await
            .unwrap();
        eventually("lines", async || node.log("long.log").len() > 20).await;
        (pod, long, stopped, created)
    });
    end(first);

    // Some daemons that do not live long, to hit different moments of writing.
    for round in 0..4_u64 {
        let between = daemon();
        between.block_on(async {
            node.open().await;
            tokio::time::sleep(Duration::from_millis(7 * round)).await;
        });
        end(between);
    }

    let last = daemon();
    last.block_on(async {
        let pods = node.open().await;
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        assert_eq!(info.state, SandboxState::Ready);
        assert_eq!(info.vm.unwrap().pid as i32, node.vmms()[0]);
        let before = pods.container(&stopped).await.unwrap();
        assert_eq!(
            (before.state, before.exit_code),
            (ContainerState::Exited, 4)
        );

        let ended = pods.wait_container(&long).await.unwrap();
        assert_eq!(ended.exit_code, 5);
        let expected: Vec<String> = (0..LINES).map(|n| format!("stdout F line {n}")).collect();
        assert_eq!(node.log("long.log"), expected);

        pods.start_container(created.as_str()).await.unwrap();
        pods.wait_container(created.as_str()).await.unwrap();
        assert_eq!(node.log("created.log"), ["stdout F late"]);
        // A new image attachment does not collide with the old one.
        pods.remove_container(&long).await.unwrap();
        run(&pods, &pod, "new", &["wait"]).await;
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn a_log_that_can_not_be_opened_at_a_start_goes_on_once_it_can() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, id) = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let id = run(&pods, &pod, "app", &["ticks:5"]).await;
        eventually("lines", async || node.log("app.log").len() > 3).await;
        (pod, id)
    });
    end(first);
    let (log, moved) = (
        node.log_directory().join("app.log"),
        node.log_directory().join("moved"),
    );
    fs::rename(&log, &moved).unwrap();
    fs::create_dir(&log).unwrap();
    daemon().block_on(async {
        let pods = node.open().await;
        pods.reopen_log(id.as_str()).await.unwrap_err();
        fs::remove_dir(&log).unwrap();
        fs::rename(&moved, &log).unwrap();
        let before = node.log("app.log").len();
        eventually("more lines", async || {
            node.log("app.log").len() > before + 3
        })
        .await;
        let lines = node.log("app.log");
        let expected: Vec<String> = (0..lines.len())
            .map(|n| format!("stdout F line {n}"))
            .collect();
        assert_eq!(lines, expected);
        pods.remove_sandbox(pod.as_str()).await.unwrap();
    });
}

#[test]
fn an_exit_that_nobody_saw_is_told() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, id) = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let args = ["sleep:200", "out:end\\n", "exit:9"];
        let id = run(&pods, &pod, "app", &args).await;
        (pod, id)
    });
    end(first);
    daemon().block_on(async {
        eventually("an exit", async || node.noted(pod.as_str(), "exited")).await;
        let pods = node.open().await;
        let info = pods.wait_container(&id).await.unwrap();
        assert_eq!((info.exit_code, info.reason.as_str()), (9, "Error"));
        assert_eq!(node.log("app.log"), ["stdout F end"]);
    });
}

/// A pod with a container that waits, and the pid of its VMM.
async fn waiting(node: &TestNode) -> (PodId, String, u32) {
    let pods = node.open().await;
    let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
    let id = run(&pods, &pod, "app", &["wait"]).await;
    let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
    (pod, id, vm.pid)
}

#[test]
fn a_pod_whose_vm_died_meanwhile_is_not_ready() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, id, pid) = first.block_on(waiting(&node));
    end(first);
    kill_pid(pid);
    daemon().block_on(async {
        let gone = async || !node.vmms().contains(&(pid as i32));
        eventually("the end of the VM", gone).await;
        let pods = node.open().await;
        let info = pods.sandbox(pod.as_str()).await.unwrap();
        assert_eq!(info.state, SandboxState::NotReady);
        assert!(info.message.contains("the VM is gone"), "{}", info.message);
        let container = pods.container(&id).await.unwrap();
        assert_eq!(
            (container.state, container.exit_code),
            (ContainerState::Exited, 255)
        );
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn a_start_that_was_cut_off_leaves_nothing_and_can_be_repeated() {
    // Cut off at several moments: before and after the VMM is there.
    for wait_ms in [5, 30, 80, 150, 400] {
        let node = TestNode::new();
        node.script(r#"{"attempts":1000}"#);
        let first = daemon();
        first.block_on(async {
            let pods = node.open().await;
            let start = pods.run_sandbox(node.sandbox("web"));
            let cut = tokio::time::timeout(Duration::from_millis(wait_ms), start).await;
            assert!(cut.is_err());
        });
        end(first);
        node.script("");
        daemon().block_on(async {
            let pods = node.open().await;
            assert!(pods.sandboxes().await.is_empty());
            assert_eq!(node.leftovers(), [""; 0], "after {wait_ms} ms");
            pods.run_sandbox(node.sandbox("web")).await.unwrap();
        });
    }
}

#[test]
fn a_disk_whose_attachment_was_cut_off_is_taken_out_and_can_be_attached_again() {
    for call in ["attach_storage", "create"] {
        let node = TestNode::new();
        node.script(&format!(r#"{{"hang_once":["{call}"]}}"#));
        let first = daemon();
        let pod = first.block_on(async {
            let pods = node.open().await;
            let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
            assert_eq!(attached(&pods, &pod).await, 5);
            let (other, id) = (pods.clone(), pod.to_string());
            tokio::spawn(
                async move { other.create_container(&id, container("app", &["x"])).await },
            );
            eventually("a call that hangs", async || {
                node.noted(pod.as_str(), "hangs")
            })
            .await;
            assert_eq!(attached(&pods, &pod).await, 6);
            pod
        });
        end(first);
        daemon().block_on(async {
            let pods = node.open().await;
            assert_eq!(attached(&pods, &pod).await, 5, "{call}");
            let id = run(&pods, &pod, "app", &["wait"]).await;
            assert_eq!(attached(&pods, &pod).await, 6);
            pods.remove_container(&id).await.unwrap();
            assert_eq!(attached(&pods, &pod).await, 5);
        });
    }
}

#[test]
fn a_disk_that_the_guest_let_go_of_before_the_daemon_ended_is_mounted_again() {
    let node = TestNode::new();
    node.script(r#"{"lose_once":["detach_storage"]}"#);
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let id = run(&pods, &pod, "old", &["exit:0"]).await;
        let other = pods.clone();
        tokio::spawn(async move { other.remove_container(&id).await });
        eventually("a call that hangs", async || {
            node.noted(pod.as_str(), "hangs")
        })
        .await;
        pod
    });
    end(first);
    daemon().block_on(async {
        let pods = node.open().await;
        run(&pods, &pod, "new", &["wait"]).await;
    });
}

#[test]
fn a_disk_that_the_guest_did_not_let_go_of_is_used_again() {
    let mut node = TestNode::new();
    node.config.agent_timeout = Duration::from_secs(3);
    node.script(r#"{"hang_once":["detach_storage"]}"#);
    daemon().block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let id = run(&pods, &pod, "old", &["wait"]).await;
        pods.remove_container(&id).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 6);
        let id = run(&pods, &pod, "new", &["wait"]).await;
        assert_eq!(attached(&pods, &pod).await, 6);
        pods.remove_container(&id).await.unwrap();
        assert_eq!(attached(&pods, &pod).await, 5);
    });
}

#[test]
fn a_retry_after_a_restart_gets_the_same_sandbox() {
    let node = TestNode::new();
    let first = daemon();
    let pod = first.block_on(async {
        let pods = node.open().await;
        pods.run_sandbox(node.sandbox("web")).await.unwrap()
    });
    end(first);
    daemon().block_on(async {
        let pods = node.open().await;
        let again = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        assert_eq!(again, pod);
    });
}

#[test]
fn plugins_are_told_which_pods_are_still_there() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, stopped) = first.block_on(async {
        let pods = node.open().await;
        assert_eq!(node.network.valid.lock().unwrap().take(), Some(Vec::new()));
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let stopped = pods.run_sandbox(node.sandbox("stopped")).await.unwrap();
        pods.stop_sandbox(stopped.as_str()).await.unwrap();
        (pod, stopped)
    });
    end(first);
    daemon().block_on(async {
        let pods = node.open().await;
        // A stopped one has given its address back.
        let valid = node.network.valid.lock().unwrap().take();
        assert_eq!(valid, Some(vec![pod.to_string()]));
        for id in [pod, stopped] {
            pods.stop_sandbox(id.as_str()).await.unwrap();
            pods.remove_sandbox(id.as_str()).await.unwrap();
        }
    });
}

#[tokio::test]
async fn what_nobody_owns_is_removed() {
    let node = TestNode::new();
    let orphan = "e".repeat(64);
    let run = node.config.state.join("pods").join(&orphan);
    let data = node.config.root.join("pods").join(&orphan);
    for dir in [&run, &data] {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("file"), "x").unwrap();
    }
    fs::write(node.config.root.join("scratch-1.ab.tmp"), "").unwrap();
    node.network.add_orphan(&orphan);
    node.images.add_lease(&orphan);
    node.images.add_lease("somebody else");
    let mut vmm = std::process::Command::new(&node.config.vmm)
        .args(["run", "--id", &orphan, "--socket"])
        .arg(run.join("vmm.sock"))
        .arg("--exit-report")
        .arg(run.join("exit.json"))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let identity = Identity::of(vmm.id()).unwrap();
    fs::write(
        run.join("vmm.process"),
        serde_json::to_vec(&identity).unwrap(),
    )
    .unwrap();
    vmm.stdin.take().unwrap().write_all(b"\n").unwrap();
    eventually("listening", async || run.join("vmm.sock").exists()).await;
    // It is our child, so somebody has to bury it.
    let burial = std::thread::spawn(move || vmm.wait().unwrap());

    let _pods = node.open().await;
    assert!(!burial.join().unwrap().success());
    assert_eq!(node.leftovers(), ["lease somebody else"]);
}

#[test]
fn a_stop_goes_on_without_a_second_signal() {
    let node = TestNode::new();
    let first = daemon();
    let id = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        let id = run(&pods, &pod, "deaf", &["trap", "wait"]).await;
        let (other, stopped) = (pods.clone(), id.clone());
        tokio::spawn(async move {
            let _ = other.stop_container(&stopped, Duration::from_secs(4)).await;
        });
        eventually("the signal", async || node.log("deaf.log").len() == 1).await;
        id
    });
    end(first);
    // Each of them takes the stop over, and none asks again.
    for _ in 0..2 {
        let between = daemon();
        between.block_on(async {
            node.open().await;
        });
        end(between);
    }
    daemon().block_on(async {
        let pods = node.open().await;
        // Nobody asks for a stop any more.
        let info = pods.wait_container(&id).await.unwrap();
        assert_eq!(info.exit_code, 137);
        assert_eq!(node.log("deaf.log"), ["stdout F TERM"]);
        pods.stop_container(&id, Duration::from_secs(30))
            .await
            .unwrap();
    });
}

#[test]
fn a_store_that_is_broken_loses_no_running_pod() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, id, pid) = first.block_on(waiting(&node));
    end(first);
    let store = node.config.root.join("hull.redb");
    for broken in [&b"no database"[..], b""] {
        fs::write(&store, broken).unwrap();
        let next = daemon();
        next.block_on(async {
            let pods = node.open().await;
            let faults = pods.record_faults();
            assert!(faults[0].contains(".broken-"), "{faults:?}");
            let info = pods.sandbox(pod.as_str()).await.unwrap();
            assert_eq!(info.state, SandboxState::Ready);
            assert_eq!(info.vm.unwrap().pid, pid);
            let output = pods.exec_sync(&id, vec!["out:alive".into()], None).await;
            assert_eq!(output.unwrap().stdout, b"alive");
        });
        end(next);
    }
    daemon().block_on(async {
        let pods = node.open().await;
        assert!(pods.record_faults().is_empty());
        pods.stop_sandbox(pod.as_str()).await.unwrap();
        pods.remove_sandbox(pod.as_str()).await.unwrap();
        assert_eq!(node.leftovers(), [""; 0]);
    });
}

#[test]
fn a_pod_whose_record_cannot_be_read_is_left_alone_until_it_is_stopped() {
    let node = TestNode::new();
    let first = daemon();
    let (pod, other, pid) = first.block_on(async {
        let pods = node.open().await;
        let pod = pods.run_sandbox(node.sandbox("web")).await.unwrap();
        run(&pods, &pod, "app", &["wait"]).await;
        let other = pods.run_sandbox(node.sandbox("other")).await.unwrap();
        let vm = pods.sandbox(pod.as_str()).await.unwrap().vm.unwrap();
        (pod, other, vm.pid)
    });
    end(first);
    // Of a program that can't be gone back from, and its copy is too.
    let table = redb::TableDefinition::<&str, &[u8]>::new("sandboxes");
    let store = redb::Database::open(node.config.root.join("hull.redb")).unwrap();
    let transaction = store.begin_write().unwrap();
    {
        let mut table = transaction.open_table(table).unwrap();
        let record = table.get(pod.as_str()).unwrap().unwrap().value().to_vec();
        let record = String::from_utf8(record).unwrap();
        let newer = record.replacen("\"version\":1", "\"version\":2", 1);
        assert_ne!(newer, record);
        table.insert(pod.as_str(), newer.as_bytes()).unwrap();
    }
    transaction.commit().unwrap();
    drop(store);
    fs::remove_file(node.config.state.join(format!("records/sandbox-{pod}"))).unwrap();

    for _ in 0..2 {
        let next = daemon();
        next.block_on(async {
            let pods = node.open().await;
            assert_eq!(pods.record_faults().len(), 1);
            let info = pods.sandbox(pod.as_str()).await.unwrap();
            assert_eq!(info.state, SandboxState::NotReady);
            assert_eq!(info.spec.metadata, node.sandbox("web").metadata);
            assert!(info.message.contains("version 2"), "{}", info.message);
            assert!(node.vmms().contains(&(pid as i32)));
            let other = pods.sandbox(other.as_str()).await.unwrap();
            assert_eq!(other.state, SandboxState::Ready);
        });
        end(next);
    }
    daemon().block_on(async {
        let pods = node.open().await;
        for pod in [pod, other] {
            pods.stop_sandbox(pod.as_str()).await.unwrap();
            pods.remove_sandbox(pod.as_str()).await.unwrap();
        }
        assert_eq!(node.leftovers(), [""; 0]);
    });
}
