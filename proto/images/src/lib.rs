//! What the command line asks of a daemon about images, for a person: lists that tell what is in
//! use, pulls that tell how far they are, imports and exports. Served on the CRI socket.
//!
//! `proto/images.proto` is the contract, generated into [`v1`].

#![forbid(unsafe_code)]

use std::fmt;

/// Bytes of an archive in one message, but for its last.
pub const PIECE: usize = 256 << 10;

/// Package `hull.images.v1`.
#[allow(warnings, clippy::all, clippy::pedantic, reason = "generated code")]
#[allow(
    clippy::allow_attributes,
    reason = "which lints fire varies with the generator"
)]
pub mod v1 {
    tonic::include_proto!("hull.images.v1");
}

impl fmt::Debug for v1::PullRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullRequest")
            .field("image", &self.image)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for v1::LoginRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoginRequest")
            .field("registry", &self.registry)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::v1;

    #[test]
    fn debug_hides_secrets() {
        let request = v1::PullRequest {
            image: "a/b".into(),
            username: "me".into(),
            password: "hidden".into(),
            identity_token: "hidden".into(),
            registry_token: "hidden".into(),
            server_address: String::new(),
        };
        let login = v1::LoginRequest {
            registry: "r".into(),
            username: "me".into(),
            password: "hidden".into(),
        };
        for text in [format!("{request:?}"), format!("{login:?}")] {
            assert!(text.contains("me") && !text.contains("hidden"), "{text}");
        }
    }
}
