//! Reads what CNI made in a namespace, as the guest has to have it.
//!
//! The namespace counts, not the plugins' results: a result may be silent on what a plugin set
//! (neighbours, route metrics), and a later plugin may have changed what an earlier one told.

mod routes;
mod rules;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{TryStreamExt, pin_mut};
use rtnetlink::{
    Handle,
    packet_route::{
        address::{AddressAttribute, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
    },
};

use crate::{
    guest::{GuestInterface, GuestNeighbor, GuestNetwork},
    netlink::{LinkError, failed},
    tap::TAP_PREFIX,
};

/// An interface in the namespace that the guest is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// A tap that nobody has open.
    pub is_free_tap: bool,
}

/// Lists the interfaces: the pod's own (`primary`) first, then all others of Ethernet that are
/// up, which plugins that make several leave.
pub(crate) async fn interfaces(handle: &Handle, primary: &str) -> Result<Vec<Found>, LinkError> {
    let stream = handle.link().get().execute();
    pin_mut!(stream);
    let mut found = Vec::new();
    while let Some(link) = stream.try_next().await.map_err(failed("list interfaces"))? {
        let Some(name) = name(&link) else { continue };
        if name == primary {
            let this = ethernet(&link, name);
            found.push(this.ok_or_else(|| LinkError::NotEthernet(primary.to_owned()))?);
        } else if link.header.flags.contains(LinkFlags::Up) && !name.starts_with(TAP_PREFIX) {
            found.extend(ethernet(&link, name));
        }
    }
    if !found.iter().any(|link| link.name == primary) {
        return Err(LinkError::Missing(primary.to_owned()));
    }
    found.sort_by_key(|link| (link.name != primary, link.index));
    Ok(found)
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn ethernet(link: &LinkMessage, name: &str) -> Option<Found> {
    if link.header.link_layer_type != LinkLayerType::Ether {
        return None;
    }
    let mac = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    })?;
    let mtu = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Mtu(mtu) => u16::try_from(*mtu).ok(),
        _ => None,
    });
    Some(Found {
        index: link.header.index,
        name: name.to_owned(),
        mac,
        mtu: mtu.unwrap_or(1500),
        is_free_tap: is_tun(link) && !link.header.flags.contains(LinkFlags::LowerUp),
    })
}

fn is_tun(link: &LinkMessage) -> bool {
    let tun = LinkInfo::Kind(InfoKind::Tun);
    link.attributes
        .iter()
        .any(|a| matches!(a, LinkAttribute::LinkInfo(infos) if infos.contains(&tun)))
}

/// Reads addresses, routes and neighbours of these interfaces, and the rules.
pub(crate) async fn read(handle: &Handle, links: &[Found]) -> Result<GuestNetwork, LinkError> {
    let names: BTreeMap<u32, &str> = links.iter().map(|l| (l.index, l.name.as_str())).collect();
    let mut unsupported = Vec::new();
    let (routes, connected) = routes::read(handle, &names, &mut unsupported).await?;
    let rules = rules::read(handle, &mut unsupported).await?;
    let mut interfaces = Vec::new();
    for link in links {
        let mut interface = GuestInterface {
            mac: format_mac(&link.mac),
            name: link.name.clone(),
            mtu: u32::from(link.mtu),
            addresses: Vec::new(),
            lone_addresses: Vec::new(),
        };
        for (ip, prefix) in addresses(handle, link.index).await? {
            let text = format!("{ip}/{prefix}");
            let network = (link.index, network_of(ip, prefix), prefix);
            let whole = prefix == if ip.is_ipv4() { 32 } else { 128 };
            if whole || connected.contains(&network) {
                interface.addresses.push(text);
            } else {
                interface.lone_addresses.push(text);
            }
        }
        interfaces.push(interface);
    }
    Ok(GuestNetwork {
        interfaces,
        routes,
        neighbors: neighbors(handle, &names).await?,
        rules,
        unsupported,
        ..GuestNetwork::default()
    })
}

async fn addresses(handle: &Handle, index: u32) -> Result<Vec<(IpAddr, u8)>, LinkError> {
    let stream = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    pin_mut!(stream);
    let mut found = Vec::new();
    while let Some(message) = stream.try_next().await.map_err(failed("list addresses"))? {
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let plain = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        let Some(ip) = local.or(plain) else { continue };
        // The guest makes its own link-local addresses of IPv6.
        if ip.is_ipv6() && message.header.scope == AddressScope::Link {
            continue;
        }
        found.push((ip, message.header.prefix_len));
    }
    Ok(found)
}

async fn neighbors(
    handle: &Handle,
    names: &BTreeMap<u32, &str>,
) -> Result<Vec<GuestNeighbor>, LinkError> {
    let stream = handle.neighbours().get().execute();
    pin_mut!(stream);
    let mut found = Vec::new();
    while let Some(message) = stream.try_next().await.map_err(failed("list neighbours"))? {
        let Some(name) = names.get(&message.header.ifindex) else {
            continue;
        };
        if message.header.state != NeighbourState::Permanent {
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
                interface: (*name).to_owned(),
            });
        }
    }
    Ok(found)
}

/// The address with all bits after the prefix cleared.
fn network_of(ip: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix));
            Ipv4Addr::from(u32::from(ip) & mask.unwrap_or(0)).into()
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix));
            Ipv6Addr::from(u128::from(ip) & mask.unwrap_or(0)).into()
        }
    }
}

fn format_mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_of_an_address_is_its_prefix() {
        for (ip, prefix, network) in [
            ("10.1.2.3", 16, "10.1.0.0"),
            ("10.1.2.3", 32, "10.1.2.3"),
            ("10.1.2.3", 0, "0.0.0.0"),
            ("fd00::1:2", 64, "fd00::"),
            ("fd00::1", 128, "fd00::1"),
            ("fd00::1", 0, "::"),
        ] {
            let found = network_of(ip.parse().unwrap(), prefix);
            assert_eq!(found, network.parse::<IpAddr>().unwrap(), "{ip}/{prefix}");
        }
    }
}
