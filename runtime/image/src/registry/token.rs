//! Getting let in: which credentials a server gets, and tokens for them.

use reqwest::header::WWW_AUTHENTICATE;
use reqwest::{Response, StatusCode, Url};

use crate::pull::{Auth, PullError};

use super::auth::{Authorization, Challenge, TokenReply};
use super::{Endpoint, MAX_REPLY, Registry, said_by_registry};

impl Registry {
    pub(super) fn credentials(&self, endpoint: &Endpoint) -> Option<&Auth> {
        let authority = endpoint.host.authority();
        self.auth.as_ref().filter(|auth| auth.is_for(&authority))
    }

    /// Answers a challenge; `None` when there is nothing to answer it with. Of layers that are
    /// refused at the same time, one gets the new token for all.
    pub(super) async fn authorize(
        &self,
        endpoint: &Endpoint,
        refused: &Response,
        used: Option<&Authorization>,
    ) -> Result<Option<Authorization>, PullError> {
        let mut current = endpoint.authorization.lock().await;
        if current.is_some() && current.as_ref() != used {
            return Ok(current.clone());
        }
        let challenge = refused
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .find_map(|header| Challenge::parse(header.to_str().ok()?));
        let auth = self.credentials(endpoint);
        let authorization = match challenge {
            Some(Challenge::Basic) => {
                auth.filter(|auth| auth.has_password())
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
                let scope =
                    scope.unwrap_or_else(|| format!("repository:{}:pull", self.name.repository()));
                Some(
                    self.token(endpoint, &realm, service.as_deref(), &scope, auth)
                        .await?,
                )
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

    async fn token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        auth: Option<&Auth>,
    ) -> Result<Authorization, PullError> {
        let what = format!("token from {realm}");
        let refuse = |message: String| PullError::Unauthorized {
            reference: self.name.full(),
            registry: endpoint.host.shown(),
            message,
        };
        let mut url = Url::parse(realm)
            .map_err(|_| refuse(format!("token server {realm:?} is no address")))?;
        let downgrade = endpoint.host.base.scheme() == "https" && url.scheme() != "https";
        if downgrade || !matches!(url.scheme(), "http" | "https") {
            return Err(refuse(format!(
                "token server {realm:?} is not reached by https"
            )));
        }
        let identity = auth
            .map(|auth| auth.identity_token.as_str())
            .filter(|token| !token.is_empty());
        let request = if let Some(identity) = identity {
            // OAuth 2 (RFC 6749, section 6), as the distribution token specification has it.
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("refresh_token", identity),
                ("client_id", "hull"),
                ("scope", scope),
            ];
            form.extend(service.map(|service| ("service", service)));
            endpoint.client.post(url).form(&form)
        } else {
            url.query_pairs_mut()
                .extend_pairs(service.map(|service| ("service", service)))
                .append_pair("scope", scope);
            let request = endpoint.client.get(url);
            match auth.filter(|auth| auth.has_password()) {
                Some(auth) => request.basic_auth(&auth.username, Some(&auth.password)),
                None => request,
            }
        };
        let response = self.timely(endpoint, &what, request.send()).await?;
        let status = response.status();
        let body = self.body(endpoint, &what, response, MAX_REPLY).await?;
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            let message = format!("{status}{}", said_by_registry(&body));
            return Err(PullError::RegistryUnavailable {
                what,
                registry: endpoint.host.shown(),
                message,
            });
        }
        if !status.is_success() {
            return Err(refuse(format!(
                "token server: {status}{}",
                said_by_registry(&body)
            )));
        }
        serde_json::from_slice::<TokenReply>(&body)
            .ok()
            .and_then(TokenReply::token)
            .map(Authorization::Bearer)
            .ok_or_else(|| refuse("token server sent no token".into()))
    }
}
