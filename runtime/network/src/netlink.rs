//! Netlink in a pod's namespace, and what can go wrong there.

use std::path::PathBuf;

use futures::{TryStreamExt, pin_mut};
use rtnetlink::Handle;

use crate::netns::{self, NetnsError};

/// Why the links could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A netlink socket or its runtime.
    #[error("open netlink socket")]
    Open(#[source] std::io::Error),
    /// A netlink request.
    #[error("{action}")]
    Netlink {
        /// What was asked.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// The plugins returned without an interface of the name asked for.
    #[error("no interface {0} in the network namespace after CNI ADD")]
    Missing(String),
    /// An interface that is no Ethernet.
    #[error("interface {0} has no Ethernet address")]
    NotEthernet(String),
    /// More interfaces than a VM has slots for.
    #[error("{found} network interfaces; a pod may have {most}")]
    TooMany {
        /// How many it has.
        found: usize,
        /// How many it may have.
        most: usize,
    },
    /// Two interfaces that the guest could not tell apart.
    #[error("interfaces {0} and {1} have one hardware address")]
    SameAddress(String, String),
    /// /dev/net/tun.
    #[error("open tap {name}")]
    Tap {
        /// The tap's name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Works in a namespace, with a netlink socket of it.
pub(crate) async fn inside<T: Send + 'static>(
    netns: PathBuf,
    work: impl AsyncFnOnce(&Handle) -> Result<T, LinkError> + Send + 'static,
) -> Result<T, LinkError> {
    netns::within(netns, move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(LinkError::Open)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Open)?;
            // Dropped with the runtime when this block is done.
            tokio::spawn(connection);
            work(&handle).await
        })
    })
    .await
}

/// Names the failed step of a netlink request.
pub(crate) fn failed(action: &'static str) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    move |source| LinkError::Netlink { action, source }
}

/// The index of an interface.
pub(crate) async fn find(handle: &Handle, name: &str) -> Result<u32, LinkError> {
    let links = handle.link().get().match_name(name).execute();
    pin_mut!(links);
    match links.try_next().await {
        Ok(Some(link)) => Ok(link.header.index),
        Ok(None) => Err(LinkError::Missing(name.to_owned())),
        Err(rtnetlink::Error::NetlinkError(message))
            if message.raw_code() == -nix::libc::ENODEV =>
        {
            Err(LinkError::Missing(name.to_owned()))
        }
        Err(source) => Err(failed("find interface")(source)),
    }
}
