//! The task that owns a pod. Callers send it commands; it alone changes the pod's state, runs
//! the effects that `lifecycle` decides on, and publishes a view that callers read without it.
//!
//! ```text
//! Pods ──Command──▶ ┌────────┐ ──spawn──▶ operation (agent call, timer, log) ──Done──┐
//!                   │ Driver │ ◀────────────────────────────────────────────────────┘
//! guest events ───▶ │        │ ──view──▶ Pods (list, status, wait)
//! VM gone ────────▶ └────────┘ ──record──▶ hull.redb, before every answer
//! ```
//!
//! What takes time in a container runs beside the task, so a stop with a long grace period blocks
//! nothing else. The start, stop and removal of the whole sandbox run in the task itself:
//! commands wait until they are over.
//!
//! A panic of the task or of an operation ends the task, and what it did not answer fails. Then the
//! pod is taken over from its record as after a restart of the daemon, but for its VM, which is
//! killed ([`crate::recover::supervise`]).

mod checkpoint;
pub(crate) mod container;
mod create;
mod inputs;
mod life;
mod network;
mod operations;
mod restore;
mod sandbox;
pub(crate) mod state;
mod streams;
mod update;
mod vm_end;

use hull_base::stages::{self, Call};

use self::{
    operations::Input,
    state::{Driver, next_input},
};
use crate::{
    command::{Admission, Command},
    lifecycle::{container as container_life, sandbox as sandbox_life},
    registry::Phase,
};

impl Driver {
    /// Brings the sandbox up for a call, tells the result to those who wait, and then runs it.
    pub(crate) async fn start(mut self, call: Call, admission: Option<Admission>) {
        // What is large and soon over is not a part of what runs as long as the pod: it gets memory of its
        // own.
        let result = Box::pin(call.of(self.bring_up(admission))).await;
        if self.record.state != sandbox_life::State::Gone {
            self.phase = Phase::Up;
        }
        self.publish();
        if let Err(error) = &result {
            let error = error as &dyn std::error::Error;
            tracing::warn!(pod = %self.id(), error, "sandbox could not be started");
        }
        self.public.started.send_replace(Some(result));
        self.run().await;
    }

    /// Runs until the pod is gone.
    pub(crate) async fn run(mut self) {
        while self.record.state != sandbox_life::State::Gone {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some((command, call)) => Box::pin(call.of(self.command(command))).await,
                    // The registry is gone, and with it the daemon; the pod goes on without.
                    None => return,
                },
                (input, call) = next_input(&mut self.running, &mut self.operations) => {
                    Box::pin(call.of(self.input(input))).await;
                }
            }
        }
    }

    async fn command(&mut self, command: Command) {
        stages::attribute(stages::POD, self.id().as_str());
        match command {
            Command::StopSandbox(reply) => {
                let result = self.sandbox_event(sandbox_life::Event::Stop).await;
                self.publish();
                let _ = reply.send(result);
            }
            Command::RemoveSandbox(reply) => {
                let result = self.sandbox_event(sandbox_life::Event::Remove).await;
                self.publish();
                let _ = reply.send(result);
            }
            Command::CreateContainer(id, spec, reply) => {
                self.create_container(id, spec, reply).await;
            }
            Command::StartContainer(id, reply) => {
                let (wait, event) = (container_life::Wait::Started, container_life::Event::Start);
                self.ask_container(&id, wait, event, reply).await;
            }
            Command::StopContainer(id, grace, reply) => {
                let event = container_life::Event::Stop { grace };
                self.ask_container(&id, container_life::Wait::Stopped, event, reply)
                    .await;
            }
            Command::RemoveContainer(id, reply) => {
                let (wait, event) = (container_life::Wait::Removed, container_life::Event::Remove);
                self.ask_container(&id, wait, event, reply).await;
            }
            Command::Exec(id, exec, reply) => {
                // A caller that is gone has no use for the handle.
                let _ = reply.send(self.exec(id, exec));
            }
            Command::UpdateContainer(id, limits, reply) => {
                self.update_container(&id, *limits, reply);
            }
            Command::UpdateSandbox(sizes, reply) => {
                let (overhead, resources) = *sizes;
                let _ = reply.send(self.update_sandbox(overhead, resources).await);
            }
            Command::Checkpoint(output, reply) => self.checkpoint(&output, reply).await,
            Command::Log(id, reply) => {
                let _ = reply.send(self.log(&id));
            }
            Command::Attach(id, reply) => {
                let _ = reply.send(self.attach(&id));
            }
        }
    }

    async fn input(&mut self, input: Input) {
        match input {
            Input::VmGone => {
                // Its effects never fail but for the record, which was logged.
                let _ = self.sandbox_event(sandbox_life::Event::VmGone).await;
                self.publish();
            }
            other => self.quiet_input(other).await,
        }
    }
}
