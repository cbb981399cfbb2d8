//! What is spoken with registries (OCI distribution-spec 1.1, "Pull"): manifests and blobs, from
//! the first of the configured servers that has them.
//!
//! Written on an HTTP client rather than taken from `oci-client`: bodies of manifests are bounded
//! here, refusals keep their reason, and paths, headers and tokens follow `hosts.toml` and CRI.

mod auth;
mod client;
mod follow;
pub(crate) mod hosts;
mod retry;
mod tls;
mod token;
mod zone;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::digest::Digest;
use crate::layer::source::Chunk;
use crate::manifest::{Descriptor, MANIFEST_TYPES};
use crate::pull::{Auth, PullError};
use crate::reference::{Name, Target};
use crate::shown;
use crate::store::{Limits, Registries};

use auth::Authorization;
pub(crate) use client::HttpClients;
use client::{CONNECT_TIMEOUT, describe};
use follow::{Answer, Way};
use hosts::Host;
use retry::{backoff, retry_after};

/// Largest manifest or index, bytes: what other runtimes and registries agree on.
const MAX_MANIFEST: u64 = 4 << 20;
/// Largest reply of a token server or error message, bytes.
const MAX_REPLY: u64 = 1 << 20;
/// What a body has to bring at least in each time without progress (a minute): 1 KiB/s. A modem
/// brings five times that, and may have to serve several layers at once. Who sends less holds a
/// place that others wait for, for days.
const LEAST_BYTES: u64 = 64 << 10;
/// How many times without progress a manifest, configuration or token may take as a whole.
const DOCUMENT_TIMES: u32 = 5;
/// A connection that brought this many bytes before it broke off is not counted as a failure.
const WORTHWHILE: u64 = 1 << 20;

/// The servers that may have one repository, and the caller's right to it.
#[derive(Debug)]
pub(crate) struct Registry {
    name: Name,
    endpoints: Vec<Endpoint>,
    /// Whether the administrator named these servers.
    from_file: bool,
    registries: Registries,
    clients: Arc<HttpClients>,
    auth: Option<Auth>,
    no_progress: Duration,
    retries: u32,
}

#[derive(Debug)]
struct Endpoint {
    host: Host,
    client: Client,
    /// What the server let in last.
    authorization: Mutex<Option<Authorization>>,
    /// Until when the server wants to be left alone.
    busy_until: Mutex<Option<Instant>>,
}

/// A manifest or index as it came.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) bytes: Bytes,
    pub(crate) digest: Digest,
    pub(crate) content_type: String,
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
            endpoints.push(Endpoint {
                host,
                client,
                authorization: Mutex::new(None),
                busy_until: Mutex::new(None),
            });
        }
        Ok(Self {
            name: name.clone(),
            endpoints,
            from_file,
            registries: registries.clone(),
            clients: Arc::clone(clients),
            auth,
            no_progress: limits.no_progress,
            retries: limits.retries,
        })
    }

    /// Fetches what the name points at.
    pub(crate) async fn resolve(&self) -> Result<Document, PullError> {
        match self.name.target() {
            Target::Digest(digest) => self.manifest(digest).await,
            Target::Tag(tag) => {
                let may = |host: &Host| host.resolve;
                self.first(&self.name.full(), may, |endpoint| {
                    self.document(endpoint, tag, None)
                })
                .await
            }
        }
    }

    /// Fetches the manifest with a digest.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<Document, PullError> {
        self.first(
            &self.name.with_digest(digest),
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
                    let bytes = self.body(endpoint, &what, response, limit).await?;
                    verify(&what, &bytes, &blob.digest)?;
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
                    let range = Some("bytes=0-0".to_owned());
                    let response = self.get(endpoint, what, path, None, range).await?;
                    if response.status() == StatusCode::PARTIAL_CONTENT {
                        // To its end, so that the connection can be used again.
                        let _ = self.body(endpoint, what, response, 1).await;
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
        let mut failures = 0;
        let mut servers = HashSet::new();
        let one = |servers: HashSet<&Url>| match servers.len() {
            1 => servers.into_iter().next().map(Url::to_string),
            _ => None,
        };
        loop {
            if failures > 0 && sent >= blob.size {
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
            match broken {
                Ok(()) => {
                    // The receiver may be gone already, having failed for its own reasons.
                    let _ = chunks.send(Chunk::End).await;
                    return Ok(one(servers));
                }
                Err(e @ PullError::RegistryUnavailable { .. })
                    if failures < self.retries || sent - before >= WORTHWHILE =>
                {
                    failures = if sent - before >= WORTHWHILE {
                        1
                    } else {
                        failures + 1
                    };
                    warn!(%what, sent, error = %e, failures, "transfer broke off; going on from there");
                    tokio::time::sleep(backoff(failures)).await;
                }
                Err(e) => return Err(e),
            }
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
                return Err(PullError::RegistryUnavailable {
                    what: transfer.what.to_owned(),
                    registry: endpoint.host.shown(),
                    message: "answered with another range than asked for".into(),
                });
            }
            0
        } else {
            *transfer.sent
        };
        let mut body = Body::new(response);
        while let Some(mut bytes) = self.chunk(endpoint, transfer.what, &mut body).await? {
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
        let what = format!("manifest {target} of {}", self.name.repository());
        let path = format!("manifests/{target}");
        let response = self
            .get(endpoint, &what, &path, Some(MANIFEST_TYPES), None)
            .await?;
        let header = |name: &str| {
            let value = response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let content_type = header(CONTENT_TYPE.as_str()).unwrap_or_default();
        let announced =
            header("docker-content-digest").and_then(|text| Digest::try_from(text).ok());
        let bytes = self.body(endpoint, &what, response, MAX_MANIFEST).await?;
        // A proxy that damages what it passes on is found out even when a tag was asked for.
        if let Some(digest) = expected.or(announced.as_ref()) {
            verify(&what, &bytes, digest)?;
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
        let range = (from > 0).then(|| format!("bytes={from}-"));
        self.get(endpoint, &what, &format!("blobs/{digest}"), None, range)
            .await
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
        for endpoint in self.endpoints.iter().filter(|endpoint| may(&endpoint.host)) {
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
            registry: self.name.registry().to_owned(),
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
        let mut failures = 0;
        loop {
            match ask(endpoint).await {
                Err(PullError::RegistryUnavailable { .. }) if failures < self.retries.min(2) => {
                    failures += 1;
                    tokio::time::sleep(backoff(failures)).await;
                }
                result => return result,
            }
        }
    }

    async fn get(
        &self,
        endpoint: &Endpoint,
        what: &str,
        path: &str,
        accept: Option<&str>,
        range: Option<String>,
    ) -> Result<Response, PullError> {
        let mut url = endpoint.host.base.clone();
        url.set_path(&format!("{}/{}/{path}", url.path(), self.name.repository()));
        if endpoint.host.mirror {
            url.query_pairs_mut()
                .append_pair("ns", self.name.registry());
        }
        let mut used = endpoint.authorization.lock().await.clone();
        if used.is_none() {
            used = self
                .credentials(endpoint)
                .filter(|auth| !auth.registry_token.is_empty())
                .map(|auth| Authorization::Bearer(auth.registry_token.clone()));
        }
        let headers = Headers { accept, range };
        let answer = self
            .send(endpoint, what, &url, &headers, used.as_ref())
            .await?;
        let refused = answer.own && answer.response.status() == StatusCode::UNAUTHORIZED;
        let answer = if refused {
            let response = &answer.response;
            match self.authorize(endpoint, response, used.as_ref()).await? {
                Some(authorization) => {
                    self.send(endpoint, what, &url, &headers, Some(&authorization))
                        .await?
                }
                None => answer,
            }
        } else {
            answer
        };
        self.check(endpoint, what, answer).await
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        what: &str,
        url: &Url,
        headers: &Headers<'_>,
        authorization: Option<&Authorization>,
    ) -> Result<Answer, PullError> {
        let busy_until = *endpoint.busy_until.lock().await;
        if let Some(until) = busy_until {
            tokio::time::sleep_until(until).await;
        }
        let request = |way: &Way, own: bool| -> RequestBuilder {
            let mut request = way.client.get(way.url.clone());
            if let Some(accept) = headers.accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some(range) = &headers.range {
                request = request.header(RANGE, range);
            }
            if !own {
                return request;
            }
            for (name, value) in &endpoint.host.headers {
                request = request.header(name, value);
            }
            match authorization {
                Some(Authorization::Basic { username, password }) => {
                    request.basic_auth(username, Some(password))
                }
                Some(Authorization::Bearer(token)) => {
                    request.header(AUTHORIZATION, format!("Bearer {token}"))
                }
                None => request,
            }
        };
        let way = Way {
            client: endpoint.client.clone(),
            url: url.clone(),
        };
        self.follow(endpoint, what, way, None, request).await
    }

    /// Turns everything but success into the error it is.
    async fn check(
        &self,
        endpoint: &Endpoint,
        what: &str,
        answer: Answer,
    ) -> Result<Response, PullError> {
        let Answer {
            response,
            own,
            from,
        } = answer;
        let status = response.status();
        if status == StatusCode::OK || status == StatusCode::PARTIAL_CONTENT {
            return Ok(response);
        }
        let registry = endpoint.host.shown();
        let what = what.to_owned();
        if status == StatusCode::NOT_FOUND {
            return Err(PullError::NotFound {
                what: format!("{what} ({})", self.name.full()),
                registry,
            });
        }
        if own
            && matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
            )
            && let Some(wait) = retry_after(response.headers())
        {
            // Waiting is no progress either, so it has the same limit.
            let until = Instant::now() + wait.min(self.no_progress);
            *endpoint.busy_until.lock().await = Some(until);
        }
        let message = if own {
            let said = self.body(endpoint, &what, response, MAX_REPLY).await;
            format!("{status}{}", said_by_registry(&said.unwrap_or_default()))
        } else {
            format!("{status} from {from}")
        };
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(PullError::Unauthorized {
                reference: self.name.full(),
                registry,
                message,
            });
        }
        Err(PullError::RegistryUnavailable {
            what,
            registry,
            message,
        })
    }

    async fn body(
        &self,
        endpoint: &Endpoint,
        what: &str,
        response: Response,
        limit: u64,
    ) -> Result<Bytes, PullError> {
        let mut body = Body::new(response);
        let whole = async {
            let mut whole = Vec::new();
            while let Some(bytes) = self.chunk(endpoint, what, &mut body).await? {
                whole.extend_from_slice(&bytes);
                if whole.len() as u64 > limit {
                    return Err(PullError::TooLarge {
                        what: what.to_owned(),
                        limit,
                        unit: "bytes",
                    });
                }
            }
            Ok(whole.into())
        };
        let most = self.no_progress * DOCUMENT_TIMES;
        let result = tokio::time::timeout(most, whole).await;
        result.unwrap_or_else(|_| Err(too_slow(endpoint, what, most)))
    }

    /// The next bytes of a body, if it brings enough of them. Only waiting for the server counts,
    /// not what the receiver takes for them.
    async fn chunk(
        &self,
        endpoint: &Endpoint,
        what: &str,
        body: &mut Body,
    ) -> Result<Option<Bytes>, PullError> {
        loop {
            let begun = Instant::now();
            let left = self.no_progress.saturating_sub(body.waited);
            let next = tokio::time::timeout(left, body.response.chunk()).await;
            body.waited += begun.elapsed();
            if let Ok(next) = next {
                let next = next.map_err(|e| failed(endpoint, what, &e))?;
                body.brought += next.as_ref().map_or(0, |bytes| bytes.len() as u64);
                return Ok(next);
            }
            if body.brought < LEAST_BYTES {
                return Err(too_slow(endpoint, what, self.no_progress));
            }
            (body.waited, body.brought) = (Duration::ZERO, 0);
        }
    }

    async fn timely<T>(
        &self,
        endpoint: &Endpoint,
        what: &str,
        work: impl Future<Output = reqwest::Result<T>>,
    ) -> Result<T, PullError> {
        match tokio::time::timeout(self.no_progress, work).await {
            Ok(result) => result.map_err(|e| failed(endpoint, what, &e)),
            Err(_) => Err(too_slow(endpoint, what, self.no_progress)),
        }
    }
}

/// What of a document or blob is asked for.
#[derive(Debug)]
struct Headers<'a> {
    accept: Option<&'a str>,
    range: Option<String>,
}

/// A body on its way.
#[derive(Debug)]
struct Body {
    response: Response,
    /// For how long it was waited for, and the bytes that this brought.
    waited: Duration,
    brought: u64,
}

impl Body {
    fn new(response: Response) -> Self {
        Self {
            response,
            waited: Duration::ZERO,
            brought: 0,
        }
    }
}

fn failed(endpoint: &Endpoint, what: &str, error: &reqwest::Error) -> PullError {
    if error.is_timeout() {
        return too_slow(endpoint, what, CONNECT_TIMEOUT);
    }
    if let Some(reason) = zone::out_of_reach(error) {
        let to = error.url().map(follow::origin).unwrap_or_default();
        return follow::refused(endpoint, format!("{to}, {reason}"));
    }
    PullError::RegistryUnavailable {
        what: what.to_owned(),
        registry: endpoint.host.shown(),
        message: describe(error),
    }
}

fn too_slow(endpoint: &Endpoint, what: &str, time: Duration) -> PullError {
    PullError::Timeout {
        what: what.to_owned(),
        registry: endpoint.host.shown(),
        seconds: time.as_secs(),
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

/// Holds bytes against the digest that they should have.
pub(crate) fn verify(what: &str, bytes: &[u8], expected: &Digest) -> Result<(), PullError> {
    let mut hasher = expected.hasher();
    hasher.update(bytes);
    let actual = hasher.finish();
    if actual == *expected {
        Ok(())
    } else {
        Err(PullError::DigestMismatch {
            what: what.to_owned(),
            expected: expected.to_string(),
            actual: actual.to_string(),
        })
    }
}

/// The message in an error body, short enough and safe to show; or nothing. What is not in the
/// specification's form is not quoted: who names an image chooses who is asked, and that may be
/// anything that speaks HTTP.
fn said_by_registry(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Envelope {
        errors: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(envelope) = serde_json::from_slice::<Envelope>(body) else {
        return String::new();
    };
    let entries = envelope.errors.iter().take(5);
    let texts: Vec<_> = entries
        .map(|entry| {
            format!("{} {}", entry.code, entry.message)
                .trim()
                .to_owned()
        })
        .collect();
    let text = shown::line(&texts.join("; "), 300);
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}
