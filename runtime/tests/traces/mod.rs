//! What a collector of traces gets, and the picture of a start.

use std::{
    collections::HashMap, fs, os::unix::net::UnixListener as StdListener, process::Command,
    time::Duration,
};

use hull_proto_cri::v1::*;
use opentelemetry_proto::tonic::{
    common::v1::any_value::Value,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use tonic::Request;

use super::{
    Daemon,
    collector::{Collector, ENDPOINT},
    prompt::Node,
};

const RUNTIME: &str = "runtime.v1.RuntimeService";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A request that says that it belongs to a trace.
fn within<T>(message: T, traceparent: &str) -> Request<T> {
    let mut request = Request::new(message);
    let head = traceparent.parse().unwrap();
    request.metadata_mut().insert("traceparent", head);
    request
}

fn attributes(span: &Span) -> HashMap<&str, String> {
    let value = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let told = span.attributes.iter().filter_map(|attribute| {
        let told = attribute.value.as_ref()?.value.as_ref()?;
        Some((attribute.key.as_str(), value(told)))
    });
    told.collect()
}

fn pod(name: &str) -> RunPodSandboxRequest {
    RunPodSandboxRequest {
        config: Some(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.into(),
                uid: "u-i-d".into(),
                namespace: "shop".into(),
                attempt: 0,
            }),
            ..Default::default()
        }),
        runtime_handler: String::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_goes_from_the_caller_to_the_agent() {
    let Some(daemon) = Daemon::start_with(ENDPOINT).await else {
        return;
    };
    let collector = Collector::serve(daemon.dir.path());
    let mut client = daemon.client.clone();
    let asked = within(pod("web"), &format!("00-{TRACE}-{SPAN}-01"));
    let id = client.run_pod_sandbox(asked).await.unwrap();
    let id = id.into_inner().pod_sandbox_id;

    let run = collector.span(&format!("{RUNTIME}/RunPodSandbox")).await;
    assert_eq!(hex(&run.trace_id), TRACE);
    assert_eq!(hex(&run.parent_span_id), SPAN);
    assert_eq!(run.kind, SpanKind::Server as i32);
    let told = attributes(&run);
    for (key, value) in [
        ("hull.pod.id", id.as_str()),
        ("k8s.pod.name", "web"),
        ("k8s.pod.uid", "u-i-d"),
        ("k8s.namespace.name", "shop"),
        ("rpc.method", "RunPodSandbox"),
        ("rpc.grpc.status_code", "0"),
    ] {
        assert_eq!(
            told.get(key).map(String::as_str),
            Some(value),
            "{key} in {told:?}"
        );
    }
    let spans = collector.spans();
    let find = |id: &[u8]| spans.iter().find(|span| span.span_id == id);
    // A name with those of all stages that it is within.
    let path = |span: &Span| {
        let mut names = vec![span.name.as_str()];
        let mut at = span;
        while let Some(outer) = find(&at.parent_span_id) {
            names.insert(0, &outer.name);
            at = outer;
        }
        names[1..].join("/")
    };
    let paths: Vec<String> = spans.iter().map(path).collect();
    for stage in [
        "turn",
        "network/namespace",
        "network/cni: bridge ADD",
        "network/cni: noter ADD",
        "network/taps",
        "spawn/vmm: greet the VMM",
        "spawn/vmm: jail",
        "scratch",
        "vm/vmm: start the VM",
        "vm/vmm: memory",
        "vm/vmm: devices",
        "agent/agent: greet the guest's agent",
        "agent/guest: kernel",
        "configure/agent: configure the guest",
    ] {
        assert!(
            paths.iter().any(|path| path == stage),
            "no {stage} in {paths:#?}"
        );
    }
    for span in &spans {
        let name = &span.name;
        assert_eq!(hex(&span.trace_id), TRACE, "{name}");
        assert!(
            span.start_time_unix_nano <= span.end_time_unix_nano,
            "{name}"
        );
        // What the VMM and the guest say is within what was waited for them.
        if let Some(outer) = find(&span.parent_span_id) {
            let slack = 50_000_000;
            assert!(
                outer.start_time_unix_nano <= span.start_time_unix_nano + slack,
                "{name}"
            );
            assert!(
                span.end_time_unix_nano <= outer.end_time_unix_nano + slack,
                "{name}"
            );
        }
        assert!(
            span.events.is_empty() && span.trace_state.is_empty(),
            "{name}"
        );
    }
    assert!(!paths.iter().any(|path| path.contains("else")), "{paths:?}");

    // Its caller's trace is not kept, so this is not.
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: id.clone(),
    };
    let unsampled = within(stop, &format!("00-{TRACE}-{SPAN}-00"));
    client.stop_pod_sandbox(unsampled).await.unwrap();
    // These only ask; the second one within a trace.
    let list = ListPodSandboxRequest::default();
    client.list_pod_sandbox(list.clone()).await.unwrap();
    let status = PodSandboxStatusRequest {
        pod_sandbox_id: "none".into(),
        verbose: false,
    };
    let sampled = within(status, &format!("00-{TRACE}-{SPAN}-01"));
    client.pod_sandbox_status(sampled).await.unwrap_err();
    // No trace and no parent are in this.
    let remove = RemovePodSandboxRequest {
        pod_sandbox_id: id.clone(),
    };
    let malformed = within(remove, &format!("00-{TRACE}-{}-01", "0".repeat(16)));
    client.remove_pod_sandbox(malformed).await.unwrap();
    let removed = collector.span(&format!("{RUNTIME}/RemovePodSandbox")).await;
    assert!(removed.parent_span_id.is_empty());
    assert_ne!(hex(&removed.trace_id), TRACE);
    assert_eq!(attributes(&removed)["hull.pod.id"], id);
    let spans = collector.spans();
    let status = spans
        .iter()
        .find(|span| span.name.ends_with("PodSandboxStatus"))
        .unwrap();
    assert_eq!(attributes(status)["rpc.grpc.status_code"], "5");
    for name in ["StopPodSandbox", "ListPodSandbox"] {
        assert!(
            !spans.iter().any(|span| span.name.ends_with(name)),
            "{name}"
        );
    }

    // A failed start says in which stage it failed.
    fs::write(daemon.dir.path().join("bin/noter"), "#!/bin/sh\nexit 1\n").unwrap();
    let asked = within(pod("failing"), &format!("00-{}-{SPAN}-01", "a".repeat(32)));
    client.run_pod_sandbox(asked).await.unwrap_err();
    let failed = loop {
        let ended = |span: &Span| {
            hex(&span.trace_id) == "a".repeat(32) && span.kind == SpanKind::Server as i32
        };
        let spans = collector.spans();
        if spans.iter().any(ended) {
            break spans;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let is_failed = |name: &str| {
        let mut those = failed.iter().filter(|span| span.name == name);
        those.any(|span| {
            span.status
                .as_ref()
                .is_some_and(|status| status.code() == StatusCode::Error)
        })
    };
    assert!(is_failed("cni: noter ADD") && is_failed("network"));
    assert!(!is_failed("cni: bridge ADD") && !is_failed("scratch"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_later_belongs_to_its_call() {
    let Some(node) = Node::start_with(ENDPOINT).await else {
        return;
    };
    let collector = Collector::serve(node.daemon.dir.path());
    let within = |span: &Span| {
        let spans = collector.spans().into_iter();
        let parts = spans.filter(|part| part.trace_id == span.trace_id);
        parts.collect::<Vec<_>>()
    };

    // The answer is a stream that begins at once.
    let login = ["login", "-u", "user", "--password-stdin", node.registry()];
    assert!(node.fed(b"password\n", &login).status.success());
    node.told(&["pull", "-q", "IMAGE"]);
    let pull = collector.span("hull.images.v1.Images/Pull").await;
    assert_eq!(attributes(&pull)["rpc.grpc.status_code"], "0");
    let parts = within(&pull);
    assert!(parts.iter().any(|part| part.name == "layers"));
    let is_later = |part: &Span| part.end_time_unix_nano > pull.end_time_unix_nano;
    assert!(!parts.iter().any(is_later), "{parts:#?}");

    // A container that does not end by itself is killed when its time is over.
    node.told(&["run", "-q", "-d", "--name", "box", "IMAGE", "trap", "wait"]);
    node.told(&["stop", "-t", "1", "box"]);
    let stop = collector.span(&format!("{RUNTIME}/StopContainer")).await;
    let signals = within(&stop).into_iter();
    let signals = signals.filter(|part| part.name == "agent: signal the container in the guest");
    assert_eq!(signals.count(), 2);
    assert_eq!(node.told(&["rm", "box"]), "box\n");
    node.daemon.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_not_there_or_hangs_costs_no_call_anything() {
    for hangs in [false, true] {
        let Some(mut daemon) = Daemon::start_with(ENDPOINT).await else {
            return;
        };
        let socket = daemon.dir.path().join("otlp.sock");
        let _listens_and_never_answers = hangs.then(|| StdListener::bind(socket).unwrap());
        for name in ["one", "two"] {
            let id = daemon.run(name, None).await;
            daemon.end(&id).await;
        }
        let pid = daemon.child.id().to_string();
        let log = daemon.dir.path().join("log");
        if !hangs {
            let lost = "the collector takes no traces";
            while !fs::read_to_string(&log).unwrap().contains(lost) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        // What waits to be sent is given up.
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
        assert!(daemon.child.wait().unwrap().success());
        if hangs {
            let log = fs::read_to_string(log).unwrap();
            assert!(log.contains("the last traces are lost"), "{log}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_is_drawn_by_stage() {
    let Some(daemon) = Daemon::start().await else {
        return;
    };
    let id = daemon.run("<web>", None).await;
    let config = daemon.dir.path().join("hull.toml");
    let trace = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_hull"))
            .arg("--config")
            .arg(&config)
            .arg("trace")
            .args(arguments)
            .output()
            .unwrap()
    };
    let drawn = trace(&["default/<web>"]);
    let svg = String::from_utf8(drawn.stdout).unwrap();
    assert!(drawn.status.success(), "{:?}", drawn.stderr);
    assert!(
        svg.starts_with("<svg ") && svg.ends_with("</svg>\n"),
        "{svg}"
    );
    for text in [
        "default/&lt;web&gt; (",
        ">network<",
        ">cni: bridge ADD<",
        ">vmm: memory<",
        ">agent: configure the guest<",
    ] {
        assert!(svg.contains(text), "no {text} in {svg}");
    }
    let file = daemon.dir.path().join("start.svg");
    let written = trace(&[&id[..12], "-o", file.to_str().unwrap()]);
    assert!(written.status.success() && written.stdout.is_empty());
    assert_eq!(fs::read_to_string(file).unwrap(), svg);
    let unknown = trace(&["nope"]);
    let told = String::from_utf8(unknown.stderr).unwrap();
    assert!(!unknown.status.success());
    assert!(told.starts_with("hull: there is no pod \"nope\""), "{told}");
    daemon.end(&id).await;
    daemon.assert_nothing_left();
}
