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
    info::{ContainerInfo, ContainerState, SandboxState, VmInfo},
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
    let mut views = node.registry.views("");
    views.retain(|view| matches!(view.phase, Phase::Up));
    let containers = views.iter().flat_map(|view| view.containers.keys());
    let pods = views.iter().map(|view| view.sandbox.id.to_string());
    let ids = containers.map(ToString::to_string).chain(pods).collect();
    node.samples.keep_only(&ids);
    views.retain(|view| wanted.contains(&view.sandbox.id));
    let guests = join_all(views.iter().map(|view| guest(node, view)));
    let (answers, hosts) = tokio::join!(guests, on_host(node, &views, scope));
    let told = views.iter().zip(answers).zip(hosts);
    told.map(|((view, answer), host)| pod(node, view, answer, host))
        .collect()
}

fn pod(node: &Node, view: &PodView, answer: Option<Answer>, host: Option<HostUsage>) -> PodStats {
    let containers = view
        .containers
        .values()
        .filter_map(|info| container(node, info, answer.as_ref()))
        .collect();
    PodStats {
        host,
        guest: answer.map(|answer| answer.guest),
        containers,
        sandbox: view.sandbox.clone(),
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
        memory_bytes: vm.map_or(0, |vm| vm.max_memory_mib).saturating_mul(1 << 20),
        disk_bytes,
    };
    let known = view.containers.keys().map(|id| id.as_str());
    Ok(Answer::checked(response, &known.collect(), &bounds))
}

/// What each of the pods costs the host. A thread reads it of all, one after another: a thread for each
/// pod would be hundreds, which stay.
async fn on_host(node: &Node, views: &[Arc<PodView>], scope: Scope) -> Vec<Option<HostUsage>> {
    if scope == Scope::Containers {
        return vec![None; views.len()];
    }
    let vms: Vec<_> = views.iter().map(|view| view.sandbox.vm.clone()).collect();
    let measure = move |vm: &Option<VmInfo>| Some((Instant::now(), host::usage(vm.as_ref()?)?));
    let usages = blocking(move || vms.iter().map(measure).collect::<Vec<_>>()).await;
    let with_rate = |(view, usage): (&Arc<PodView>, Option<(Instant, HostUsage)>)| {
        let (at, mut usage) = usage?;
        let id = view.sandbox.id.as_str();
        usage.nano_cores = node.samples.cpu(id, at, usage.cpu_usage_ns);
        Some(usage)
    };
    views.iter().zip(usages).map(with_rate).collect()
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
