//! One request for a manifest or blob, with the right to it, to its answer.

use reqwest::header::{ACCEPT, AUTHORIZATION, RANGE};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use tokio::time::Instant;

use crate::error::PullError;

use super::auth::{Auth, Authorization};
use super::body::{Body, MAX_REPLY, said_by_registry};
use super::endpoint::Endpoint;
use super::follow::{Answer, follow};
use super::retry::retry_after;
use super::servers::{Servers, Way};
use super::token::Login;

/// What of a repository is asked for.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// For messages.
    pub(super) what: &'a str,
    /// Below the repository's own path; `None`: what a registry has to say of itself.
    pub(super) path: Option<&'a str>,
    /// Media types that are understood; `None` for any.
    pub(super) accept: Option<&'static str>,
    /// First and last byte; the last may be left out.
    pub(super) range: Option<(u64, Option<u64>)>,
}

impl Request<'_> {
    /// Sends the request to one server; anything but success is an error.
    pub(super) async fn send(
        &self,
        servers: &Servers,
        endpoint: &Endpoint,
        auth: Option<&Auth>,
    ) -> Result<Response, PullError> {
        let mut url = endpoint.host.base.clone();
        let below = self
            .path
            .map(|path| format!("{}/{path}", servers.name.repository()));
        url.set_path(&format!("{}/{}", url.path(), below.unwrap_or_default()));
        if endpoint.host.mirror {
            url.query_pairs_mut()
                .append_pair("ns", servers.name.registry());
        }
        let login = Login::new(servers, endpoint, auth);
        let mut used = endpoint.authorization.lock().await.clone();
        if used.is_none() {
            used = login
                .auth
                .filter(|auth| !auth.registry_token.is_empty())
                .map(|auth| Authorization::Bearer(auth.registry_token.clone()));
        }
        let answer = self
            .send_once(servers, endpoint, &url, used.as_ref())
            .await?;
        let refused = answer.own && answer.response.status() == StatusCode::UNAUTHORIZED;
        let answer = if refused {
            let response = &answer.response;
            match login.authorize(response, used.as_ref()).await? {
                Some(authorization) => {
                    self.send_once(servers, endpoint, &url, Some(&authorization))
                        .await?
                }
                None => answer,
            }
        } else {
            answer
        };
        self.check(servers, endpoint, answer).await
    }

    async fn send_once(
        &self,
        servers: &Servers,
        endpoint: &Endpoint,
        url: &Url,
        authorization: Option<&Authorization>,
    ) -> Result<Answer, PullError> {
        let busy_until = *endpoint.busy_until.lock().await;
        if let Some(until) = busy_until {
            tokio::time::sleep_until(until).await;
        }
        let request = |way: &Way, own: bool| -> RequestBuilder {
            let mut request = way.client.get(way.url.clone());
            if let Some(accept) = self.accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some((first, last)) = self.range {
                let last = last.map(|last| last.to_string()).unwrap_or_default();
                request = request.header(RANGE, format!("bytes={first}-{last}"));
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
        follow(servers, endpoint, self.what, way, None, request).await
    }

    /// Turns everything but success into the error it is.
    async fn check(
        &self,
        servers: &Servers,
        endpoint: &Endpoint,
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
        if status == StatusCode::NOT_FOUND {
            return Err(PullError::NotFound {
                what: format!("{} ({})", self.what, servers.name.full()),
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
            let until = Instant::now() + wait.min(servers.no_progress);
            *endpoint.busy_until.lock().await = Some(until);
        }
        let message = if own {
            let body = Body::new(endpoint, self.what, response, servers.no_progress);
            let said = body.whole(MAX_REPLY).await;
            format!("{status}{}", said_by_registry(&said.unwrap_or_default()))
        } else {
            format!("{status} from {from}")
        };
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(PullError::Unauthorized {
                reference: servers.name.full(),
                registry,
                message,
            });
        }
        Err(endpoint.unavailable(self.what, message))
    }
}
