//! Content digests: `sha256:` or `sha512:` and hex digits.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

use crate::error::PullError;
use crate::shown;

/// A well-formed digest of a supported algorithm.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest(String);

/// The text is not a digest that this crate can verify.
#[derive(Debug, thiserror::Error)]
#[error(
    "parse digest {0:?}: it must be sha256: or sha512: and as many lower-case hex digits as the algorithm has"
)]
pub(crate) struct InvalidDigest(String);

impl Digest {
    /// The SHA-256 digest of some bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Hasher::Sha256(Sha256::new_with_prefix(bytes)).finish()
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The digest as a file name.
    pub(crate) fn file_name(&self) -> String {
        self.0.replace(':', "-")
    }

    /// Holds bytes against the digest that they should have; `what` they are is for the message.
    pub(crate) fn verify(&self, what: &str, bytes: &[u8]) -> Result<(), PullError> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        let actual = hasher.finish();
        if actual == *self {
            Ok(())
        } else {
            Err(PullError::DigestMismatch {
                what: what.to_owned(),
                expected: self.to_string(),
                actual: actual.to_string(),
            })
        }
    }

    /// A hasher of this digest's algorithm.
    pub(crate) fn hasher(&self) -> Hasher {
        if self.0.starts_with("sha512:") {
            Hasher::Sha512(Sha512::new())
        } else {
            Hasher::Sha256(Sha256::new())
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let hex_length = match text.split_once(':') {
            Some(("sha256", _)) => 64,
            Some(("sha512", _)) => 128,
            _ => return Err(invalid(&text)),
        };
        let hex = &text["shaNNN:".len()..];
        if hex.len() == hex_length && hex.bytes().all(is_lower_hex) {
            Ok(Self(text))
        } else {
            Err(invalid(&text))
        }
    }
}

fn invalid(text: &str) -> InvalidDigest {
    InvalidDigest(shown::line(text, 150))
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

pub(crate) fn is_lower_hex(byte: u8) -> bool {
    byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)
}

/// A digest in the making.
#[derive(Debug, Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => Digest(format!("sha256:{}", hex(&hasher.finalize()))),
            Self::Sha512(hasher) => Digest(format!("sha512:{}", hex(&hasher.finalize()))),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_that_can_be_verified_are_accepted() {
        let good = Digest::of(b"").to_string();
        assert_eq!(
            good,
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        for bad in [
            "",
            "sha256:",
            "sha256:../../../etc/passwd",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            &good.to_uppercase(),
            &good[..70],
            &format!("{good}0"),
            &good.replace("e3", "é"),
        ] {
            assert!(Digest::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn sha512_is_computed_with_its_own_hasher() {
        let digest = Digest::try_from(format!("sha512:{}", "0".repeat(128))).unwrap();
        let actual = digest.hasher().finish();
        assert!(actual.as_str().starts_with("sha512:cf83e1357eefb8bd"));
    }
}
