//! The pod's network as the host describes it, set through netlink.

mod error;
mod link;
mod neighbor;
mod netlink;
mod parse;
mod route;
mod rule;

use hull_proto_agent::agent as proto;
use rtnetlink::{Handle, LinkUnspec};

pub(crate) use self::error::NetworkError;
use self::{
    error::Result,
    link::Link,
    neighbor::Neighbor,
    netlink::{failed, index_of, up},
    route::Path,
    rule::Rule,
};

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
