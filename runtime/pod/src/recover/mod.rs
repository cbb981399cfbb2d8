//! The start of the daemon: what an earlier one left is adopted, ended or removed.
//!
//! ```text
//! record      VM                  what is done
//! Ready       answers             adopted: events, logs and containers go on
//! Ready       gone, or silent     Broken: not ready, containers exited; Stop finishes it
//! Starting    any                 removed: nobody was told of it
//! Stopping    any                 stopped (and removed when that was asked for)
//! Removing    any                 removed
//! Broken      –                   as it was
//! Stopped     –                   as it was
//! can't be read, nor its copy     not ready; untouched until somebody stops or removes it
//! none        VMM process, directory, network namespace, image lease, disk of a VM: removed
//! ```

mod orphans;

use std::{collections::HashMap, fs, sync::Arc, time::Duration};

use error_reporter::Report;
use futures::future::join_all;
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout},
};

use hull_base::{
    blocking,
    panics::{Panic, caught},
};
use hull_proto_vmm::VmState;
use hull_spec::{
    config::PodsConfig,
    error::PodError,
    id::{ContainerId, PodId},
};
use hull_vm::{
    agent::client::Agent,
    client::{self, VmClient},
    error::VmError,
    process::Process,
    rundir::{DataDir, RunDir},
};

use self::orphans::remove_orphans;
use crate::{
    container::unmake::{OnFailure, unmake},
    driver::{container::Container, state::Driver},
    lifecycle::{
        container::State as ContainerState,
        sandbox::{After, Event, State, after_restart},
    },
    logs::{
        file::LogPath,
        pump::{ContainerLog, LogTarget},
    },
    node::Node,
    ports::{PodImages, PodNetworking, PodProcesses},
    record::{ContainerRecord, Loaded, RecordedState, Records, SandboxRecord},
    registry::{Phase, PodEntry},
    storage::attachments::Attachments,
};

/// How long the daemon's start waits for pods; those that take longer go on by themselves.
const WAIT: Duration = Duration::from_secs(15);
/// Exit code of a container whose end nobody saw.
const UNKNOWN_EXIT: i32 = 255;

/// Opens the records and brings the node into the state that they describe.
pub(crate) async fn open(
    config: PodsConfig,
    images: Arc<dyn PodImages>,
    network: Arc<dyn PodNetworking>,
    processes: Arc<dyn PodProcesses>,
) -> Result<Arc<Node>, PodError> {
    if !RunDir::fits(&config) {
        return Err(PodError::precondition(
            "use the state directory",
            format!(
                "{} is too long for the sockets below it",
                config.state.display()
            ),
        ));
    }
    for path in [RunDir::all(&config), DataDir::all(&config)] {
        fs::create_dir_all(&path)
            .map_err(|e| PodError::internal(format!("make {}", path.display()), e))?;
    }
    let (path, copies) = (config.root.join("hull.redb"), config.state.join("records"));
    let opened = blocking(move || -> Result<_, PodError> {
        let (records, broken) = Records::open(&path, &copies)?;
        let loaded = records.load()?;
        Ok((records, broken, loaded))
    });
    let (records, broken, mut loaded) = opened.await?;
    let broken = broken.map(|broken| broken.to_string());
    let faults: Vec<String> = broken.into_iter().chain(loaded.faults.drain(..)).collect();
    for fault in &faults {
        tracing::error!("{fault}");
    }
    let node = Arc::new(Node::new(
        config, images, network, processes, records, faults,
    ));

    let mut servers = remove_orphans(&node, &mut loaded).await;
    let Loaded {
        sandboxes,
        containers,
        unread,
        unread_containers,
        ..
    } = loaded;

    let mut by_pod: HashMap<PodId, Vec<ContainerRecord>> = HashMap::new();
    for container in containers {
        by_pod
            .entry(container.pod.clone())
            .or_default()
            .push(container);
    }
    let pods: Vec<_> = sandboxes
        .into_iter()
        .map(|sandbox| {
            let containers = by_pod.remove(&sandbox.id).unwrap_or_default();
            let server = servers.remove(sandbox.id.as_str());
            let is_unread = unread.contains(&sandbox.id);
            // From here on it is listed as it was; calls wait until it is recovered.
            let id = sandbox.id.clone();
            let mut recovery = Recovery::new(&node, sandbox, containers, server);
            if is_unread {
                return supervise(&node, id, recovery.leave());
            }
            // What nobody can tell of they can't go on with.
            recovery.unanswered.extend(
                unread_containers
                    .iter()
                    .filter(|(_, pod)| pod.as_ref() == Some(&id))
                    .map(|(container, _)| container.clone()),
            );
            supervise(&node, id, recovery.run())
        })
        .collect();
    for container in by_pod.into_values().flatten() {
        // Its pod was removed without it, because its record could not be deleted before.
        discard(&node, None, &container.id).await;
    }
    let recovered = pods.into_iter().map(|pod| async move {
        // The task hands over to the pod's own.
        let _ = pod.await;
    });
    if timeout(WAIT, join_all(recovered)).await.is_err() {
        tracing::warn!("some pods of an earlier daemon do not answer yet");
    }
    Ok(node)
}

/// Runs the task of a pod. A panic in it ends this pod's VM, and nothing of other pods.
pub(crate) fn supervise(
    node: &Arc<Node>,
    id: PodId,
    task: impl Future<Output = ()> + Send + 'static,
) -> JoinHandle<()> {
    let (node, task) = (Arc::clone(node), caught(task));
    tokio::spawn(async move {
        let Err(panic) = task.await else {
            return;
        };
        tracing::error!(pod = %id, %panic, "the pod's task ended, its VM is killed");
        let failure = match caught(take_over(&node, &id, panic)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => Report::new(error).to_string(),
            Err(panic) => panic.to_string(),
        };
        tracing::error!(pod = %id, failure, "the pod is left alone until the daemon starts again");
    })
}

/// Makes a task anew for a pod whose task panicked: from its record, and without its guest, so that
/// it can't be brought to panic again.
async fn take_over(node: &Arc<Node>, id: &PodId, panic: Panic) -> Result<(), PodError> {
    let run = RunDir::of(&node.config, id);
    let (config, processes) = (node.config.clone(), Arc::clone(&node.processes));
    let end = move || {
        let found = processes.find_all(&config).into_iter();
        found
            .filter(|found| found.run == run.path())
            .for_each(|found| found.process.kill());
    };
    blocking(end).await;
    let Some(entry) = node.registry.find(id) else {
        return Ok(());
    };
    let why = panic.to_string();
    entry.started.send_if_modified(|started| {
        let is_news = started.is_none();
        started.get_or_insert(Err(panic.into()));
        is_news
    });
    let (records, pod) = (node.records.clone(), id.clone());
    let (sandbox, containers) = blocking(move || records.of_pod(&pod)).await?;
    let Some(sandbox) = sandbox else {
        // It was not yet there, or no longer.
        node.registry.release(id);
        return Ok(());
    };
    Recovery::behind(entry, node, sandbox, containers, why)
        .run()
        .await;
    Ok(())
}

/// A sandbox on its way from its record to its task.
struct Recovery {
    node: Arc<Node>,
    driver: Driver,
    record: SandboxRecord,
    /// Its state as the earlier daemon wrote it.
    was: State,
    containers: Vec<ContainerRecord>,
    /// Containers of whose creation nobody was told.
    unanswered: Vec<ContainerId>,
    /// Serves files of the host to it.
    server: Option<Process>,
    /// Why its VM is not to be adopted.
    failure: Option<String>,
}

impl Recovery {
    /// Of a pod of an earlier daemon.
    fn new(
        node: &Arc<Node>,
        mut record: SandboxRecord,
        containers: Vec<ContainerRecord>,
        server: Option<Process>,
    ) -> Self {
        let was = record.state;
        record.state = after_restart(was);
        let (driver, entry) = Driver::new(Arc::clone(node), record.clone(), Phase::Up);
        let this = Self::of(node, driver, record, was, containers);
        if let Err(error) = node.registry.reserve(entry) {
            tracing::error!(pod = %this.record.id, %error, "two records have one name");
        }
        Self { server, ..this }
    }

    /// Of a pod whose task failed.
    fn behind(
        entry: PodEntry,
        node: &Arc<Node>,
        mut record: SandboxRecord,
        containers: Vec<ContainerRecord>,
        failure: String,
    ) -> Self {
        let was = record.state;
        record.state = after_restart(was);
        let phase = Phase::Up;
        let (driver, entry) = Driver::behind(entry, Arc::clone(node), record.clone(), phase);
        let this = Self::of(node, driver, record, was, containers);
        node.registry.replace(entry);
        Self {
            failure: Some(failure),
            ..this
        }
    }

    fn of(
        node: &Arc<Node>,
        mut driver: Driver,
        record: SandboxRecord,
        was: State,
        containers: Vec<ContainerRecord>,
    ) -> Self {
        let mut unanswered = Vec::new();
        for container in &containers {
            match resume(container) {
                Some(container) => driver.insert(container),
                None => unanswered.push(container.id.clone()),
            }
        }
        driver.publish();
        Self {
            node: Arc::clone(node),
            driver,
            record,
            was,
            containers,
            unanswered,
            server: None,
            failure: None,
        }
    }

    /// Leaves a pod whose record can't be read as it is, for somebody to stop it.
    async fn leave(mut self) {
        if let Some(server) = self.server {
            self.driver.files().lock().await.adopt(server);
        }
        self.driver.stands_in();
        self.driver.publish();
        self.driver.adopted();
        supervise(&self.node, self.record.id, self.driver.run());
    }

    async fn run(mut self) {
        if let Some(server) = self.server.take() {
            self.driver.files().lock().await.adopt(server);
        }
        let adopted = match (self.failure.take(), self.record.state) {
            (Some(failure), _) => Err(failure),
            (None, State::Ready) => self.adopt().await,
            (None, _) => Err("it was being started or ended".into()),
        };
        for id in std::mem::take(&mut self.unanswered) {
            discard(&self.node, adopted.as_ref().ok(), &id).await;
        }
        match adopted {
            Ok(attachments) => {
                self.go_on(attachments).await;
                check_network(&self.node, &self.record);
            }
            Err(why) => {
                if self.record.state == State::Ready {
                    tracing::warn!(pod = %self.record.id, %why, "VM can't be gone on with");
                    self.driver.note(format!("the VM is gone: {why}"));
                }
                // In the state Ready this makes it Broken; in any other it ends what still runs.
                self.driver.end_lost_vm(UNKNOWN_EXIT).await;
            }
        }
        // Of one whose VM is gone.
        self.driver.end_checkpoint().await;
        let todo = match self.was {
            State::Starting | State::Removing | State::Stopping(After::Remove) => {
                Some(Event::Remove)
            }
            State::Stopping(After::Keep) => Some(Event::Stop),
            _ => None,
        };
        if let Some(event) = todo
            && let Err(error) = self.driver.sandbox_event(event).await
        {
            let error = &error as &dyn std::error::Error;
            tracing::error!(pod = %self.record.id, error, "finish what an earlier daemon began");
        }
        self.driver.publish();
        self.driver.adopted();
        supervise(&self.node, self.record.id, self.driver.run());
    }

    /// Lets the containers go on where they are.
    async fn go_on(&mut self, attachments: Attachments) {
        let Attachments { vm, devices, .. } = &attachments;
        let mut devices = devices.lock().await;
        for container in &self.containers {
            if let Some(slot) = container.image_slot {
                devices.adopt(&container.image_id, slot, &container.id);
            }
            for volume in &container.volumes {
                if let Some(slot) = volume.slot {
                    devices.adopt(&volume.image_id, slot, &container.id);
                }
            }
            for volume in &container.locals {
                devices.adopt_volume(volume, &container.id);
            }
            for device in &container.devices {
                devices.adopt_device(device.clone(), &container.id);
            }
            if matches!(
                container.state,
                RecordedState::Created | RecordedState::Running
            ) {
                let run = RunDir::of(&self.node.config, &container.pod);
                let target = LogTarget {
                    container: container.id.to_string(),
                    path: container.log_path.clone().map(|file| LogPath {
                        directory: self.record.spec.log_directory.clone(),
                        file,
                    }),
                    position: run.log_position(container.id.as_str()),
                    tty: container.spec.tty,
                    share: self.driver.log_share(),
                };
                let log = ContainerLog::resume(&vm.agent, &target);
                self.driver.insert_log(&container.id, log);
            }
        }
        devices.reconcile(vm).await;
        drop(devices);
        self.driver.go_live(attachments, None).await;
        self.driver.end_checkpoint().await;
        self.driver.resume_stops();
        self.driver.watch_volumes().await;
        let mut kept = self.containers.iter();
        if kept.any(|c| c.state != RecordedState::Creating && c.has_shares()) {
            self.driver.watch_files();
        }
    }

    /// Connects to VMM and agent. As long as the VMM lives, its pod is given time: an agent that
    /// is slow today must not cost a running pod.
    async fn adopt(&self) -> Result<Attachments, String> {
        let run = RunDir::of(&self.node.config, &self.record.id);
        let processes = &self.node.processes;
        let vmm = self.record.vm.and_then(|vm| processes.find(vm.process));
        let deadline = Instant::now() + self.node.config.boot_timeout;
        let (socket, report) = (run.control_socket(), run.exit_report());
        let vmm = vmm.ok_or_else(|| client::read_report(&report))?;
        let connected = VmClient::connect(&socket, &report, deadline, &vmm).await;
        let told = |error: VmError| Report::new(PodError::from(error)).to_string();
        let (vm, state) = connected.map_err(told)?;
        if state == VmState::Paused {
            // The earlier daemon ended while it made a checkpoint.
            vm.resume(self.node.config.boot_timeout)
                .await
                .map_err(told)?;
        }
        let vsock = run.vsock_socket();
        let greeted = tokio::select! {
            greeted = Agent::connect(&vsock, self.node.config.agent_timeout, deadline) => greeted,
            () = vm.gone() => return Err(vm.report()),
        };
        let (agent, _) = greeted.map_err(|error| Report::new(PodError::from(error)).to_string())?;
        for container in &self.containers {
            if let Some(guest) = &container.guest_id {
                agent.note_name(container.id.as_str(), guest.as_str());
            }
        }
        Ok(self.driver.attachments(vm, agent))
    }
}

/// Removes a container that nobody knows of.
async fn discard(node: &Node, attachments: Option<&Attachments>, id: &ContainerId) {
    if let Err(error) = unmake(&*node.images, attachments, id, OnFailure::GoOn).await {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(container = %id, error, "unmake a container that was not answered");
    }
    if let Err(error) = node.records.delete_container(id).await {
        tracing::warn!(container = %id, %error, "delete the record of a container");
    }
}

/// A container as it goes on; none when nobody was told of it.
fn resume(record: &ContainerRecord) -> Option<Container> {
    let state = match &record.state {
        RecordedState::Created => ContainerState::Created,
        RecordedState::Running if record.stopping.is_some() => {
            ContainerState::Terminating(After::Keep)
        }
        RecordedState::Running => ContainerState::Running,
        RecordedState::Exited(exit) => ContainerState::Exited(exit.clone()),
        RecordedState::Creating => return None,
    };
    Some(Container::new(record.clone(), state))
}

/// Says so when a pod that runs on has lost something of its network. It is not ended for that:
/// whoever sees to its readiness decides.
fn check_network(node: &Arc<Node>, record: &SandboxRecord) {
    let Some(network) = record.network.clone() else {
        return;
    };
    let (node, pod) = (Arc::clone(node), record.id.clone());
    tokio::spawn(async move {
        if let Err(error) = node.network.check(&network).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, %pod, "the pod's network is not as it was made");
        }
    });
}
