//! A checkpoint of the pod, while it goes on:
//!
//! ```text
//! refused? ─▶ recorded ─▶ memory ─▶ containers ─▶ VM ────▶ what of it ─▶ VM goes ─▶ containers ─▶ digests, ─▶ at
//!             where it    written   stand still   stands   changed,      on         go on         manifest    its
//!             is written                          still    state, disk                                        place
//! ```
//! Where containers and VM stand still it is a part of the task, so that nothing else is asked of the guest; the
//! rest is beside it. A kernel that does not note which pages are written to (`MEM_SOFT_DIRTY`) has all memory
//! written while the VM stands still. Whatever fails, the pod goes on and what was written is removed; a daemon that is killed leaves
//! that to the next one, which finds in the record where it was written. A pod that does not go on within
//! [`PATIENCE`] is ended, and says so: one that stands still for ever helps nobody.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hull_image::ImageId;
use hull_proto_vmm::fs::Owner;
use tokio::time::{Instant, sleep};

use hull_base::{
    blocking, clock,
    faults::{self, Point},
    stages::{Kept, stage},
};
use hull_spec::{error::PodError, id::ContainerId, spec::SandboxSpec};
use hull_vm::{client::CALL_TIMEOUT, rundir::DataDir, running::RunningVm, slots};

use super::{container::Container, operations::Done, state::Driver};
use crate::{
    checkpoint::{
        ahead::{self, Ahead, LONGEST},
        aside::{self, ACTION, Aside},
        image::saved_image,
        manifest::{EndedContainer, Files, Manifest, SavedContainer, SavedDevice, SavedKind},
    },
    command::Reply,
    lifecycle::{container::State, sandbox},
    storage::{empty_dir, host_files::SavedFiles, scratch},
};

/// How long it is tried to let the pod go on.
const PATIENCE: Duration = Duration::from_secs(60);
/// The pause before it is tried again.
const RETRY: Duration = Duration::from_millis(500);

impl Driver {
    /// Begins a checkpoint; the pod goes on when this returns.
    pub(super) async fn checkpoint(&mut self, output: &Path, reply: Reply<Duration>) {
        match self.plan_aside(output).await {
            Ok((vm, aside)) => {
                self.is_saving = true;
                let process = self.vmm().map(|vmm| vmm.identity().pid);
                self.operations.spawn(async move {
                    let ahead = ahead::copy(&vm, process, aside).await;
                    Done::Copied(ahead.map(Box::new), reply)
                });
            }
            Err(error) => {
                // The caller may be gone.
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Goes on with a checkpoint once memory was written; the pod goes on when this returns.
    pub(super) async fn copied(
        &mut self,
        ahead: Result<Box<Ahead>, PodError>,
        reply: Reply<Duration>,
    ) {
        let cut = match ahead {
            Ok(ahead) => self.cut(*ahead).await,
            Err(error) => Err(error),
        };
        match cut {
            Ok((aside, manifest)) => {
                let paused = Duration::from_micros(manifest.paused_us);
                self.operations.spawn(async move {
                    let finished = blocking(move || aside.finish(manifest)).await;
                    Done::Checkpointed(finished.map(|()| paused), reply)
                });
            }
            Err(error) => self.checkpointed(Err(error), reply).await,
        }
    }

    /// Notes the end of a checkpoint, and answers.
    pub(super) async fn checkpointed(
        &mut self,
        result: Result<Duration, PodError>,
        reply: Reply<Duration>,
    ) {
        self.is_saving = false;
        let forgotten = self.forget_checkpoint().await;
        let result = match (result, forgotten) {
            (Err(error), forgotten) => Err(error.after_undo(forgotten)),
            // It is complete.
            (Ok(paused), _) => {
                tracing::info!(pod = %self.id(), ?paused, "checkpoint is complete");
                Ok(paused)
            }
        };
        let _ = reply.send(result);
    }

    /// Ends a checkpoint that an earlier daemon began. Containers go on, unless their VM is gone.
    pub(crate) async fn end_checkpoint(&mut self) {
        if self.record.checkpoint.is_none() {
            return;
        }
        tracing::warn!(pod = %self.id(), "an earlier daemon ended while it made a checkpoint");
        if let Some(vm) = self.running.as_ref().map(|running| running.vm().clone()) {
            let thawed = go_on(&vm, GoOn::Containers).await;
            // An error ends the VM.
            let _ = self.went_on(thawed);
        }
        // A failure was logged.
        let _ = self.forget_checkpoint().await;
    }

    /// Removes what was written aside.
    pub(super) async fn forget_checkpoint(&mut self) -> Result<(), PodError> {
        let Some(path) = self.record.checkpoint.clone() else {
            return Ok(());
        };
        if let Err(error) = blocking(move || aside::remove(&path)).await {
            let cause = &error as &dyn std::error::Error;
            tracing::error!(pod = %self.id(), error = cause, "remove a checkpoint that is not complete");
            return Err(error);
        }
        self.record.checkpoint = None;
        self.save().await
    }

    /// Refuses what can't be, and records where a checkpoint will be written.
    async fn plan_aside(&mut self, output: &Path) -> Result<(RunningVm, Aside), PodError> {
        if self.is_saving {
            return Err(refused("another checkpoint of it is being written"));
        }
        // What could not be removed before.
        self.forget_checkpoint().await?;
        let (vm, _) = self.plan_checkpoint().await?;
        let output = output.to_owned();
        let aside = blocking(move || Aside::plan(&output)).await?;
        self.record.checkpoint = Some(aside.path().to_owned());
        match self.save().await {
            Ok(()) => Ok((vm, aside)),
            Err(error) => Err(error.after_undo(self.forget_checkpoint().await)),
        }
    }

    /// Writes all but digests and manifest.
    async fn cut(&mut self, ahead: Ahead) -> Result<(Aside, Manifest), PodError> {
        // Containers may have come and gone.
        let (vm, mut manifest) = self.plan_checkpoint().await?;
        let aside = ahead.aside.clone();
        let disk = DataDir::of(&self.node.config, &self.record.id).scratch();
        let saved = match vm.agent.freeze().await {
            Ok(()) => self.while_frozen(&vm, ahead, &disk, &mut manifest).await,
            Err(error) => Err(error.into()),
        };
        let thawed = go_on(&vm, GoOn::Containers).await;
        let went_on = self.went_on(thawed);
        let saved = saved.and(went_on);
        faults::point(Point::CheckpointSaved);
        saved.map(|()| (aside, manifest))
    }

    /// What is done while containers stand still: the VM stands still too, for as long as it must.
    async fn while_frozen(
        &mut self,
        vm: &RunningVm,
        ahead: Ahead,
        disk: &Path,
        manifest: &mut Manifest,
    ) -> Result<(), PodError> {
        let (begin, kept) = (Instant::now(), Kept::default());
        let saved = kept.of(self.while_paused(vm, ahead, disk, manifest)).await;
        // Also one that did not pause is half on its way.
        let resumed = kept.of(stage("resume", go_on(vm, GoOn::Vm))).await;
        let paused = begin.elapsed();
        manifest.paused_us = u64::try_from(paused.as_micros()).unwrap_or(u64::MAX);
        let (stages, _) = kept.stages();
        let times: Vec<_> = stages
            .iter()
            .map(|stage| (&*stage.name, stage.us))
            .collect();
        tracing::info!(pod = %self.id(), ?paused, ?times, "the VM stood still for a checkpoint");
        let went_on = self.went_on(resumed);
        saved.and(went_on)
    }

    /// Pauses the VM, and writes what can't be written while it goes on.
    async fn while_paused(
        &self,
        vm: &RunningVm,
        ahead: Ahead,
        disk: &Path,
        manifest: &mut Manifest,
    ) -> Result<(), PodError> {
        let pause = async { Ok::<_, PodError>(vm.control.pause().await?) };
        stage("pause", pause).await?;
        let Ahead {
            aside,
            state,
            memory,
            scratch,
            copied,
        } = ahead;
        let has_shares = manifest.has_shares();
        let to = aside.clone();
        let shares = async {
            match has_shares {
                true => self.save_shares(vm, to).await.map(Some),
                false => Ok(None),
            }
        };
        let label = manifest.id.clone();
        let bytes = (manifest.size.memory_mib + manifest.size.pluggable_mib) << 20;
        let saved = async {
            let changed = stage("changed", ahead::changed(memory, copied, bytes));
            let (memory, changed) = changed.await?;
            let saved = vm
                .control
                .save(label, state.into(), memory, changed, LONGEST);
            Ok::<_, PodError>(saved.await?)
        };
        let (disk, volumes) = (disk.to_owned(), self.volumes(manifest));
        let copied = blocking(move || {
            scratch::copy(&disk, &scratch)?;
            save_volumes(&aside, &volumes)
        });
        let (saved, copied, logs, shares) = tokio::join!(
            stage("memory", saved),
            stage("disks", copied),
            self.note_outputs(manifest),
            stage("shares", shares),
        );
        let shares = shares.map(|owners| manifest.owners = owners);
        saved.and(copied).and(logs).and(shares)
    }

    /// The disks of emptyDirs: their names, and kubelet's directories of them.
    fn volumes(&self, manifest: &Manifest) -> Vec<(String, PathBuf)> {
        let containers = self.containers.values();
        let locals = Vec::from_iter(containers.flat_map(|container| &container.record.locals));
        let directory = |name: &str| {
            let mut locals = locals.iter();
            let local = locals.find(|local| local.storage == name)?;
            Some((name.to_owned(), local.directory.clone()))
        };
        manifest
            .volumes()
            .filter_map(|(_, name)| directory(name))
            .collect()
    }

    /// Writes what the guest knows of the host's files; returns the shares.
    async fn save_shares(&self, vm: &RunningVm, aside: Aside) -> Result<Vec<Owner>, PodError> {
        let SavedFiles { owners, state } = self.files.lock().await.save(vm).await?;
        let written = blocking(move || {
            let written = aside.file(aside::SHARES)?.write_all(&state);
            written.map_err(|e| PodError::internal("use the file of a checkpoint", e))
        });
        written.await?;
        Ok(owners)
    }

    /// Ends a VM that does not go on.
    fn went_on(&mut self, result: Result<(), PodError>) -> Result<(), PodError> {
        if let Err(error) = &result
            && let Some(vmm) = self.vmm()
        {
            let error = error as &dyn std::error::Error;
            tracing::error!(pod = %self.id(), error, "the pod does not go on and is ended");
            self.record.message = "it did not go on after a checkpoint".into();
            vmm.kill();
        }
        result
    }

    /// Notes how much of its outputs is in the log of each container. The guest has that, and perhaps more.
    async fn note_outputs(&self, manifest: &mut Manifest) -> Result<(), PodError> {
        for container in self.containers.values() {
            let mut saved = manifest.containers.iter_mut();
            let saved = saved.find(|saved| saved.guest_id == *container.guest_id());
            if let (Some(saved), Some(log)) = (saved, &container.log) {
                let written = log.file().written().await;
                let written =
                    written.map_err(|e| PodError::internal("look at a container's log", e));
                (saved.stdout, saved.stderr) = written?;
            }
        }
        Ok(())
    }

    /// Refuses what can't be, and gathers what the manifest says. Nothing is made, and nothing stands still.
    async fn plan_checkpoint(&self) -> Result<(RunningVm, Manifest), PodError> {
        let (vm, size) = match (&self.running, self.record.state, self.record.vm) {
            (Some(running), sandbox::State::Ready, Some(vm)) => (running.vm().clone(), vm.size),
            _ => return Err(self.not_ready(ACTION)),
        };
        if size.memory_mib == 0 {
            return Err(refused("its VM's size is not known"));
        }
        if self.record.spec.namespaces.user_namespace.is_some() {
            return Err(refused("it has a user namespace"));
        }
        let (containers, ended) = self.saved_containers()?;
        let devices = self.saved_devices(&vm, &containers, &ended).await?;
        let node = Arc::clone(&self.node);
        let class = blocking(move || node.classes.of(&node.config)).await?;
        let spec = SandboxSpec {
            resources: self
                .record
                .resources
                .clone()
                .or_else(|| self.record.spec.resources.clone()),
            overhead: self
                .record
                .overhead
                .clone()
                .or_else(|| self.record.spec.overhead.clone()),
            ..(*self.record.spec).clone()
        };
        let manifest = Manifest {
            id: format!("checkpoint {:032x}", rand::random::<u128>()),
            created_at_ns: clock::now_ns(),
            paused_us: 0,
            class,
            size,
            devices,
            spec,
            containers,
            ended,
            owners: None,
            files: Files::default(),
        };
        Ok((vm, manifest))
    }

    fn saved_containers(&self) -> Result<(Vec<SavedContainer>, Vec<EndedContainer>), PodError> {
        let (mut saved, mut ended) = (Vec::new(), Vec::new());
        for container in self.containers.values() {
            let record = &container.record;
            match &container.state {
                State::Created | State::Running => {}
                State::Exited(_) => {
                    ended.push(EndedContainer {
                        guest_id: container.guest_id().clone(),
                        image_id: record.image_id.clone(),
                        image_slot: record.image_slot,
                        volumes: record.volumes.clone(),
                        locals: record.locals.clone(),
                    });
                    continue;
                }
                _ => {
                    let reason = "is being made, started, stopped or removed: try again";
                    return Err(refused(&about(container, reason)));
                }
            }
            let spec = &record.spec;
            if !record.devices.is_empty() {
                return Err(refused(&about(container, "has a block device of the host")));
            }
            saved.push(SavedContainer {
                guest_id: container.guest_id().clone(),
                spec: (**spec).clone(),
                image_id: record.image_id.clone(),
                image_ref: record.image_ref.clone(),
                image_slot: record.image_slot,
                volumes: record.volumes.clone(),
                locals: record.locals.clone(),
                stop_signal: record.stop_signal,
                user: record.user.clone(),
                resources: record.resources.clone(),
                stdout: 0,
                stderr: 0,
            });
        }
        Ok((saved, ended))
    }

    /// What is behind the slots; all of it is of something that can be there again.
    async fn saved_devices(
        &self,
        vm: &RunningVm,
        containers: &[SavedContainer],
        ended: &[EndedContainer],
    ) -> Result<Vec<SavedDevice>, PodError> {
        let used = containers
            .iter()
            .map(|c| (&c.image_id, c.image_slot, &c.volumes));
        let used = used.chain(
            ended
                .iter()
                .map(|c| (&c.image_id, c.image_slot, &c.volumes)),
        );
        let images: Vec<(&ImageId, u8)> = used
            .flat_map(|(image, slot, volumes)| {
                let volumes = volumes.iter().map(|v| (&v.image_id, v.slot));
                std::iter::once((image, slot)).chain(volumes)
            })
            .filter_map(|(image, slot)| Some((image, slot?)))
            .collect();
        let locals = containers.iter().flat_map(|container| &container.locals);
        let locals = locals.chain(ended.iter().flat_map(|container| &container.locals));
        let locals: Vec<_> = locals.collect();
        let metrics = vm.control.metrics(CALL_TIMEOUT).await?;
        let mut devices = Vec::new();
        for device in &metrics.devices {
            let slot = device.slot;
            let kind = match (device.kind.as_str(), slot) {
                ("vsock" | "rng" | "memory" | "balloon", _) | (_, slots::ROOT) => SavedKind::Own,
                ("net", _) => SavedKind::Card,
                ("block", slots::SCRATCH) => SavedKind::Scratch,
                (kind @ ("block" | "pmem"), _) => {
                    let image = images.iter().find(|(_, of)| *of == slot);
                    let local = locals.iter().find(|local| local.slot == Some(slot));
                    match (image, local) {
                        (Some((image, _)), _) => {
                            let images = &*self.node.images;
                            SavedKind::Image(saved_image(images, image, kind == "pmem").await?)
                        }
                        (None, Some(local)) => SavedKind::Volume(local.storage.clone()),
                        (None, None) => {
                            let reason =
                                format!("its VM has a disk of another kind in slot {slot}");
                            return Err(refused(&reason));
                        }
                    }
                }
                ("fs", slots::FILES) => SavedKind::Shares,
                (kind, _) => {
                    return Err(refused(&format!("its VM has a device {kind:?}")));
                }
            };
            devices.push(SavedDevice { slot, kind });
        }
        Ok(devices)
    }
}

impl Container {
    /// What the guest calls it.
    pub(super) fn guest_id(&self) -> &ContainerId {
        self.record.guest_id.as_ref().unwrap_or(&self.record.id)
    }
}

fn refused(reason: &str) -> PodError {
    PodError::precondition(ACTION, reason)
}

fn about(container: &Container, reason: &str) -> String {
    format!(
        "container {:?} {reason}",
        container.record.spec.metadata.name
    )
}

/// Copies the disks of emptyDirs. Blocks.
fn save_volumes(aside: &Aside, volumes: &[(String, PathBuf)]) -> Result<(), PodError> {
    for (name, directory) in volumes {
        empty_dir::save(directory, &aside.file(name)?)?;
    }
    Ok(())
}

/// What goes on.
#[derive(Debug, Clone, Copy)]
enum GoOn {
    Vm,
    Containers,
}

/// Lets it go on: it is tried again and again until it does, or the VM is gone, or [`PATIENCE`] is over.
async fn go_on(vm: &RunningVm, what: GoOn) -> Result<(), PodError> {
    let deadline = clock::after(PATIENCE);
    loop {
        let result = match what {
            GoOn::Vm => vm
                .control
                .resume(CALL_TIMEOUT)
                .await
                .map_err(PodError::from),
            GoOn::Containers => vm.agent.thaw().await.map_err(PodError::from),
        };
        match result {
            Err(error) if !vm.control.is_gone() && Instant::now() < deadline => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(pod = %vm.pod, error, "let a pod go on after a checkpoint");
            }
            done => return done,
        }
        sleep(RETRY).await;
    }
}
