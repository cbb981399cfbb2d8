//! Routes, of whatever table.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::{TryStreamExt, pin_mut};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
        RouteNextHop, RouteNextHopFlags, RoutePreference, RouteProtocol, RouteType,
    },
};

use crate::{
    guest::{GuestNextHop, GuestRoute},
    netlink::{LinkError, failed},
};

/// A network on an interface.
type Connected = (u32, IpAddr, u8);

/// The routes that somebody set, and the networks that the kernel made routes for when it got
/// an address.
pub(super) async fn read(
    handle: &Handle,
    names: &BTreeMap<u32, &str>,
    unsupported: &mut Vec<String>,
) -> Result<(Vec<GuestRoute>, Vec<Connected>), LinkError> {
    let (mut found, mut connected) = (Vec::new(), Vec::new());
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for (message, default) in [(v4, "0.0.0.0"), (v6, "::")] {
        let stream = handle.route().get(message).execute();
        pin_mut!(stream);
        while let Some(route) = stream.try_next().await.map_err(failed("list routes"))? {
            found.extend(guest_route(&route, names, default, unsupported));
            connected.extend(connected_network(&route));
        }
    }
    // A gateway is reachable only once its on-link route is there.
    found.sort_by_key(GuestRoute::has_gateway);
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

/// The route as the guest needs it; none for those that its kernel makes itself, and for those that
/// it can't be told of, which `unsupported` names.
fn guest_route(
    route: &RouteMessage,
    names: &BTreeMap<u32, &str>,
    default: &str,
    unsupported: &mut Vec<String>,
) -> Option<GuestRoute> {
    let header = &route.header;
    let table = table_of(route);
    if table == LOCAL || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let destination = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(address) => text(address),
        _ => None,
    });
    let destination = format!(
        "{}/{}",
        destination.as_deref().unwrap_or(default),
        header.destination_prefix_length
    );
    match translate(route, names, destination.clone(), table) {
        Ok((route, lost)) => {
            let lost = lost
                .iter()
                .map(|what| format!("the {what} of route {destination}"));
            unsupported.extend(lost);
            Some(route)
        }
        Err(why) => {
            unsupported.push(format!("route {destination} (table {table}): {why}"));
            None
        }
    }
}

/// The route in the guest's terms and what it loses, or why it would not mean the same there.
fn translate(
    route: &RouteMessage,
    names: &BTreeMap<u32, &str>,
    destination: String,
    table: u32,
) -> Result<(GuestRoute, Vec<String>), String> {
    let header = &route.header;
    let leads_nowhere = match header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            true
        }
        kind => return Err(format!("its type {kind:?}")),
    };
    if header.source_prefix_length > 0 {
        return Err("it is for some sources alone".into());
    }
    if header.tos > 0 {
        return Err("it is for one type of service alone".into());
    }
    let name = |index: &u32| match names.get(index) {
        Some(name) => Ok((*name).to_owned()),
        None => Err(format!("the guest has no interface {index}")),
    };
    let mut lost = Vec::new();
    let mut to = GuestRoute {
        destination,
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
            RouteAttribute::Oif(oif) => to.interface = name(oif)?,
            RouteAttribute::Gateway(address) => to.gateway = text(address).unwrap_or_default(),
            RouteAttribute::MultiPath(hops) => {
                let hops = hops.iter().map(|hop| next_hop(hop, &name, &mut lost));
                to.next_hops = hops.collect::<Result<_, _>>()?;
            }
            RouteAttribute::PrefSource(address) => to.source = text(address).unwrap_or_default(),
            RouteAttribute::Priority(metric) => to.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => to.mtu = *mtu,
                        other => lost.push(format!("metric {other:?}")),
                    }
                }
            }
            other => refuse(other, &mut lost)?,
        }
    }
    let leads_somewhere = !to.interface.is_empty() || !to.next_hops.is_empty();
    if leads_nowhere || leads_somewhere {
        Ok((to, lost))
    } else {
        Err("it names no interface".into())
    }
}

/// One of several next hops. Its weight is in the message as one less.
fn next_hop(
    hop: &RouteNextHop,
    name: &impl Fn(&u32) -> Result<String, String>,
    lost: &mut Vec<String>,
) -> Result<GuestNextHop, String> {
    let mut to = GuestNextHop {
        interface: name(&hop.interface_index)?,
        weight: u32::from(hop.hops) + 1,
        onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
        ..GuestNextHop::default()
    };
    for attribute in &hop.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => to.gateway = text(address).unwrap_or_default(),
            other => refuse(other, lost)?,
        }
    }
    Ok(to)
}

/// Refuses what changes where packets go, and notes what only tunes it.
fn refuse(attribute: &RouteAttribute, lost: &mut Vec<String>) -> Result<(), String> {
    match attribute {
        // They are read elsewhere, or say what the others say too (a next-hop object is told as what
        // it consists of).
        RouteAttribute::Destination(_)
        | RouteAttribute::Table(_)
        | RouteAttribute::CacheInfo(_)
        | RouteAttribute::NhId(_)
        | RouteAttribute::Preference(RoutePreference::Medium) => Ok(()),
        RouteAttribute::Via(_) => Err("its gateway is of the other family".into()),
        RouteAttribute::EncapType(_) | RouteAttribute::Encap(_) => {
            Err("it encapsulates packets".into())
        }
        other => {
            lost.push(format!("attribute {other:?}"));
            Ok(())
        }
    }
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

fn text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.to_string()),
        RouteAddress::Inet6(ip) => Some(ip.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteLwEnCapType;

    use super::*;

    fn gateway(ip: [u8; 4]) -> RouteAttribute {
        RouteAttribute::Gateway(RouteAddress::Inet(ip.into()))
    }

    fn told(attributes: Vec<RouteAttribute>) -> (Option<GuestRoute>, Vec<String>) {
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.attributes = attributes;
        let mut unsupported = Vec::new();
        let names = BTreeMap::from([(2, "eth0"), (3, "net1")]);
        let route = guest_route(&route, &names, "0.0.0.0", &mut unsupported);
        (route, unsupported)
    }

    #[test]
    fn next_hops_have_their_weights() {
        let hop = |interface_index, hops, ip| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.hops) = (interface_index, hops);
            hop.attributes = vec![gateway(ip)];
            hop
        };
        let hops = vec![hop(2, 0, [10, 0, 0, 1]), hop(3, 255, [10, 1, 0, 1])];
        let (route, unsupported) = told(vec![RouteAttribute::MultiPath(hops)]);
        let hops = route.unwrap().next_hops;
        let hops: Vec<_> = hops
            .iter()
            .map(|h| (h.gateway.as_str(), h.interface.as_str(), h.weight))
            .collect();
        assert_eq!(hops, [("10.0.0.1", "eth0", 1), ("10.1.0.1", "net1", 256)]);
        assert!(unsupported.is_empty());
        // One of them leads where the guest can't go.
        let hops = vec![hop(2, 0, [10, 0, 0, 1]), hop(9, 0, [10, 1, 0, 1])];
        let (route, unsupported) = told(vec![RouteAttribute::MultiPath(hops)]);
        assert_eq!(route, None);
        assert!(unsupported[0].contains("no interface 9"), "{unsupported:?}");
    }

    #[test]
    fn what_guests_are_not_told_is_named() {
        let oif = RouteAttribute::Oif(2);
        let metrics =
            RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300), RouteMetric::InitCwnd(9)]);
        let (route, unsupported) = told(vec![oif.clone(), gateway([10, 0, 0, 1]), metrics]);
        assert_eq!(route.unwrap().mtu, 1300);
        assert_eq!(unsupported, ["the metric InitCwnd(9) of route 0.0.0.0/0"]);
        let encapsulated = RouteAttribute::EncapType(RouteLwEnCapType::Ip);
        let (route, unsupported) = told(vec![oif, encapsulated]);
        assert_eq!(route, None);
        assert_eq!(
            unsupported,
            ["route 0.0.0.0/0 (table 254): it encapsulates packets"]
        );
        let (route, unsupported) = told(vec![RouteAttribute::Oif(7)]);
        assert_eq!(route, None);
        assert!(unsupported[0].contains("no interface 7"), "{unsupported:?}");
    }
}
