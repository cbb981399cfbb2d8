//! Which protocol a client gets.

use hyper::{
    HeaderMap,
    header::{CONNECTION, HeaderName, SEC_WEBSOCKET_PROTOCOL, UPGRADE},
};

use crate::websocket::Codec;

/// What SPDY calls itself in `Upgrade`.
pub(crate) const SPDY: &str = "SPDY/3.1";
/// The subprotocols that a SPDY client can speak, in its order of preference.
pub(crate) const STREAM_PROTOCOL: &str = "x-stream-protocol-version";
/// The subprotocols that the server can speak, when it can't speak any of the client's.
pub(crate) const ACCEPTED_PROTOCOLS: &str = "x-accepted-stream-protocol-versions";
/// Port-forward over SPDY.
pub(crate) const PORT_FORWARD: &str = "portforward.k8s.io";
/// The same in a WebSocket.
pub(crate) const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// How exec and attach tell their end, and whether terminals can be resized (SPDY).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RemoteCommand {
    /// The name on the wire.
    pub(crate) name: &'static str,
    /// A JSON status, also for success; else plain text of a failure.
    pub(crate) json_status: bool,
    /// There is a stream of sizes.
    pub(crate) resize: bool,
}

/// What exec and attach speak over SPDY.
pub(crate) const SPDY_COMMANDS: [RemoteCommand; 4] = [
    remote_command("v4.channel.k8s.io", true, true),
    remote_command("v3.channel.k8s.io", false, true),
    remote_command("v2.channel.k8s.io", false, false),
    remote_command("channel.k8s.io", false, false),
];

const fn remote_command(name: &'static str, json_status: bool, resize: bool) -> RemoteCommand {
    RemoteCommand {
        name,
        json_status,
        resize,
    }
}

/// A WebSocket subprotocol with channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChannelProtocol {
    /// The name on the wire.
    pub(crate) name: &'static str,
    /// How messages are written.
    pub(crate) codec: Codec,
    /// A JSON status, also for success; else plain text of a failure.
    pub(crate) json_status: bool,
}

/// What exec and attach speak over a WebSocket. A client that names none gets the one without a
/// name.
pub(crate) const CHANNELS: [ChannelProtocol; 6] = [
    channels("v5.channel.k8s.io", false, true, true),
    channels("v4.channel.k8s.io", false, false, true),
    channels("v4.base64.channel.k8s.io", true, false, true),
    channels("channel.k8s.io", false, false, false),
    channels("base64.channel.k8s.io", true, false, false),
    channels("", false, false, false),
];

const fn channels(
    name: &'static str,
    base64: bool,
    close_signal: bool,
    json_status: bool,
) -> ChannelProtocol {
    ChannelProtocol {
        name,
        codec: Codec {
            base64,
            close_signal,
        },
        json_status,
    }
}

/// The values of a header that may be repeated and hold several, separated by commas.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let all = headers.get_all(name).into_iter();
    let texts = all.filter_map(|value| value.to_str().ok());
    let parts = texts.flat_map(|text| text.split(','));
    parts.map(str::trim).filter(|value| !value.is_empty())
}

/// Whether these headers ask for this upgrade.
pub(crate) fn wants_upgrade(headers: &HeaderMap, protocol: &str) -> bool {
    values(headers, &CONNECTION).any(|value| value.eq_ignore_ascii_case("upgrade"))
        && values(headers, &UPGRADE).any(|value| value.eq_ignore_ascii_case(protocol))
}

/// The subprotocols that a SPDY client offers.
pub(crate) fn offered_streams(headers: &HeaderMap) -> Vec<&str> {
    values(headers, &HeaderName::from_static(STREAM_PROTOCOL)).collect()
}

/// The subprotocols that a WebSocket client offers; the empty one when it offers none.
pub(crate) fn offered_channels(headers: &HeaderMap) -> Vec<&str> {
    let offered: Vec<&str> = values(headers, &SEC_WEBSOCKET_PROTOCOL).collect();
    if offered.is_empty() {
        return vec![""];
    }
    offered
}

/// The first of the client's protocols that the server knows.
pub(crate) fn choose<P: Copy>(
    offered: &[&str],
    known: &[P],
    name: impl Fn(&P) -> &'static str,
) -> Option<P> {
    let find = |offer: &&str| known.iter().find(|protocol| name(protocol) == *offer);
    offered.iter().find_map(find).copied()
}

/// What port-forward speaks over a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ForwardProtocol {
    /// SPDY in messages.
    Tunnel,
    /// Two channels per port.
    Channels(ChannelProtocol),
}

impl ForwardProtocol {
    /// All of them; v5 came too late for channels.
    pub(crate) fn known() -> Vec<Self> {
        let channels = CHANNELS.into_iter().filter(|p| !p.codec.close_signal);
        [Self::Tunnel]
            .into_iter()
            .chain(channels.map(Self::Channels))
            .collect()
    }

    /// The name on the wire.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Tunnel => TUNNEL,
            Self::Channels(protocol) => protocol.name,
        }
    }
}

#[cfg(test)]
mod tests {
    use hyper::HeaderMap;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn the_clients_first_known_protocol_is_taken() {
        let headers = headers(&[
            (STREAM_PROTOCOL, "v5.channel.k8s.io, v4.channel.k8s.io"),
            (STREAM_PROTOCOL, "v3.channel.k8s.io"),
        ]);
        let offered = offered_streams(&headers);
        let chosen = choose(&offered, &SPDY_COMMANDS, |p| p.name).unwrap();
        assert_eq!(chosen.name, "v4.channel.k8s.io");
        assert_eq!(choose(&["v9"], &SPDY_COMMANDS, |p| p.name), None);
    }

    #[test]
    fn a_websocket_client_that_offers_nothing_gets_the_nameless_protocol() {
        let none = headers(&[]);
        let offered = offered_channels(&none);
        let chosen = choose(&offered, &CHANNELS, |p| p.name).unwrap();
        assert_eq!((chosen.name, chosen.codec.base64), ("", false));
    }

    #[test]
    fn port_forward_has_no_v5() {
        let known = ForwardProtocol::known();
        let choose = |offer| choose(&[offer], &known, ForwardProtocol::name);
        assert_eq!(choose(TUNNEL), Some(ForwardProtocol::Tunnel));
        assert_eq!(choose("v5.channel.k8s.io"), None);
        assert!(choose("v4.channel.k8s.io").is_some());
    }

    #[test]
    fn an_upgrade_is_found_among_other_values_in_any_case() {
        let both = headers(&[
            ("connection", "keep-alive, UPGRADE"),
            ("upgrade", "spdy/3.1"),
        ]);
        assert!(wants_upgrade(&both, SPDY));
        assert!(!wants_upgrade(&both, "websocket"));
        assert!(!wants_upgrade(&headers(&[("upgrade", "SPDY/3.1")]), SPDY));
    }
}
