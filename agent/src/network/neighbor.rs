//! Neighbours.

use std::net::IpAddr;

use hull_proto_agent::agent as proto;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    },
};

use super::error::{NetworkError, Result};
use super::netlink::{failed, gone, index_of};
use super::parse::{parse_address, parse_mac, parse_name};

/// A checked [`proto::Neighbor`].
#[derive(Debug)]
pub(super) struct Neighbor {
    pub(super) address: IpAddr,
    mac: [u8; 6],
    pub(super) interface: String,
}

impl Neighbor {
    pub(super) fn parse(neighbor: &proto::Neighbor) -> Result<Self> {
        Ok(Self {
            address: parse_address(&neighbor.address)?,
            mac: parse_mac(&neighbor.mac)?,
            interface: parse_name(&neighbor.interface)?,
        })
    }

    pub(super) async fn apply(&self, handle: &Handle) -> Result<()> {
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

    pub(super) async fn remove(&self, handle: &Handle) -> Result<()> {
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
