//! Getting let in: which credentials a server gets, and tokens for them.

use reqwest::header::WWW_AUTHENTICATE;
use reqwest::{Response, StatusCode, Url};

use crate::error::PullError;

use super::auth::{Auth, Authorization, Challenge, TokenReply};
use super::body::{Body, MAX_REPLY, said_by_registry};
use super::endpoint::{Endpoint, origin};
use super::follow::follow;
use super::servers::{Servers, Way};
use super::zone::Zone;

/// The caller's right to a repository at one server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Login<'a> {
    servers: &'a Servers,
    endpoint: &'a Endpoint,
    /// The credentials, if they are for this server.
    pub(super) auth: Option<&'a Auth>,
}

impl<'a> Login<'a> {
    pub(super) fn new(
        servers: &'a Servers,
        endpoint: &'a Endpoint,
        auth: Option<&'a Auth>,
    ) -> Self {
        let authority = endpoint.host.authority();
        Self {
            servers,
            endpoint,
            auth: auth.filter(|auth| auth.is_for(&authority)),
        }
    }

    /// Answers a challenge of the registry's own, never that of who it led to; `None` when there is
    /// nothing to answer it with. Of layers that are refused at the same time, one gets the new
    /// token for all.
    pub(super) async fn authorize(
        &self,
        refused: &Response,
        used: Option<&Authorization>,
    ) -> Result<Option<Authorization>, PullError> {
        let endpoint = self.endpoint;
        let mut current = endpoint.authorization.lock().await;
        if current.is_some() && current.as_ref() != used {
            return Ok(current.clone());
        }
        let challenge = refused
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .find_map(|header| Challenge::parse(header.to_str().ok()?));
        let authorization = match challenge {
            Some(Challenge::Basic) => {
                self.auth
                    .filter(|auth| auth.has_password())
                    .map(|auth| Authorization::Basic {
                        username: auth.username.clone(),
                        password: auth.password.clone(),
                    })
            }
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => {
                let repository = self.servers.name.repository();
                let of_repository =
                    || (!repository.is_empty()).then(|| format!("repository:{repository}:pull"));
                let scope = scope.or_else(of_repository);
                let ask = TokenRequest {
                    realm: &realm,
                    service: service.as_deref(),
                    scope: scope.as_deref(),
                };
                let here = endpoint.zone(refused);
                Some(self.token(here, ask).await?)
            }
            None => None,
        };
        // The same answer would be refused again.
        if authorization.as_ref() == used {
            return Ok(None);
        }
        current.clone_from(&authorization);
        Ok(authorization)
    }

    /// Gets a token from where the registry says. Whoever is named there gets the credentials: the
    /// registry could ask for them itself, and it has its tokens made elsewhere as a rule. But it
    /// can only name a server that it may lead to (see `follow`).
    async fn token(&self, here: Zone, ask: TokenRequest<'_>) -> Result<Authorization, PullError> {
        let TokenRequest {
            realm,
            service,
            scope,
        } = ask;
        let Self {
            servers,
            endpoint,
            auth,
        } = *self;
        let url = Url::parse(realm)
            .map_err(|_| endpoint.misled("a token server whose address is none".into()))?;
        let mut way = servers.way(endpoint, here, None, url)?;
        let server = origin(&way.url);
        let what = format!("token from {server}");
        let is_registry = way.url.origin() == endpoint.host.base.origin();
        let identity = auth
            .map(|auth| auth.identity_token.as_str())
            .filter(|token| !token.is_empty());
        // OAuth 2 (RFC 6749, section 6), as the distribution token specification has it.
        let form = identity.map(|identity| {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("refresh_token", identity),
                ("client_id", "hull"),
            ];
            form.extend(scope.map(|scope| ("scope", scope)));
            form.extend(service.map(|service| ("service", service)));
            form
        });
        if form.is_none() {
            way.url
                .query_pairs_mut()
                .extend_pairs(service.map(|service| ("service", service)))
                .extend_pairs(scope.map(|scope| ("scope", scope)));
        }
        let password = auth.filter(|auth| auth.has_password());
        let request = |way: &Way, own: bool| match (&form, password) {
            (Some(form), _) if own => way.client.post(way.url.clone()).form(form),
            (None, Some(auth)) if own => way
                .client
                .get(way.url.clone())
                .basic_auth(&auth.username, Some(&auth.password)),
            _ => way.client.get(way.url.clone()),
        };
        let answer = follow(servers, endpoint, &what, way, Some(here), request).await?;
        let status = answer.response.status();
        let body = Body::new(endpoint, &what, answer.response, servers.no_progress)
            .whole(MAX_REPLY)
            .await?;
        let said = if answer.own && is_registry {
            said_by_registry(&body)
        } else {
            String::new()
        };
        let message = format!("token server {}: {status}{said}", answer.from);
        let refuse = |message| PullError::Unauthorized {
            reference: servers.name.full(),
            registry: endpoint.host.shown(),
            message,
        };
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(endpoint.unavailable(&what, message));
        }
        if !status.is_success() {
            return Err(refuse(message));
        }
        serde_json::from_slice::<TokenReply>(&body)
            .ok()
            .and_then(TokenReply::token)
            .map(Authorization::Bearer)
            .ok_or_else(|| refuse(format!("token server {server} sent no token")))
    }
}

/// What a challenge says about the token to get.
#[derive(Debug, Clone, Copy)]
struct TokenRequest<'a> {
    realm: &'a str,
    service: Option<&'a str>,
    /// None: for no repository.
    scope: Option<&'a str>,
}
