//! The making of a container, beside the task of its pod:
//!
//! ```text
//! leases and disks ─▶ files of the host ─▶ container in the guest ─▶ log
//! ```
//!
//! Whatever fails, [`unmake`] undoes what there is: the answer of a step may be lost, not the request.

use std::{collections::HashMap, sync::Arc};

use hull_image::ImageId;
use hull_proto_agent::agent::CreateRequest;
use hull_proto_vmm::fs::Share;
use tokio::sync::Notify;

use hull_base::{
    blocking,
    stages::{self, stage},
};
use hull_spec::{
    error::PodError,
    id::ContainerId,
    info::ContainerUser,
    spec::{ContainerSpec, MountSpec},
};

use super::{
    request::share_mount,
    unmake::{OnFailure, unmake},
};
use crate::{
    logs::pump::{ContainerLog, LogTarget},
    node::Node,
    record::{DeviceRecord, LocalRecord, VolumeRecord},
    storage::{
        atomic_volumes::Watched, attachments::Attachments, empty_dir::LocalVolume,
        host_device::BlockDevice, host_files::Host,
    },
};

/// A container that is to be made.
#[derive(Debug)]
pub(crate) struct Creation {
    pub node: Arc<Node>,
    pub attachments: Attachments,
    pub id: ContainerId,
    pub spec: Arc<ContainerSpec>,
    pub sources: Sources,
    /// kubelet's id of the pod.
    pub pod_uid: String,
    /// Where the mounts that were asked for are in its OCI specification.
    pub mounts: HashMap<usize, u32>,
    pub request: CreateRequest,
    pub log: LogTarget,
    /// What tells that a volume changed which kubelet replaces as a whole.
    pub changed: Arc<Notify>,
}

/// What a container is made of. The number is that of a mount that was asked for.
#[derive(Debug)]
pub(crate) struct Sources {
    pub image: ImageId,
    /// Image volumes.
    pub volumes: Vec<(usize, ImageId)>,
    /// Volumes that the guest keeps.
    pub locals: Vec<(usize, LocalVolume)>,
    /// Paths of the host.
    pub shares: Vec<(usize, Share)>,
    /// Block devices of the host, by their names in the guest.
    pub devices: Vec<(String, BlockDevice)>,
}

/// A container that was made.
#[derive(Debug)]
pub(crate) struct Created {
    pub user: ContainerUser,
    pub attached: Attached,
    pub watched: Watched,
    pub log: ContainerLog,
}

/// What was attached to the VM.
#[derive(Debug)]
pub(crate) struct Attached {
    pub image_slot: u8,
    pub volumes: Vec<VolumeRecord>,
    pub locals: Vec<LocalRecord>,
    pub devices: Vec<DeviceRecord>,
}

impl Creation {
    /// Makes the container, or nothing of it.
    ///
    /// # Errors
    /// Of the stage that failed.
    pub(crate) async fn carry_out(mut self) -> Result<Box<Created>, PodError> {
        match self.make().await {
            Ok(created) => Ok(Box::new(created)),
            Err(error) => {
                let (images, attachments) = (&*self.node.images, &self.attachments);
                let undo = unmake(images, Some(attachments), &self.id, OnFailure::GoOn).await;
                Err(error.after_undo(undo))
            }
        }
    }

    async fn make(&mut self) -> Result<Created, PodError> {
        stages::attribute(stages::CONTAINER, self.id.as_str());
        let attached = stage("storage", self.attach()).await?;
        let watched = stage("shares", self.share()).await?;
        let agent = &self.attachments.vm.agent;
        let user = agent.create(self.request.clone()).await?;
        let log = stage("log", ContainerLog::start(agent, &self.log)).await;
        let log = log.map_err(|e| PodError::internal("open the container's log", e))?;
        Ok(Created {
            user,
            attached,
            watched,
            log,
        })
    }

    /// Leases and attaches all that the container is made of.
    async fn attach(&self) -> Result<Attached, PodError> {
        let attachments = &self.attachments;
        let image_slot = self.attach_image(&self.sources.image).await?;
        let mut volumes = Vec::with_capacity(self.sources.volumes.len());
        for (mount, image) in &self.sources.volumes {
            volumes.push(VolumeRecord {
                mount: *mount,
                image_id: image.clone(),
                slot: Some(self.attach_image(image).await?),
            });
        }
        let mut disks = attachments.devices.lock().await;
        let mut locals = Vec::with_capacity(self.sources.locals.len());
        for (mount, volume) in &self.sources.locals {
            let config = &self.node.config;
            let slot = disks
                .attach_volume(&attachments.vm, config, volume, &self.id)
                .await?;
            locals.push(volume.record(*mount, slot));
        }
        for (storage, device) in &self.sources.devices {
            disks
                .attach_device(&attachments.vm, device, storage, &self.id)
                .await?;
        }
        Ok(Attached {
            image_slot,
            volumes,
            locals,
            devices: disks.devices(&self.id),
        })
    }

    async fn attach_image(&self, image: &ImageId) -> Result<u8, PodError> {
        let images = &self.node.images;
        let leased = images.lease(image, self.id.as_str()).await;
        leased.map_err(|e| PodError::internal("lease the container's image", e))?;
        let extents = images.disk(image).await;
        let extents = extents.map_err(|e| PodError::internal("find the image's disk", e))?;
        let attachments = &self.attachments;
        let mut disks = attachments.devices.lock().await;
        disks
            .attach(&attachments.vm, image, &extents, &self.id)
            .await
    }

    /// Shares paths of the host, and adds where they are to what the agent is asked. Returns which of
    /// them are watched for changes.
    async fn share(&mut self) -> Result<Watched, PodError> {
        let shares = &self.sources.shares;
        if shares.is_empty() {
            return Ok(Watched::new());
        }
        let Attachments { vm, files, .. } = &self.attachments;
        let host = Host {
            processes: &*self.node.processes,
            program: &self.node.config.file_server,
        };
        let mut files = files.lock().await;
        let places = files.add(host, vm, &self.id, &self.pod_uid, shares).await?;
        drop(files);
        let (node, spec, changed) = (
            Arc::clone(&self.node),
            Arc::clone(&self.spec),
            Arc::clone(&self.changed),
        );
        // Before they are read.
        let watched = blocking(move || node.watches.watch(&spec, &changed)).await;
        let sources = shares
            .iter()
            .zip(places)
            .filter_map(|((asked, share), place)| {
                let mount = self.spec.mounts.get(*asked);
                let is_live = watched.contains_key(&share.path)
                    && mount.is_some_and(MountSpec::is_atomic_volume);
                let live = is_live.then(|| share.path.to_string_lossy().into_owned());
                Some(share_mount(*self.mounts.get(asked)?, place, live))
            });
        self.request.storage_mounts.extend(sources);
        Ok(watched)
    }
}
