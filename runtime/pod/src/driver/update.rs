//! Changes of limits, one after another for each container.

use std::time::Duration;

use hull_base::host;
use hull_spec::{
    error::{ErrorKind, PodError},
    field::Field,
    id::ContainerId,
    oci,
    resources::{check, check_fits, merge, restoring},
    size::{Room, VmSize},
    spec::{Resources, SandboxSpec},
};
use hull_vm::{cgroup, client::VmClient, error::VmError};

use super::{operations::Done, state::Driver};
use crate::{
    command::{Reply, container_not_found},
    lifecycle::sandbox,
    record::VmRecord,
};

const MIB: u64 = 1 << 20;
/// How long a VMM may take to note how much memory its guest is to have: the pod's task waits for it.
const PLUG: Duration = Duration::from_secs(2);

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
        let size = self.size_with(id, &wanted, vm.size);
        let (control, agent) = (running.vm().control.clone(), running.vm().agent.clone());
        let id = id.clone();
        self.operations.spawn(async move {
            let result = async {
                checked?;
                if size != vm.size {
                    plug(&control, size).await?;
                }
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
                    if size != vm.size
                        && let Err(error) = plug(&control, vm.size).await
                    {
                        tracing::debug!(container = %id, %error, "undo a change of memory");
                    }
                    return Err(error.into());
                }
                Ok(wanted)
            };
            let result = result.await;
            Done::Updated(id, result)
        });
    }

    /// The size of the VM with other limits of one container: a pod whose containers have more than its VM gets
    /// that, if it can. kubelet tells the pod's size after those of the containers.
    fn size_with(&self, id: &ContainerId, limits: &Resources, size: VmSize) -> VmSize {
        if size.grows() {
            return size;
        }
        let limit = |limits: &Resources| u64::try_from(limits.memory_limit_bytes).unwrap_or(0);
        let others = self
            .containers
            .iter()
            .filter(|(other, container)| *other != id && container.has_process());
        let others = others.map(|(_, container)| limit(&container.limits()));
        let bytes = others.fold(limit(limits), u64::saturating_add);
        let now = size.memory_mib.saturating_add(size.least_mib);
        if bytes.div_ceil(MIB) < now {
            return size;
        }
        let record = &self.record;
        let overhead = record.overhead.as_ref().or(record.spec.overhead.as_ref());
        let overhead = match overhead.map_or(0, limit) {
            0 => self.node.config.guest_overhead_mib.saturating_mul(MIB),
            told => told,
        };
        let room = self.room().of_guest();
        let needed = VmSize {
            memory_mib: bytes.saturating_add(overhead).div_ceil(MIB).min(room),
            ..VmSize::UNKNOWN
        };
        size.with_memory_of(needed).unwrap_or(size)
    }

    fn room(&self) -> Room {
        cgroup::room(&self.node.config.cgroup_root, self.record.cgroup.as_ref())
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
                let saved = match self.save_size(id).await {
                    Ok(()) => self.save_container(id).await,
                    error => error,
                };
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
        let wanted = VmSize::of(&sizes, &self.node.config, host::cpus(), self.room());
        let Some(size) = vm.size.with_memory_of(wanted) else {
            return Err(too_large(ACTION, wanted, vm.size));
        };
        if wanted.vcpus > vm.size.vcpus {
            let reason = format!(
                "it needs {} CPUs, its VM has {}, and a VM that runs does not get more; a new \
                 pod would",
                wanted.vcpus, vm.size.vcpus
            );
            return Err(PodError::precondition(ACTION, reason));
        }
        let control = match &self.running {
            Some(running) if size != vm.size => Some(running.vm().control.clone()),
            _ => None,
        };
        if let Some(control) = &control {
            plug(control, size).await?;
        }
        record.vm = Some(VmRecord { size, ..vm });
        let before = std::mem::replace(&mut self.record, record);
        let saved = self.save().await;
        if saved.is_err() {
            self.record = before;
            if let Some(control) = control
                && let Err(error) = plug(&control, vm.size).await
            {
                tracing::warn!(pod = %self.record.id, %error, "undo a change of memory");
            }
        }
        self.publish();
        saved
    }

    /// Writes the size that the VM has with a container's limits, if it is another one now.
    async fn save_size(&mut self, id: &ContainerId) -> Result<(), PodError> {
        let (Some(container), Some(vm)) = (self.containers.get(id), self.record.vm) else {
            return Ok(());
        };
        let size = match container.has_process() {
            true => self.size_with(id, &container.limits(), vm.size),
            false => vm.size,
        };
        if size == vm.size {
            return Ok(());
        }
        self.record.vm = Some(VmRecord { size, ..vm });
        let saved = self.save().await;
        if saved.is_err() {
            self.record.vm = Some(vm);
        }
        saved
    }
}

/// Has a VM have the memory of this size.
async fn plug(control: &VmClient, size: VmSize) -> Result<(), VmError> {
    control.plug(size.least_mib, size.most_mib, PLUG).await
}

fn too_large(action: &'static str, wanted: VmSize, vm: VmSize) -> PodError {
    let reason = format!(
        "it needs {} MiB of memory, and its VM can have {} MiB; a new pod may have more",
        wanted.memory_mib,
        vm.memory_mib.saturating_add(vm.pluggable_mib)
    );
    PodError::precondition(action, reason)
}
