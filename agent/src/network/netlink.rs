//! Requests to the kernel about links, and what comes of requests.

use futures::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::link::{LinkAttribute, LinkMessage},
};

use super::error::{NetworkError, Result};

/// Makes it no failure that what is to be removed is gone already.
pub(super) fn gone(
    result: std::result::Result<(), rtnetlink::Error>,
) -> std::result::Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message))
            if [
                Errno::ESRCH,
                Errno::ENOENT,
                Errno::EADDRNOTAVAIL,
                Errno::ENODEV,
            ]
            .iter()
            .any(|errno| message.raw_code() == -(*errno as i32)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Names the failed step of a netlink request.
pub(super) fn failed(
    action: &'static str,
    what: &str,
) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let what = what.to_owned();
    move |source| NetworkError::Netlink {
        action,
        what,
        source,
    }
}

pub(super) async fn all_links(handle: &Handle) -> Result<Vec<LinkMessage>> {
    let links = handle.link().get().execute();
    links.try_collect().await.map_err(failed("list", "links"))
}

pub(super) fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

pub(super) async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    all_links(handle)
        .await?
        .iter()
        .find(|link| name_of(link) == Some(name))
        .map(|link| link.header.index)
        .ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
}

pub(super) async fn up(handle: &Handle, index: u32, name: &str) -> Result<()> {
    let change = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(change).execute().await;
    set.map_err(failed("bring up", name))
}

/// Gives a link another name, for which it must be down.
pub(super) async fn rename(handle: &Handle, index: u32, name: &str) -> Result<()> {
    let change = LinkUnspec::new_with_index(index)
        .down()
        .name(name.to_owned())
        .build();
    let set = handle.link().set(change).execute().await;
    set.map_err(failed("rename to", name))
}
