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
//! none        VMM process, directory, network namespace, image lease: removed
//! ```

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use hull_image::ImageId;
use tokio::{task::spawn_blocking, time::Instant};

use crate::{
    config::PodsConfig,
    driver::{Container, Driver},
    error::PodError,
    guest::client::Agent,
    id::{ContainerId, PodId},
    lifecycle::{
        container::State as ContainerState,
        sandbox::{After, Event, State, after_restart},
    },
    logs::pump::{ContainerLog, LogTarget},
    node::Node,
    ports::{PodImages, PodNetworking},
    record::{ContainerRecord, RecordedState, Records, SandboxRecord},
    registry::{Delivered, Phase},
    storage::images::ImageDisks,
    vm::{
        client::VmClient,
        process::VmmProcess,
        rundir::{self, DataDir, RunDir},
    },
};

/// How long a VM that was left running may take to answer.
const ADOPT: Duration = Duration::from_secs(15);
/// Exit code of a container whose end nobody saw.
const UNKNOWN_EXIT: i32 = 255;

/// Opens the records and brings the node into the state that they describe.
pub(crate) async fn open(
    config: PodsConfig,
    images: Arc<dyn PodImages>,
    network: Arc<dyn PodNetworking>,
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
    let path = config.root.join("hull.redb");
    let opened = spawn_blocking(move || {
        let records = Records::open(&path)?;
        let loaded = records.load()?;
        Ok::<_, PodError>((records, loaded))
    });
    let (records, (sandboxes, containers)) = match opened.await {
        Ok(result) => result?,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    let node = Arc::new(Node::new(config, images, network, records));

    remove_orphans(&node, &sandboxes, &containers).await;

    let mut by_pod: HashMap<PodId, Vec<ContainerRecord>> = HashMap::new();
    for container in containers {
        by_pod
            .entry(container.pod.clone())
            .or_default()
            .push(container);
    }
    let pods = sandboxes.into_iter().map(|sandbox| {
        let containers = by_pod.remove(&sandbox.id).unwrap_or_default();
        recover(Arc::clone(&node), sandbox, containers)
    });
    join_all(pods).await;
    Ok(node)
}

async fn recover(node: Arc<Node>, mut record: SandboxRecord, containers: Vec<ContainerRecord>) {
    let was = record.state;
    record.state = after_restart(was);
    let live = match record.state {
        State::Ready => match adopt(&node, &record).await {
            Ok(live) => Some(live),
            Err(error) => {
                tracing::warn!(
                    pod = %record.id,
                    error = &error as &dyn std::error::Error,
                    "VM of an earlier daemon is gone"
                );
                record.message = format!("the VM is gone: {error}");
                None
            }
        },
        _ => None,
    };
    let (mut driver, entry) = Driver::new(Arc::clone(&node), record, Phase::Up);
    if let Err(error) = node.registry.reserve(entry) {
        tracing::error!(pod = %driver.id(), %error, "two records have one name");
    }
    let mut disks = ImageDisks::default();
    let agent = live.as_ref().map(|(_, agent)| agent);
    for container in containers {
        let image = ImageId::try_from(container.image_id.clone());
        if let (Some(_), Some(slot), Ok(image)) = (agent, container.image_slot, &image) {
            disks.adopt(image, slot, &container.id);
        }
        if let Some(container) = resume(&node, agent, container).await {
            driver.insert(container);
        }
    }
    match live {
        Some((vm, agent)) => driver.go_live(vm, agent, disks, None),
        // In the state Ready this makes it Broken; in any other it ends what still runs.
        None => driver.end_lost_vm(UNKNOWN_EXIT).await,
    }
    let todo = match was {
        State::Starting | State::Removing | State::Stopping(After::Remove) => Some(Event::Remove),
        State::Stopping(After::Keep) => Some(Event::Stop),
        _ => None,
    };
    if let Some(event) = todo
        && let Err(error) = driver.sandbox_event(event).await
    {
        let cause = &error as &dyn std::error::Error;
        tracing::error!(pod = %driver.id(), error = cause, "finish what an earlier daemon began");
    }
    driver.publish();
    tokio::spawn(driver.run());
}

async fn adopt(node: &Node, record: &SandboxRecord) -> Result<(VmClient, Agent), PodError> {
    let run = RunDir::of(&node.config, &record.id);
    let process = record.vm.map(|vm| vm.process);
    let alive = || process.is_some_and(|p| p.is_alive());
    let deadline = Instant::now() + ADOPT;
    let (socket, report) = (run.control_socket(), run.exit_report());
    let (vm, _) = VmClient::connect(&socket, &report, deadline, alive).await?;
    let vsock = run.vsock_socket();
    let (agent, _) = Agent::connect(&vsock, node.config.agent_timeout, deadline).await?;
    Ok((vm, agent))
}

/// A container as it goes on; none when nobody was told of it.
async fn resume(
    node: &Node,
    agent: Option<&Agent>,
    mut record: ContainerRecord,
) -> Option<Container> {
    let state = match &record.state {
        RecordedState::Created => ContainerState::Created,
        RecordedState::Running => ContainerState::Running,
        RecordedState::Exited(exit) => ContainerState::Exited(exit.clone()),
        RecordedState::Creating => {
            discard(node, agent, &record.id).await;
            return None;
        }
    };
    let mut log = None;
    if let (Some(agent), ContainerState::Created | ContainerState::Running) = (agent, &state) {
        let run = RunDir::of(&node.config, &record.pod);
        let target = LogTarget {
            container: record.id.to_string(),
            path: record.log_path.clone(),
            position: run.log_position(record.id.as_str()),
            tty: record.spec.tty,
        };
        match ContainerLog::start(agent, target).await {
            Ok(resumed) => log = Some(resumed),
            Err(error) => {
                let cause = &error as &dyn std::error::Error;
                tracing::error!(container = %record.id, error = cause, "go on with the log");
                record.log_path = None;
            }
        }
    }
    Some(Container {
        record,
        state,
        log,
        waiters: Vec::new(),
        creators: Vec::new(),
        delivered: Delivered::default(),
    })
}

async fn discard(node: &Node, agent: Option<&Agent>, id: &ContainerId) {
    if let Some(agent) = agent
        && let Err(error) = agent.delete(id.as_str()).await
    {
        tracing::warn!(container = %id, %error, "delete a container that was not answered");
    }
    if let Err(error) = node.images.release(id.as_str()).await {
        tracing::warn!(container = %id, %error, "release the image of a container");
    }
    if let Err(error) = node.records.delete_container(id).await {
        tracing::warn!(container = %id, %error, "delete the record of a container");
    }
}

/// Removes what has no record. A failure is logged: the next start tries again.
async fn remove_orphans(node: &Node, sandboxes: &[SandboxRecord], containers: &[ContainerRecord]) {
    let pods: HashSet<&str> = sandboxes.iter().map(|s| s.id.as_str()).collect();
    let vmms: HashSet<VmmProcess> = sandboxes
        .iter()
        .filter_map(|s| Some(s.vm?.process))
        .collect();
    for (run, process) in VmmProcess::find_all(&RunDir::all(&node.config)) {
        if !vmms.contains(&process) {
            tracing::warn!(pid = process.pid, run = %run.display(), "VMM that nobody owns");
            process.kill();
            if let Err(error) = process.gone(Duration::ZERO).await {
                tracing::error!(%error, "end a VMM that nobody owns");
            }
        }
    }
    for parent in [RunDir::all(&node.config), DataDir::all(&node.config)] {
        for name in names_in(&parent) {
            if !pods.contains(name.as_str()) {
                let path = parent.join(name);
                tracing::warn!(path = %path.display(), "directory that nobody owns");
                if let Err(error) = rundir::remove(&path) {
                    tracing::error!(%error, path = %path.display(), "remove a directory");
                }
            }
        }
    }
    for name in names_in(&node.config.root) {
        if name.starts_with("scratch-") && name.ends_with(".tmp") {
            // Left by a daemon that was killed while it formatted.
            let _ = fs::remove_file(node.config.root.join(name));
        }
    }
    match node.network.pods() {
        Ok(owners) => {
            for owner in owners.iter().filter(|o| !pods.contains(o.as_str())) {
                tracing::warn!(pod = %owner, "network namespace that nobody owns");
                if let Err(error) = node.network.remove_orphan(owner) {
                    tracing::error!(%error, pod = %owner, "remove a network namespace");
                }
            }
        }
        Err(error) => tracing::error!(%error, "look for network namespaces that nobody owns"),
    }
    let known: HashSet<&str> = containers.iter().map(|c| c.id.as_str()).collect();
    let owners = node.images.lease_owners().await.unwrap_or_default();
    for owner in owners {
        // Other parts of the daemon may hold leases too, under names of their own.
        let is_container = ContainerId::try_from(owner.clone()).is_ok();
        if is_container
            && !known.contains(owner.as_str())
            && let Err(error) = node.images.release(&owner).await
        {
            tracing::error!(%error, %owner, "release an image that nobody uses");
        }
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}
