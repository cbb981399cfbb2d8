//! One request to its answer, over redirects. The client follows none by itself: at each step it
//! is decided here whether that address may be gone to, and what it is shown.
//!
//! | another origin than the first | |
//! |---|---|
//! | credentials and configured headers | are never sent, also not to the first one later on |
//! | http after https | only where `hosts.toml` names the origin so |
//! | an address that the registry's kind may not lead to (`zone`) | only where `hosts.toml` names it |
//! | its text | is not quoted |

use reqwest::header::LOCATION;
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};

use crate::pull::PullError;
use crate::shown;

use super::hosts::{self, Host};
use super::zone::{OutOfReach, Zone, literal, proxies};
use super::{Endpoint, Registry};

/// Most redirects on the way to one answer.
const MAX_REDIRECTS: usize = 5;

/// What a request came to.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// Nobody else was asked than the first origin.
    pub(super) own: bool,
    /// The origin that answered, for messages.
    pub(super) from: String,
}

/// Where a request goes.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) client: Client,
    pub(super) url: Url,
}

impl Registry {
    /// Sends a request where `way` says and then where the answers lead. `request` makes it; its
    /// last argument is whether it may carry what is for the first origin alone.
    pub(super) async fn follow(
        &self,
        endpoint: &Endpoint,
        what: &str,
        mut way: Way,
        zone: Option<Zone>,
        request: impl Fn(&Way, bool) -> RequestBuilder,
    ) -> Result<Answer, PullError> {
        let (first, mut zone) = (way.url.origin(), zone);
        let mut own = true;
        for _ in 0..=MAX_REDIRECTS {
            let sent = request(&way, own).send();
            let response = self.timely(endpoint, what, sent).await?;
            let location = match response.headers().get(LOCATION) {
                Some(location) if is_redirect(response.status()) => location,
                _ => {
                    return Ok(Answer {
                        response,
                        own,
                        from: origin(&way.url),
                    });
                }
            };
            let here = *zone.get_or_insert_with(|| endpoint.zone(&response));
            let next = location
                .to_str()
                .ok()
                .and_then(|text| way.url.join(text).ok());
            let next = next.ok_or_else(|| refused(endpoint, "an address that is none".into()))?;
            own &= next.origin() == first;
            way = self.way(endpoint, here, Some(&way.url), next)?;
        }
        Err(refused(endpoint, "one address after the other".into()))
    }

    /// How to go to an address that a registry at `here` named, at `before` or in a challenge.
    pub(super) fn way(
        &self,
        endpoint: &Endpoint,
        here: Zone,
        before: Option<&Url>,
        mut url: Url,
    ) -> Result<Way, PullError> {
        let refuse = |reason: &str| refused(endpoint, format!("{}, {reason}", origin(&url)));
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
            client.map_err(|message| self.no_client(endpoint, message))?
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
                    .is_some_and(|host| proxies().iter().any(|p| p == host)) =>
                {
                    return Err(refuse("which is this node's proxy"));
                }
                _ => {}
            }
            let client = self.clients.elsewhere(&endpoint.host.tls, &url, here);
            client.map_err(|message| self.no_client(endpoint, message))?
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

    fn no_client(&self, endpoint: &Endpoint, message: String) -> PullError {
        PullError::RegistryUnavailable {
            what: self.name.full(),
            registry: endpoint.host.shown(),
            message,
        }
    }
}

impl Endpoint {
    /// Where the registry is, as its answer shows. Behind a proxy that is not known, and then it
    /// counts as public.
    pub(super) fn zone(&self, answer: &Response) -> Zone {
        if let Some(address) = literal(&self.host.base) {
            return Zone::of(address);
        }
        match answer.remote_addr() {
            Some(address) if self.host.is_loopback() || proxies().is_empty() => {
                Zone::of(address.ip())
            }
            _ => Zone::Public,
        }
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Scheme, host and port, for messages.
pub(super) fn origin(url: &Url) -> String {
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    let host = url.host_str().unwrap_or_default();
    shown::line(&format!("{}://{host}{port}", url.scheme()), 100)
}

pub(super) fn refused(endpoint: &Endpoint, to: String) -> PullError {
    PullError::Misled {
        registry: endpoint.host.shown(),
        to,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::reference::Name;
    use crate::store::{Limits, Registries};

    fn registry(name: &str, registries: &Registries) -> Registry {
        let name = Name::parse(name).unwrap();
        Registry::open(&name, None, registries, &Limits::default(), &Arc::default()).unwrap()
    }

    fn way(registry: &Registry, here: Zone, url: &str) -> Result<Way, PullError> {
        let url = Url::parse(url).unwrap();
        registry.way(&registry.endpoints[0], here, None, url)
    }

    #[test]
    fn https_stays_https_and_addresses_stay_out_of_reach() {
        let hub = registry("busybox", &Registries::default());
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
        let plain = registry("localhost:5000/x", &Registries::default());
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
        let quay = registry("quay.io/x", &registries);
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
