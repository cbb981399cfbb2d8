//! What a server sends, as long as it sends enough of it.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;
use tokio::time::{Instant, timeout};

use crate::error::PullError;
use crate::shown;

use super::endpoint::Endpoint;

/// Largest reply of a token server or error message, bytes.
pub(super) const MAX_REPLY: u64 = 1 << 20;
/// What a body has to bring at least in each time without progress (a minute): 1 KiB/s. A modem
/// brings five times that, and may have to serve several layers at once. Who sends less holds a
/// place that others wait for, for days.
const LEAST_BYTES: u64 = 64 << 10;
/// How many times without progress a manifest, configuration or token may take as a whole.
const DOCUMENT_TIMES: u32 = 5;

/// A body on its way.
#[derive(Debug)]
pub(super) struct Body<'a> {
    endpoint: &'a Endpoint,
    what: &'a str,
    response: Response,
    no_progress: Duration,
    /// For how long it was waited for, and the bytes that this brought.
    waited: Duration,
    brought: u64,
}

impl<'a> Body<'a> {
    pub(super) fn new(
        endpoint: &'a Endpoint,
        what: &'a str,
        response: Response,
        no_progress: Duration,
    ) -> Self {
        Self {
            endpoint,
            what,
            response,
            no_progress,
            waited: Duration::ZERO,
            brought: 0,
        }
    }

    /// All of a small body.
    pub(super) async fn whole(mut self, limit: u64) -> Result<Bytes, PullError> {
        let (endpoint, what) = (self.endpoint, self.what);
        let most = self.no_progress * DOCUMENT_TIMES;
        let whole = async {
            let mut whole = Vec::new();
            while let Some(bytes) = self.chunk().await? {
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
        let result = timeout(most, whole).await;
        result.unwrap_or_else(|_| Err(endpoint.too_slow(what, most)))
    }

    /// The next bytes of a body, if it brings enough of them. Only waiting for the server counts,
    /// not what the receiver takes for them.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, PullError> {
        loop {
            let begun = Instant::now();
            let left = self.no_progress.saturating_sub(self.waited);
            let next = timeout(left, self.response.chunk()).await;
            self.waited += begun.elapsed();
            if let Ok(next) = next {
                let next = next.map_err(|e| self.endpoint.failed(self.what, &e))?;
                self.brought += next.as_ref().map_or(0, |bytes| bytes.len() as u64);
                return Ok(next);
            }
            if self.brought < LEAST_BYTES {
                return Err(self.endpoint.too_slow(self.what, self.no_progress));
            }
            (self.waited, self.brought) = (Duration::ZERO, 0);
        }
    }
}

/// The message in an error body, short enough and safe to show; or nothing. What is not in the
/// specification's form is not quoted: who names an image chooses who is asked, and that may be
/// anything that speaks HTTP.
pub(super) fn said_by_registry(body: &[u8]) -> String {
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
