//! Names that come from the host and become path components.

use std::{fmt, path::Path};

/// A container, exec or storage id: one harmless path component.
///
/// It holds at most 128 letters, digits and `_.-` and starts with none of `.-`,
/// so it can neither leave a directory nor be taken for an option, and it needs
/// no quoting in mount options (`overlay` splits at `:` and `,`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Id(String);

/// Why a string is no [`Id`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} {value:?} is not a name of 1 to 128 letters, digits and \"_.-\"")]
pub(crate) struct IdError {
    what: &'static str,
    value: String,
}

impl Id {
    /// Checks `value`; `what` names it in the error ("container id").
    pub(crate) fn parse(what: &'static str, value: &str) -> Result<Self, IdError> {
        let fits = (1..=128).contains(&value.len())
            && !value.starts_with(['.', '-'])
            && value
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if fits {
            Ok(Self(value.to_owned()))
        } else {
            Err(IdError {
                what,
                value: value.chars().take(160).collect(),
            })
        }
    }

    /// Returns the name itself.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<Path> for Id {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_plain_components_are_ids() {
        for good in ["a", "0123abc", "sha256-1.x_y", &"f".repeat(64)] {
            assert!(Id::parse("id", good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            ".x",
            "a:b",
            "a,b",
            "a b",
            "ä",
            &"x".repeat(129),
        ] {
            assert!(Id::parse("id", bad).is_err(), "{bad}");
        }
    }
}
