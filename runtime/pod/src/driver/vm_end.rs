//! The end of a pod's VM, and what it means for its containers.

use std::time::Duration;

use hull_base::clock;
use hull_vm::agent::stdio::OutputEnd;

use super::state::Driver;
use crate::lifecycle::container::{Event, Exit, Reason};

/// How long a VMM may take to exit before it is killed.
const VMM_END: Duration = Duration::from_secs(2);
/// Exit code of a container whose VM died under it (128 + SIGKILL).
const KILLED: i32 = 137;

/// Whether the end of a VM was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VmEnd {
    Asked,
    ByItself,
}

impl Driver {
    /// Lets the containers end with their VM, whose process is ended when it is still there.
    pub(super) async fn vm_gone(&mut self, end: VmEnd) {
        if let Some(running) = self.running.take()
            && end == VmEnd::ByItself
        {
            let report = running.vm().control.report();
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

    /// Lets a container end that was made while its VM ended: it was not there yet when the others did.
    pub(super) async fn end_what_came_late(&mut self) {
        if self.running.is_none() {
            self.end_containers(KILLED).await;
        }
    }

    /// Kills the VMM process when it does not exit by itself.
    pub(super) async fn end_process(&mut self) {
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
    pub(super) async fn end_containers(&mut self, code: i32) {
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
            self.container_event(&id, Event::Exited(exit.clone())).await;
        }
    }
}
