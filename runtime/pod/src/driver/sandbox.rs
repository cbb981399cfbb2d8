//! The sandbox as a whole: start, adoption, the end of its VM, stop and removal.

use std::{net::IpAddr, sync::Arc, time::Duration};

use error_reporter::Report;
use hull_network::GuestNetwork;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};

use hull_base::{beneath, blocking, clock};
use hull_spec::{error::PodError, id::ContainerId, info::BootTimes};
use hull_vm::{
    agent::{self, client::Agent, stdio::OutputEnd},
    client::VmClient,
    rundir::{DataDir, RunDir},
    slots,
};

use super::{Container, Done, Driver, Live, Queue, next_input};
use crate::{
    bringup::{self, network_error},
    events::EventKind,
    lifecycle::{
        container::{Event as ContainerEvent, Exit, Reason, State as ContainerState},
        sandbox::{Effect, Event, News, State, step},
    },
    logs::pump::ContainerLog,
    network::{Follower, NetworkNews, Reach},
    registry::Phase,
    storage::{files::HostFiles, images::ImageDisks, volumes::LiveVolumes},
};

/// How long containers may take to end after they were killed, and their logs to be completed.
const CONTAINERS_END: Duration = Duration::from_secs(15);
/// How long the guest may take to power off before its VM is ended.
const GUEST_END: Duration = Duration::from_secs(2);
/// How long a VMM may take to exit before it is killed.
const VMM_END: Duration = Duration::from_secs(2);
/// Exit code of a container whose VM died under it (128 + SIGKILL).
const KILLED: i32 = 137;

/// What is known of a sandbox that this daemon has started.
#[derive(Debug)]
pub(crate) struct Start {
    pub times: BootTimes,
    /// What its guest was told.
    pub network: GuestNetwork,
}

/// Whether the end of a VM was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VmEnd {
    Asked,
    ByItself,
}

impl Driver {
    /// Brings the sandbox up, tells the result to those who wait, and then runs it.
    pub(crate) async fn start(mut self) {
        let result = self.bring_up().await;
        if self.record.state != State::Gone {
            self.phase = Phase::Up;
        }
        self.publish();
        if let Err(error) = &result {
            let error = error as &dyn std::error::Error;
            tracing::warn!(pod = %self.id(), error, "sandbox could not be started");
        }
        self.started.send_replace(Some(result));
        self.run().await;
    }

    async fn bring_up(&mut self) -> Result<(), PodError> {
        let turn = self.node.starts.turn().await;
        let brought_up = bringup::bring_up(&self.node, self.record.clone(), turn).await;
        match brought_up {
            Ok(up) => {
                tracing::info!(pod = %self.id(), times = ?up.times, "sandbox is up");
                self.record = up.record;
                let start = Start {
                    times: up.times,
                    network: up.network,
                };
                let disks = ImageDisks::new(&self.record.spec, &self.node.config);
                self.go_live(up.vm, up.agent, disks, Some(start));
                match self.sandbox_event(Event::BringUpDone).await {
                    Ok(()) => Ok(()),
                    // Without its record it would not outlive the daemon: it must not be there.
                    Err(error) => Err(error.after_undo(self.sandbox_event(Event::Remove).await)),
                }
            }
            Err(failed) => {
                let left = failed.left.is_some();
                if let Some(record) = failed.left {
                    self.record = record;
                }
                self.record.message = Report::new(&failed.error).to_string();
                // What is left was recorded before; this only adds the message.
                let _ = self.sandbox_event(Event::BringUpFailed { left }).await;
                Err(failed.error)
            }
        }
    }

    /// Takes over a sandbox whose VM runs; `start` when this daemon has started it.
    pub(crate) fn go_live(
        &mut self,
        vm: VmClient,
        agent: Agent,
        mut disks: ImageDisks,
        start: Option<Start>,
    ) {
        let links = self.record.network.iter().flat_map(|n| n.numbers());
        links.for_each(|number| disks.reserve(slots::net(number)));
        let events = agent::events::follow(agent.clone());
        self.boot = start.as_ref().map(|start| start.times);
        let known = start.map(|start| start.network);
        let record = self.record.network.clone();
        let disks = Arc::new(Mutex::new(disks));
        let network = record.map(|record| {
            let done = self.done.clone();
            let reach = Reach {
                node: Arc::clone(&self.node),
                vm: vm.clone(),
                agent: agent.clone(),
                disks: Arc::clone(&disks),
                // The agent would have to move them there.
                takes_links: self.record.spec.namespaces.user_namespace.is_none(),
                tell: move |news| {
                    // An error means that the pod's task is gone.
                    let _ = done.send(Done::Network(news));
                },
            };
            Follower::start(reach, record, known)
        });
        let done = self.done.clone();
        let volumes = LiveVolumes::start(self.id().clone(), agent.clone(), move |warning| {
            // An error means that the pod's task is gone.
            let _ = done.send(Done::Volumes(warning));
        });
        self.live = Some(Live {
            vm,
            agent,
            volumes,
            events,
            disks,
            _network: network,
        });
    }

    /// Takes over what became of the pod's network.
    pub(super) async fn network_changed(&mut self, news: NetworkNews) {
        // A stopped pod has none, whatever was on its way.
        if self.live.is_none() {
            return;
        }
        match news {
            NetworkNews::Addresses(there) => self.addresses_changed(there).await,
            NetworkNews::Record(record, kept) => {
                let before = self.record.network.replace(*record);
                let saved = self.save().await;
                if saved.is_err() {
                    self.record.network = before;
                }
                // An error means that nobody waits any more.
                let _ = kept.send(saved.is_ok());
            }
        }
    }

    async fn addresses_changed(&mut self, there: Vec<IpAddr>) {
        if self.record.seen_ips.as_ref() == Some(&there) {
            return;
        }
        let before = self.record.seen_ips.take();
        let before = before.unwrap_or_else(|| self.record.ips.clone());
        self.record.ips = addresses(&self.record.ips, &before, &there);
        self.record.seen_ips = Some(there);
        // A failure was logged. The next daemon compares with what was saved before.
        let _ = self.save().await;
        self.publish();
    }

    /// Adds a container that an earlier daemon made.
    pub(crate) fn insert(&mut self, container: Container) {
        self.containers
            .insert(container.record.id.clone(), container);
    }

    /// Adds the log of a container that an earlier daemon made.
    pub(crate) fn insert_log(&mut self, id: &ContainerId, log: ContainerLog) {
        if let Some(container) = self.containers.get_mut(id) {
            container.log = Some(log);
        }
    }

    /// Watches the volumes of containers that an earlier daemon made. What changed since then is
    /// looked for at once.
    pub(crate) async fn watch_volumes(&mut self) {
        let Some(live) = &mut self.live else {
            return;
        };
        for (id, container) in &self.containers {
            let (node, spec) = (Arc::clone(&self.node), Arc::clone(&container.record.spec));
            let changed = Arc::clone(live.volumes.changed());
            let watched = blocking(move || node.watches.watch(&spec, &changed)).await;
            live.volumes.keep(id.clone(), watched);
        }
        live.volumes.changed().notify_one();
    }

    /// The files of the host that its containers mount.
    pub(crate) fn files(&self) -> &Arc<Mutex<HostFiles>> {
        &self.files
    }

    /// Lets the sandbox stand in for one whose record can't be read.
    pub(crate) fn stands_in(&mut self) {
        self.stands_in = true;
    }

    /// Notes why the sandbox is not ready.
    pub(crate) fn note(&mut self, message: String) {
        self.record.message = message;
    }

    /// Ends what is left of a VM that can't be adopted.
    pub(crate) async fn end_lost_vm(&mut self, code: i32) {
        self.end_process().await;
        self.end_containers(code).await;
        self.settle(|container| !container.is_ending()).await;
        // With nothing live left, its effects only write the record, whose failure is logged.
        let _ = self.sandbox_event(Event::VmGone).await;
    }

    /// Lets an event happen to the sandbox, and what follows from it.
    ///
    /// # Errors
    /// The first of the effects that failed.
    pub(crate) async fn sandbox_event(&mut self, event: Event) -> Result<(), PodError> {
        let mut result = Ok(());
        let mut queue = Queue::from([event]);
        while let Some(event) = queue.pop_front() {
            let before = self.record.state;
            let (next, effects) = step(before, event);
            if next != before {
                tracing::info!(pod = %self.id(), ?before, ?next, "sandbox");
            }
            self.record.state = next;
            for effect in effects {
                let done = match effect {
                    Effect::Save => self.save().await,
                    Effect::FailContainers => {
                        self.vm_gone(VmEnd::ByItself).await;
                        Ok(())
                    }
                    Effect::TearDown => {
                        let done = self.tear_down().await;
                        queue.push_back(match done {
                            Ok(()) => Event::StopDone,
                            Err(_) => Event::StopFailed,
                        });
                        done
                    }
                    Effect::Delete => {
                        let done = self.delete().await;
                        queue.push_back(match done {
                            Ok(()) => Event::RemoveDone,
                            Err(_) => Event::RemoveFailed,
                        });
                        done
                    }
                    Effect::Announce(news) => {
                        self.publish();
                        self.announce(news);
                        Ok(())
                    }
                    Effect::Forget => {
                        self.phase = Phase::Gone;
                        self.publish();
                        self.node.registry.release(&self.record.id);
                        Ok(())
                    }
                };
                result = result.and(done);
            }
        }
        result
    }

    /// Lets the containers end with their VM, whose process is ended when it is still there.
    pub(super) async fn vm_gone(&mut self, end: VmEnd) {
        if let Some(live) = self.live.take()
            && end == VmEnd::ByItself
        {
            let report = live.vm.report();
            tracing::warn!(pod = %self.id(), %report, "VM ended by itself");
            // A reason that is known already led to this end.
            if self.record.message.is_empty() {
                self.record.message = format!("the VM ended: {report}");
            }
        }
        self.end_process().await;
        for (_, end) in self.execs.drain() {
            end.stdout.send_replace(OutputEnd::Gone);
            end.stderr.send_replace(OutputEnd::Gone);
        }
        self.end_containers(KILLED).await;
    }

    /// Kills the VMM process when it does not exit by itself.
    async fn end_process(&mut self) {
        if let Some(vmm) = self.vmm()
            && let Err(error) = vmm.end(VMM_END).await
        {
            tracing::error!(pod = %self.id(), %error, "end the VMM process");
            return;
        }
        self.record.vm = None;
        if let Err(error) = self.files.lock().await.end().await {
            tracing::error!(pod = %self.id(), %error, "end the file server");
        }
    }

    /// Lets all containers that have not exited exit with this code.
    async fn end_containers(&mut self, code: i32) {
        let exit = Exit {
            code,
            reason: Reason::VmGone,
            message: if self.record.message.is_empty() {
                "the sandbox was stopped".into()
            } else {
                self.record.message.clone()
            },
            at_ns: clock::now_ns(),
        };
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            if let Some(log) = self.containers.get(&id).and_then(|c| c.log.as_ref()) {
                log.end(OutputEnd::Gone, OutputEnd::Gone);
            }
            self.container_event(&id, ContainerEvent::Exited(exit.clone()))
                .await;
        }
    }

    /// Ends containers, VM and network: as much as can be ended, whatever fails.
    async fn tear_down(&mut self) -> Result<(), PodError> {
        self.end_guest().await;
        let mut result = Ok(());
        self.vm_gone(VmEnd::Asked).await;
        if let Some(vm) = self.record.vm {
            let pid = vm.process.pid;
            result = Err(PodError::precondition(
                "end the VM",
                format!("its process {pid} can't be killed"),
            ));
        }
        self.settle(|container| !matches!(container.state, ContainerState::Draining(..)))
            .await;
        if let Some(network) = self.record.network.clone() {
            match self.node.network.teardown(&network).await {
                Ok(()) => {
                    self.record.network = None;
                    self.record.ips.clear();
                    self.record.seen_ips = None;
                }
                Err(error) => result = result.and(Err(network_error(error))),
            }
        } else if self.stands_in {
            let id = self.record.id.as_str();
            let removed = self.node.network.remove_orphan(id).await;
            let removed = removed.map_err(network_error);
            result = result.and(removed);
        }
        if let Some(cgroup) = &self.record.cgroup {
            match cgroup.remove().await {
                Ok(()) => self.record.cgroup = None,
                Err(error) => result = result.and(Err(error)),
            }
        }
        // Nobody can use the disk any more, and it may be large.
        let data = DataDir::of(&self.node.config, &self.record.id);
        let removed = beneath::remove_dir(data.path()).map_err(|source| {
            let action = format!("remove {}", data.path().display());
            PodError::internal(action, source)
        });
        result.and(removed)
    }

    /// Ends the containers and powers the guest off. A VM that does not answer is killed: nobody in
    /// it would tell of any end.
    async fn end_guest(&mut self) {
        let live = self.live.as_ref().filter(|live| !live.vm.is_gone());
        if let Some(live) = live
            && !live.vm.answers(GUEST_END).await
            && let Some(vmm) = self.vmm()
        {
            tracing::warn!(pod = %self.id(), "the VM does not answer and is killed");
            vmm.kill();
        }
        self.kill_containers().await;
        if let Some(live) = &self.live
            && !live.vm.is_gone()
        {
            live.agent.shutdown(GUEST_END).await;
            if !live.vm.is_gone()
                && let Err(error) = live.vm.stop(GUEST_END).await
            {
                tracing::debug!(pod = %self.id(), %error, "stop the VM");
            }
        }
    }

    async fn kill_containers(&mut self) {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            let event = ContainerEvent::Stop {
                grace: Duration::ZERO,
            };
            self.container_event(&id, event).await;
        }
        if self.live.is_some() {
            self.settle(|container| !container.is_ending()).await;
        }
    }

    /// Handles what comes in until all containers are as wanted, for a limited time.
    async fn settle(&mut self, wanted: impl Fn(&Container) -> bool) {
        let deadline = Instant::now() + CONTAINERS_END;
        while !self.containers.values().all(&wanted) {
            match timeout_at(deadline, next_input(&mut self.live, &mut self.dones)).await {
                Ok(input) => self.quiet_input(input).await,
                Err(_) => {
                    tracing::warn!(pod = %self.id(), "containers did not end in time");
                    return;
                }
            }
        }
    }

    /// Removes what is left of a stopped sandbox. May be repeated.
    async fn delete(&mut self) -> Result<(), PodError> {
        self.operations.shutdown().await;
        for id in self.containers.keys() {
            let released = self.node.images.release(id.as_str()).await;
            released.map_err(|e| PodError::internal("release the container's image", e))?;
        }
        let run = RunDir::of(&self.node.config, &self.record.id);
        let data = DataDir::of(&self.node.config, &self.record.id);
        bringup::remove_dirs(&run, &data)?;
        let ids = self.containers.keys().cloned().collect();
        self.node
            .records
            .delete_sandbox(&self.record.id, ids)
            .await?;
        // Dropping them tells those who wait that they are gone.
        while let Some((id, container)) = self.containers.pop_first() {
            if container.is_visible() {
                self.publish();
                self.tell(EventKind::Removed, Some(id));
            }
        }
        Ok(())
    }

    fn announce(&self, news: News) {
        match news {
            // Its parts start together: there is nothing between the two.
            News::Created => {
                self.tell(EventKind::Created, None);
                self.tell(EventKind::Started, None);
            }
            News::Stopped => self.tell(EventKind::Stopped, None),
            News::Removed => self.tell(EventKind::Removed, None),
        }
    }
}

/// The pod's addresses after its interface had `before` and has `there`: those that it keeps, then
/// those that are new. What CNI named or left out is as it was, unless it came or went. The first one
/// is of the family that it was, if there is one.
fn addresses(ips: &[IpAddr], before: &[IpAddr], there: &[IpAddr]) -> Vec<IpAddr> {
    let is_gone = |ip: &IpAddr| before.contains(ip) && !there.contains(ip);
    let is_new = |ip: &IpAddr| !before.contains(ip) && !ips.contains(ip);
    let kept = ips.iter().filter(|ip| !is_gone(ip));
    let mut next: Vec<_> = kept
        .chain(there.iter().filter(|ip| is_new(ip)))
        .copied()
        .collect();
    let first = ips.first();
    let is_alike = |ip: &IpAddr| first.is_some_and(|first| first.is_ipv4() == ip.is_ipv4());
    if let Some(at) = next.iter().position(is_alike) {
        next[..=at].rotate_right(1);
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_come_and_go_are_the_pods() {
        let parse = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        // CNI names one, and one that is not there; another it leaves out.
        let named = parse(&["10.0.0.2", "192.0.2.1"]);
        let before = parse(&["10.0.0.2", "10.0.0.3"]);
        let after = |there: &[&str]| addresses(&named, &before, &parse(there));
        assert_eq!(after(&["10.0.0.3", "10.0.0.2"]), named);
        assert_eq!(after(&["10.0.0.2"]), named);
        assert_eq!(
            after(&["10.0.0.2", "10.0.0.3", "fd00::2"]),
            parse(&["10.0.0.2", "192.0.2.1", "fd00::2"])
        );
        assert_eq!(after(&["10.0.0.9"]), parse(&["192.0.2.1", "10.0.0.9"]));
        assert_eq!(after(&[]), parse(&["192.0.2.1"]));
        // Of two families.
        let both = parse(&["10.0.0.2", "fd00::2"]);
        let there = parse(&["fd00::2", "10.0.0.9"]);
        assert_eq!(
            addresses(&both, &both, &there),
            parse(&["10.0.0.9", "fd00::2"])
        );
        let there = parse(&["fd00::2"]);
        assert_eq!(addresses(&both, &both, &there), there);
        assert!(addresses(&both, &both, &[]).is_empty());
    }
}
