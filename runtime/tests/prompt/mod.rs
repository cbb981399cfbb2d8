//! `hull run`, `ps`, `exec` and the like, as a person at a prompt uses them.

mod terminal;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use hull_proto_cri::v1::{AuthConfig, ImageSpec, PullImageRequest};
use serde_json::Value;

use crate::{Daemon, registry};

/// A daemon and the name of an image that it has.
pub struct Node {
    pub daemon: Daemon,
    image: String,
}

impl Node {
    /// `None` (said on stdout) where it can't be had.
    async fn start() -> Option<Self> {
        Self::start_with("").await
    }

    /// The same with more in its configuration.
    pub async fn start_with(settings: &str) -> Option<Self> {
        let daemon = Daemon::start_with(settings).await?;
        let registry = registry::serve(daemon.child.id(), "user", "password");
        let image = format!("{}/app:1", registry.address);
        let request = PullImageRequest {
            image: Some(ImageSpec {
                image: image.clone(),
                ..Default::default()
            }),
            auth: Some(AuthConfig {
                username: "user".into(),
                password: "password".into(),
                ..Default::default()
            }),
            sandbox_config: None,
        };
        daemon.images.clone().pull_image(request).await.unwrap();
        Some(Self { daemon, image })
    }

    /// `hull` with these arguments, in the daemon's network, behind a command; IMAGE is the image.
    fn command(&self, before: &[&str], arguments: &[&str]) -> Command {
        let pid = self.daemon.child.id().to_string();
        let hull = [env!("CARGO_BIN_EXE_hull"), "--config"];
        let mut line = [before, &["nsenter", "-t", &pid, "-n"], &hull].concat();
        let config = self.daemon.dir.path().join("hull.toml");
        line.push(config.to_str().unwrap());
        let mut command = Command::new(line[0]);
        command.env("DOCKER_CONFIG", self.daemon.dir.path().join("docker"));
        command.args(&line[1..]).stdin(Stdio::null());
        command.args(arguments.iter().map(|&word| match word {
            "IMAGE" => &self.image,
            word => word,
        }));
        command
    }

    /// Runs it with this input to its end.
    pub fn fed(&self, input: &[u8], arguments: &[&str]) -> Output {
        let mut command = self.command(&[], arguments);
        command.stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        std::thread::spawn(move || stdin.write_all(&input));
        child.wait_with_output().unwrap()
    }

    /// Runs it without an input to its end.
    fn hull(&self, arguments: &[&str]) -> Output {
        self.command(&[], arguments).output().unwrap()
    }

    /// What one that succeeds prints.
    pub fn told(&self, arguments: &[&str]) -> String {
        let output = self.hull(arguments);
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        text
    }

    /// What one that fails with this code says, a line of its own.
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.hull(arguments);
        let text = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}: {output:?}"
        );
        let lines = text.lines().filter(|line| line.starts_with("hull: "));
        let lines: Vec<_> = lines.collect();
        lines.last().unwrap().to_string()
    }

    /// From now on the guest of this pod has a shell.
    fn bring_shell(&self, name: &str) {
        let list = self.json(&["ps", "-o", "json"]);
        let mut all = list.as_array().unwrap().iter();
        let found = all.find(|one| one["name"] == name).unwrap();
        let pods = self.daemon.dir.path().join("state/pods");
        let pod = pods.join(found["pod_id"].as_str().unwrap());
        fs::write(pod.join("shell"), "").unwrap();
    }

    pub fn registry(&self) -> &str {
        self.image.split('/').next().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.told(arguments)).unwrap()
    }

    fn start_piped(&self, arguments: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
        let mut command = self.command(&[], arguments);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        (child, output)
    }
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_and_both_outputs_of_a_container_pass_byte_for_byte() {
    let Some(node) = Node::start().await else {
        return;
    };
    let output = node.hull(&["run", "-q", "IMAGE", "out:one\\n", "err:two", "exit:9"]);
    assert_eq!(output.status.code(), Some(9), "{output:?}");
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"one\n"[..], &b"two"[..])
    );

    let bytes: Vec<u8> = (0..300_000_u32)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_be_bytes())
        .collect();
    let bytes = [&bytes[..], b"\n"].concat();
    for arguments in [
        &["run", "-q", "IMAGE", "--", "cat"][..],
        &["run", "-i", "--rm", "-q", "IMAGE", "cat"],
    ] {
        let output = node.fed(&bytes, arguments);
        assert!(output.status.success(), "{:?}", output.stderr);
        assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
    }
    // Not ours unless it was made for it.
    let output = node.hull(&["run", "-q", "IMAGE", "cat", "out:done\\n"]);
    assert_eq!(output.stdout, b"done\n", "{output:?}");

    let missing = node.refused(127, &["run", "-q", "IMAGE", "cannot-start"]);
    assert!(missing.contains("not found"), "{missing}");
    // Who reads no more ends it.
    let (mut child, mut output) = node.start_piped(&["run", "-q", "IMAGE", "ticks:5"]);
    assert_eq!(line(&mut output), "line 0\n");
    drop(output);
    assert_eq!(child.wait().unwrap().code(), Some(141));
    assert_eq!(node.told(&["ps", "-aq"]), "");
    assert_eq!(node.daemon.names("state/run"), Default::default());
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_is_left_to_the_daemon_is_asked_for_by_name() {
    let Some(node) = Node::start().await else {
        return;
    };
    let (mut watcher, mut events) = node.start_piped(&["events", "--output", "json"]);
    let id = node.told(&[
        "run",
        "-q",
        "-d",
        "-i",
        "--name",
        "db",
        "IMAGE",
        "out:hello\\n",
        "wait",
    ]);
    let id = id.trim();
    let taken = node.refused(125, &["run", "-q", "--name", "db", "IMAGE", "wait"]);
    assert_eq!(taken, "hull: the name db is taken; `hull rm db` frees it");

    assert_eq!(node.told(&["ps", "-q"]).trim(), id);
    let list = node.told(&["ps"]);
    let words: Vec<_> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(
        words[..4],
        [&id[..12], "db", &node.image, "running"],
        "{list}"
    );
    assert_eq!(node.json(&["ps", "-o", "json"])[0]["namespace"], "hull-run");
    let known = node.json(&["inspect", &id[..5]]);
    assert_eq!(
        (&known[0]["id"], &known[0]["state"]),
        (&id.into(), &"running".into())
    );
    assert!(
        known[0]["pod"]["addresses"][0]
            .as_str()
            .unwrap()
            .starts_with("10.222.")
    );
    let processes = node.told(&["top", "db"]);
    let init = processes.lines().nth(1).unwrap();
    let words: Vec<_> = init.split_whitespace().collect();
    assert_eq!(
        words.join(" "),
        r"1 0 0 S 1:01.00 3.0 MiB 7 s out:hello\n wait"
    );
    assert_eq!(node.json(&["top", "-o", "json", "db"])[0]["pid"], 1);
    let used = node.json(&["stats", "--no-stream", "-o", "json"]);
    assert_eq!(used[0]["name"], "db", "{used}");
    // The fake guest uses more at each look.
    assert!(used[0]["cpu_percent"].as_f64().unwrap() > 0.0, "{used}");

    let output = node.hull(&["exec", "db", "out:x", "err:y", "exit:3"]);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"x"[..], &b"y"[..])
    );
    assert_eq!(node.fed(b"abc", &["exec", "-i", id, "cat"]).stdout, b"abc");
    let missing = node.refused(127, &["exec", "db", "cannot-start"]);
    assert!(missing.contains("not found"), "{missing}");

    let no_console = node.refused(1, &["console", "db"]);
    assert!(no_console.contains("debug_console"), "{no_console}");
    let run_directory = format!("state/pods/{}", known[0]["pod"]["id"].as_str().unwrap());
    let run_directory = node.daemon.dir.path().join(run_directory);
    fs::write(run_directory.join("console.log"), "Linux\r\n").unwrap();
    assert_eq!(node.told(&["console", "db"]), "Linux\r\n");
    let (mut follower, mut console) = node.start_piped(&["console", "-f", "db"]);
    assert_eq!(line(&mut console), "Linux\r\n");
    follower.kill().unwrap();
    follower.wait().unwrap();

    assert_eq!(node.told(&["logs", "db"]), "hello\n");
    assert_eq!(node.told(&["logs", "-n", "0", "db"]), "");
    let timed = node.told(&["logs", "-t", "db"]);
    assert!(timed.ends_with("Z hello\n"), "{timed}");
    let (mut follower, mut log) = node.start_piped(&["logs", "-f", "db"]);
    assert_eq!(line(&mut log), "hello\n");

    // An echo server is at port 7 of every guest.
    let (mut forwarder, mut told) = node.start_piped(&["port-forward", "db", "0:7"]);
    let address = line(&mut told);
    let port = address
        .trim()
        .strip_prefix("127.0.0.1:")
        .and_then(|a| a.strip_suffix(" -> 7"));
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{}; echo hi >&3; head -n1 <&3",
        port.unwrap()
    );
    let pid = node.daemon.child.id().to_string();
    let echo = Command::new("nsenter")
        .args(["-t", &pid, "-n", "bash", "-c", &script])
        .output();
    assert_eq!(echo.unwrap().stdout, b"hi\n");
    forwarder.kill().unwrap();
    forwarder.wait().unwrap();

    let runs = node.refused(1, &["rm", "db"]);
    assert_eq!(runs, "hull: db: it runs; stop it, or use -f");
    assert_eq!(node.told(&["stop", "-t", "1", "db"]), "db\n");
    assert!(follower.wait().unwrap().success());
    assert_eq!(line(&mut log), "");
    assert_eq!(node.told(&["ps"]).lines().count(), 1);
    assert_eq!(node.refused(1, &["top", "db"]), "hull: db does not run");
    let list = node.told(&["ps", "-a"]);
    assert!(list.contains("exited (143)"), "{list}");
    // Its microVM has gone, its log has not.
    assert!(node.daemon.vmms().is_empty());
    assert_eq!(node.told(&["logs", "db"]), "hello\n");
    assert_eq!(node.told(&["rm", "db"]), "db\n");
    node.daemon.assert_nothing_left();
    assert_eq!(node.daemon.names("state/run"), Default::default());

    let seen: Vec<Value> = (0..6)
        .map(|_| serde_json::from_str(&line(&mut events)).unwrap())
        .collect();
    let stopped = seen
        .iter()
        .find(|e| e["event"] == "stopped" && e["what"] == "container");
    assert_eq!(stopped.unwrap()["name"], "db", "{seen:?}");
    watcher.kill().unwrap();
    watcher.wait().unwrap();
    // The name is free again, and what had it is forgotten.
    node.told(&["run", "-q", "-d", "--name", "db", "IMAGE", "out:again\\n"]);
    let mut log = String::new();
    while log.is_empty() {
        log = node.told(&["logs", "db"]);
    }
    assert_eq!(log, "again\n");
    assert_eq!(node.told(&["rm", "-f", "db"]), "db\n");
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_copied_in_and_out_by_the_rules_of_docker() {
    let Some(node) = Node::start().await else {
        return;
    };
    node.told(&["run", "-q", "-d", "--name", "box", "IMAGE", "wait"]);
    // The fake guest's files are this machine's.
    let (guest, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let inside = |path: &str| format!("box:{}/{path}", guest.path().display());
    let outside = |path: &str| format!("{}/{path}", here.path().display());
    let copy = |from: &str, to: &str| node.told(&["cp", from, to]);
    let read = |path: &str| fs::read_to_string(path).unwrap();
    let in_guest = |path: &str| read(&format!("{}/{path}", guest.path().display()));
    fs::create_dir_all(outside("tree/sub")).unwrap();
    fs::write(outside("tree/sub/file"), "text").unwrap();
    let large = vec![b'x'; 3 << 20];
    fs::write(outside("tree/large"), &large).unwrap();

    copy(&outside("tree"), &inside("new"));
    assert_eq!(in_guest("new/sub/file"), "text");
    copy(&outside("tree"), &inside("new"));
    assert_eq!(in_guest("new/tree/sub/file"), "text");
    copy(&outside("tree/."), &inside("new/sub"));
    assert_eq!(in_guest("new/sub/large").len(), large.len());
    copy(&outside("tree/sub/file"), &inside("renamed"));
    copy(&outside("tree/sub/file"), &inside("new/"));
    assert_eq!(
        (in_guest("renamed"), in_guest("new/file")),
        ("text".into(), "text".into())
    );

    copy(&inside("new"), &outside("copied"));
    assert_eq!(fs::read(outside("copied/tree/large")).unwrap(), large);
    copy(&inside("new/."), &outside("content"));
    assert_eq!(read(&outside("content/sub/file")), "text");
    copy(&inside("new/file"), &outside("copied"));
    copy(&inside("renamed"), &outside("copied/file2"));
    assert_eq!(
        (
            read(&outside("copied/file")),
            read(&outside("copied/file2"))
        ),
        ("text".into(), "text".into())
    );

    // As archives.
    let archive = node.hull(&["cp", &inside("new/file"), "-"]).stdout;
    let unpacked = node.fed(&archive, &["cp", "-", &inside("new/tree")]);
    assert!(unpacked.status.success(), "{unpacked:?}");
    assert_eq!(in_guest("new/tree/file"), "text");

    for (from, to, word) in [
        (inside("none"), outside("x"), "none"),
        (inside("new"), outside("copied/file"), "directory"),
        (inside("renamed"), outside("none/"), "no such directory"),
        (outside("none"), inside("x"), "none"),
        (
            outside("tree"),
            inside("renamed"),
            "no directory in the container",
        ),
        (outside("tree/sub/file"), inside("none/"), "no directory"),
        (outside("tree"), outside("x"), "neither is in a container"),
        (inside("new"), inside("x"), "both are in containers"),
    ] {
        let told = node.refused(1, &["cp", &from, &to]);
        assert!(told.contains(word), "{from} {to}: {told}");
    }
    assert_eq!(node.told(&["rm", "-f", "box"]), "box\n");
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_written_to_a_directory_and_goes_on_from_there_twice() {
    let Some(node) = Node::start().await else {
        return;
    };
    node.told(&["run", "-d", "--name", "web", "IMAGE", "ticks:20"]);
    let place = node.daemon.dir.path().join("web.ckpt");
    let place = place.to_str().unwrap();
    let told = node.told(&["checkpoint", "web", place]);
    assert!(
        told.starts_with(&format!("{place}: web stood still for ")),
        "{told}"
    );
    let there = node.refused(1, &["checkpoint", "web", place]);
    let expected = format!(": {place} is there already (");
    assert!(there.contains(&expected), "{there}");
    let first = |name: &str| {
        let (mut child, mut output) = node.start_piped(&["logs", "-f", name]);
        let text = line(&mut output);
        child.kill().unwrap();
        child.wait().unwrap();
        text.trim()
            .strip_prefix("line ")
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    assert_eq!(first("web"), 0);
    let mut ids = Vec::new();
    for name in ["second", "third"] {
        ids.push(node.told(&["restore", place, "--name", name]));
        assert!(first(name) > 0, "it does not begin anew");
    }
    assert_ne!(ids[0], ids[1]);
    let taken = node.refused(1, &["restore", place, "--name", "second"]);
    assert!(taken.contains("the name second is taken"), "{taken}");
    // Under a name of its own, and still.
    let still = node.told(&["restore", place, "--no-start"]);
    let list = node.json(&["ps", "-a", "-o", "json"]);
    let mut all = list.as_array().unwrap().iter();
    let still = all.find(|one| one["id"] == still.trim()).unwrap();
    assert_eq!(still["state"], "created", "{still}");
    let nothing = node.refused(1, &["restore", "/nonexistent"]);
    assert!(nothing.contains("/nonexistent: open it"), "{nothing}");

    // One that costs nothing, and is what it was afterwards.
    let suspended = node.daemon.dir.path().join("suspended");
    let directory = suspended.to_str().unwrap();
    let told = node.told(&["suspend", "web", directory]);
    assert!(told.starts_with(&format!("{directory}: web stood ")));
    let gone = node.refused(125, &["exec", "web", "true"]);
    assert!(gone.contains("web"), "{gone}");
    let resumed = node.told(&["resume", directory]);
    let list = node.json(&["ps", "-o", "json"]);
    let mut all = list.as_array().unwrap().iter();
    let web = all.find(|one| one["name"] == "web").unwrap();
    assert_eq!(
        (&web["id"], &web["state"]),
        (&resumed.trim().into(), &"running".into())
    );
    assert!(!suspended.exists());
    let twice = node.refused(1, &["resume", place]);
    assert!(twice.contains("the pod is there: "), "{twice}");
    assert!(Path::new(place).exists());
    // What of the host a pod has is said each time.
    let [data, other] = ["data", "other"].map(|name| node.daemon.dir.path().join(name));
    for path in [&data, &other] {
        fs::create_dir(path).unwrap();
    }
    let [data, other] = [data, other].map(|path| format!("{}:/data", path.display()));
    let options = ["-d", "--name", "files", "-v", &data];
    node.told(&[&["run"], &options[..], &["IMAGE", "ticks:20"]].concat());
    let place = node.daemon.dir.path().join("files.ckpt");
    let place = place.to_str().unwrap();
    node.told(&["checkpoint", "files", place]);
    let none = node.refused(1, &["restore", place]);
    assert!(
        none.contains("has a path of the host at /data: say which it gets"),
        "{none}"
    );
    let readonly = node.refused(1, &["restore", place, "-v", &format!("{other}:ro")]);
    assert!(readonly.contains("leave :ro out"), "{readonly}");
    let volume = other.as_str();
    node.told(&["restore", place, "-v", volume, "--name", "fourth"]);
    assert!(first("fourth") > 0, "it does not begin anew");

    let still = still["name"].as_str().unwrap();
    for name in ["web", "second", "third", still, "files", "fourth"] {
        assert_eq!(node.told(&["rm", "-f", name]), format!("{name}\n"));
    }
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pod_takes_is_told_as_a_runtime_class() {
    let Some(node) = Node::start().await else {
        return;
    };
    let told = node.told(&["runtime-class", "--idle", "1"]);
    assert!(told.contains("\nkind: RuntimeClass\n"), "{told}");
    assert!(told.contains("\nhandler: hull\n"), "{told}");
    assert!(told.contains("    memory: 36Mi\n    cpu: "), "{told}");
    let refused = node.refused(1, &["runtime-class", "none"]);
    assert!(
        refused.contains("no handler none (there is: hull)"),
        "{refused}"
    );
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_entered_if_it_may_be() {
    let Some(node) = Node::start().await else {
        return;
    };
    node.told(&["run", "-q", "-d", "--name", "box", "IMAGE", "wait"]);
    let told = node.refused(78, &["debug", "box"]);
    assert!(told.contains("started without one"), "{told}");
    assert!(told.contains("vm.debug = true"), "{told}");
    let told = node.refused(1, &["debug", "none"]);
    assert!(told.contains("there is no pod \"none\""), "{told}");
    node.bring_shell("box");
    let output = node.fed(b"ls; ps\n", &["debug", "box"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, b"ls; ps\n");
    node.told(&["rm", "-f", "box"]);
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_is_kept_is_used_by_pulls() {
    let Some(node) = Node::start().await else {
        return;
    };
    let registry = node.registry();
    let login = ["login", "-u", "user", "--password-stdin", registry];
    let wrong = node.fed(b"wrong\n", &login);
    assert_eq!(wrong.status.code(), Some(77), "{wrong:?}");
    let told = node.refused(77, &["pull", "IMAGE"]);
    assert!(told.contains("access denied"), "{told}");
    let right = node.fed(b"password\n", &login);
    assert!(right.status.success(), "{right:?}");
    let file = node.daemon.dir.path().join("docker/config.json");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(node.told(&["pull", "-q", "IMAGE"]).starts_with("sha256:"));
    node.told(&["images", "rm", "IMAGE"]);
    let ran = node.hull(&["run", "-q", "IMAGE", "exit:4"]);
    assert_eq!(ran.status.code(), Some(4), "{ran:?}");
    let told = node.told(&["logout", registry]);
    assert_eq!(told, format!("logged out of {registry}\n"));
    node.refused(77, &["pull", "IMAGE"]);
    assert_eq!(
        node.told(&["logout", registry]),
        format!("not logged in to {registry}\n")
    );
    let told = node.refused(1, &["login", registry]);
    assert!(told.contains("--password-stdin"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_for_support_has_what_helps_and_no_secrets() {
    let Some(node) = Node::start().await else {
        return;
    };
    let run = [
        "run",
        "-q",
        "-d",
        "--name",
        "web",
        "-e",
        "KEY=hidden-secret",
        "IMAGE",
        "wait",
    ];
    node.told(&run);
    let archive = node.daemon.dir.path().join("support.tar.gz");
    let path = archive.to_str().unwrap();
    assert_eq!(node.told(&["support", "-o", path]), format!("{path}\n"));
    let mode = fs::metadata(&archive).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let told = node.refused(1, &["support", "-o", path]);
    assert!(told.contains("exists"), "{told}");
    let unpacked = Command::new("tar").args(["-xzOf", path]).output().unwrap();
    assert!(unpacked.status.success(), "{unpacked:?}");
    let text = String::from_utf8_lossy(&unpacked.stdout);
    for part in [
        "RuntimeReady",
        "\"name\": \"web\"",
        "\"name\":\"web\"",
        "vm.memory_mib",
        "records ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("hidden-secret"), "{text}");
    assert_eq!(node.told(&["rm", "-f", "web"]), "web\n");
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_is_said_in_a_line() {
    let Some(node) = Node::start().await else {
        return;
    };
    for (code, line) in [
        (125, "exec nobody ls"),
        (125, "attach nobody"),
        (1, "logs nobody"),
        (1, "inspect nobody"),
        (1, "top nobody"),
        (1, "cp nobody:/x /tmp"),
        (1, "stop nobody"),
        (1, "rm -f nobody"),
        (1, "port-forward nobody 80"),
    ] {
        let told = node.refused(code, &line.split(' ').collect::<Vec<_>>());
        assert!(told.contains("no container \"nobody\""), "{line}: {told}");
    }
    for (line, word) in [
        ("run -d --rm IMAGE", "--rm"),
        ("run -it IMAGE", "no terminal"),
        ("run --bogus IMAGE", "no option --bogus"),
        ("run -v /no/such:/x IMAGE", "/no/such"),
        ("run --runtime nothing IMAGE", "nothing"),
        ("--state /tmp/no-daemon run -d IMAGE", "no daemon serves"),
        ("--state /tmp/no-daemon exec x y", "no daemon serves"),
    ] {
        let told = node.refused(125, &line.split(' ').collect::<Vec<_>>());
        assert!(told.contains(word), "{line}: {told}");
    }
    node.daemon.assert_nothing_left();
}
