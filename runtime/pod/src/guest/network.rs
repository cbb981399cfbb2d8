//! Keeps the guest's network as the host's is, which plugins may change as long as the pod runs.

use std::{sync::Arc, time::Duration};

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
    /// Starts it. `known` is what the guest was configured with, if that is known.
    pub(crate) fn start(
        node: Arc<Node>,
        record: NetworkRecord,
        agent: Agent,
        known: Option<GuestNetwork>,
    ) -> Self {
        Self(tokio::spawn(follow(node, record, agent, known)).abort_handle())
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
