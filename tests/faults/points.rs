//! The calls, and what is done at a point that the daemon reaches in one.

use std::{
    future::Future,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use hull_base::faults::{Kind as PointKind, Point};
use hull_proto_cri::v1::{ContainerConfig, ContainerState, PodSandboxConfig};
use hull_tests::client::Pod;
use rustix::process::Signal;
use tokio::{task::JoinHandle, time::timeout};
use tonic::Status;

use crate::{
    kind::{Kind, PATIENCE},
    kubelet::{Kubelet, OTHER, Work},
    left::Left,
    node::Node,
    process::signal,
};

/// A call, or what the daemon does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    RunPodSandbox,
    CreateContainer,
    StartContainer,
    /// A container writes, and ends.
    Log,
    ExecSync,
    /// The same as a stream.
    Exec,
    UpdateContainerResources,
    ReopenContainerLog,
    StopContainer,
    RemoveContainer,
    UpdatePodSandboxResources,
    StopPodSandbox,
    RemovePodSandbox,
    CheckpointPod,
    RestorePod,
    PullImage,
    RemoveImage,
    /// `StopPodSandbox` of a VM that stands still.
    StopMute,
    /// `StopPodSandbox` of a guest that does not power off.
    StopHung,
    /// The daemon starts, with pods that run.
    Start,
}

impl Call {
    pub const ALL: [Self; 20] = [
        Self::PullImage,
        Self::RemoveImage,
        Self::CreateContainer,
        Self::StartContainer,
        Self::Log,
        Self::ExecSync,
        Self::Exec,
        Self::UpdateContainerResources,
        Self::ReopenContainerLog,
        Self::StopContainer,
        Self::RemoveContainer,
        Self::UpdatePodSandboxResources,
        Self::Start,
        Self::RunPodSandbox,
        Self::CheckpointPod,
        Self::RestorePod,
        Self::StopPodSandbox,
        Self::StopMute,
        Self::StopHung,
        Self::RemovePodSandbox,
    ];

    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// Whether it is about a pod of its own, which is gone at its end.
    pub fn has_own_pod(self) -> bool {
        matches!(
            self,
            Self::RunPodSandbox
                | Self::CheckpointPod
                | Self::RestorePod
                | Self::StopPodSandbox
                | Self::StopMute
                | Self::StopHung
                | Self::RemovePodSandbox
        )
    }

    /// Whether it is about a pod that others use too.
    pub fn has_pod(self) -> bool {
        !matches!(self, Self::PullImage | Self::RemoveImage)
    }

    /// Whether it can be made: no guest of ours keeps from powering off.
    pub fn is_possible(self, kind: Kind) -> bool {
        self != Self::StopHung || kind == Kind::Fake
    }

    /// Whether a point is reached because of it, and not because another pod writes or as in another call.
    pub fn counts(self, point: &str) -> bool {
        match self {
            Self::Log | Self::ReopenContainerLog => true,
            Self::StopMute => point == "process-killed",
            Self::StopHung => point == "vm-stopped",
            // A guest that powers off may be gone before its VMM is asked to end it, or not.
            _ => ![
                "log-write",
                "log-written",
                "log-noted",
                "note-write",
                "vm-stopped",
            ]
            .contains(&point),
        }
    }
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The daemon is killed.
    Kill,
    /// The VMM is killed while the daemon stands still.
    KillVmm,
    /// The file server is.
    KillFiles,
    /// The agent is, and the guest's kernel panics.
    KillAgent,
    /// Writes fail.
    Fails(&'static str),
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill -9 of hull",
            Self::KillVmm => "kill -9 of hull-vmm",
            Self::KillFiles => "kill -9 of hull-fs",
            Self::KillAgent => "kill -9 of hull-agent",
            Self::Fails("enospc") => "ENOSPC",
            Self::Fails(_) => "EIO",
        }
    }
}

/// The pod and the container that a call is about.
#[derive(Debug)]
pub struct Subject {
    call: Call,
    config: PodSandboxConfig,
    pod: Option<Pod>,
    name: String,
    container: Option<String>,
}

/// What pods that were used before are used for again.
#[derive(Debug, Default)]
pub struct Pods {
    /// With what is there while it is idle.
    shared: Option<(Pod, Left)>,
    number: u32,
}

impl Pods {
    /// A pod for what is not about pods.
    pub async fn shared(&mut self, node: &Node) -> Result<Pod> {
        if let Some((pod, _)) = &self.shared {
            return Ok(pod.clone());
        }
        self.number += 1;
        let name = format!("shared-{}", self.number);
        let pod = node.run_mortal(&name).await.context("run the shared pod")?;
        // Its file server comes with the first container.
        node.works(&pod).await.context("the shared pod")?;
        self.shared = Some((pod.clone(), node.left()));
        Ok(pod)
    }

    /// Another is started next time.
    pub fn forget(&mut self) {
        self.shared = None;
    }

    /// What the shared pod has.
    pub fn left(&self) -> Left {
        self.shared
            .as_ref()
            .map_or_else(Left::default, |(_, left)| left.clone())
    }

    /// Ends it.
    pub async fn end(&mut self, node: &Node) -> Result<()> {
        match self.shared.take() {
            Some((pod, _)) => node.end(&pod).await,
            None => Ok(()),
        }
    }

    /// Makes all that a call needs.
    pub async fn prepare(&mut self, node: &mut Node, call: Call) -> Result<Subject> {
        self.number += 1;
        let name = format!("c{}", self.number);
        let mut subject = Subject {
            call,
            config: node.sandbox(&format!("p{}", self.number)),
            pod: None,
            container: None,
            name,
        };
        if call == Call::RunPodSandbox {
            return Ok(subject);
        }
        if matches!(call, Call::CheckpointPod | Call::RestorePod) {
            subject.pod = self.prepare_checkpoint(node, &subject).await?;
            return Ok(subject);
        }
        if call.has_own_pod() {
            if call == Call::StopHung {
                node.script(r#"{"hang_once":["shutdown"]}"#)?;
            }
            let ran = node.run_sandbox(subject.config.clone()).await;
            subject.pod = Some(ran.context("prepare a pod")?);
            if call == Call::StopHung {
                node.script("")?;
            }
        } else if call.has_pod() {
            subject.pod = Some(self.shared(node).await?);
        }
        let work = match call {
            Call::StartContainer => Work::Ends,
            Call::Log | Call::ReopenContainerLog => Work::EndsLater,
            _ => Work::Waits,
        };
        if call == Call::RemoveImage {
            node.pull(OTHER).await.context("prepare an image")?;
        }
        if !call.has_pod() || call == Call::CreateContainer {
            return Ok(subject);
        }
        let pod = subject.pod.clone().context("a pod")?;
        let id = node.create(&pod, node.container(&subject.name, work)).await;
        let id = id.context("prepare a container")?;
        if !matches!(call, Call::StartContainer | Call::Log) {
            node.start_container(&id).await.context("prepare it")?;
        }
        if call == Call::StopMute {
            for vmm in node.vmms(&pod.id) {
                signal(vmm, Signal::STOP)?;
            }
        }
        if call == Call::RemoveContainer {
            node.stop_container(&id, 1).await.context("prepare it")?;
        }
        if call == Call::RemovePodSandbox {
            node.stop_sandbox(&pod.id)
                .await
                .context("prepare its end")?;
        }
        subject.container = Some(id);
        Ok(subject)
    }
}

impl Pods {
    /// A pod that a checkpoint can be made of; or that checkpoint, and no pod.
    async fn prepare_checkpoint(&self, node: &Node, subject: &Subject) -> Result<Option<Pod>> {
        let pod = node.run_sandbox(subject.config.clone()).await;
        let pod = pod.context("prepare a pod")?;
        let container = node.container(&subject.name, Work::Waits);
        let id = node.create(&pod, container).await;
        let id = id.context("prepare a container")?;
        node.start_container(&id).await.context("prepare it")?;
        let path = subject.checkpoint(node);
        std::fs::create_dir_all(path.parent().context("a directory")?)?;
        if subject.call == Call::CheckpointPod {
            return Ok(Some(pod));
        }
        node.checkpoint(&pod.id, &path)
            .await
            .context("prepare a checkpoint")?;
        node.end(&pod).await.context("prepare a checkpoint")?;
        Ok(None)
    }
}

impl Subject {
    /// Where its checkpoint is.
    fn checkpoint(&self, node: &Kubelet) -> PathBuf {
        node.checkpoint_path(&self.name)
    }

    fn pod(&self) -> Result<&Pod> {
        self.pod.as_ref().context("a pod")
    }

    fn container(&self) -> Result<&str> {
        self.container.as_deref().context("a container")
    }

    fn creation(&self, node: &Node) -> ContainerConfig {
        node.container(&self.name, Work::Ends)
    }

    /// Calls, in a task of its own: the daemon may stop meanwhile.
    fn call(&self, node: &Node) -> Result<JoinHandle<Result<()>>> {
        fn spawn<T: Send + 'static>(
            work: impl Future<Output = Result<T, Status>> + Send + 'static,
        ) -> JoinHandle<Result<()>> {
            tokio::spawn(async move { Ok(work.await.map(drop)?) })
        }
        let (pod, id) = (self.pod.clone(), self.container.clone().unwrap_or_default());
        let pod_id = pod.as_ref().map(|pod| pod.id.clone()).unwrap_or_default();
        let kubelet: Kubelet = (**node).clone();
        Ok(match self.call {
            Call::RunPodSandbox => {
                let config = self.config.clone();
                spawn(async move { kubelet.run_sandbox(config.clone()).await })
            }
            Call::CreateContainer => {
                let (pod, config) = (self.pod()?.clone(), self.creation(node));
                spawn(async move { kubelet.create(&pod, config).await })
            }
            Call::StartContainer | Call::Log => {
                spawn(async move { kubelet.start_container(&id).await })
            }
            Call::ExecSync => spawn(async move { kubelet.exec(&id).await }),
            Call::Exec => tokio::spawn(async move { kubelet.exec_stream(&id).await }),
            Call::UpdateContainerResources => spawn(async move { kubelet.update(&id).await }),
            Call::ReopenContainerLog => {
                kubelet.rename_log(self.pod()?, &self.name)?;
                spawn(async move { kubelet.reopen_log(&id).await })
            }
            Call::UpdatePodSandboxResources => {
                spawn(async move { kubelet.update_sandbox(&pod_id).await })
            }
            Call::CheckpointPod => {
                let path = self.checkpoint(node);
                spawn(async move { kubelet.checkpoint(&pod_id, &path).await })
            }
            Call::RestorePod => {
                let (path, config) = (self.checkpoint(node), self.config.clone());
                spawn(async move { kubelet.restore(&path, config).await })
            }
            Call::StopContainer => spawn(async move { kubelet.stop_container(&id, 1).await }),
            Call::RemoveContainer => spawn(async move { kubelet.remove_container(&id).await }),
            Call::StopPodSandbox | Call::StopMute | Call::StopHung => {
                spawn(async move { kubelet.stop_sandbox(&pod_id).await })
            }
            Call::RemovePodSandbox => spawn(async move { kubelet.remove_sandbox(&pod_id).await }),
            Call::PullImage => spawn(async move { kubelet.pull(OTHER).await }),
            Call::RemoveImage => spawn(async move { kubelet.remove_image(OTHER).await }),
            Call::Start => bail!("the daemon starts by itself"),
        })
    }

    /// What kubelet does next, until nothing is left to do.
    async fn go_on(&self, node: &Node, pods: &mut Pods) -> Result<()> {
        match self.call {
            Call::RunPodSandbox => {
                let pod = node.run_again(&self.config).await?;
                node.works(&pod).await?;
                node.end(&pod).await
            }
            Call::CheckpointPod => {
                let pod = self.pod()?;
                if node.is_ready(pod).await? {
                    // It goes on, and it can be had again, elsewhere and here.
                    node.exec(&self.only_container(node, pod).await?).await?;
                    node.clear_checkpoints()?;
                    let path = self.checkpoint(node);
                    let again = node.checkpoint(&pod.id, &path).await;
                    again.context("write it again")?;
                    node.end(pod).await?;
                    let restored = node.restore(&path, self.config.clone()).await;
                    node.goes_on(&restored.context("restore it")?).await?;
                } else {
                    node.end(pod).await?;
                }
                node.clear_checkpoints()
            }
            Call::RestorePod => {
                let pod = match node.again(&self.config).await? {
                    Some(pod) => pod,
                    None => {
                        let path = self.checkpoint(node);
                        let restored = node.restore(&path, self.config.clone()).await;
                        restored.context("restore it again")?
                    }
                };
                node.goes_on(&pod).await?;
                node.clear_checkpoints()
            }
            Call::StopPodSandbox | Call::StopMute | Call::StopHung | Call::RemovePodSandbox => {
                let pod = self.pod()?;
                // One that is gone is stopped and removed.
                node.end(pod).await
            }
            Call::PullImage | Call::RemoveImage => {
                node.pull(OTHER).await.context("pull again")?;
                node.remove_image(OTHER).await.context("remove the image")
            }
            _ if !node.is_ready(self.pod()?).await? => {
                // Its VM is gone. kubelet starts another.
                pods.shared = None;
                let pod = self.pod()?;
                for container in node.containers_of(pod).await? {
                    let status = node.wait_exited(&container.id, PATIENCE).await?;
                    ensure!(
                        status.exit_code != 0,
                        "a container without a VM exited with 0"
                    );
                }
                node.end(pod).await?;
                let pod = pods.shared(node).await?;
                node.works(&pod).await
            }
            Call::CreateContainer => {
                let pod = self.pod()?;
                let listed = node.containers_of(pod).await?;
                let mut found = listed
                    .iter()
                    .filter(|c| c.metadata.as_ref().is_some_and(|m| m.name == self.name));
                let id = match found.next() {
                    Some(container) => {
                        ensure!(
                            container.state() == ContainerState::ContainerCreated,
                            "it is {:?}",
                            container.state()
                        );
                        container.id.clone()
                    }
                    None => node
                        .create(pod, self.creation(node))
                        .await
                        .context("create it again")?,
                };
                node.start_container(&id).await.context("start it")?;
                node.ended_well(pod, &self.name, &id).await?;
                self.remove(node, &id).await
            }
            Call::StartContainer | Call::Log | Call::ReopenContainerLog => {
                let (pod, id) = (self.pod()?, self.container()?);
                let status = node.container_status(id).await?;
                if status.state() == ContainerState::ContainerCreated {
                    let started = node.start_container(id).await;
                    // The first start may have been done, and the container have ended meanwhile.
                    let status = node.container_status(id).await?;
                    if status.state() != ContainerState::ContainerExited {
                        started.context("start it again")?;
                    }
                }
                if self.call == Call::ReopenContainerLog && self.runs(node).await? {
                    let reopened = node.reopen_log(id).await;
                    // It may have ended meanwhile.
                    if self.runs(node).await? {
                        reopened.context("reopen its log again")?;
                    }
                }
                node.ended_well(pod, &self.name, id).await?;
                self.remove(node, id).await
            }
            Call::StopContainer => {
                let id = self.container()?;
                node.stop_container(id, 1).await.context("stop it again")?;
                let status = node.wait_exited(id, PATIENCE).await?;
                ensure!(
                    [137, 143].contains(&status.exit_code),
                    "it exited with {}",
                    status.exit_code
                );
                self.remove(node, id).await
            }
            Call::RemoveContainer => self.remove(node, self.container()?).await,
            Call::ExecSync
            | Call::Exec
            | Call::UpdateContainerResources
            | Call::UpdatePodSandboxResources
            | Call::Start => {
                let id = self.container()?;
                match self.call {
                    Call::UpdateContainerResources => {
                        node.update(id).await.context("update it again")?;
                        node.is_updated(id).await?;
                    }
                    Call::UpdatePodSandboxResources => {
                        let pod = &self.pod()?.id;
                        node.update_sandbox(pod).await.context("update it again")?;
                    }
                    Call::Exec => node.exec_stream(id).await.context("open another stream")?,
                    _ => {}
                }
                node.exec(id).await.context("run the command again")?;
                node.stop_container(id, 1).await.context("stop it")?;
                self.remove(node, id).await
            }
        }
    }

    async fn only_container(&self, node: &Node, pod: &Pod) -> Result<String> {
        let mut containers = node.containers_of(pod).await?.into_iter();
        Ok(containers.next().context("its container")?.id)
    }

    async fn runs(&self, node: &Node) -> Result<bool> {
        let status = node.container_status(self.container()?).await?;
        Ok(status.state() == ContainerState::ContainerRunning)
    }

    async fn remove(&self, node: &Node, id: &str) -> Result<()> {
        node.remove_container(id).await.context("remove it")?;
        node.forget_log(self.pod()?, &self.name);
        Ok(())
    }
}

/// Which points a call reaches, and how often.
pub async fn trace(node: &mut Node, pods: &mut Pods, call: Call) -> Result<Vec<(String, usize)>> {
    let subject = pods.prepare(node, call).await?;
    node.arm("trace", "all", 1)?;
    if call == Call::Start {
        node.kill_daemon();
        node.start_daemon().await?;
    } else {
        subject.call(node)?.await??;
    }
    if matches!(
        call,
        Call::Log | Call::StartContainer | Call::ReopenContainerLog
    ) {
        node.ended_well(subject.pod()?, &subject.name, subject.container()?)
            .await?;
    }
    let traced = node.traced();
    node.disarm();
    subject.go_on(node, pods).await.context("after a trace")?;
    Ok(traced
        .into_iter()
        .filter(|(point, _)| call.counts(point))
        .collect())
}

/// Has this happen at a point of a call. `Ok(false)`: the point was not reached.
pub async fn at(
    node: &mut Node,
    pods: &mut Pods,
    call: Call,
    point: Point,
    nth: usize,
    action: Action,
) -> Result<bool> {
    let subject = pods.prepare(node, call).await?;
    let word = match action {
        Action::Kill => "kill",
        Action::KillVmm | Action::KillFiles | Action::KillAgent => "stop",
        Action::Fails(how) => how,
    };
    ensure!(
        matches!(action, Action::Fails(_)) == (point.kind() == PointKind::Write),
        "what is done there"
    );
    if call == Call::Start {
        node.kill_daemon();
    }
    node.arm(word, point.name(), nth)?;
    let asked = if call == Call::Start {
        node.spawn_daemon()?;
        None
    } else {
        Some(subject.call(node)?)
    };
    let reached = match action {
        Action::Kill => killed(node).await?,
        Action::Fails(_) if call == Call::Start => {
            // It starts, or says why not.
            let _ = node.connect().await;
            let fired = node.has_fired();
            node.disarm();
            node.restart().await.context("the next daemon")?;
            return after(node, pods, &subject, fired).await;
        }
        Action::Fails(_) => {
            let answer = asked.context("a call")?;
            // It succeeds or fails, but it ends.
            let _ = timeout(PATIENCE, answer)
                .await
                .context("the call does not end")??;
            if matches!(call, Call::Log | Call::ReopenContainerLog) {
                // Logs are written later, and that the container has ended.
                let begun = Instant::now();
                while !node.has_fired() && subject.runs(node).await? && begun.elapsed() < PATIENCE {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let fired = node.has_fired();
            node.disarm();
            ensure!(!node.has_ended()?, "the daemon has ended");
            return after(node, pods, &subject, fired).await;
        }
        Action::KillVmm | Action::KillFiles | Action::KillAgent => {
            let reached = stopped(node).await?;
            if reached {
                let pod = match &subject.pod {
                    Some(pod) => pod.id.clone(),
                    None => newest_pod(node)?,
                };
                let killed = kill(node, &pod, action).await;
                signal(node.daemon(), Signal::CONT)?;
                killed?;
            }
            if let Some(answer) = asked {
                let _ = timeout(PATIENCE, answer)
                    .await
                    .context("the call does not end")??;
            } else {
                node.connect().await?;
            }
            reached
        }
    };
    node.disarm();
    match action {
        Action::Kill => node.restart().await.context("the next daemon")?,
        Action::KillFiles => {
            // No other server knows what the guest has open: its pod says so, and kubelet replaces it.
            node.end(subject.pod()?).await?;
            if !subject.call.has_own_pod() {
                pods.forget();
            }
            let pod = pods.shared(node).await?;
            node.works(&pod).await?;
            return Ok(reached);
        }
        Action::KillVmm | Action::KillAgent if reached => {
            // The daemon hears of it a moment later.
            if let Some(pod) = &subject.pod {
                node.wait_ended(pod).await?;
            }
        }
        _ => {}
    }
    after(node, pods, &subject, reached).await
}

/// Kills a process of a pod.
async fn kill(node: &Node, pod: &str, action: Action) -> Result<()> {
    let processes = match action {
        Action::KillAgent => return node.kill_agent(pod).await,
        Action::KillFiles => node.file_servers(pod),
        _ => node.vmms(pod),
    };
    for pid in processes {
        // One may have ended by itself.
        let _ = signal(pid, Signal::KILL);
    }
    Ok(())
}

async fn after(node: &Node, pods: &mut Pods, subject: &Subject, reached: bool) -> Result<bool> {
    subject.go_on(node, pods).await?;
    Ok(reached)
}

/// The pod that is being started: the one that is not listed yet, or is there last.
fn newest_pod(node: &Node) -> Result<String> {
    let mut pods: Vec<_> = crate::left::names(&node.dir.join("state/pods"))
        .into_iter()
        .filter_map(|name| {
            let made = std::fs::metadata(node.dir.join("state/pods").join(&name))
                .ok()?
                .created();
            Some((made.ok()?, name))
        })
        .collect();
    pods.sort();
    Ok(pods.pop().context("a pod")?.1)
}

async fn killed(node: &mut Node) -> Result<bool> {
    for _ in 0..2000 {
        if node.has_ended()? {
            return Ok(node.has_fired());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(false)
}

/// Whether the daemon stands still.
async fn stopped(node: &Node) -> Result<bool> {
    for _ in 0..1000 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", node.daemon()))?;
        if stat
            .rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('T'))
        {
            return Ok(true);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(false)
}
