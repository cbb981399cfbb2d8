//! What is spoken with registries (OCI distribution-spec 1.1, "Pull"): manifests and blobs, from
//! the first of the configured servers that has them.
//!
//! Written on an HTTP client rather than taken from `oci-client`: bodies of manifests are bounded
//! here, refusals keep their reason, and paths, headers and tokens follow `hosts.toml` and CRI.

pub(crate) mod auth;
mod body;
pub(crate) mod client;
mod endpoint;
mod follow;
pub(crate) mod hosts;
mod request;
mod retry;
mod servers;
mod tls;
mod token;
mod zone;

use std::collections::HashSet;
use std::sync::Arc;

use backon::{BackoffBuilder, Retryable};
use bytes::Bytes;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE};
use reqwest::{Response, StatusCode, Url};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::config::{Limits, Registries};
use crate::digest::Digest;
use crate::error::PullError;
use crate::layer::source::Chunk;
use crate::manifest::types::MANIFEST_TYPES;
use crate::manifest::{Descriptor, Document};
use crate::reference::{Name, Target};

use auth::Auth;
use body::Body;
use client::HttpClients;
use endpoint::Endpoint;
use hosts::Host;
use request::Request;
use servers::Servers;

/// Largest manifest or index, bytes: what other runtimes and registries agree on.
const MAX_MANIFEST: u64 = 4 << 20;
/// A connection that brought this many bytes before it broke off is not counted as a failure.
const WORTHWHILE: u64 = 1 << 20;

/// The servers that may have one repository, and the caller's right to it.
#[derive(Debug)]
pub(crate) struct Registry {
    servers: Servers,
    auth: Option<Auth>,
    retries: u32,
}

impl Registry {
    /// Reads the configuration; nothing is sent yet.
    pub(crate) fn open(
        name: &Name,
        auth: Option<Auth>,
        registries: &Registries,
        limits: &Limits,
        clients: &Arc<HttpClients>,
    ) -> Result<Self, PullError> {
        Ok(Self {
            servers: Servers::open(name, registries, limits, clients)?,
            auth,
            retries: limits.retries,
        })
    }

    /// Asks the registry itself, none of its mirrors, whether it lets this caller in.
    pub(crate) async fn log_in(&self) -> Result<(), PullError> {
        let what = "its version";
        let may = |host: &Host| !host.mirror;
        self.first(what, may, |endpoint| async move {
            let request = Request {
                what,
                path: None,
                accept: None,
                range: None,
            };
            self.send(endpoint, &request).await.map(drop)
        })
        .await
    }

    /// Fetches what the name points at.
    pub(crate) async fn resolve(&self) -> Result<Document, PullError> {
        match self.servers.name.target() {
            Target::Digest(digest) => self.manifest(digest).await,
            Target::Tag(tag) => {
                let may = |host: &Host| host.resolve;
                self.first(&self.servers.name.full(), may, |endpoint| {
                    self.document(endpoint, tag, None)
                })
                .await
            }
        }
    }

    /// Fetches the manifest with a digest.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<Document, PullError> {
        self.first(
            &self.servers.name.with_digest(digest),
            |host| host.pull,
            |endpoint| self.document(endpoint, digest.as_str(), Some(digest)),
        )
        .await
    }

    /// Fetches a small blob whole.
    pub(crate) async fn small_blob(
        &self,
        blob: &Descriptor,
        limit: u64,
    ) -> Result<Bytes, PullError> {
        let what = format!("blob {}", blob.digest);
        if blob.size > limit {
            return Err(PullError::TooLarge {
                what,
                limit,
                unit: "bytes",
            });
        }
        self.first(
            &what,
            |host| host.pull,
            |endpoint| {
                let what = what.clone();
                async move {
                    let response = self.get_blob(endpoint, &blob.digest, 0).await?;
                    let bytes = self.body(endpoint, &what, response).whole(limit).await?;
                    blob.digest.verify(&what, &bytes)?;
                    Ok(bytes)
                }
            },
        )
        .await
    }

    /// Asks for the first byte of a blob. Returns the base address of the server that lets this
    /// caller have it.
    pub(crate) async fn may_read(&self, blob: &Digest) -> Result<String, PullError> {
        let what = format!("blob {blob}");
        let path = format!("blobs/{blob}");
        self.first(
            &what,
            |host| host.pull,
            |endpoint| {
                let (what, path) = (&what, &path);
                async move {
                    let request = Request {
                        what,
                        path: Some(path),
                        accept: None,
                        range: Some((0, Some(0))),
                    };
                    let response = self.send(endpoint, &request).await?;
                    if response.status() == StatusCode::PARTIAL_CONTENT {
                        // To its end, so that the connection can be used again.
                        let _ = self.body(endpoint, what, response).whole(1).await;
                    }
                    Ok(endpoint.host.base.to_string())
                }
            },
        )
        .await
    }

    /// Sends a blob's bytes down a channel, from where it broke off when it breaks off. The
    /// receiver verifies them. Returns the base address of the server that sent all of it, if one
    /// did. Ends early without error when the receiver is gone.
    pub(crate) async fn blob(
        &self,
        blob: &Descriptor,
        chunks: &mpsc::Sender<Chunk>,
        mut received: impl FnMut(u64),
    ) -> Result<Option<String>, PullError> {
        let what = format!("blob {}", blob.digest);
        let mut sent = 0;
        let mut broke_off = false;
        let mut delays = retry::policy(self.retries).build();
        let mut servers = HashSet::new();
        let one = |servers: HashSet<&Url>| match servers.len() {
            1 => servers.into_iter().next().map(Url::to_string),
            _ => None,
        };
        loop {
            if broke_off && sent >= blob.size {
                let _ = chunks.send(Chunk::End).await;
                return Ok(one(servers));
            }
            let before = sent;
            let result = self
                .first(
                    &what,
                    |host| host.pull,
                    |endpoint| async move {
                        let response = self.get_blob(endpoint, &blob.digest, sent).await?;
                        Ok((endpoint, response))
                    },
                )
                .await;
            let broken = match result {
                Ok((endpoint, response)) => {
                    servers.insert(&endpoint.host.base);
                    let transfer = Transfer {
                        what: &what,
                        sent: &mut sent,
                        received: &mut received,
                    };
                    self.stream(endpoint, response, chunks, transfer).await
                }
                Err(e) => Err(e),
            };
            let error = match broken {
                Ok(()) => {
                    // The receiver may be gone already, having failed for its own reasons.
                    let _ = chunks.send(Chunk::End).await;
                    return Ok(one(servers));
                }
                Err(error) => error,
            };
            if sent - before >= WORTHWHILE {
                delays = retry::policy(self.retries).build();
            }
            let retryable = matches!(error, PullError::RegistryUnavailable { .. });
            let Some(delay) = retryable.then(|| delays.next()).flatten() else {
                return Err(error);
            };
            warn!(%what, sent, %error, "transfer broke off; going on from there");
            tokio::time::sleep(delay).await;
            broke_off = true;
        }
    }

    async fn stream(
        &self,
        endpoint: &Endpoint,
        response: Response,
        chunks: &mpsc::Sender<Chunk>,
        transfer: Transfer<'_, impl FnMut(u64)>,
    ) -> Result<(), PullError> {
        // A server that does not do ranges starts again from the first byte.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            if let Some(range) = response.headers().get(CONTENT_RANGE)
                && retry::range_start(range) != Some(*transfer.sent)
            {
                let message = "answered with another range than asked for".into();
                return Err(endpoint.unavailable(transfer.what, message));
            }
            0
        } else {
            *transfer.sent
        };
        let mut body = self.body(endpoint, transfer.what, response);
        while let Some(mut bytes) = body.chunk().await? {
            if skip > 0 {
                let known = usize::try_from(skip).unwrap_or(usize::MAX).min(bytes.len());
                let _ = bytes.split_to(known);
                skip -= known as u64;
            }
            if bytes.is_empty() {
                continue;
            }
            let length = bytes.len() as u64;
            if chunks.send(Chunk::Data(bytes)).await.is_err() {
                return Ok(());
            }
            *transfer.sent += length;
            (transfer.received)(length);
        }
        Ok(())
    }

    async fn document(
        &self,
        endpoint: &Endpoint,
        target: &str,
        expected: Option<&Digest>,
    ) -> Result<Document, PullError> {
        let what = format!("manifest {target} of {}", self.servers.name.repository());
        let path = format!("manifests/{target}");
        let request = Request {
            what: &what,
            path: Some(&path),
            accept: Some(MANIFEST_TYPES),
            range: None,
        };
        let response = self.send(endpoint, &request).await?;
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let content_type = header(CONTENT_TYPE.as_str()).unwrap_or_default();
        let announced =
            header("docker-content-digest").and_then(|text| Digest::try_from(text).ok());
        let body = self.body(endpoint, &what, response);
        let bytes = body.whole(MAX_MANIFEST).await?;
        // A proxy that damages what it passes on is found out even when a tag was asked for.
        if let Some(digest) = expected.or(announced.as_ref()) {
            digest.verify(&what, &bytes)?;
        }
        let digest = expected.cloned().unwrap_or_else(|| Digest::of(&bytes));
        Ok(Document {
            bytes,
            digest,
            content_type,
        })
    }

    async fn get_blob(
        &self,
        endpoint: &Endpoint,
        digest: &Digest,
        from: u64,
    ) -> Result<Response, PullError> {
        let what = format!("blob {digest}");
        let request = Request {
            what: &what,
            path: Some(&format!("blobs/{digest}")),
            accept: None,
            range: (from > 0).then_some((from, None)),
        };
        self.send(endpoint, &request).await
    }

    /// Asks the servers in turn. The last failure counts, but for one: a server that gave an answer
    /// knows more than one that could not be reached, as the origin never can without an uplink.
    async fn first<'a, T, F>(
        &'a self,
        what: &str,
        may: impl Fn(&Host) -> bool,
        ask: impl Fn(&'a Endpoint) -> F,
    ) -> Result<T, PullError>
    where
        F: Future<Output = Result<T, PullError>>,
    {
        let mut failure: Option<PullError> = None;
        for endpoint in self
            .servers
            .endpoints
            .iter()
            .filter(|endpoint| may(&endpoint.host))
        {
            let error = match self.ask_again(endpoint, &ask).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            debug!(%what, %error, "asking the next server");
            failure = Some(match failure {
                Some(before) => worse(before, error),
                None => error,
            });
        }
        Err(failure.unwrap_or_else(|| PullError::RegistryUnavailable {
            what: what.to_owned(),
            registry: self.servers.name.registry().to_owned(),
            message: "no configured host has the capability".into(),
        }))
    }

    /// Asks one server, and again when it is only out of sorts.
    async fn ask_again<'a, T, F>(
        &'a self,
        endpoint: &'a Endpoint,
        ask: &impl Fn(&'a Endpoint) -> F,
    ) -> Result<T, PullError>
    where
        F: Future<Output = Result<T, PullError>>,
    {
        (|| ask(endpoint))
            .retry(retry::policy(self.retries.min(2)))
            .when(|error| matches!(error, PullError::RegistryUnavailable { .. }))
            .await
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        request: &Request<'_>,
    ) -> Result<Response, PullError> {
        request
            .send(&self.servers, endpoint, self.auth.as_ref())
            .await
    }

    fn body<'a>(&self, endpoint: &'a Endpoint, what: &'a str, response: Response) -> Body<'a> {
        Body::new(endpoint, what, response, self.servers.no_progress)
    }
}

struct Transfer<'a, F> {
    what: &'a str,
    sent: &'a mut u64,
    received: &'a mut F,
}

/// Which of two servers' failures is told; both are, when neither gave an answer.
fn worse(before: PullError, after: PullError) -> PullError {
    let silent = |e: &PullError| {
        matches!(
            e,
            PullError::RegistryUnavailable { .. } | PullError::Timeout { .. }
        )
    };
    match after {
        _ if silent(&after) && !silent(&before) => before,
        PullError::RegistryUnavailable {
            what,
            registry,
            message,
        } => PullError::RegistryUnavailable {
            what,
            registry,
            message: format!("{message} (before that: {before})"),
        },
        after => after,
    }
}
