//! The end of what a container has, in its VM and on the host. Creation that failed, removal, and recovery
//! do it alike:
//!
//! ```text
//! processes and root in the guest ─▶ shares ─▶ disks and devices ─▶ leases of images
//! ```
//!
//! Each step has no effect on what is not there (any more), so all of it may be repeated, and undoes a
//! creation at any point. With the VM everything in it is gone, and only the leases are given up. A disk
//! that can't be taken out costs a slot of this VM and holds up nothing: that is logged, and its slot
//! stays taken.

use hull_spec::{error::PodError, id::ContainerId};

use crate::{ports::PodImages, storage::attachments::Attachments};

/// What a step that fails means for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFailure {
    /// They are not tried: who asked is told and asks again, and the container is known until then.
    Stop,
    /// They are tried all the same, since nobody asks again; the first failure is told.
    GoOn,
}

/// Ends what a container has; `attachments` of the VM if there is one.
///
/// # Errors
/// Of the first step that failed, but for one that the end of the VM explains.
pub(crate) async fn unmake(
    images: &dyn PodImages,
    attachments: Option<&Attachments>,
    container: &ContainerId,
    on_failure: OnFailure,
) -> Result<(), PodError> {
    let mut result = Ok(());
    if let Some(attachments) = attachments {
        let taken_out = take_out(attachments, container, on_failure).await;
        if !attachments.vm.control.is_gone() {
            result = taken_out;
        }
    }
    if result.is_err() && on_failure == OnFailure::Stop {
        return result;
    }
    let released = images.release(container.as_str()).await;
    let released = released.map_err(|e| PodError::internal("release the container's image", e));
    result.and(released)
}

/// Ends what it has in its VM.
async fn take_out(
    Attachments { vm, devices, files }: &Attachments,
    container: &ContainerId,
    on_failure: OnFailure,
) -> Result<(), PodError> {
    let stops = |result: &Result<(), PodError>| {
        // What a VM that is gone does not answer, nobody has to ask again.
        result.is_err() && on_failure == OnFailure::Stop && !vm.control.is_gone()
    };
    if vm.control.is_gone() {
        return Ok(());
    }
    let deleted = vm.agent.delete(container.as_str()).await;
    let deleted = deleted.map_err(PodError::from);
    if stops(&deleted) {
        return deleted;
    }
    // Before the container is forgotten: nobody else would end its shares.
    let owner = vm.agent.name_in_guest(container.as_str());
    let unshared = files.lock().await.remove(vm, owner).await;
    if stops(&unshared) {
        return unshared;
    }
    if let Err(error) = devices.lock().await.release(vm, container).await
        && !vm.control.is_gone()
    {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(%container, error, "detach a disk of a container");
    }
    deleted.and(unshared)
}
