//! The sandbox as a whole: start, adoption, the end of its VM, stop and removal.

use std::{convert::Infallible, sync::Arc, time::Duration};

use error_reporter::Report;
use hull_network::GuestNetwork;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};

use hull_base::{
    metrics,
    stages::{self, stage},
};
use hull_spec::{error::PodError, info::BootTimes, size::VmSize};
use hull_vm::{
    agent::{self, client::Agent, wall_clock::WallClock},
    client::VmClient,
    rundir::{DataDir, RunDir},
    running::RunningVm,
    slots,
};

use super::{
    container::Container,
    operations::Done,
    state::{Driver, Queue, Running, next_input},
    vm_end::VmEnd,
};
use crate::{
    command::Admission,
    container::unmake::{OnFailure, unmake},
    events::EventKind,
    lifecycle::{
        container::{Event as ContainerEvent, State as ContainerState},
        sandbox::{Effect, Event, News, step},
    },
    network::{Context, Follower},
    registry::Phase,
    sandbox::{
        bringup,
        teardown::{self, Known},
    },
    storage::{atomic_volumes::AtomicVolumes, attachments::Attachments, devices::Devices},
};

/// How long containers may take to end after they were killed, and their logs to be completed.
const CONTAINERS_END: Duration = Duration::from_secs(15);
/// How long a checkpoint may take to be completed when its sandbox is removed: all of it is read once.
const CHECKPOINT_END: Duration = Duration::from_secs(300);
/// How long the guest may take to power off before its VM is ended.
const GUEST_END: Duration = Duration::from_secs(2);

/// What is known of a sandbox that this daemon has started.
#[derive(Debug)]
pub(crate) struct Start {
    pub times: BootTimes,
    /// What its guest was told.
    pub network: GuestNetwork,
}

impl Driver {
    pub(super) async fn bring_up(&mut self, admission: Option<Admission>) -> Result<(), PodError> {
        stages::attribute(stages::POD, self.id().as_str());
        let turn = async { Ok::<_, Infallible>(self.node.starts.turn().await) };
        let Ok(turn) = stage("turn", turn).await;
        let restore = self.restore.take();
        let checkpoint = restore
            .as_ref()
            .map(|restore| Arc::clone(&restore.checkpoint));
        let brought_up = bringup::bring_up(
            &self.node,
            self.record.clone(),
            checkpoint,
            &self.files,
            turn,
        )
        .await;
        match brought_up {
            Ok(up) => {
                let times: Vec<_> = up.times.parts().collect();
                tracing::info!(pod = %self.id(), ?times, cloned = up.times.cloned, "sandbox is up");
                measure(&up.times);
                self.record = up.record;
                let start = Start {
                    times: up.times,
                    network: up.network,
                };
                let attachments = self.attachments(up.vm, up.agent);
                if let Some(restore) = &restore {
                    restore.name(&attachments.vm.agent);
                }
                self.go_live(attachments, Some(start)).await;
                let taken = match &restore {
                    Some(restore) => self.take_containers(restore).await,
                    None => Ok(()),
                };
                let done = match taken {
                    Ok(()) => self.sandbox_event(Event::BringUpDone).await,
                    failed => failed,
                };
                let ready = match done {
                    Ok(()) => self.admit(admission).await,
                    // Without its record it would not outlive the daemon.
                    failed => failed,
                };
                match ready {
                    Ok(()) => {
                        if let Some(restore) = &restore {
                            self.announce_taken(restore);
                        }
                        Ok(())
                    }
                    // It must not be there.
                    Err(error) => Err(error.after_undo(self.sandbox_event(Event::Remove).await)),
                }
            }
            Err(failed) => {
                metrics::START_FAILURES.count(&[]);
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

    /// Asks whoever is to be asked before others see the sandbox.
    async fn admit(&self, admission: Option<Admission>) -> Result<(), PodError> {
        let Some(admission) = admission else {
            return Ok(());
        };
        let info = self.public.view.borrow().sandbox.clone();
        stage("admission", admission(info)).await
    }

    /// The VM of the sandbox, with nothing attached yet.
    pub(crate) fn attachments(&self, control: VmClient, agent: Agent) -> Attachments {
        let record = &self.record;
        let size = record.vm.map_or(VmSize::UNKNOWN, |vm| vm.size);
        let image_device = self.node.config.image_device;
        Attachments {
            vm: RunningVm {
                pod: record.id.clone(),
                run: RunDir::of(&self.node.config, &record.id),
                cgroup: record.cgroup.clone(),
                control,
                agent,
            },
            devices: Arc::new(Mutex::new(Devices::new(size, image_device))),
            files: Arc::clone(&self.files),
        }
    }

    /// Takes over a sandbox whose VM runs; `start` when this daemon has started it.
    pub(crate) async fn go_live(&mut self, attachments: Attachments, start: Option<Start>) {
        let network = self.record.network.clone();
        let links = network.iter().flat_map(|n| n.numbers());
        let mut devices = attachments.devices.lock().await;
        links.for_each(|number| devices.reserve(slots::net(number)));
        drop(devices);
        let vm = &attachments.vm;
        let events = agent::events::follow(vm.agent.clone());
        self.boot = start.as_ref().map(|start| start.times.clone());
        let known = start.map(|start| start.network);
        let network = network.map(|record| {
            let tell = self.operations.teller();
            let context = Context {
                network: Arc::clone(&self.node.network),
                vm: vm.clone(),
                devices: Arc::clone(&attachments.devices),
                // The agent would have to move them there.
                takes_links: self.record.spec.namespaces.user_namespace.is_none(),
                tell: move |news| tell(Done::Network(news)),
            };
            Follower::start(context, record, known)
        });
        let tell = self.operations.teller();
        let tell = move |warning| tell(Done::Volumes(warning));
        let steps = self.node.clock_steps.clone();
        self.running = Some(Running {
            _clock: WallClock::keep(vm.agent.clone(), steps, self.boot.is_some()),
            volumes: AtomicVolumes::start(self.id().clone(), vm.agent.clone(), tell),
            events,
            _network: network,
            attachments,
        });
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
                        self.user = None;
                        Ok(())
                    }
                };
                result = result.and(done);
            }
        }
        result
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
        let known = if self.stands_in {
            Known::Part
        } else {
            Known::All
        };
        result.and(teardown::release(&self.node, &mut self.record, known).await)
    }

    /// Ends the containers and powers the guest off. A VM that does not answer is killed: nobody in
    /// it would tell of any end.
    async fn end_guest(&mut self) {
        let vm = self.running.as_ref().map(Running::vm);
        if let Some(vm) = vm.filter(|vm| !vm.control.is_gone())
            && !vm.control.answers(GUEST_END).await
            && let Some(vmm) = self.vmm()
        {
            tracing::warn!(pod = %self.id(), "the VM does not answer and is killed");
            vmm.kill();
        }
        self.kill_containers().await;
        if let Some(vm) = self.running.as_ref().map(Running::vm)
            && !vm.control.is_gone()
        {
            vm.agent.shutdown(GUEST_END).await;
            if !vm.control.is_gone()
                && let Err(error) = vm.control.stop(GUEST_END).await
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
        if self.running.is_some() {
            self.settle(|container| !container.is_ending()).await;
        }
    }

    /// Handles what comes in until all containers are as wanted, for a limited time.
    async fn settle(&mut self, wanted: impl Fn(&Container) -> bool) {
        let deadline = Instant::now() + CONTAINERS_END;
        while !self.containers.values().all(&wanted) {
            match timeout_at(
                deadline,
                next_input(&mut self.running, &mut self.operations),
            )
            .await
            {
                Ok((input, call)) => Box::pin(call.of(self.quiet_input(input))).await,
                Err(_) => {
                    tracing::warn!(pod = %self.id(), "containers did not end in time");
                    return;
                }
            }
        }
    }

    /// Handles what comes in until no checkpoint is being written, which can't be stopped, for a limited time.
    async fn settle_checkpoint(&mut self) {
        let deadline = Instant::now() + CHECKPOINT_END;
        while self.is_saving {
            let next = next_input(&mut self.running, &mut self.operations);
            let Ok((input, call)) = timeout_at(deadline, next).await else {
                tracing::warn!(pod = %self.id(), "a checkpoint was not completed in time");
                return;
            };
            Box::pin(call.of(self.quiet_input(input))).await;
        }
    }

    /// Removes what is left of a stopped sandbox. May be repeated.
    async fn delete(&mut self) -> Result<(), PodError> {
        self.settle_checkpoint().await;
        self.operations.shutdown().await;
        self.forget_checkpoint().await?;
        for id in self.containers.keys() {
            unmake(&*self.node.images, None, id, OnFailure::Stop).await?;
        }
        let run = RunDir::of(&self.node.config, &self.record.id);
        let data = DataDir::of(&self.node.config, &self.record.id);
        teardown::directories(&run, &data).await?;
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

fn measure(times: &BootTimes) {
    let start = if times.cloned { "clone" } else { "boot" };
    for (stage, us) in times.parts() {
        metrics::START.observe(&[stage, start], Duration::from_micros(us));
    }
}
