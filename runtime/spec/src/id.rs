//! Identities of pods and containers: 64 lower-case hex digits.

use std::{borrow::Borrow, fmt};

use serde::{Deserialize, Serialize};

const DIGITS: usize = 64;

/// The text is not 64 lower-case hex digits.
#[derive(Debug, thiserror::Error)]
#[error("parse id {0:?}: it must be 64 lower-case hex digits")]
pub struct InvalidId(String);

fn checked(text: String) -> Result<String, InvalidId> {
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() == DIGITS && text.bytes().all(is_hex) {
        Ok(text)
    } else {
        Err(InvalidId(text))
    }
}

fn random() -> String {
    let bytes: [u8; DIGITS / 2] = rand::random();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// A new random id.
            #[must_use]
            pub fn random() -> Self {
                Self(random())
            }

            /// The 64 hex digits.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 13 digits, for logs and short names.
            #[must_use]
            pub fn short(&self) -> &str {
                &self.0[..13]
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                checked(text).map(Self)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id! {
    /// The identity of a pod sandbox.
    PodId
}
id! {
    /// The identity of a container.
    ContainerId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_survives_text() {
        let id = PodId::random();
        assert_eq!(PodId::try_from(id.to_string()).unwrap(), id);
        assert_ne!(PodId::random(), id);
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", "abc", &"G".repeat(64), &"a".repeat(65), &"A".repeat(64)] {
            assert!(ContainerId::try_from((*text).to_owned()).is_err(), "{text}");
        }
    }
}
