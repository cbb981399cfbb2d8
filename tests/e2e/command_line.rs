//! `hull check`, `hull run` and `hull images`, as a person uses them.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use crate::{
    collector::{Collector, ENDPOINT},
    harness::{BUSYBOX, Node},
};

/// Runs `hull` as a client of the node's daemon.
pub fn hull(node: &Node, arguments: &[&str]) -> Output {
    command(node, arguments).output().unwrap()
}

fn command(node: &Node, arguments: &[&str]) -> Command {
    let mut command = Command::new("hull");
    command.args(["--config", node.dir.join("hull.toml").to_str().unwrap()]);
    command.args(arguments);
    command
}

#[tokio::test]
async fn check_finds_that_this_host_can_run_microvms() {
    let node = Node::start().await;
    let output = hull(&node, &["check"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("FAIL"), "{text}");

    std::fs::remove_file(node.dir.join("net.d/10-test.conflist")).unwrap();
    let output = hull(&node, &["check"]);
    assert_eq!(output.status.code(), Some(72));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("FAIL") && text.contains("CNI"), "{text}");
    node.finish().await;
}

// The collector answers while a command is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_passes_streams_and_exit_code_on_and_cleans_up() {
    let traces = tempfile::tempdir().unwrap();
    let collector = Collector::serve(traces.path());
    let endpoint = ENDPOINT.replace("DIR", traces.path().to_str().unwrap());
    let node = Node::start_with(|text| endpoint + &text + "[vm]\ndebug = true\n").await;
    let output = hull(
        &node,
        &[
            "run",
            BUSYBOX,
            "--",
            "/bin/sh",
            "-c",
            "echo hi; uname -r; exit 9",
        ],
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let progress = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(9), "{text}{progress}");
    assert!(text.starts_with("hi\n") && text.contains("-hull"), "{text}");
    assert!(progress.contains("hull: layers 2/2, "), "{progress}");
    node.assert_no_pod_left();

    let mut fed = command(&node, &["run", "-q", BUSYBOX, "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    fed.stdin.take().unwrap().write_all(b"x\n").unwrap();
    let output = fed.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"x\n"[..])
    );
    node.assert_no_pod_left();

    let output = hull(
        &node,
        &[
            "run", "-q", "-d", "--name", "left", BUSYBOX, "sleep", "100000",
        ],
    );
    assert!(output.status.success(), "{}", said(&output));
    let output = hull(&node, &["exec", "left", "sh", "-c", "hostname; exit 3"]);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(3), &b"left\n"[..])
    );
    let output = hull(&node, &["top", "left"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.starts_with(&["1", "0", "0"]) && line.ends_with("sleep 100000")
        }),
        "{text}{}",
        said(&output)
    );
    let (here, back) = (node.dir.join("here"), node.dir.join("back"));
    std::fs::write(&here, "copied").unwrap();
    let [here, back] = [&here, &back].map(|path| path.to_str().unwrap());
    for [from, to] in [[here, "left:/tmp/there"], ["left:/tmp/there", back]] {
        let output = hull(&node, &["cp", from, to]);
        assert!(output.status.success(), "{}", said(&output));
    }
    assert_eq!(std::fs::read_to_string(back).unwrap(), "copied");
    for (code, program) in [(126, "/etc/passwd"), (126, "/bin"), (127, "nope")] {
        let output = hull(&node, &["exec", "left", program]);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(program), "{}", said(&output));
    }
    let mut shell = command(&node, &["debug", "left"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let script = b"cat /proc/1/comm; ps; dmesg | head -n 1; touch /x; ip -o link\n";
    shell.stdin.take().unwrap().write_all(script).unwrap();
    let output = shell.wait_with_output().unwrap();
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    for told in [
        "init\n",
        "sleep 100000",
        "Linux version",
        "Read-only file system",
        "eth0",
    ] {
        assert!(text.contains(told), "no {told:?} in {text}");
    }
    let picture = hull(&node, &["trace", "left"]);
    let svg = String::from_utf8_lossy(&picture.stdout).into_owned();
    for stage in ["cni: bridge ADD", "vmm: kernel", "guest: kernel"] {
        assert!(svg.contains(&format!(">{stage}<")), "{svg}");
    }
    let output = hull(&node, &["rm", "-f", "left"]);
    assert_eq!(output.stdout, b"left\n", "{}", said(&output));
    // Of a real start too: the VMM and the guest tell what they did, within what was waited for them.
    let run = collector
        .span("runtime.v1.RuntimeService/RunPodSandbox")
        .await;
    let spans = collector.spans();
    for [inner, outer] in [
        ["vmm: jail", "spawn"],
        ["vmm: kernel", "vm"],
        ["guest: kernel", "agent"],
    ] {
        let find = |name: &str| {
            let mut spans = spans.iter();
            spans.find(|span| span.name == name && span.trace_id == run.trace_id)
        };
        let (inner, outer) = (find(inner).unwrap(), find(outer).unwrap());
        assert_eq!(inner.parent_span_id, outer.span_id);
        assert!(inner.start_time_unix_nano < inner.end_time_unix_nano);
        // They are measured by two clocks.
        assert!(inner.end_time_unix_nano < outer.end_time_unix_nano + 50_000_000);
    }
    node.assert_no_pod_left();

    let output = hull(&node, &["run", "-q", BUSYBOX, "nope"]);
    assert_eq!(output.status.code(), Some(127), "{}", said(&output));
    node.assert_no_pod_left();
    let output = hull(&node, &["run", "registry.test/demo/absent"]);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("absent"), "{text}");
    node.finish().await;
}

/// What a command said, on both outputs.
pub fn said(output: &Output) -> String {
    let texts = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    texts.concat()
}

/// Runs `hull images` with these arguments, which must succeed; returns its output and what it told
/// beside that and its log.
fn images(node: &Node, arguments: &[&str]) -> (String, String) {
    let output = hull(node, &[&["images"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    let [output, told] = [output.stdout, output.stderr].map(|t| String::from_utf8(t).unwrap());
    let told = told.lines().filter(|line| line.starts_with("hull: "));
    (output, told.map(|line| format!("{line}\n")).collect())
}

/// The words of the line about an image.
fn listed(node: &Node, name: &str) -> Option<Vec<String>> {
    let (list, _) = images(node, &["list"]);
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
    let mut lines = list.lines().map(words);
    lines.find(|words: &Vec<String>| words[0] == name)
}

#[tokio::test]
async fn images_are_pulled_exported_and_run_where_they_were_imported() {
    let node = Node::start().await;
    let (id, progress) = images(&node, &["pull", BUSYBOX]);
    assert!(id.starts_with("sha256:") && id.ends_with('\n'), "{id}");
    let last = progress.lines().last().unwrap();
    let (done, all) = last
        .strip_prefix("hull: layers ")
        .and_then(|text| text.split_once(", "))
        .unwrap_or_else(|| panic!("{progress}"));
    let (count, of) = done.split_once('/').unwrap();
    assert!(count == of && count != "0", "{progress}");
    let (came, of) = all.split_once(" of ").unwrap();
    assert!(came == of && came != "0 B", "{progress}");
    let archive = node.dir.join("busybox.tar");
    let archive = archive.to_str().unwrap();
    images(&node, &["export", BUSYBOX, "--output", archive]);
    assert_eq!(
        images(&node, &["rm", BUSYBOX]),
        (String::new(), String::new())
    );
    let again = hull(&node, &["images", "rm", BUSYBOX]);
    assert!(!again.status.success());
    assert!(said(&again).contains("not found"), "{}", said(&again));

    let name = "imported.example/busybox:1";
    let (imported, _) = images(&node, &["import", archive, "--name", name]);
    assert_eq!(imported, id);
    assert_eq!(listed(&node, BUSYBOX), None);
    assert!(listed(&node, name).is_some());
    // Nobody serves that name: the image is the imported one.
    let run = hull(
        &node,
        &["run", "--quiet", name, "--", "/bin/sh", "-c", "echo hi"],
    );
    assert_eq!(run.stdout, b"hi\n", "{}", said(&run));
    node.finish().await;
}

#[tokio::test]
async fn images_tells_of_containers_that_use_an_image() {
    let node = Node::start().await;
    let pod = node.pod("used").await;
    let line = listed(&node, BUSYBOX).unwrap();
    let [_, id, number, unit, containers] = line.as_slice() else {
        panic!("{line:?}");
    };
    assert_eq!((id.len(), containers.as_str()), (12, "0"), "{line:?}");
    assert!(
        number.parse::<f32>().is_ok() && unit.ends_with("iB"),
        "{line:?}"
    );
    let container = node.run_script(&pod, "main", "sleep 100000").await;
    assert_eq!(listed(&node, BUSYBOX).unwrap()[4], "1");
    let (json, _) = images(&node, &["list", "-o", "json"]);
    assert!(json.contains(r#""containers":1"#), "{json}");
    assert!(
        json.contains("registry.test/demo/busybox@sha256:"),
        "{json}"
    );

    let (_, told) = images(&node, &["rm", id]);
    assert!(told.contains("1 container(s) use it still"), "{told}");
    assert_eq!(listed(&node, BUSYBOX), None);
    let (all, _) = images(&node, &["list", "--all"]);
    let mut removed = all.lines().filter(|line| line.starts_with("(removed)"));
    assert!(removed.any(|line| line.contains(id.as_str())), "{all}");
    let whole = node.exec(&container, "cat /bin/busybox | wc -c").await;
    assert_eq!(whole.exit_code, 0, "{whole:?}");
    node.stop_sandbox(&pod.id).await.unwrap();
    node.remove_sandbox(&pod.id).await.unwrap();
    node.finish().await;
}
