//! Follows what changes in a pod's namespace after CNI ADD.

use std::{path::Path, time::Duration};

use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::{sync::watch, time::timeout};

use crate::{
    guest::GuestNetwork,
    link::{self, LinkError},
    netns, view,
};

/// All that [`view`] reads.
const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];
/// Changes come in bunches: it is looked again when nothing came for so long.
const QUIET: Duration = Duration::from_millis(50);
/// But at the latest after so many of these pauses.
const MOST_PAUSES: u32 = 20;

/// Starts to follow a namespace; the first value is what it is now. Only interfaces of the names in
/// `joined` lead into the guest; empty: all of them.
///
/// It ends with its last receiver, and until then keeps the namespace alive.
///
/// # Errors
/// The namespace can't be entered or read.
pub(crate) async fn start(
    netns: &Path,
    primary: &'static str,
    joined: Vec<String>,
) -> Result<watch::Receiver<GuestNetwork>, LinkError> {
    let runtime = tokio::runtime::Handle::current();
    // A socket belongs to the namespace that it was opened in, whoever uses it.
    let opened = netns::within(netns.to_owned(), move || {
        let _runtime = runtime.enter();
        new_multicast_connection(&GROUPS).map_err(LinkError::Open)
    });
    let (connection, handle, changes) = opened.await?;
    let connection = tokio::spawn(connection);
    match read(&handle, primary, &joined).await {
        Ok(now) => {
            let (sender, receiver) = watch::channel(now);
            let netns = netns.to_owned();
            tokio::spawn(async move {
                follow(&handle, &netns, primary, &joined, changes, &sender).await;
                connection.abort();
            });
            Ok(receiver)
        }
        Err(error) => {
            connection.abort();
            Err(error)
        }
    }
}

async fn follow<T>(
    handle: &Handle,
    netns: &Path,
    primary: &str,
    joined: &[String],
    mut changes: UnboundedReceiver<T>,
    sender: &watch::Sender<GuestNetwork>,
) {
    loop {
        tokio::select! {
            change = changes.next() => if change.is_none() { return },
            () = sender.closed() => return,
        }
        for _ in 0..MOST_PAUSES {
            match timeout(QUIET, changes.next()).await {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => break,
            }
            // All that came with it.
            while changes.try_recv().is_ok() {}
        }
        match read(handle, primary, joined).await {
            Ok(now) => {
                sender.send_if_modified(|known| {
                    let is_new = *known != now;
                    let untold = now.untold.iter();
                    untold
                        .filter(|what| !known.untold.contains(what))
                        .for_each(|what| warn_untold(netns, what));
                    *known = now;
                    is_new
                });
            }
            // A plugin is about to delete it, or takes its time between two steps.
            Err(error) => tracing::debug!(%error, "read a pod's network again"),
        }
    }
}

/// Says that a namespace has what guests can't be told of.
pub(crate) fn warn_untold(netns: &Path, what: &str) {
    tracing::warn!(netns = %netns.display(), what, "the guest's network lacks what the pod's has");
}

async fn read(
    handle: &Handle,
    primary: &str,
    joined: &[String],
) -> Result<GuestNetwork, LinkError> {
    let links = view::interfaces(handle, primary).await?;
    let is_joined = |name: &String| joined.is_empty() || joined.contains(name);
    let (links, others): (Vec<_>, Vec<_>) = links.into_iter().partition(|l| is_joined(&l.name));
    let mut network = view::read(handle, &links).await?;
    for name in joined {
        // One that is down only is not among them either.
        if !links.iter().any(|link| link.name == *name) {
            match link::find(handle, name).await {
                Ok(_) => {}
                Err(LinkError::Missing(name)) => network.missing.push(name),
                Err(error) => return Err(error),
            }
        }
    }
    network.unjoined = others.into_iter().map(|link| link.name).collect();
    Ok(network)
}
