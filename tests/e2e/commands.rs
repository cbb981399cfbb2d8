//! Commands in containers (ExecSync): surroundings, limits, and nothing left.

use std::{fs, time::Duration};

use hull_proto_cri::v1::{
    Capability, ContainerConfig, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerSecurityContext,
};

use crate::harness::{Node, Pod};

async fn end(node: Node, pod: &Pod) {
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}

#[tokio::test]
async fn a_command_has_the_surroundings_of_its_container() {
    let node = Node::start().await;
    let pod = node.pod("same").await;
    let show = "id -u; id -g; id -G; grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status; \
                pwd; echo $GREETING; cat /proc/self/oom_score_adj; umask";
    let context = LinuxContainerSecurityContext {
        run_as_user: Some(Int64Value { value: 1234 }),
        run_as_group: Some(Int64Value { value: 2345 }),
        supplemental_groups: vec![3456, 4567],
        no_new_privs: true,
        capabilities: Some(Capability {
            add_capabilities: vec!["SYS_TIME".into()],
            drop_capabilities: vec!["NET_RAW".into()],
            ..Default::default()
        }),
        ..Default::default()
    };
    let config = ContainerConfig {
        envs: vec![KeyValue {
            key: "GREETING".into(),
            value: "hello".into(),
        }],
        working_dir: "/tmp".into(),
        linux: Some(LinuxContainerConfig {
            security_context: Some(context),
            ..Default::default()
        }),
        ..node.script("main", &format!("{show}; echo .; sleep 1000"))
    };
    let id = node.create(&pod, config).await.unwrap();
    node.start_container(&id).await.unwrap();
    let seen = node.exec(&id, show).await;
    let seen = String::from_utf8(seen.stdout).unwrap();
    assert!(seen.starts_with("1234\n2345\n2345 3456 4567\n"), "{seen}");
    assert!(seen.contains("Seccomp:\t2"), "{seen}");
    assert!(seen.contains("NoNewPrivs:\t1"), "{seen}");
    assert!(seen.contains("\n/tmp\nhello\n"), "{seen}");
    node.wait_log("main", &format!("{seen}.\n")).await;
    end(node, &pod).await;
}

#[tokio::test]
async fn more_output_than_fits_is_dropped_without_an_error() {
    let node = Node::start().await;
    let pod = node.pod("loud").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    let script = "dd if=/dev/zero bs=1M count=18 2>/dev/null | tr '\\000' x
                  dd if=/dev/zero bs=1M count=17 2>/dev/null | tr '\\000' y >&2; exit 3";
    let answer = node.exec(&id, script).await;
    assert_eq!(answer.exit_code, 3);
    assert_eq!(answer.stdout.len(), 16 << 20);
    assert_eq!(answer.stderr.len(), 16 << 20);
    assert!(answer.stdout.iter().all(|b| *b == b'x'));
    assert!(answer.stderr.iter().all(|b| *b == b'y'));
    end(node, &pod).await;
}

#[tokio::test]
async fn many_commands_leave_nothing_behind() {
    let node = Node::start().await;
    let pod = node.pod("many").await;
    let id = node.run_script(&pod, "main", "sleep 1000").await;
    // The number of processes and of cgroups below the container's own, itself included.
    let in_guest = async || {
        let count = "ps | grep -v -c -E 'ps|grep|PID'; ls -d /sys/fs/cgroup/*/ | wc -l";
        String::from_utf8(node.exec(&id, count).await.stdout).unwrap()
    };
    let descriptors = || {
        let pid = node.daemon.pid();
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    };
    let round = async |n: usize| {
        let (out, err) = (format!("out {n}\n"), format!("err {n}\n"));
        let script = format!("echo out {n}; echo err {n} >&2; exit {}", n % 100);
        let answer = node.exec(&id, &script).await;
        assert_eq!(answer.exit_code, (n % 100) as i32);
        assert_eq!((answer.stdout, answer.stderr), (out.into(), err.into()));
    };
    for n in 0..8 {
        round(n).await;
    }
    let (guest, daemon) = (in_guest().await, descriptors());
    for chunk in 0..8 {
        futures::future::join_all((0..4).map(|k| round(8 + chunk * 4 + k))).await;
    }
    // Some that are killed, with children that would stay.
    for _ in 0..3 {
        let late = node.exec_for(&id, "(sleep 500 &); sleep 500", 1);
        assert_eq!(
            late.await.unwrap_err().code(),
            tonic::Code::DeadlineExceeded
        );
    }
    assert_eq!(in_guest().await, guest);
    // A connection may take a moment to be closed.
    let mut now = descriptors();
    for _ in 0..100 {
        if now <= daemon {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        now = descriptors();
    }
    assert!(now <= daemon, "{now} descriptors, {daemon} before");
    end(node, &pod).await;
}
