//! Reads what CNI made in a namespace, as the guest has to have it.
//!
//! The namespace counts, not the plugins' results: a result may be silent on what a plugin set
//! (neighbours, route metrics), and a later plugin may have changed what an earlier one told.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{TryStreamExt, pin_mut};
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
            RouteProtocol, RouteType,
        },
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage},
    },
};

use crate::{
    guest::{GuestInterface, GuestNeighbor, GuestNetwork, GuestRoute, GuestRule},
    link::{LinkError, TAP_PREFIX, failed},
};

/// What a rule says when it suppresses nothing.
const NOTHING: u32 = u32::MAX;

/// An interface in the namespace that the guest is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
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
    })
}

/// Reads addresses, routes and neighbours of these interfaces.
pub(crate) async fn read(handle: &Handle, links: &[Found]) -> Result<GuestNetwork, LinkError> {
    let names: BTreeMap<u32, &str> = links.iter().map(|l| (l.index, l.name.as_str())).collect();
    let (routes, connected) = routes(handle, &names).await?;
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
        rules: rules(handle).await?,
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

/// A network on an interface.
type Connected = (u32, IpAddr, u8);

/// The routes that somebody set, and the networks that the kernel made routes for when it got
/// an address.
async fn routes(
    handle: &Handle,
    names: &BTreeMap<u32, &str>,
) -> Result<(Vec<GuestRoute>, Vec<Connected>), LinkError> {
    let (mut found, mut connected) = (Vec::new(), Vec::new());
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for (message, default) in [(v4, "0.0.0.0"), (v6, "::")] {
        let stream = handle.route().get(message).execute();
        pin_mut!(stream);
        while let Some(route) = stream.try_next().await.map_err(failed("list routes"))? {
            found.extend(guest_route(&route, names, default));
            connected.extend(connected_network(&route));
        }
    }
    // A gateway is reachable only once its on-link route is there.
    found.sort_by_key(|route: &GuestRoute| !route.gateway.is_empty());
    Ok((found, connected))
}

fn connected_network(route: &RouteMessage) -> Option<Connected> {
    if route.header.table != RouteHeader::RT_TABLE_MAIN
        || route.header.protocol != RouteProtocol::Kernel
    {
        return None;
    }
    let (mut index, mut network) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => network = Some((*ip).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => network = Some((*ip).into()),
            _ => {}
        }
    }
    Some((index?, network?, route.header.destination_prefix_length))
}

/// The route as the guest needs it; none for those that its kernel makes itself.
fn guest_route(
    route: &RouteMessage,
    names: &BTreeMap<u32, &str>,
    default: &str,
) -> Option<GuestRoute> {
    let header = &route.header;
    let leads_nowhere = match header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit => true,
        _ => return None,
    };
    let table = table_of(route);
    if table == LOCAL || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let mut to = GuestRoute {
        destination: format!("{default}/0"),
        scope: u32::from(u8::from(header.scope)),
        onlink: header.flags.contains(RouteFlags::Onlink),
        table: if table == MAIN { 0 } else { table },
        kind: if leads_nowhere {
            u32::from(u8::from(header.kind))
        } else {
            0
        },
        ..GuestRoute::default()
    };
    for attribute in &route.attributes {
        match attribute {
            // Of IPv6, such a route has the loopback interface.
            RouteAttribute::Oif(_) if leads_nowhere => {}
            RouteAttribute::Oif(oif) => to.interface = (*names.get(oif)?).to_owned(),
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
    (leads_nowhere || !to.interface.is_empty()).then_some(to)
}

/// The table that the kernel fills by itself (rtnetlink(7)).
const LOCAL: u32 = 255;
/// The number of the main table.
const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// The header has room for small numbers alone.
fn table_of(route: &RouteMessage) -> u32 {
    let long = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    long.unwrap_or_else(|| u32::from(route.header.table))
}

/// The rules that somebody set.
async fn rules(handle: &Handle) -> Result<Vec<GuestRule>, LinkError> {
    let mut found = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let ipv6 = version == IpVersion::V6;
        let stream = handle.rule().get(version).execute();
        pin_mut!(stream);
        while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
            match guest_rule(&rule, ipv6) {
                Some(Translated::Rule(rule)) => found.push(rule),
                Some(Translated::Unknown(what)) => {
                    tracing::warn!(?rule, what, "a rule that guests can't be told of");
                }
                None => {}
            }
        }
    }
    Ok(found)
}

/// A rule in the guest's terms.
enum Translated {
    Rule(GuestRule),
    /// It would not mean the same without this.
    Unknown(&'static str),
}

/// The rule as the guest needs it; none for those that every kernel has.
fn guest_rule(rule: &RuleMessage, ipv6: bool) -> Option<Translated> {
    let header = &rule.header;
    let mut to = GuestRule {
        ipv6,
        invert: header.flags.contains(RuleFlags::Invert),
        tos: u32::from(header.tos),
        action: u32::from(u8::from(header.action)),
        table: u32::from(header.table),
        ..GuestRule::default()
    };
    if !matches!(
        header.action,
        RuleAction::ToTable
            | RuleAction::Blackhole
            | RuleAction::Unreachable
            | RuleAction::Prohibit
    ) {
        return Some(Translated::Unknown("action"));
    }
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Protocol(RouteProtocol::Kernel) => return None,
            RuleAttribute::Priority(priority) => to.priority = *priority,
            RuleAttribute::Table(table) => to.table = *table,
            RuleAttribute::Source(ip) => to.source = format!("{ip}/{}", header.src_len),
            RuleAttribute::Destination(ip) => to.destination = format!("{ip}/{}", header.dst_len),
            RuleAttribute::Iifname(name) => to.input.clone_from(name),
            RuleAttribute::Oifname(name) => to.output.clone_from(name),
            RuleAttribute::FwMark(mark) => to.mark = *mark,
            RuleAttribute::FwMask(mask) => to.mask = *mask,
            RuleAttribute::SuppressPrefixLen(length) => {
                to.suppress_prefix = Some(*length).filter(|length| *length != NOTHING);
            }
            RuleAttribute::SuppressIfGroup(group) if *group != NOTHING => {
                return Some(Translated::Unknown("interface group"));
            }
            RuleAttribute::SuppressIfGroup(_) | RuleAttribute::Protocol(_) => {}
            RuleAttribute::UidRange(_) => return Some(Translated::Unknown("users")),
            RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => {
                return Some(Translated::Unknown("protocol or ports"));
            }
            RuleAttribute::Realm(_)
            | RuleAttribute::TunId(_)
            | RuleAttribute::L3MDev(_)
            | RuleAttribute::Goto(_) => return Some(Translated::Unknown("selector")),
            // What a later kernel adds.
            _ => {}
        }
    }
    Some(Translated::Rule(to))
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
