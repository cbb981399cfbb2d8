//! Keeps the guest's network as the host's is, which plugins may change as long as the pod runs.
//!
//! An interface that comes later is put into the VM, and one that is gone is taken out:
//!
//! ```text
//! comes: number and slot ─▶ record on disk ─▶ tap ⇄ interface ─▶ VM ─▶ driver in the guest
//! goes:  driver in the guest ─▶ VM (and with it the tap) ─▶ record on disk ─▶ slot
//! ```
//!
//! So what the VM has is in the record, and a daemon that starts forgets what the VM has not.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};
use hull_network::{GuestNetwork, NetworkRecord};
use hull_proto_vmm::{DeviceConfig, FdIndex};
use tokio::{
    sync::{Mutex, oneshot},
    task::AbortHandle,
    time::sleep,
};

use hull_spec::error::PodError;
use hull_vm::{agent::configure, client::CALL_TIMEOUT, running::RunningVm, slots};

use crate::{
    ports::{PodNetworking, network_error},
    storage::devices::Devices,
};

/// The pauses before what failed is tried again.
const PAUSES: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_secs(5))
    .with_max_delay(Duration::from_secs(600))
    .without_max_times();
/// What a VM calls network devices.
const NET: &str = "net";

/// What the pod's task hears of.
#[derive(Debug)]
pub(crate) enum NetworkNews {
    /// The guest has what the host has; these are the addresses of the pod's interface.
    Addresses(Vec<IpAddr>),
    /// This is to be on disk before anything else is done; the answer says whether it is.
    Record(Box<NetworkRecord>, oneshot::Sender<bool>),
}

/// What a follower works with.
pub(crate) struct Context<F> {
    pub network: Arc<dyn PodNetworking>,
    pub vm: RunningVm,
    pub devices: Arc<Mutex<Devices>>,
    /// Whether the guest can take more interfaces.
    pub takes_links: bool,
    pub tell: F,
}

/// Follows the network of one pod; ends when dropped.
#[derive(Debug)]
pub(crate) struct Follower(AbortHandle);

impl Follower {
    /// Starts it. `known` is what the guest was configured with, if that is known: else the pod is an
    /// earlier daemon's.
    pub(crate) fn start<F: Fn(NetworkNews) + Send + Sync + 'static>(
        context: Context<F>,
        record: NetworkRecord,
        known: Option<GuestNetwork>,
    ) -> Self {
        let is_adopted = known.is_none();
        let follow = Follow {
            context,
            record,
            known,
            refused: BTreeSet::new(),
        };
        let agent = follow.context.vm.agent.clone();
        let following = async move {
            // A panic has told the pod's task.
            let _ = agent.guard(follow.run(is_adopted)).await;
        };
        Self(tokio::spawn(following).abort_handle())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Follow<F> {
    context: Context<F>,
    record: NetworkRecord,
    /// What the guest has.
    known: Option<GuestNetwork>,
    /// Names of interfaces that could not be put into the VM: tried once each time they come.
    refused: BTreeSet<String>,
}

impl<F: Fn(NetworkNews) + Send + Sync> Follow<F> {
    async fn run(mut self, is_adopted: bool) {
        let mut pauses = PAUSES.build();
        while is_adopted && let Err(error) = self.reconcile().await {
            self.warn(&error, "compare a VM's network devices with the record");
            wait(&mut pauses).await;
        }
        loop {
            match self.context.network.watch(&self.record).await {
                Ok(mut changes) => loop {
                    let now = changes.borrow_and_update().clone();
                    if self.change_links(&now).await {
                        pauses = PAUSES.build();
                        // Another look, at those that are joined now.
                        break;
                    }
                    if let Err(error) = self.tell_guest(now).await {
                        self.warn(&error, "change the guest's network");
                        wait(&mut pauses).await;
                        continue;
                    }
                    pauses = PAUSES.build();
                    if changes.changed().await.is_err() {
                        wait(&mut pauses).await;
                        break;
                    }
                },
                Err(error) => {
                    self.warn(&error, "read the pod's network");
                    wait(&mut pauses).await;
                }
            }
        }
    }

    async fn tell_guest(&mut self, now: GuestNetwork) -> Result<(), PodError> {
        if self.known.as_ref() == Some(&now) {
            return Ok(());
        }
        let request = configure::network(&now);
        self.context.vm.agent.update_network(request).await?;
        tracing::info!(
            pod = self.record.pod_id,
            "the guest's network follows the host's"
        );
        (self.context.tell)(NetworkNews::Addresses(now.ips()));
        self.known = Some(now);
        Ok(())
    }

    /// Takes out what is gone and puts in what has come. Returns whether the record is another one.
    async fn change_links(&mut self, now: &GuestNetwork) -> bool {
        let before = self.record.clone();
        for number in self.record.gone(now) {
            if let Err(error) = self.take_out(number).await {
                self.warn(&error, "take an interface out of the VM");
            }
        }
        self.refused.retain(|name| now.unjoined.contains(name));
        for name in &now.unjoined {
            if self.refused.contains(name) {
                continue;
            }
            match self.put_in(name).await {
                Ok(()) => tracing::info!(pod = self.record.pod_id, name, "an interface more"),
                Err(error) => {
                    self.warn(&error, "put an interface into the VM");
                    self.refused.insert(name.clone());
                }
            }
        }
        self.record != before
    }

    async fn put_in(&mut self, name: &str) -> Result<(), PodError> {
        const ACTION: &str = "put an interface into the VM";
        let refuse = |why: &str| Err(PodError::precondition(ACTION, format!("{name}: {why}")));
        if !self.context.takes_links {
            return refuse("the guest has a user namespace, which takes none later");
        }
        let mut next = self.record.clone();
        let Some(number) = next.join(name) else {
            return refuse("it has as many as a pod may have");
        };
        let slot = slots::net(number);
        if !self.context.devices.lock().await.claim(slot) {
            return refuse("a disk is in its slot");
        }
        if let Err(error) = self.keep(next).await {
            self.context.devices.lock().await.give_back(slot);
            return Err(error);
        }
        match self.plug(number, slot).await {
            Ok(()) => Ok(()),
            Err(error) => Err(error.after_undo(self.forget(number).await)),
        }
    }

    async fn plug(&self, number: u8, slot: u8) -> Result<(), PodError> {
        let Context { network, vm, .. } = &self.context;
        let joined = network.join(&self.record, number).await;
        let link = joined.map_err(network_error)?;
        let device = DeviceConfig::Net {
            taps: (0..).map(FdIndex).take(link.taps.len()).collect(),
            mac: link.mac,
            mtu: Some(link.mtu).filter(|mtu| *mtu > 0),
        };
        vm.control.attach(slot, device, link.taps).await?;
        match vm.agent.attach_device(slot).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let undo = vm.control.detach(slot).await.map_err(PodError::from);
                Err(PodError::from(error).after_undo(undo))
            }
        }
    }

    async fn take_out(&mut self, number: u8) -> Result<(), PodError> {
        let slot = slots::net(number);
        self.context.vm.agent.detach_link(slot).await?;
        self.context.vm.control.detach(slot).await?;
        self.forget(number).await
    }

    /// Makes what an earlier daemon recorded and what the VM has the same.
    async fn reconcile(&mut self) -> Result<(), PodError> {
        if !self.context.takes_links {
            // They are those of its start.
            return Ok(());
        }
        let metrics = self.context.vm.control.metrics(CALL_TIMEOUT).await?;
        for number in self.record.numbers().into_iter().filter(|n| *n > 0) {
            let slot = slots::net(number);
            let mut devices = metrics.devices.iter();
            if devices.any(|device| device.slot == slot && device.kind == NET) {
                // It may not have lived to tell the guest.
                if let Err(error) = self.context.vm.agent.attach_device(slot).await {
                    self.warn(&error, "bring up a network device of a VM again");
                }
            } else {
                self.forget(number).await?;
            }
        }
        Ok(())
    }

    async fn forget(&mut self, number: u8) -> Result<(), PodError> {
        let mut next = self.record.clone();
        next.part(number);
        self.keep(next).await?;
        let slot = slots::net(number);
        self.context.devices.lock().await.give_back(slot);
        Ok(())
    }

    async fn keep(&mut self, record: NetworkRecord) -> Result<(), PodError> {
        let (reply, kept) = oneshot::channel();
        (self.context.tell)(NetworkNews::Record(Box::new(record.clone()), reply));
        // No answer: the pod is being stopped.
        if kept.await != Ok(true) {
            let why = "the pod's record can't be written";
            return Err(PodError::precondition("change the pod's network", why));
        }
        self.record = record;
        Ok(())
    }

    fn warn(&self, error: &(dyn std::error::Error + 'static), action: &str) {
        tracing::warn!(pod = self.record.pod_id, error, "{action}");
    }
}

/// Waits until the next attempt is due.
async fn wait(pauses: &mut impl Iterator<Item = Duration>) {
    if let Some(pause) = pauses.next() {
        sleep(pause).await;
    }
}
