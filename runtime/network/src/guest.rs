//! What the guest is told about its network: plain values, in the terms of the
//! agent's `Configure` call.

use serde::{Deserialize, Serialize};

/// Links, routes and neighbours of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// Network interfaces.
    pub interfaces: Vec<GuestInterface>,
    /// Routes, in an order in which each can be added.
    pub routes: Vec<GuestRoute>,
    /// Permanent neighbour entries.
    pub neighbors: Vec<GuestNeighbor>,
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
    /// Interface in the guest.
    pub interface: String,
    /// MTU of the route; 0 for none.
    pub mtu: u32,
    /// Priority; 0 for none.
    pub metric: u32,
    /// `rtm_scope` (rtnetlink(7)): 0 universe, 253 link.
    pub scope: u32,
    /// The gateway counts as on the link, whatever other routes say.
    pub onlink: bool,
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
