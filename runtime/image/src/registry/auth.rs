//! Who this side is: challenges of registries and the tokens that answer them
//! (distribution-spec token authentication; RFC 7235 for the challenge's form).

use serde::Deserialize;

use crate::reference::canonical_registry;

/// Who pulls; the fields are those of CRI's `AuthConfig`, empty when not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// User name for basic authentication.
    pub username: String,
    /// Password for basic authentication.
    pub password: String,
    /// The server that the credentials are for; empty for all that are asked.
    pub server_address: String,
    /// A token that is exchanged for an access token.
    pub identity_token: String,
    /// A bearer token that is sent as it is.
    pub registry_token: String,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// What a request carries to be let in.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Authorization {
    Basic { username: String, password: String },
    Bearer(String),
}

/// Neither password nor token is for a log.
impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic",
            Self::Bearer(_) => "Bearer",
        })
    }
}

/// What a registry asks for in `WWW-Authenticate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// The first challenge of the header that is understood; a token before a password.
    pub(crate) fn parse(header: &str) -> Option<Self> {
        let mut basic = None;
        let mut rest = header.trim_start();
        while !rest.is_empty() {
            let end = rest
                .find(|c: char| c.is_whitespace() || c == ',')
                .unwrap_or(rest.len());
            let (scheme, tail) = rest.split_at(end);
            let (parameters, tail) = parameters(tail);
            if scheme.eq_ignore_ascii_case("bearer") {
                let get = |name: &str| {
                    parameters
                        .iter()
                        .find(|(known, _)| known.eq_ignore_ascii_case(name))
                        .map(|(_, value)| value.clone())
                };
                if let Some(realm) = get("realm") {
                    return Some(Self::Bearer {
                        realm,
                        service: get("service"),
                        scope: get("scope"),
                    });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
            rest = tail;
        }
        basic
    }
}

/// `name="value"` pairs up to the next scheme.
fn parameters(mut rest: &str) -> (Vec<(String, String)>, &str) {
    let mut parameters = Vec::new();
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
        let token = rest
            .find(|c: char| c.is_whitespace() || c == ',' || c == '=')
            .unwrap_or(rest.len());
        let Some(value) = rest[token..].trim_start().strip_prefix('=') else {
            return (parameters, rest);
        };
        let name = rest[..token].to_owned();
        let value = value.trim_start();
        let (value, tail) = match value.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = value.find([',', ' ']).unwrap_or(value.len());
                (value[..end].to_owned(), &value[end..])
            }
        };
        parameters.push((name, value));
        rest = tail;
    }
}

fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((position, character)) = characters.next() {
        match character {
            '"' => return (value, &text[position + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

/// The reply of a token server.
#[derive(Deserialize)]
pub(crate) struct TokenReply {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl TokenReply {
    pub(crate) fn token(self) -> Option<String> {
        [self.token, self.access_token]
            .into_iter()
            .find(|token| !token.is_empty())
    }
}

impl Auth {
    /// Whether these credentials are meant for a server.
    pub(crate) fn is_for(&self, authority: &str) -> bool {
        let address = self.server_address.trim();
        let address = address.split_once("://").map_or(address, |(_, rest)| rest);
        let address = address.split('/').next().unwrap_or_default();
        let address = address.strip_suffix(":443").unwrap_or(address);
        let hub = |host: &str| canonical_registry(host) == "docker.io";
        address.is_empty()
            || address.eq_ignore_ascii_case(authority)
            || (hub(address) && hub(authority))
    }

    pub(crate) fn has_password(&self) -> bool {
        !self.username.is_empty() || !self.password.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_of_real_registries_are_understood() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.into(),
                service: service.map(Into::into),
                scope: scope.map(Into::into),
            })
        };
        for (header, expected) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull""#,
                bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    Some("repository:library/busybox:pull"),
                ),
            ),
            (
                r#"bearer realm = "https://a/t" , error="x, \"y\"""#,
                bearer("https://a/t", None, None),
            ),
            (
                r#"Basic realm="x", Bearer realm="https://a/t""#,
                bearer("https://a/t", None, None),
            ),
            (r#"Basic realm="x""#, Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("Negotiate, Basic realm=x", Some(Challenge::Basic)),
            ("Bearer", None),
            ("", None),
            ("= , \" ,,", None),
        ] {
            assert_eq!(Challenge::parse(header), expected, "{header}");
        }
    }

    #[test]
    fn credentials_go_to_their_server_alone() {
        let auth = |address: &str| Auth {
            server_address: address.into(),
            ..Auth::default()
        };
        assert!(auth("").is_for("any:1"));
        assert!(auth("https://index.docker.io/v1/").is_for("registry-1.docker.io"));
        assert!(auth("quay.io").is_for("quay.io"));
        assert!(auth("https://quay.io:443/v2/").is_for("quay.io"));
        assert!(!auth("quay.io").is_for("mirror.example"));
        assert!(!auth("quay.io:1").is_for("quay.io"));
    }
}
