//! `hull runtime-class`: what a pod takes beside its containers, as manifests for Kubernetes.
//!
//! A pod without containers is started for each handler and left alone for a while; what it takes of the host
//! then is all overhead.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hull_base::clock;
use hull_proto_cri::v1::{
    PodSandboxConfig, PodSandboxMetadata, PodSandboxStatsRequest, RunPodSandboxRequest,
    StatusRequest,
};
use hull_spec::size::OVERHEAD_MIB;
use tokio::{sync::watch, time::sleep};

use crate::{
    client::{Client, refused},
    config::Handlers,
    containers::own,
    run::interrupts,
    table::{self, time},
};

const MIB: u64 = 1 << 20;

/// What `hull runtime-class` is asked for.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RuntimeClassArgs {
    /// Handlers [default: all that have a name]
    #[arg(value_name = "HANDLER")]
    handlers: Vec<String>,
    /// Seconds that a pod is left alone before it is measured, and while it is
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=600))]
    idle: u64,
}

/// Prints a manifest for each handler.
pub(crate) async fn runtime_class(
    client: &Client,
    configured: &Handlers,
    arguments: &RuntimeClassArgs,
) -> Result<()> {
    let mut known = known(client).await?;
    // Those of other runtimes are no VMs.
    known.retain(|name| {
        configured
            .get(name)
            .is_none_or(|handler| handler.delegate.is_none())
    });
    for asked in &arguments.handlers {
        ensure!(
            known.contains(asked),
            "there is no handler {asked} (there is: {})",
            known.join(", ")
        );
    }
    let handlers = match arguments.handlers.as_slice() {
        [] => &known,
        some => some,
    };
    let mut interrupted = interrupts::count().context("install signal handlers")?;
    for handler in handlers {
        let idle = Duration::from_secs(arguments.idle);
        let overhead = measure(client, handler, idle, &mut interrupted).await;
        let overhead = overhead.with_context(|| format!("measure a pod of {handler}"))?;
        let at = time(clock::now_ns()).unwrap_or_default();
        table::print(&overhead.manifest(handler, &at))?;
    }
    Ok(())
}

/// The names that a RuntimeClass can have as its handler.
async fn known(client: &Client) -> Result<Vec<String>> {
    let status = client
        .runtime
        .clone()
        .status(StatusRequest::default())
        .await;
    let status = status.map_err(refused("ask for the status"))?.into_inner();
    let names = status.runtime_handlers.into_iter().map(|known| known.name);
    Ok(names.filter(|name| !name.is_empty()).collect())
}

/// What a pod without containers takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Overhead {
    memory_bytes: u64,
    millicpus: u64,
}

impl Overhead {
    fn manifest(self, handler: &str, at: &str) -> String {
        let Self {
            memory_bytes,
            millicpus,
        } = self;
        let measured = memory_bytes.div_ceil(MIB);
        let memory = measured.max(OVERHEAD_MIB);
        let cpu = millicpus.max(1);
        format!(
            "---\n\
             # {at}: an idle pod without containers took {measured} MiB of the host and {millicpus} m of a CPU.\n\
             # With less than {OVERHEAD_MIB} MiB containers could not use all of their limits.\n\
             apiVersion: node.k8s.io/v1\n\
             kind: RuntimeClass\n\
             metadata:\n  name: {handler}\n\
             handler: {handler}\n\
             overhead:\n  podFixed:\n    memory: {memory}Mi\n    cpu: {cpu}m\n"
        )
    }
}

/// Starts a pod, measures it and removes it.
async fn measure(
    client: &Client,
    handler: &str,
    idle: Duration,
    interrupted: &mut watch::Receiver<u32>,
) -> Result<Overhead> {
    let request = RunPodSandboxRequest {
        config: Some(pod(handler)),
        runtime_handler: handler.to_owned(),
    };
    let run = client.runtime.clone().run_pod_sandbox(request).await;
    let id = run
        .map_err(refused("run the pod"))?
        .into_inner()
        .pod_sandbox_id;
    let measured = tokio::select! {
        measured = idle_pod(client, &id, idle) => measured,
        _ = interrupted.changed() => Err(anyhow::anyhow!("interrupted")),
    };
    own::end(client, &id).await?;
    measured
}

async fn idle_pod(client: &Client, id: &str, idle: Duration) -> Result<Overhead> {
    sleep(idle).await;
    let begin = taken(client, id).await?;
    sleep(idle).await;
    let end = taken(client, id).await?;
    let (cpu_ns, ns) = (
        end.cpu_ns.saturating_sub(begin.cpu_ns),
        end.at_ns.saturating_sub(begin.at_ns),
    );
    Ok(Overhead {
        memory_bytes: begin.memory_bytes.max(end.memory_bytes),
        millicpus: (u128::from(cpu_ns) * 1000)
            .checked_div(ns.into())
            .and_then(|millicpus| u64::try_from(millicpus).ok())
            .unwrap_or(0),
    })
}

/// What the host counted.
struct Taken {
    at_ns: u64,
    cpu_ns: u64,
    memory_bytes: u64,
}

async fn taken(client: &Client, id: &str) -> Result<Taken> {
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: id.to_owned(),
    };
    let stats = client.runtime.clone().pod_sandbox_stats(request).await;
    let stats = stats
        .map_err(refused("measure the pod"))?
        .into_inner()
        .stats;
    let linux = stats.and_then(|stats| stats.linux);
    let parts = linux.and_then(|linux| Some((linux.cpu?, linux.memory?)));
    let Some((cpu, memory)) = parts else {
        bail!("the daemon tells nothing of what it takes");
    };
    let value = |value: Option<hull_proto_cri::v1::UInt64Value>| value.map_or(0, |v| v.value);
    Ok(Taken {
        at_ns: u64::try_from(cpu.timestamp).unwrap_or(0),
        cpu_ns: value(cpu.usage_core_nano_seconds),
        memory_bytes: value(memory.working_set_bytes),
    })
}

fn pod(handler: &str) -> PodSandboxConfig {
    let name = format!("idle-{handler}-{:x}", clock::now_ns());
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            uid: name.clone(),
            name,
            namespace: own::NAMESPACE.to_owned(),
            attempt: 0,
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_has_what_was_measured_and_no_less_than_a_guest_needs() {
        let manifest = |mib: u64, millicpus| {
            let memory_bytes = mib * MIB - 1;
            let overhead = Overhead {
                memory_bytes,
                millicpus,
            };
            overhead.manifest("small", "now")
        };
        let text = manifest(50, 4);
        assert!(text.contains("\nhandler: small\n"), "{text}");
        assert!(text.contains("    memory: 50Mi\n    cpu: 4m\n"), "{text}");
        let text = manifest(7, 0);
        assert!(text.contains("took 7 MiB"), "{text}");
        assert!(
            text.contains(&format!("memory: {OVERHEAD_MIB}Mi\n    cpu: 1m\n")),
            "{text}"
        );
    }
}
