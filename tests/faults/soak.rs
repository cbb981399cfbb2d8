//! Pods that come and go, and a container that crashes again and again: the node has afterwards what it had
//! before.

use std::{
    env, fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    kind::{Kind, PATIENCE},
    kubelet::{IMAGE, Kubelet, Work},
    left::{Left, children},
    node::Node,
    witness::Witness,
};

/// Pods that are started at once.
const AT_ONCE: usize = 4;
/// What the daemon keeps for what comes next (stacks, arenas) is noise below this.
const MEMORY_NOISE_KIB: i64 = 8 << 10;
/// The pages of a database that are free, or not, at one moment.
const DISK_NOISE_KIB: i64 = 2 << 10;
/// A thread for what blocks ends when it had nothing to do for ten seconds.
const IDLE: Duration = Duration::from_secs(12);

/// How much is done: so many pods and restarts, again and again until so much time has passed.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pods: usize,
    restarts: usize,
    minutes: u64,
}

impl Load {
    /// Thousands, or with real VMs as many as there is time for: `HULL_SOAK_MINUTES`.
    pub fn of_environment() -> Self {
        let minutes = env::var("HULL_SOAK_MINUTES").ok();
        let (pods, restarts) = match Kind::of_environment() {
            Kind::Fake => (1000, 1000),
            Kind::Real => (4, 10),
        };
        Self {
            pods,
            restarts,
            minutes: minutes.and_then(|text| text.parse().ok()).unwrap_or(0),
        }
    }

    /// Enough to see what is left of each.
    pub fn few() -> Self {
        Self {
            pods: 30,
            restarts: 60,
            minutes: 0,
        }
    }
}

/// What the node has.
struct Usage {
    left: Left,
    /// Of the daemon, those that it has not waited for too.
    children: i64,
    descriptors: i64,
    threads: i64,
    memory_kib: i64,
    disk_kib: i64,
}

impl Usage {
    /// Whether there is the same, whatever is in it.
    fn is_as(&self, other: &Self) -> bool {
        self.left == other.left
            && self.children == other.children
            && self.descriptors == other.descriptors
            && self.threads == other.threads
    }

    fn of(node: &Node) -> Result<Self> {
        let proc = Path::new("/proc").join(node.daemon().to_string());
        let count = |name: &str| -> Result<i64> {
            Ok(i64::try_from(fs::read_dir(proc.join(name))?.count())?)
        };
        let rollup = fs::read_to_string(proc.join("smaps_rollup"))?;
        // Its own. How much it has of its program, which others run too, changes with them.
        let pss = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Pss_Anon:"));
        let pss = pss.and_then(|rest| rest.split_ascii_whitespace().next());
        let used = |name: &str| -> Result<i64> {
            let fs = rustix::fs::statvfs(node.dir.join(name))?;
            Ok(i64::try_from(
                (fs.f_blocks - fs.f_bfree) * fs.f_frsize / 1024,
            )?)
        };
        Ok(Self {
            left: node.left(),
            children: i64::try_from(children(node.daemon()))?,
            descriptors: count("fd")?,
            threads: count("task")?,
            memory_kib: pss.context("no PSS")?.parse()?,
            disk_kib: used("root")?,
        })
    }
}

pub async fn soak(load: Load) -> Result<()> {
    let node = Node::start().await?;
    node.pull(IMAGE).await?;
    // What is there once: threads, arenas, templates, the file of records as large as it gets.
    pods(&node, "warm", if node.kind == Kind::Fake { 20 } else { 2 }).await?;
    crash_loop(&node, "warm", 10).await?;
    let before = settled(&node).await?;

    // It is gone when the node is looked at: what writes keeps threads busy.
    let mut witness = Witness::start(&node).await?;
    let begun = Instant::now();
    let (mut ran, mut restarted) = (0, 0);
    loop {
        pods(&node, &format!("soak-{ran}"), load.pods).await?;
        ran += load.pods;
        crash_loop(&node, &format!("crash-{restarted}"), load.restarts).await?;
        restarted += load.restarts;
        if begun.elapsed() >= Duration::from_secs(60 * load.minutes) {
            break;
        }
    }
    witness.ticks(&node).await?;
    node.end(&witness.pod).await?;
    let after = settled(&node).await?;
    println!(
        "{ran} pods and {restarted} restarts in {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    tell(&before, &after)
}

/// What there is when it has not changed for as long as threads wait for work before they end.
async fn settled(node: &Node) -> Result<Usage> {
    let (mut usage, mut since) = (Usage::of(node)?, Instant::now());
    let deadline = since + PATIENCE;
    while since.elapsed() < IDLE && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = Usage::of(node)?;
        if !now.is_as(&usage) {
            since = Instant::now();
        }
        usage = now;
    }
    Ok(usage)
}

/// Pods that come, work and go.
async fn pods(node: &Node, name: &str, count: usize) -> Result<()> {
    let at_once = if node.kind == Kind::Fake { AT_ONCE } else { 2 };
    let one = |number: usize| {
        let (kubelet, name): (Kubelet, _) = ((**node).clone(), format!("{name}-{number}"));
        async move {
            let pod = kubelet
                .run_sandbox(kubelet.sandbox(&name))
                .await
                .context("run a pod")?;
            kubelet.works(&pod).await?;
            kubelet.end(&pod).await?;
            fs::remove_dir_all(&pod.config.log_directory).context("remove its logs")
        }
    };
    stream::iter(0..count)
        .map(one)
        .buffer_unordered(at_once)
        .try_collect()
        .await
}

/// A container that ends, and is removed and made again, as kubelet does with one that crashes.
async fn crash_loop(node: &Node, name: &str, times: usize) -> Result<()> {
    let pod = node.run_sandbox(node.sandbox(name)).await?;
    for attempt in 0..times {
        let mut config = node.container("crash", Work::Ends);
        config.metadata.get_or_insert_default().attempt = u32::try_from(attempt)?;
        let id = node
            .create(&pod, config)
            .await
            .with_context(|| format!("attempt {attempt}"))?;
        node.start_container(&id).await?;
        let status = node.wait_exited(&id, PATIENCE).await?;
        ensure!(
            status.exit_code == crate::kubelet::CODE,
            "it exited with {}",
            status.exit_code
        );
        node.remove_container(&id).await?;
        node.forget_log(&pod, "crash");
    }
    node.end(&pod).await?;
    Ok(fs::remove_dir_all(&pod.config.log_directory)?)
}

fn tell(before: &Usage, after: &Usage) -> Result<()> {
    let beyond = |what: &str| {
        let more = after.left.since(&before.left);
        i64::try_from(more.iter().filter(|name| name.starts_with(what)).count())
    };
    let mut leaks = 0;
    println!("| | before | after | leak |");
    println!("|---|---|---|---|");
    let mut row = |name: &str, before: i64, after: i64, noise: i64| {
        let more = (after - before).max(0);
        let leak = if more > noise { more } else { 0 };
        leaks += usize::from(leak > 0);
        println!("| {name} | {before} | {after} | {leak} |");
    };
    for (name, what) in [
        ("processes of pods", "process"),
        ("mounts", "mount"),
        ("network namespaces", "state/netns"),
        ("links", "link"),
        ("cgroups", "cgroup"),
        ("addresses", "leases"),
        ("records and directories of pods", "state/"),
        ("disks of pods, CNI results", "root/"),
    ] {
        let there = i64::try_from(before.left.count(what))?;
        row(name, there, there + beyond(what)?, 0);
    }
    row("children of the daemon", before.children, after.children, 0);
    row(
        "descriptors of the daemon",
        before.descriptors,
        after.descriptors,
        0,
    );
    row("threads of the daemon", before.threads, after.threads, 0);
    row(
        "memory of the daemon, KiB",
        before.memory_kib,
        after.memory_kib,
        MEMORY_NOISE_KIB,
    );
    row("disk, KiB", before.disk_kib, after.disk_kib, DISK_NOISE_KIB);
    println!("soak: {leaks} leaks");
    if leaks > 0 {
        bail!("{:?}", after.left.since(&before.left));
    }
    Ok(())
}
