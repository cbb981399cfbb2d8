//! Routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_proto_agent::agent as proto;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop,
        RouteNextHopFlags, RouteScope, RouteType,
    },
};

use super::error::{NetworkError, Result};
use super::netlink::{failed, gone, index_of};
use super::parse::{parse_cidr, parse_name, parse_optional};

/// A checked [`proto::Route`].
#[derive(Debug)]
pub(super) struct Path {
    text: String,
    destination: (IpAddr, u8),
    source: Option<IpAddr>,
    /// Empty: it leads nowhere.
    hops: Vec<Hop>,
    mtu: u32,
    metric: u32,
    scope: u8,
    /// 0: the main one.
    table: u32,
    kind: RouteType,
}

/// Where a route leads.
#[derive(Debug)]
struct Hop {
    gateway: Option<IpAddr>,
    interface: String,
    /// Its weight, less one.
    hops: u8,
    onlink: bool,
}

impl Path {
    pub(super) fn parse(route: &proto::Route) -> Result<Self> {
        let destination = parse_cidr(&route.destination)?;
        let kind = match u8::try_from(route.kind).map(RouteType::from) {
            Ok(RouteType::Unspec | RouteType::Unicast) => RouteType::Unicast,
            Ok(
                nowhere @ (RouteType::BlackHole
                | RouteType::Unreachable
                | RouteType::Prohibit
                | RouteType::Throw),
            ) => nowhere,
            _ => return Err(NetworkError::Kind(route.kind)),
        };
        let single = proto::NextHop {
            gateway: route.gateway.clone(),
            interface: route.interface.clone(),
            weight: 1,
            onlink: route.onlink,
            ..proto::NextHop::default()
        };
        let hops = match (kind, route.next_hops.as_slice()) {
            (RouteType::Unicast, []) => &[single],
            (RouteType::Unicast, several) => several,
            _ => &[],
        };
        let hops: Vec<_> = hops.iter().map(Hop::parse).collect::<Result<_>>()?;
        let source = parse_optional(&route.source)?;
        let gateways = hops.iter().filter_map(|hop| hop.gateway);
        let is_other = |a: IpAddr| a.is_ipv4() != destination.0.is_ipv4();
        if gateways.chain(source).any(is_other) {
            return Err(NetworkError::MixedFamilies(route.destination.clone()));
        }
        Ok(Self {
            text: route.destination.clone(),
            destination,
            source,
            hops,
            table: route.table,
            kind,
            mtu: route.mtu,
            metric: route.metric,
            scope: u8::try_from(route.scope).unwrap_or(0),
        })
    }

    pub(super) async fn apply(&self, handle: &Handle) -> Result<()> {
        let message = self.message(&self.indexes(handle).await?);
        let add = handle.route().add(message).replace().execute().await;
        add.map_err(failed("add route", &self.text))
    }

    pub(super) async fn remove(&self, handle: &Handle) -> Result<()> {
        let indexes = match self.indexes(handle).await {
            Err(NetworkError::NoInterface(_)) => return Ok(()),
            indexes => indexes?,
        };
        let removed = gone(handle.route().del(self.message(&indexes)).execute().await);
        removed.map_err(failed("remove route", &self.text))
    }

    /// The interfaces of its hops.
    async fn indexes(&self, handle: &Handle) -> Result<Vec<u32>> {
        let mut indexes = Vec::new();
        for hop in &self.hops {
            indexes.push(index_of(handle, &hop.interface).await?);
        }
        Ok(indexes)
    }

    pub(super) fn has_gateway(&self) -> bool {
        self.hops.iter().any(|hop| hop.gateway.is_some())
    }

    /// What tells it from another in the kernel's tables.
    pub(super) fn key(&self) -> ((IpAddr, u8), u32, u32) {
        (self.destination, self.table, self.metric)
    }

    /// As the kernel takes it; `indexes` are those of the hops' interfaces.
    fn message(&self, indexes: &[u32]) -> RouteMessage {
        let mut message = match self.destination {
            (IpAddr::V4(to), prefix) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to, prefix)
                .build(),
            (IpAddr::V6(to), prefix) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to, prefix)
                .build(),
        };
        message.header.scope = match self.scope {
            // The kernel wants the scope "link" for what has no gateway.
            0 if !self.hops.is_empty() && !self.has_gateway() => RouteScope::Link,
            scope => RouteScope::from(scope),
        };
        message.header.kind = self.kind;
        let attributes = &mut message.attributes;
        match (self.hops.as_slice(), indexes) {
            ([hop], [index]) => {
                if let Some(gateway) = hop.gateway {
                    attributes.push(RouteAttribute::Gateway(address_of(gateway)));
                }
                attributes.push(RouteAttribute::Oif(*index));
                if hop.onlink {
                    message.header.flags |= RouteFlags::Onlink;
                }
            }
            ([], _) => {}
            (hops, indexes) => {
                let hops = hops.iter().zip(indexes);
                let hops = hops.map(|(hop, index)| hop.message(*index)).collect();
                attributes.push(RouteAttribute::MultiPath(hops));
            }
        }
        if let Some(source) = self.source {
            attributes.push(RouteAttribute::PrefSource(address_of(source)));
        }
        if self.table > 0 {
            message.header.table = u8::try_from(self.table).unwrap_or(0);
            attributes.push(RouteAttribute::Table(self.table));
        }
        if self.metric > 0 {
            attributes.push(RouteAttribute::Priority(self.metric));
        }
        if self.mtu > 0 {
            let metrics = vec![RouteMetric::Mtu(self.mtu)];
            attributes.push(RouteAttribute::Metrics(metrics));
        }
        message
    }
}

impl Hop {
    pub(super) fn parse(hop: &proto::NextHop) -> Result<Self> {
        let weight = hop.weight.checked_sub(1).map(u8::try_from);
        let Some(Ok(hops)) = weight else {
            return Err(NetworkError::Weight(hop.weight));
        };
        Ok(Self {
            gateway: parse_optional(&hop.gateway)?,
            interface: parse_name(&hop.interface)?,
            hops,
            onlink: hop.onlink,
        })
    }

    /// As one of several.
    fn message(&self, index: u32) -> RouteNextHop {
        let mut message = RouteNextHop::default();
        message.interface_index = index;
        message.hops = self.hops;
        if self.onlink {
            message.flags |= RouteNextHopFlags::Onlink;
        }
        let gateway = self.gateway.map(address_of);
        message.attributes = gateway.map(RouteAttribute::Gateway).into_iter().collect();
        message
    }
}

fn address_of(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_of_the_routes_family() {
        let route = proto::Route {
            destination: "0.0.0.0/0".to_owned(),
            gateway: "fe80::1".to_owned(),
            interface: "eth0".to_owned(),
            ..proto::Route::default()
        };
        assert!(matches!(
            Path::parse(&route),
            Err(NetworkError::MixedFamilies(_))
        ));
    }

    #[test]
    fn a_route_without_gateway_has_link_scope() {
        let route = proto::Route {
            destination: "10.1.0.0/24".to_owned(),
            interface: "eth0".to_owned(),
            ..proto::Route::default()
        };
        let message = Path::parse(&route).unwrap().message(&[2]);
        assert_eq!(message.header.scope, RouteScope::Link);
        let route = proto::Route {
            gateway: "10.0.0.1".to_owned(),
            metric: 7,
            ..route
        };
        let message = Path::parse(&route).unwrap().message(&[2]);
        assert_eq!(message.header.scope, RouteScope::Universe);
    }

    #[test]
    fn next_hops_share_a_route_by_their_weights() {
        let hop = |interface: &str, gateway: &str, weight| proto::NextHop {
            interface: interface.to_owned(),
            gateway: gateway.to_owned(),
            weight,
            ..proto::NextHop::default()
        };
        let route = |next_hops| proto::Route {
            destination: "0.0.0.0/0".to_owned(),
            next_hops,
            ..proto::Route::default()
        };
        let two = route(vec![
            hop("eth0", "10.0.0.1", 1),
            hop("net1", "10.1.0.1", 256),
        ]);
        let message = Path::parse(&two).unwrap().message(&[2, 3]);
        let hops = message.attributes.iter().find_map(|a| match a {
            RouteAttribute::MultiPath(hops) => Some(hops),
            _ => None,
        });
        let hops = hops.unwrap();
        let hops: Vec<_> = hops.iter().map(|h| (h.interface_index, h.hops)).collect();
        assert_eq!(hops, [(2, 0), (3, 255)]);
        for weight in [0, 257, u32::MAX] {
            let route = Path::parse(&route(vec![hop("eth0", "", weight)]));
            assert!(matches!(route, Err(NetworkError::Weight(_))), "{weight}");
        }
        let other = Path::parse(&route(vec![hop("eth0", "fe80::1", 1)]));
        assert!(matches!(other, Err(NetworkError::MixedFamilies(_))));
    }
}
