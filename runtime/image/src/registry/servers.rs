//! The servers that may have one repository, and where they may lead this node.

use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, Url};

use crate::config::{Limits, Registries};
use crate::error::PullError;
use crate::reference::Name;

use super::client::HttpClients;
use super::endpoint::{Endpoint, origin};
use super::hosts::{self, Host};
use super::zone::{OutOfReach, Zone, literal, proxies};

#[derive(Debug)]
pub(super) struct Servers {
    pub(super) name: Name,
    /// In the order to ask them.
    pub(super) endpoints: Vec<Endpoint>,
    /// Whether the administrator named these servers.
    from_file: bool,
    registries: Registries,
    clients: Arc<HttpClients>,
    /// Longest time in which nothing comes.
    pub(super) no_progress: Duration,
}

/// Where a request goes.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) client: Client,
    pub(super) url: Url,
}

impl Servers {
    /// Reads the configuration; nothing is sent yet.
    pub(super) fn open(
        name: &Name,
        registries: &Registries,
        limits: &Limits,
        clients: &Arc<HttpClients>,
    ) -> Result<Self, PullError> {
        let mut endpoints = Vec::new();
        let (hosts, from_file) = hosts::hosts_for(name.registry(), registries)?;
        for host in hosts {
            let client = clients
                .get(&host)
                .map_err(|message| PullError::RegistryUnavailable {
                    what: name.full(),
                    registry: host.shown(),
                    message,
                })?;
            endpoints.push(Endpoint::new(host, client));
        }
        Ok(Self {
            name: name.clone(),
            endpoints,
            from_file,
            registries: registries.clone(),
            clients: Arc::clone(clients),
            no_progress: limits.no_progress,
        })
    }

    /// How to go to an address that a registry at `here` named, at `before` or in a challenge.
    pub(super) fn way(
        &self,
        endpoint: &Endpoint,
        here: Zone,
        before: Option<&Url>,
        mut url: Url,
    ) -> Result<Way, PullError> {
        let refuse = |reason: &str| endpoint.misled(format!("{}, {reason}", origin(&url)));
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(refuse("which is not reached by http or https"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse("with credentials"));
        }
        let base = &endpoint.host.base;
        let known = if url.origin() == base.origin() {
            Some(endpoint.client.clone())
        } else {
            let host = self.configured(&url)?;
            let client = host.map(|host| self.clients.get(&host)).transpose();
            client.map_err(|message| endpoint.unavailable(&self.name.full(), message))?
        };
        let client = if let Some(client) = known {
            client
        } else {
            let secure = |url: &Url| url.scheme() == "https";
            if !secure(&url) && (secure(base) || before.is_some_and(secure)) {
                return Err(refuse("which is not reached by https"));
            }
            match literal(&url).map(Zone::of) {
                Some(there) if !here.leads_to(there) => {
                    return Err(refuse(&OutOfReach { here, there }.to_string()));
                }
                None if url
                    .host_str()
                    .is_some_and(|host| proxies().iter().any(|p| p.host_str() == Some(host))) =>
                {
                    return Err(refuse("which is this node's proxy"));
                }
                _ => {}
            }
            let client = self.clients.elsewhere(&endpoint.host.tls, &url, here);
            client.map_err(|message| endpoint.unavailable(&self.name.full(), message))?
        };
        url.set_fragment(None);
        Ok(Way { client, url })
    }

    /// The host with this URL's origin that the administrator has configured, for this registry or
    /// by a file of its own.
    fn configured(&self, url: &Url) -> Result<Option<Host>, PullError> {
        let is_it = |host: &Host| host.base.origin() == url.origin();
        if let Some(endpoint) = self.endpoints.iter().find(|e| is_it(&e.host)) {
            return Ok(self.from_file.then(|| endpoint.host.clone()));
        }
        let hosts = hosts::of_file(&hosts::authority(url), &self.registries)?;
        Ok(hosts.into_iter().flatten().find(is_it))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;

    fn servers(name: &str, registries: &Registries) -> Servers {
        let name = Name::parse(name).unwrap();
        Servers::open(&name, registries, &Limits::default(), &Arc::default()).unwrap()
    }

    fn way(servers: &Servers, here: Zone, url: &str) -> Result<Way, PullError> {
        let url = Url::parse(url).unwrap();
        servers.way(&servers.endpoints[0], here, None, url)
    }

    #[test]
    fn https_stays_https_and_addresses_stay_out_of_reach() {
        let hub = servers("busybox", &Registries::default());
        for (url, may) in [
            ("https://auth.docker.io/token", true),
            ("https://1.1.1.1/", true),
            ("http://auth.docker.io/token", false),
            ("https://10.0.0.1/", false),
            ("https://127.0.0.1:10250/", false),
            ("https://[::1]/", false),
            ("https://169.254.169.254/", false),
            ("https://user@auth.docker.io/", false),
            ("ftp://auth.docker.io/", false),
            ("data:x", false),
        ] {
            let way = way(&hub, Zone::Public, url);
            assert_eq!(way.is_ok(), may, "{url}: {way:?}");
        }
        let plain = servers("localhost:5000/x", &Registries::default());
        let first = Url::parse("https://a.example/").unwrap();
        let then = Url::parse("http://b.example/").unwrap();
        let endpoint = &plain.endpoints[0];
        assert!(
            plain
                .way(endpoint, Zone::Public, None, then.clone())
                .is_ok()
        );
        let after = plain.way(endpoint, Zone::Public, Some(&first), then);
        assert!(matches!(after, Err(PullError::Misled { .. })), "{after:?}");
    }

    #[test]
    fn what_is_configured_may_be_gone_to() {
        let root = tempfile::tempdir().unwrap();
        let registries = Registries {
            config_dir: Some(root.path().to_owned()),
        };
        for (directory, text) in [
            (
                "quay.io",
                "server = 'https://quay.io'\n[host.'http://10.0.0.1:5000']",
            ),
            ("10.0.0.2", "server = 'http://10.0.0.2'"),
            ("_default", "server = 'http://10.0.0.3'"),
        ] {
            std::fs::create_dir(root.path().join(directory)).unwrap();
            std::fs::write(root.path().join(directory).join("hosts.toml"), text).unwrap();
        }
        let quay = servers("quay.io/x", &registries);
        for (url, may) in [
            ("http://10.0.0.1:5000/token", true),
            ("http://10.0.0.2/token", true),
            ("http://10.0.0.3/token", false),
            ("https://10.0.0.2/token", false),
            ("http://10.0.0.1/token", false),
        ] {
            assert_eq!(way(&quay, Zone::Public, url).is_ok(), may, "{url}");
        }
    }
}
