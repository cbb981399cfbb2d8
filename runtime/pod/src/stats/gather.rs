//! Asks guests and host.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::time::timeout;

use hull_base::{blocking, clock};
use hull_spec::{
    id::PodId,
    info::{ContainerInfo, ContainerState, SandboxInfo, SandboxState},
    stats::{ContainerStats, Cpu, HostUsage, PodStats, Usage},
};
use hull_vm::agent::{
    client::Agent,
    error::GuestError,
    stats::{Answer, Bounds},
};

use crate::{
    node::Node,
    registry::{Phase, PodView},
    stats::{host, samples::Samples},
};

/// How long a guest may take to answer; one that takes longer is left alone for a while.
const GUEST: Duration = Duration::from_secs(3);
/// How long who asks for numbers waits for a guest.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whose numbers are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those of containers.
    Containers,
    /// Those of the pod on the host too.
    Pods,
}

/// What pods use. All are asked at once, and none waits for another.
pub(crate) async fn gather(node: &Node, wanted: &HashSet<PodId>, scope: Scope) -> Vec<PodStats> {
    let views: Vec<Arc<PodView>> = node
        .registry
        .all()
        .iter()
        .map(|entry| Arc::clone(&entry.view.borrow()))
        .filter(|view| matches!(view.phase, Phase::Up))
        .collect();
    let containers = views.iter().flat_map(|view| view.containers.keys());
    let pods = views.iter().map(|view| view.sandbox.id.to_string());
    let ids = containers.map(ToString::to_string).chain(pods).collect();
    node.samples.keep_only(&ids);
    let asked = views
        .into_iter()
        .filter(|view| wanted.contains(&view.sandbox.id))
        .map(|view| pod(node, view, scope));
    join_all(asked).await
}

async fn pod(node: &Node, view: Arc<PodView>, scope: Scope) -> PodStats {
    let sandbox = &view.sandbox;
    let (answer, host) = tokio::join!(guest(node, &view), on_host(node, sandbox, scope));
    let containers = view
        .containers
        .values()
        .filter_map(|info| container(node, info, answer.as_ref()))
        .collect();
    PodStats {
        host,
        guest: answer.map(|answer| answer.guest),
        containers,
        sandbox: sandbox.clone(),
    }
}

async fn guest(node: &Node, view: &Arc<PodView>) -> Option<Answer> {
    let id = view.sandbox.id.as_str();
    if view.sandbox.state != SandboxState::Ready || node.samples.is_silent(id) {
        return None;
    }
    // It goes on when nobody waits for it any more: only a guest that does not answer at all is
    // left alone.
    let (samples, disk_bytes) = (node.samples.clone(), node.config.scratch_bytes);
    let asked = tokio::spawn(ask(samples, Arc::clone(view), disk_bytes));
    timeout(PATIENCE, asked).await.ok()?.ok()?
}

async fn ask(samples: Samples, view: Arc<PodView>, disk_bytes: u64) -> Option<Answer> {
    let (id, agent) = (&view.sandbox.id, view.agent.as_ref()?);
    match agent.guard(count(agent, &view, disk_bytes)).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(pod = %id, error, "no numbers of this pod for a while");
            samples.silent(id.as_str());
            None
        }
        // The pod's task tells.
        Err(_) => None,
    }
}

async fn count(agent: &Agent, view: &PodView, disk_bytes: u64) -> Result<Answer, GuestError> {
    let response = agent.stats(GUEST).await?;
    let now_ns = clock::now_ns();
    let vm = view.sandbox.vm.as_ref();
    let age_ns = u64::try_from(now_ns.saturating_sub(view.sandbox.created_at_ns)).unwrap_or(0);
    let bounds = Bounds {
        now_ns,
        cpu_ns: age_ns.saturating_mul(vm.map_or(1, |vm| vm.vcpus.into())),
        memory_bytes: vm.map_or(0, |vm| vm.memory_mib).saturating_mul(1 << 20),
        disk_bytes,
    };
    let known = view.containers.keys().map(|id| id.as_str());
    Ok(Answer::checked(response, &known.collect(), &bounds))
}

async fn on_host(node: &Node, sandbox: &SandboxInfo, scope: Scope) -> Option<HostUsage> {
    if scope == Scope::Containers {
        return None;
    }
    let vm = sandbox.vm.clone()?;
    let mut usage = blocking(move || host::usage(&vm)).await?;
    let id = sandbox.id.as_str();
    usage.nano_cores = node.samples.cpu(id, Instant::now(), usage.cpu_usage_ns);
    Some(usage)
}

/// None: it runs, and nothing is known of it.
fn container(node: &Node, info: &ContainerInfo, answer: Option<&Answer>) -> Option<ContainerStats> {
    let (id, samples) = (info.id.as_str(), &node.samples);
    if info.state != ContainerState::Running {
        let last = samples.last(id);
        return Some(ContainerStats {
            container: info.clone(),
            at_ns: clock::now_ns(),
            usage: Usage {
                cpu: Cpu {
                    usage_ns: last.cpu_usage_ns,
                    ..Cpu::default()
                },
                ..Usage::default()
            },
            nano_cores: Some(0),
            writable: last.writable,
            ulimits: Vec::new(),
        });
    }
    let answer = answer?;
    let told = answer.containers.get(id)?;
    if let Some(writable) = told.writable {
        samples.writable(id, writable);
    }
    Some(ContainerStats {
        container: info.clone(),
        at_ns: answer.guest.at_ns,
        usage: told.usage.clone(),
        nano_cores: samples.cpu(id, answer.at, told.usage.cpu.usage_ns),
        // A walk that is under way again does not make it unknown.
        writable: samples.last(id).writable,
        ulimits: told.ulimits.clone(),
    })
}
