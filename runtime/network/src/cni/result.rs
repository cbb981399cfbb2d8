//! Reads what ADD returns (CNI spec section 5), in every version in use.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{exec::excerpt, version::SpecVersion};
use crate::guest::Dns;

/// Why an answer is not a result.
#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    /// No JSON object.
    #[error("CNI plugin {plugin} returned no JSON object, but {answer:?}")]
    NotJson {
        /// The plugin.
        plugin: String,
        /// The beginning of its answer.
        answer: String,
        /// Where it stops being one.
        source: Option<serde_json::Error>,
    },
    /// It is of a version that was not asked for.
    #[error("CNI plugin {plugin} returned a result of version {found:?}, not {wanted}")]
    Version {
        /// The plugin.
        plugin: String,
        /// What it says.
        found: String,
        /// What was asked for.
        wanted: SpecVersion,
    },
    /// A field is not what the spec says.
    #[error("CNI plugin {plugin} returned a malformed result")]
    Malformed {
        /// The plugin.
        plugin: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// An address is none.
    #[error("CNI plugin {plugin} returned an invalid address {address:?}")]
    Address {
        /// The plugin.
        plugin: String,
        /// The address.
        address: String,
    },
    /// An address is on an interface that is not listed.
    #[error("CNI plugin {plugin} returned an address on interface {index}, which it does not list")]
    Interface {
        /// The plugin.
        plugin: String,
        /// The interface's place in the list.
        index: i64,
    },
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
    // Since 0.3.0; before 1.0.0 each address says its version too.
    #[serde(default)]
    interfaces: Option<Vec<WireInterface>>,
    #[serde(default)]
    ips: Option<Vec<WireIp>>,
    // Version 0.2 and below.
    ip4: Option<WireOldIp>,
    ip6: Option<WireOldIp>,
    #[serde(default)]
    dns: Option<Dns>,
}

#[derive(Deserialize)]
struct WireInterface {
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct WireIp {
    address: String,
    interface: Option<i64>,
}

#[derive(Deserialize)]
struct WireOldIp {
    ip: String,
}

/// Takes a plugin's standard output: as JSON, to be passed on as `prevResult`, and as the parts
/// that are ours to use.
///
/// # Errors
/// When it is no result of the version asked for.
pub fn parse(
    plugin: &str,
    version: SpecVersion,
    output: &[u8],
) -> Result<(Value, AddResult), ResultError> {
    let not_json = |source| ResultError::NotJson {
        plugin: plugin.to_owned(),
        answer: excerpt(output),
        source,
    };
    let mut value: Value = serde_json::from_slice(output).map_err(|e| not_json(Some(e)))?;
    let Some(map) = value.as_object_mut() else {
        return Err(not_json(None));
    };
    match map.get("cniVersion") {
        // Old plugins do not say it, and the next one wants to know.
        None => {
            map.insert("cniVersion".into(), json!(version));
        }
        Some(found) if is_alike(found, version) => {
            map.insert("cniVersion".into(), json!(version));
        }
        Some(found) => {
            let found = found
                .as_str()
                .map_or_else(|| found.to_string(), str::to_owned);
            return Err(ResultError::Version {
                plugin: plugin.to_owned(),
                found: excerpt(found.as_bytes()),
                wanted: version,
            });
        }
    }
    let result = read(plugin, &value)?;
    Ok((value, result))
}

/// Whether a result that says this version can be read as one of `wanted`: some plugins say one
/// version whatever they are asked for, and since 0.3.0 fields were only added or dropped.
fn is_alike(found: &Value, wanted: SpecVersion) -> bool {
    let found = found.as_str().and_then(|text| text.parse().ok());
    found.is_some_and(|found: SpecVersion| {
        (found >= SpecVersion::V0_3_0) == (wanted >= SpecVersion::V0_3_0)
    })
}

fn read(plugin: &str, value: &Value) -> Result<AddResult, ResultError> {
    let wire = Wire::deserialize(value).map_err(|source| ResultError::Malformed {
        plugin: plugin.to_owned(),
        source,
    })?;
    let interfaces = wire.interfaces.unwrap_or_default();
    let mut texts = Vec::new();
    for ip in wire.ips.unwrap_or_default() {
        let Some(index) = ip.interface else {
            texts.push(ip.address);
            continue;
        };
        let at = usize::try_from(index).ok().and_then(|i| interfaces.get(i));
        let Some(interface) = at else {
            return Err(ResultError::Interface {
                plugin: plugin.to_owned(),
                index,
            });
        };
        // One without a sandbox is the host's, like a bridge.
        if !interface.sandbox.is_empty() {
            texts.push(ip.address);
        }
    }
    texts.extend([wire.ip4, wire.ip6].into_iter().flatten().map(|o| o.ip));
    let mut ips = Vec::new();
    for text in texts {
        let address = text.split('/').next().unwrap_or_default();
        match address.parse() {
            Ok(ip) if ips.contains(&ip) => {}
            Ok(ip) => ips.push(ip),
            Err(_) => {
                return Err(ResultError::Address {
                    plugin: plugin.to_owned(),
                    address: excerpt(text.as_bytes()),
                });
            }
        }
    }
    let dns = wire.dns.unwrap_or_default();
    Ok(AddResult { ips, dns })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(version: SpecVersion, text: &str) -> Result<Vec<String>, ResultError> {
        let (_, result) = parse("p", version, text.as_bytes())?;
        Ok(result.ips.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn results_of_all_versions_are_read() {
        for version in [SpecVersion::V0_1_0, SpecVersion::V0_2_0] {
            let text = r#"{"cniVersion":"V","ip4":{"ip":"10.0.0.2/24","gateway":"10.0.0.1",
                "routes":[{"dst":"0.0.0.0/0"}]},"ip6":{"ip":"fd00::2/64"},"dns":{}}"#;
            let text = text.replace('V', version.as_str());
            assert_eq!(ips(version, &text).unwrap(), ["10.0.0.2", "fd00::2"]);
        }
        for version in &SpecVersion::ALL[2..] {
            let text = r#"{"cniVersion":"V","interfaces":[{"name":"br0","mac":"02:00:00:00:00:01"},
                {"name":"eth0","sandbox":"/run/netns/x","mtu":1400,"socketPath":"/x","pciID":"1"}],
                "ips":[{"version":"4","interface":1,"address":"10.0.0.2/24","gateway":"10.0.0.1"},
                       {"version":"6","interface":1,"address":"fd00::2/64"},
                       {"interface":0,"address":"10.0.0.1/24"}],
                "routes":[{"dst":"0.0.0.0/0","gw":"10.0.0.1","mtu":1400,"table":100}],
                "dns":{"nameservers":["10.0.0.53"],"domain":"a","search":["b"],"options":["c"]}}"#;
            let text = text.replace('V', version.as_str());
            assert_eq!(ips(*version, &text).unwrap(), ["10.0.0.2", "fd00::2"]);
            let (_, result) = parse("p", *version, text.as_bytes()).unwrap();
            assert_eq!(result.dns.nameservers, ["10.0.0.53"]);
        }
    }

    #[test]
    fn a_result_without_addresses_or_version_is_one() {
        let version = SpecVersion::V1_0_0;
        let (value, result) = parse("p", version, br#"{"ips":null,"dns":null}"#).unwrap();
        assert_eq!(result, AddResult::default());
        // The next plugin wants to know.
        assert_eq!(value["cniVersion"], "1.0.0");
        let (value, _) = parse("p", version, br#"{"cniVersion":"0.4.0"}"#).unwrap();
        assert_eq!(value["cniVersion"], "1.0.0");
    }

    #[test]
    fn garbage_is_refused_in_plain_words() {
        let bad = |text: &str| ips(SpecVersion::V1_0_0, text).unwrap_err().to_string();
        assert!(bad("").contains("no JSON"));
        assert!(bad("[]").contains("no JSON"));
        assert!(bad("hello there").contains("hello there"));
        assert!(bad(r#"{"ips":[{"address":"10.0.0.2/24"}"#).contains("no JSON"));
        assert!(bad(r#"{"cniVersion":"0.2.0"}"#).contains("0.2.0"));
        assert!(bad(r#"{"cniVersion":7}"#).contains('7'));
        assert!(bad(r#"{"ips":[{"address":"300.1.1.1/8"}]}"#).contains("300.1.1.1"));
        assert!(bad(r#"{"ips":{}}"#).contains("malformed"));
        assert!(bad(r#"{"ips":[{}]}"#).contains("malformed"));
        assert!(
            bad(r#"{"ips":[{"address":"10.0.0.2/24","interface":1}]}"#).contains("interface 1")
        );
        assert!(bad(r#"{"ips":[{"address":"10.0.0.2/24","interface":-1}]}"#).contains("-1"));
    }
}
