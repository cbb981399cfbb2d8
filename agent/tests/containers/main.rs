//! Containers through the agent's whole contract: the real agent as PID 1 of a
//! pid and mount namespace, Unix sockets in place of vsock, and a root file
//! system around busybox. Needs root and cgroup v2.

#![expect(
    clippy::unwrap_used,
    reason = "a test's helpers fail by panicking, as the test does"
)]

mod cost;
mod harness;
mod hostile;
mod make;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use hull_proto_agent::{VERSION, agent as proto, stream::StreamKind};
use rustix::fs::inotify;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, sleep, timeout},
};

use harness::{
    Agent, Guest, LIMIT, Output, container, container_with, context, exec_request, open, spec,
    unable,
};

/// Runs a test with an agent of its own, or says why not.
macro_rules! agent_tests {
    ($($(#[$doc:meta])* async fn $name:ident($agent:ident) $body:block)*) => {$(
        $(#[$doc])*
        #[test]
        fn $name() {
            if let Some(why) = unable() {
                println!("SKIPPED: {}: {why}", stringify!($name));
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let $agent = Agent::start().await;
                $body
            });
        }
    )*};
}

pub(crate) use agent_tests;

pub(crate) fn message<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

agent_tests! {
    async fn the_handshake_tells_versions_and_times(agent) {
        let hello = agent.client.hello(context(), &proto::HelloRequest::default()).await.unwrap();
        assert_eq!(hello.version, VERSION);
        assert!(hello.ready_ns > hello.kernel_ns && hello.kernel_ns > 0);
        assert!(!hello.kernel_release.is_empty());
    }

    async fn a_container_lives_and_leaves_nothing(agent) {
        let created = agent.create(&container("c1", "echo out; echo err >&2; exit 3")).await;
        assert!(created.pid > 0);
        assert_eq!(created.groups, [0]);
        // Repeating it changes nothing.
        assert_eq!(agent.create(&container("c1", "echo out; echo err >&2; exit 3")).await, created);
        let (code, _) = message(agent.client.create(context(), &container("c1", "other")).await);
        assert_eq!(code, ttrpc::Code::ALREADY_EXISTS);
        agent.start_container("c1").await.unwrap();
        agent.start_container("c1").await.unwrap();
        let exited = agent.exited("c1", "").await;
        assert_eq!((exited.code, exited.signal, exited.oom_killed), (3, 0, false));
        assert_eq!((exited.stdout_bytes, exited.stderr_bytes), (4, 4));
        // The streams stay until the container is deleted.
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "").await, "out\n");
        assert_eq!(agent.output(StreamKind::Stderr, "c1", "").await, "err\n");
        agent.delete("c1").await;
        agent.delete("c1").await;
        assert!(agent.open_output(StreamKind::Stdout, "c1", "", 0).await.is_err());
        agent.assert_clean();
        // The name is free again.
        agent.run("c1", "exit 0").await;
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn a_missing_command_fails_the_start_with_its_cause(agent) {
        agent.create(&container_with("c1", &spec(&["/nope", "x"]))).await;
        let (code, text) = message(agent.start_container("c1").await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        assert!(text.contains("exec /nope: No such file or directory"), "{text}");
        assert_eq!(agent.exited("c1", "").await.code, 127);
        let (_, again) = message(agent.start_container("c1").await);
        assert_eq!(again, text);
        agent.delete("c1").await;
        agent.create(&container_with("c2", &spec(&["/etc/not-executable"]))).await;
        let (_, text) = message(agent.start_container("c2").await);
        assert!(text.contains("Permission denied"), "{text}");
        assert_eq!(agent.exited("c2", "").await.code, 126);
        agent.delete("c2").await;
        agent.assert_clean();
    }

    async fn a_failed_creation_is_undone(agent) {
        let mut request = container("c1", "true");
        request.user = Some(proto::User { user: "nobody-here".to_owned(), ..Default::default() }).into();
        let (code, text) = message(agent.client.create(context(), &request).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("nobody-here"), "{text}");
        agent.assert_clean();

        let mut bad = spec(&["sh"]);
        bad["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/x", "type": "bind", "source": "/does/not/exist", "options": ["bind"]
        }));
        let (code, text) = message(agent.client.create(context(), &container_with("c1", &bad)).await);
        assert_eq!(code, ttrpc::Code::INTERNAL);
        assert!(text.contains("No such file") || text.contains("ENOENT") || text.contains("does/not/exist"), "{text}");
        agent.assert_clean();

        let mut request = container("c1", "true");
        request.lower = vec!["no-such-storage".to_owned()];
        let (code, _) = message(agent.client.create(context(), &request).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        request.lower = vec!["image".to_owned()];
        request.spec = b"{".to_vec();
        let (code, _) = message(agent.client.create(context(), &request).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        let (code, _) = message(agent.client.create(context(), &container("../c1", "true")).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        agent.run("c1", "exit 0").await;
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn a_created_container_that_never_starts_can_be_deleted(agent) {
        agent.create(&container("c1", "true")).await;
        let request = proto::DeleteRequest { container_id: "c1".to_owned(), ..Default::default() };
        let (code, _) = message(agent.client.delete(context(), &request).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        agent.delete("c1").await;
        assert_eq!(agent.exited("c1", "").await.signal, 9);
        agent.assert_clean();
    }

    async fn signals_end_containers(agent) {
        agent.run("c1", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done").await;
        let (mut output, _) = agent.open_output(StreamKind::Stdout, "c1", "", 0).await.unwrap();
        assert_eq!(output.read_exact(6).await, b"ready\n");
        agent.signal("c1", "", 15, false).await;
        assert_eq!(agent.exited("c1", "").await.code, 7);
        agent.signal("c1", "", 15, false).await;
        agent.run("c2", "sleep 1000 & sleep 1000").await;
        agent.signal("c2", "", 9, true).await;
        let exited = agent.exited("c2", "").await;
        assert_eq!((exited.code, exited.signal, exited.oom_killed), (137, 9, false));
        agent.delete("c1").await;
        agent.delete("c2").await;
        agent.assert_clean();
    }

    async fn users_groups_and_home_are_the_containers(agent) {
        let script = "id -u; id -g; id -G; echo $HOME; echo $FROM; grep -E 'CapEff|SigIgn' /proc/self/status";
        let mut request = container("c1", script);
        request.user = Some(proto::User {
            user: "app".to_owned(), supplemental_groups: vec![3000], ..Default::default()
        }).into();
        let created = agent.create(&request).await;
        assert_eq!((created.uid, created.gid), (1000, 1000));
        assert_eq!(created.groups, [1000, 2000, 3000]);
        agent.start_container("c1").await.unwrap();
        let output = agent.output(StreamKind::Stdout, "c1", "").await;
        let lines: Vec<_> = output.lines().collect();
        // Its shell ignores SIGQUIT.
        assert_eq!(lines, ["1000", "1000", "1000 2000 3000", "/home/app", "spec", "SigIgn:\t0000000000000004", "CapEff:\t0000000000000000"]);
        agent.delete("c1").await;
    }

    async fn the_root_is_writable_only_if_asked(agent) {
        let script = "echo hi > /data/x && cat /data/x";
        agent.run("c1", script).await;
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "").await, "hi\n");
        let mut request = container("c2", script);
        request.writable = false;
        agent.create(&request).await;
        agent.start_container("c2").await.unwrap();
        let err = agent.output(StreamKind::Stderr, "c2", "").await;
        assert!(err.contains("Read-only file system"), "{err}");
        let mut readonly = spec(&["sh", "-c", script]);
        readonly["root"]["readonly"] = json!(true);
        agent.create(&container_with("c3", &readonly)).await;
        agent.start_container("c3").await.unwrap();
        let err = agent.output(StreamKind::Stderr, "c3", "").await;
        assert!(err.contains("Read-only file system"), "{err}");
        for id in ["c1", "c2", "c3"] { agent.delete(id).await; }
        agent.assert_clean();
    }

    async fn an_exec_has_the_containers_user_and_environment(agent) {
        let mut request = container("c1", "sleep 1000");
        request.user = Some(proto::User { user: "app".to_owned(), ..Default::default() }).into();
        agent.create(&request).await;
        let (code, _) = message(agent.client.exec(context(), &exec_request("c1", "e0", "true")).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        agent.start_container("c1").await.unwrap();
        let (output, exited) = agent.exec_sync("c1", "e1", "id -u; id -G; echo $HOME $FROM; pwd; exit 4").await;
        assert_eq!(output, "1000\n1000 2000\n/home/app spec\n/\n");
        assert_eq!((exited.code, exited.stdout_bytes), (4, output.len() as u64));
        // A repeated request does not run it again.
        let pid = agent.exec("c1", "e2", "echo once; sleep 1000").await;
        assert_eq!(agent.exec("c1", "e2", "echo once; sleep 1000").await, pid);
        let (code, _) = message(agent.client.exec(context(), &exec_request("c1", "e2", "other")).await);
        assert_eq!(code, ttrpc::Code::ALREADY_EXISTS);
        agent.signal("c1", "e2", 9, false).await;
        assert_eq!(agent.exited("c1", "e2").await.signal, 9);
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "e2").await, "once\n");
        let mut missing = exec_request("c1", "e3", "");
        missing.args = vec!["nope".to_owned()];
        let (code, text) = message(agent.client.exec(context(), &missing).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        assert!(text.contains("exec nope: No such file or directory"), "{text}");
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn seccomp_holds_for_the_container_and_its_execs(agent) {
        for (id, nnp) in [("c1", false), ("c2", true)] {
            let mut filtered = spec(&["sh", "-c", "chmod 700 /data; echo $?; sleep 1000"]);
            filtered["process"]["noNewPrivileges"] = json!(nnp);
            filtered["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
            });
            agent.create(&container_with(id, &filtered)).await;
            agent.start_container(id).await.unwrap();
            let (mut output, _) = agent.open_output(StreamKind::Stdout, id, "", 0).await.unwrap();
            assert_eq!(output.read_exact(2).await, b"1\n");
            let script = "chmod 700 /data; echo $?; grep -E 'Seccomp:|NoNewPrivs|CapEff|CapBnd' /proc/self/status";
            let (output, _) = agent.exec_sync(id, "e1", script).await;
            let (inside, _) = agent.exec_sync(id, "e2", "grep -E 'Seccomp:|NoNewPrivs|CapEff|CapBnd' /proc/1/status").await;
            assert!(output.starts_with("1\n"), "{output}");
            assert_eq!(output[2..], inside[..]);
            assert!(inside.contains("Seccomp:\t2"), "{inside}");
            agent.delete(id).await;
        }
    }

    async fn an_exec_past_its_deadline_dies_with_its_children(agent) {
        agent.run("c1", "sleep 1000").await;
        // What begins a session of its own too, and a child whose parent has ended there.
        let family = "setsid sleep 999 & setsid sh -c '(sleep 995 &); sleep 994' & sleep 998";
        let mut request = exec_request("c1", "e1", family);
        request.timeout_ms = 1500;
        agent.client.exec(context(), &request).await.unwrap();
        let exited = agent.exited("c1", "e1").await;
        assert!(exited.timed_out);
        assert_eq!(exited.signal, 9);
        let (output, _) = agent.exec_sync("c1", "e2", "ps").await;
        assert!(!output.contains("99"), "{output}");
        let mut request = exec_request("c1", "e3", "sleep 997");
        request.kill_on_detach = true;
        agent.client.exec(context(), &request).await.unwrap();
        drop(agent.open_output(StreamKind::Stdout, "c1", "e3", 0).await.unwrap());
        assert_eq!(agent.exited("c1", "e3").await.signal, 9);
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn many_execs_leave_nothing(agent) {
        agent.run("c1", "sleep 1000").await;
        let init = agent.init();
        let fds = || fs::read_dir(format!("/proc/{init}/fd")).unwrap().count();
        let (_, _) = agent.exec_sync("c1", "warm", "true").await;
        let before = fds();
        for n in 0..25 {
            let (output, exited) = agent.exec_sync("c1", &format!("e{n}"), "echo hello; true").await;
            assert_eq!((output.as_str(), exited.code), ("hello\n", 0));
        }
        assert!(fds() <= before + 8, "{before} became {}", fds());
        // They are where the container is, and its limits are theirs.
        let (output, _) = agent.exec_sync("c1", "last", "cat /proc/self/cgroup; find /sys/fs/cgroup -mindepth 1 -type d").await;
        assert_eq!(output, "0::/\n");
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn input_reaches_the_process(agent) {
        let mut request = container("c1", "cat; echo end");
        request.stdin = true;
        request.stdin_once = true;
        agent.create(&request).await;
        agent.start_container("c1").await.unwrap();
        let mut stdin = agent.stream(StreamKind::Stdin, "c1", "").await.unwrap();
        stdin.write_all(b"hello\n").await.unwrap();
        stdin.shutdown().await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "").await, "hello\nend\n");
        agent.run("c2", "cat; echo end").await;
        assert_eq!(agent.output(StreamKind::Stdout, "c2", "").await, "end\n");
        assert!(agent.stream(StreamKind::Stdin, "c2", "").await.is_err());
        agent.delete("c1").await;
        agent.delete("c2").await;
    }

    async fn terminals_have_a_size_and_an_end(agent) {
        let mut request = container("c1", "stty size; read x; stty size; echo got $x");
        let mut with_tty = spec(&["sh", "-c", "stty size; read x; stty size; echo got $x; test -t 0 && echo tty"]);
        with_tty["process"]["terminal"] = json!(true);
        request.spec = with_tty.to_string().into_bytes();
        request.tty = true;
        request.stdin = true;
        agent.create(&request).await;
        let resize = |rows, columns| proto::ResizeTtyRequest {
            container_id: "c1".to_owned(), rows, columns, ..Default::default()
        };
        agent.client.resize_tty(context(), &resize(30, 100)).await.unwrap();
        agent.start_container("c1").await.unwrap();
        let (mut stdout, _) = agent.open_output(StreamKind::Stdout, "c1", "", 0).await.unwrap();
        assert_eq!(stdout.read_exact(8).await, b"30 100\r\n");
        agent.client.resize_tty(context(), &resize(40, 120)).await.unwrap();
        let mut stdin = agent.stream(StreamKind::Stdin, "c1", "").await.unwrap();
        stdin.write_all(b"word\n").await.unwrap();
        let rest = String::from_utf8(stdout.read_to_end().await).unwrap();
        assert!(rest.contains("40 120\r\n") && rest.contains("got word\r\n") && rest.contains("tty\r\n"), "{rest}");
        agent.exited("c1", "").await;
        agent.run("c2", "sleep 1000").await;
        let mut exec = exec_request("c2", "e1", "test -t 1 && echo $TERM; id -u > /dev/tty");
        exec.tty = true;
        agent.client.exec(context(), &exec).await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c2", "e1").await, "xterm\r\n0\r\n");
        agent.delete("c1").await;
        agent.delete("c2").await;
    }

    async fn output_survives_reconnects_without_loss(agent) {
        // More than the buffer holds, so that the process has to wait too.
        agent.run("c1", "seq 1 400000").await;
        let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
        let mut got = Vec::new();
        let mut turns = 0;
        while got.len() < expected.len() {
            let (mut output, offset) = agent.open_output(StreamKind::Stdout, "c1", "", got.len() as u64).await.unwrap();
            assert_eq!(offset, got.len() as u64);
            // Leave in mid-stream, with or without an acknowledgement.
            let part = 150_000 + turns * 37_777;
            let mut taken = 0;
            while taken < part {
                let bytes = output.read().await;
                if bytes.is_empty() { break; }
                taken += bytes.len();
                got.extend(bytes);
                if turns % 2 == 0 {
                    output.acknowledge(got.len() as u64).await;
                }
            }
            turns += 1;
            // The daemon's other connection is a new one, too.
            agent.connect_again().await;
        }
        assert_eq!(String::from_utf8(got).unwrap(), expected);
        assert!(turns > 5);
        assert_eq!(agent.exited("c1", "").await.stdout_bytes, expected.len() as u64);
        agent.delete("c1").await;
    }

    async fn an_output_that_is_closed_ends_while_its_process_runs(agent) {
        agent.run("c1", "echo hello; exec > /dev/null 2>&1; sleep 1000").await;
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "").await, "hello\n");
        assert_eq!(agent.output(StreamKind::Stderr, "c1", "").await, "");
        // An exec whose streams the host keeps was not left.
        let mut request = exec_request("c1", "e1", "exec > /dev/null 2>&1; sleep 4; exit 5");
        request.kill_on_detach = true;
        agent.client.exec(context(), &request).await.unwrap();
        let (mut output, _) = agent.open_output(StreamKind::Stdout, "c1", "e1", 0).await.unwrap();
        assert_eq!(output.read_to_end().await, b"");
        assert_eq!(agent.exited("c1", "e1").await.code, 5);
        drop(output);
        agent.delete("c1").await;
    }

    async fn sigpipe_kills_as_usual(agent) {
        agent.run("c1", "(yes; echo $? >&2) | head -n 1; sleep 0.2").await;
        assert_eq!(agent.output(StreamKind::Stderr, "c1", "").await, "141\n");
        agent.delete("c1").await;
    }

    async fn containers_stand_still_for_a_snapshot_and_until_they_are_started(agent) {
        agent.run("c1", "while :; do sleep 0.02; done").await;
        agent.create(&container("c2", "echo hello; sleep 1000")).await;
        let frozen = || ["c1", "c2"].map(|id| {
            let events = agent.cgroup().join(id).join("cgroup.events");
            fs::read_to_string(events).unwrap().contains("frozen 1")
        });
        // Processes that may go on do when their turn comes.
        let until_free = async |which| {
            let free = async {
                while frozen() != which {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(LIMIT, free).await.unwrap();
        };
        let mut exec = exec_request("c1", "e1", "sleep 1000");
        exec.timeout_ms = 2000;
        agent.client.exec(context(), &exec).await.unwrap();
        let (freeze, thaw) = (proto::Empty::new(), proto::Empty::new());
        for _ in 0..2 {
            agent.client.freeze(context(), &freeze).await.unwrap();
            assert_eq!(frozen(), [true, true]);
        }
        // Who is killed meanwhile lets go of nobody.
        assert!(agent.exited("c1", "e1").await.timed_out);
        assert_eq!(frozen(), [true, true]);
        agent.client.thaw(context(), &thaw).await.unwrap();
        until_free([false, false]).await;

        // As in a snapshot.
        agent.client.freeze(context(), &freeze).await.unwrap();
        let wake = proto::WakeRequest {
            entropy: vec![7; 32],
            restored: true,
            ..proto::WakeRequest::default()
        };
        agent.client.wake(context(), &wake).await.unwrap();
        agent.client.thaw(context(), &thaw).await.unwrap();
        assert_eq!(frozen(), [true, true]);
        agent.client.freeze(context(), &freeze).await.unwrap();
        agent.client.thaw(context(), &thaw).await.unwrap();
        assert_eq!(frozen(), [true, true], "they wait for their start whatever comes");
        agent.start_container("c1").await.unwrap();
        until_free([false, true]).await;
        agent.start_container("c2").await.unwrap();
        let (mut output, _) = agent.open_output(StreamKind::Stdout, "c2", "", 0).await.unwrap();
        assert_eq!(output.read_exact(6).await, b"hello\n");
        // One that waits can be removed as well.
        agent.client.freeze(context(), &freeze).await.unwrap();
        agent.client.wake(context(), &wake).await.unwrap();
        agent.delete("c1").await;
        agent.delete("c2").await;
    }

    async fn lack_of_memory_is_told_apart_from_a_kill(agent) {
        let mut small = spec(&["sh", "-c", "dd if=/dev/zero of=/dev/null bs=60M count=1"]);
        small["linux"]["resources"]["memory"] = json!({"limit": 15_728_640, "swap": 15_728_640});
        agent.create(&container_with("c1", &small)).await;
        agent.start_container("c1").await.unwrap();
        let exited = agent.exited("c1", "").await;
        assert_eq!((exited.code, exited.oom_killed), (137, true));
        // The event comes before the end of the process, so it is there.
        let mut events = agent.client.events(context(), &proto::EventsRequest::default()).await.unwrap();
        let first = timeout(LIMIT, events.recv()).await.unwrap().unwrap().unwrap().kind;
        let Some(proto::event::Kind::Oom(oom)) = first else {
            panic!("{first:?}");
        };
        assert_eq!(oom.container_id, "c1");
        agent.delete("c1").await;

        // A container that lost a child and is then killed did not end for lack of memory.
        let mut child = spec(&["sh", "-c", "trap : TERM; dd if=/dev/zero of=/dev/null bs=60M count=1; echo lost; while :; do sleep 0.1; done"]);
        child["linux"]["resources"]["memory"] = json!({"limit": 15_728_640, "swap": 15_728_640});
        agent.create(&container_with("c2", &child)).await;
        agent.start_container("c2").await.unwrap();
        let (mut stdout, _) = agent.open_output(StreamKind::Stdout, "c2", "", 0).await.unwrap();
        assert_eq!(stdout.read_exact(5).await, b"lost\n");
        agent.signal("c2", "", 9, true).await;
        let exited = agent.exited("c2", "").await;
        assert_eq!((exited.code, exited.oom_killed), (137, false));
        agent.delete("c2").await;
    }

    async fn devices_of_the_pod_are_out_of_reach(agent) {
        agent.run("c1", "sleep 1000").await;
        // The whole memory of the guest (c 1 1) may be made but not opened.
        let script = "mknod /dev/m c 1 1 && cat /dev/m | head -c 1; head -c 4 /dev/urandom | wc -c; echo > /dev/null && echo ok";
        agent.exec("c1", "e1", script).await;
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "e1").await, "4\nok\n");
        let err = agent.output(StreamKind::Stderr, "c1", "e1").await;
        assert!(err.contains("Operation not permitted"), "{err}");
        agent.delete("c1").await;
    }

    async fn asked_devices_come_with_their_permissions(agent) {
        let mut request = container("c1", "sleep 1000");
        for (path, access) in [("/dev/also/null", "rw"), ("/dev/kernel", "r")] {
            request.devices.push(proto::Device {
                path: path.to_owned(),
                guest_path: if path == "/dev/kernel" { "/dev/console" } else { "/dev/null" }.to_owned(),
                access: access.to_owned(),
                ..Default::default()
            });
        }
        agent.create(&request).await;
        agent.start_container("c1").await.unwrap();
        let script = "echo x > /dev/also/null && echo null; (: < /dev/kernel) && echo read; (: > /dev/kernel) || echo refused";
        let (output, _) = agent.exec_sync("c1", "e1", script).await;
        assert_eq!(output, "null\nread\nrefused\n");
        agent.delete("c1").await;

        let mut request = container("c2", "true");
        request.devices.push(proto::Device {
            path: "/dev/x".to_owned(), guest_path: "/etc/passwd".to_owned(), access: "r".to_owned(), ..Default::default()
        });
        let (code, text) = message(agent.client.create(context(), &request).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("/etc/passwd"), "{text}");

        // A privileged container has what the guest has.
        let mut all = spec(&["sleep", "1000"]);
        all["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        let mut request = container_with("c3", &all);
        request.guest_devices = true;
        agent.create(&request).await;
        agent.start_container("c3").await.unwrap();
        let (output, _) = agent.exec_sync("c3", "e1", "echo hull > /dev/kmsg && echo wrote; ls /dev/pts/ptmx").await;
        assert_eq!(output, "wrote\n/dev/pts/ptmx\n");
        agent.delete("c3").await;
        agent.assert_clean();
    }

    async fn a_privileged_container_has_the_guests_devices_as_they_come(agent) {
        let name = format!("hull-probe-{}", std::process::id());
        let (probe, also) = (format!("/dev/{name}"), format!("/dev/{name}-also"));
        let dev = |at: &str, source: &str, access: &str| json!({
            "destination": at, "type": "bind", "source": source, "options": ["bind", "rprivate", access]
        });
        let mut all = spec(&["sleep", "1000"]);
        all["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        all["mounts"].as_array_mut().unwrap().push(dev("/host/dev", "/dev", "ro"));
        let mut request = container_with("c1", &all);
        request.guest_devices = true;
        request.devices.push(proto::Device {
            path: also.clone(), guest_path: "/dev/zero".to_owned(), access: "rw".to_owned(), ..Default::default()
        });
        agent.create(&request).await;
        agent.start_container("c1").await.unwrap();
        let mut plain = spec(&["sleep", "1000"]);
        plain["mounts"].as_array_mut().unwrap().push(dev("/host/dev", "/dev", "ro"));
        agent.create(&container_with("c2", &plain)).await;
        agent.start_container("c2").await.unwrap();

        // As the kernel does for a new device.
        let null = nix::sys::stat::makedev(1, 3);
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
        nix::sys::stat::mknod(probe.as_str(), nix::sys::stat::SFlag::S_IFCHR, mode, null).unwrap();
        let script = format!("echo x > {probe} && test -c {probe} && echo there; head -c 3 {also} | wc -c; \
            test -c /host{probe} && echo seen; touch /host/dev/x || echo read-only; \
            test -d /dev/pts && echo x > /dev/shm/x && echo x | cat /dev/stdin; rm {probe}");
        let mut writable = all.clone();
        for mount in writable["mounts"].as_array_mut().unwrap() {
            if mount["type"] == "cgroup" {
                mount["options"] = json!(["nosuid", "rw"]);
            }
        }
        let (output, _) = agent.exec_sync("c2", "e1", &format!("ls {probe} /dev/loop-control; ls -d /host{probe}; (: < /host/dev/kmsg) || echo refused")).await;
        assert_eq!(output, format!("/host{probe}\nrefused\n"));
        let (output, _) = agent.exec_sync("c1", "e1", &script).await;
        assert_eq!(output, "there\n3\nseen\nread-only\nx\n");
        assert!(fs::symlink_metadata(&probe).is_err());
        // What it was given is its own.
        assert!(fs::symlink_metadata(&also).unwrap().is_file());
        fs::remove_file(&also).unwrap();
        let mut exec = exec_request("c1", "e2", "busybox tty && test -c /dev/tty && echo terminal");
        exec.tty = true;
        agent.client.exec(context(), &exec).await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c1", "e2").await, "/dev/pts/0\r\nterminal\r\n");

        // Init of a system of its own: it divides its cgroup, and others still come in.
        let mut request = container_with("c3", &writable);
        request.guest_devices = true;
        agent.create(&request).await;
        agent.start_container("c3").await.unwrap();
        let divide = "cd /sys/fs/cgroup && busybox mkdir below && echo 1 > below/cgroup.procs && echo $$ > below/cgroup.procs && \
            echo +memory > cgroup.subtree_control && cat below/memory.max; for n in $(seq 100); do busybox mkdir deep && cd deep || break; done";
        let (output, _) = agent.exec_sync("c3", "e1", divide).await;
        assert_eq!(output, "max\n");
        let (output, _) = agent.exec_sync("c3", "e2", "cat /proc/1/cgroup /proc/self/cgroup").await;
        assert_eq!(output, "0::/below\n0::/below\n");

        for (source, why) in [
            ("/dev/nothing", "mount on /x: the pod's VM has no /dev/nothing"),
            ("/dev/null/x", "bind /dev/null/x: Not a directory (os error 20)"),
        ] {
            let mut wanted = spec(&["true"]);
            wanted["mounts"].as_array_mut().unwrap().push(dev("/x", source, "ro"));
            let (_, text) = message(agent.client.create(context(), &container_with("c4", &wanted)).await);
            assert_eq!(text, format!("make the container's first process: {why}"));
        }
        for id in ["c1", "c2", "c3"] { agent.delete(id).await; }
        agent.assert_clean();
    }

    async fn a_volume_of_a_storage_stays_in_it(agent) {
        let volume = agent.dir.join("volume");
        fs::create_dir_all(volume.join("etc")).unwrap();
        fs::write(volume.join("etc/name"), "volume\n").unwrap();
        symlink("/etc", volume.join("link")).unwrap();
        agent.bind("volume", &volume).await;
        let with = |id: &str, sub_path: &str| {
            let mut mounted = spec(&["sleep", "1000"]);
            let mounts = mounted["mounts"].as_array_mut().unwrap();
            let index = mounts.len() as u32;
            mounts.push(json!({
                "destination": "/volume", "type": "bind", "source": "x", "options": ["rbind", "rprivate", "ro"]
            }));
            let mut request = container_with(id, &mounted);
            request.storage_mounts.push(proto::StorageMount {
                mount: index, storage: "volume".to_owned(), sub_path: sub_path.to_owned(), ..Default::default()
            });
            request
        };
        for (id, sub_path, file) in [("c1", "", "/volume/etc/name"), ("c2", "etc", "/volume/name"), ("c3", "link", "/volume/name"), ("c4", "etc/name", "/volume")] {
            agent.create(&with(id, sub_path)).await;
            agent.start_container(id).await.unwrap();
            let (output, _) = agent.exec_sync(id, "e1", &format!("cat {file}; echo x > {file} || echo refused")).await;
            assert_eq!(output, "volume\nrefused\n", "{sub_path}");
            agent.delete(id).await;
        }
        let (code, text) = message(agent.client.create(context(), &with("c5", "no/such")).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("no/such"), "{text}");
        let mut request = with("c5", "");
        request.storage_mounts[0].mount = 99;
        let (code, _) = message(agent.client.create(context(), &request).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        agent.assert_clean();
    }

    async fn containers_share_a_volume_and_its_sub_paths_stay_in_it(agent) {
        let request = proto::AttachStorageRequest {
            id: "memory".to_owned(), fstype: "tmpfs".to_owned(), options: vec!["size=1m".to_owned()],
            volume: Some(proto::Directory { mode: 0o2775, gid: 77, ..Default::default() }).into(),
            ..Default::default()
        };
        for _ in 0..2 {
            agent.client.attach_storage(context(), &request).await.unwrap();
        }
        let with = |id: &str, sub_path: &str, access: &str| {
            let mut mounted = spec(&["sleep", "1000"]);
            let mounts = mounted["mounts"].as_array_mut().unwrap();
            let index = mounts.len() as u32;
            mounts.push(json!({
                "destination": "/volume", "type": "bind", "source": "x", "options": ["rbind", "rprivate", access]
            }));
            let mut request = container_with(id, &mounted);
            request.storage_mounts.push(proto::StorageMount {
                mount: index, storage: "memory".to_owned(), sub_path: sub_path.to_owned(), ..Default::default()
            });
            request
        };
        let start = async |id: &str, sub_path: &str, access: &str| {
            agent.create(&with(id, sub_path, access)).await;
            agent.start_container(id).await.unwrap();
        };
        let execs = std::cell::Cell::new(0);
        let says = async |id: &str, script: &str| {
            execs.set(execs.get() + 1);
            agent.exec_sync(id, &format!("e{}", execs.get()), script).await.0
        };
        start("c1", "", "rw").await;
        let script = "stat -c '%a %g' /volume; ls -A /volume; ln -s / /volume/evil; ln -s ../../.. /volume/up; echo 1 >/volume/file";
        assert_eq!(says("c1", script).await, "2775 77\n");
        // Made in the volume, whatever links say; a file is one.
        start("c2", "evil/up/new/sub", "rw").await;
        assert_eq!(says("c2", "stat -c '%a %g' /volume; echo 2 >/volume/file").await, "2775 77\n");
        assert_eq!(says("c1", "cat /volume/new/sub/file").await, "2\n");
        start("c3", "file", "ro").await;
        assert_eq!(says("c3", "cat /volume; echo x >/volume || echo refused").await, "1\nrefused\n");
        // What was bound stays what it was.
        says("c1", "mv /volume/new /volume/other; mkdir -p /volume/new/sub").await;
        assert_eq!(says("c2", "cat /volume/file").await, "2\n");
        let output = says("c1", "dd if=/dev/zero of=/volume/big bs=64k count=32 2>&1; true").await;
        assert!(output.contains("No space left"), "{output}");
        for id in ["c1", "c2", "c3"] {
            agent.delete(id).await;
        }
        start("c1", "", "rw").await;
        assert_eq!(says("c1", "cat /volume/file").await, "1\n");
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn processors_of_the_host_are_no_limit_here(agent) {
        let mut pinned = spec(&["sleep", "1000"]);
        pinned["linux"]["resources"]["cpu"] = json!({"cpus": "0,4000-4001", "mems": "77"});
        pinned["linux"]["resources"]["hugepageLimits"] = json!([{"pageSize": "512GB", "limit": 0}]);
        agent.create(&container_with("c1", &pinned)).await;
        agent.start_container("c1").await.unwrap();
        let (output, _) = agent.exec_sync("c1", "e1", "cat /sys/fs/cgroup/cpuset.cpus; cat /sys/fs/cgroup/cpuset.mems").await;
        assert_eq!(output, "0\n\n");
        agent.delete("c1").await;
        pinned["linux"]["resources"]["hugepageLimits"][0]["limit"] = json!(1);
        let (code, text) = message(agent.client.create(context(), &container_with("c2", &pinned)).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("512GB"), "{text}");
        agent.assert_clean();
    }

    async fn a_user_namespace_holds_the_pod(agent) {
        let configure = proto::ConfigureRequest {
            sandbox_id: "s1".to_owned(),
            hostname: "inside".to_owned(),
            sysctls: [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "99")]
                .map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            user_namespace: Some(proto::UserNamespace {
                host_uid: 1000, uid_count: 100_000, host_gid: 2000, gid_count: 100_000, ..Default::default()
            }).into(),
            ..Default::default()
        };
        for _ in 0..2 {
            agent.client.configure(context(), &configure).await.unwrap();
        }
        let map = "tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; ";
        let ids = " 0 1000 100000\n 0 2000 100000\n";
        let mappings = |host: u32| json!([{"containerID": 0, "hostID": host, "size": 100_000}]);
        let mut shared = spec(&["sh", "-c", &format!("{map} id -u; hostname; cat /proc/sys/kernel/shm_rmid_forced; sleep 1000")]);
        shared["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/dev/shm", "type": "bind", "source": agent.dir.join("run/shm"),
            "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"],
            "uidMappings": mappings(1000), "gidMappings": mappings(2000)
        }));
        let plain = agent.dir.join("plain");
        fs::create_dir(&plain).unwrap();
        shared["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/plain", "type": "bind", "source": plain, "options": ["rbind", "rw"]
        }));
        shared["process"]["cwd"] = json!("/made/cwd");
        let mut request = container_with("c1", &shared);
        request.pid = proto::PidNamespace::POD.into();
        request.volumes = ["/etc", "/new"].map(str::to_owned).to_vec();
        agent.create(&request).await;
        agent.start_container("c1").await.unwrap();
        let (mut output, _) = agent.open_output(StreamKind::Stdout, "c1", "", 0).await.unwrap();
        let expected = format!("{ids}0\ninside\n1\n");
        let said = output.read_exact(expected.len()).await;
        assert_eq!(String::from_utf8_lossy(&said), expected);

        // The image, what is written, shared memory and mount points have the owners they should.
        let script = format!("{map} pwd; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
            ls -ln / | grep -E ' (bin|made|dev|data)$' | tr -s ' ' | cut -d ' ' -f 3,4,9; ls -ln /made | tail -1 | tr -s ' ' | cut -d ' ' -f 3,4,9; \
            touch /data/x /dev/shm/y /bin/busybox; chown 5:6 /data/x; \
            ls -ln /data/x /dev/shm/y /bin/busybox | tr -s ' ' | cut -d ' ' -f 3,4,9; cat /sys/fs/cgroup/pids.max; \
            ls -lnd /plain | tr -s ' ' | cut -d ' ' -f 3,4; touch /etc/x /new/x && ls -lnd /etc /etc/* /new/x | tr -s ' ' | cut -d ' ' -f 3,4 | uniq");
        let (output, _) = agent.exec_sync("c1", "e1", &script).await;
        let expected = format!("{ids}/made/cwd\n99\n0 0 bin\n0 0 data\n0 0 dev\n0 0 made\n0 0 cwd\n0 0 /bin/busybox\n5 6 /data/x\n0 0 /dev/shm/y\n200\n65534 65534\n0 0\n");
        assert_eq!(output, expected);
        let upper = agent.dir.join("run/scratch/containers/c1/own/root");
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(upper.join("data/x")).unwrap());
        assert_eq!(owner, 1005);
        let shm = format!("/proc/{}/root{}", agent.init(), agent.dir.join("run/shm/y").display());
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(shm).unwrap()), 0);

        // A user of the image, in a pid namespace of its own, and all it may do as root there.
        let mut request = container("c2", "id -u; id -G; cat /proc/1/status | grep -c PPid; echo x > /root/x || echo refused");
        request.user = Some(proto::User { user: "app".to_owned(), ..Default::default() }).into();
        agent.create(&request).await;
        agent.start_container("c2").await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c2", "").await, "1000\n1000 2000\n1\nrefused\n");
        let mut able = spec(&["sh", "-c", "hostname changed && ip link set lo mtu 1400 && mount -t tmpfs x /tmp && hostname; mknod /data/m c 1 1 || echo refused; \
            cd /sys/fs/cgroup && busybox mkdir mine && echo 1 > mine/cgroup.procs && echo +pids > cgroup.subtree_control && cat mine/pids.max; \
            echo 5 > pids.max || echo limited"]);
        let mut all = vec!["CAP_SYS_ADMIN".to_owned(), "CAP_NET_ADMIN".to_owned(), "CAP_MKNOD".to_owned()];
        all.sort();
        for set in ["bounding", "effective", "permitted"] {
            able["process"]["capabilities"][set] = json!(all);
        }
        able["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        for mount in able["mounts"].as_array_mut().unwrap() {
            if mount["type"] == "cgroup" {
                mount["options"] = json!(["rw", "nosuid"]);
            }
        }
        let mut request = container_with("c3", &able);
        request.guest_devices = true;
        agent.create(&request).await;
        agent.start_container("c3").await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c3", "").await, "changed\nrefused\nmax\nlimited\n");
        let outside = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_ne!(outside.trim(), "changed");

        let mut others = spec(&["true"]);
        others["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/others", "type": "bind", "source": plain, "options": ["rbind"],
            "uidMappings": mappings(1000), "gidMappings": mappings(1000)
        }));
        let (code, text) = message(agent.client.create(context(), &container_with("c4", &others)).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("/others"), "{text}");
        let mut request = container("c4", "true");
        request.user = Some(proto::User { uid: Some(100_000), ..Default::default() }).into();
        let (code, text) = message(agent.client.create(context(), &request).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
        assert!(text.contains("100000"), "{text}");
        let mut readonly = container("c5", "cat /etc/passwd | head -c 4");
        readonly.writable = false;
        agent.create(&readonly).await;
        agent.start_container("c5").await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c5", "").await, "root");
        let mut request = container("c6", "sleep 1000");
        request.user = Some(proto::User { user: "app".to_owned(), ..Default::default() }).into();
        agent.create(&request).await;
        agent.start_container("c6").await.unwrap();
        let mut exec = exec_request("c6", "e1", "busybox stat -c %u $(busybox tty); id -u > $(busybox tty)");
        exec.tty = true;
        agent.client.exec(context(), &exec).await.unwrap();
        assert_eq!(agent.output(StreamKind::Stdout, "c6", "e1").await, "1000\r\n1000\r\n");
        for id in ["c1", "c2", "c3", "c5", "c6"] { agent.delete(id).await; }
        agent.assert_clean();
    }

    async fn limits_can_change_while_it_runs(agent) {
        agent.run("c1", "sleep 1000").await;
        let update = |json: serde_json::Value| proto::UpdateRequest {
            container_id: "c1".to_owned(), resources: json.to_string().into_bytes(), ..Default::default()
        };
        agent.client.update(context(), &update(json!({"memory": {"limit": 33_554_432}, "pids": {"limit": 50}}))).await.unwrap();
        let (output, _) = agent.exec_sync("c1", "e1", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max").await;
        assert_eq!(output, "33554432\n50\n");
        let stats = agent.client.stats(context(), &proto::StatsRequest::default()).await.unwrap();
        assert_eq!(stats.containers.len(), 1);
        let cgroup = stats.containers[0].cgroup.get_or_default();
        assert_eq!(cgroup.memory_limit_bytes, 33_554_432);
        assert!(cgroup.pids >= 1 && cgroup.memory_usage_bytes > 0 && cgroup.cpu_usage_ns > 0);
        assert!(stats.sandbox.cpu_usage_ns >= cgroup.cpu_usage_ns);

        // Kubelet forbids huge pages of every size of its node; here may be others.
        let mut more = update(json!({
            "cpu": {"shares": 2, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
            "memory": {"limit": 33_554_432, "swap": 41_943_040},
            "hugepageLimits": [{"pageSize": "64MB", "limit": 0}],
            "unified": {"memory.high": "30000000"}
        }));
        more.oom_score_adj = Some(500);
        agent.client.update(context(), &more).await.unwrap();
        let files = "cd /sys/fs/cgroup; cat cpu.weight cpu.max cpuset.cpus memory.swap.max memory.high; cat /proc/1/oom_score_adj /proc/self/oom_score_adj";
        let (output, _) = agent.exec_sync("c1", "e2", files).await;
        assert_eq!(output, "1\n50000 100000\n0\n8388608\n29999104\n500\n500\n");
        let none = update(json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100_000}}));
        agent.client.update(context(), &none).await.unwrap();
        let (output, _) = agent.exec_sync("c1", "e3", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max").await;
        assert_eq!(output, "max\nmax 100000\n");
        // Processors of the host are no limit here; pages of a size that is not here can't be given.
        agent.client.update(context(), &update(json!({"cpu": {"cpus": "4000"}}))).await.unwrap();
        let pages = update(json!({"hugepageLimits": [{"pageSize": "64MB", "limit": 67_108_864}]}));
        message(agent.client.update(context(), &pages).await);
        agent.delete("c1").await;
    }

    async fn huge_pages_are_there_for_whom_they_are_meant(agent) {
        let pool = || -> u64 {
            let text = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
            text.unwrap().trim().parse().unwrap()
        };
        let before = pool();
        let volume = proto::AttachStorageRequest {
            id: "huge".to_owned(), fstype: "hugetlbfs".to_owned(), options: vec!["pagesize=2097152".to_owned()],
            volume: Some(proto::Directory { mode: 0o777, ..Default::default() }).into(),
            ..Default::default()
        };
        agent.client.attach_storage(context(), &volume).await.unwrap();
        let with = |id: &str, bytes: u64| {
            let mut limited = spec(&["sleep", "1000"]);
            limited["linux"]["resources"]["hugepageLimits"] = json!([
                {"pageSize": "2MB", "limit": bytes}, {"pageSize": "64MB", "limit": 0}
            ]);
            let mounts = limited["mounts"].as_array_mut().unwrap();
            let mount = mounts.len() as u32;
            mounts.push(json!({"destination": "/huge", "type": "bind", "source": "x", "options": ["rbind", "rw"]}));
            let mut request = container_with(id, &limited);
            request.storage_mounts.push(proto::StorageMount {
                mount, storage: "huge".to_owned(), ..Default::default()
            });
            request
        };
        agent.create(&with("c1", 5 << 20)).await;
        agent.create(&with("c2", 0)).await;
        assert_eq!(pool(), before + 2);
        for id in ["c1", "c2"] {
            agent.start_container(id).await.unwrap();
        }
        let script = "cat /sys/fs/cgroup/hugetlb.2MB.max; fallocate -l 4m /huge/$1 && rm /huge/$1 && echo ok";
        let script = |name: &str| script.replace("$1", name);
        let (output, _) = agent.exec_sync("c1", "e1", &script("one")).await;
        assert_eq!(output, "4194304\nok\n");
        let (output, _) = agent.exec_sync("c2", "e1", &script("two")).await;
        assert_eq!(output, "0\n");
        let update = |bytes: u64| proto::UpdateRequest {
            container_id: "c1".to_owned(),
            resources: json!({"hugepageLimits": [{"pageSize": "2MB", "limit": bytes}]}).to_string().into_bytes(),
            ..Default::default()
        };
        agent.client.update(context(), &update(2 << 20)).await.unwrap();
        assert_eq!(pool(), before + 1);
        // More than the machine has: refused by name, and nothing is kept for it.
        let (code, text) = message(agent.client.create(context(), &with("c3", 1 << 40)).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        assert!(text.contains("more huge pages of 2MB, not for 524288"), "{text}");
        assert_eq!(pool(), before + 1);
        // They go when the container ends, not when it is removed.
        agent.signal("c1", "", libc::SIGKILL, false).await;
        agent.exited("c1", "").await;
        let end = Instant::now() + LIMIT;
        while pool() != before && Instant::now() < end {
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(pool(), before);
        for id in ["c1", "c2"] {
            agent.delete(id).await;
        }
        let detach = proto::DetachStorageRequest { id: "huge".to_owned(), ..Default::default() };
        agent.client.detach_storage(context(), &detach).await.unwrap();
        agent.assert_clean();
    }

    async fn the_clock_is_set_forward_and_back(agent) {
        let adjust = async |by_ms: i64| {
            let request = proto::AdjustClockRequest { by_ns: by_ms * 1_000_000, ..Default::default() };
            let answer = agent.client.adjust_clock(context(), &request).await.unwrap();
            i64::try_from(answer.realtime_ns).unwrap() / 1_000_000
        };
        // Half an hour, so that a machine that is slow does not matter.
        const FAR_MS: i64 = 1_800_000;
        let before = adjust(0).await;
        let ahead = adjust(FAR_MS).await;
        let back = adjust(-FAR_MS).await;
        // Too little to be seen at once: the clock runs faster for a while, and never back.
        let slewed = adjust(-5).await;
        assert!((FAR_MS..FAR_MS + 60_000).contains(&(ahead - before)), "{before} {ahead}");
        assert!((0..60_000).contains(&(back - before)), "{before} {back}");
        assert!(slewed >= back, "{back} {slewed}");
        adjust(5).await;
        let request = proto::AdjustClockRequest { by_ns: i64::MIN, ..Default::default() };
        let (code, _) = message(agent.client.adjust_clock(context(), &request).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT);
    }

    async fn one_signal_ends_an_exec_with_all_that_it_started_but_daemons(agent) {
        agent.run("c1", "sleep 1000").await;
        agent.exec("c1", "e1", "setsid sleep 555 & (sleep 556 &); (setsid sleep 558 &); sleep 557").await;
        let seen = "until [ $(ps | grep -c 'sleep 55[5678]') = 4 ]; do sleep 0.1; done";
        agent.exec_sync("c1", "e2", seen).await;
        agent.signal("c1", "e1", 9, true).await;
        assert_eq!(agent.exited("c1", "e1").await.code, 137);
        let (output, _) = agent.exec_sync("c1", "e3", "ps | grep -o 'sleep 55[5678]'").await;
        assert_eq!(output, "sleep 558\n");
        let (output, _) = agent.exec_sync("c1", "e4", "ps | grep -c 'sleep 100[0]'").await;
        assert_eq!(output, "1\n");
        // It is over: once more has no effect.
        agent.signal("c1", "e1", 9, true).await;
        agent.delete("c1").await;
    }

    async fn pid_namespaces_are_own_shared_or_the_guests(agent) {
        use proto::PidNamespace::{CONTAINER, NODE, POD, TARGET};
        let with = |id: &str, pid: proto::PidNamespace, target: &str| {
            let mut request = container(id, "echo $$; sleep 1000");
            request.pid = pid.into();
            request.pid_target = target.to_owned();
            request
        };
        let mut namespaces = std::collections::HashMap::new();
        for (id, pid, target) in [("own", CONTAINER, ""), ("pod1", POD, ""), ("pod2", POD, ""), ("node", NODE, ""), ("join", TARGET, "own")] {
            agent.create(&with(id, pid, target)).await;
            agent.start_container(id).await.unwrap();
            let (output, _) = agent.exec_sync(id, "e1", "ls -l /proc/self/ns/pid").await;
            namespaces.insert(id, output.split("-> ").nth(1).unwrap().to_owned());
        }
        assert_eq!(namespaces["pod1"], namespaces["pod2"]);
        assert_eq!(namespaces["own"], namespaces["join"]);
        assert_ne!(namespaces["own"], namespaces["pod1"]);
        assert_ne!(namespaces["own"], namespaces["node"]);
        let (output, _) = agent.exec_sync("pod1", "e2", "ps").await;
        assert!(output.matches("sleep 1000").count() >= 2, "{output}");
        // In a shared namespace, too, nothing outlives its container.
        agent.exec("pod1", "e3", "setsid sleep 555 & sleep 556").await;
        agent.signal("pod1", "", 9, false).await;
        agent.exited("pod1", "").await;
        let (output, _) = agent.exec_sync("pod2", "e4", "ps").await;
        assert!(!output.contains("sleep 55"), "{output}");
        let (code, _) = message(agent.client.create(context(), &with("x", TARGET, "nobody")).await);
        assert_eq!(code, ttrpc::Code::NOT_FOUND);
        for id in ["own", "pod1", "pod2", "node", "join"] { agent.delete(id).await; }
        agent.assert_clean();
    }

    async fn identity_reaches_containers(agent) {
        let configure = proto::ConfigureRequest {
            sandbox_id: "s1".to_owned(),
            hostname: "pod-one".to_owned(),
            hosts: "127.0.0.1 localhost\n".to_owned(),
            resolv_conf: "nameserver 10.0.0.10\n".to_owned(),
            sysctls: [("net.core.somaxconn".to_owned(), "512".to_owned())].into(),
            entropy: vec![7; 64],
            shm_size: 1 << 20,
            ..Default::default()
        };
        agent.client.configure(context(), &configure).await.unwrap();
        agent.client.configure(context(), &configure).await.unwrap();
        let other = proto::ConfigureRequest { sandbox_id: "s2".to_owned(), ..Default::default() };
        let (code, _) = message(agent.client.configure(context(), &other).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        let mut with_mounts = spec(&["sleep", "1000"]);
        let run = agent.dir.join("run");
        let bind = |from: &str, to: &str| json!({
            "destination": to, "type": "bind", "source": run.join(from), "options": ["rbind", "rprivate", "rw"]
        });
        with_mounts["mounts"].as_array_mut().unwrap().extend([
            bind("files/sandbox/hosts", "/etc/hosts"),
            bind("files/sandbox/resolv.conf", "/etc/resolv.conf"), bind("shm", "/dev/shm"),
        ]);
        agent.create(&container_with("c1", &with_mounts)).await;
        agent.start_container("c1").await.unwrap();
        let script = "hostname; cat /etc/hosts /etc/resolv.conf; cat /proc/sys/net/core/somaxconn";
        let (output, _) = agent.exec_sync("c1", "e1", script).await;
        assert_eq!(output, "pod-one\n127.0.0.1 localhost\nnameserver 10.0.0.10\n512\n");
        let changed = proto::ConfigureRequest { hosts: "127.0.0.2 x\n".to_owned(), ..configure.clone() };
        agent.client.configure(context(), &changed).await.unwrap();
        let (output, _) = agent.exec_sync("c1", "e2", "cat /etc/hosts; echo x > /dev/shm/x; ls /dev/shm").await;
        assert_eq!(output, "127.0.0.2 x\nx\n");
        agent.delete("c1").await;
    }

    async fn an_atomic_volume_is_one_copy_that_can_be_watched(agent) {
        let volume = agent.dir.join("volumes/v");
        fs::create_dir_all(&volume).unwrap();
        let replace = |version: &str, keys: &[(&str, &str)]| {
            fs::create_dir(volume.join(version)).unwrap();
            for (key, text) in keys {
                fs::write(volume.join(version).join(key), text).unwrap();
                let _ = symlink(format!("..data/{key}"), volume.join(key));
            }
            symlink(version, volume.join("..data_tmp")).unwrap();
            fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        };
        replace("..1", &[("key", "one"), ("gone", "one")]);
        agent.bind("host", &agent.dir.join("volumes")).await;
        let mut mounted = spec(&["sleep", "1000"]);
        let mounts = mounted["mounts"].as_array_mut().unwrap();
        let at = mounts.len() as u32;
        mounts.push(json!({"destination": "/v", "type": "bind", "source": "asked", "options": ["rbind", "rprivate", "ro"]}));
        let with_volume = |id: &str| {
            let mut request = container_with(id, &mounted);
            request.storage_mounts = vec![proto::StorageMount {
                mount: at, storage: "host".to_owned(), sub_path: "v".to_owned(), atomic_volume: "name-of-v".to_owned(), ..Default::default()
            }];
            request
        };
        for id in ["c1", "c2"] {
            agent.create(&with_volume(id)).await;
            agent.start_container(id).await.unwrap();
        }
        let copy = format!("/proc/{}/root{}/run/volumes/1", agent.init(), agent.dir.display());
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVE | inotify::WatchFlags::DELETE;
        inotify::add_watch(&watch, &copy, flags).unwrap();

        fs::remove_file(volume.join("gone")).unwrap();
        replace("..2", &[("key", "two"), ("new", "two")]);
        agent.client.refresh_volumes(context(), &proto::Empty::new()).await.unwrap();
        let (mut buffer, mut seen) = ([std::mem::MaybeUninit::uninit(); 4096], Vec::new());
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        while let Ok(event) = events.next() {
            seen.push((event.file_name().unwrap().to_str().unwrap().to_owned(), event.events() - inotify::ReadFlags::ISDIR));
        }
        seen[5..].sort_by(|a, b| a.0.cmp(&b.0));
        type Seen = inotify::ReadFlags;
        let expected = [
            ("..2", Seen::MOVED_TO), ("..data_tmp", Seen::CREATE), ("..data_tmp", Seen::MOVED_FROM), ("..data", Seen::MOVED_TO),
            ("new", Seen::CREATE), ("..1", Seen::DELETE), ("gone", Seen::DELETE),
        ];
        assert_eq!(seen, expected.map(|(name, event)| (name.to_owned(), event)));
        for id in ["c1", "c2"] {
            let (output, _) = agent.exec_sync(id, "e1", "cat /v/key /v/new; ls -A /v; echo x 2>&1 >/v/key").await;
            assert!(output.starts_with("twotwo..2\n..data\nkey\nnew\n"), "{output}");
            assert!(output.contains("Read-only file system"), "{output}");
        }

        // It outgrows what is copied: who has a copy keeps it, who comes later has the volume itself.
        replace("..3", &[("key", "three"), ("large", &"x".repeat(5 << 20))]);
        let (_, text) = message(agent.client.refresh_volumes(context(), &proto::Empty::new()).await);
        assert!(text.starts_with("name-of-v: it has more than"), "{text}");
        agent.create(&with_volume("c3")).await;
        agent.start_container("c3").await.unwrap();
        for (id, text) in [("c1", "two"), ("c3", "three")] {
            let (output, _) = agent.exec_sync(id, "e2", "cat /v/key").await;
            assert_eq!(output, text, "{id}");
        }
        agent.delete("c1").await;
        assert!(Path::new(&copy).exists());
        agent.delete("c2").await;
        assert!(!Path::new(&copy).exists());
        agent.client.refresh_volumes(context(), &proto::Empty::new()).await.unwrap();
        agent.delete("c3").await;
        agent.assert_clean();
    }

    async fn the_network_is_what_the_host_describes(agent) {
        let init = agent.init().to_string();
        let done = std::process::Command::new("nsenter")
            .args(["-t", &init, "-n", "ip", "link", "add", "dummy7", "address", "02:00:00:00:00:07", "type", "dummy"])
            .status()
            .unwrap();
        assert!(done.success());
        let interface = proto::Interface {
            mac: "02:00:00:00:00:07".to_owned(), name: "eth0".to_owned(), mtu: 1400,
            addresses: vec!["10.88.0.5/16".to_owned(), "fd00::5/64".to_owned()], ..Default::default()
        };
        let route = |destination: &str, gateway: &str| proto::Route {
            destination: destination.to_owned(), gateway: gateway.to_owned(), interface: "eth0".to_owned(), ..Default::default()
        };
        let configure = proto::ConfigureRequest {
            sandbox_id: "s1".to_owned(),
            interfaces: vec![interface],
            // The gateway of the first is only reachable by the second.
            routes: vec![route("0.0.0.0/0", "169.254.1.1"), route("169.254.1.1/32", ""), route("::/0", "fd00::1")],
            neighbors: vec![proto::Neighbor {
                address: "169.254.1.1".to_owned(), mac: "02:00:00:00:00:01".to_owned(), interface: "eth0".to_owned(), ..Default::default()
            }],
            ..Default::default()
        };
        agent.client.configure(context(), &configure).await.unwrap();
        agent.client.configure(context(), &configure).await.unwrap();
        agent.run("c1", "ip addr show eth0; ip route; ip -6 route; ip neigh; ip addr show lo").await;
        let out = agent.output(StreamKind::Stdout, "c1", "").await;
        for part in ["mtu 1400", "10.88.0.5/16", "fd00::5/64", "default via 169.254.1.1", "default via fd00::1", "02:00:00:00:00:01", "127.0.0.1/8"] {
            assert!(out.contains(part), "{part} in {out}");
        }
        assert!(!out.contains("tentative"), "{out}");
        let missing = proto::ConfigureRequest {
            interfaces: vec![proto::Interface { mac: "02:00:00:00:00:99".to_owned(), name: "eth1".to_owned(), ..Default::default() }],
            ..configure.clone()
        };
        let (_, text) = message(agent.client.configure(context(), &missing).await);
        assert!(text.contains("02:00:00:00:00:99"), "{text}");
        agent.delete("c1").await;
    }

    async fn a_network_that_changes_is_followed(agent) {
        let init = agent.init().to_string();
        let host = |script: &str| {
            let mut command = std::process::Command::new("nsenter");
            let output = command.args(["-t", &init, "-n", "sh", "-ec", script]).output().unwrap();
            assert!(output.status.success(), "{script}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let early = agent.client.update_network(context(), &proto::UpdateNetworkRequest::default()).await;
        assert_eq!(message(early).0, ttrpc::Code::FAILED_PRECONDITION);
        host("ip link add dummy7 address 02:00:00:00:00:07 type dummy; ip link add dummy8 address 02:00:00:00:00:08 type dummy");
        let interface = |number: u8, name: &str, mtu: u32, addresses: &[&str]| proto::Interface {
            mac: format!("02:00:00:00:00:{number:02x}"), name: name.to_owned(), mtu,
            addresses: addresses.iter().map(|a| (*a).to_owned()).collect(), ..Default::default()
        };
        let route = |destination: &str, gateway: &str, table: u32| proto::Route {
            destination: destination.to_owned(), gateway: gateway.to_owned(), interface: "eth0".to_owned(), table, ..Default::default()
        };
        let several = |destination: &str, hops: &[(&str, &str, u32)]| proto::Route {
            destination: destination.to_owned(),
            next_hops: hops.iter().map(|(gateway, interface, weight)| proto::NextHop {
                gateway: (*gateway).to_owned(), interface: (*interface).to_owned(), weight: *weight, ..Default::default()
            }).collect(),
            ..Default::default()
        };
        let range = |first, last| Some(proto::Range { first, last, ..Default::default() }).into();
        let rule = |priority: u32, source: &str| proto::Rule {
            priority, source: source.to_owned(), action: 1, table: 100, ..Default::default()
        };
        let neighbor = |address: &str| proto::Neighbor {
            address: address.to_owned(), mac: "02:00:00:00:00:01".to_owned(), interface: "eth0".to_owned(), ..Default::default()
        };
        let configure = proto::ConfigureRequest {
            sandbox_id: "s1".to_owned(),
            interfaces: vec![
                interface(7, "eth0", 1500, &["10.88.0.5/16", "10.88.0.6/16", "fd00::5/64"]),
                interface(8, "net1", 1500, &["10.99.0.5/16"]),
            ],
            routes: vec![
                route("0.0.0.0/0", "10.88.0.1", 0), route("10.50.0.0/16", "10.88.0.1", 0), route("::/0", "fd00::1", 0),
                route("0.0.0.0/0", "10.88.0.1", 100),
                proto::Route { destination: "10.53.0.0/16".to_owned(), kind: 7, ..Default::default() },
                several("10.54.0.0/16", &[("10.88.0.1", "eth0", 3), ("10.99.0.1", "net1", 1)]),
                several("fd54::/64", &[("fd00::1", "eth0", 1), ("fd00::2", "eth0", 2)]),
            ],
            neighbors: vec![neighbor("10.88.0.9"), neighbor("fd00::9")],
            rules: vec![
                rule(1000, "10.88.0.5/32"),
                proto::Rule { ipv6: true, priority: 1001, destination: "fd77::/64".to_owned(), mark: 7, mask: 0xff, action: 1, table: 100, ..Default::default() },
                proto::Rule { protocol: 17, source_ports: range(1000, 2000), destination_ports: range(53, 53), users: range(0, 99), ..rule(1003, "") },
            ],
            ..Default::default()
        };
        agent.client.configure(context(), &configure).await.unwrap();
        let all = "ip addr; ip route; ip -6 route; ip route show table 100; ip rule; ip -6 rule; ip neigh; ip link";
        let said = host(all);
        for part in [
            "default via 10.88.0.1", "10.50.0.0/16 via", "unreachable 10.53.0.0/16", "1000:\tfrom 10.88.0.5 lookup 100",
            "1001:\tfrom all to fd77::/64 fwmark 0x7/0xff lookup 100", "10.88.0.9 dev", "fd00::9 dev", "10.99.0.5/16",
            "nexthop via 10.88.0.1 dev eth0 weight 3", "nexthop via 10.99.0.1 dev net1 weight 1",
            "nexthop via fd00::1 dev eth0 weight 1", "nexthop via fd00::2 dev eth0 weight 2",
            "1003:\tfrom all uidrange 0-99 ipproto udp sport 1000-2000 dport 53 lookup 100",
        ] {
            assert!(said.contains(part), "{part} in {said}");
        }
        // What the pod sets is its own.
        host("ip route add 10.60.0.0/16 via 10.88.0.1; ip rule add priority 7 table 9");
        let changed = proto::UpdateNetworkRequest {
            // The first address of its network goes, another one stays, and one has another place.
            interfaces: vec![interface(0x17, "eth0", 1400, &["10.88.0.6/16", "fd00::6/64"])],
            routes: vec![
                route("0.0.0.0/0", "10.88.0.2", 0), route("::/0", "fd00::2", 0),
                several("10.54.0.0/16", &[("10.88.0.1", "eth0", 1), ("10.88.0.2", "eth0", 1)]),
                route("fd54::/64", "fd00::7", 0),
            ],
            neighbors: vec![neighbor("10.88.0.10")],
            rules: vec![rule(1002, "")],
            ..Default::default()
        };
        for _ in 0..2 {
            agent.client.update_network(context(), &changed).await.unwrap();
            let said = host(all);
            for part in [
                "mtu 1400", "02:00:00:00:00:17", "10.88.0.6/16", "fd00::6/64", "default via 10.88.0.2", "default via fd00::2",
                "1002:\tfrom all lookup 100", "10.88.0.10 dev", "10.60.0.0/16 via 10.88.0.1",
                "nexthop via 10.88.0.2 dev eth0 weight 1", "fd54::/64 via fd00::7", "7:\tfrom all lookup 9",
            ] {
                assert!(said.contains(part), "{part} in {said}");
            }
            for part in [
                "10.88.0.5", "fd00::5", "default via 10.88.0.1", "10.50.0.0", "10.53.0.0", "1000:", "1001:", "1003:", "weight 3", "net1 weight", "weight 2", "10.88.0.9 ", "fd00::9 ",
                "10.99.0.5",
            ] {
                assert!(!said.contains(part), "{part} in {said}");
            }
        }
        let bad = proto::UpdateNetworkRequest { rules: vec![proto::Rule { action: 2, ..Default::default() }], ..changed };
        assert!(message(agent.client.update_network(context(), &bad).await).1.contains("no kind"));
    }

    async fn localhost_of_the_pod_can_be_dialled(agent) {
        agent.client.configure(context(), &proto::ConfigureRequest::default()).await.unwrap();
        agent.run("c1", "nc -l -p 8080 -e sh -c 'read x; echo got $x'").await;
        let begin = Instant::now();
        let mut stream = loop {
            match agent.stream(StreamKind::Dial { port: 8080 }, "", "").await {
                Ok(stream) => break stream,
                Err(e) => {
                    assert!(e.contains("localhost:8080"), "{e}");
                    assert!(begin.elapsed() < LIMIT, "{e}");
                    sleep(Duration::from_millis(50)).await;
                }
            }
        };
        stream.write_all(b"ping\n").await.unwrap();
        let mut answer = String::new();
        timeout(LIMIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert_eq!(answer, "got ping\n");
        agent.delete("c1").await;
    }

    async fn a_shell_in_the_guest_is_on_its_root_or_never(agent) {
        let bring = |dir: &Path| fs::copy("/bin/busybox", dir.join("busybox")).map(drop).unwrap();
        // Too late: what there was at its start counts.
        bring(&agent.dir);
        let refused = agent.stream(StreamKind::Shell { terminal: None }, "", "").await.unwrap_err();
        assert_eq!(refused, "start a shell: the pod was started without one");

        let agent = Agent::start_with(bring).await;
        agent.run("c1", "exec sleep 12345").await;
        let said = async |shell: &mut UnixStream, end: &str| {
            let mut said = String::new();
            while !said.contains(end) {
                let mut buffer = [0; 4096];
                let length = timeout(LIMIT, shell.read(&mut buffer)).await.unwrap().unwrap();
                assert!(length > 0, "{said}");
                said.push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
            said
        };
        // It sees all of the guest, and is as no container is, nor the agent.
        let mut shell = agent.stream(StreamKind::Shell { terminal: None }, "", "").await.unwrap();
        let script = "ps; cat /proc/self/cgroup /proc/self/oom_score_adj; sleep 23456 & echo en''d\n";
        shell.write_all(script.as_bytes()).await.unwrap();
        let text = said(&mut shell, "end").await;
        for told in ["sleep 12345", "--listen unix:", "-shell-0\n0\n"] {
            assert!(text.contains(told), "no {told:?} in {text}");
        }
        // What it started ends with the connection.
        let cgroup = PathBuf::from(format!("{}-shell-0", agent.cgroup().display()));
        assert!(cgroup.exists());
        drop(shell);
        let begin = Instant::now();
        while cgroup.exists() {
            assert!(begin.elapsed() < LIMIT);
            sleep(Duration::from_millis(50)).await;
        }
        // A script is read to its end.
        let mut shell = agent.stream(StreamKind::Shell { terminal: None }, "", "").await.unwrap();
        shell.write_all(b"echo one; echo two >&2; ls /proc/1/root >/dev/null && echo three").await.unwrap();
        shell.shutdown().await.unwrap();
        let mut text = String::new();
        timeout(LIMIT, shell.read_to_string(&mut text)).await.unwrap().unwrap();
        assert_eq!(text, "one\ntwo\nthree\n");

        // At a terminal, which is its own: keys are signals there.
        let terminal = StreamKind::Shell { terminal: Some((31, 101)) };
        let mut shell = agent.stream(terminal, "", "").await.unwrap();
        shell.write_all(b"stty size; echo in''terrupt; sleep 34567\n").await.unwrap();
        let text = said(&mut shell, "interrupt").await;
        assert!(text.contains("31 101"), "{text}");
        // It may not sleep yet.
        loop {
            shell.write_all(b"\x03echo go''es on\n").await.unwrap();
            let wait = said(&mut shell, "goes on");
            if timeout(Duration::from_secs(5), wait).await.is_ok() {
                break;
            }
        }
        shell.write_all(b"exit\n").await.unwrap();
        let mut rest = Vec::new();
        timeout(LIMIT, shell.read_to_end(&mut rest)).await.unwrap().unwrap();
        agent.delete("c1").await;
        agent.assert_clean();
    }

    async fn an_exit_at_once_is_never_lost(agent) {
        for n in 0..10 {
            let id = format!("c{n}");
            agent.run(&id, "echo done").await;
            let exited = agent.exited(&id, "").await;
            assert_eq!((exited.code, exited.stdout_bytes), (0, 5));
            assert_eq!(agent.output(StreamKind::Stdout, &id, "").await, "done\n");
            agent.delete(&id).await;
        }
        agent.assert_clean();
    }

    async fn shutdown_ends_everything(agent) {
        agent.run("c1", "trap '' TERM; sleep 1000").await;
        agent.client.shutdown(context(), &proto::Empty::default()).await.unwrap();
        agent.assert_clean();
    }
}

/// The way from `main` through the boot to a container and the reset, over vsock.
#[test]
fn as_pid_1_it_boots_serves_vsock_and_resets() {
    const NAME: &str = "as_pid_1_it_boots_serves_vsock_and_resets";
    if let Some(why) = unable() {
        println!("SKIPPED: {NAME}: {why}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (mut guest, client) = match Guest::start().await {
            Ok(started) => started,
            Err(why) => {
                println!("SKIPPED: {NAME}: {why}");
                return;
            }
        };
        let hello = client
            .hello(context(), &proto::HelloRequest::default())
            .await
            .unwrap();
        assert_eq!(hello.version, VERSION);
        client
            .create(context(), &container("c1", "echo hello from a guest"))
            .await
            .unwrap();
        let start = proto::StartRequest {
            container_id: "c1".to_owned(),
            ..Default::default()
        };
        client.start(context(), &start).await.unwrap();
        let address = tokio_vsock::VsockAddr::new(1, hull_proto_agent::STREAM_PORT);
        let stream = tokio_vsock::VsockStream::connect(address).await.unwrap();
        let (stream, _) = open(stream, StreamKind::Stdout, "c1", "", 0).await.unwrap();
        let said = Output::new(stream).read_to_end().await;
        assert_eq!(String::from_utf8_lossy(&said), "hello from a guest\n");
        client
            .shutdown(context(), &proto::Empty::default())
            .await
            .unwrap();
        guest.ended().await;
    });
}

/// A container could connect by vsock too, if the kernel had a transport within the guest.
#[test]
fn only_the_host_is_served_over_vsock() {
    const NAME: &str = "only_the_host_is_served_over_vsock";
    if let Some(why) = unable() {
        println!("SKIPPED: {NAME}: {why}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let _guest = match Guest::start_for(2) {
            Ok(started) => started,
            Err(why) => {
                println!("SKIPPED: {NAME}: {why}");
                return;
            }
        };
        for port in [hull_proto_agent::RPC_PORT, hull_proto_agent::STREAM_PORT] {
            let address = tokio_vsock::VsockAddr::new(1, port);
            let deadline = Instant::now() + LIMIT;
            // Until it listens.
            let mut stream = loop {
                match tokio_vsock::VsockStream::connect(address).await {
                    Ok(stream) => break stream,
                    Err(e) => assert!(Instant::now() < deadline, "{port}: {e}"),
                }
                sleep(Duration::from_millis(20)).await;
            };
            let read = timeout(Duration::from_secs(10), stream.read(&mut [0; 16])).await;
            let read = read.expect("the connection is left open");
            assert!(matches!(read, Ok(0) | Err(_)), "{port}: {read:?}");
        }
    });
}
