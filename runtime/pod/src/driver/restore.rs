//! Containers of a sandbox that goes on from a checkpoint. The guest has them, standing still; here each is a
//! new one, which is created and waits for its start.

use std::sync::Arc;

use hull_base::{blocking, clock};
use hull_spec::{error::PodError, id::ContainerId};
use hull_vm::rundir::RunDir;

use super::{container::Container, state::Driver};
use crate::{
    checkpoint::manifest::EndedContainer,
    container::{
        restored::{Planned, Restore},
        unmake::{OnFailure, unmake},
    },
    lifecycle::container::{News, State},
    logs::{
        file::{LogPath, begin_at, log_path},
        pump::{ContainerLog, LogTarget},
    },
    record::{ContainerRecord, RecordedState},
    sandbox::restore::ACTION,
};

impl Driver {
    /// Takes the guest's containers over. Their VM runs, and nobody was told of the sandbox.
    ///
    /// # Errors
    /// Of the first that could not be; the sandbox is then to be removed.
    pub(super) async fn take_containers(&mut self, restore: &Restore) -> Result<(), PodError> {
        for planned in &restore.containers {
            self.take_container(planned).await?;
        }
        for (id, ended) in &restore.ended {
            self.discard_ended(id, ended).await;
        }
        if restore.checkpoint.shares.is_some() {
            self.watch_files();
            self.watch_volumes().await;
        }
        Ok(())
    }

    /// Tells those who follow events of containers that came with the sandbox.
    pub(super) fn announce_taken(&mut self, restore: &Restore) {
        for planned in &restore.containers {
            self.announce_container(&planned.id, News::Created);
        }
    }

    async fn take_container(&mut self, planned: &Planned) -> Result<(), PodError> {
        let Planned {
            id,
            spec,
            saved,
            locals,
        } = planned;
        let Some(running) = &self.running else {
            return Err(self.not_ready(ACTION));
        };
        let attachments = running.attachments.clone();
        let mut devices = attachments.devices.lock().await;
        let volumes = saved.volumes.iter().map(|v| (&v.image_id, v.slot));
        for (image, slot) in std::iter::once((&saved.image_id, saved.image_slot)).chain(volumes) {
            let leased = self.node.images.lease(image, id.as_str()).await;
            leased.map_err(|e| PodError::internal("lease the container's image", e))?;
            if let Some(slot) = slot {
                devices.adopt(image, slot, id);
            }
        }
        for volume in locals {
            devices.adopt_volume(volume, id);
        }
        drop(devices);
        let log_path = log_path(&self.record.spec, spec);
        let record = ContainerRecord {
            id: id.clone(),
            guest_id: Some(saved.guest_id.clone()),
            pod: self.record.id.clone(),
            spec: Arc::clone(spec),
            image_id: saved.image_id.clone(),
            image_ref: saved.image_ref.clone(),
            state: RecordedState::Created,
            created_at_ns: clock::now_ns(),
            started_at_ns: 0,
            image_slot: saved.image_slot,
            volumes: saved.volumes.clone(),
            locals: locals.clone(),
            devices: Vec::new(),
            log_path: log_path.clone(),
            stop_signal: saved.stop_signal,
            stopping: None,
            user: saved.user.clone(),
            resources: saved.resources.clone(),
        };
        let container = Container::new(record, State::Created);
        container.delivered.set();
        self.insert(container);
        self.save_container(id).await?;
        let run = RunDir::of(&self.node.config, &self.record.id);
        let target = LogTarget {
            container: id.to_string(),
            path: log_path.map(|file| LogPath {
                directory: self.record.spec.log_directory.clone(),
                file,
            }),
            position: run.log_position(id.as_str()),
            tty: spec.tty,
            share: self.log_share.clone(),
        };
        // The log of the container that was saved has the rest.
        let (position, stdout, stderr) = (target.position.clone(), saved.stdout, saved.stderr);
        let begun = blocking(move || begin_at(&position, stdout, stderr)).await;
        let failed = |e| PodError::internal("open the container's log", e);
        begun.map_err(failed)?;
        let log = ContainerLog::start(&attachments.vm.agent, &target).await;
        self.insert_log(id, log.map_err(failed)?);
        Ok(())
    }

    /// Removes what the guest has of a container that had ended.
    async fn discard_ended(&self, id: &ContainerId, ended: &EndedContainer) {
        let Some(running) = &self.running else {
            return;
        };
        let attachments = running.attachments.clone();
        let mut devices = attachments.devices.lock().await;
        let volumes = ended.volumes.iter().map(|v| (&v.image_id, v.slot));
        for (image, slot) in std::iter::once((&ended.image_id, ended.image_slot)).chain(volumes) {
            if let Some(slot) = slot {
                devices.adopt(image, slot, id);
            }
        }
        for volume in &ended.locals {
            devices.adopt_volume(volume, id);
        }
        drop(devices);
        let images = &*self.node.images;
        if let Err(error) = unmake(images, Some(&attachments), id, OnFailure::GoOn).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(pod = %self.id(), error, "remove a container that had ended");
        }
    }
}
