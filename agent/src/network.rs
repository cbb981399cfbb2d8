//! The pod's network as the host describes it, set through netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use hull_proto_agent::agent as proto;
use nix::errno::Errno;
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags},
        link::{LinkAttribute, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop,
            RouteNextHopFlags, RouteScope, RouteType,
        },
        rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage, RulePortRange, RuleUidRange},
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
    #[error("{0} is no kind of route or rule")]
    Kind(u32),
    #[error("{0} is no weight of a next hop")]
    Weight(u32),
    #[error("{0} is no protocol above IP")]
    Protocol(u32),
    #[error("{0} to {1} is no range of ports or users")]
    Range(u32, u32),
    #[error("{action} {what}")]
    Netlink {
        action: &'static str,
        what: String,
        #[source]
        source: rtnetlink::Error,
    },
}

type Result<T> = std::result::Result<T, NetworkError>;

/// The network that the host wants this guest to have.
#[derive(Debug, Default)]
pub(crate) struct Network {
    links: Vec<Link>,
    routes: Vec<Path>,
    neighbors: Vec<Neighbor>,
    rules: Vec<Rule>,
}

impl Network {
    /// Checks what the host describes.
    pub(crate) fn parse(
        interfaces: &[proto::Interface],
        routes: &[proto::Route],
        neighbors: &[proto::Neighbor],
        rules: &[proto::Rule],
    ) -> Result<Self> {
        Ok(Self {
            links: interfaces.iter().map(Link::parse).collect::<Result<_>>()?,
            routes: routes.iter().map(Path::parse).collect::<Result<_>>()?,
            neighbors: neighbors
                .iter()
                .map(Neighbor::parse)
                .collect::<Result<_>>()?,
            rules: rules.iter().map(Rule::parse).collect::<Result<_>>()?,
        })
    }

    /// Sets up loopback, then links, addresses, routes, neighbours and rules; removes what was set
    /// for `before` and is not wanted any more. What others set stays.
    pub(crate) async fn apply(&self, before: &Self) -> Result<()> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
        let connection = tokio::spawn(connection);
        let result = self.change(&handle, before).await;
        connection.abort();
        result
    }

    async fn change(&self, handle: &Handle, before: &Self) -> Result<()> {
        up(handle, index_of(handle, "lo").await?, "lo").await?;
        self.set(handle, before).await?;
        // What is new is there before what is old goes, so that no packet finds neither.
        if self.remove_stale(handle, before).await? {
            // Routes may have gone with the address that they name as their source.
            self.set(handle, before).await?;
        }
        Ok(())
    }

    async fn set(&self, handle: &Handle, before: &Self) -> Result<()> {
        for link in &self.links {
            link.apply(handle, &before.links).await?;
        }
        // On-link routes first: a gateway must be reachable when it is named.
        let (direct, via): (Vec<_>, Vec<_>) = self.routes.iter().partition(|r| !r.has_gateway());
        for route in direct.into_iter().chain(via) {
            route.apply(handle).await?;
        }
        for neighbor in &self.neighbors {
            neighbor.apply(handle).await?;
        }
        for rule in &self.rules {
            rule.apply(handle).await?;
        }
        Ok(())
    }

    /// Returns whether an address was removed.
    async fn remove_stale(&self, handle: &Handle, before: &Self) -> Result<bool> {
        for rule in before.rules.iter().filter(|r| !self.rules.contains(r)) {
            rule.remove(handle).await?;
        }
        for route in &before.routes {
            // One with the same key was replaced.
            if !self.routes.iter().any(|new| new.key() == route.key()) {
                route.remove(handle).await?;
            }
        }
        for old in &before.neighbors {
            let mut new = self.neighbors.iter();
            if !new.any(|n| (&n.interface, n.address) == (&old.interface, old.address)) {
                old.remove(handle).await?;
            }
        }
        let mut is_removed = false;
        for old in &before.links {
            let new = self.links.iter().find(|link| link.name == old.name);
            is_removed |= old.remove_addresses(handle, new).await?;
        }
        Ok(is_removed)
    }

    /// Moves the interfaces to the network namespace of the process `pid`.
    pub(crate) async fn move_links(&self, pid: i32) -> Result<()> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
        let connection = tokio::spawn(connection);
        let result = async {
            for link in &self.links {
                let index = link.find(&handle, &[]).await?.header.index;
                let change = LinkUnspec::new_with_index(index)
                    .setns_by_pid(pid.unsigned_abs())
                    .build();
                let moved = handle.link().set(change).execute().await;
                moved.map_err(failed("move link", &link.name))?;
            }
            Ok(())
        }
        .await;
        connection.abort();
        result
    }
}

/// Brings the loopback interface up.
pub(crate) async fn loopback() -> Result<()> {
    Network::default().apply(&Network::default()).await
}

/// Makes it no failure that what is to be removed is gone already.
fn gone(
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

/// A checked [`proto::Interface`].
#[derive(Debug)]
struct Link {
    mac: [u8; 6],
    name: String,
    mtu: u32,
    /// Each with whether its network is on the link.
    addresses: Vec<(IpAddr, u8, bool)>,
}

impl Link {
    fn parse(interface: &proto::Interface) -> Result<Self> {
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

    /// Finds it by its address, or by its name when that is one of `known`, which had their names
    /// before.
    async fn find(&self, handle: &Handle, known: &[Self]) -> Result<LinkMessage> {
        let links = all_links(handle).await?;
        let is_known = known.iter().any(|link| link.name == self.name);
        let by_mac = links.iter().find(|l| has_mac(l, &self.mac));
        let by_name = || {
            let mut links = links.iter();
            links.find(|l| is_known && name_of(l) == Some(&self.name))
        };
        let found = by_mac.or_else(by_name).cloned();
        found.ok_or_else(|| NetworkError::NoDevice(format_mac(&self.mac)))
    }

    async fn apply(&self, handle: &Handle, known: &[Self]) -> Result<()> {
        let found = self.find(handle, known).await?;
        let index = found.header.index;
        if !has_mac(&found, &self.mac) {
            let change = LinkUnspec::new_with_index(index)
                .address(self.mac.to_vec())
                .build();
            let set = handle.link().set(change).execute().await;
            set.map_err(failed("set the MAC address of", &self.name))?;
        }
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

    /// Removes addresses that are not those of `new`, and takes the link down when there is none.
    /// Returns whether one was removed.
    async fn remove_addresses(&self, handle: &Handle, new: Option<&Self>) -> Result<bool> {
        let stale = self.addresses.iter().filter(|(address, prefix, _)| {
            let mut kept = new.iter().flat_map(|link| &link.addresses);
            !kept.any(|(kept, length, _)| (kept, length) == (address, prefix))
        });
        let stale: Vec<_> = stale.collect();
        if stale.is_empty() && new.is_some() {
            return Ok(false);
        }
        let index = match index_of(handle, &self.name).await {
            Err(NetworkError::NoInterface(_)) => return Ok(false),
            index => index?,
        };
        promote(&self.name);
        for (address, prefix, _) in &stale {
            let message = match address {
                IpAddr::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new()
                    .index(index)
                    .address(*v4, *prefix)
                    .build(),
                IpAddr::V6(v6) => AddressMessageBuilder::<Ipv6Addr>::new()
                    .index(index)
                    .address(*v6, *prefix)
                    .build(),
            };
            let removed = gone(handle.address().del(message).execute().await);
            removed.map_err(failed("remove an address of", &self.name))?;
        }
        if new.is_none() {
            let change = LinkUnspec::new_with_index(index).down().build();
            let set = handle.link().set(change).execute().await;
            set.map_err(failed("take down", &self.name))?;
        }
        Ok(!stale.is_empty())
    }
}

/// Lets the next address of a network take the place of the first when that goes; by itself, the
/// kernel would remove all of them, and with the last one every route of the interface. A failure
/// only leaves it so.
fn promote(interface: &str) {
    let path = format!("/proc/sys/net/ipv4/conf/{interface}/promote_secondaries");
    if let Err(error) = std::fs::write(&path, "1") {
        tracing::debug!(%error, path, "promote secondary addresses");
    }
}

fn has_mac(link: &LinkMessage, mac: &[u8; 6]) -> bool {
    link.attributes
        .iter()
        .any(|a| matches!(a, LinkAttribute::Address(own) if own.as_slice() == mac))
}

/// A checked [`proto::Route`].
#[derive(Debug)]
struct Path {
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
    fn parse(route: &proto::Route) -> Result<Self> {
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

    async fn apply(&self, handle: &Handle) -> Result<()> {
        let message = self.message(&self.indexes(handle).await?);
        let add = handle.route().add(message).replace().execute().await;
        add.map_err(failed("add route", &self.text))
    }

    async fn remove(&self, handle: &Handle) -> Result<()> {
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

    fn has_gateway(&self) -> bool {
        self.hops.iter().any(|hop| hop.gateway.is_some())
    }

    /// What tells it from another in the kernel's tables.
    fn key(&self) -> ((IpAddr, u8), u32, u32) {
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
    fn parse(hop: &proto::NextHop) -> Result<Self> {
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

/// A checked [`proto::Neighbor`].
#[derive(Debug)]
struct Neighbor {
    address: IpAddr,
    mac: [u8; 6],
    interface: String,
}

impl Neighbor {
    fn parse(neighbor: &proto::Neighbor) -> Result<Self> {
        Ok(Self {
            address: parse_address(&neighbor.address)?,
            mac: parse_mac(&neighbor.mac)?,
            interface: parse_name(&neighbor.interface)?,
        })
    }

    async fn apply(&self, handle: &Handle) -> Result<()> {
        let index = index_of(handle, &self.interface).await?;
        handle
            .neighbours()
            .add(index, self.address)
            .link_layer_address(&self.mac)
            .replace()
            .execute()
            .await
            .map_err(failed("add neighbour", &self.address.to_string()))
    }

    async fn remove(&self, handle: &Handle) -> Result<()> {
        let index = match index_of(handle, &self.interface).await {
            Err(NetworkError::NoInterface(_)) => return Ok(()),
            index => index?,
        };
        let mut message = NeighbourMessage::default();
        message.header.ifindex = index;
        let (family, address) = match self.address {
            IpAddr::V4(v4) => (AddressFamily::Inet, NeighbourAddress::Inet(v4)),
            IpAddr::V6(v6) => (AddressFamily::Inet6, NeighbourAddress::Inet6(v6)),
        };
        message.header.family = family;
        let destination = NeighbourAttribute::Destination(address);
        message.attributes.push(destination);
        let removed = gone(handle.neighbours().del(message).execute().await);
        removed.map_err(failed("remove neighbour", &self.address.to_string()))
    }
}

/// A checked [`proto::Rule`].
#[derive(Debug, PartialEq)]
struct Rule(RuleMessage);

impl Rule {
    fn parse(rule: &proto::Rule) -> Result<Self> {
        let mut message = RuleMessage::default();
        let header = &mut message.header;
        header.family = if rule.ipv6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        header.action = match u8::try_from(rule.action).map(RuleAction::from) {
            Ok(
                action @ (RuleAction::ToTable
                | RuleAction::Blackhole
                | RuleAction::Unreachable
                | RuleAction::Prohibit),
            ) => action,
            _ => return Err(NetworkError::Kind(rule.action)),
        };
        header.tos = u8::try_from(rule.tos).map_err(|_| NetworkError::Kind(rule.tos))?;
        if rule.invert {
            header.flags |= RuleFlags::Invert;
        }
        let prefix = |text: &str| {
            let some = (!text.is_empty()).then(|| parse_cidr(text)).transpose()?;
            match some {
                Some((address, _)) if address.is_ipv6() != rule.ipv6 => {
                    Err(NetworkError::MixedFamilies(text.to_owned()))
                }
                some => Ok(some),
            }
        };
        let attributes = &mut message.attributes;
        attributes.push(RuleAttribute::Priority(rule.priority));
        if let Some((address, length)) = prefix(&rule.source)? {
            header.src_len = length;
            attributes.push(RuleAttribute::Source(address));
        }
        if let Some((address, length)) = prefix(&rule.destination)? {
            header.dst_len = length;
            attributes.push(RuleAttribute::Destination(address));
        }
        if !rule.input.is_empty() {
            attributes.push(RuleAttribute::Iifname(parse_name(&rule.input)?));
        }
        if !rule.output.is_empty() {
            attributes.push(RuleAttribute::Oifname(parse_name(&rule.output)?));
        }
        if rule.mark > 0 || rule.mask > 0 {
            attributes.push(RuleAttribute::FwMark(rule.mark));
            attributes.push(RuleAttribute::FwMask(rule.mask));
        }
        if rule.table > 0 {
            attributes.push(RuleAttribute::Table(rule.table));
        }
        if let Some(length) = rule.suppress_prefix {
            attributes.push(RuleAttribute::SuppressPrefixLen(length));
        }
        if rule.protocol > 0 {
            let protocol = u8::try_from(rule.protocol);
            let protocol = protocol.map_err(|_| NetworkError::Protocol(rule.protocol))?;
            attributes.push(RuleAttribute::IpProtocol(protocol.into()));
        }
        if let Some(ports) = rule.source_ports.as_ref() {
            attributes.push(RuleAttribute::SourcePortRange(parse_ports(ports)?));
        }
        if let Some(ports) = rule.destination_ports.as_ref() {
            attributes.push(RuleAttribute::DestinationPortRange(parse_ports(ports)?));
        }
        if let Some(users) = rule.users.as_ref() {
            let (start, end) = (users.first, users.last);
            if start > end {
                return Err(NetworkError::Range(start, end));
            }
            attributes.push(RuleAttribute::UidRange(RuleUidRange { start, end }));
        }
        Ok(Self(message))
    }

    async fn apply(&self, handle: &Handle) -> Result<()> {
        let mut request = handle.rule().add();
        *request.message_mut() = self.0.clone();
        match request.execute().await {
            Err(rtnetlink::Error::NetlinkError(message))
                if message.raw_code() == -(Errno::EEXIST as i32) =>
            {
                Ok(())
            }
            result => result.map_err(failed("add rule", &self.text())),
        }
    }

    async fn remove(&self, handle: &Handle) -> Result<()> {
        let removed = gone(handle.rule().del(self.0.clone()).execute().await);
        removed.map_err(failed("remove rule", &self.text()))
    }

    fn text(&self) -> String {
        format!("{:?}", self.0.attributes)
    }
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

fn parse_optional(text: &str) -> Result<Option<IpAddr>> {
    let address = (!text.is_empty()).then(|| parse_address(text));
    address.transpose()
}

fn parse_ports(range: &proto::Range) -> Result<RulePortRange> {
    match (u16::try_from(range.first), u16::try_from(range.last)) {
        (Ok(start), Ok(end)) if (1..=end).contains(&start) => Ok(RulePortRange { start, end }),
        _ => Err(NetworkError::Range(range.first, range.last)),
    }
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

    #[test]
    fn rules_have_ranges_that_are_some() {
        let range = |first, last| proto::Range {
            first,
            last,
            ..proto::Range::default()
        };
        let rule = |ports: proto::Range, users: proto::Range| {
            Rule::parse(&proto::Rule {
                action: 1,
                table: 100,
                protocol: 17,
                destination_ports: Some(ports).into(),
                users: Some(users).into(),
                ..proto::Rule::default()
            })
        };
        let Rule(message) = rule(range(80, 90), range(0, u32::MAX)).unwrap();
        for attribute in [
            RuleAttribute::IpProtocol(17.into()),
            RuleAttribute::DestinationPortRange(RulePortRange { start: 80, end: 90 }),
            RuleAttribute::UidRange(RuleUidRange {
                start: 0,
                end: u32::MAX,
            }),
        ] {
            assert!(message.attributes.contains(&attribute), "{attribute:?}");
        }
        for bad in [(0, 5), (6, 5), (5, 65536)] {
            let rule = rule(range(bad.0, bad.1), range(0, 0));
            assert!(matches!(rule, Err(NetworkError::Range(..))), "{bad:?}");
        }
        let rule = rule(range(1, 1), range(2, 1));
        assert!(matches!(rule, Err(NetworkError::Range(2, 1))));
        let protocol = Rule::parse(&proto::Rule {
            action: 1,
            protocol: 256,
            ..proto::Rule::default()
        });
        assert!(matches!(protocol, Err(NetworkError::Protocol(256))));
    }
}
