//! The load of node.sh: starts pods as kubelet does, calls the daemon, and prints what that took.
//!
//!     node-load DIR PID COUNT...
//!
//! `DIR` has the daemon's state (`state/hull.sock`), `PID` is the daemon; it is measured with each
//! `COUNT` of pods in turn.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    env, fs,
    future::Future,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use hull_proto_cri::v1::*;
use hull_tests::client::{Client, image};

const CONTAINERS: usize = 3;
/// Pods that are started at once.
const AT_ONCE: usize = 6;
/// What pods left behind when they were started is done with after this.
const SETTLED: Duration = Duration::from_secs(10);
/// Calls about one object.
const CALLS: usize = 500;
/// Calls for a list.
const LISTS: usize = 30;
/// A single-object call may take this much longer among the most pods than among the fewest.
const SINGLE: f64 = 1.5;
/// A list of ten times the pods may take ten times as long; so much is noise.
const NOISE: f64 = 1.2;
/// The most that a pod may cost the daemon.
const PER_POD_KIB: f64 = 200.0;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let dir = PathBuf::from(arguments.next().context("no directory")?);
    let daemon: u32 = arguments.next().context("no process id")?.parse()?;
    let counts = arguments
        .map(|count| count.parse())
        .collect::<Result<Vec<usize>, _>>()?;
    ensure!(!counts.is_empty(), "no number of pods");

    let socket = dir.join("state/hull.sock");
    let client = Client::connect_within(&socket, Duration::from_secs(10)).await?;
    let mut node = Node {
        client,
        dir,
        daemon,
        pods: Vec::new(),
    };
    // What is there once, whatever the number of pods.
    node.grow(1).await?;
    tokio::time::sleep(SETTLED).await;
    let empty = Process::look(daemon)?;
    let mut rows = Vec::new();
    for count in counts {
        let begun = Instant::now();
        node.grow(count).await?;
        eprintln!("{count} pods are up after {:?}", begun.elapsed());
        tokio::time::sleep(SETTLED).await;
        rows.push(node.measure(&empty).await?);
    }
    print(&rows);
    Ok(())
}

/// The node, as kubelet knows it.
struct Node {
    client: Client,
    dir: PathBuf,
    daemon: u32,
    pods: Vec<Pod>,
}

#[derive(Clone)]
struct Pod {
    id: String,
    containers: Vec<String>,
}

impl Node {
    /// Starts pods until there are so many.
    async fn grow(&mut self, count: usize) -> Result<()> {
        let new: Vec<Pod> = stream::iter(self.pods.len()..count)
            .map(|number| start(&self.client, &self.dir, number))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        self.pods.extend(new);
        Ok(())
    }

    async fn measure(&self, empty: &Process) -> Result<Row> {
        let idle = Process::look(self.daemon)?;
        let mut figures = Vec::new();
        let pods = self.pods.len();
        // All pods in turn, those next to each other not next to each other in the daemon.
        let pod = |call: usize| &self.pods[call * 7919 % pods];

        let runtime = || self.client.runtime.clone();
        let call = async |n: usize| Ok(self.client.pod_status(&pod(n).id).await.map(drop)?);
        figures.push(Figure::of("PodSandboxStatus", Kind::Single, CALLS, call).await?);

        let call = async |n: usize| {
            let id = &pod(n).containers[n % CONTAINERS];
            Ok(self.client.container_status(id).await.map(drop)?)
        };
        figures.push(Figure::of("ContainerStatus", Kind::Single, CALLS, call).await?);

        let call = async |n: usize| {
            let filter = ContainerFilter {
                pod_sandbox_id: pod(n).id.clone(),
                ..Default::default()
            };
            self.containers(Some(filter), CONTAINERS).await
        };
        let name = "ListContainers of a pod";
        figures.push(Figure::of(name, Kind::Single, CALLS, call).await?);

        let call = async |_| self.sandboxes(pods).await;
        figures.push(Figure::of("ListPodSandbox", Kind::List, LISTS, call).await?);

        let call = async |_| self.containers(None, pods * CONTAINERS).await;
        figures.push(Figure::of("ListContainers", Kind::List, LISTS, call).await?);

        let call = async |_| {
            self.sandboxes(pods).await?;
            self.containers(None, pods * CONTAINERS).await
        };
        figures.push(Figure::of("relist", Kind::List, LISTS, call).await?);

        let call = async |_| {
            let request = ListPodSandboxStatsRequest { filter: None };
            let answer = runtime().list_pod_sandbox_stats(request).await?;
            let all = answer.into_inner().stats;
            let told = |stats: &&PodSandboxStats| {
                let linux = stats.linux.as_ref();
                linux.is_some_and(|linux| linux.containers.len() == CONTAINERS)
            };
            complete("ListPodSandboxStats", all.iter().filter(told).count(), pods)
        };
        figures.push(Figure::of("ListPodSandboxStats", Kind::List, LISTS / 3, call).await?);

        let call = async |_| {
            let request = ListContainerStatsRequest { filter: None };
            let answer = runtime().list_container_stats(request).await?;
            let told = answer.into_inner().stats.len();
            complete("ListContainerStats", told, pods * CONTAINERS)
        };
        figures.push(Figure::of("ListContainerStats", Kind::List, LISTS / 3, call).await?);

        Ok(Row {
            pods,
            figures,
            idle: idle.beyond(empty, pods - 1),
            busy: Process::look(self.daemon)?.beyond(empty, pods - 1),
        })
    }

    async fn sandboxes(&self, expected: usize) -> Result<()> {
        let told = self.client.sandboxes().await?.len();
        complete("ListPodSandbox", told, expected)
    }

    async fn containers(&self, filter: Option<ContainerFilter>, expected: usize) -> Result<()> {
        let told = self.client.containers(filter).await?.len();
        complete("ListContainers", told, expected)
    }
}

/// A list that leaves out what there is would be quick.
fn complete(call: &str, told: usize, expected: usize) -> Result<()> {
    ensure!(told == expected, "{call}: {told} of {expected}");
    Ok(())
}

/// Starts a pod and its containers.
async fn start(client: &Client, dir: &Path, number: usize) -> Result<Pod> {
    let uid = format!("00000000-0000-4000-8000-{number:012}");
    let name = format!("web-7d4b9c6f5d-{number:05}");
    let files = kubelet_files(dir, &uid)?;
    let metadata = PodSandboxMetadata {
        name: name.clone(),
        uid: uid.clone(),
        namespace: "production".into(),
        attempt: 0,
    };
    let labels = map(&[
        ("app.kubernetes.io/name", "web"),
        ("app.kubernetes.io/part-of", "shop"),
        ("pod-template-hash", "7d4b9c6f5d"),
        ("io.kubernetes.pod.name", &name),
        ("io.kubernetes.pod.namespace", "production"),
        ("io.kubernetes.pod.uid", &uid),
    ]);
    let annotations = map(&[
        (
            "kubernetes.io/config.seen",
            "2026-01-01T00:00:00.000000000Z",
        ),
        ("kubernetes.io/config.source", "api"),
        ("prometheus.io/scrape", "true"),
        ("prometheus.io/port", "9090"),
    ]);
    let config = PodSandboxConfig {
        metadata: Some(metadata),
        hostname: name.clone(),
        log_directory: dir
            .join(format!("logs/production_{name}_{uid}"))
            .display()
            .to_string(),
        dns_config: Some(DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: [
                "production.svc.cluster.local",
                "svc.cluster.local",
                "cluster.local",
            ]
            .map(String::from)
            .into(),
            options: vec!["ndots:5".into()],
        }),
        labels,
        annotations,
        linux: Some(LinuxPodSandboxConfig::default()),
        ..Default::default()
    };
    let pod = client.run_sandbox(config).await?;
    let mut containers = Vec::new();
    for name in ["app", "proxy", "logger"] {
        let id = client.create(&pod, container(name, &uid, &files)).await?;
        client.start_container(&id).await?;
        containers.push(id);
    }
    let id = pod.id;
    Ok(Pod { id, containers })
}

/// The directory of a pod, as kubelet makes it.
fn kubelet_files(dir: &Path, uid: &str) -> Result<PathBuf> {
    let pod = dir.join("kubelet/pods").join(uid);
    let volume = pod.join("volumes/kubernetes.io~projected/kube-api-access");
    let version = volume.join("..2026_01_01");
    fs::create_dir_all(&version)?;
    fs::write(version.join("token"), "x".repeat(1000))?;
    symlink("..2026_01_01", volume.join("..data"))?;
    symlink("..data/token", volume.join("token"))?;
    fs::write(pod.join("etc-hosts"), "127.0.0.1 localhost\n")?;
    for name in ["app", "proxy", "logger"] {
        fs::create_dir_all(pod.join("containers").join(name))?;
        fs::write(pod.join("containers").join(name).join("1"), "")?;
    }
    Ok(pod)
}

fn container(name: &str, uid: &str, files: &Path) -> ContainerConfig {
    let mount = |container_path: &str, host_path: &str, readonly: bool| Mount {
        container_path: container_path.into(),
        host_path: files.join(host_path).display().to_string(),
        readonly,
        ..Default::default()
    };
    let volume = "volumes/kubernetes.io~projected/kube-api-access";
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let log = format!("containers/{name}/1");
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(image("bench.local/app:1")),
        // What fake-vmm does is in the arguments.
        command: vec!["wait".into()],
        envs: (0..15)
            .map(|n| KeyValue {
                key: format!("SHOP_BACKEND_{n}_PORT_8080_TCP_ADDR"),
                value: format!("10.96.{n}.17").into(),
            })
            .collect(),
        mounts: vec![
            mount(account, volume, true),
            mount("/etc/hosts", "etc-hosts", false),
            mount("/dev/termination-log", &log, false),
        ],
        labels: map(&[
            ("io.kubernetes.container.name", name),
            ("io.kubernetes.pod.name", "web-7d4b9c6f5d"),
            ("io.kubernetes.pod.namespace", "production"),
            ("io.kubernetes.pod.uid", uid),
        ]),
        annotations: map(&[
            ("io.kubernetes.container.hash", "5ca1ab1e"),
            ("io.kubernetes.container.restartCount", "0"),
            (
                "io.kubernetes.container.terminationMessagePath",
                "/dev/termination-log",
            ),
            ("io.kubernetes.container.terminationMessagePolicy", "File"),
            ("io.kubernetes.pod.terminationGracePeriod", "30"),
        ]),
        log_path: format!("{name}/0.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                cpu_shares: 102,
                oom_score_adj: 999,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).into(), (*value).into()))
        .collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// About one object, whatever else there is.
    Single,
    /// About all.
    List,
}

/// How long a call took.
struct Figure {
    name: &'static str,
    kind: Kind,
    median_us: f64,
    p95_us: f64,
}

impl Figure {
    async fn of<F: Future<Output = Result<()>>>(
        name: &'static str,
        kind: Kind,
        calls: usize,
        call: impl Fn(usize) -> F,
    ) -> Result<Self> {
        let mut times = Vec::new();
        for n in 0..calls {
            let begun = Instant::now();
            call(n).await?;
            times.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        times.sort_by(f64::total_cmp);
        Ok(Self {
            name,
            kind,
            median_us: times[calls / 2],
            p95_us: times[calls * 95 / 100],
        })
    }
}

/// What the daemon has.
struct Process {
    pss_kib: f64,
    descriptors: f64,
    threads: f64,
}

impl Process {
    fn look(pid: u32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let rollup = fs::read_to_string(proc.join("smaps_rollup"))?;
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let pss = pss.and_then(|rest| rest.split_ascii_whitespace().next());
        let count =
            |name: &str| -> Result<f64> { Ok(fs::read_dir(proc.join(name))?.count() as f64) };
        Ok(Self {
            pss_kib: pss.context("no PSS")?.parse()?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// What each of so many pods adds; threads are all that there are.
    fn beyond(self, empty: &Self, pods: usize) -> Self {
        let pods = pods as f64;
        Self {
            pss_kib: (self.pss_kib - empty.pss_kib) / pods,
            descriptors: (self.descriptors - empty.descriptors) / pods,
            threads: self.threads,
        }
    }
}

/// The figures with one number of pods.
struct Row {
    pods: usize,
    figures: Vec<Figure>,
    /// Before the calls, and after them.
    idle: Process,
    busy: Process,
}

fn print(rows: &[Row]) {
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
        return;
    };
    let line = |name: &str, value: &dyn Fn(&Row) -> f64| {
        let cells: Vec<String> = rows
            .iter()
            .map(|row| format!("{:.0}", value(row)))
            .collect();
        let ratio = value(last) / value(first);
        println!("| {name} | {} | {ratio:.2} |", cells.join(" | "));
    };
    let heads: Vec<String> = rows
        .iter()
        .map(|row| format!("{} pods", row.pods))
        .collect();
    println!("| | {} | last / first |", heads.join(" | "));
    println!("|---|{}---|", "---|".repeat(rows.len()));
    for (at, figure) in first.figures.iter().enumerate() {
        let name = figure.name;
        line(&format!("{name}, median, µs"), &|row| {
            row.figures[at].median_us
        });
        line(&format!("{name}, p95, µs"), &|row| row.figures[at].p95_us);
    }
    line("memory per pod before the calls, KiB (PSS)", &|row| {
        row.idle.pss_kib
    });
    line("memory per pod after the calls, KiB (PSS)", &|row| {
        row.busy.pss_kib
    });
    line("file descriptors per pod", &|row| row.idle.descriptors);
    line("threads before the calls", &|row| row.idle.threads);
    line("threads after the calls", &|row| row.busy.threads);
    println!();

    for (at, figure) in first.figures.iter().enumerate() {
        let ratio = |row: &Row| last.figures[at].median_us / row.figures[at].median_us;
        // Few objects cost little more than the call, so lists are compared with a middling one.
        let (from, most) = match (figure.kind, rows.iter().rev().nth(1)) {
            (Kind::List, Some(before)) => (before, last.pods as f64 / before.pods as f64 * NOISE),
            _ => (first, SINGLE),
        };
        tell(figure.name, last.figures[at].median_us, ratio(from), most);
    }
    for (name, process) in [("memory-before", &last.idle), ("memory-after", &last.busy)] {
        tell(name, process.pss_kib, process.pss_kib / PER_POD_KIB, 1.0);
    }
}

fn tell(name: &str, value: f64, ratio: f64, most: f64) {
    let name = name.replace(' ', "-");
    let word = if ratio <= most { "held" } else { "SHORT" };
    println!(
        "bench node-{name} hull={value:.0} peer=none ratio={ratio:.2} target={most:.2} {word}"
    );
}
