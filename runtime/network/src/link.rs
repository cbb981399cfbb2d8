//! Reads what CNI made in a namespace and joins it to a tap.
//!
//! Every frame that arrives on one of the two links is redirected to the other
//! by `tc` (mirred), so the guest's interface takes the place of the CNI one:
//! same MAC, same addresses, offloads left on. A bridge would need addresses of
//! its own; macvtap does not work for every plugin.
//!
//! A tap that a plugin made has a far end already, which is whoever has it open: the guest's frames go
//! there. One that nobody has open is made for the VM to open, and becomes its end itself.

use std::{os::fd::OwnedFd, path::PathBuf};

use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::tc::{TcAttribute, TcHandle},
};

use crate::{
    guest::GuestNetwork,
    netlink::{LinkError, failed, find, inside},
    tap::{self, TAP_PREFIX},
    view::{self, Found},
};

/// The most interfaces that a pod may have: each takes a device slot of its VM.
pub const MAX_LINKS: usize = 4;

/// The interfaces of a namespace, joined to taps.
#[derive(Debug)]
pub(crate) struct Joined {
    /// What to tell the guest.
    pub guest: GuestNetwork,
    /// The interfaces, the pod's own first.
    pub links: Vec<PodLink>,
}

/// An interface joined to a tap.
#[derive(Debug)]
pub struct PodLink {
    /// Its name in the guest.
    pub name: String,
    /// The VM's end of it, opened with `IFF_VNET_HDR`: its queues, of which there is at least one.
    pub taps: Vec<OwnedFd>,
    /// Its hardware address, which becomes the guest's.
    pub mac: [u8; 6],
    /// Its largest packet in bytes.
    pub mtu: u16,
}

/// Joins `primary` and all other interfaces of the namespace to new taps in it, of so many queues.
///
/// # Errors
/// The step that failed. The taps go with their descriptors, the rest with the namespace.
pub(crate) async fn join(
    netns: PathBuf,
    primary: &'static str,
    queues: u8,
) -> Result<Joined, LinkError> {
    inside(netns, async move |handle| {
        join_here(handle, primary, queues).await
    })
    .await
}

/// Joins one more interface to a new tap, whose number nothing else in the namespace has.
///
/// # Errors
/// The step that failed. The tap goes with its descriptor.
pub(crate) async fn join_later(
    netns: PathBuf,
    primary: &'static str,
    name: String,
    number: u8,
    queues: u8,
) -> Result<PodLink, LinkError> {
    inside(netns, async move |handle| {
        let found = view::interfaces(handle, primary).await?;
        let Some(link) = found.iter().find(|link| link.name == name) else {
            return Err(LinkError::Missing(name));
        };
        let mut others = found.iter().filter(|other| other.index != link.index);
        if let Some(other) = others.find(|other| other.mac == link.mac) {
            return Err(LinkError::SameAddress(other.name.clone(), name));
        }
        // A daemon that was killed may have left it so, without a tap; most often there is none.
        let mut qdisc = handle.qdisc().del(link.index.cast_signed());
        let message = qdisc.message_mut();
        message.header.parent = TcHandle::INGRESS;
        // Not what a plugin may have put there (clsact).
        message.attributes.push(TcAttribute::Kind("ingress".into()));
        let _ = qdisc.execute().await;
        let taps = take(handle, link, usize::from(number), queues).await?;
        Ok(PodLink {
            name,
            taps,
            mac: link.mac,
            mtu: link.mtu,
        })
    })
    .await
}

async fn join_here(handle: &Handle, primary: &str, queues: u8) -> Result<Joined, LinkError> {
    set_up(handle, find(handle, "lo").await?).await?;
    let found = view::interfaces(handle, primary).await?;
    if found.len() > MAX_LINKS {
        return Err(LinkError::TooMany {
            found: found.len(),
            most: MAX_LINKS,
        });
    }
    for (at, one) in found.iter().enumerate() {
        if let Some(other) = found[..at].iter().find(|other| other.mac == one.mac) {
            let names = (other.name.clone(), one.name.clone());
            return Err(LinkError::SameAddress(names.0, names.1));
        }
    }
    let guest = view::read(handle, &found).await?;
    let mut links = Vec::new();
    for (number, link) in found.into_iter().enumerate() {
        let taps = take(handle, &link, number, queues).await?;
        links.push(PodLink {
            name: link.name,
            taps,
            mac: link.mac,
            mtu: link.mtu,
        });
    }
    Ok(Joined { guest, links })
}

/// Joins an interface to the new tap of this number, or takes it when it is a tap itself.
async fn take(
    handle: &Handle,
    link: &Found,
    number: usize,
    queues: u8,
) -> Result<Vec<OwnedFd>, LinkError> {
    if link.is_free_tap {
        return tap::attach(&link.name, queues).map_err(tap_error(&link.name));
    }
    let tap_name = format!("{TAP_PREFIX}{number}");
    let taps = tap::open(&tap_name, queues).map_err(tap_error(&tap_name))?;
    let tap_index = find(handle, &tap_name).await?;
    let message = LinkUnspec::new_with_index(tap_index)
        .mtu(u32::from(link.mtu))
        .up()
        .build();
    let set = handle.link().set(message).execute().await;
    set.map_err(failed("bring up tap"))?;
    redirect(handle, link.index, tap_index).await?;
    redirect(handle, tap_index, link.index).await?;
    Ok(taps)
}

fn tap_error(name: &str) -> impl FnOnce(std::io::Error) -> LinkError {
    let name = name.to_owned();
    move |source| LinkError::Tap { name, source }
}

async fn set_up(handle: &Handle, index: u32) -> Result<(), LinkError> {
    let message = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(message).execute().await;
    set.map_err(failed("bring up interface"))
}

/// Sends every frame that arrives on `from` out of `to`.
async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), LinkError> {
    let from = from.cast_signed();
    let qdisc = handle.qdisc().add(from).ingress().execute().await;
    qdisc.map_err(failed("add ingress qdisc"))?;
    let filter = handle
        .traffic_filter(from)
        .add()
        .parent(0xffff_0000)
        .protocol((nix::libc::ETH_P_ALL as u16).to_be())
        .redirect(to)
        .map_err(failed("build redirect"))?;
    filter.execute().await.map_err(failed("redirect frames"))
}
