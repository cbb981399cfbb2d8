//! What no record names: processes, directories, networks, leases of images.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
    time::Duration,
};

use futures::future::join_all;
use tokio::time::timeout;

use hull_base::{beneath, blocking};
use hull_spec::{
    config::PodsConfig,
    id::{ContainerId, PodId},
    size::VmSize,
};
use hull_vm::{
    cgroup,
    identity::Identity,
    process::{Found, Process},
    rundir::{DataDir, Role, RunDir},
};

use crate::{
    node::Node,
    record::{Loaded, SandboxRecord, VmRecord},
    storage::scratch,
};

/// How long the daemon's start waits for the ends of processes that nobody owns.
const STRAYS_END: Duration = Duration::from_secs(5);

/// Removes what has no record. A failure is logged: the next start tries again. Returns the file
/// servers of pods.
pub(super) async fn remove_orphans(node: &Node, loaded: &mut Loaded) -> HashMap<String, Process> {
    let sandboxes = &loaded.sandboxes;
    let pods: HashSet<&str> = sandboxes.iter().map(|s| s.id.as_str()).collect();
    let unread: HashSet<&str> = loaded.unread.iter().map(PodId::as_str).collect();
    let vmms: HashSet<Identity> = sandboxes
        .iter()
        .filter_map(|s| Some(s.vm?.process))
        .collect();
    let mut untold = HashMap::new();
    let mut servers = HashMap::new();
    let mut strays = Vec::new();
    for found in node.processes.find_all(&node.config) {
        let pod = found.run.file_name().and_then(|name| name.to_str());
        match pod.filter(|pod| pods.contains(pod)) {
            Some(pod) if found.role == Role::FileServer => {
                servers.insert(pod.to_owned(), found.process);
            }
            Some(_) if vmms.contains(&found.process.identity()) => {}
            Some(pod) if unread.contains(pod) => {
                untold.insert(pod.to_owned(), found.process.identity());
            }
            _ => strays.push(found),
        }
    }
    end_strays(&node.config, strays).await;
    for parent in [RunDir::all(&node.config), DataDir::all(&node.config)] {
        for name in names_in(&parent) {
            if !pods.contains(name.as_str()) {
                let path = parent.join(name);
                tracing::warn!(path = %path.display(), "directory that nobody owns");
                let directory = path.clone();
                let removed = blocking(move || beneath::remove_dir(&directory)).await;
                if let Err(error) = removed {
                    tracing::error!(%error, path = %path.display(), "remove a directory");
                }
            }
        }
    }
    for name in names_in(&node.config.root) {
        if scratch::is_unfinished(&name) {
            // Left by a daemon that was killed while it formatted.
            let _ = fs::remove_file(node.config.root.join(name));
        }
    }
    match node.network.pods().await {
        Ok(owners) => {
            for owner in owners.iter().filter(|o| !pods.contains(o.as_str())) {
                tracing::warn!(pod = %owner, "network of a pod that nobody owns");
                if let Err(error) = node.network.remove_orphan(owner).await {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, pod = %owner, "remove a network");
                }
            }
        }
        Err(error) => tracing::error!(%error, "look for networks that nobody owns"),
    }
    collect_networks(node, sandboxes);
    // Records that can't be read, of pods that are gone.
    loaded.unread_containers.retain(|(_, pod)| {
        let pod = pod.as_ref().map(PodId::as_str);
        pod.is_some_and(|pod| pods.contains(pod))
    });
    let unread = loaded.unread_containers.iter().map(|(id, _)| id);
    let known = loaded.containers.iter().map(|c| &c.id).chain(unread);
    let known: HashSet<&str> = known.map(ContainerId::as_str).collect();
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
    for sandbox in &mut loaded.sandboxes {
        if let (None, Some(process)) = (sandbox.vm, untold.remove(sandbox.id.as_str())) {
            // Enough to end it.
            sandbox.vm = Some(VmRecord {
                process,
                size: VmSize::UNKNOWN,
            });
        }
    }
    servers
}

/// Ends processes that nobody owns, all at once. Those that take longer than [`STRAYS_END`] end by
/// themselves later, or are found again by the next daemon.
async fn end_strays(config: &PodsConfig, strays: Vec<Found>) {
    let ends: Vec<_> = strays
        .into_iter()
        .map(|Found { run, process, .. }| {
            let pid = process.identity().pid;
            tracing::warn!(pid, run = %run.display(), "process of a pod that nobody owns");
            let root = config.cgroup_root.clone();
            let cgroup = cgroup::of_process(&root, pid);
            tokio::spawn(async move {
                if let Err(error) = process.end(Duration::ZERO).await {
                    tracing::error!(%error, "end a process that nobody owns");
                }
                let pod = run.file_name().and_then(|name| name.to_str());
                if let (Some(cgroup), Some(pod)) = (cgroup, pod) {
                    cgroup::remove_orphan(&root, &cgroup, pod).await;
                }
            })
        })
        .collect();
    if timeout(STRAYS_END, join_all(ends)).await.is_err() {
        tracing::warn!("some processes that nobody owns do not end yet");
    }
}

/// Lets plugins free what they hold for pods that are gone. Pods that are started or ended
/// meanwhile wait for it, the daemon's start does not.
fn collect_networks(node: &Node, sandboxes: &[SandboxRecord]) {
    let with_network = sandboxes.iter().filter(|s| s.network.is_some());
    let pods = with_network.map(|s| s.id.to_string()).collect();
    match node.network.gc(pods) {
        Ok(gc) => {
            tokio::spawn(async move {
                if let Err(error) = gc.await {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "let CNI plugins collect what pods left");
                }
            });
        }
        Err(error) => tracing::warn!(%error, "let CNI plugins collect what pods left"),
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
