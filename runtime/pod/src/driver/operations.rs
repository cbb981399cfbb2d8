//! Work beside a pod's task, and what reaches the task besides commands.

use std::time::Duration;

use tokio::{sync::mpsc, task::JoinSet};

use hull_base::{
    panics::{Panic, caught},
    stages::Call,
};
use hull_spec::{error::PodError, id::ContainerId, spec::Resources};
use hull_vm::agent::events::GuestEvent;

use crate::{
    checkpoint::ahead::Ahead, command::Reply, container::create::Created,
    lifecycle::container::Event, network::NetworkNews,
};

/// What an operation came to.
#[derive(Debug)]
pub(super) enum Done {
    Created(ContainerId, Result<Box<Created>, PodError>),
    Event(ContainerId, Event),
    Updated(ContainerId, Result<Resources, PodError>),
    /// Memory was written, for a checkpoint.
    Copied(Result<Box<Ahead>, PodError>, Reply<Duration>),
    /// How long the VM stood still.
    Checkpointed(Result<Duration, PodError>, Reply<Duration>),
    FilesEnded,
    Network(NetworkNews),
    /// What is wrong with copies of volumes; empty: nothing.
    Volumes(String),
    /// It has no result, and those who wait for one can't be answered.
    Panicked(Panic),
}

/// What reaches the task besides commands.
#[derive(Debug)]
pub(super) enum Input {
    Done(Done),
    Guest(GuestEvent),
    VmGone,
}

/// The operations of one pod. Those that still run end with it.
#[derive(Debug)]
pub(super) struct Operations {
    done: mpsc::UnboundedSender<(Done, Call)>,
    dones: mpsc::UnboundedReceiver<(Done, Call)>,
    running: JoinSet<()>,
}

impl Default for Operations {
    fn default() -> Self {
        let (done, dones) = mpsc::unbounded_channel();
        Self {
            done,
            dones,
            running: JoinSet::new(),
        }
    }
}

impl Operations {
    /// Starts work that ends with a [`Done`]. It belongs to the call that it is started for, and so does what
    /// follows from it.
    pub(super) fn spawn(&mut self, work: impl Future<Output = Done> + Send + 'static) {
        let done = self.done.clone();
        self.spawn_silent(async move {
            let what = caught(work).await.unwrap_or_else(Done::Panicked);
            // An error means that the pod's task is gone.
            let _ = done.send((what, Call::current()));
        });
    }

    /// Starts work whose end nobody waits for.
    pub(super) fn spawn_silent(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        while self.running.try_join_next().is_some() {}
        self.running.spawn(Call::current().of(work));
    }

    /// For work that tells something more than once, and belongs to no call.
    pub(super) fn teller(&self) -> impl Fn(Done) + Send + Sync + 'static {
        let done = self.done.clone();
        move |what| {
            // An error means that the pod's task is gone.
            let _ = done.send((what, Call::none()));
        }
    }

    /// Waits for the next one to end, and for which call it was.
    pub(super) async fn next(&mut self) -> (Done, Call) {
        match self.dones.recv().await {
            Some(done) => done,
            // There is a sender in `self`.
            None => std::future::pending().await,
        }
    }

    /// Ends all of them.
    pub(super) async fn shutdown(&mut self) {
        self.running.shutdown().await;
    }
}
