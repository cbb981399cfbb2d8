//! Images, references and credentials.

use base64::{Engine, prelude::BASE64_STANDARD};
use hull_image::{Auth, Image};
use hull_proto_cri::v1;
use hull_spec::spec::ImageRequest;

use super::required;
use crate::cri::error::CriError;

/// The image that a request names; `field` is the spec's path in the request.
pub(crate) fn request(field: &str, spec: Option<v1::ImageSpec>) -> Result<ImageRequest, CriError> {
    let name = format!("{field}.image");
    let spec = required(&name, spec.filter(|spec| !spec.image.is_empty()))?;
    Ok(ImageRequest {
        image: spec.image,
        user_specified: spec.user_specified_image,
        annotations: spec.annotations,
    })
}

/// As it was asked for.
pub(crate) fn spec(image: &ImageRequest) -> v1::ImageSpec {
    v1::ImageSpec {
        image: image.image.clone(),
        annotations: image.annotations.clone(),
        user_specified_image: image.user_specified.clone(),
        ..Default::default()
    }
}

/// An image of this node.
pub(crate) fn image(image: &Image) -> v1::Image {
    let (uid, username) = user(&image.config.user);
    v1::Image {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: None,
        pinned: image.pinned,
    }
}

/// The user part of `user[:group]`: a number or a name.
fn user(text: &str) -> (Option<v1::Int64Value>, String) {
    let user = text.split(':').next().unwrap_or_default();
    match user.parse() {
        Ok(value) => (Some(v1::Int64Value { value }), String::new()),
        Err(_) => (None, user.to_owned()),
    }
}

/// Credentials; none when all fields are empty. Whether they are for the
/// registry that is asked is `hull-image`'s concern.
pub(crate) fn auth(config: Option<v1::AuthConfig>) -> Result<Option<Auth>, CriError> {
    let Some(config) = config else {
        return Ok(None);
    };
    let mut auth = Auth {
        username: config.username,
        password: config.password,
        server_address: config.server_address,
        identity_token: config.identity_token,
        registry_token: config.registry_token,
    };
    if auth.username.is_empty() && !config.auth.is_empty() {
        // Docker's form: base64 of `user:password`.
        let pair = BASE64_STANDARD
            .decode(config.auth.trim_end_matches('\0'))
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = pair.as_deref().and_then(|pair| pair.split_once(':'));
        let Some((username, password)) = pair else {
            return Err(CriError::invalid(
                "auth.auth",
                "it is not base64 of user:password",
            ));
        };
        auth.username = username.to_owned();
        auth.password = password.trim_matches('\0').to_owned();
    }
    let empty = Auth {
        server_address: auth.server_address.clone(),
        ..Auth::default()
    };
    Ok(Some(auth).filter(|auth| *auth != empty))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_a_number_or_a_name() {
        let number = |value| Some(v1::Int64Value { value });
        assert_eq!(user(""), (None, String::new()));
        assert_eq!(user("1002"), (number(1002), String::new()));
        assert_eq!(user("1003:1004"), (number(1003), String::new()));
        assert_eq!(user("www-data:1004"), (None, "www-data".into()));
    }

    #[test]
    fn credentials_come_in_several_forms() {
        let read = |config| auth(Some(config)).unwrap();
        assert_eq!(read(v1::AuthConfig::default()), None);
        assert_eq!(
            read(v1::AuthConfig {
                server_address: "registry.example".into(),
                ..Default::default()
            }),
            None
        );
        let plain = read(v1::AuthConfig {
            username: "u".into(),
            password: "p".into(),
            ..Default::default()
        });
        let encoded = read(v1::AuthConfig {
            auth: BASE64_STANDARD.encode("u:p"),
            ..Default::default()
        });
        assert!(plain.is_some());
        assert_eq!(plain, encoded);
        let broken = v1::AuthConfig {
            auth: "%".into(),
            ..Default::default()
        };
        assert!(auth(Some(broken)).is_err());
    }
}
