//! What can go wrong with the network.

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

pub(super) type Result<T> = std::result::Result<T, NetworkError>;
