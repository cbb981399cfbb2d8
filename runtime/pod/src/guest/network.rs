//! Keeps the guest's network as the host's is, which plugins may change as long as the pod runs.

use std::{net::IpAddr, sync::Arc, time::Duration};

use hull_network::{GuestNetwork, NetworkRecord};
use tokio::{task::AbortHandle, time::sleep};

use super::{client::Agent, configure};
use crate::node::Node;

/// How long it waits before it tries again what failed: each time twice as long.
const PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Follows the network of one pod; ends when dropped.
#[derive(Debug)]
pub(crate) struct Follower(AbortHandle);

impl Follower {
    /// Starts it. `known` is what the guest was configured with, if that is known. `tell` hears what
    /// addresses the pod's interface has, as soon as the guest has them.
    pub(crate) fn start(
        node: Arc<Node>,
        record: NetworkRecord,
        agent: Agent,
        known: Option<GuestNetwork>,
        tell: impl Fn(Vec<IpAddr>) + Send + Sync + 'static,
    ) -> Self {
        Self(tokio::spawn(follow(node, record, agent, known, tell)).abort_handle())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(
    node: Arc<Node>,
    record: NetworkRecord,
    agent: Agent,
    mut known: Option<GuestNetwork>,
    tell: impl Fn(Vec<IpAddr>),
) {
    let pod = &record.pod_id;
    let mut pause = PAUSE;
    loop {
        match node.network.watch(&record).await {
            Ok(mut changes) => loop {
                let now = changes.borrow_and_update().clone();
                if known.as_ref() != Some(&now) {
                    let request = configure::network(&now);
                    match agent.update_network(request).await {
                        Ok(()) => {
                            tracing::info!(pod, "the guest's network follows the host's");
                            tell(now.ips());
                            known = Some(now);
                            pause = PAUSE;
                        }
                        Err(error) => {
                            warn(pod, &error, "change the guest's network");
                            sleep(pause).await;
                            pause = LONGEST_PAUSE.min(2 * pause);
                            continue;
                        }
                    }
                }
                if changes.changed().await.is_err() {
                    break;
                }
            },
            Err(error) => warn(pod, &error, "read the pod's network"),
        }
        sleep(pause).await;
        pause = LONGEST_PAUSE.min(2 * pause);
    }
}

fn warn(pod: &str, error: &(dyn std::error::Error + 'static), action: &str) {
    tracing::warn!(pod, error, "{action}");
}
