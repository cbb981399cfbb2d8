//! HTTP clients, one per way of TLS, kept for the life of the store.

use std::collections::HashMap;
use std::error::Error;
use std::iter;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use error_reporter::Report;
use reqwest::{Client, ClientBuilder, Identity, Url, redirect};

use crate::shown;

use super::hosts::{self, Host, Tls};
use super::tls::client_config;
use super::zone::{Within, Zone, proxies};

/// A server that does not accept a connection for this long is not there.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Clients that were made so far.
#[derive(Debug, Default)]
pub(crate) struct HttpClients {
    known: Mutex<HashMap<Kind, Client>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    tls: Tls,
    secure: bool,
    loopback: bool,
    /// Where the registry is that led here; none for those that the administrator or an image's
    /// name names.
    led_from: Option<Zone>,
}

impl HttpClients {
    /// A client for a host; the error is for a message.
    pub(crate) fn get(&self, host: &Host) -> Result<Client, String> {
        self.of_kind(Kind {
            tls: host.tls.clone(),
            secure: host.base.scheme() == "https",
            loopback: host.is_loopback(),
            led_from: None,
        })
    }

    /// A client for a URL that a registry names, itself with this configuration and in this zone.
    /// Only its authorities are trusted there too.
    pub(super) fn elsewhere(&self, tls: &Tls, url: &Url, zone: Zone) -> Result<Client, String> {
        self.of_kind(Kind {
            tls: Tls {
                authorities: tls.authorities.clone(),
                ..Tls::default()
            },
            secure: url.scheme() == "https",
            loopback: url.host_str().is_some_and(hosts::is_loopback),
            led_from: Some(zone),
        })
    }

    fn of_kind(&self, kind: Kind) -> Result<Client, String> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = known.get(&kind) {
            return Ok(client.clone());
        }
        let client = kind.build()?;
        known.insert(kind, client.clone());
        Ok(client)
    }
}

impl Kind {
    fn build(&self) -> Result<Client, String> {
        // Fails when a provider was installed already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        self.builder()?.build().map_err(|e| describe(&e))
    }

    /// Whether TLS is spoken, with the registry or with a proxy on the way to it.
    fn speaks_tls(&self) -> bool {
        let proxied = || proxies().iter().any(|proxy| proxy.scheme() == "https");
        self.secure || (!self.loopback && proxied())
    }

    fn builder(&self) -> Result<ClientBuilder, String> {
        let mut builder = Client::builder()
            .user_agent(concat!("hull/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(redirect::Policy::none());
        if let Some(zone) = self.led_from {
            let proxies = proxies()
                .iter()
                .filter_map(|proxy| Some(proxy.host_str()?.to_owned()))
                .collect();
            builder = builder.dns_resolver(Arc::new(Within { zone, proxies }));
        }
        if self.speaks_tls() {
            builder = self.with_tls(builder)?;
        } else {
            // The system's authorities are hundreds of files, and a host may have none.
            builder = builder.tls_certs_only([]);
        }
        // Go programs never send loopback traffic through a proxy, and users rely on it.
        if self.loopback {
            builder = builder.no_proxy();
        }
        Ok(builder)
    }

    fn with_tls(&self, builder: ClientBuilder) -> Result<ClientBuilder, String> {
        let tls = &self.tls;
        if !tls.authorities.is_empty() && !tls.skip_verify {
            return Ok(builder.tls_backend_preconfigured(client_config(tls)?));
        }
        let builder = builder.tls_danger_accept_invalid_certs(tls.skip_verify);
        match &tls.client {
            Some(pem) => Ok(builder.identity(Identity::from_pem(pem).map_err(|e| describe(&e))?)),
            None => Ok(builder),
        }
    }
}

/// The causes of the error, without its own text: that is the address, which the message has anyway.
pub(super) fn describe(error: &reqwest::Error) -> String {
    if is_turned_away(error) {
        return "it ended the connection before a request was sent; where it wants a certificate of its \
                clients, name that as `client` in hosts.toml"
            .into();
    }
    let text = match error.source() {
        Some(cause) => Report::new(cause).to_string(),
        None => error.to_string(),
    };
    shown::line(&text, 300)
}

/// Whether the connection was made and ended before it was used. A server of TLS 1.3 that wants a certificate
/// does so, and its alert is lost when it comes before the request is written.
fn is_turned_away(error: &(dyn Error + 'static)) -> bool {
    iter::successors(Some(error), |&error| error.source())
        .filter_map(|error| error.downcast_ref::<hyper::Error>())
        .any(hyper::Error::is_canceled)
}

#[cfg(test)]
mod tests {
    use http_body_util::Empty;
    use hyper::Request;
    use hyper::client::conn::http1::handshake;
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_ended_unused_is_known() {
        let (ours, _theirs) = tokio::io::duplex(1);
        let (mut sender, connection) = handshake(TokioIo::new(ours)).await.unwrap();
        drop(connection);
        let request = Request::new(Empty::<&[u8]>::new());
        let error = sender.send_request(request).await.unwrap_err();
        assert!(is_turned_away(&error));
    }

    #[tokio::test]
    async fn a_connection_that_ended_in_an_answer_is_another() {
        let (ours, theirs) = tokio::io::duplex(100);
        let (mut sender, connection) = handshake(TokioIo::new(ours)).await.unwrap();
        let request = Request::new(Empty::<&[u8]>::new());
        let ended = async {
            let mut theirs = theirs;
            theirs.read_u8().await.unwrap();
        };
        let (answer, _, ()) = tokio::join!(sender.send_request(request), connection, ended);
        assert!(!is_turned_away(&answer.unwrap_err()));
    }
}
