//! Reads what ADD returns (CNI spec section 5), in every version in use.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::guest::Dns;

/// Why an answer is not a result.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// No JSON object.
    #[error("CNI plugin {plugin} returned no JSON object")]
    NotJson {
        /// The plugin.
        plugin: String,
        /// Where it stops being one.
        source: Option<serde_json::Error>,
    },
    /// A field is not what the spec says.
    #[error("CNI result is malformed")]
    Malformed(#[from] serde_json::Error),
    /// An address is none.
    #[error("CNI result has an invalid address {0:?}")]
    Address(String),
}

/// The parts of a result that are ours to use; the rest is read from the namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddResult {
    /// Addresses of the pod, in the plugin's order.
    pub ips: Vec<IpAddr>,
    /// DNS settings.
    pub dns: Dns,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    ips: Vec<WireIp>,
    // Version 0.2 and below.
    ip4: Option<WireOldIp>,
    ip6: Option<WireOldIp>,
    #[serde(default)]
    dns: Dns,
}

#[derive(Deserialize)]
struct WireIp {
    address: String,
}

#[derive(Deserialize)]
struct WireOldIp {
    ip: String,
}

/// Takes a plugin's standard output as JSON, to be passed on as `prevResult`.
///
/// # Errors
/// [`ResultError::NotJson`].
pub fn parse(plugin: &str, output: &[u8]) -> Result<Value, ResultError> {
    match serde_json::from_slice::<Value>(output) {
        Ok(value) if value.is_object() => Ok(value),
        Ok(_) => Err(ResultError::NotJson {
            plugin: plugin.to_owned(),
            source: None,
        }),
        Err(source) => Err(ResultError::NotJson {
            plugin: plugin.to_owned(),
            source: Some(source),
        }),
    }
}

impl AddResult {
    /// Reads a result.
    ///
    /// # Errors
    /// When a field has the wrong type or an address is none.
    pub fn read(value: &Value) -> Result<Self, ResultError> {
        let wire = Wire::deserialize(value)?;
        let old = [wire.ip4, wire.ip6].into_iter().flatten().map(|o| o.ip);
        let ips = wire
            .ips
            .into_iter()
            .map(|ip| ip.address)
            .chain(old)
            .map(|text| {
                let address = text.split('/').next().unwrap_or_default();
                address
                    .parse()
                    .map_err(|_| ResultError::Address(text.clone()))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { ips, dns: wire.dns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_old_and_new_versions_are_read() {
        let new = br#"{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24","gateway":"10.0.0.1"},
            {"address":"fd00::2/64"}],"dns":{"nameservers":["10.0.0.53"]}}"#;
        let result = AddResult::read(&parse("bridge", new).unwrap()).unwrap();
        assert_eq!(result.ips.len(), 2);
        assert_eq!(result.dns.nameservers, ["10.0.0.53"]);
        let old = br#"{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/24"}}"#;
        let result = AddResult::read(&parse("bridge", old).unwrap()).unwrap();
        assert_eq!(result.ips, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn garbage_is_refused() {
        assert!(parse("p", b"").is_err());
        assert!(parse("p", b"[]").is_err());
        assert!(parse("p", b"hello").is_err());
        let bad = parse("p", br#"{"ips":[{"address":"300.1.1.1/8"}]}"#).unwrap();
        assert!(matches!(
            AddResult::read(&bad),
            Err(ResultError::Address(_))
        ));
        let half = parse("p", br#"{"ips":{}}"#).unwrap();
        assert!(matches!(
            AddResult::read(&half),
            Err(ResultError::Malformed(_))
        ));
    }
}
