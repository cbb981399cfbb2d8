//! Interfaces and their addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_proto_agent::agent as proto;
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkUnspec,
    packet_route::{
        address::{AddressAttribute, AddressFlags},
        link::{LinkAttribute, LinkMessage},
    },
};

use super::error::{NetworkError, Result};
use super::netlink::{all_links, failed, gone, index_of, name_of, rename, up};
use super::parse::{format_mac, parse_cidr, parse_mac, parse_name};

/// A checked [`proto::Interface`].
#[derive(Debug)]
pub(super) struct Link {
    mac: [u8; 6],
    pub(super) name: String,
    mtu: u32,
    /// Each with whether its network is on the link.
    addresses: Vec<(IpAddr, u8, bool)>,
}

impl Link {
    pub(super) fn parse(interface: &proto::Interface) -> Result<Self> {
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
    pub(super) async fn find(&self, handle: &Handle, known: &[Self]) -> Result<LinkMessage> {
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

    pub(super) async fn apply(&self, handle: &Handle, known: &[Self]) -> Result<()> {
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
    pub(super) async fn remove_addresses(
        &self,
        handle: &Handle,
        new: Option<&Self>,
    ) -> Result<bool> {
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
