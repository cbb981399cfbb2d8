//! Why there are no settings, and the checks that several tables have in common.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file can't be read.
    #[error("read configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It isn't TOML, or a value has the wrong type.
    #[error("{}: line {line}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// Why.
        reason: String,
    },
    /// There is no such key.
    #[error("{}: there is no key {key}; {}", path.display(), advice(nearest.as_deref()))]
    Unknown {
        /// The file.
        path: PathBuf,
        /// As it is written.
        key: String,
        /// What may be meant.
        nearest: Option<String>,
    },
    /// A value is out of range.
    #[error("{}{key}: {reason}", Prefix(path.as_deref()))]
    Invalid {
        /// The file that has it; none: a flag, or several.
        path: Option<PathBuf>,
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

impl ConfigError {
    /// Adds the file where a key comes from.
    pub(super) fn found_in<'a>(mut self, origin: impl FnOnce(&str) -> Option<&'a Path>) -> Self {
        if let Self::Invalid { path, key, .. } = &mut self {
            *path = origin(key).map(Path::to_owned);
        }
        self
    }
}

fn advice(nearest: Option<&str>) -> String {
    match nearest {
        Some(key) => format!("did you mean {key}?"),
        None => "`hull config default` lists all".to_owned(),
    }
}

/// A file before what is said about it.
struct Prefix<'a>(Option<&'a Path>);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(path) => write!(f, "{}: ", path.display()),
            None => Ok(()),
        }
    }
}

pub(super) fn absolute(key: &str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    // Flags are typed relative to where a person is; a daemon's paths must not depend on it.
    std::path::absolute(&path).map_err(|error| invalid(key, &error.to_string()))
}

pub(super) fn invalid(key: &str, reason: &str) -> ConfigError {
    ConfigError::Invalid {
        path: None,
        key: key.to_owned(),
        reason: reason.to_owned(),
    }
}
