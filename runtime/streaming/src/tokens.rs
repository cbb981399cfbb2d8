//! URLs that nobody has opened yet.
//!
//! A token is all that proves a client, so it can't be guessed: 128 bits of the system's random
//! numbers, good once and for a minute. It is found by a hash whose key is secret, so the time that
//! a wrong one takes says nothing about the right ones.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::{TryRng, rngs::SysRng};
use tokio::time::Instant;

use crate::request::{Request, RequestError};

/// Random bytes of a token: 22 characters in a URL.
const RANDOM: usize = 16;

/// Requests by token; each is given out once, and forgotten after a while.
#[derive(Debug)]
pub(crate) struct Tokens {
    pending: Mutex<HashMap<String, (Instant, Request)>>,
    max: usize,
    ttl: Duration,
}

impl Tokens {
    pub(crate) fn new(max: usize, ttl: Duration) -> Self {
        Self {
            pending: Mutex::default(),
            max,
            ttl,
        }
    }

    /// Keeps a request and gives its token.
    pub(crate) fn put(&self, request: Request) -> Result<String, RequestError> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if pending.len() >= self.max {
            pending.retain(|_, (end, _)| *end > now);
        }
        if pending.len() >= self.max {
            return Err(RequestError::TooMany(self.max));
        }
        let mut random = [0; RANDOM];
        SysRng
            .try_fill_bytes(&mut random)
            .map_err(|error| RequestError::Random(error.to_string()))?;
        let token = URL_SAFE_NO_PAD.encode(random);
        pending.insert(token.clone(), (now + self.ttl, request));
        Ok(token)
    }

    /// Gives a token's request, once.
    pub(crate) fn take(&self, token: &str) -> Option<Request> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let (end, request) = pending.remove(token)?;
        (end > Instant::now()).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::backend::PortForwardRequest;

    fn request() -> Request {
        Request::PortForward(PortForwardRequest {
            pod_sandbox_id: "pod".into(),
            ports: Vec::new(),
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_and_for_a_while() {
        let tokens = Tokens::new(10, Duration::from_secs(60));
        let token = tokens.put(request()).unwrap();
        assert_eq!(URL_SAFE_NO_PAD.decode(&token).unwrap().len(), 16);
        assert_eq!(tokens.take(&token), Some(request()));
        assert_eq!(tokens.take(&token), None);
        let late = tokens.put(request()).unwrap();
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(tokens.take(&late), None);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_so_many_wait_and_old_ones_make_room() {
        let tokens = Tokens::new(100, Duration::from_secs(60));
        let given: HashSet<_> = (0..100).map(|_| tokens.put(request()).unwrap()).collect();
        assert_eq!(given.len(), 100);
        assert_eq!(tokens.put(request()), Err(RequestError::TooMany(100)));
        tokio::time::advance(Duration::from_secs(61)).await;
        tokens.put(request()).unwrap();
    }
}
