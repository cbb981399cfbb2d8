//! What reaches a pod's task besides commands.

use hull_vm::agent::events::GuestEvent;

use super::{
    operations::{Done, Input},
    state::Driver,
    vm_end::VmEnd,
};

impl Driver {
    /// Handles what does not change the sandbox's own state.
    pub(super) async fn quiet_input(&mut self, input: Input) {
        match input {
            Input::Done(Done::Created(id, result)) => self.created(id, result).await,
            Input::Done(Done::Event(id, event)) => self.container_event(&id, event).await,
            Input::Done(Done::Updated(id, result)) => self.updated(&id, result).await,
            Input::Done(Done::Copied(ahead, reply)) => self.copied(ahead, reply).await,
            Input::Done(Done::Checkpointed(result, reply)) => {
                self.checkpointed(result, reply).await;
            }
            Input::Done(Done::Panicked(panic)) => panic.resume(),
            Input::Done(Done::FilesEnded) => self.files_ended(),
            Input::Done(Done::Network(news)) => self.network_changed(news).await,
            Input::Done(Done::Volumes(warning)) => {
                self.warnings.volumes = warning;
                self.publish();
            }
            Input::Guest(GuestEvent::Exited(exit)) => self.process_exited(exit).await,
            Input::Guest(GuestEvent::Failed(why)) => {
                // An agent that can't be heard or believed is as good as none: its VM ends, and
                // that is what is told.
                if let Some(vmm) = self.vmm() {
                    tracing::warn!(pod = %self.id(), %why, "the VM is killed");
                    self.record.message = why;
                    vmm.kill();
                }
            }
            Input::VmGone => self.vm_gone(VmEnd::Asked).await,
        }
    }

    /// Says so. The pod goes on: who needs no files of the host is not hurt.
    fn files_ended(&mut self) {
        if self.running.is_none() || self.vmm().is_none() {
            // It ends with its VM.
            return;
        }
        tracing::warn!(pod = %self.id(), "the pod's file server ended, its host paths fail");
        self.warnings.file_server =
            "the file server ended: paths of the host fail with EIO until the pod is \
                        replaced"
                .into();
        self.publish();
    }
}
