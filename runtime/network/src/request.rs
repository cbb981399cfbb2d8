//! What a pod asks of its network, and how plugins are told of it.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::guest::Dns;

/// Annotations that Kubernetes defines for bandwidth.
const INGRESS_BANDWIDTH: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS_BANDWIDTH: &str = "kubernetes.io/egress-bandwidth";
/// Annotation that asks for addresses, separated by commas.
const IPS: &str = "network.hull/ips";
/// Annotation that asks for a hardware address.
const MAC: &str = "network.hull/mac";

/// The bandwidths that Kubernetes accepts, in bits per second.
const BANDWIDTHS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;
/// The least burst in bits: a frame of any size fits.
const LEAST_BURST: u64 = 1 << 20;

/// The pod that a network is for.
#[derive(Debug, Clone, Default)]
pub struct PodNetworkRequest {
    /// The sandbox id.
    pub pod_id: String,
    /// Kubernetes namespace, name and uid of the pod (CNI_ARGS).
    pub namespace: String,
    /// See `namespace`.
    pub name: String,
    /// See `namespace`.
    pub uid: String,
    /// Host ports (capability `portMappings`).
    pub port_mappings: Vec<PortMapping>,
    /// Annotations of the pod: bandwidth, addresses, and all of them for plugins that declare
    /// `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
    /// Resolver settings (capability `dns`).
    pub dns: Dns,
    /// How many queues the VM's end of an interface is to have, if it can: one for each pair of queues
    /// of a card. 0 is 1.
    pub queues: u8,
}

/// A host port that leads to the pod (CNI capability `portMappings`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the host.
    pub host_port: u16,
    /// Host address; empty for all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "String::is_empty")]
    pub host_ip: String,
}

/// Why a request can't be passed on to plugins.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A value that would be read as another argument.
    #[error("{value:?} can't be passed to CNI plugins as {key}")]
    Argument {
        /// The argument.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// An annotation is not what it should be.
    #[error("annotation {key}: {value:?} is not {wanted}")]
    Annotation {
        /// Its key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// Nobody in the network would hear of it.
    #[error("no plugin of network {network} declares the capability {capability:?}")]
    NoCapability {
        /// The network.
        network: String,
        /// What was asked for.
        capability: &'static str,
    },
}

impl PodNetworkRequest {
    /// All that plugins may have if they declare the capability (CNI CONVENTIONS.md).
    pub(crate) fn capabilities(&self) -> Result<Map<String, Value>, RequestError> {
        let mut all = Map::new();
        if !self.port_mappings.is_empty() {
            all.insert("portMappings".into(), json!(self.port_mappings));
        }
        if let Some(bandwidth) = self.bandwidth()? {
            all.insert("bandwidth".into(), bandwidth);
        }
        if self.dns != Dns::default() {
            let dns = json!({
                "servers": self.dns.nameservers,
                "searches": self.dns.search,
                "options": self.dns.options,
            });
            all.insert("dns".into(), dns);
        }
        if let Some(ips) = self.ips()? {
            all.insert("ips".into(), json!(ips));
        }
        if let Some(mac) = self.annotations.get(MAC) {
            if !is_mac(mac) {
                return Err(wrong(MAC, mac, "the MAC address of one interface"));
            }
            all.insert("mac".into(), json!(mac));
        }
        if !self.annotations.is_empty() {
            let annotations = json!(self.annotations);
            all.insert("io.kubernetes.cri.pod-annotations".into(), annotations);
        }
        Ok(all)
    }

    fn bandwidth(&self) -> Result<Option<Value>, RequestError> {
        let mut limits = Map::new();
        let directions = [
            (INGRESS_BANDWIDTH, "ingressRate", "ingressBurst"),
            (EGRESS_BANDWIDTH, "egressRate", "egressBurst"),
        ];
        for (key, rate, burst) in directions {
            let Some(text) = self.annotations.get(key) else {
                continue;
            };
            let bits = quantity(text)
                .filter(|bits| BANDWIDTHS.contains(bits))
                .ok_or_else(|| wrong(key, text, "a bandwidth of 1k to 1P"))?;
            limits.insert(rate.into(), json!(bits));
            // What a second allows may come at once; the plugin takes no more than 32 bits.
            let most = bits.max(LEAST_BURST).min(u64::from(u32::MAX));
            limits.insert(burst.into(), json!(most));
        }
        Ok((!limits.is_empty()).then_some(Value::Object(limits)))
    }

    fn ips(&self) -> Result<Option<Vec<String>>, RequestError> {
        let Some(text) = self.annotations.get(IPS) else {
            return Ok(None);
        };
        let ips: Vec<String> = text.split(',').map(|ip| ip.trim().to_owned()).collect();
        if ips.iter().all(|ip| is_address(ip)) {
            Ok(Some(ips))
        } else {
            Err(wrong(IPS, text, "a list of addresses"))
        }
    }
}

fn wrong(key: &'static str, value: &str, wanted: &'static str) -> RequestError {
    RequestError::Annotation {
        key,
        value: value.to_owned(),
        wanted,
    }
}

/// An address with or without a prefix length.
fn is_address(text: &str) -> bool {
    let (ip, prefix) = text.split_once('/').unwrap_or((text, "0"));
    let Ok(ip) = ip.parse::<IpAddr>() else {
        return false;
    };
    let most = if ip.is_ipv4() { 32 } else { 128 };
    prefix.parse::<u8>().is_ok_and(|prefix| prefix <= most)
}

/// A MAC address of one interface, not of a group.
fn is_mac(text: &str) -> bool {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            let two = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            two.then(|| u8::from_str_radix(part, 16).ok())?
        })
        .collect();
    bytes.is_some_and(|mac| mac.len() == 6 && mac[0] & 1 == 0 && mac.iter().any(|b| *b != 0))
}

/// Reads a quantity of Kubernetes (`10M`, `1.5Gi`, `1e6`) as a whole number, rounded up.
fn quantity(text: &str) -> Option<u64> {
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let factor = match suffix {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => f64::from(1 << 10),
        "Mi" => f64::from(1 << 20),
        "Gi" => f64::from(1 << 30),
        "Ti" => (1_u64 << 40) as f64,
        "Pi" => (1_u64 << 50) as f64,
        "Ei" => (1_u64 << 60) as f64,
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            10_f64.powi(exponent.parse().ok()?)
        }
    };
    let value = (number.parse::<f64>().ok()? * factor).ceil();
    // Also refuses what is no number at all.
    (0.0..1e18).contains(&value).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(annotations: &[(&str, &str)]) -> Result<Map<String, Value>, RequestError> {
        let annotations = annotations.iter();
        PodNetworkRequest {
            annotations: annotations
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..PodNetworkRequest::default()
        }
        .capabilities()
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, value) in [
            ("10M", 10_000_000),
            ("1.5Ki", 1536),
            ("1e6", 1_000_000),
            ("2E3", 2000),
            ("7", 7),
            ("1500m", 2),
            ("1Gi", 1 << 30),
        ] {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for bad in [
            "", "M", "-1M", "1.2.3", "10Mbit", "1e", "9e99", "inf", "NaN", "1 M",
        ] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }

    #[test]
    fn bandwidth_comes_from_annotations() {
        let all = asks(&[(INGRESS_BANDWIDTH, "10M"), (EGRESS_BANDWIDTH, "100k")]).unwrap();
        assert_eq!(
            all["bandwidth"],
            json!({"ingressRate": 10_000_000, "ingressBurst": 10_000_000,
                   "egressRate": 100_000, "egressBurst": 1_048_576})
        );
        for bad in ["much", "10", "2P", ""] {
            let error = asks(&[(INGRESS_BANDWIDTH, bad)]).unwrap_err().to_string();
            assert!(error.contains(INGRESS_BANDWIDTH), "{error}");
        }
    }

    #[test]
    fn addresses_that_are_asked_for_are_checked() {
        let all = asks(&[(IPS, "10.0.0.9, fd00::9/64"), (MAC, "02:00:00:00:00:09")]).unwrap();
        assert_eq!(all["ips"], json!(["10.0.0.9", "fd00::9/64"]));
        assert_eq!(all["mac"], json!("02:00:00:00:00:09"));
        for (key, bad) in [
            (IPS, ""),
            (IPS, "10.0.0.300"),
            (IPS, "10.0.0.1/33"),
            (MAC, "01:00:00:00:00:01"),
            (MAC, "00:00:00:00:00:00"),
            (MAC, "02:00:00:00:00"),
            (MAC, "02:00:00:00:00:+1"),
        ] {
            assert!(asks(&[(key, bad)]).is_err(), "{key} {bad}");
        }
    }

    #[test]
    fn a_pod_that_asks_for_nothing_passes_nothing() {
        assert!(asks(&[]).unwrap().is_empty());
    }
}
