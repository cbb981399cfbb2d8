//! The table `[streaming]`.

use std::{net::SocketAddr, path::PathBuf};

use hull_streaming::{Config, TlsFiles};
use serde::Deserialize;

use super::error::{ConfigError, absolute, invalid};

/// The table as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct StreamingTable {
    address: Option<SocketAddr>,
    advertise: Option<String>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    allow_plaintext: bool,
}

impl StreamingTable {
    pub(super) fn check(self) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        if let Some(address) = self.address {
            config.address = address;
        }
        if let Some(host) = self.advertise {
            if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/') {
                let reason = "it must be a host name or address, with or without a port";
                return Err(invalid("streaming.advertise", reason));
            }
            config.advertise = Some(host);
        }
        config.tls = match (self.tls_cert, self.tls_key) {
            (Some(cert), Some(key)) => Some(TlsFiles {
                cert: absolute("streaming.tls_cert", cert)?,
                key: absolute("streaming.tls_key", key)?,
            }),
            (None, None) => None,
            (Some(_), None) => {
                return Err(invalid("streaming.tls_key", "it is needed with tls_cert"));
            }
            (None, Some(_)) => {
                return Err(invalid("streaming.tls_cert", "it is needed with tls_key"));
            }
        };
        // A token in a URL is all that keeps others out, and so is what they type and read.
        let elsewhere = !config.address.ip().to_canonical().is_loopback();
        if elsewhere && config.tls.is_none() && !self.allow_plaintext {
            let reason = format!(
                "{} is reached from other hosts, and without TLS they read tokens and streams: \
                 listen on 127.0.0.1, or set tls_cert and tls_key, or else allow_plaintext = true",
                config.address
            );
            return Err(invalid("streaming.address", &reason));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Config, String> {
        let table: StreamingTable = toml::from_str(text).map_err(|error| error.to_string())?;
        table.check().map_err(|error| error.to_string())
    }

    #[test]
    fn by_default_it_listens_on_loopback_without_tls() {
        let config = check("").unwrap();
        assert_eq!(config.address.to_string(), "127.0.0.1:0");
        assert!(config.tls.is_none() && config.advertise.is_none());
    }

    #[test]
    fn all_keys_are_understood() {
        let text = "address = '[::1]:99'\nadvertise = 'node:5'\ntls_cert = '/c'\ntls_key = '/k'";
        let config = check(text).unwrap();
        assert_eq!(config.address.to_string(), "[::1]:99");
        assert_eq!(config.advertise.as_deref(), Some("node:5"));
        let tls = config.tls.unwrap();
        assert_eq!((tls.cert, tls.key), ("/c".into(), "/k".into()));
    }

    #[test]
    fn other_hosts_need_tls_unless_it_is_said_that_they_do_not() {
        for address in [
            "0.0.0.0:0",
            "[::]:99",
            "10.0.0.5:10250",
            "[::ffff:10.0.0.5]:1",
        ] {
            let bare = format!("address = '{address}'");
            let refused = check(&bare).unwrap_err();
            assert!(refused.starts_with("streaming.address: "), "{refused}");
            assert!(refused.contains("allow_plaintext"), "{refused}");
            check(&format!("{bare}\ntls_cert = '/c'\ntls_key = '/k'")).unwrap();
            check(&format!("{bare}\nallow_plaintext = true")).unwrap();
        }
        for address in [
            "127.0.0.1:0",
            "127.8.0.1:5",
            "[::1]:0",
            "[::ffff:127.0.0.1]:1",
        ] {
            check(&format!("address = '{address}'")).unwrap();
        }
    }

    #[test]
    fn bad_values_are_named() {
        let refused = |text| check(text).unwrap_err();
        assert!(refused("address = 'localhost'").contains("address"));
        assert!(refused("advertise = 'http://x'").starts_with("streaming.advertise: "));
        assert!(refused("tls_cert = '/c'").starts_with("streaming.tls_key: "));
        assert!(refused("tls_key = '/k'").starts_with("streaming.tls_cert: "));
    }
}
