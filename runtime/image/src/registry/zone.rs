//! Where a registry may lead this node: who names an image chooses the registry, and a registry
//! names addresses (redirects, token servers) that the daemon, as the node, can reach and its
//! author cannot.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};

use hull_base::blocking;
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Kinds of addresses, by who can reach them (RFC 6890, IANA's special-purpose registries).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Zone {
    /// Anyone.
    Public,
    /// A site: RFC 1918, unique local, carrier-grade NAT.
    Private,
    /// This node.
    Loopback,
    /// A link, a cloud's services for its machines, no one host.
    Special,
}

impl Zone {
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let octets = address.octets();
        match octets {
            // Linux takes "this network" for the host itself.
            [0, ..] | [127, ..] => Self::Loopback,
            [169, 254, ..] | [224..=255, ..] => Self::Special,
            // Metadata and machine services: Oracle's, Alibaba's, Azure's.
            [192, 0, 0, _] | [100, 100, 100, 200] | [168, 63, 129, 16] => Self::Special,
            [100, 64..=127, ..] | [198, 18..=19, ..] => Self::Private,
            _ if address.is_private() => Self::Private,
            _ => Self::Public,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        let segments = address.segments();
        let embedded = |high: u16, low: u16| {
            let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
            Self::of_v4(Ipv4Addr::new(a, b, c, d))
        };
        match segments {
            [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Self::Loopback,
            // Mapped, compatible, translated (RFC 6052, RFC 8215) and 6to4: as the address inside.
            [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => embedded(high, low),
            [0, 0, 0, 0, 0xffff, 0, high, low] => embedded(high, low),
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
            [0x64, 0xff9b, 1, ..] => Self::Special,
            [0x2002, high, low, ..] => embedded(high, low),
            // Amazon's and Google's metadata.
            [0xfd00, 0xec2, ..] | [0xfd20, 0xce, ..] => Self::Special,
            [0xfe80..=0xfebf, ..] | [0xff00..=0xffff, ..] => Self::Special,
            [0xfec0..=0xfeff, ..] | [0xfc00..=0xfdff, ..] => Self::Private,
            _ => Self::Public,
        }
    }

    /// Whether a registry here may lead to an address there. It can reach its own kind itself; what
    /// is special needs the administrator's word.
    pub(super) fn leads_to(self, there: Self) -> bool {
        match there {
            Self::Public => true,
            Self::Private => matches!(self, Self::Private | Self::Loopback),
            Self::Loopback => self == Self::Loopback,
            Self::Special => false,
        }
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "a public address",
            Self::Private => "a private address",
            Self::Loopback => "a loopback address",
            Self::Special => "an address for machines alone",
        })
    }
}

/// The address in a URL that has one in place of a name.
pub(super) fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.trim_start_matches('[')
        .trim_end_matches(']')
        .parse()
        .ok()
}

/// No address of a name may be gone to.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("it is {there}, and the registry is at {here}")]
pub(super) struct OutOfReach {
    pub(super) here: Zone,
    pub(super) there: Zone,
}

/// Whether this, or what caused it, is that an address is out of reach.
pub(super) fn out_of_reach(error: &(dyn Error + 'static)) -> Option<OutOfReach> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(refused) = error.downcast_ref::<OutOfReach>() {
            return Some(*refused);
        }
        next = error.source();
    }
    None
}

/// Resolves names to the addresses that a registry may lead to. What is resolved here is what is
/// connected to: a name that means another address a moment later gains nothing.
#[derive(Debug)]
pub(super) struct Within {
    pub(super) zone: Zone,
    /// Hosts that the administrator's environment names.
    pub(super) proxies: Vec<String>,
}

impl Resolve for Within {
    fn resolve(&self, name: Name) -> Resolving {
        let here = self.zone;
        let is_proxy = self.proxies.iter().any(|proxy| proxy == name.as_str());
        Box::pin(async move {
            let name = name.as_str().to_owned();
            let resolve = move || -> io::Result<Vec<SocketAddr>> {
                Ok((name.as_str(), 0).to_socket_addrs()?.collect())
            };
            let mut addresses = blocking(resolve).await?;
            let mut refused = None;
            addresses.retain(|address| {
                let there = Zone::of(address.ip());
                let may = is_proxy || here.leads_to(there);
                if !may {
                    refused = Some(OutOfReach { here, there });
                }
                may
            });
            match refused {
                Some(refused) if addresses.is_empty() => Err(refused.into()),
                _ => Ok(Box::new(addresses.into_iter()) as Addrs),
            }
        })
    }
}

/// The proxies that the environment names.
pub(super) fn proxies() -> Vec<Url> {
    let names = ["http_proxy", "https_proxy", "all_proxy"];
    let both = names
        .iter()
        .flat_map(|name| [(*name).to_owned(), name.to_uppercase()]);
    both.filter_map(|name| std::env::var(name).ok())
        .filter_map(|text| {
            let with_scheme = if text.contains("://") {
                text
            } else {
                format!("http://{text}")
            };
            Url::parse(&with_scheme).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_the_zone_of_who_can_reach_them() {
        for (zone, addresses) in [
            (
                Zone::Public,
                "1.1.1.1 172.32.0.1 2606:4700::1111 ::ffff:1.1.1.1 64:ff9b::101:101",
            ),
            (
                Zone::Private,
                "10.0.0.1 172.16.0.1 192.168.9.9 100.64.0.1 fd12::1 ::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1::1 fec0::1",
            ),
            (
                Zone::Loopback,
                "127.0.0.1 127.9.9.9 0.0.0.0 :: ::1 ::ffff:127.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::1",
            ),
            (
                Zone::Special,
                "169.254.169.254 169.254.1.1 100.100.100.200 192.0.0.192 168.63.129.16 255.255.255.255 \
                 224.0.0.1 fe80::1 ff02::1 fd00:ec2::254 fd20:ce::254 ::ffff:169.254.169.254 64:ff9b:1::1",
            ),
        ] {
            for address in addresses.split_whitespace() {
                assert_eq!(Zone::of(address.parse().unwrap()), zone, "{address}");
            }
        }
    }

    #[test]
    fn a_registry_leads_where_it_is_itself() {
        use Zone::{Loopback, Private, Public, Special};
        let zones = [Public, Private, Loopback, Special];
        for (here, expected) in [
            (Public, vec![Public]),
            (Private, vec![Public, Private]),
            (Loopback, vec![Public, Private, Loopback]),
            (Special, vec![Public]),
        ] {
            let leads: Vec<_> = zones
                .into_iter()
                .filter(|there| here.leads_to(*there))
                .collect();
            assert_eq!(leads, expected, "{here:?}");
        }
    }

    #[test]
    fn addresses_in_urls_are_found_however_they_are_written() {
        for url in [
            "http://127.0.0.1/",
            "http://[::1]:8/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://[::ffff:7f00:1]/",
        ] {
            let address = literal(&Url::parse(url).unwrap()).unwrap();
            assert_eq!(Zone::of(address), Zone::Loopback, "{url}");
        }
        assert_eq!(literal(&Url::parse("http://localhost/").unwrap()), None);
    }

    #[tokio::test]
    async fn a_name_means_only_what_may_be_gone_to() {
        let resolve = |zone, proxies: &[&str]| {
            let within = Within {
                zone,
                proxies: proxies.iter().map(|&name| name.to_owned()).collect(),
            };
            within.resolve("localhost".parse().unwrap())
        };
        for zone in [Zone::Public, Zone::Private] {
            let error = resolve(zone, &[]).await.err().unwrap();
            assert!(out_of_reach(&*error).is_some(), "{error}");
        }
        assert!(resolve(Zone::Loopback, &[]).await.unwrap().count() > 0);
        assert!(resolve(Zone::Public, &["localhost"]).await.is_ok());
    }
}
