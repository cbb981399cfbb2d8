//! What else goes wrong: the host lacks something, or something hangs, or was lost.

use std::{
    fs,
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use hull_proto_cri::v1::{ContainerState, StatusRequest};
use rustix::process::Signal;
use tokio::time::timeout;

use crate::{
    kind::PATIENCE,
    kubelet::{Kubelet, OTHER, Work},
    left,
    node::{HANG, Node, PASSES},
    points::Pods,
    process::{run, signal},
    witness::Witness,
};

/// How long a call may take that another one's trouble must not hold up.
const SOON: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostFault {
    FullDisk,
    FullDiskInPull,
    FullLogs,
    NoDescriptors,
    NoProcesses,
    NoMemory,
    VmmStopped,
    FilesStopped,
    DaemonStopped,
    HungAdd,
    HungDel,
    HungRegistry,
    StoreGarbage,
    StoreEmpty,
    StoreCut,
    ImagesGarbage,
    OlderRecords,
    NewerRecord,
    AgentKilled,
    ClockAhead,
    ClockBehind,
    Reboot,
}

pub const ALL: [HostFault; 22] = [
    HostFault::FullDisk,
    HostFault::FullDiskInPull,
    HostFault::FullLogs,
    HostFault::NoDescriptors,
    HostFault::NoProcesses,
    HostFault::NoMemory,
    HostFault::VmmStopped,
    HostFault::FilesStopped,
    HostFault::DaemonStopped,
    HostFault::HungAdd,
    HostFault::HungDel,
    HostFault::HungRegistry,
    HostFault::StoreGarbage,
    HostFault::StoreEmpty,
    HostFault::StoreCut,
    HostFault::ImagesGarbage,
    HostFault::OlderRecords,
    HostFault::NewerRecord,
    HostFault::AgentKilled,
    HostFault::ClockAhead,
    HostFault::ClockBehind,
    HostFault::Reboot,
];

impl HostFault {
    pub fn name(self) -> &'static str {
        match self {
            Self::FullDisk => "full disk below root",
            Self::FullDiskInPull => "disk below root that fills in a pull",
            Self::FullLogs => "full disk of logs",
            Self::NoDescriptors => "EMFILE of hull",
            Self::NoProcesses => "no pids for hull",
            Self::NoMemory => "no memory for hull",
            Self::VmmStopped => "SIGSTOP of hull-vmm",
            Self::FilesStopped => "SIGSTOP of hull-fs",
            Self::DaemonStopped => "SIGSTOP of hull",
            Self::HungAdd => "hung CNI plugin in ADD",
            Self::HungDel => "hung CNI plugin in DEL",
            Self::HungRegistry => "hung registry",
            Self::StoreGarbage => "records: garbage",
            Self::StoreEmpty => "records: empty file",
            Self::StoreCut => "records: cut in half",
            Self::ImagesGarbage => "records of images: garbage",
            Self::OlderRecords => "records of an older form",
            Self::NewerRecord => "record of a newer form",
            Self::AgentKilled => "kill -9 of hull-agent and SIGSTOP of hull",
            Self::ClockAhead => "clock jumps ahead",
            Self::ClockBehind => "clock jumps back",
            Self::Reboot => "host reboots",
        }
    }

    /// Whether half a minute or more has to pass in it.
    pub fn is_slow(self) -> bool {
        matches!(self, Self::VmmStopped | Self::FilesStopped)
    }

    /// Whether this machine can have it.
    pub fn is_possible(self) -> bool {
        match self {
            Self::NoProcesses => Cgroup::of("pids").is_some(),
            Self::NoMemory => Cgroup::of("memory").is_some(),
            _ => true,
        }
    }

    /// Has it happen, and mends it.
    pub async fn happens(
        self,
        node: &mut Node,
        pods: &mut Pods,
        witness: &mut Witness,
    ) -> Result<()> {
        match self {
            Self::FullDisk => full_disk(node, pods).await,
            Self::FullDiskInPull => full_disk_in_pull(node).await,
            Self::FullLogs => full_logs(node, pods, witness).await,
            Self::NoDescriptors => no_descriptors(node, witness).await,
            Self::NoProcesses => in_cgroup(node, witness, "pids").await,
            Self::NoMemory => in_cgroup(node, witness, "memory").await,
            Self::VmmStopped => vmm_stopped(node, witness).await,
            Self::FilesStopped => files_stopped(node, witness).await,
            Self::DaemonStopped => daemon_stopped(node, witness).await,
            Self::HungAdd => hung_add(node, witness).await,
            Self::HungDel => hung_del(node, witness).await,
            Self::HungRegistry => hung_registry(node, witness).await,
            Self::StoreGarbage => {
                broken(node, witness, "root/hull.redb", |_| b"no records".to_vec()).await
            }
            Self::StoreEmpty => broken(node, witness, "root/hull.redb", |_| Vec::new()).await,
            Self::StoreCut => {
                broken(node, witness, "root/hull.redb", |all| {
                    all[..all.len() / 2].to_vec()
                })
                .await
            }
            Self::ImagesGarbage => images_broken(node, pods, witness).await,
            Self::OlderRecords => older(node, witness).await,
            Self::NewerRecord => newer(node, witness).await,
            Self::AgentKilled => agent_killed(node, witness).await,
            Self::ClockAhead => clock(node, witness, 3600).await,
            Self::ClockBehind => clock(node, witness, -3600).await,
            Self::Reboot => reboot(node, pods, witness).await,
        }
    }
}

/// A cgroup for the daemon, in which one thing is limited.
struct Cgroup {
    path: PathBuf,
    max: &'static str,
    current: &'static str,
    /// What is written for no limit.
    unlimited: &'static str,
}

impl Cgroup {
    /// Where it is in this machine; none: it has no such cgroups.
    fn of(controller: &str) -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let (root, max, current, unlimited) = match controller {
            _ if root.join("cgroup.controllers").exists() => {
                let control = root.join("cgroup.subtree_control");
                let _ = fs::write(control, format!("+{controller}"));
                match controller {
                    "pids" => (root.to_owned(), "pids.max", "pids.current", "max"),
                    _ => (root.to_owned(), "memory.max", "memory.current", "max"),
                }
            }
            "pids" => (root.join("pids"), "pids.max", "pids.current", "max"),
            _ => (
                root.join("memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "-1",
            ),
        };
        root.join("cgroup.procs").exists().then(|| Self {
            path: root.join("hull-faults-daemon"),
            max,
            current,
            unlimited,
        })
    }

    fn limit(&self, most: &str) -> Result<()> {
        let path = self.path.join(self.max);
        fs::write(&path, most).with_context(|| format!("write {}", path.display()))
    }

    /// Puts a process into it, which may have so much more than it has.
    fn confine(&self, pid: u32, more: u64) -> Result<()> {
        fs::create_dir_all(&self.path)?;
        fs::write(self.path.join("cgroup.procs"), pid.to_string())?;
        let now: u64 = fs::read_to_string(self.path.join(self.current))?
            .trim()
            .parse()?;
        self.limit(&(now + more).to_string())
    }
}

/// A pod that comes, works and goes.
async fn pod_comes_and_goes(node: &Node, name: &str) -> Result<()> {
    let pod = node
        .run_sandbox(node.sandbox(name))
        .await
        .context("run a pod")?;
    node.works(&pod).await?;
    node.end(&pod).await
}

/// Fills a file system; returns how long the file is.
fn fill(path: &Path) -> Result<u64> {
    let mut file = fs::File::create(path)?;
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
    Ok(file.metadata()?.len())
}

async fn full_disk(node: &mut Node, pods: &mut Pods) -> Result<()> {
    let shared = pods.shared(node).await?;
    let filler = node.dir.join("root/filler");
    fill(&filler)?;
    let mut refused = 0;
    for number in 0..2 {
        let config = node.sandbox(&format!("full-{number}"));
        match node.run_sandbox(config.clone()).await {
            Ok(pod) => node.end(&pod).await?,
            Err(_) => refused += 1,
        }
        let created = node
            .create(
                &shared,
                node.container(&format!("full-{number}"), Work::Waits),
            )
            .await;
        match created {
            Ok(id) => node.remove_container(&id).await?,
            Err(_) => refused += 1,
        }
        match node.pull(OTHER).await {
            Ok(_) => node.remove_image(OTHER).await?,
            Err(_) => refused += 1,
        }
    }
    fs::remove_file(filler)?;
    ensure!(refused > 0, "nothing was refused on a full disk");
    // Without another daemon.
    pod_comes_and_goes(node, "after-full").await?;
    node.works(&shared).await?;
    node.pull(OTHER).await.context("pull afterwards")?;
    Ok(node.remove_image(OTHER).await?)
}

/// Each pull comes a little further.
async fn full_disk_in_pull(node: &mut Node) -> Result<()> {
    let filler = node.dir.join("root/filler");
    let (mut refused, mut pulled) = (0, 0);
    for room in (3..13).map(|shift| 1024 << shift) {
        let length = fill(&filler)?;
        let file = fs::File::options().write(true).open(&filler)?;
        file.set_len(length.saturating_sub(room))?;
        match node.pull(OTHER).await {
            Ok(_) => pulled += 1,
            Err(_) => refused += 1,
        }
        drop(file);
        fs::remove_file(&filler)?;
        node.pull(OTHER).await.context("pull afterwards")?;
        node.remove_image(OTHER).await?;
    }
    ensure!(
        refused > 0 && pulled > 0,
        "{refused} pulls were refused, {pulled} were not"
    );
    Ok(())
}

async fn full_logs(node: &mut Node, pods: &mut Pods, witness: &mut Witness) -> Result<()> {
    let shared = pods.shared(node).await?;
    let id = node
        .create(&shared, node.container("full", Work::EndsLater))
        .await?;
    let filler = node.dir.join("logs/filler");
    fill(&filler)?;
    node.start_container(&id).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let soon = timeout(SOON, node.exec(&witness.container)).await;
    soon.context("a command, while logs are full")??;
    fs::remove_file(filler)?;
    node.ended_well(&shared, "full", &id).await?;
    node.remove_container(&id).await?;
    node.forget_log(&shared, "full");
    witness.ticks(node).await
}

async fn no_descriptors(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let pid = node.daemon();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .context("a limit")?;
    let most = line.split_ascii_whitespace().nth(4).context("a limit")?;
    let limit = |soft: &str| {
        run(Command::new("prlimit")
            .arg(format!("--pid={pid}"))
            .arg(format!("--nofile={soft}:{most}")))
    };
    let open = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let mut refused = 0;
    for more in [0, 3, 8, 14] {
        limit(&(open + more).to_string())?;
        let config = node.sandbox(&format!("descriptors-{more}"));
        let ran = timeout(PATIENCE, node.run_sandbox(config.clone())).await;
        limit(most)?;
        refused += usize::from(ran.context("a pod without descriptors")?.is_err());
        let pod = node.run_again(&config).await?;
        node.end(&pod).await?;
    }
    ensure!(refused > 0, "nothing was refused without descriptors");
    pod_comes_and_goes(node, "after-descriptors").await?;
    witness.look(node).await
}

/// The daemon is in a cgroup of its own that allows little more than it has.
async fn in_cgroup(node: &mut Node, witness: &mut Witness, controller: &str) -> Result<()> {
    let own = Cgroup::of(controller).context("a cgroup")?;
    let more = if controller == "memory" { 1 << 20 } else { 1 };
    own.confine(node.daemon(), more)?;
    let config = node.sandbox(controller);
    // It succeeds or fails, or the daemon ends.
    let _ = timeout(PATIENCE, node.run_sandbox(config.clone())).await;
    own.limit(own.unlimited)?;
    if node.connect().await.is_err() {
        node.restart().await?;
    }
    let pod = node.run_again(&config).await?;
    node.works(&pod).await?;
    node.end(&pod).await?;
    witness.look(node).await?;
    node.restart().await?;
    for _ in 0..100 {
        if fs::remove_dir(&own.path).is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("the daemon's cgroup is still used")
}

async fn vmm_stopped(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let pod = node.run_sandbox(node.sandbox("stopped")).await?;
    let id = node
        .create(&pod, node.container("waits", Work::Waits))
        .await?;
    node.start_container(&id).await?;
    for pid in node.vmms(&pod.id) {
        signal(pid, Signal::STOP)?;
    }
    let begun = Instant::now();
    timeout(SOON, node.is_ready(&pod))
        .await
        .context("a status")??;
    timeout(SOON, node.exec(&witness.container))
        .await
        .context("another pod's command")??;
    ensure!(begun.elapsed() < SOON, "a stopped VM holds up others");
    // The next daemon has it too.
    timeout(PATIENCE, node.restart())
        .await
        .context("the next daemon")??;
    timeout(PATIENCE, node.end(&pod))
        .await
        .context("its end")??;
    pod_comes_and_goes(node, "stopped").await
}

async fn files_stopped(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let pod = node.run_sandbox(node.sandbox("stopped")).await?;
    node.works(&pod).await?;
    for pid in node.file_servers(&pod.id) {
        signal(pid, Signal::STOP)?;
    }
    let kubelet: Kubelet = (**node).clone();
    let (asked, config) = (pod.clone(), node.container("waits", Work::Waits));
    let creation = tokio::spawn(async move { kubelet.create(&asked, config).await });
    timeout(SOON, node.exec(&witness.container))
        .await
        .context("another pod's command")??;
    timeout(SOON, node.is_ready(&pod))
        .await
        .context("a status")??;
    timeout(PATIENCE, node.end(&pod))
        .await
        .context("its end")??;
    let _ = timeout(PATIENCE, creation)
        .await
        .context("the creation's end")?;
    pod_comes_and_goes(node, "stopped").await
}

async fn daemon_stopped(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let pod = node.run_sandbox(node.sandbox("meanwhile")).await?;
    let id = node
        .create(&pod, node.container("meanwhile", Work::EndsLater))
        .await?;
    node.start_container(&id).await?;
    signal(node.daemon(), Signal::STOP)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    signal(node.daemon(), Signal::CONT)?;
    node.ended_well(&pod, "meanwhile", &id).await?;
    node.end(&pod).await?;
    witness.ticks(node).await
}

async fn hung_add(node: &mut Node, witness: &mut Witness) -> Result<()> {
    node.hang_plugins(true)?;
    let (kubelet, config): (Kubelet, _) = ((**node).clone(), node.sandbox("hung"));
    let asked = config.clone();
    let hung = tokio::spawn(async move { kubelet.run_sandbox(asked).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    ensure!(!hung.is_finished(), "the plugin does not hang");
    timeout(SOON, node.exec(&witness.container))
        .await
        .context("another pod's command")??;
    node.hang_plugins(false)?;
    // Killed while it waits for the plugin.
    node.kill_daemon();
    let _ = hung.await;
    kill_plugins(node);
    // DEL of the same plugin would hang for its whole minute.
    fs::write(node.dir.join("bin/hang"), PASSES)?;
    timeout(PATIENCE, node.start_daemon())
        .await
        .context("the next daemon")??;
    fs::write(node.dir.join("bin/hang"), HANG)?;
    let pod = node.run_again(&config).await?;
    node.works(&pod).await?;
    node.end(&pod).await
}

async fn hung_del(node: &mut Node, witness: &mut Witness) -> Result<()> {
    node.hang_plugins(true)?;
    fs::write(node.dir.join("bin/hang"), PASSES)?;
    let pod = node.run_sandbox(node.sandbox("hung-del")).await?;
    fs::write(node.dir.join("bin/hang"), HANG)?;
    let (kubelet, id): (Kubelet, _) = ((**node).clone(), pod.id.clone());
    let hung = tokio::spawn(async move { kubelet.stop_sandbox(&id).await });
    let deadline = Instant::now() + PATIENCE;
    while !kill_plugins(node) {
        ensure!(!hung.is_finished(), "the plugin does not hang");
        ensure!(Instant::now() < deadline, "the plugin is not called");
        timeout(SOON, node.exec(&witness.container))
            .await
            .context("another pod's command")??;
    }
    // kubelet's retry, and the daemon's own.
    fs::write(node.dir.join("bin/hang"), PASSES)?;
    let _ = timeout(PATIENCE, hung).await.context("the stop's end")?;
    timeout(PATIENCE, node.end(&pod))
        .await
        .context("its end")??;
    fs::write(node.dir.join("bin/hang"), HANG)?;
    node.hang_plugins(false)?;
    pod_comes_and_goes(node, "after-hung-del").await
}

/// Kills plugins that hang; whether there were any.
fn kill_plugins(node: &Node) -> bool {
    let plugins = left::processes(&node.dir);
    let mut hung = plugins
        .iter()
        .filter(|(_, line)| line.contains("bin/hang"))
        .peekable();
    let were_any = hung.peek().is_some();
    for (pid, _) in hung {
        let _ = signal(*pid, Signal::KILL);
    }
    were_any
}

async fn hung_registry(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let mute = TcpListener::bind("127.0.0.1:5001")?;
    let kubelet: Kubelet = (**node).clone();
    let hung = tokio::spawn(async move { kubelet.pull("mute.test/demo/busybox:latest").await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    ensure!(!hung.is_finished(), "the registry does not hang");
    timeout(SOON, node.exec(&witness.container))
        .await
        .context("a pod's command")??;
    timeout(SOON, node.pull(OTHER))
        .await
        .context("another pull")??;
    node.remove_image(OTHER).await?;
    node.restart().await?;
    let _ = hung.await;
    drop(mute);
    pod_comes_and_goes(node, "after-hung").await
}

/// The file of records is replaced while there is no daemon.
async fn broken(
    node: &mut Node,
    witness: &mut Witness,
    name: &str,
    change: impl FnOnce(Vec<u8>) -> Vec<u8>,
) -> Result<()> {
    node.kill_daemon();
    let path = node.dir.join(name);
    let whole = fs::read(&path)?;
    fs::write(&path, change(whole))?;
    node.start_daemon().await?;
    witness.look(node).await?;
    let request = StatusRequest { verbose: true };
    let status = node
        .client
        .runtime
        .clone()
        .status(request)
        .await?
        .into_inner();
    ensure!(
        format!("{status:?}").contains(".broken-"),
        "nobody is told: {status:?}"
    );
    let kept: Vec<_> = left::names(path.parent().context("a directory")?);
    for kept in kept.iter().filter(|name| name.contains(".broken-")) {
        fs::remove_file(path.with_file_name(kept))?;
    }
    node.restart().await?;
    pod_comes_and_goes(node, "after-broken").await
}

async fn images_broken(node: &mut Node, pods: &mut Pods, witness: &mut Witness) -> Result<()> {
    // Its disks would not be those of the next image.
    pods.end(node).await?;
    node.kill_daemon();
    let path = node.dir.join("root/images/images.redb");
    fs::write(&path, "no records")?;
    node.start_daemon().await?;
    witness.look(node).await?;
    node.client
        .pull(crate::kubelet::IMAGE)
        .await
        .context("pull it again")?;
    for kept in left::names(&node.dir.join("root/images")) {
        if kept.contains(".broken-") {
            fs::remove_file(path.with_file_name(kept))?;
        }
    }
    pod_comes_and_goes(node, "after-broken").await?;
    witness.look(node).await
}

/// Records as they were before they had all that they have now.
async fn older(node: &mut Node, witness: &mut Witness) -> Result<()> {
    const ADDED: [&str; 16] = [
        "message",
        "ips",
        "seen_ips",
        "guest",
        "resources",
        "overhead",
        "started_at_ns",
        "volumes",
        "locals",
        "devices",
        "stopping",
        "user",
        "host_paths",
        "unknown",
        "uid",
        "jail",
    ];
    node.kill_daemon();
    let records = node.dir.join("state/records");
    for name in left::names(&records) {
        let path = records.join(name);
        let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
        let fields = record.as_object_mut().context("a record")?;
        // What tells when it was started is not looked at for whether it runs.
        ADDED.iter().for_each(|field| drop(fields.remove(*field)));
        fs::write(path, serde_json::to_vec(&record)?)?;
    }
    // The store is filled from them.
    fs::remove_file(node.dir.join("root/hull.redb"))?;
    node.start_daemon().await?;
    witness.ticks(node).await?;
    pod_comes_and_goes(node, "after-older").await
}

/// A record that another version of the program wrote: of a pod that runs, while another does too.
async fn newer(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let pod = node.run_sandbox(node.sandbox("newer")).await?;
    let id = node
        .create(&pod, node.container("waits", Work::Waits))
        .await?;
    node.start_container(&id).await?;
    let vmms = node.vmms(&pod.id);
    node.kill_daemon();
    let record = node.dir.join(format!("state/records/sandbox-{}", pod.id));
    let mut newer: serde_json::Value = serde_json::from_slice(&fs::read(&record)?)?;
    newer["version"] = 1000.into();
    fs::write(record, serde_json::to_vec(&newer)?)?;
    // The store is filled from them.
    fs::remove_file(node.dir.join("root/hull.redb"))?;
    node.start_daemon().await?;
    witness.look(node).await?;
    ensure!(
        !node.is_ready(&pod).await?,
        "a pod is ready of which nobody knows what it is"
    );
    ensure!(node.vmms(&pod.id) == vmms, "its VM was not left alone");
    node.end(&pod).await?;
    pod_comes_and_goes(node, "after-newer").await
}

/// The agent is killed, and with it its guest, while the daemon stands still.
async fn agent_killed(node: &mut Node, witness: &mut Witness) -> Result<()> {
    let pod = node.run_mortal("mortal").await?;
    let id = node
        .create(&pod, node.container("waits", Work::Waits))
        .await?;
    node.start_container(&id).await?;
    signal(node.daemon(), Signal::STOP)?;
    let killed = node.kill_agent(&pod.id).await;
    signal(node.daemon(), Signal::CONT)?;
    killed?;
    let status = node.wait_exited(&id, PATIENCE).await?;
    ensure!(
        status.exit_code == 137,
        "it exited with {}",
        status.exit_code
    );
    ensure!(
        !node.is_ready(&pod).await?,
        "a pod without a guest is ready"
    );
    node.end(&pod).await?;
    witness.look(node).await
}

async fn clock(node: &mut Node, witness: &mut Witness, seconds: i64) -> Result<()> {
    let pod = node
        .run_sandbox(node.sandbox(&format!("clock{seconds}")))
        .await?;
    let id = node
        .create(&pod, node.container("clock", Work::EndsLater))
        .await?;
    node.start_container(&id).await?;
    node.set_clock(0, seconds)?;
    let right = async {
        node.ended_well(&pod, "clock", &id).await?;
        let waits = node
            .create(&pod, node.container("waits", Work::Waits))
            .await?;
        node.start_container(&waits).await?;
        node.stop_container(&waits, 1).await?;
        node.restart().await?;
        witness.look(node).await
    }
    .await;
    node.set_clock(seconds, 0)?;
    right?;
    node.end(&pod).await?;
    witness.ticks(node).await
}

/// Records are there, and nothing that they tell of.
async fn reboot(node: &mut Node, pods: &mut Pods, witness: &mut Witness) -> Result<()> {
    let pod = node.run_sandbox(node.sandbox("rebooted")).await?;
    let id = node
        .create(&pod, node.container("waits", Work::Waits))
        .await?;
    node.start_container(&id).await?;
    node.kill_daemon();
    for (pid, _) in left::processes(&node.dir) {
        let _ = signal(pid, Signal::KILL);
    }
    for name in left::names(&node.dir.join("state/netns")) {
        run(Command::new("umount")
            .arg("-l")
            .arg(node.dir.join("state/netns").join(name)))?;
    }
    fs::remove_dir_all(node.dir.join("state"))?;
    node.start_daemon().await?;
    for (pod, container) in [(&pod, &id), (&witness.pod, &witness.container)] {
        ensure!(!node.is_ready(pod).await?, "a pod is ready after a reboot");
        let status = node.container_status(container).await?;
        ensure!(
            status.state() == ContainerState::ContainerExited,
            "its container is {:?}",
            status.state()
        );
        ensure!(status.exit_code != 0, "its container exited with 0");
        node.end(pod).await?;
    }
    pods.end(node).await?;
    pod_comes_and_goes(node, "rebooted").await?;
    *witness = Witness::start(node).await?;
    Ok(())
}
