//! Reads what CNI made in a namespace and joins it to a tap.
//!
//! Every frame that arrives on one of the two links is redirected to the other
//! by `tc` (mirred), so the guest's interface takes the place of the CNI one:
//! same MAC, same addresses, offloads left on. A bridge would need addresses of
//! its own; macvtap does not work for every plugin.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    path::PathBuf,
};

use futures::{TryStreamExt, pin_mut};
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressScope},
        link::{LinkAttribute, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
            RouteType,
        },
    },
};

use crate::{
    guest::{GuestInterface, GuestNeighbor, GuestNetwork, GuestRoute},
    netns::{self, NetnsError},
    tap,
};

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
    /// /dev/net/tun.
    #[error("open tap {name}")]
    Tap {
        /// The tap's name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
}

/// An interface joined to a tap.
#[derive(Debug)]
pub struct Joined {
    /// What to tell the guest.
    pub guest: GuestNetwork,
    /// The tap.
    pub tap: OwnedFd,
    /// The interface's hardware address, which becomes the guest's.
    pub mac: [u8; 6],
    /// Its MTU.
    pub mtu: u16,
}

impl Joined {
    /// Returns the addresses of the guest without their prefix lengths.
    pub fn ips(&self) -> Vec<IpAddr> {
        let interfaces = self.guest.interfaces.iter();
        interfaces
            .flat_map(|i| &i.addresses)
            .filter_map(|a| a.split('/').next()?.parse().ok())
            .collect()
    }
}

/// Joins `interface` of the namespace to a new tap named `tap_name` in it.
///
/// # Errors
/// The step that failed. The tap goes with its descriptor, the rest with the namespace.
pub async fn join(
    netns: PathBuf,
    interface: &'static str,
    tap_name: &'static str,
) -> Result<Joined, LinkError> {
    netns::within(netns, move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(LinkError::Open)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Open)?;
            // Dropped with the runtime when this block is done.
            tokio::spawn(connection);
            join_here(&handle, interface, tap_name).await
        })
    })
    .await
}

async fn join_here(handle: &Handle, name: &str, tap_name: &str) -> Result<Joined, LinkError> {
    let lo = find(handle, "lo").await?;
    set_up(handle, lo.header.index).await?;
    let link = find(handle, name).await?;
    let mac = link
        .attributes
        .iter()
        .find_map(|a| match a {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => None,
        })
        .ok_or_else(|| LinkError::NotEthernet(name.to_owned()))?;
    let mtu = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Mtu(mtu) => u16::try_from(*mtu).ok(),
        _ => None,
    });
    let mtu = mtu.unwrap_or(1500);
    let index = link.header.index;

    let guest = GuestNetwork {
        interfaces: vec![GuestInterface {
            mac: format_mac(&mac),
            name: name.to_owned(),
            mtu: u32::from(mtu),
            addresses: addresses(handle, index).await?,
        }],
        routes: routes(handle, index, name).await?,
        neighbors: neighbors(handle, index, name).await?,
    };

    let tap = tap::open(tap_name).map_err(|source| LinkError::Tap {
        name: tap_name.to_owned(),
        source,
    })?;
    let tap_index = find(handle, tap_name).await?.header.index;
    let message = LinkUnspec::new_with_index(tap_index)
        .mtu(u32::from(mtu))
        .up()
        .build();
    let set = handle.link().set(message).execute().await;
    set.map_err(failed("bring up tap"))?;
    redirect(handle, index, tap_index).await?;
    redirect(handle, tap_index, index).await?;
    Ok(Joined {
        guest,
        tap,
        mac,
        mtu,
    })
}

fn failed(action: &'static str) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    move |source| LinkError::Netlink { action, source }
}

async fn find(handle: &Handle, name: &str) -> Result<LinkMessage, LinkError> {
    let links = handle.link().get().match_name(name).execute();
    pin_mut!(links);
    match links.try_next().await {
        Ok(Some(link)) => Ok(link),
        Ok(None) => Err(LinkError::Missing(name.to_owned())),
        Err(rtnetlink::Error::NetlinkError(message))
            if message.raw_code() == -nix::libc::ENODEV =>
        {
            Err(LinkError::Missing(name.to_owned()))
        }
        Err(source) => Err(failed("find interface")(source)),
    }
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

async fn addresses(handle: &Handle, index: u32) -> Result<Vec<String>, LinkError> {
    let stream = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    pin_mut!(stream);
    let mut found = Vec::new();
    while let Some(message) = stream.try_next().await.map_err(failed("list addresses"))? {
        // The guest makes its own link-local addresses.
        if message.header.scope == AddressScope::Link {
            continue;
        }
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let plain = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        if let Some(ip) = local.or(plain) {
            found.push(format!("{ip}/{}", message.header.prefix_len));
        }
    }
    Ok(found)
}

async fn routes(handle: &Handle, index: u32, name: &str) -> Result<Vec<GuestRoute>, LinkError> {
    let mut found = Vec::new();
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for (message, default) in [(v4, "0.0.0.0"), (v6, "::")] {
        let stream = handle.route().get(message).execute();
        pin_mut!(stream);
        while let Some(route) = stream.try_next().await.map_err(failed("list routes"))? {
            found.extend(guest_route(&route, index, name, default));
        }
    }
    // A gateway is reachable only once its on-link route is there.
    found.sort_by_key(|route: &GuestRoute| !route.gateway.is_empty());
    Ok(found)
}

/// The route as the guest needs it; none for those that its kernel makes itself.
fn guest_route(route: &RouteMessage, index: u32, name: &str, default: &str) -> Option<GuestRoute> {
    let header = &route.header;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
    {
        return None;
    }
    let mut to = GuestRoute {
        destination: format!("{default}/0"),
        interface: name.to_owned(),
        scope: u32::from(u8::from(header.scope)),
        ..GuestRoute::default()
    };
    let mut on_interface = false;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => on_interface = *oif == index,
            RouteAttribute::Destination(address) => {
                to.destination = format!("{}/{}", text(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => to.gateway = text(address)?,
            RouteAttribute::PrefSource(address) => to.source = text(address)?,
            RouteAttribute::Priority(metric) => to.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        to.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    on_interface.then_some(to)
}

fn text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
}

async fn neighbors(
    handle: &Handle,
    index: u32,
    name: &str,
) -> Result<Vec<GuestNeighbor>, LinkError> {
    let stream = handle.neighbours().get().execute();
    pin_mut!(stream);
    let mut found = Vec::new();
    while let Some(message) = stream.try_next().await.map_err(failed("list neighbours"))? {
        if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
            continue;
        }
        let mut address = None;
        let mut mac = None;
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    address = Some(ip.to_string());
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    address = Some(ip.to_string());
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(format_mac(bytes)),
                _ => {}
            }
        }
        if let (Some(address), Some(mac)) = (address, mac) {
            found.push(GuestNeighbor {
                address,
                mac,
                interface: name.to_owned(),
            });
        }
    }
    Ok(found)
}

fn format_mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
}
