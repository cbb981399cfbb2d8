//! Changes of limits, one after another for each container.

use hull_base::host;
use hull_spec::{
    error::{ErrorKind, PodError},
    field::Field,
    id::ContainerId,
    oci,
    resources::{check, check_fits, merge, restoring},
    size::VmSize,
    spec::{Resources, SandboxSpec},
};

use super::{operations::Done, state::Driver};
use crate::{
    command::{Reply, container_not_found},
    lifecycle::sandbox,
};

impl Driver {
    /// Queues an update behind those that are being carried out.
    pub(super) fn update_container(&mut self, id: &ContainerId, asked: Resources, reply: Reply) {
        let Some(container) = self.containers.get_mut(id) else {
            let _ = reply.send(Err(container_not_found(id)));
            return;
        };
        container.updates.push_back((asked, reply));
        if container.updates.len() == 1 {
            self.begin_update(id);
        }
    }

    /// Begins the first of a container's updates.
    fn begin_update(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let Some((asked, _)) = container.updates.front() else {
            return;
        };
        let now = container.limits();
        let wanted = merge(&now, asked);
        let checked = check(&wanted, Field::NewLimit);
        let (true, Some(running), Some(vm)) =
            (container.has_process(), &self.running, self.record.vm)
        else {
            // Without a process there is nothing to limit: what is written is what counts.
            let id = id.clone();
            self.operations
                .spawn(async move { Done::Updated(id, checked.map(|()| wanted)) });
            return;
        };
        let checked = checked.and_then(|()| check_fits(&now, &wanted, vm.size, Field::NewLimit));
        let (agent, id) = (running.vm().agent.clone(), id.clone());
        self.operations.spawn(async move {
            let result = async {
                checked?;
                let limits = oci::limits(&wanted);
                if let Err(error) = agent
                    .update(id.as_str(), &limits, wanted.oom_score_adj)
                    .await
                {
                    // A part of it may be in force.
                    let limits = oci::limits(&restoring(&now, &wanted));
                    let undo = agent.update(id.as_str(), &limits, now.oom_score_adj).await;
                    if let Err(error) = undo {
                        tracing::debug!(container = %id, %error, "undo a change of limits");
                    }
                    return Err(error.into());
                }
                Ok(wanted)
            };
            let result = result.await;
            Done::Updated(id, result)
        });
    }

    /// Writes the result of a container's first update, answers it and begins the next.
    pub(super) async fn updated(&mut self, id: &ContainerId, result: Result<Resources, PodError>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        let over = !container.has_process();
        let result = match (result, container.updates.front()) {
            // It ended meanwhile: nothing is left to limit.
            (Err(error), Some((asked, _)))
                if over && error.kind() != ErrorKind::InvalidArgument =>
            {
                Ok(merge(&container.limits(), asked))
            }
            (result, _) => result,
        };
        let answer = match result {
            Ok(limits) => {
                let before = container.record.resources.replace(limits);
                let saved = self.save_container(id).await;
                if saved.is_err()
                    && let Some(container) = self.containers.get_mut(id)
                {
                    container.record.resources = before;
                }
                self.publish();
                saved
            }
            Err(error) => Err(error),
        };
        let container = self.containers.get_mut(id);
        if let Some((_, reply)) = container.and_then(|c| c.updates.pop_front()) {
            let _ = reply.send(answer);
        }
        self.begin_update(id);
    }

    /// Takes new sizes of the pod: they fit into its VM, or are refused.
    pub(super) async fn update_sandbox(
        &mut self,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Result<(), PodError> {
        const ACTION: &str = "resize the sandbox";
        if let Some(limits) = &overhead {
            check(limits, Field::PodOverhead)?;
        }
        if let Some(limits) = &resources {
            check(limits, Field::PodLimit)?;
        }
        let (sandbox::State::Ready, Some(vm)) = (self.record.state, self.record.vm) else {
            return Err(self.not_ready(ACTION));
        };
        let mut record = self.record.clone();
        record.resources = resources.or(record.resources);
        record.overhead = overhead.or(record.overhead);
        let sizes = SandboxSpec {
            resources: record
                .resources
                .clone()
                .or_else(|| record.spec.resources.clone()),
            overhead: record
                .overhead
                .clone()
                .or_else(|| record.spec.overhead.clone()),
            ..SandboxSpec::default()
        };
        let wanted = VmSize::of(&sizes, &self.node.config, host::cpus());
        if wanted.memory_mib > vm.size.memory_mib {
            let reason = format!(
                "it needs {} MiB of memory, its VM has {} MiB, and a VM that runs does not get \
                 more; a new pod would",
                wanted.memory_mib, vm.size.memory_mib
            );
            return Err(PodError::precondition(ACTION, reason));
        }
        if wanted.vcpus > vm.size.vcpus {
            let reason = format!(
                "it needs {} CPUs, its VM has {}, and a VM that runs does not get more; a new \
                 pod would",
                wanted.vcpus, vm.size.vcpus
            );
            return Err(PodError::precondition(ACTION, reason));
        }
        let before = std::mem::replace(&mut self.record, record);
        let saved = self.save().await;
        if saved.is_err() {
            self.record = before;
        }
        self.publish();
        saved
    }
}
