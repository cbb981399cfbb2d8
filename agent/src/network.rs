//! The pod's network as the host describes it, set through netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use hull_proto_agent::agent::{Interface, Neighbor, Route};
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressFlags},
        link::{LinkAttribute, LinkMessage},
        route::{RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteScope},
    },
};

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("open a netlink socket")]
    Socket(#[source] std::io::Error),
    #[error("{0:?} is no MAC address")]
    Mac(String),
    #[error("{0:?} is no address with a prefix length")]
    Cidr(String),
    #[error("{0:?} is no IP address")]
    Address(String),
    #[error("{0:?} is no interface name")]
    Name(String),
    #[error("no network device with MAC address {0}")]
    NoDevice(String),
    #[error("no interface {0}")]
    NoInterface(String),
    #[error("gateway and destination of route {0} are not of one family")]
    MixedFamilies(String),
    #[error("{action} {what}")]
    Netlink {
        action: &'static str,
        what: String,
        #[source]
        source: rtnetlink::Error,
    },
}

type Result<T> = std::result::Result<T, NetworkError>;

/// Sets up loopback, then links, addresses, routes and neighbours. What is set
/// already stays.
pub(crate) async fn configure(
    interfaces: &[Interface],
    routes: &[Route],
    neighbors: &[Neighbor],
) -> Result<()> {
    let links: Vec<Link> = interfaces.iter().map(Link::parse).collect::<Result<_>>()?;
    let routes: Vec<Path> = routes.iter().map(Path::parse).collect::<Result<_>>()?;
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
    let connection = tokio::spawn(connection);
    let result = apply(&handle, &links, &routes, neighbors).await;
    connection.abort();
    result
}

/// Moves the interfaces to the network namespace of the process `pid`.
pub(crate) async fn move_links(interfaces: &[Interface], pid: i32) -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
    let connection = tokio::spawn(connection);
    let result = async {
        for interface in interfaces {
            let link = Link::parse(interface)?;
            let index = link.find(&handle).await?.header.index;
            let change = LinkUnspec::new_with_index(index)
                .setns_by_pid(pid.unsigned_abs())
                .build();
            let moved = handle.link().set(change).execute().await;
            moved.map_err(failed("move link", &interface.mac))?;
        }
        Ok(())
    }
    .await;
    connection.abort();
    result
}

/// Brings the loopback interface up.
pub(crate) async fn loopback() -> Result<()> {
    configure(&[], &[], &[]).await
}

async fn apply(
    handle: &Handle,
    links: &[Link],
    routes: &[Path],
    neighbors: &[Neighbor],
) -> Result<()> {
    up(handle, index_of(handle, "lo").await?, "lo").await?;
    for link in links {
        link.apply(handle).await?;
    }
    // On-link routes first: a gateway must be reachable when it is named.
    let (direct, via): (Vec<_>, Vec<_>) = routes.iter().partition(|r| r.gateway.is_none());
    for route in direct.into_iter().chain(via) {
        route.apply(handle).await?;
    }
    for neighbor in neighbors {
        add_neighbor(handle, neighbor).await?;
    }
    Ok(())
}

/// Names the failed step of a netlink request.
fn failed(action: &'static str, what: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let what = what.to_owned();
    move |source| NetworkError::Netlink {
        action,
        what,
        source,
    }
}

async fn all_links(handle: &Handle) -> Result<Vec<LinkMessage>> {
    let links = handle.link().get().execute();
    links.try_collect().await.map_err(failed("list", "links"))
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    all_links(handle)
        .await?
        .iter()
        .find(|link| name_of(link) == Some(name))
        .map(|link| link.header.index)
        .ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
}

async fn up(handle: &Handle, index: u32, name: &str) -> Result<()> {
    let change = LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(change).execute().await;
    set.map_err(failed("bring up", name))
}

/// Gives a link another name, for which it must be down.
async fn rename(handle: &Handle, index: u32, name: &str) -> Result<()> {
    let change = LinkUnspec::new_with_index(index)
        .down()
        .name(name.to_owned())
        .build();
    let set = handle.link().set(change).execute().await;
    set.map_err(failed("rename to", name))
}

/// A checked [`Interface`].
#[derive(Debug)]
struct Link {
    mac: [u8; 6],
    name: String,
    mtu: u32,
    /// Each with whether its network is on the link.
    addresses: Vec<(IpAddr, u8, bool)>,
}

impl Link {
    fn parse(interface: &Interface) -> Result<Self> {
        Ok(Self {
            mac: parse_mac(&interface.mac)?,
            name: parse_name(&interface.name)?,
            mtu: interface.mtu,
            addresses: {
                let connected = interface.addresses.iter().map(|a| (a, true));
                let lone = interface.lone_addresses.iter().map(|a| (a, false));
                let all = connected.chain(lone).map(|(text, is_connected)| {
                    let (address, prefix) = parse_cidr(text)?;
                    Ok((address, prefix, is_connected))
                });
                all.collect::<Result<_>>()?
            },
        })
    }

    async fn find(&self, handle: &Handle) -> Result<LinkMessage> {
        let mut links = all_links(handle).await?.into_iter();
        let found = links.find(|l| has_mac(l, &self.mac));
        found.ok_or_else(|| NetworkError::NoDevice(format_mac(&self.mac)))
    }

    async fn apply(&self, handle: &Handle) -> Result<()> {
        let found = self.find(handle).await?;
        let index = found.header.index;
        if name_of(&found) != Some(self.name.as_str()) {
            let links = all_links(handle).await?;
            let named = links.iter().find(|l| name_of(l) == Some(&self.name));
            if let Some(other) = named {
                // Another interface, which gets its own name later.
                let spare = format!("spare{}", other.header.index);
                rename(handle, other.header.index, &spare).await?;
            }
            rename(handle, index, &self.name).await?;
        }
        if self.mtu > 0 {
            let change = LinkUnspec::new_with_index(index).mtu(self.mtu).build();
            let set = handle.link().set(change).execute().await;
            set.map_err(failed("set the MTU of", &self.name))?;
        }
        up(handle, index, &self.name).await?;
        for (address, prefix, is_connected) in &self.addresses {
            let mut request = handle.address().add(index, *address, *prefix).replace();
            let mut flags = AddressFlags::empty();
            if address.is_ipv6() {
                // The host's IPAM answers for uniqueness; detection would leave
                // the address unusable for a second.
                flags |= AddressFlags::Nodad;
            }
            if !is_connected {
                flags |= AddressFlags::Noprefixroute;
            }
            if !flags.is_empty() {
                let flags = AddressAttribute::Flags(flags);
                request.message_mut().attributes.push(flags);
            }
            let set = request.execute().await;
            set.map_err(failed("set an address of", &self.name))?;
        }
        Ok(())
    }
}

fn has_mac(link: &LinkMessage, mac: &[u8; 6]) -> bool {
    link.attributes
        .iter()
        .any(|a| matches!(a, LinkAttribute::Address(own) if own.as_slice() == mac))
}

/// A checked [`Route`].
#[derive(Debug)]
struct Path {
    text: String,
    destination: (IpAddr, u8),
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    interface: String,
    mtu: u32,
    metric: u32,
    scope: u8,
    onlink: bool,
}

impl Path {
    fn parse(route: &Route) -> Result<Self> {
        let destination = parse_cidr(&route.destination)?;
        let optional = |text: &str| {
            let address = (!text.is_empty()).then(|| parse_address(text));
            address.transpose()
        };
        let (gateway, source) = (optional(&route.gateway)?, optional(&route.source)?);
        let same = |a: &IpAddr| a.is_ipv4() == destination.0.is_ipv4();
        if !gateway.iter().chain(&source).all(same) {
            return Err(NetworkError::MixedFamilies(route.destination.clone()));
        }
        Ok(Self {
            text: route.destination.clone(),
            destination,
            gateway,
            source,
            interface: parse_name(&route.interface)?,
            mtu: route.mtu,
            metric: route.metric,
            scope: u8::try_from(route.scope).unwrap_or(0),
            onlink: route.onlink,
        })
    }

    async fn apply(&self, handle: &Handle) -> Result<()> {
        let index = index_of(handle, &self.interface).await?;
        let message = self.message(index);
        let add = handle.route().add(message).replace().execute().await;
        add.map_err(failed("add route", &self.text))
    }

    fn message(&self, index: u32) -> RouteMessage {
        let mut message = match self.destination {
            (IpAddr::V4(to), prefix) => {
                let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
                    .destination_prefix(to, prefix)
                    .output_interface(index);
                if let Some(IpAddr::V4(gateway)) = self.gateway {
                    builder = builder.gateway(gateway);
                }
                if let Some(IpAddr::V4(source)) = self.source {
                    builder = builder.pref_source(source);
                }
                builder.build()
            }
            (IpAddr::V6(to), prefix) => {
                let mut builder = RouteMessageBuilder::<Ipv6Addr>::new()
                    .destination_prefix(to, prefix)
                    .output_interface(index);
                if let Some(IpAddr::V6(gateway)) = self.gateway {
                    builder = builder.gateway(gateway);
                }
                if let Some(IpAddr::V6(source)) = self.source {
                    builder = builder.pref_source(source);
                }
                builder.build()
            }
        };
        message.header.scope = match (self.scope, self.gateway) {
            // The kernel wants the scope "link" for what has no gateway.
            (0, None) => RouteScope::Link,
            (scope, _) => RouteScope::from(scope),
        };
        if self.onlink {
            message.header.flags |= RouteFlags::Onlink;
        }
        if self.metric > 0 {
            message
                .attributes
                .push(RouteAttribute::Priority(self.metric));
        }
        if self.mtu > 0 {
            let metrics = vec![RouteMetric::Mtu(self.mtu)];
            message.attributes.push(RouteAttribute::Metrics(metrics));
        }
        message
    }
}

async fn add_neighbor(handle: &Handle, neighbor: &Neighbor) -> Result<()> {
    let address = parse_address(&neighbor.address)?;
    let mac = parse_mac(&neighbor.mac)?;
    let index = index_of(handle, &neighbor.interface).await?;
    handle
        .neighbours()
        .add(index, address)
        .link_layer_address(&mac)
        .replace()
        .execute()
        .await
        .map_err(failed("add neighbour", &neighbor.address))
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bad = || NetworkError::Mac(text.to_owned());
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        return Err(bad());
    }
    Ok(mac)
}

fn format_mac(mac: &[u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// Names as the kernel allows them (`dev_valid_name`).
fn parse_name(text: &str) -> Result<String> {
    let fits = (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"/:".contains(&b));
    if fits {
        Ok(text.to_owned())
    } else {
        Err(NetworkError::Name(text.to_owned()))
    }
}

fn parse_address(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| NetworkError::Address(text.to_owned()))
}

fn parse_cidr(text: &str) -> Result<(IpAddr, u8)> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= most).then_some((address, prefix))
    };
    parse().ok_or_else(|| NetworkError::Cidr(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_six_bytes_of_two_digits() {
        assert_eq!(
            parse_mac("02:00:00:aB:cd:0f").unwrap()[3..],
            [0xab, 0xcd, 0x0f]
        );
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "02:00:00:00:00:zz",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
        assert_eq!(format_mac(&[2, 0, 0, 1, 0, 255]), "02:00:00:01:00:ff");
    }

    #[test]
    fn prefixes_fit_their_family() {
        assert_eq!(
            parse_cidr("10.0.0.5/16").unwrap(),
            ("10.0.0.5".parse().unwrap(), 16)
        );
        assert_eq!(parse_cidr("::/0").unwrap().1, 0);
        for bad in [
            "10.0.0.5",
            "10.0.0.5/33",
            "fd00::/129",
            "x/8",
            "10.0.0.5/-1",
        ] {
            assert!(parse_cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_are_the_kernels() {
        assert!(parse_name("eth0").is_ok());
        for bad in ["", "..", "a/b", "a:b", "a b", "0123456789abcdef"] {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_gateway_is_of_the_routes_family() {
        let route = Route {
            destination: "0.0.0.0/0".to_owned(),
            gateway: "fe80::1".to_owned(),
            interface: "eth0".to_owned(),
            ..Route::default()
        };
        assert!(matches!(
            Path::parse(&route),
            Err(NetworkError::MixedFamilies(_))
        ));
    }

    #[test]
    fn a_route_without_gateway_has_link_scope() {
        let route = Route {
            destination: "10.1.0.0/24".to_owned(),
            interface: "eth0".to_owned(),
            ..Route::default()
        };
        let message = Path::parse(&route).unwrap().message(2);
        assert_eq!(message.header.scope, RouteScope::Link);
        let route = Route {
            gateway: "10.0.0.1".to_owned(),
            metric: 7,
            ..route
        };
        let message = Path::parse(&route).unwrap().message(2);
        assert_eq!(message.header.scope, RouteScope::Universe);
    }
}
