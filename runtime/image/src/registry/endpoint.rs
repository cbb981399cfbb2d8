//! A server that may have the repository, and how its failures are told.

use std::time::Duration;

use reqwest::{Client, Response, Url};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::error::PullError;
use crate::shown;

use super::auth::Authorization;
use super::client::{CONNECT_TIMEOUT, describe};
use super::hosts::Host;
use super::tls;
use super::zone::{self, Zone, literal, proxies};

#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) host: Host,
    pub(super) client: Client,
    /// What the server let in last.
    pub(super) authorization: Mutex<Option<Authorization>>,
    /// Until when the server wants to be left alone.
    pub(super) busy_until: Mutex<Option<Instant>>,
}

impl Endpoint {
    pub(super) fn new(host: Host, client: Client) -> Self {
        Self {
            host,
            client,
            authorization: Mutex::new(None),
            busy_until: Mutex::new(None),
        }
    }

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

    /// Why `what` could not be fetched.
    pub(super) fn failed(&self, what: &str, error: &reqwest::Error) -> PullError {
        if error.is_timeout() {
            return self.too_slow(what, CONNECT_TIMEOUT);
        }
        if let Some(reason) = zone::out_of_reach(error) {
            let to = error.url().map(origin).unwrap_or_default();
            return self.misled(format!("{to}, {reason}"));
        }
        if let Some(reason) = tls::distrust(error) {
            return PullError::Untrusted {
                registry: self.host.shown(),
                reason,
            };
        }
        self.unavailable(what, describe(error))
    }

    pub(super) fn unavailable(&self, what: &str, message: String) -> PullError {
        PullError::RegistryUnavailable {
            what: what.to_owned(),
            registry: self.host.shown(),
            message,
        }
    }

    pub(super) fn too_slow(&self, what: &str, time: Duration) -> PullError {
        PullError::Timeout {
            what: what.to_owned(),
            registry: self.host.shown(),
            seconds: time.as_secs(),
        }
    }

    /// The server leads `to` where it may not.
    pub(super) fn misled(&self, to: String) -> PullError {
        PullError::Misled {
            registry: self.host.shown(),
            to,
        }
    }
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
