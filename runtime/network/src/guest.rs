//! What the guest is told about its network: plain values, in the terms of the
//! agent's `Configure` call.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Links, routes and neighbours of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// Network interfaces, the pod's own first.
    pub interfaces: Vec<GuestInterface>,
    /// Routes, in an order in which each can be added.
    pub routes: Vec<GuestRoute>,
    /// Permanent neighbour entries.
    pub neighbors: Vec<GuestNeighbor>,
    /// Rules that choose a routing table, beyond those that every kernel has.
    #[serde(default)]
    pub rules: Vec<GuestRule>,
    /// What the namespace has besides, in words: guests can't be told of it.
    #[serde(default)]
    pub unsupported: Vec<String>,
    /// Interfaces that are there and up, but lead into no guest: they came later. By name.
    #[serde(default)]
    pub unjoined: Vec<String>,
    /// Interfaces that led into the guest and are gone. By name.
    #[serde(default)]
    pub missing: Vec<String>,
}

impl GuestNetwork {
    /// Returns the addresses of the pod's own interface, without their prefix lengths.
    #[must_use]
    pub fn ips(&self) -> Vec<IpAddr> {
        let own = self.interfaces.first().into_iter();
        own.flat_map(|i| i.addresses.iter().chain(&i.lone_addresses))
            .filter_map(|a| a.split('/').next()?.parse().ok())
            .collect()
    }
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// Hardware address, `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Name in the guest, `eth0`.
    pub name: String,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Addresses with prefix length, `10.88.0.5/16`.
    pub addresses: Vec<String>,
    /// Addresses whose network is not on the link: no route comes with them.
    pub lone_addresses: Vec<String>,
}

/// One route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRoute {
    /// Destination in CIDR form; `0.0.0.0/0` or `::/0` for the default route.
    pub destination: String,
    /// Next hop; empty when on-link.
    pub gateway: String,
    /// Preferred source address; may be empty.
    pub source: String,
    /// Interface in the guest; empty for a route that leads nowhere or has several next hops.
    pub interface: String,
    /// Several next hops, which share the traffic; then `gateway` and `interface` are empty.
    #[serde(default)]
    pub next_hops: Vec<GuestNextHop>,
    /// MTU of the route; 0 for none.
    pub mtu: u32,
    /// Priority; 0 for none.
    pub metric: u32,
    /// `rtm_scope` (rtnetlink(7)): 0 universe, 253 link.
    pub scope: u32,
    /// The gateway counts as on the link, whatever other routes say.
    pub onlink: bool,
    /// Its table; 0 for the main one.
    #[serde(default)]
    pub table: u32,
    /// `rtm_type` of a route that leads nowhere (6 blackhole, 7 unreachable, 8 prohibit, 9 throw), else 0.
    #[serde(default)]
    pub kind: u32,
}

impl GuestRoute {
    /// Tells whether another route must lead to its gateway first.
    #[must_use]
    pub fn has_gateway(&self) -> bool {
        !self.gateway.is_empty() || self.next_hops.iter().any(|hop| !hop.gateway.is_empty())
    }
}

/// One of several next hops of a route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNextHop {
    /// Gateway; empty when on-link.
    pub gateway: String,
    /// Interface in the guest.
    pub interface: String,
    /// Its share of the traffic, 1 to 256.
    pub weight: u32,
    /// The gateway counts as on the link, whatever other routes say.
    pub onlink: bool,
}

/// One rule of policy routing (`ip rule`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRule {
    /// Of IPv6, else of IPv4.
    pub ipv6: bool,
    /// Its place among the rules.
    pub priority: u32,
    /// It is for what none of the following fits.
    pub invert: bool,
    /// Source in CIDR form; empty for any.
    pub source: String,
    /// Destination in CIDR form; empty for any.
    pub destination: String,
    /// Incoming interface, `lo` for what the pod sends itself; empty for any.
    pub input: String,
    /// Interface that a socket is bound to; empty for any.
    pub output: String,
    /// Type of service; 0 for any.
    pub tos: u32,
    /// The packet's mark in the bits of `mask`; both 0 for any.
    pub mark: u32,
    /// See `mark`.
    pub mask: u32,
    /// What is done (`FR_ACT_*`): 1 looks into `table`; 6, 7 and 8 as `kind` of a route.
    pub action: u32,
    /// The table.
    pub table: u32,
    /// Routes of the table with prefixes of at most this length do not count.
    pub suppress_prefix: Option<u32>,
    /// Protocol above IP (`IPPROTO_*`); 0 for any.
    #[serde(default)]
    pub protocol: u32,
    /// Source ports; none for any.
    #[serde(default)]
    pub source_ports: Option<GuestRange>,
    /// Destination ports; none for any.
    #[serde(default)]
    pub destination_ports: Option<GuestRange>,
    /// Users whose sockets send; none for any.
    #[serde(default)]
    pub users: Option<GuestRange>,
}

/// Numbers from the first to the last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRange {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
}

/// One permanent neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNeighbor {
    /// IP address.
    pub address: String,
    /// Hardware address.
    pub mac: String,
    /// Interface in the guest.
    pub interface: String,
}

/// DNS settings that CNI returned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    #[serde(default)]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(default)]
    pub domain: String,
    /// Search list.
    #[serde(default)]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default)]
    pub options: Vec<String>,
}
